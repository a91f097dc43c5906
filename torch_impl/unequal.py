"""Partitions of unequal sizes: check a call, and cut out what it is to compute."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_impl.array_types import kind_of, shown
from torch_impl.implementations.unequal import split_weight
from torch_impl.layouts import PARTITION_AXIS, check_axes, static_indices
from torch_impl.packing import Packing, check_packing, has_unequal_sizes, packing_of
from torch_impl.registry import DTYPE_NAMES
from torch_impl.validation import MOST_ELEMENTS, check_device, check_tensor, is_plain

_PACKED_WEIGHT = "pack the matrices as torch_impl.packing says"


def packing_of_call(in_features: Any, out_features: Any) -> Packing:
    """Return the layout of the sizes that the function was given; refuse others as `check_packing` does."""
    if not has_unequal_sizes(in_features, out_features):
        # Of packed parameters; a weight of shape (n, in, out) says its sizes itself.
        argument, given = ("out_features", out_features) if in_features is None else ("in_features", in_features)
        raise TypeError(
            f"`{argument}`: expected a sequence of one size per partition in in_features or out_features, got "
            f"{shown(given)}; leave both out for a weight of shape (n, in, out)."
        )
    argument = "in_features" if has_unequal_sizes(in_features, None) else "out_features"
    sizes = in_features if argument == "in_features" else out_features
    if len(sizes) == 0:
        raise ValueError(f"`{argument}`: expected at least one size, got none; pass one for each partition.")
    return check_packing(len(sizes), in_features, out_features, MOST_ELEMENTS)


def check_unequal_axes(packing: Packing, in_axis: int, partition_axis: int | None) -> None:
    """Refuse, by a ValueError, a partition axis of flat features, and a shared input of several sizes."""
    if partition_axis is None:
        if len(set(packing.in_features)) > 1:
            raise ValueError(
                f"`partition_axis`: expected its default for partitions of {len(set(packing.in_features))} input "
                f"sizes, got None; an input that all partitions share has one size, in_features=in."
            )
    elif partition_axis not in (PARTITION_AXIS, in_axis):
        raise ValueError(
            f"`partition_axis`: expected its default or in_axis={in_axis} for partitions of unequal sizes, whose "
            f"features are flat, got {partition_axis}; leave it out."
        )


def check_unequal_call(
    x: Any, weight: Any, bias: Any, packing: Packing, in_axis: Any, partition_axis: Any, partitions: Any
) -> tuple[Tensor, Tensor, Tensor | None, Packing]:
    """Return what is to be computed: x with its features last, packed parameters and layout of the partitions meant.

    Raises as `torch_impl.partitioned_linear` does.
    """
    check_axes(in_axis, partition_axis)
    check_unequal_axes(packing, in_axis, partition_axis)
    if not _operands_fit(x, weight, bias, packing):
        _explain_operands(x, weight, bias, packing)
    if not -x.ndim <= in_axis < x.ndim:
        raise ValueError(
            f"`x`: expected an axis {in_axis} with features, got shape {tuple(x.shape)}; pass another in_axis or shape."
        )
    indices = None if partitions is None else _known_indices(partitions, packing.num_partitions)
    meant = packing
    if indices is not None:
        meant = packing_of(*(tuple(sizes[k] for k in indices) for sizes in (packing.in_features, packing.out_features)))
    totals = (packing.in_features[0],) if partition_axis is None else (meant.in_offsets[-1], packing.in_offsets[-1])
    if x.shape[in_axis] not in totals:
        wanted = "in = " if partition_axis is None else "in_0 + in_1 + ... = "
        raise ValueError(
            f"`x`: expected {wanted}{' or '.join(map(str, dict.fromkeys(totals)))} features along axis {in_axis}, got "
            f"shape {tuple(x.shape)}; {_advice(x, packing, partition_axis)}."
        )
    x = x.movedim(in_axis, -1)
    if indices is None:
        return x, weight, bias, packing
    if partition_axis is not None and x.shape[-1] != totals[0]:
        x = _chosen(x, packing.in_features, indices)
    matrices = split_weight(weight, packing)
    weight = torch.cat([matrices[indices[j]].flatten() for j in meant.order])
    return x, weight, None if bias is None else _chosen(bias, packing.out_features, indices), meant


def _operands_fit(x: Any, weight: Any, bias: Any, packing: Packing) -> bool:
    # torch.compile cannot trace the questions that explain a failure.
    tensors = (x, weight) if bias is None else (x, weight, bias)
    with contextlib.suppress(Exception):  # nested and uninitialised tensors have no shape
        return (
            weight.shape == (packing.weight_size,)
            and (bias is None or bias.shape == (packing.out_offsets[-1],))
            and all(
                isinstance(tensor, Tensor)
                and tensor.dtype in DTYPE_NAMES
                and tensor.layout is torch.strided
                and tensor.device == weight.device
                and not hasattr(tensor, "placements")
                for tensor in tensors
            )
            and len(x.shape) >= 0
        )
    return False


def _explain_operands(x: Any, weight: Any, bias: Any, packing: Packing) -> None:
    _check_packed("weight", weight, "in_0*out_0 + in_1*out_1 + ...", packing.weight_size, _PACKED_WEIGHT)
    if bias is not None:
        _check_packed("bias", bias, "out_0 + out_1 + ...", packing.out_offsets[-1], "put the vectors beside each other")
        check_device("bias", bias, weight)
    check_tensor("x", x)
    check_device("x", x, weight)
    for argument, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if hasattr(tensor, "placements"):
            raise ValueError(
                f"`{argument}`: expected an ordinary tensor for partitions of unequal sizes, which are not sharded, "
                f"got {kind_of(tensor)}; gather it."
            )


def _check_packed(argument: str, tensor: Any, symbols: str, size: int, advice: str) -> None:
    check_tensor(argument, tensor)
    if tensor.shape != (size,):
        raise ValueError(
            f"`{argument}`: expected packed shape ({symbols},) = ({size},), got {tuple(tensor.shape)}; {advice}."
        )


def _known_indices(partitions: Any, num_partitions: int) -> list[int]:
    if not isinstance(partitions, Tensor):
        return static_indices(partitions, num_partitions)
    try:
        known = is_plain(partitions) and partitions.device.type == "cpu" and not torch.compiler.is_compiling()
        values = partitions.tolist() if known else None
    except RuntimeError:  # inside a transform such as torch.vmap
        values = None
    if values is None:
        raise TypeError(
            f"`partitions`: expected known indices for partitions of unequal sizes, which the shape of y depends on, "
            f"got {kind_of(partitions)} on {partitions.device}; pass a list, made outside of what is compiled."
        )
    return static_indices(values, num_partitions)


def _chosen(flat: Tensor, sizes: Sequence[int], indices: list[int]) -> Tensor:
    parts = flat.split(list(sizes), -1)
    return torch.cat([parts[k] for k in indices], -1)


def _advice(x: Tensor, packing: Packing, partition_axis: int | None) -> str:
    n, sizes = packing.num_partitions, set(packing.in_features)
    if partition_axis is None:
        return "an input that all partitions share has no partition axis"
    if x.ndim > 1 and x.shape[-2] == n and x.shape[-1] == max(sizes):
        return "put the features of the partitions beside each other, without padding: they have no axis of their own"
    if len(sizes) == 1 and x.shape[-1] in sizes:
        return "for an input that all partitions share pass partition_axis=None"
    return "put the features of all partitions beside each other, those of partition 0 first"
