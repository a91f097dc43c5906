"""Periodic embeddings of numerical features: each feature of a table has frequencies and a linear map of its own."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_impl.layer import PartitionedLinear


class PeriodicEmbeddings(nnx.Module):
    """Embed feature j by relu(W_j [cos(2 pi c_j x_j), sin(2 pi c_j x_j)] + b_j), with trained frequencies c_j.

    Shape:
        Input (..., features); output (..., features, width).

    Args:
        features: Numerical features of the table.
        frequencies: Frequencies of each feature.
        width: Length of an embedding.
        scale: Standard deviation of the initial frequencies, which are cut off at three of it.
        implementation: Of the layer; "loop" is a list of `nnx.Linear`, one a feature.
        rngs: Random streams of the initial values.

    Source: Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep Learning" (2022), PLR.
    """

    def __init__(
        self,
        features: int = 100,
        frequencies: int = 48,
        width: int = 24,
        *,
        scale: float = 0.01,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        drawn = jax.random.truncated_normal(rngs.params(), -3.0, 3.0, (features, frequencies))
        self.frequencies = nnx.Param(scale * drawn)
        self.linear = PartitionedLinear(features, 2 * frequencies, width, implementation=implementation, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Compute the embeddings."""
        angles = 2 * math.pi * self.frequencies[...] * x[..., None]
        return jax.nn.relu(self.linear(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)))
