"""An ensemble of critics, as REDQ trains it: all see one input, and a target takes the least of a random few."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_impl.layer import PartitionedLinear


class Critics(nnx.Module):
    """Estimate Q(s, a) by n perceptrons with two hidden layers.

    Shape:
        Observations (..., observations) and actions (..., actions); values (..., n), or (..., m) of m chosen critics.

    Args:
        observations: Length of an observation.
        actions: Length of an action.
        critics: n, the number of critics; 10 in REDQ.
        width: Of both hidden layers.
        implementation: Of the layers with inputs per critic; "loop" is the lists of `nnx.Linear` that they replace.
        rngs: Random streams of the initial values.

    Source: Chen et al., "Randomized Ensembled Double Q-Learning" (2021).
    """

    def __init__(
        self,
        observations: int = 17,
        actions: int = 6,
        critics: int = 10,
        width: int = 256,
        *,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        # One dense product: the input, which all critics share, is not copied n times.
        self.first = PartitionedLinear(
            critics, observations + actions, width, partition_axis=None, init="torch", rngs=rngs
        )
        self.second = PartitionedLinear(critics, width, width, implementation=implementation, init="torch", rngs=rngs)
        self.third = PartitionedLinear(critics, width, 1, implementation=implementation, init="torch", rngs=rngs)

    def __call__(self, observations: Array, actions: Array, chosen: Sequence[int] | Array | None = None) -> Array:
        """Compute the values of all critics, or those of the chosen ones alone, traced or not."""
        x = jnp.concatenate([observations, actions], -1)
        x = jax.nn.relu(self.first(x, partitions=chosen))
        x = jax.nn.relu(self.second(x, partitions=chosen))
        return self.third(x, partitions=chosen).squeeze(-1)


def least_value(critics: Critics, observations: Array, actions: Array, chosen: Sequence[int] | Array) -> Array:
    """Return the least value of the chosen critics: for each target, draw `jax.random.permutation(key, n)[:2]`."""
    return critics(observations, actions, chosen).min(-1)
