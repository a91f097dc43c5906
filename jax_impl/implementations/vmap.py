"""One partition's linear map, batched over partitions by `jax.vmap`."""

import math

import jax
import numpy as np
from jax import Array, lax
from jax.lax import PrecisionLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, batch_major, needs_partition_major, partition_major, product_dtype


def partitioned_linear_vmap(
    x: Inputs, weight: Weight, bias: Bias | None, precision: PrecisionLike, dtype: np.dtype
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] by mapping one linear map over n.

    The partition axis stays where it is; for 16-bit operands it is moved to the front: see `needs_partition_major`.
    """
    wide = product_dtype(dtype, math.prod(x.shape[:-2]), *weight.shape[1:])

    def one_partition(features: Array, matrix: Array, vector: Array | None) -> Array:
        product = lax.dot_general(
            features,
            matrix,
            (((features.ndim - 1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=wide,
        )
        return add_bias(product, vector, dtype)

    bias_axis = None if bias is None else 0
    if needs_partition_major(x):
        y = jax.vmap(one_partition, in_axes=(0, 0, bias_axis))(partition_major(x), weight, bias)
        return batch_major(y, x.shape[:-2])
    return jax.vmap(one_partition, in_axes=(-2, 0, bias_axis), out_axes=-2)(x, weight, bias)
