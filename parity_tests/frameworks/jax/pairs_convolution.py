"""The Flax halves of ported pairs, and what ports get wrong: convolutions, pools, and blocks of image models."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from parity_tests.frameworks.jax.pairs_basic import ACTIVATIONS, Half, dense, half, layer, parameter

_ONE = ((1, 1), (1, 1))


def conv(inputs: int, outputs: int, window: tuple[int, ...], **options: Any) -> nnx.Conv:
    """Return a convolution without padding; its numbers are drawn by the judge."""
    return nnx.Conv(inputs, outputs, window, rngs=nnx.Rngs(0), **{"padding": "VALID", **options})


def batch(features: int, epsilon: float = 1e-5) -> nnx.BatchNorm:
    """Return a batch norm in inference mode."""
    return nnx.BatchNorm(features, use_running_average=True, epsilon=epsilon, rngs=nnx.Rngs(0))


def strided_conv(padding: Any = _ONE, flipped: bool = False, bias: float = 1.0) -> Half:
    """Pad explicitly; a convolution of signal processing flips the kernel."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        kernel = m.kernel[::-1, ::-1] if flipped else m.kernel[...]
        y = jax.lax.conv_general_dilated(x, kernel, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + bias * m.bias[...]

    return half(call, kernel=parameter(3, 3, 3, 5), bias=parameter(5))


def temporal_conv(
    left: tuple[int, int] = (2, 4), dilation: int = 2, reverse: bool = False, activation: str = "relu"
) -> Half:
    """Make two causal layers, the second dilated; `left` is how much of their padding comes first."""
    first = conv(4, 5, (3,), padding=((left[0], 2 - left[0]),))
    second = conv(5, 6, (3,), padding=((left[1], 2 * dilation - left[1]),), kernel_dilation=dilation)

    def call(m: Any, x: jax.Array) -> jax.Array:
        x = x[:, ::-1] if reverse else x
        y = jax.nn.relu(m.second(ACTIVATIONS[activation](m.first(x))))
        return y[:, ::-1] if reverse else y

    return half(call, first=first, second=second)


def conv3d(padding: Any = (*_ONE, (1, 1)), bias: bool = True) -> Half:
    """Make a stock one."""
    layer3d = conv(2, 4, (3, 3, 3), strides=(1, 2, 2), padding=padding)
    return half(lambda m, x: m.conv(x) if bias else m.conv(x) - m.conv.bias[...], conv=layer3d)


def separable_conv(tiled: bool = False, dilation: int = 1, activation: str = "silu") -> Half:
    """Make a depthwise convolution, then a pointwise one; `tiled` orders the filters by channel within filter."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = m.depth(x)
        if tiled:
            y = y.reshape(*y.shape[:-1], 3, 2).swapaxes(-1, -2).reshape(y.shape)
        return m.point(ACTIVATIONS[activation](y))

    depth = conv(*(3, 6, (3, 3)), padding=((dilation, dilation),) * 2, feature_group_count=3, kernel_dilation=dilation)
    return half(call, depth=depth, point=conv(6, 4, (1, 1)))


def shuffle_block(groups: int = 2, shuffled: bool = True, activation: str = "relu") -> Half:
    """Shuffle channels between two grouped convolutions."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        x = ACTIVATIONS[activation](m.first(x))
        if shuffled:
            x = x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)
        return m.second(x)

    first = conv(4, 6, (1, 1), feature_group_count=2)
    return half(call, first=first, second=conv(6, 4, (3, 3), padding=_ONE, feature_group_count=2))


def conv_transpose(kernel: bool = True, start: int = 1, activation: str = "tanh") -> Half:
    """Make a stock one, cropped by hand; without `kernel`, Flax's default, it reads the window the other way round."""
    up = nnx.ConvTranspose(*(3, 5, (3, 4)), strides=(2, 2), padding="VALID", transpose_kernel=kernel, rngs=nnx.Rngs(0))

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = m.up(x)
        return ACTIVATIONS[activation](y[:, start : y.shape[1] - 2 + start, 1:-1])

    return half(call, up=up)


def max_pool(average: bool = False, padding: Any = _ONE, zero: bool = False) -> Half:
    """Pool overlapping windows; `zero` pads with zeros beforehand."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = m.conv(x)
        if zero:
            y = jnp.pad(y, ((0, 0), *_ONE, (0, 0)))
        pool: Any = nnx.avg_pool if average else nnx.max_pool
        return pool(y, (3, 3), (2, 2), ((0, 0), (0, 0)) if zero else padding)

    return half(call, conv=conv(3, 4, (1, 1)))


def average_pool(include: bool = True, maximum: bool = False, padding: Any = _ONE) -> Half:
    """Average overlapping windows, with the padding or without."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        if maximum:
            return nnx.max_pool(m.conv(x), (3, 3), (2, 2), padding)
        return nnx.avg_pool(m.conv(x), (3, 3), (2, 2), padding, count_include_pad=include)

    return half(call, conv=conv(3, 4, (1, 1)))


