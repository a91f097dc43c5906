"""The Flax halves of ported pairs, and what ports get wrong: attention in its variants, positions, and transformers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from parity_tests.frameworks.jax.pairs_basic import ACTIVATIONS, Half, Net, dense, half, layer, parameter


def heads(x: jax.Array, count: int, interleaved: bool = False) -> jax.Array:
    """Split (b, t, h d) into (b, h, t, d); `interleaved` reads (d h)."""
    if interleaved:
        return x.reshape(*x.shape[:-1], -1, count).transpose(0, 3, 1, 2)
    return x.reshape(*x.shape[:-1], count, -1).swapaxes(1, 2)


def merged(x: jax.Array) -> jax.Array:
    """Undo `heads`."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:-2], -1)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: int | None = 0, power: float = -0.5, axis: int = -1
) -> Any:
    """Attend with a mask of -inf, `causal` positions ahead being seen (None: all)."""
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** power
    if causal is not None:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool), causal)
        scores = jnp.where(seen, scores, -jnp.inf)
    return jax.nn.softmax(scores, axis) @ v


def causal_attention(
    power: float = -0.5, causal: int | None = 0, interleaved: bool = False, order: tuple[int, ...] = (0, 1, 2)
) -> Half:
    """Make nanoGPT's attention: one projection for query, key and value, and a mask of -inf."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        parts = jnp.split(m.qkv(x), 3, -1)
        q, k, v = (heads(parts[n], 2, interleaved) for n in order)
        return m.out(merged(attend(q, k, v, causal, power)))

    return half(call, qkv=dense(6, 18), out=dense(6, 6))


def cross_attention(exchanged: bool = False, scale: float = 1.0, bias: bool = True) -> Half:
    """Make the stock one, of one sequence to another; `scale` multiplies the query once more."""

    def call(m: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = (y, x) if exchanged else (x, y)
        attention = nnx.dot_product_attention
        q, k, v = m.attn.query(x) * scale, m.attn.key(y), m.attn.value(y)
        result = m.attn.out(attention(q, k, v))
        return result if bias else result - m.attn.out.bias[...]

    return half(call, attn=nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0)))


def grouped_query_attention(tiled: bool = False, width: int = 2, causal: int | None = 0) -> Half:
    """Make attention in which two query heads share a key and value head; `width` is what the scale is made of."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        q, k, v = heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2)
        k, v = (jnp.tile(p, (1, 2, 1, 1)) if tiled else jnp.repeat(p, 2, 1) for p in (k, v))
        return m.o(merged(attend(q * (width / 2) ** -0.5, k, v, causal)))

    sizes = {"q": (8, 8), "k": (8, 4), "v": (8, 4), "o": (8, 8)}
    return half(call, **{name: dense(*size, use_bias=False) for name, size in sizes.items()})


