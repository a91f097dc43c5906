"""One batched product whose batch axis is the partition axis."""

import math
from collections.abc import Callable
from functools import partial, reduce
from operator import add, mul
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.lax import PrecisionLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import (
    add_bias,
    batch_major,
    names_algorithm,
    partition_major,
    product_dtype,
    sizes_known,
)

# A weight that fits no cache.
_MANY_WEIGHTS = 2**21
# Where `_weight_first` was measured to be the faster one, with many weights.
_FEWEST_ROWS, _IN_FEATURES_A_ROW = 16, 4
# Where `_by_columns` was: 2 to 8 features, in and out, from 4 rows on, or up to 64 of few rows.
_FEWEST_FEATURES, _TINY, _SMALL = 2, 8, 64
_FEWEST_COLUMNS, _MOST_COLUMNS, _FEATURES_OF_COLUMNS = 4, 32, 1024
# From so many entries of y on `_by_elements` was. With half of them stacks took up to 1.2 times as long on two threads.
_FEWEST_ENTRIES = 2**15
# Up to so many it was where both sizes fill the vectors of the product; stacks that fit no cache took 1.1 to 1.3 times
# as long, though a layer by itself 0.8.
FULL_VECTOR, _MOST_ENTRIES_OF_FULL = 4, 2**20


def _product(
    rows: Array, weight: Array, precision: PrecisionLike, dtype: Any, dot_general: Callable[..., Any] = lax.dot_general
) -> Array:
    """Compute y[n, r, o] = sum_i x[n, r, i] * W[n, i, o]."""
    dimensions = (((2,), (1,)), ((0,), (0,)))
    return dot_general(rows, weight, dimensions, precision=precision, preferred_element_type=dtype)


