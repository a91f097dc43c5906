"""The Flax halves of ported pairs, and what ports get wrong: linear layers, norms, embeddings, losses, and more."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_impl.layer import PartitionedLinear

Half = dict[str, Any]


class Net(nnx.Module):
    """Hold named modules and parameters, and say in one function what they compute."""

    def __init__(self, call: Callable[..., Any], **parts: Any) -> None:
        self._call = call
        for name, part in parts.items():
            setattr(self, name, nnx.List(part) if isinstance(part, list) else part)

    def __call__(self, *inputs: jax.Array) -> Any:
        """Compute it."""
        return self._call(self, *inputs)


def half(call: Callable[..., Any], **parts: Any) -> Half:
    """Return the half of a `Net`."""
    return {"flax_module": Net(call, **parts)}


def dense(inputs: int, outputs: int, **options: Any) -> nnx.Linear:
    """Return a linear layer; its numbers are drawn by the judge."""
    return nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0), **options)


def layer(features: int, epsilon: float = 1e-5) -> nnx.LayerNorm:
    """Return a layer norm with torch's epsilon."""
    return nnx.LayerNorm(features, epsilon=epsilon, rngs=nnx.Rngs(0))


def parameter(*shape: int) -> nnx.Param[Any]:
    """Return a parameter; its numbers are drawn by the judge."""
    return nnx.Param(jnp.zeros(shape))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda x: x,  # what a port left out
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    **{name: getattr(jax.nn, name) for name in ("elu", "hard_sigmoid", "relu", "relu6", "sigmoid", "silu", "tanh")},
}


def linear(bias: float = 1.0, dtype: Any = None) -> Half:
    """Make a square layer; `bias` is how often it is added."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = x.astype(dtype or x.dtype) @ m.kernel[...].astype(dtype or x.dtype)
        return y.astype(x.dtype) + bias * m.bias[...]

    return half(call, kernel=parameter(7, 7), bias=parameter(7))


def mlp(activation: str = "gelu", bias: bool = True) -> Half:
    """Make two layers with an exact GELU between them."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        return m.out(ACTIVATIONS[activation](m.hidden(x) if bias else x @ m.hidden.kernel[...]))

    return half(call, hidden=dense(6, 11), out=dense(11, 5))


def residual_mlp(residual: float = 1.0, after: bool = False, epsilon: float = 1e-5, activation: str = "silu") -> Half:
    """Make x + W2 silu(W1 norm(x))."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        if after:
            return m.norm(x + m.down(ACTIVATIONS[activation](m.up(x))))
        return residual * x + m.down(ACTIVATIONS[activation](m.up(m.norm(x))))

    return half(call, norm=layer(6, epsilon), up=dense(6, 11), down=dense(11, 6))


def swiglu(exchanged: bool = False, activation: str = "silu") -> Half:
    """Make LLaMA's feed-forward layer."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        gate, value = jnp.split(m.gate_up(x), 2, -1)
        return m.down(ACTIVATIONS[activation](value) * gate if exchanged else ACTIVATIONS[activation](gate) * value)

    return half(call, gate_up=dense(6, 2 * 9, use_bias=False), down=dense(9, 6, use_bias=False))


def layer_norm(epsilon: float = 1e-5, outside: bool = False, ddof: int = 0, centred: bool = True) -> Half:
    """Make (x - mean) / sqrt(var + epsilon) * scale + bias by hand, as older ports have it."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        c = x - x.mean(-1, keepdims=True) if centred else x
        variance = jnp.sum(c**2, -1, keepdims=True) / (x.shape[-1] - ddof)
        root = jnp.sqrt(variance) + epsilon if outside else jnp.sqrt(variance + epsilon)
        return c / root * m.scale[...] + m.bias[...]

    return half(call, scale=parameter(10), bias=parameter(10))


def rms_norm(epsilon: float = 1e-6, shift: float = 0.0, centred: bool = False) -> Half:
    """Make x / sqrt(mean(x^2) + epsilon) * scale; Gemma's adds one to the scale."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        c = x - x.mean(-1, keepdims=True) if centred else x
        return c * jax.lax.rsqrt((c**2).mean(-1, keepdims=True) + epsilon) * (shift + m.scale[...])

    return half(call, scale=parameter(10))


