"""A grouped convolution over a signal of length one."""

import math

from jax import lax
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, product_dtype, result_dtype


def partitioned_linear_grouped_conv(
    x: Inputs,
    weight: Weight,
    bias: Bias | None,
    *,
    precision: PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as a convolution with n feature groups.

    Every feature is a channel, every partition a group, and signal and kernel have length one. The kernel layout
    of a convolution, (n*o, i, 1), costs one transpose of the weight. Not for operands that are divided over devices:
    XLA then returns wrong values (jax 0.10.2 and 0.11.2).

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
    num_partitions, in_features, out_features = weight.shape
    rows = math.prod(x.shape[:-2])
    # XLA makes a matrix product of a convolution of kernel size one where there is a single group.
    wide = product_dtype(dtype, rows, in_features, out_features) if num_partitions == 1 else dtype
    product = lax.conv_general_dilated(
        x.reshape(rows, num_partitions * in_features, 1),
        weight.mT.reshape(num_partitions * out_features, in_features, 1),
        window_strides=(1,),
        padding="VALID",
        dimension_numbers=("NCH", "OIH", "NCH"),
        feature_group_count=num_partitions,
        precision=precision,
        preferred_element_type=wide,
    )
    return add_bias(product.reshape(*x.shape[:-1], out_features), bias, dtype)