def _product_along(
    rows: Array,
    weight: Array,
    precision: PrecisionLike,
    dtype: Any,
    along_rows: Callable[..., Array] = _product,
    along_weight: Callable[..., Array] = _product,
    differentiated: Callable[..., Array] = _product,
) -> Array:
    """Compute `_product` whose tangents, and so the gradients that JAX derives from them, are spelled otherwise.

    Both spellings are linear in what moves: all orders and modes of derivative hold. `differentiated` computes the
    product itself where something moves.
    """

    @jax.custom_jvp
    def product(rows: Array, weight: Array) -> Array:
        return _product(rows, weight, precision, dtype)

    @jax.custom_jvp
    def beside_tangents(rows: Array, weight: Array) -> Array:
        return differentiated(rows, weight, precision, dtype)

    def tangent(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
        (rows, weight), (d_rows, d_weight) = primals, tangents
        parts = []
        if not isinstance(d_rows, SymbolicZero):
            parts.append(along_rows(d_rows, weight, precision, dtype))
        if not isinstance(d_weight, SymbolicZero):
            parts.append(along_weight(rows, d_weight, precision, dtype))
        if not parts:
            y = product(rows, weight)
            return y, jnp.zeros_like(y)
        return beside_tangents(rows, weight), sum(parts[1:], parts[0])

    product.defjvp(tangent, symbolic_zeros=True)
    beside_tangents.defjvp(tangent, symbolic_zeros=True)
    return product(rows, weight)


def _weight_first(rows: Array, weight: Array, precision: PrecisionLike, dtype: Any) -> Array:
    """Compute `_product` so that its gradient of the rows leaves a large weight where it is.

    The gradient of the rows multiplies by W with its last two axes exchanged. Where the rows come first, XLA on a CPU
    rearranges all of W for that, in memory that is new in every call; with 41 MB of weights and 16 rows this takes
    three times as long as the product (jax 0.10.2). From W first, JAX derives a product that rearranges the rows'
    cotangent instead.
    """
    dimensions = (((1,), (2,)), ((0,), (0,)))
    product = lax.dot_general(weight, rows, dimensions, precision=precision, preferred_element_type=dtype)
    return jnp.swapaxes(product, 1, 2)


def _by_columns(rows: Array, weight: Array, precision: PrecisionLike, dtype: Any) -> Array:
    """Compute `_product` so that its gradient of the weight adds up over rows that lie next to each other.

    Otherwise XLA on a CPU rearranges the partition-major copy of the rows once more. Measured in training steps, in
    fp32 on one thread and two (jax 0.10.2), of layers by themselves, in stacks, and between normalisations or dense
    layers: 0.4 to 1.0 of the time at 4 to 32 rows, 0.6 to 1.0 with 64 and more of 2 to 8 features; seldom up to 1.1,
    between dense layers on one thread.
    """
    columns = lax.optimization_barrier(jnp.swapaxes(rows, 1, 2))
    dimensions = (((1,), (1,)), ((0,), (0,)))
    return lax.dot_general(columns, weight, dimensions, precision=precision, preferred_element_type=dtype)


def _by_elements(rows: Array, weight: Array, precision: PrecisionLike, dtype: Any) -> Array:
    """Compute `_product` as a sum of one term for each input feature, of elements, which share a processor's vectors.

    The rows stay partition-major, as the gradients read them, and nothing keeps XLA from making one pass of the sum and
    of what follows. Measured in training steps, in fp32 on one thread and two (jax 0.10.2), of layers by themselves, in
    stacks, and between normalisations or dense layers: 0.4 to 1.0 of the time of the product beside the same gradients;
    seldom up to 1.1, on two threads.
    """
    del precision, dtype  # those of elements are the widest that are asked for
    features, columns = (lax.split(array, (1,) * rows.shape[2], axis) for array, axis in ((rows, 2), (weight, 1)))
    return reduce(add, map(mul, features, columns))


def _has_few_rows(rows: Array, weight: Array) -> bool:
    """Say whether the weight is what moves: it fits no cache, and its use for each row is small beside its size."""
    if not sizes_known(*rows.shape, *weight.shape):
        return False
    count, in_features = rows.shape[1:]
    few = count >= _FEWEST_ROWS and _IN_FEATURES_A_ROW * count <= in_features
    return few and weight.size >= _MANY_WEIGHTS and rows.dtype.itemsize >= 4


def _is_small(rows: Array, weight: Array) -> bool:
    """Say whether `_by_columns` gains: maps are several, and so small that copies are what takes time, on a CPU.

    Elsewhere the transpose is part of the product, and a copy would cost.
    """
    if not sizes_known(*rows.shape, *weight.shape):
        return False
    (n, count, _), sizes = rows.shape, weight.shape[1:]
    if n == 1 or min(sizes) < _FEWEST_FEATURES or max(sizes) > _SMALL or rows.dtype.itemsize < 4:
        return False
    if count < _FEWEST_COLUMNS or jax.default_backend() != "cpu":
        return False
    few = count <= _MOST_COLUMNS and count * max(sizes) <= _FEATURES_OF_COLUMNS
    return few or max(sizes) <= _TINY


def _is_tiny(rows: Array, weight: Array, precision: PrecisionLike, dtype: np.dtype) -> bool:
    """Say whether `_by_elements` gains where `_by_columns` does: for many entries of y, and not at 8 -> 8."""
    sizes, entries = weight.shape[1:], rows.shape[0] * rows.shape[1] * weight.shape[2]
    # Several devices may hold the features of one row, and whoever asks for a dot algorithm gets its product.
    whole = rows.dtype == dtype and jax.device_count() == 1 and not names_algorithm(precision)
    full = not any(size % FULL_VECTOR for size in sizes)
    measured = entries >= _FEWEST_ENTRIES and not (full and entries > _MOST_ENTRIES_OF_FULL)
    return whole and measured and max(sizes) <= _TINY and min(sizes) < _TINY


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
    for the einsum spelling. Where tiny maps are differentiated on one CPU device, y is a sum of elements instead, and
    the gradients are products (where `_is_tiny` says so).
    """
    rows = partition_major(x)
    multiply = partial(_product, dot_general=dot_general)
    if dot_general is lax.dot_general and _has_few_rows(rows, weight):
        multiply = partial(_product_along, along_rows=_weight_first)
    elif dot_general is lax.dot_general and _is_small(rows, weight):
        beside = _by_elements if _is_tiny(rows, weight, precision, dtype) else _product
        multiply = partial(_product_along, along_weight=_by_columns, differentiated=beside)
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
