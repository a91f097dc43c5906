"""The operation as a function: validate, select, run."""

from typing import Any

import torch
from torch import Tensor

from torch_impl.array_types import Bias, Inputs, Outputs, Weight, kind_of
from torch_impl.registry import (
    DTYPE_NAMES,
    Implementation,
    UnsupportedImplementationError,
    get_implementation,
    unsupported_reason,
)
from torch_impl.selection import AUTO
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
    check_implementation_name(implementation)
    name = AUTO if implementation == "auto" else implementation
    _, in_features, out_features = weight.shape
    reason = unsupported_reason(
        name, dtype=DTYPE_NAMES[weight.dtype], device=device, in_features=in_features, out_features=out_features
    )
    if reason is not None:
        raise UnsupportedImplementationError(reason)
    entry = get_implementation(name)
    if hasattr(weight, "placements") or hasattr(x, "placements") or hasattr(bias, "placements"):
        return on_dtensors(entry, x, weight, bias)
    try:
        return entry.run(x, weight, bias)
    except RuntimeError as error:
        explain_failure(error, name, x, weight, bias)
        raise


def on_dtensors(entry: Implementation, x: Any, weight: Any, bias: Any) -> Outputs:
    """Run an implementation on DTensors, on whole operands in every process if DTensor cannot divide it rightly.

    Raises:
        TypeError: If one operand is a DTensor and another is not.
        ValueError: If their meshes differ.
    """
    # Here, since most processes that import this package have no use for the distributed part of PyTorch.
    from torch.distributed.tensor import DTensor, Replicate

    operands = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    mesh = next(operand.device_mesh for operand in operands.values() if isinstance(operand, DTensor))
    for argument, operand in operands.items():
        if not isinstance(operand, DTensor):
            raise TypeError(
                f"`{argument}`: expected a DTensor, as another operand is one, got {kind_of(operand)}; call "
                f"distribute_tensor with the same mesh."
            )
        if operand.device_mesh != mesh:
            raise ValueError(
                f"`{argument}`: expected one mesh for all operands, {mesh}, got {operand.device_mesh}; use "
                f"distribute_tensor."
            )
    if entry.divides:
        return entry.run(x, weight, bias)
    y = entry.run(x.full_tensor(), weight.full_tensor(), None if bias is None else bias.full_tensor())
    return DTensor.from_local(y, mesh, [Replicate()] * mesh.ndim, run_check=False)


def autocast_is_on(device: str) -> bool:
    """Say whether `torch.autocast` is on for a device type; the meta device has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast the operands to the autocast dtype of their device, leaving float64 alone as `nn.Linear` does.

    Done here, once, because autocast knows only some of the kernels that the implementations call: left to itself
    it would compute `grouped_matmul` in fp32 and every other one in bf16.
    """
    dtype = torch.get_autocast_dtype(weight.device.type)
    return _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
