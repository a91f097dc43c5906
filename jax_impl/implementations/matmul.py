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

# Where `_by_columns` was measured to give the faster gradient of the rows: few of them, and large maps.
_FEWEST_OF_FEW, _MOST_OF_FEW, _IN_FEATURES_A_ROW, _LARGE_MAP = 2, 32, 4, 2**11
# Where `_by_outer_products` was to give that of the weight: one row, or few with many weights in all or few features,
# and not the very largest maps.
_MOST_OUTER_PRODUCTS, _MANY_WEIGHTS, _NARROW, _LARGEST_MAP = 4, 2**15, 16, 2**20
# Where `_by_columns` was to give that of the weight: 2 to 8 features, in and out, from 4 rows on, or up to 64 of few
# rows.
_FEWEST_FEATURES, _TINY, _SMALL = 2, 8, 64
_FEWEST_COLUMNS, _MOST_COLUMNS, _FEATURES_OF_COLUMNS = 4, 32, 1024
# Where elements were the faster ones because a product is slow, see `_is_slow`.
_SLOW_FROM, _FAST_FROM = 4, 8
# From so many entries of y on they were so as well. With half of them stacks took up to 1.2 times as long on two
# threads.
_FEWEST_ENTRIES = 2**15
# Up to so many they were where both sizes fill the vectors of the product; stacks that fit no cache took 1.1 to 1.3
# times as long, though a layer by itself 0.8. There the product as it is takes 0.4 to 1.07 of the time of columns too.
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


def _by_outer_products(rows: Array, weight: Array, precision: PrecisionLike, dtype: Any) -> Array:
    """Compute `_product` row by row, of elements, so that its gradient of the weight is a sum of outer products.

    As a product XLA on a CPU writes the outer product of one row transposed and then rearranges it, and it passes few
    rows through memory more slowly than elements, which it makes one pass of with what reads the gradient. Measured in
    fp32 on one thread and two (jax 0.10.2 and 0.11.2): a program that returns the gradient of one row's weight 0.04 to
    1.0 of the time (0.2 in the geometric mean), a training step the same; with 2 to 4 rows 0.5 to 1.0, seldom up to
    1.2, and at 32 -> 32, where nothing reads the gradient, up to 4. In forward mode tangents of the weight take 1.6 to
    6 times as long as by the product, for one row.
    """
    del precision, dtype  # those of elements are the widest that are asked for
    each = lax.split(rows, (1,) * rows.shape[1], 1)
    return jnp.concatenate([(jnp.swapaxes(row, 1, 2) * weight).sum(1, keepdims=True) for row in each], 1)


def _by_columns(rows: Array, weight: Array, precision: PrecisionLike, dtype: Any) -> Array:
    """Compute `_product` so that in its gradients the rows lie next to each other.

    The gradient of a small weight adds up over them; otherwise XLA on a CPU rearranges the partition-major copy of the
    rows once more. Measured in training steps, in fp32 on one thread and two (jax 0.10.2), of layers by themselves, in
    stacks, and between normalisations or dense layers: 0.4 to 1.0 of the time at 4 to 32 rows, 0.6 to 1.0 with 64 and
    more of 2 to 8 features; seldom up to 1.1, between dense layers on one thread.

    The gradient of few rows multiplies a large W as it lies; otherwise XLA rearranges W, in memory that is new in every
    call. By itself that gradient takes 0.2 to 0.9 of the time (jax 0.10.2; 0.4 to 1.2 with 0.11.2, which is faster), a
    training step 0.4 to 1.0, seldom up to 1.3.
    """
    columns = lax.optimization_barrier(jnp.swapaxes(rows, 1, 2))
    dimensions = (((1,), (1,)), ((0,), (0,)))
    return lax.dot_general(columns, weight, dimensions, precision=precision, preferred_element_type=dtype)


def _by_elements(rows: Array, weight: Array, precision: PrecisionLike, dtype: Any) -> Array:
    """Compute `_product` as a sum of one term for each input feature, of elements, which share a processor's vectors.

    The rows stay partition-major, as the gradients read them, and nothing keeps XLA from making one pass of the sum and
    of what follows. Measured in training steps, in fp32 on one thread and two (jax 0.10.2), of layers by themselves, in
    stacks, and between normalisations or dense layers: 0.4 to 1.0 of the time of the product beside the same gradients;
    seldom up to 1.1, on two threads. Where a product is slow, all of a step takes 0.1 to 0.9 of the time by elements.
    """
    del precision, dtype  # those of elements are the widest that are asked for
    features, columns = (lax.split(array, (1,) * rows.shape[2], axis) for array, axis in ((rows, 2), (weight, 1)))
    return reduce(add, map(mul, features, columns))