def group_norm(epsilon: float = 1e-5, groups: int = 3, interleaved: bool = False) -> Half:
    """Make the stock one; `interleaved` puts every third channel into a group."""
    norm = nnx.GroupNorm(12, num_groups=groups, epsilon=epsilon, rngs=nnx.Rngs(0))

    def call(m: Any, x: jax.Array) -> jax.Array:
        if not interleaved:
            return m.norm(x)
        mixed = x.reshape(*x.shape[:-1], 4, 3).swapaxes(-1, -2)
        c = mixed - mixed.mean((1, 2, 4), keepdims=True)
        c = c / jnp.sqrt((c**2).mean((1, 2, 4), keepdims=True) + epsilon)
        return c.swapaxes(-1, -2).reshape(x.shape) * m.norm.scale[...] + m.norm.bias[...]

    return half(call, norm=norm)


def instance_norm(epsilon: float = 1e-5, ddof: int = 0, axes: tuple[int, ...] = (1, 2)) -> Half:
    """Normalise each channel of each image."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        c = x - x.mean(axes, keepdims=True)
        return c / jnp.sqrt(x.var(axes, keepdims=True, ddof=ddof) + epsilon) * m.scale[...] + m.bias[...]

    return half(call, scale=parameter(5), bias=parameter(5))


class BatchNorm(nnx.Module):
    """Normalise over the batch and keep torch's running statistics, whose variance is divided by n - 1."""

    def __init__(self, features: int, momentum: float, epsilon: float, ddof: int) -> None:
        self.scale, self.bias = parameter(features), parameter(features)
        self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))
        self._options = momentum, epsilon, ddof

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (b, c) to (b, c)."""
        momentum, epsilon, ddof = self._options
        mean, variance = x.mean(0), x.var(0)
        self.mean[...] = (1 - momentum) * self.mean[...] + momentum * mean
        self.var[...] = (1 - momentum) * self.var[...] + momentum * variance * len(x) / (len(x) - ddof)
        return (x - mean) / jnp.sqrt(variance + epsilon) * self.scale[...] + self.bias[...]


def batch_norm_train(momentum: float = 0.1, epsilon: float = 1e-5, ddof: int = 1, stock: bool = False) -> Half:
    """Make one with torch's conventions; Flax's own, in evaluation, is what a port forgets to switch."""
    if stock:
        norm = nnx.BatchNorm(6, use_running_average=True, epsilon=epsilon, rngs=nnx.Rngs(0))
        return {"flax_module": norm}
    return {"flax_module": BatchNorm(6, momentum, epsilon, ddof)}


def batch_norm_eval(train: bool = False, epsilon: float = 1e-5, activation: str = "relu") -> Half:
    """Make the stock one in inference mode, behind a layer."""
    norm = nnx.BatchNorm(7, use_running_average=not train, epsilon=epsilon, rngs=nnx.Rngs(0))
    return half(lambda m, x: ACTIVATIONS[activation](m.bn(m.fc(x))), fc=dense(5, 7), bn=norm)


def weight_norm(axis: int = 1, gain: bool = True, epsilon: float = 0.0) -> Half:
    """Divide a weight (o, i) by its length over `axis`, and multiply by a gain."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        v = m.direction[...]
        weight = v / jnp.sqrt((v**2).sum(axis, keepdims=True) + epsilon) * (m.gain[...] if gain else 1.0)
        return jnp.tanh(x @ weight.T + m.bias[...])

    return half(call, direction=parameter(5, 6), gain=parameter(5, 1), bias=parameter(5))


def film(exchanged: bool = False, shift: float = 1.0, activation: str = "relu") -> Half:
    """Scale and shift channels by what a condition says."""

    def call(m: Any, x: jax.Array, condition: jax.Array) -> jax.Array:
        gamma, beta = jnp.split(m.film(condition), 2, -1)
        gamma, beta = (beta, gamma) if exchanged else (gamma, beta)
        return ACTIVATIONS[activation]((shift + gamma[:, None]) * m.norm(x) + beta[:, None])

    return half(call, film=dense(5, 2 * 7), norm=layer(7))


def hypernetwork(spelling: str = "boi,bti->bto", scale: float = 0.5, activation: str = "tanh") -> Half:
    """Make a network that makes the weights of a square layer."""

    def call(m: Any, x: jax.Array, z: jax.Array) -> jax.Array:
        hidden = ACTIVATIONS[activation](m.inner(z))
        weight = m.weights(hidden).reshape(-1, 4, 4)
        return jnp.einsum(spelling, weight, x) * scale + m.bias(hidden)[:, None]

    return half(call, inner=dense(3, 8), weights=dense(8, 16), bias=dense(8, 4))


