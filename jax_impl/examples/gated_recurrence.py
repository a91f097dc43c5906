"""RecurrentGemma's recurrent block: a real-gated linear recurrence whose gates are block-diagonal."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_impl.layer import PartitionedLinear

_SHARPNESS = 8.0


class RealGatedRecurrence(nnx.Module):
    """Compute h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * x_t, with gates a_t and i_t of x_t.

    log a_t = -8 * softplus(decay) * sigmoid(recurrence_gate(x_t)) and i_t = sigmoid(input_gate(x_t)), where each head
    has maps of its own. The first step is h_0 = i_0 * x_0.

    Shape:
        Input and output (batch, time, width).

    Args:
        width: Features, a multiple of `heads`.
        heads: Blocks of the gates; 10 of 256 features in RecurrentGemma 2B.
        implementation: Of the gates; "loop" is one `nnx.Linear` a head.
        rngs: Random streams of the initial values.

    Source: De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention" (2024), RG-LRU.
    """

    def __init__(self, width: int = 2560, heads: int = 10, *, implementation: str = "auto", rngs: nnx.Rngs) -> None:
        size = width // heads

        # Flat features in and out: (..., heads * size), as the rest of the block has them.
        def gate() -> PartitionedLinear:
            return PartitionedLinear(heads, size, size, partition_axis=-1, implementation=implementation, rngs=rngs)

        self.input_gate, self.recurrence_gate = gate(), gate()
        # Such that a_t lies between 0.9 and 0.999 where the gate is fully open.
        start = jnp.sqrt(jax.random.uniform(rngs.params(), (width,), minval=0.9**2, maxval=0.999**2))
        self.decay = nnx.Param(jnp.log(jnp.expm1(-jnp.log(start) / _SHARPNESS)))

    def __call__(self, x: Array) -> Array:
        """Compute the states of all steps, in logarithmically many."""
        log_a = -_SHARPNESS * jax.nn.softplus(self.decay[...]) * jax.nn.sigmoid(self.recurrence_gate(x))
        a, gated = jnp.exp(log_a), jax.nn.sigmoid(self.input_gate(x)) * x
        scaled = gated[:, 1:] * jnp.sqrt(-jnp.expm1(2 * log_a[:, 1:]))
        terms = jnp.concatenate([gated[:, :1], scaled], 1)

        def join(first: Any, second: Any) -> Any:
            return first[0] * second[0], second[0] * first[1] + second[1]

        return jax.lax.associative_scan(join, (a, terms), axis=1)[1]


class RecurrentBlock(nnx.Module):
    """Compute out(gelu(y(x)) * recurrence(convolution(input(x)))), with a causal convolution of each feature over time.

    Shape:
        Input and output (batch, time, model).

    Args:
        model: Features of the residual stream.
        width: Features of the recurrence.
        heads: Blocks of its gates.
        window: Steps that the convolution sees.
        implementation: Of the gates.
        rngs: Random streams of the initial values.

    Source: as for `RealGatedRecurrence`; gelu is the approximation by tanh, as in RecurrentGemma.
    """

    def __init__(
        self,
        model: int = 2560,
        width: int = 2560,
        heads: int = 10,
        *,
        window: int = 4,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        self.input, self.gate = nnx.Linear(model, width, rngs=rngs), nnx.Linear(model, width, rngs=rngs)
        self.convolution = nnx.Conv(width, width, (window,), padding="CAUSAL", feature_group_count=width, rngs=rngs)
        self.recurrence = RealGatedRecurrence(width, heads, implementation=implementation, rngs=rngs)
        self.output = nnx.Linear(width, model, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Compute the block's output, without the residual connection."""
        gate = jax.nn.gelu(self.gate(x), approximate=True)
        return self.output(gate * self.recurrence(self.convolution(self.input(x))))