def rotary_attention(interleaved: bool = False, base: float = 10000.0, sign: float = 1.0, keys: bool = True) -> Half:
    """Make LLaMA's attention, which turns halves of a head; `interleaved` turns neighbours, as GPT-J does."""

    def rotate(x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        angles = jnp.arange(x.shape[-2])[:, None] * base ** (-jnp.arange(0, width, 2, dtype=x.dtype) / width)
        cos, sin = jnp.cos(angles), sign * jnp.sin(angles)
        if interleaved:
            first, second = x[..., 0::2], x[..., 1::2]
            both = [first * cos - second * sin, second * cos + first * sin]
            return jnp.stack(both, -1).reshape(x.shape)
        first, second = jnp.split(x, 2, -1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def call(m: Any, x: jax.Array) -> jax.Array:
        q, k, v = heads(m.q(x), 2), heads(m.k(x), 2), heads(m.v(x), 2)
        return m.o(merged(attend(rotate(q), rotate(k) if keys else k, v)))

    return half(call, **{name: dense(8, 8, use_bias=False) for name in "qkvo"})


def alibi_attention(sign: float = 1.0, first: int = 1, last: float = 8.0, causal: bool = True) -> Half:
    """Make causal attention with a linear bias by distance; `first` is the head with the steepest slope, minus one."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        q, k, v = (heads(part, 4) for part in jnp.split(m.qkv(x), 3, -1))
        t = jnp.arange(x.shape[1])
        slopes = 2.0 ** (-last * jnp.arange(first, first + 4, dtype=x.dtype) / 4)
        bias = sign * slopes[:, None, None] * (t - t[:, None])
        bias = jnp.where(t > t[:, None], -jnp.inf, bias) if causal else bias
        return m.out(merged(jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2**0.5 + bias) @ v))

    return half(call, qkv=dense(8, 24), out=dense(8, 8))


def window_attention(transposed: bool = False, strided: bool = False, biased: float = 1.0) -> Half:
    """Make Swin's attention within windows; `strided` takes every second token for a window."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        shape = (b, 2, h // 2, 2, w // 2, c) if strided else (b, h // 2, 2, w // 2, 2, c)
        order = (0, 2, 4, 1, 3, 5) if strided else (0, 1, 3, 2, 4, 5)
        windows = x.reshape(shape).transpose(order)
        q, k, v = (heads(part, 2) for part in jnp.split(m.qkv(windows.reshape(-1, 4, c)), 3, -1))
        rows, columns = jnp.arange(4) // 2, jnp.arange(4) % 2
        index = 3 * (rows[:, None] - rows + 1) + columns[:, None] - columns + 1
        bias = m.table[...][index.T if transposed else index].transpose(2, 0, 1)
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / (c // 2) ** 0.5 + biased * bias)
        y = m.out(merged(weights @ v)).reshape(windows.shape)
        return y.transpose([order.index(n) for n in range(6)]).reshape(x.shape)

    return half(call, qkv=dense(6, 18), out=dense(6, 6), table=parameter(9, 2))


def linear_attention(shift: float = 1.0, normalised: bool = True, causal: bool = True) -> Half:
    """Make attention by a running sum, with elu + 1 in the place of the exponential."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        q, k, v = jax.nn.elu(m.q(x)) + shift, jax.nn.elu(m.k(x)) + 1, m.v(x)
        run = (lambda a: jnp.cumsum(a, 1)) if causal else (lambda a: a.sum(1, keepdims=True))
        sums = jnp.einsum("bti,btij->btj", q, jnp.broadcast_to(run(k[..., None] * v[:, :, None]), (*k.shape, 5)))
        return sums / (q * run(k)).sum(-1, keepdims=True) if normalised else sums

    return half(call, q=dense(6, 4), k=dense(6, 4), v=dense(6, 5))


def attention_pooling(masked: bool = True, axis: int = 1, activation: str = "tanh") -> Half:
    """Average a padded sequence with learned weights."""

    def call(m: Any, x: jax.Array, kept: jax.Array) -> jax.Array:
        scores = m.score(ACTIVATIONS[activation](m.key(x)))
        scores = jnp.where(kept[..., None], scores, -jnp.inf if masked else 0.0)
        return m.out((jax.nn.softmax(scores, axis) * x).sum(1))

    return half(call, key=dense(6, 5), score=dense(5, 1, use_bias=False), out=dense(6, 4))


def sinusoidal_positions(scale: float = 6**0.5, base: float = 10000.0, first: int = 0, in_turn: bool = True) -> Half:
    """Make the input of the first transformer; without `in_turn` all sines come before all cosines."""

    def call(m: Any, tokens: jax.Array) -> jax.Array:
        x = m.embed(tokens) * scale
        positions = jnp.arange(first, first + x.shape[1], dtype=x.dtype)
        angles = positions[:, None] * base ** (-jnp.arange(0, 6, 2, dtype=x.dtype) / 6)
        table = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1 if in_turn else 1)
        return m.out(x + table.reshape(len(table), -1))

    return half(call, embed=nnx.Embed(9, 6, rngs=nnx.Rngs(0)), out=dense(6, 4))


def _encoder(pre: bool, activation: str, epsilon: float, residual: float, causal: int | None) -> Half:
    def call(m: Any, x: jax.Array) -> jax.Array:
        def attention(h: jax.Array) -> jax.Array:
            q, k, v = (part.swapaxes(1, 2) for part in (m.attn.query(h), m.attn.key(h), m.attn.value(h)))
            return m.attn.out(attend(q, k, v, causal).swapaxes(1, 2))

        def feed(h: jax.Array) -> jax.Array:
            return m.linear2(ACTIVATIONS[activation](m.linear1(h)))

        if pre:
            x = x + attention(m.norm1(x))
            return residual * x + feed(m.norm2(x))
        x = m.norm1(x + attention(x))
        return m.norm2(residual * x + feed(x))

    attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
    norms = {"norm1": layer(6), "norm2": layer(6, epsilon)}
    return half(call, attn=attention, linear1=dense(6, 9), linear2=dense(9, 6), **norms)


def encoder_post(
    pre: bool = False, activation: str = "relu", epsilon: float = 1e-5, residual: float = 1.0, causal: int | None = None
) -> Half:
    """Make torch's layer, norms behind, ReLU; `epsilon` is that of the second norm."""
    return _encoder(pre, activation, epsilon, residual, causal)


def encoder_pre(
    pre: bool = True, activation: str = "gelu", epsilon: float = 1e-5, residual: float = 1.0, causal: int | None = None
) -> Half:
    """Make torch's layer, norms in front, GELU; `epsilon` is that of the second norm."""
    return _encoder(pre, activation, epsilon, residual, causal)


def decoder_stack(
    epsilon: float = 1e-5,
    activation: str = "gelu_tanh",
    residual: float = 1.0,
    power: float = -0.5,
    causal: int = 0,
    order: tuple[int, ...] = (0, 1, 2),
) -> Half:
    """Make a small GPT whose second layer of three may be wrong."""

    def block(m: Any, x: jax.Array, power: float, causal: int, activation: str, residual: float) -> jax.Array:
        q, k, v = (heads(part, 2) for part in jnp.split(m.qkv(m.ln_1(x)), 3, -1))
        x = x + m.proj(merged(attend(q, k, v, causal, power)))
        return residual * x + m.fc2(ACTIVATIONS[activation](m.fc1(m.ln_2(x))))

    def call(m: Any, tokens: jax.Array) -> jax.Array:
        x = m.wte(tokens) + m.wpe.embedding[...]
        for n in order:
            x = m.blocks[n](x)
        return m.head(m.ln_f(x))

    def make(wrong: bool) -> Net:
        options = (power, causal, activation, residual) if wrong else (-0.5, 0, "gelu_tanh", 1.0)
        linears = {"qkv": dense(6, 18), "proj": dense(6, 6), "fc1": dense(6, 8), "fc2": dense(8, 6)}
        norms = {"ln_1": layer(6), "ln_2": layer(6, epsilon if wrong else 1e-5)}
        return Net(lambda m, x: block(m, x, *options), **linears, **norms)

    return half(
        call,
        wte=nnx.Embed(9, 6, rngs=nnx.Rngs(0)),
        wpe=nnx.Embed(5, 6, rngs=nnx.Rngs(0)),
        blocks=[make(n == 1) for n in range(3)],
        ln_f=layer(6),
        head=dense(6, 9, use_bias=False),
    )
