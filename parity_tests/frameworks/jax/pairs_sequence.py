"""The Flax halves of ported pairs, and what ports get wrong: recurrent layers, forecasters, physics and chemistry."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from parity_tests.frameworks.jax.pairs_basic import ACTIVATIONS, Half, dense, half, layer, parameter


def lstm_cell(forget: float = 0.0, last: str = "tanh", order: str = "ifgo") -> Half:
    """Make torch's cell by hand; `forget` is added to the forget gate, as TensorFlow does."""

    def call(m: Any, x: jax.Array, h: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        gates = dict(zip(order, jnp.split(m.input(x) + m.state(h), 4, -1), strict=True))
        c = jax.nn.sigmoid(gates["f"] + forget) * c + jax.nn.sigmoid(gates["i"]) * jnp.tanh(gates["g"])
        return jax.nn.sigmoid(gates["o"]) * ACTIVATIONS[last](c), c

    return half(call, input=dense(4, 20), state=dense(5, 20))


def _recurrent(inputs: int, gate: str = "sigmoid", activation: str = "tanh", **options: Any) -> nnx.RNN:
    cell = nnx.OptimizedLSTMCell(
        inputs, 5, gate_fn=ACTIVATIONS[gate], activation_fn=ACTIVATIONS[activation], rngs=nnx.Rngs(0)
    )
    return nnx.RNN(cell, rngs=nnx.Rngs(0), **options)


def lstm_layers(epsilon: float = 1e-5, gate: str = "sigmoid", reverse: bool = False, carry: float = 0.0) -> Half:
    """Make two stock layers over time; the second one's gates, direction and first state may be wrong."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        start = tuple(jnp.full((len(x), 5), carry, x.dtype) for _ in range(2))
        return m.head(m.second(m.first(m.norm(x)), initial_carry=start))

    second = _recurrent(5, gate, reverse=reverse, keep_order=reverse)
    return half(call, norm=layer(4, epsilon), first=_recurrent(4), second=second, head=dense(5, 3))


def bidirectional_lstm(keep_order: bool = True, exchanged: bool = False, reverse: bool = True) -> Half:
    """Make a stock layer in both directions; without `keep_order` the second one's outputs stay reversed."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        both = [m.forward(x), m.backward(x)]
        return jnp.concatenate(both[::-1] if exchanged else both, -1)

    backward = _recurrent(4, reverse=reverse, keep_order=keep_order)
    return half(call, forward=_recurrent(4), backward=backward)


def gru(reset_first: bool = False, order: str = "rzn", keep: bool = True) -> Half:
    """Make torch's by a scan; `reset_first` resets the state before its product, as older definitions do."""

    def call(m: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            own = dict(zip(order, jnp.split(m.input(x), 3, -1), strict=True))
            state = dict(zip(order, jnp.split(m.state(h), 3, -1), strict=True))
            r, z = (jax.nn.sigmoid(own[gate] + state[gate]) for gate in "rz")
            if reset_first:
                state["n"] = dict(zip(order, jnp.split(m.state(r * h), 3, -1), strict=True))["n"]
                n = jnp.tanh(own["n"] + state["n"])
            else:
                n = jnp.tanh(own["n"] + r * state["n"])
            h = (1 - z) * n + z * h if keep else z * n + (1 - z) * h
            return h, h

        last, outputs = jax.lax.scan(step, jnp.zeros((len(x), 5), x.dtype), x.swapaxes(0, 1))
        return outputs.swapaxes(0, 1), last[None]

    return half(call, input=dense(4, 15), state=dense(5, 15))


def diagonal_ssm(method: str = "exact", skip: float = 1.0, activation: str = "gelu") -> Half:
    """Make a diagonal state-space layer by a scan, discretised `exact`ly, by `euler` or the `bilinear` rule."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        a, step = -jnp.exp(m.log_a[...]), jnp.exp(m.log_step[...])[:, None]
        decay, gain = {
            "exact": lambda: (jnp.exp(a * step), jnp.expm1(a * step) / a),
            "euler": lambda: (1 + a * step, step),
            "bilinear": lambda: ((1 + a * step / 2) / (1 - a * step / 2), step / (1 - a * step / 2)),
        }[method]()

        def advance(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            state = decay * state + gain * m.b[...] * x[..., None]
            return state, (m.c[...] * state).sum(-1)

        _, y = jax.lax.scan(advance, jnp.zeros((len(x), 3, 4), x.dtype), x.swapaxes(0, 1))
        return ACTIVATIONS[activation](y.swapaxes(0, 1) + skip * m.d[...] * x)

    parts = {"log_a": parameter(3, 4), "log_step": parameter(3)}
    return half(call, **parts, b=parameter(3, 4), c=parameter(3, 4), d=parameter(3))


def rg_lru(factor: float = 8.0, root: bool = True, gated: bool = True) -> Half:
    """Make Griffin's real-gated linear recurrence by an associative scan."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        log_a = -factor * jax.nn.softplus(m.decay[...]) * jax.nn.sigmoid(m.recurrence(x))
        a, rest = jnp.exp(log_a), 1 - jnp.exp(2 * log_a)
        u = (jax.nn.sigmoid(m.gate(x)) if gated else 1.0) * x * (jnp.sqrt(rest) if root else rest)

        def join(first: Any, second: Any) -> Any:
            return first[0] * second[0], first[1] * second[0] + second[1]

        return jax.lax.associative_scan(join, (a, u), axis=1)[1]

    return half(call, decay=parameter(4), recurrence=dense(4, 4), gate=dense(4, 4))


def fourier_layer(modes: int = 3, conjugate: bool = False, norm: str = "backward", skip: float = 1.0) -> Half:
    """Make a layer of a Fourier neural operator."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        spectrum = jnp.fft.rfft(x, axis=1, norm=norm)
        weight = m.weight[...].conj() if conjugate else m.weight[...]
        kept = jnp.einsum("bkc,kcd->bkd", spectrum[:, :modes], weight[:modes])
        padded = jnp.pad(kept, ((0, 0), (0, spectrum.shape[1] - modes), (0, 0)))
        return jax.nn.gelu(jnp.fft.irfft(padded, n=x.shape[1], axis=1) + skip * m.skip(x), approximate=False)

    return half(call, weight=nnx.Param(jnp.ones((3, 4, 4), jnp.complex64)), skip=dense(4, 4))


def dlinear(ends: str = "edge", window: int = 5, exchanged: bool = False) -> Half:
    """Make DLinear: a moving average whose ends are padded, and a layer for each part."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (window // 2, window // 2), (0, 0)), mode=ends)
        trend = nnx.avg_pool(padded, (window,)).swapaxes(1, 2)
        rest = x.swapaxes(1, 2) - trend
        trend, rest = (rest, trend) if exchanged else (trend, rest)
        return (m.seasonal(rest) + m.trend(trend)).swapaxes(1, 2)

    return half(call, seasonal=dense(8, 3), trend=dense(8, 3))


def nlinear(first: bool = False, added: bool = True, mean: bool = False) -> Half:
    """Make NLinear: a layer over time around the last value."""

    def call(m: Any, x: jax.Array) -> jax.Array:
        centre = x.mean(1, keepdims=True) if mean else x[:, :1] if first else x[:, -1:]
        y = m.fc((x - centre).swapaxes(1, 2)).swapaxes(1, 2)
        return y + centre if added else y

    return half(call, fc=dense(8, 3))


def nbeats_block(sign: float = -1.0, last: int = 0, activation: str = "relu") -> Half:
    """Make N-BEATS' block; with `last` 1 the times end at 1, as of linspace."""

    def call(m: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = ACTIVATIONS[activation](m.fc2(jax.nn.relu(m.fc1(x))))
        powers = jnp.arange(3, dtype=x.dtype)[:, None]
        past, future = (jnp.arange(n, dtype=x.dtype) / (n - last) for n in (8, 4))
        return x + sign * m.backcast(h) @ past**powers, m.forecast(h) @ future**powers

    thetas = {name: dense(7, 3, use_bias=False) for name in ("backcast", "forecast")}
    return half(call, fc1=dense(8, 7), fc2=dense(7, 7), **thetas)


def pendulum(weights: tuple[int, ...] = (1, 2, 2, 1), half_step: float = 0.05, sine: bool = True) -> Half:
    """Solve a damped pendulum by three steps of Runge and Kutta."""

    def call(m: Any, y: jax.Array) -> jax.Array:
        def slope(y: jax.Array) -> jax.Array:
            angle, speed = y[..., 0], y[..., 1]
            pull = jnp.sin(angle) if sine else angle
            return jnp.stack([speed, -m.stiffness[...] * pull - m.damping[...] * speed], -1)

        def step(y: jax.Array, _: None) -> tuple[jax.Array, None]:
            k1 = slope(y)
            k2 = slope(y + 0.05 * k1)
            k3 = slope(y + half_step * k2)
            k4 = slope(y + 0.1 * k3)
            total = sum(w * k for w, k in zip(weights, (k1, k2, k3, k4), strict=True))
            return y + 0.1 / sum(weights) * total, None

        return jax.lax.scan(step, y, None, length=3)[0]

    return half(call, stiffness=parameter(1), damping=parameter(1))


def gaussian_process(squared: bool = True, noise: float = 0.1, factor: float = -0.5) -> Half:
    """Predict by a Gaussian process: a factor of Cholesky and two solves."""

    def call(m: Any, x: jax.Array, y: jax.Array, new: jax.Array) -> jax.Array:
        def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
            length = jnp.exp(m.log_length[...]) ** (2 if squared else 1)
            return jnp.exp(factor * ((a[:, None] - b) ** 2 / length).sum(-1))

        covariance = kernel(x, x) + (noise + jnp.exp(m.log_noise[...])) * jnp.eye(len(x), dtype=x.dtype)
        return kernel(new, x) @ jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(covariance), True), y)

    return half(call, log_length=parameter(2), log_noise=parameter(1))


def radial_filter(shift: float = math.log(2.0), cut: bool = True, width: float = 2.0) -> Half:
    """Make SchNet's continuous filter; `shift` makes softplus zero at zero."""

    def call(m: Any, x: jax.Array, positions: jax.Array) -> jax.Array:
        own = jnp.eye(len(x), dtype=x.dtype)
        distances = jnp.sqrt(((positions[:, None] - positions + own[..., None]) ** 2).sum(-1))
        gaussians = jnp.exp(-((distances[..., None] - jnp.linspace(0, 4, 5, dtype=x.dtype)) ** 2) / width)
        smooth = 0.5 * (jnp.cos(jnp.pi * distances / 4) + 1) * (distances < 4) if cut else 1.0
        weights = m.out(jax.nn.softplus(m.hidden(gaussians)) - shift)
        return jnp.einsum("ij,ijc,jc->ic", smooth * (1 - own), weights, x)

    return half(call, hidden=dense(5, 6), out=dense(6, 3))
