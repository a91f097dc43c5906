"""One partition's linear map, batched over partitions by `jax.vmap`."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, partition_axis_first, result_dtype


def partitioned_linear_vmap(
    x: Inputs,
    weight: Weight,
    bias: Bias | None,
    *,
    precision: PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] by mapping one linear map over n.

    The partition axis stays where it is; for 16-bit operands it is moved to the front, which see
    `partition_axis_first`.

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

    def one_partition(features: Array, matrix: Array, vector: Array | None) -> Array:
        product = lax.dot_general(
            features,
            matrix,
            (((features.ndim - 1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=dtype,
        )
        return add_bias(product, vector, dtype)

    axis = -2
    if partition_axis_first(x):
        axis, x = 0, jnp.moveaxis(x, -2, 0)
    return jax.vmap(one_partition, in_axes=(axis, 0, None if bias is None else 0), out_axes=-2)(x, weight, bias)