def partitioned(roll: int = 0, bias: bool = True, activation: str = "relu") -> Half:
    """Make our own layer in the place of the list."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        y = m.layers(jnp.roll(x, roll, 1))
        return ACTIVATIONS[activation](y if bias else y.at[:, 1].add(-m.layers.bias[1]))

    return half(call, layers=PartitionedLinear(3, 5, 5, rngs=nnx.Rngs(0)))


def mixture_of_experts(normalised: bool = True, count: int = 2, shift: int = 0, activation: str = "relu") -> Half:
    """Route each token to two of four experts; `normalised` over the chosen ones, or over all."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        scores = m.router(x)
        weights, chosen = jax.lax.top_k(scores if normalised else jax.nn.softmax(scores), count)
        weights = jax.nn.softmax(weights) if normalised else weights
        outputs = jnp.stack([b(ACTIVATIONS[activation](a(x))) for a, b in zip(m.up, m.down, strict=True)], 1)
        picked = jnp.take_along_axis(outputs, (chosen[..., None] + shift) % 4, 1)
        return (weights[..., None] * picked).sum(1)

    up, down = [dense(6, 5) for _ in range(4)], [dense(5, 6) for _ in range(4)]
    return half(call, router=dense(6, 4, use_bias=False), up=up, down=down)


