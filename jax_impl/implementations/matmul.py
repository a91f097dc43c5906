"""One batched product whose batch axis is the partition axis."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.lax import PrecisionLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, batch_major, partition_major, product_dtype

# A weight that fits no cache.
_MANY_WEIGHTS = 2**21
# Where `_product_for_few_rows` was measured to be the faster one, with many weights.
_FEWEST_ROWS, _IN_FEATURES_A_ROW = 16, 4


def _product(
    rows: Array, weight: Array, precision: PrecisionLike, dtype: Any, dot_general: Callable[..., Any] = lax.dot_general
) -> Array:
    """Compute y[n, r, o] = sum_i x[n, r, i] * W[n, i, o]."""
    dimensions = (((2,), (1,)), ((0,), (0,)))
    return dot_general(rows, weight, dimensions, precision=precision, preferred_element_type=dtype)


def _product_for_few_rows(rows: Array, weight: Array, precision: PrecisionLike, dtype: Any) -> Array:
    """Compute `_product` with a gradient of the rows that leaves a large weight where it is.

    The gradient of the rows multiplies by W with its last two axes exchanged. Where the rows come first, XLA on a CPU
    rearranges all of W for that, in memory that is new in every call; with 41 MB of weights and 16 rows this takes
    three times as long as the product (jax 0.10.2). So the tangent of the rows is spelled with W first: what JAX
    derives from it rearranges the rows' cotangent instead. It remains linear: all orders and modes of derivative hold.
    """

    @jax.custom_jvp
    def product(rows: Array, weight: Array) -> Array:
        return _product(rows, weight, precision, dtype)

    def tangent(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
        (rows, weight), (d_rows, d_weight) = primals, tangents
        parts = []
        if not isinstance(d_rows, SymbolicZero):
            dimensions = (((1,), (2,)), ((0,), (0,)))
            by_weight = lax.dot_general(weight, d_rows, dimensions, precision=precision, preferred_element_type=dtype)
            parts.append(jnp.swapaxes(by_weight, 1, 2))
        if not isinstance(d_weight, SymbolicZero):
            parts.append(_product(rows, d_weight, precision, dtype))
        y = product(rows, weight)
        return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)

    product.defjvp(tangent, symbolic_zeros=True)
    return product(rows, weight)


def _has_few_rows(rows: Array, weight: Array) -> bool:
    """Say whether the weight is what moves: it fits no cache, and its use for each row is small beside its size."""
    count, in_features = rows.shape[1:]
    # An exported program may have a number of rows that is not known yet.
    few = isinstance(count, int) and count >= _FEWEST_ROWS and _IN_FEATURES_A_ROW * count <= in_features
    return few and weight.size >= _MANY_WEIGHTS and rows.dtype.itemsize >= 4


def partitioned_linear_matmul(
    x: Inputs,
    weight: Weight,
    bias: Bias | None,
    precision: PrecisionLike,
    dtype: np.dtype,
    dot_general: Callable[..., Any] = lax.dot_general,
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as a batched product over n.

    The partition axis of `x` is moved to the front before the product, and back after the bias: the compiler then
    chooses layouts for a plain batched product, forward and backward, instead of transposing whole operands as it does
    for the einsum spelling.
    """
    rows = partition_major(x)
    multiply = partial(_product, dot_general=dot_general)
    if dot_general is lax.dot_general and _has_few_rows(rows, weight):
        multiply = _product_for_few_rows
    product = multiply(rows, weight, precision, product_dtype(dtype, rows.shape[1], *weight.shape[1:]))
    return batch_major(add_bias(product, None if bias is None else bias[:, None], dtype), x.shape[:-2])


def shared_linear_matmul(
    x: Array,
    weight: Weight,
    bias: Bias | None,
    precision: PrecisionLike,
    dtype: np.dtype,
    dot_general: Callable[..., Any] = lax.dot_general,
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., i] * W[n, i, o] + b[n, o] as one product with a matrix of n*o columns.

    The columns are one axis and not two, so that the gradients are plain products too: XLA on a CPU may add 16-bit
    terms over several axes in their own dtype.
    """
    num_partitions, in_features, out_features = weight.shape
    rows, columns = math.prod(x.shape[:-1]), num_partitions * out_features
    product = dot_general(
        x.reshape(rows, in_features),
        jnp.swapaxes(weight, 0, 1).reshape(in_features, columns),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=product_dtype(dtype, rows, in_features, columns),
    )
    return add_bias(product.reshape(*x.shape[:-1], num_partitions, out_features), bias, dtype)
