"""The operation as a function: validate, select, run."""

import torch
from torch import Tensor

from torch_impl.array_types import Bias, Inputs, Outputs, Weight
from torch_impl.registry import (
    DTYPE_NAMES,
    UnsupportedImplementationError,
    get_implementation,
    unsupported_reason,
)
from torch_impl.selection import select_implementation
from torch_impl.validation import check_implementation_name, check_operands, check_same_dtype, explain_failure


def partitioned_linear(x: Inputs, weight: Weight, bias: Bias | None = None, *, implementation: str = "auto") -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o].

    Under `torch.autocast` the operands are cast to the autocast dtype first, as `torch.nn.functional.linear` does;
    otherwise they must share one dtype.

    Args:
        x: Inputs, shape (..., n, in): any number of leading axes, none included, possibly empty; any strides.
        weight: One matrix per partition, shape (n, in, out).
        bias: One vector per partition, shape (n, out); or None.
        implementation: "auto", or a name from `implementation_names()`. A named implementation runs or raises.

    Returns:
        Outputs, shape (..., n, out), in the dtype of the operands. The strides are the implementation's: flatten
        with `reshape`, not `view`.

    Raises:
        TypeError: If an operand is no tensor, has no supported floating dtype, or the dtypes differ.
        ValueError: If shapes or devices do not fit, or the name is unknown.
        UnsupportedImplementationError: If the named implementation, or under "auto" every one, cannot run this call.

    Source: the operation is that of an ensemble of `torch.nn.Linear`, one per partition.
    """
    check_operands(x, weight, bias)
    device = weight.device.type
    if autocast_is_on(device):
        x, weight, bias = autocast_operands(x, weight, bias)
    check_same_dtype(x, weight, bias)
    num_partitions, in_features, out_features = weight.shape
    dtype = DTYPE_NAMES[weight.dtype]
    if not isinstance(implementation, str):
        check_implementation_name(implementation)
    if implementation == "auto":
        implementation = select_implementation(
            num_partitions=num_partitions,
            in_features=in_features,
            out_features=out_features,
            rows=x.numel() // (num_partitions * in_features),
            dtype=dtype,
            device=device,
        )
    else:
        check_implementation_name(implementation)
        reason = unsupported_reason(
            implementation,
            dtype=dtype,
            device=device,
            num_partitions=num_partitions,
            in_features=in_features,
            out_features=out_features,
        )
        if reason is not None:
            raise UnsupportedImplementationError(reason)
    try:
        return get_implementation(implementation).run(x, weight, bias)
    except RuntimeError as error:
        explain_failure(error, implementation, x, weight, bias)
        raise


def autocast_is_on(device: str) -> bool:
    """Say whether `torch.autocast` is on for a device type; the meta device has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast the operands to the autocast dtype of their device, leaving float64 alone as `nn.Linear` does.

    Done here, once, because autocast knows only some of the kernels that the implementations call: left to itself
    it would compute `grouped_matmul` in fp32 and every other one in bf16.

    Args:
        x: Inputs, any shape.
        weight: Weight, any shape; its device decides.
        bias: Bias, any shape; or None.

    Returns:
        The three operands.
    """
    dtype = torch.get_autocast_dtype(weight.device.type)
    return _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