def remat(residual: float = 1.0, stopped: bool = False, activation: str = "tanh") -> Half:
    """Make two residual layers whose activations are computed again for the gradient."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        for name in ("first", "second"):
            kernel, bias = getattr(m, name).kernel[...], getattr(m, name).bias[...]
            if stopped and name == "first":
                kernel, bias = jax.lax.stop_gradient((kernel, bias))
            step = jax.checkpoint(lambda h, kernel, bias: residual * h + ACTIVATIONS[activation](h @ kernel + bias))
            x = step(x, kernel, bias)
        return x

    return half(call, first=dense(6, 6), second=dense(6, 6))


def embedding_padding(index: int = 0, stopped: bool = True, counted: bool = False) -> Half:
    """Average the embeddings of the tokens that are no padding; torch does not train the row of the padding."""

    def call(m: Any, tokens: jax.Array) -> jax.Array:
        table = m.embed.embedding[...]
        if stopped:
            table = table.at[index].set(jax.lax.stop_gradient(table[index]))
        kept, found = (tokens != 0)[..., None], table[tokens]
        count = tokens.shape[1] if counted else kept.sum(1)
        return m.head((found * kept).sum(1) / count) + found.sum(1)

    return half(call, embed=nnx.Embed(11, 6, rngs=nnx.Rngs(0)), head=dense(6, 6))


def tied_embedding(scale: float = 6**0.5, stopped: bool = False, activation: str = "tanh") -> Half:
    """Use the embedding twice: tokens in, scores out."""

    def call(m: Any, tokens: jax.Array) -> jax.Array:
        table = m.embed.embedding[...]
        hidden = ACTIVATIONS[activation](m.fc(table[tokens] * scale))
        return hidden @ (jax.lax.stop_gradient(table) if stopped else table).T

    return half(call, embed=nnx.Embed(11, 6, rngs=nnx.Rngs(0)), fc=dense(6, 6))


def time_embedding(base: float = 10000.0, last: int = 4, sine_first: bool = False, activation: str = "silu") -> Half:
    """Make the time embedding of a diffusion model; some divide the exponent by one less."""

    def call(m: Any, t: jax.Array) -> jax.Array:
        angles = t[:, None] * base ** (-jnp.arange(4, dtype=t.dtype) / last)
        both = [jnp.cos(angles), jnp.sin(angles)]
        return m.out(ACTIVATIONS[activation](m.hidden(jnp.concatenate(both[::-1] if sine_first else both, -1))))

    return half(call, hidden=dense(8, 9), out=dense(9, 5))


def cross_entropy(smoothing: float = 0.1, others: bool = False, mean: bool = True, left_out: bool = True) -> Half:
    """Make a classifier's loss; `others` spreads the smoothing over the wrong classes alone."""

    def call(m: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        logs, keep = jax.nn.log_softmax(m.head(x)), labels >= 0
        hot = jax.nn.one_hot(labels, 5, dtype=logs.dtype)
        spread = smoothing / 4 * (1 - hot) if others else smoothing / 5
        losses = -jnp.where(keep, ((hot * (1 - smoothing) + spread) * logs).sum(-1), 0.0)
        return losses.sum() / ((keep.sum() if left_out else len(labels)) if mean else 1)

    return half(call, head=dense(6, 5))


def focal_loss(gamma: float = 2.0, alpha: float = 0.25, reduction: str = "mean") -> Half:
    """Make torchvision's focal loss."""

    def call(m: Any, x: jax.Array, target: jax.Array) -> jax.Array:
        scores = m.head(x)
        p = jax.nn.sigmoid(scores)
        entropy = -target * jax.nn.log_sigmoid(scores) - (1 - target) * jax.nn.log_sigmoid(-scores)
        right = p * target + (1 - p) * (1 - target)
        return getattr(jnp, reduction)((alpha * target + (1 - alpha) * (1 - target)) * entropy * (1 - right) ** gamma)

    return half(call, head=dense(6, 3))


def contrastive(sign: float = 1.0, normalised: bool = True, both: bool = True) -> Half:
    """Make CLIP's loss of two views; `sign` -1 divides by the scale."""

    def call(m: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        views = [m.left(a), m.right(b)]
        if normalised:
            views = [v / jnp.sqrt((v**2).sum(-1, keepdims=True)) for v in views]
        scores = views[0] @ views[1].T * jnp.exp(sign * m.log_scale[...])
        losses = [-jnp.diagonal(jax.nn.log_softmax(s, -1)).mean() for s in (scores, scores.T)]
        return (losses[0] + losses[1]) / 2 if both else losses[0]

    return half(call, left=dense(6, 4), right=dense(5, 4), log_scale=parameter(1))


def vae(power: float = 0.5, factor: float = -0.5, summed: bool = True) -> Half:
    """Make a variational autoencoder that is given its noise: the reconstruction and the divergence."""

    def call(m: Any, x: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, log_variance = jnp.split(m.encoder(x), 2, -1)
        z = mean + jnp.exp(power * log_variance) * noise
        terms = factor * (1 + log_variance - mean**2 - jnp.exp(log_variance))
        return m.decoder(z), (terms.sum(-1) if summed else terms).mean()

    return half(call, encoder=dense(7, 2 * 3), decoder=dense(3, 7))


def vector_quantiser(beta: float = 0.25, straight: bool = True, exchanged: bool = False) -> Half:
    """Take the nearest code; `exchanged` stops the gradients of the two losses the wrong way round."""

    def call(m: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        z, stop = m.encoder(x), jax.lax.stop_gradient
        codes = m.codes[...][((z[:, None] - m.codes[...]) ** 2).sum(-1).argmin(-1)]
        first, second = ((codes - stop(z)) ** 2).mean(), ((z - stop(codes)) ** 2).mean()
        first, second = (second, first) if exchanged else (first, second)
        return z + stop(codes - z) if straight else codes, first + beta * second

    return half(call, encoder=dense(6, 4), codes=parameter(5, 4))


def deep_sets(pool: str = "sum", activation: str = "relu") -> Half:
    """Sum over a set between two networks."""
    return half(
        lambda m, x: m.rho(getattr(jnp, pool)(ACTIVATIONS[activation](m.phi(x)), axis=1)),
        phi=dense(5, 7),
        rho=dense(7, 4),
    )


def graph_convolution(reversed_edges: bool = False, loops: bool = True, power: float = -0.5) -> Half:
    """Make a graph convolution over a list of edges, normalised by both degrees."""

    def call(m: Any, x: jax.Array, edges: jax.Array) -> jax.Array:
        own = jnp.arange(len(x) if loops else 0)
        source, target = jnp.concatenate([edges[0], own]), jnp.concatenate([edges[1], own])
        source, target = (target, source) if reversed_edges else (source, target)
        degree = jnp.zeros(len(x), x.dtype).at[target].add(1)
        degree = degree if loops else jnp.maximum(degree, 1)
        messages = m.fc(x)[source] * (degree[source] ** power * degree[target] ** power)[:, None]
        return jax.nn.elu(jax.ops.segment_sum(messages, target, len(x)) + m.bias[...])

    return half(call, fc=dense(5, 4, use_bias=False), bias=parameter(4))
