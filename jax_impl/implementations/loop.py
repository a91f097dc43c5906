"""Reference formulation: one linear map after another, then a stack."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import PrecisionLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, product_dtype


def partitioned_linear_loop(
    x: Inputs, weight: Weight, bias: Bias | None, precision: PrecisionLike, dtype: np.dtype
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o], one partition at a time.

    This is the pattern that users write by hand (a list of layers and a stack), kept as the reference that everything
    else is read against. The compiled program grows with n.
    """
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
