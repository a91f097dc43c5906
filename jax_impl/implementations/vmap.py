"""One partition's linear map, batched over partitions by `jax.vmap`."""

import math

import jax
from jax import Array, lax
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import (
    add_bias,
    batch_major,
    needs_partition_major,
    partition_major,
    product_dtype,
    result_dtype,
)


def partitioned_linear_vmap(
    x: Inputs,
    weight: Weight,
    bias: Bias | None,
    *,
    precision: PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] by mapping one linear map over n.

    The partition axis stays where it is; for 16-bit operands it is moved to the front: see
    `needs_partition_major`.

    Args:
        x: Inputs, shape (*b, n, i).
        weight: One matrix per partition, shape (n, i, o), dtype of `x`.
        bias: One vector per partition, shape (n, o), dtype of `x`; or None.
        precision: Precision of the product, as in `jax.lax.dot_general`.
        preferred_element_type: Dtype of the result; None for that of `x`.

    Returns:
        Outputs, shape (*b, n, o).
    """
    dtype = result_dtype(x, preferred_element_type)
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
