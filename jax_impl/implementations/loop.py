"""Reference formulation: one linear map after another, then a stack."""

import math

import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, product_dtype, result_dtype


def partitioned_linear_loop(
    x: Inputs,
    weight: Weight,
    bias: Bias | None,
    *,
    precision: PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o], one partition at a time.

    This is the pattern that users write by hand (a list of layers and a stack), kept as the reference that everything
    else is read against. The compiled program grows with n.

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
    rows = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    wide = product_dtype(dtype, rows.shape[0], *weight.shape[1:])
    outputs = []
    for partition in range(weight.shape[0]):
        product = lax.dot_general(
            rows[:, partition],
            weight[partition],
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=wide,
        )
        outputs.append(add_bias(product, None if bias is None else bias[partition], dtype))
    return jnp.stack(outputs, axis=1).reshape(*x.shape[:-1], weight.shape[-1])
