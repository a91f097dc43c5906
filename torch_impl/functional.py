"""The operation as a function: validate, select, run."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, strided
from torch.nn import Parameter

from torch_impl.array_types import Bias, Inputs, Outputs, Weight, kind_of
from torch_impl.implementations.matmul import (
    FEWEST_ROWS,
    NODE_FROM,
    ordered_product,
    orders_of,
    partitioned_linear_matmul,
)
from torch_impl.layouts import IN_AXIS, PARTITION_AXIS, check_axes, check_indices, find_axes, static_indices
from torch_impl.packing import Packing
from torch_impl.registry import (
    DTYPE_NAMES,
    Implementation,
    UnsupportedImplementationError,
    get_implementation,
    unsupported_reason,
)
from torch_impl.selection import AUTO, auto_of_unequal
from torch_impl.unequal import check_unequal_call, packing_of_call
from torch_impl.validation import (
    check_implementation_name,
    check_operands,
    check_same_dtype,
    check_tensors,
    explain_failure,
    is_plain,
    operands_fit,
)

# Subclasses, such as DTensors, mean more than they hold.
_ORDINARY = (Tensor, Parameter)
# What operands that do not fit raise. Activation checkpointing ends its recomputation by another one, which must pass.
_OF_OPERANDS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
# The cheaper of two questions; what else compiles has modes on, or tensors that are not ordinary.
_is_compiling = torch.compiler.is_dynamo_compiling
# Asks about all device types at once.
_any_autocast_is_on = torch._C._is_any_autocast_enabled
# Transforms and modes may compute a product otherwise: of broadcast partitions, of several dtypes, of sparse operands.
_transforms_are_on = torch._C._are_functorch_transforms_active
_modes_are_on, _overrides_are_on = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


def partitioned_linear(
    x: Inputs,
    weight: Weight,
    bias: Bias | None = None,
    *,
    implementation: str = "auto",
    in_axis: int = IN_AXIS,
    partition_axis: int | None = PARTITION_AXIS,
    partitions: Sequence[int] | Tensor | None = None,
    in_features: int | Sequence[int] | None = None,
    out_features: int | Sequence[int] | None = None,
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o].

    Under `torch.autocast` the operands are cast to the autocast dtype first, as `torch.nn.functional.linear` does;
    otherwise they must share one dtype.

    Args:
        x: Inputs, shape (..., n, in): any number of leading axes, none included, possibly empty; any strides.
        weight: One matrix per partition, shape (n, in, out).
        bias: One vector per partition, shape (n, out); or None.
        implementation: "auto", or a name from `implementation_names()`. A named implementation runs or raises.
        in_axis: The axis of x with the features, which those of y take.
        partition_axis: The axis of x with the partitions, which keep it in y. The same axis as `in_axis` for flat
            features: (..., n*in) -> (..., n*out). None for an input that all partitions share, which is one dense
            product: (..., in) -> (..., n, out).
        partitions: Indices of the partitions to compute, m of them, in any order; None for all. An x of m partitions
            holds theirs, in this order; an x of all n partitions is indexed as the parameters are (where both fit, as
            for a permutation, it holds theirs). y has m, and the other partitions' gradients are exactly zero. An index
            that is given twice is computed twice, and the gradients are added.
        in_features: For partitions of unequal sizes, the size of each, in one sequence or two; the other may be one
            int. x is then flat, (..., in_0 + in_1 + ...), and y too; weight and bias are packed, of one axis, as
            `torch_impl.packing` says. None for a weight (n, in, out).
        out_features: The same for the outputs.

    Returns:
        Outputs, shape (..., n, out), or (..., out_0 + out_1 + ...) of unequal sizes, in the dtype of the operands. The
        strides are the implementation's: flatten with `reshape`, not `view`. On a CPU a contiguous result would take
        1.0 to 1.7 times as long.

    Raises:
        TypeError: If an operand is no tensor, has no supported floating dtype, or the dtypes differ.
        ValueError: If shapes or devices do not fit, or the name is unknown.
        UnsupportedImplementationError: If the named implementation, or under "auto" every one, cannot run this call.

    Source: the operation is that of an ensemble of `torch.nn.Linear`, one per partition.
    """
    if in_features is not None or out_features is not None:
        packing = packing_of_call(in_features, out_features)
        return packed_linear(x, weight, bias, packing, implementation, in_axis, partition_axis, partitions)
    # Identity is the cheapest question that no value can fail; another int of the same value is only slower.
    if in_axis is not IN_AXIS or partition_axis is not PARTITION_AXIS or partitions is not None:
        return _rearranged(x, weight, bias, implementation, in_axis, partition_axis, partitions)
    if isinstance(implementation, str) and (implementation == "auto" or implementation == AUTO):
        y = plain_call(x, weight, bias)
        if y is not None:
            return y
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