def _has_large_maps(rows: Array, weight: Array) -> bool:
    """Say whether the gradient of the rows gains by `_by_columns`, on a CPU."""
    (n, count, in_features), map_size = rows.shape, math.prod(weight.shape[1:])
    few = count <= _MOST_OF_FEW or _IN_FEATURES_A_ROW * count <= in_features
    return n > 1 and few and count >= _FEWEST_OF_FEW and map_size >= _LARGE_MAP


def _has_few_rows(rows: Array, weight: Array) -> bool:
    """Say whether the gradient of the weight gains by `_by_outer_products`, on a CPU."""
    (n, count, _), sizes = rows.shape, weight.shape[1:]
    if count <= 1:
        return count == 1
    measured = weight.size >= _MANY_WEIGHTS or max(sizes) <= _NARROW
    return count <= _MOST_OUTER_PRODUCTS and measured and (n == 1 or math.prod(sizes) < _LARGEST_MAP)


def _is_small(rows: Array, weight: Array) -> bool:
    """Say whether the gradient of the weight gains by `_by_columns`: maps so small that copies are what takes time."""
    (n, count, _), sizes = rows.shape, weight.shape[1:]
    if n == 1 or min(sizes) < _FEWEST_FEATURES or max(sizes) > _SMALL or count < _FEWEST_COLUMNS:
        return False
    few = count <= _MOST_COLUMNS and count * max(sizes) <= _FEATURES_OF_COLUMNS
    return few or (max(sizes) <= _TINY and not _is_large_and_full(rows, weight))


def _is_large_and_full(rows: Array, weight: Array) -> bool:
    """Say whether maps whose sizes fill the vectors of a product have so many entries of y that the product is best."""
    entries = rows.shape[0] * rows.shape[1] * weight.shape[2]
    return entries > _MOST_ENTRIES_OF_FULL and not any(size % FULL_VECTOR for size in weight.shape[1:])


def _is_tiny(rows: Array, weight: Array) -> bool:
    """Say whether y gains by `_by_elements`: of 2 to 8 features, in and out, with many entries, and not at 8 -> 8."""
    sizes, entries = weight.shape[1:], rows.shape[0] * rows.shape[1] * weight.shape[2]
    measured = entries >= _FEWEST_ENTRIES and not _is_large_and_full(rows, weight)
    return measured and max(sizes) <= _TINY and _FEWEST_FEATURES <= min(sizes) < _TINY


def _is_slow(rows: int, terms: int, columns: int) -> bool:
    """Say whether XLA takes half a microsecond for each of many tiny products, of elements 0.01 to 0.05 (jax 0.10.2).

    Smaller ones it writes out, and larger ones it hands to a library.
    """
    return terms >= _SLOW_FROM and max(rows, columns) >= _SLOW_FROM and max(rows, terms, columns) < _FAST_FROM


def _is_mapped(array: Any) -> bool:
    """Say whether `jax.vmap` maps over an array, differentiated or not. From outside a `jax.jit` it is not seen here.

    JAX has no public name for this; where it should rename the type, rows of many examples count as few again.
    """
    while hasattr(array, "primal"):
        array = array.primal
    return type(array).__name__ == "BatchTracer"


def _spelling(rows: Array, weight: Array, precision: PrecisionLike, dtype: np.dtype) -> Callable[..., Array]:
    """Choose the spellings of the product and of its gradients that were measured to be the fastest ones on a CPU.

    Elsewhere a transpose is part of a product, and a copy would cost.
    """
    known = sizes_known(*rows.shape, *weight.shape)
    if not known or rows.dtype.itemsize < 4 or jax.default_backend() != "cpu":
        return _product
    (n, count, _), (in_features, out_features) = rows.shape, weight.shape[1:]
    # Several devices may hold the features of one row, and whoever asks for a dot algorithm gets its product.
    of_elements = rows.dtype == dtype and jax.device_count() == 1 and not names_algorithm(precision)
    several = of_elements and n > 1 and count > 1
    # The rows of one of many examples are together not few.
    few = count == 1 or not _is_mapped(rows) or _is_mapped(weight)
    chosen: dict[str, Callable[..., Array]] = {}
    if few and several and _is_slow(count, out_features, in_features):
        chosen["along_rows"] = _by_elements
    elif few and _has_large_maps(rows, weight):
        chosen["along_rows"] = _by_columns
    slow = several and _is_slow(in_features, count, out_features)
    if few and (slow or (of_elements and _has_few_rows(rows, weight))):
        chosen["along_weight"] = _by_outer_products
    elif _is_small(rows, weight):
        chosen["along_weight"] = _by_columns
    if several and ((few and _is_slow(count, in_features, out_features)) or _is_tiny(rows, weight)):
        chosen["differentiated"] = _by_elements
    return partial(_product_along, **chosen) if chosen else _product


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
    if dot_general is lax.dot_general:
        multiply = _spelling(rows, weight, precision, dtype)
    else:
        multiply = partial(_product, dot_general=dot_general)
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
