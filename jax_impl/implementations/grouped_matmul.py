"""The grouped product of mixture-of-experts layers, with equally many rows for every partition."""

import math

import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, batch_major, partition_major, product_dtype, result_dtype


def partitioned_linear_grouped_matmul(
    x: Inputs,
    weight: Weight,
    bias: Bias | None,
    *,
    precision: PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] with `jax.lax.ragged_dot`.

    The rows of all partitions are laid one after another, which costs a transposed copy of `x` and of the result. JAX
    cannot take the reverse-mode derivative of its reverse-mode derivative (forward over reverse works), nor map it with
    `jax.vmap` unless the row counts are mapped too. Where the ragged product is computed as a masked dense one, as on a
    CPU, a NaN or Inf in one partition reaches every other one.

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
    product = lax.ragged_dot(
        partition_major(x).reshape(num_partitions * rows, in_features),
        weight,
        jnp.full((num_partitions,), rows, jnp.int32),
        precision=precision,
        preferred_element_type=product_dtype(dtype, rows, in_features, out_features),
    ).reshape(num_partitions, rows, out_features)
    y = add_bias(product, None if bias is None else bias[:, None], dtype)
    return batch_major(y, x.shape[:-2])
