"""A sum of one term for each feature, of elements: no matrix product."""

from functools import reduce
from operator import add, mul

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.lax import PrecisionLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias

# The program grows with the number of input features: that of y and the gradients takes two to four seconds to compile
# for 32 of them and eight to eleven for 64, where others take 0.1 to 0.8 (on a CPU, jax 0.10.2).
MOST_IN_FEATURES = 32


def partitioned_linear_by_feature(
    x: Inputs, weight: Weight, bias: Bias | None, precision: PrecisionLike, dtype: np.dtype
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] in one pass over x, one term for each i.

    XLA fuses the terms, so that tiny partitions share the vectors of a processor, of which each of their products fills
    a part. Elements are multiplied and added in at least fp32, whatever precision is asked for: no device rounds them.
    """
    del precision
    wide, in_features = np.promote_types(dtype, np.float32), weight.shape[1]
    # Unlike those of slices, the gradients of the parts of a split are put together in one pass.
    features = lax.split(x.astype(wide), (1,) * in_features, x.ndim - 1)
    columns = (part[:, 0] for part in lax.split(weight.astype(wide), (1,) * in_features, 1))
    vectors = (jnp.expand_dims(column, range(x.ndim - 2)) for column in columns)
    # Otherwise a next layer, by the same formulation, would compute this one anew for each of its features.
    return lax.optimization_barrier(add_bias(reduce(add, map(mul, features, vectors)), bias, dtype))


_compiled = jax.jit(partitioned_linear_by_feature, static_argnames=("precision", "dtype"))


def partitioned_linear_by_feature_apart(
    x: Inputs, weight: Weight, bias: Bias | None, precision: PrecisionLike, dtype: np.dtype
) -> Outputs:
    """Compute `partitioned_linear_by_feature` as a program of its own inside the caller's, on a CPU.

    There XLA drops the barrier before it fuses, and makes one program of the sum and of what reads y, without the
    processor's vectors: a sum over the partitions, a normalisation or a dense product that followed took up to 5 times
    as long as with `matmul`, and takes 0.1 to 1.5 times as long so (jax 0.10.2). Compilers for other devices may not
    know such a call.
    """
    with set_xla_metadata(inlineable="false"):
        return _compiled(x, weight, bias, precision=precision, dtype=dtype)