def resnet_block(
    padding: Any = _ONE, epsilon: float = 1e-5, residual: float = 1.0, last: str = "relu", project: bool = True
) -> Half:
    """Make the basic block with a projection, in inference mode; `epsilon` is that of its second norm."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = m.bn2(m.conv2(jax.nn.relu(m.bn1(m.conv1(x)))))
        side = m.project(x)
        return ACTIVATIONS[last](y + residual * (m.bn3(side) if project else side))

    return half(
        call,
        conv1=conv(3, 5, (3, 3), strides=2, padding=padding, use_bias=False),
        conv2=conv(5, 5, (3, 3), padding=_ONE, use_bias=False),
        project=conv(3, 5, (1, 1), strides=2, use_bias=False),
        bn1=batch(5),
        bn2=batch(5, epsilon),
        bn3=batch(5),
    )


def convnext_block(epsilon: float = 1e-6, activation: str = "gelu", scaled: bool = True, residual: float = 1.0) -> Half:
    """Make the block with its layer scale."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = m.down(ACTIVATIONS[activation](m.up(m.norm(m.depth(x)))))
        return residual * x + (m.gamma[...] * y if scaled else y)

    return half(
        call,
        depth=conv(4, 4, (3, 3), padding=_ONE, feature_group_count=4),
        norm=layer(4, epsilon),
        up=dense(4, 9),
        down=dense(9, 4),
        gamma=parameter(4),
    )


def inverted_residual(
    activation: str = "relu6", last: str = "none", residual: float = 1.0, epsilon: float = 1e-5
) -> Half:
    """Make MobileNet's block, in inference mode; `activation` and `epsilon` are the first."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = ACTIVATIONS[activation](m.bn1(m.expand(x)))
        y = m.bn3(m.project(jax.nn.relu6(m.bn2(m.depth(y)))))
        return residual * x + ACTIVATIONS[last](y)

    return half(
        call,
        expand=conv(3, 6, (1, 1), use_bias=False),
        depth=conv(6, 6, (3, 3), padding=_ONE, feature_group_count=6, use_bias=False),
        project=conv(6, 3, (1, 1), use_bias=False),
        bn1=batch(6, epsilon),
        bn2=batch(6),
        bn3=batch(3),
    )


def squeeze_excite(gate: str = "sigmoid", pool: str = "mean", activation: str = "relu") -> Half:
    """Weigh channels by what the whole image says."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        pooled = getattr(jnp, pool)(x, axis=(1, 2), keepdims=True)
        return x * ACTIVATIONS[gate](m.expand(ACTIVATIONS[activation](m.reduce(pooled))))

    return half(call, reduce=conv(6, 3, (1, 1)), expand=conv(3, 6, (1, 1)))


def unet_level(
    exchanged: bool = False, method: str = "nearest", average: bool = False, activation: str = "relu"
) -> Half:
    """Go one level down and up again, beside a skip connection."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        skip = jax.nn.relu(m.enter(x))
        pool = nnx.avg_pool if average else nnx.max_pool
        below = ACTIVATIONS[activation](m.below(pool(skip, (2, 2), (2, 2))))
        b, h, w, c = skip.shape
        both = [skip, jax.image.resize(below, (b, h, w, c), method)]
        return m.leave(jnp.concatenate(both[::-1] if exchanged else both, -1))

    return half(
        call,
        enter=conv(3, 4, (3, 3), padding=_ONE),
        below=conv(4, 4, (3, 3), padding=_ONE),
        leave=conv(8, 2, (3, 3), padding=_ONE),
    )


def patch_embedding(by_column: bool = False, token_last: bool = False, positions: str = "all") -> Half:
    """Make the stem of a ViT: patches, a class token, positions (of `all`, or of the `patches` alone)."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        patches = m.patches(x)
        patches = (patches.swapaxes(1, 2) if by_column else patches).reshape(len(x), -1, 5)
        token = jnp.broadcast_to(m.token[...], (len(x), 1, 5))
        table = m.positions[...] if positions == "all" else m.positions[...].at[:, 0].set(0)
        return jnp.concatenate([patches, token] if token_last else [token, patches], 1) + table

    patches = conv(3, 5, (2, 2), strides=2)
    return half(call, patches=patches, token=parameter(1, 1, 5), positions=parameter(1, 7, 5))


def flatten_head(channels_first: bool = True, activation: str = "relu", padding: Any = _ONE) -> Half:
    """Flatten an image for a linear layer, channels first as torch does, or as it lies."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = ACTIVATIONS[activation](m.conv(x))
        return m.fc((y.transpose(0, 3, 1, 2) if channels_first else y).reshape(len(x), -1))

    return half(call, conv=conv(2, 3, (3, 3), padding=padding), fc=dense(3 * 4 * 5, 4))


def pixel_shuffle(channels_last: bool = False, exchanged: bool = False, activation: str = "tanh") -> Half:
    """Make an image twice as large; `channels_last` is the order of TensorFlow's depth_to_space."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = m.conv(x)
        b, h, w, c = y.shape
        if channels_last:
            y = y.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
        else:
            order = (0, 1, 5, 2, 4, 3) if exchanged else (0, 1, 4, 2, 5, 3)
            y = y.reshape(b, h, w, c // 4, 2, 2).transpose(order)
        return ACTIVATIONS[activation](y.reshape(b, 2 * h, 2 * w, c // 4))

    return half(call, conv=conv(3, 2 * 4, (3, 3), padding=_ONE))


def mixer_block(epsilon: float = 1e-5, activation: str = "gelu", residual: float = 1.0, shared: bool = False) -> Half:
    """Mix tokens, then channels; `epsilon` is that of the second norm, `shared` uses the first norm twice."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = m.tokens2(jax.nn.gelu(m.tokens1(m.norm1(x).swapaxes(1, 2)), approximate=False))
        x = residual * x + y.swapaxes(1, 2)
        y = (m.norm1 if shared else m.norm2)(x)
        return x + m.channels2(ACTIVATIONS[activation](m.channels1(y)))

    return half(
        call,
        norm1=layer(6),
        norm2=layer(6, epsilon),
        tokens1=dense(5, 7),
        tokens2=dense(7, 5),
        channels1=dense(6, 8),
        channels2=dense(8, 6),
    )
