"""The Flax sides of the examples, and what Flax's modules do by default, measured."""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def linear() -> dict[str, Any]:
    """Make `nnx.Linear`."""
    return {"flax_module": nnx.Linear(24, 16, rngs=nnx.Rngs(0))}


def conv() -> dict[str, Any]:
    """Make `nnx.Conv`, channels last, padding `SAME` by default."""
    return {"flax_module": nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))}


def layer_norm() -> dict[str, Any]:
    """Make `nnx.LayerNorm` with its default epsilon."""
    return {"flax_module": nnx.LayerNorm(16, rngs=nnx.Rngs(0))}


def attention() -> dict[str, Any]:
    """Make `nnx.MultiHeadAttention` without a decoding cache."""
    return {"flax_module": nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))}


class Cell(nn.Module):
    """Linen's `GRUCell` with torch's order of arguments and only the new state returned."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, hidden: jax.Array) -> jax.Array:
        """Map (..., i), (..., h) to (..., h)."""
        return nn.GRUCell(self.features)(hidden, x)[0]


def gru_cell() -> dict[str, Any]:
    """Make Linen's `GRUCell`: that of nnx has no bias on the recurrent side, so that it cannot express torch's."""
    return {"flax_module": Cell(8)}


class StateFirstCell(nn.Module):
    """Linen's `GRUCell` with its own order of arguments; it returns the new state twice, of which one is kept."""

    features: int

    @nn.compact
    def __call__(self, hidden: jax.Array, x: jax.Array) -> jax.Array:
        """Map (..., h), (..., i) to (..., h)."""
        return nn.GRUCell(self.features)(hidden, x)[0]


def gru_cell_defaults() -> dict[str, Any]:
    """Make Linen's `GRUCell`, called with the state, then the input."""
    return {"flax_module": StateFirstCell(8)}


def measure_defaults() -> dict[tuple[str, str], str]:
    """Measure modules as they are created by default, by pair and aspect; the torch side measures the same."""
    rngs = nnx.Rngs(0)
    dense = nnx.Linear(400, 300, rngs=rngs)
    plain_conv = nnx.Conv(16, 200, (3, 3), rngs=rngs)
    attention = nnx.MultiHeadAttention(4, 256, decode=False, rngs=rngs)
    with jax.enable_x64(True):
        norm = nnx.LayerNorm(2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        normalised = float(norm(jnp.asarray([[1e-3, -1e-3]], jnp.float64))[0, 0])
    cell = nn.GRUCell(64)
    variables = jax.jit(cell.init)(jax.random.key(0), np.zeros((1, 64)), np.zeros((1, 64)))["params"]
    gates = nn.GRUCell(3)
    hidden, x = np.full((1, 3), 0.7, np.float32), np.zeros((1, 2), np.float32)
    shapes = jax.eval_shape(gates.init, jax.random.key(0), hidden, x)["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    run = jax.jit(gates.apply)
    kept = [
        np.allclose(run({"params": zeros | {name: raised}}, hidden, x)[0], hidden)
        for name in ("ir", "iz", "in")
        for raised in ({**zeros[name], "bias": np.full((3,), 50.0, np.float32)},)
    ]
    small_attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    tokens = np.random.default_rng(1).standard_normal((2, 2, 8)).astype(np.float32)
    attended = small_attention(jnp.asarray(tokens))
    moved = tokens.copy()
    moved[0, 1] += 1.0
    reached = np.abs(np.asarray(small_attention(jnp.asarray(moved))) - np.asarray(attended)).sum(-1) > 0
    recurrent = np.asarray(variables["hr"]["kernel"])
    output = plain_conv(jnp.zeros((1, 8, 8, 16)))
    return {
        ("linear", "kernel std times sqrt(fan-in)"): f"{np.std(dense.kernel[...]) * 400**0.5:.1f}",
        ("linear", "bias at zero"): str(not np.asarray(nnx.state(dense)["bias"][...]).any()),
        ("linear", "kernel shape of 400 -> 300"): str(dense.kernel.shape),
        ("conv", "kernel std times sqrt(fan-in)"): f"{np.std(plain_conv.kernel[...]) * 144**0.5:.1f}",
        ("conv", "kernel shape of 16 -> 200, 3 x 3"): str(plain_conv.kernel.shape),
        ("conv", "height of the output, input of 8, kernel of 3"): str(output.shape[1]),
        ("conv", "axis of the channels"): str(output.shape.index(200)),
        ("layer_norm", "epsilon"): f"{(1e-3 / normalised) ** 2 - 1e-6:.1e}",
        ("attention", "query kernel std times sqrt(fan-in)"): f"{np.std(attention.query.kernel[...]) * 16:.1f}",
        ("attention", "axis of the batch"): str(0 if bool(reached[0].all()) else 1),
        ("attention", "outputs of a call"): str(len(jax.tree.leaves(attended))),
        ("attention", "arrays of the input projections"): str(
            sum(
                len(jax.tree.leaves(nnx.state(getattr(attention, name), nnx.Param)))
                for name in ("query", "key", "value")
            )
        ),
        ("gru_cell", "arguments of a call"): ", ".join(list(inspect.signature(cell.__call__).parameters)[:2]),
        ("gru_cell", "outputs of a call"): str(len(run({"params": zeros}, hidden, x))),
        ("gru_cell", "elements of biases per hidden unit"): str(
            sum(leaf["bias"].size for leaf in variables.values() if "bias" in leaf) // 64
        ),
        ("gru_cell", "update gate among r, z, n (ir, iz, in)"): str(kept.index(True)),
        ("gru_cell", "recurrent kernel orthogonal"): str(np.allclose(recurrent @ recurrent.T, np.eye(64), atol=1e-4)),
    }
