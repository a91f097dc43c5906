"""The Flax layer classes as users build them: what their initialisers draw."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_impl import PartitionedLinear
from jax_impl.linen import PartitionedLinear as LinenPartitionedLinear

LAYERS = ("layer", "linen")


def initial_weight(layer: str, init: str, sizes: tuple[int, int, int], dtype: str, seed: int) -> np.ndarray:
    """Returns the kernel `(n, in, out)` that a new layer drew.

    Args:
        layer: a name of `LAYERS`.
        init: `torch` or `flax`.
        sizes: n, in, out.
        dtype: of the parameters.
        seed: of the generator.
    """
    n, i, o = sizes
    number = jnp.dtype(dtype)
    if layer == "layer":
        return np.asarray(PartitionedLinear(n, i, o, init=init, param_dtype=number, rngs=nnx.Rngs(seed)).kernel[...])
    twin = LinenPartitionedLinear(features=o, initializer=init, param_dtype=number)
    return np.asarray(twin.init(jax.random.key(seed), jnp.zeros((1, n, i), number))["params"]["kernel"])