def plain_call(x: Any, weight: Any, bias: Any) -> Tensor | None:
    """Compute `matmul`, which is "auto", of ordinary tensors that fit; return None for all other operands.

    Nearly every call ends here, before a kernel of a few microseconds, and so in as few attribute reads as possible.
    Whatever is not computed here goes the long way, which casts, gathers or says what is wrong.
    """
    if type(x) not in _ORDINARY or type(weight) not in _ORDINARY or not (bias is None or type(bias) in _ORDINARY):
        return None
    try:
        if _any_autocast_is_on():
            return None
        replaced = _is_compiling() or _transforms_are_on() or _modes_are_on() or _overrides_are_on()
        # The kernels of a CPU refuse all else: broadcast is a bias alone, and results have the dtype of every operand.
        on_cpu = not replaced and x.is_cpu and weight.is_cpu
        received = x.shape
        if on_cpu and len(received) == 3 and not NODE_FROM:
            (count, n, _), (_, i, o) = received, weight.shape
            if type(count) is int and count > 0:  # no int while it is traced
                # All that `matmul` does, after its questions; a call of it would be another 2% and more.
                if x.layout is not strided or weight.layout is not strided:  # they could be taken, or end the process
                    return None
                if bias is not None and not (bias.is_cpu and bias.shape == (n, o)):
                    return None
                if i < 2 and not operands_fit(x, weight, bias):  # elements would be broadcast and cast, or are none
                    return None
                few = i > 1 and count < FEWEST_ROWS
                orders = None if few else orders_of(count, n, i, o, weight.dtype.itemsize)
                if orders is not None:
                    y = ordered_product(x, weight, bias, *orders)
                elif bias is None:
                    y = torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)
                else:
                    y = torch.baddbmm(bias.unsqueeze(1), x.transpose(0, 1), weight).transpose(0, 1)
                return y if y.dtype in DTYPE_NAMES and y.numel() else None
        n, i, o = weight.shape
        empty = type(received[0]) is int and 0 in received  # whose dtype no kernel looks at
        if on_cpu and i > 1 and n and o and not empty:
            fit = x.layout is strided and weight.layout is strided
            fit = fit and (bias is None or (bias.is_cpu and bias.shape == (n, o)))
        else:
            fit = operands_fit(x, weight, bias) and (x.is_cpu or x.is_cuda)
        if not fit:
            return None
        y = partitioned_linear_matmul(x, weight, bias)
        return y if y.dtype in DTYPE_NAMES else None
    except _OF_OPERANDS:
        return None


def packed_linear(
    x: Any,
    weight: Any,
    bias: Any,
    packing: Packing,
    implementation: str,
    in_axis: Any,
    partition_axis: Any,
    partitions: Any,
) -> Tensor:
    """Compute partitions of unequal sizes, whose sizes were checked; otherwise as `partitioned_linear`."""
    x, weight, bias, meant = check_unequal_call(x, weight, bias, packing, in_axis, partition_axis, partitions)
    device = weight.device.type
    if autocast_is_on(device):
        x, weight, bias = autocast_operands(x, weight, bias)
    check_same_dtype(x, weight, bias)
    check_implementation_name(implementation, unequal=True)
    shared = partition_axis is None
    name = auto_of_unequal(meant, shared=shared) if implementation == "auto" else implementation
    reason = unsupported_reason(
        name,
        dtype=DTYPE_NAMES[weight.dtype],
        device=device,
        in_features=max(meant.in_features),
        out_features=max(meant.out_features),
        shared=shared,
        unequal=True,
    )
    if reason is not None:
        raise UnsupportedImplementationError(reason)
    entry = get_implementation(name, unequal=True)
    run = cast(Callable[..., Tensor], entry.run_shared) if shared else entry.run
    try:
        return run(x, weight, bias, meant).movedim(-1, in_axis)
    except RuntimeError as error:
        explain_failure(error, name, x, weight, bias)
        raise


