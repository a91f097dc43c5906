"""The formula itself, handed to `jax.numpy.einsum`."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import PrecisionLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, batch_major, needs_partition_major, partition_major, product_dtype


def partitioned_linear_einsum(
    x: Inputs, weight: Weight, bias: Bias | None, precision: PrecisionLike, dtype: np.dtype
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] with `jax.numpy.einsum`.

    The equation is spelled as written; for 16-bit operands, partition-major: see `needs_partition_major`.
    """
    wide = product_dtype(dtype, math.prod(x.shape[:-2]), *weight.shape[1:])
    if needs_partition_major(x):
        equation = "nri,nio->nro"
        rows = partition_major(x)
        product = jnp.einsum(equation, rows, weight, precision=precision, preferred_element_type=wide)
        product = batch_major(product, x.shape[:-2])
    else:
        equation = "...ni,nio->...no"
        product = jnp.einsum(equation, x, weight, precision=precision, preferred_element_type=wide)
    return add_bias(product, bias, dtype)


def shared_linear_einsum(
    x: Array, weight: Weight, bias: Bias | None, precision: PrecisionLike, dtype: np.dtype
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., i] * W[n, i, o] + b[n, o] with `jax.numpy.einsum`.

    Rows and columns of the equation have one axis each, as in `jax_impl.implementations.matmul`.
    """
    num_partitions, in_features, out_features = weight.shape
    rows, columns = math.prod(x.shape[:-1]), num_partitions * out_features
    dense = jnp.swapaxes(weight, 0, 1).reshape(in_features, columns)
    wide = product_dtype(dtype, rows, in_features, columns)
    flat = x.reshape(rows, in_features)
    product = jnp.einsum("ri,ic->rc", flat, dense, precision=precision, preferred_element_type=wide)
    return add_bias(product.reshape(*x.shape[:-1], num_partitions, out_features), bias, dtype)
