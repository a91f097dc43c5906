"""One batched product whose batch axis is the partition axis; of large partitions on a CPU one after the other."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, batch_major, partition_major, product_dtype, result_dtype

# A weight that fits no cache.
_MANY_WEIGHTS = 2**21
# Where `_product_for_few_rows` was measured to be the faster one, with many weights.
_FEWEST_ROWS, _IN_FEATURES_A_ROW = 16, 4
# Where `_one_after_the_other` was, with many weights too: each partition is worth a step of a loop, and the weights far
# outnumber the features of x and y. With more rows a single call would still gain, but a stack of layers, or a caller
# whose arrays lie partition-major, would lose more: there XLA cancels the batched product's transposes.
_LARGE_PARTITION = 2**14
_FEWEST_ROWS_IN_TURN, _WEIGHTS_A_FEATURE = 4, 4


def _product(rows: Array, weight: Array, precision: PrecisionLike, dtype: Any) -> Array:
    """Compute y[n, r, o] = sum_i x[n, r, i] * W[n, i, o]."""
    dimensions = (((2,), (1,)), ((0,), (0,)))
    return lax.dot_general(rows, weight, dimensions, precision=precision, preferred_element_type=dtype)


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


def _one_after_the_other(x: Array, weight: Array, bias: Array | None, *, precision: PrecisionLike) -> Array:
    """Compute y, (rows, n, o), in place and from x, (rows, n, i), where it lies.

    What one partition needs stays in the cache until it is used, and the products are plain ones. XLA's batched product
    on a CPU passes a large weight through memory more slowly (jax 0.10.2).
    """

    def add_partition(partition: Array, y: Array) -> Array:
        rows = lax.dynamic_index_in_dim(x, partition, 1, keepdims=False)
        own_weight = lax.dynamic_index_in_dim(weight, partition, 0, keepdims=False)
        own_bias = None if bias is None else lax.dynamic_index_in_dim(bias, partition, 0, keepdims=False)
        own_y = add_bias(lax.dot(rows, own_weight, precision=precision), own_bias, y.dtype)
        return lax.dynamic_update_index_in_dim(y, own_y, partition, 1)

    (rows, partitions, _), out_features = x.shape, weight.shape[2]
    return lax.fori_loop(0, partitions, add_partition, lax.empty((rows, partitions, out_features), x.dtype))


def _batched(x: Array, weight: Array, bias: Array | None, precision: PrecisionLike, dtype: Any) -> Array:
    rows = partition_major(x)
    multiply = _product_for_few_rows if _has_few_rows(rows, weight) else _product
    product = multiply(rows, weight, precision, product_dtype(dtype, rows.shape[1], *weight.shape[1:]))
    return batch_major(add_bias(product, None if bias is None else bias[:, None], dtype), x.shape[:-2])


# One jitted function for all calls: a loop that is made anew in each call would be compiled anew as well, wherever the
# caller does not jit.
@partial(jax.jit, static_argnums=3)
def _compiled_for_the_platform(x: Array, weight: Array, bias: Array | None, precision: PrecisionLike) -> Array:
    in_turn = partial(_one_after_the_other, precision=precision)
    batched = partial(_batched, precision=precision, dtype=x.dtype)
    return lax.platform_dependent(x, weight, bias, cpu=in_turn, default=batched)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _in_turn_on_a_cpu(x: Array, weight: Array, bias: Array | None, precision: PrecisionLike) -> Array:
    """Compute y, (rows, n, o), one partition after the other where the program runs on a CPU.

    Derivatives are those of the batched product, y included: gradients need partition-major copies of x and of the
    cotangent in any case, and share them with it.
    """
    return _compiled_for_the_platform(x, weight, bias, precision)


def _tangent(precision: PrecisionLike, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Any]:
    still = (type(None), SymbolicZero)
    moving = [place for place, tangent in enumerate(tangents) if not isinstance(tangent, still)]
    if not moving:
        y = _in_turn_on_a_cpu(*primals, precision)
        return y, jnp.zeros_like(y)

    def of_moving(*operands: Array) -> Array:
        given: dict[int, Any] = dict(zip(moving, operands, strict=True))
        x, weight, bias = (given.get(place, primal) for place, primal in enumerate(primals))
        return _batched(x, weight, bias, precision, x.dtype)

    return jax.jvp(of_moving, tuple(primals[place] for place in moving), tuple(tangents[place] for place in moving))


_in_turn_on_a_cpu.defjvp(_tangent, symbolic_zeros=True)


def _gains_in_turn(x: Array, weight: Array, dtype: Any) -> bool:
    """Say whether the partitions of x, (rows, n, i), are better taken one after the other on a CPU.

    Operands of 16 bits stay with the batched product, and so do programs for several devices: taking one partition of
    operands that are divided over the partitions would gather them all.
    """
    rows, (partitions, in_features, out_features) = x.shape[0], weight.shape
    if not isinstance(rows, int) or dtype != x.dtype or dtype.itemsize < 4 or partitions == 1:
        return False
    if jax.device_count() > 1 or not all(jax.typeof(array).sharding.mesh.empty for array in (x, weight)):
        return False
    partition_size, features = in_features * out_features, rows * (in_features + out_features)
    few = rows >= _FEWEST_ROWS_IN_TURN and _WEIGHTS_A_FEATURE * features <= partition_size
    return few and partition_size >= _LARGE_PARTITION and weight.size >= _MANY_WEIGHTS


def partitioned_linear_matmul(
    x: Inputs,
    weight: Weight,
    bias: Bias | None,
    *,
    precision: PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as a batched product over n.

    The partition axis of `x` is moved to the front before the product, and back after the bias: the compiler then
    chooses layouts for a plain batched product, forward and backward, instead of transposing whole operands as it does
    for the einsum spelling. On a single CPU device a forward pass of few rows takes large partitions one after the
    other instead; a program that is exported to another platform, or differentiated, does not.

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
    flat = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    if _gains_in_turn(flat, weight, dtype):
        return _in_turn_on_a_cpu(flat, weight, bias, precision).reshape(*x.shape[:-1], weight.shape[-1])
    return _batched(x, weight, bias, precision, dtype)
