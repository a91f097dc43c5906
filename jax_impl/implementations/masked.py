"""Dense block-diagonal product, built from the compact parameter."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import PrecisionLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, product_dtype


def partitioned_linear_masked(
    x: Inputs, weight: Weight, bias: Bias | None, precision: PrecisionLike, dtype: np.dtype
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as one dense product.

    The n blocks are laid on the diagonal of one (n*i, n*o) matrix whose other entries are exact zeros. It costs n
    times the multiplications and n times the weight memory, in exchange for a single large product. Because
    0 * NaN = NaN, a NaN or Inf in one partition reaches every other one.
    """
    num_partitions, in_features, out_features = weight.shape
    diagonal = jnp.eye(num_partitions, dtype=bool)[:, None, :, None]
    blocks = jnp.where(diagonal, weight[:, :, None, :], jnp.zeros((), weight.dtype))
    rows, all_in, all_out = math.prod(x.shape[:-2]), num_partitions * in_features, num_partitions * out_features
    product = lax.dot_general(
        x.reshape(rows, all_in),
        blocks.reshape(all_in, all_out),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=product_dtype(dtype, rows, all_in, all_out),
    )
    return add_bias(product.reshape(*x.shape[:-1], out_features), bias, dtype)
