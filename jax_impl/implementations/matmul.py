"""One batched product whose batch axis is the partition axis."""

from jax import lax
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, batch_major, partition_major, result_dtype


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
    for the einsum spelling.

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
    product = lax.dot_general(
        partition_major(x),
        weight,
        (((2,), (1,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=dtype,
    )
    y = add_bias(product, None if bias is None else bias[:, None], dtype)
    return batch_major(y, x.shape[:-2])