def _rearranged(
    x: Any, weight: Any, bias: Any, implementation: str, in_axis: Any, partition_axis: Any, partitions: Any
) -> Tensor:
    """Compute partitions of an input of any layout: by views, but for the copies that its kernel needs of them."""
    check_axes(in_axis, partition_axis)
    check_tensors(x, weight, bias)
    n, i, _ = weight.shape
    indices = None if partitions is None else _as_indices(partitions, n, weight.device)
    if indices is not None and (hasattr(weight, "placements") or hasattr(x, "placements")):
        raise ValueError(
            f"`partitions`: expected None for operands that are sharded over devices, got {len(indices)} indices; "
            f"choose from the output, or gather the layer."
        )
    chosen = n if indices is None else len(indices)
    place, feature_axis = find_axes(x.shape, n, i, chosen=chosen, in_axis=in_axis, partition_axis=partition_axis)
    if indices is not None:
        weight, bias = weight.index_select(0, indices), None if bias is None else bias.index_select(0, indices)
    if place is None:
        return _shared(x.movedim(feature_axis, -1), weight, bias, implementation)
    flat = place == feature_axis
    if flat:
        x, feature_axis = x.unflatten(place, (-1, i)), place + 1
    x = x.movedim((place, feature_axis), (-2, -1))
    if indices is not None and x.shape[-2] != chosen:
        x = x.index_select(-2, indices)
    y = partitioned_linear(x, weight, bias, implementation=implementation)
    y = y.movedim((-2, -1), (place, feature_axis))
    return y.flatten(place, feature_axis) if flat else y


def _as_indices(partitions: Any, num_partitions: int, device: torch.device) -> Tensor:
    if not isinstance(partitions, Tensor):
        return torch.tensor(static_indices(partitions, num_partitions), device=device)
    whole = not (partitions.is_floating_point() or partitions.is_complex() or partitions.dtype == torch.bool)
    if not whole or partitions.ndim != 1 or len(partitions) == 0:
        raise TypeError(
            f"`partitions`: expected integers in one axis, got {str(partitions.dtype).removeprefix('torch.')} of shape "
            f"{tuple(partitions.shape)}; pass at least one index, such as mask.nonzero().flatten()."
        )
    if partitions.is_meta and device.type != "meta":
        raise ValueError(f"`partitions`: expected indices with values, got some on meta; pass some on {device}.")
    if is_plain(partitions) and partitions.device.type == "cpu" and not torch.compiler.is_compiling():
        with contextlib.suppress(RuntimeError):  # inside a transform such as torch.vmap
            check_indices(partitions.tolist(), num_partitions)
    return partitions.to(device, torch.int64)


def _shared(x: Tensor, weight: Tensor, bias: Tensor | None, implementation: str) -> Tensor:
    check_operands(x.unsqueeze(-2).expand(*x.shape[:-1], *weight.shape[:2]), weight, bias)
    device = weight.device.type
    if autocast_is_on(device):
        x, weight, bias = autocast_operands(x, weight, bias)
    check_same_dtype(x, weight, bias)
    check_implementation_name(implementation)
    name = AUTO if implementation == "auto" else implementation
    _, i, o = weight.shape
    reason = unsupported_reason(
        name, dtype=DTYPE_NAMES[weight.dtype], device=device, in_features=i, out_features=o, shared=True
    )
    if reason is not None:
        raise UnsupportedImplementationError(reason)
    entry = get_implementation(name)
    run = cast(Callable[..., Tensor], entry.run_shared)
    if hasattr(weight, "placements") or hasattr(x, "placements") or hasattr(bias, "placements"):
        return on_dtensors(dataclasses.replace(entry, run=run, divides=False), x, weight, bias)
    try:
        return run(x, weight, bias)
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
