"""One partition after the other, in a loop inside the program."""

import math

import jax
import numpy as np
from jax import Array, lax
from jax.lax import PrecisionLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, product_dtype


def partitioned_linear_in_turn(
    x: Inputs, weight: Weight, bias: Bias | None, precision: PrecisionLike, dtype: np.dtype
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o], in place and from x where it lies.

    What one partition needs stays in the cache until it is used, and the products are plain ones: XLA's batched product
    on a CPU passes a large weight through memory more slowly (jax 0.10.2). Unlike that of `loop`, the program does not
    grow with n. Where the operands are divided over the partitions, every device gathers one after the other.
    """
    num_partitions, _, out_features = weight.shape
    rows = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    wide = product_dtype(dtype, rows.shape[0], *weight.shape[1:])

    def add_partition(partition: Array, y: Array) -> Array:
        features = lax.dynamic_index_in_dim(rows, partition, 1, keepdims=False)
        matrix = lax.dynamic_index_in_dim(weight, partition, 0, keepdims=False)
        vector = None if bias is None else lax.dynamic_index_in_dim(bias, partition, 0, keepdims=False)
        product = lax.dot(features, matrix, precision=precision, preferred_element_type=wide)
        return lax.dynamic_update_index_in_dim(y, add_bias(product, vector, dtype), partition, 1)

    y = lax.empty((rows.shape[0], num_partitions, out_features), dtype)
    operands = (x, weight) if bias is None else (x, weight, bias)
    # Inside `jax.shard_map` the loop must begin with the type that it ends with.
    if varying := frozenset().union(*(jax.typeof(operand).manual_axis_type.varying for operand in operands)):
        y = lax.pcast(y, tuple(varying), to="varying")
    return lax.fori_loop(0, num_partitions, add_partition, y).reshape(*x.shape[:-1], out_features)
