"""The one frozen table of implementations: name, function, and what each one is declared to support."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_impl.array_types import UnsupportedImplementationError as UnsupportedImplementationError
from torch_impl.array_types import shown
from torch_impl.implementations.einsum import partitioned_linear_einsum, shared_linear_einsum
from torch_impl.implementations.fused import INTERPRETED, LARGEST_FEATURES, MISSING, partitioned_linear_fused
from torch_impl.implementations.grouped_conv import partitioned_linear_grouped_conv
from torch_impl.implementations.grouped_matmul import ROW_ALIGNMENT_BYTES, partitioned_linear_grouped_matmul
from torch_impl.implementations.loop import partitioned_linear_loop
from torch_impl.implementations.masked import partitioned_linear_masked
from torch_impl.implementations.matmul import partitioned_linear_matmul, shared_linear_matmul
from torch_impl.implementations.unequal import (
    shared_unequal_linear,
    unequal_linear_bucketed_matmul,
    unequal_linear_loop,
    unequal_linear_masked,
    unequal_linear_padded_matmul,
)
from torch_impl.implementations.vmap import partitioned_linear_vmap

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2})
"""Canonical dtype names and the size of one element in bytes."""

DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({getattr(torch, name): name for name in ITEM_BYTES})
"""PyTorch dtypes to canonical names."""

_EVERY_DTYPE = frozenset(ITEM_BYTES)
_EVERY_DEVICE = frozenset({"cpu", "cuda"})
_NOT_FLOAT64 = frozenset({"float32", "bfloat16", "float16"})


@dataclass(frozen=True)
class Implementation:
    """One way to compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o], with its declared properties.

    Attributes:
        name: The name it is asked for by.
        run: The function (x, weight, bias) -> y; for unequal sizes a `Packing` follows bias.
        run_shared: The same for x of shape (..., in), which all partitions share, as one dense product; None where it
            has none.
        dtypes: Canonical dtype names it accepts.
        devices: Device types it accepts, of "cpu" and "cuda".
        double_backward: Second derivatives exist and are right.
        isolates_partitions: NaN or Inf in one partition leaves every other partition bitwise unchanged.
        stride_bytes: Required alignment of feature rows in bytes; 1 for none.
        traced_dtypes: Dtypes whose shapes PyTorch can infer without data (the meta device, `torch.compile`).
        shards_partitions: Runs on DTensors sharded over the partition axis without communication.
        divides: Runs on DTensors as they are placed, right wherever they are; otherwise every process gathers all
            operands and computes everything.
        missing: What is lacking here to run it at all, and where; None when nothing.
        most_features: The largest in_features and out_features; None for any.
    """

    name: str
    run: Callable[..., Tensor]
    run_shared: Callable[..., Tensor] | None = None
    dtypes: frozenset[str] = _EVERY_DTYPE
    devices: frozenset[str] = _EVERY_DEVICE
    double_backward: bool = True
    isolates_partitions: bool = True
    stride_bytes: int = 1
    traced_dtypes: frozenset[str] = _EVERY_DTYPE
    shards_partitions: bool = False
    divides: bool = True
    missing: str | None = None
    most_features: int | None = None


_TABLE = (
    # DTensor refuses to take partitions apart along a sharded axis.
    Implementation("loop", partitioned_linear_loop, divides=False),
    Implementation("masked", partitioned_linear_masked, isolates_partitions=False),
    Implementation("einsum", partitioned_linear_einsum, shared_linear_einsum, shards_partitions=True),
    Implementation("vmap", partitioned_linear_vmap),
    Implementation("matmul", partitioned_linear_matmul, shared_linear_matmul, shards_partitions=True),
    # DTensor convolves what features a process has in as many groups as there are in all: wrong values where that fits
    # (torch 2.13).
    Implementation("grouped_conv", partitioned_linear_grouped_conv, divides=False),
    Implementation(
        "grouped_matmul",
        partitioned_linear_grouped_matmul,
        dtypes=_NOT_FLOAT64,
        stride_bytes=ROW_ALIGNMENT_BYTES,
        traced_dtypes=frozenset({"bfloat16"}),
        # DTensor traces it, and shards may lie where the kernel cannot read them.
        divides=False,
        missing=None
        if hasattr(F, "grouped_mm")
        else f"torch.nn.functional.grouped_mm (PyTorch 2.10 or later), which this PyTorch {torch.__version__} lacks",
    ),
    Implementation(
        "fused",
        partitioned_linear_fused,
        dtypes=_NOT_FLOAT64,
        devices=_EVERY_DEVICE if INTERPRETED else frozenset({"cuda"}),
        traced_dtypes=_NOT_FLOAT64,
        # DTensor knows no rule for an operator of ours.
        divides=False,
        missing=MISSING,
        most_features=LARGEST_FEATURES,
    ),
)

_UNEQUAL_TABLE = (
    # None of them runs on DTensors: no rule divides packed parameters.
    Implementation("loop", unequal_linear_loop, divides=False),
    Implementation("masked", unequal_linear_masked, isolates_partitions=False, divides=False),
    Implementation("bucketed_matmul", unequal_linear_bucketed_matmul, shared_unequal_linear, divides=False),
    Implementation("padded_matmul", unequal_linear_padded_matmul, divides=False),
)

IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType({entry.name: entry for entry in _TABLE})
"""Every implementation by name, in a fixed order."""

UNEQUAL_IMPLEMENTATIONS: Mapping[str, Implementation] = MappingProxyType(
    {entry.name: entry for entry in _UNEQUAL_TABLE}
)
"""Every implementation for partitions of unequal sizes by name, in a fixed order."""


def implementation_names(*, unequal: bool = False, device: str | None = None) -> tuple[str, ...]:
    """Return the names accepted as `implementation`, besides "auto": of the table for one size, or for several.

    `device` is "cpu" or "cuda" for those that run there; None for all. Raises a ValueError for another one.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"`device`: expected 'cpu', 'cuda' or None, got {shown(device)}; choose one of these.")
    table = UNEQUAL_IMPLEMENTATIONS if unequal else IMPLEMENTATIONS
    return tuple(name for name, entry in table.items() if device is None or device in entry.devices)


def get_implementation(name: str, *, unequal: bool = False) -> Implementation:
    """Return the table's entry for `name`.

    Raises:
        UnsupportedImplementationError: If only the table of the other sizes has it.
        ValueError: If there is none; the message lists the choices.
    """
    table, other = IMPLEMENTATIONS, UNEQUAL_IMPLEMENTATIONS
    if unequal:
        table, other = other, table
    entry = table.get(name) if isinstance(name, str) else None
    if entry is None:
        choices = ", ".join(repr(choice) for choice in table)
        if isinstance(name, str) and name in other:
            sizes = "sequences of sizes" if unequal else "one size"
            raise UnsupportedImplementationError(
                f"`implementation`: expected one for {sizes}, {choices}, got {name!r}; choose one of these."
            )
        raise ValueError(f"`implementation`: expected one of {choices}, got {name!r}; choose one of these.")
    return entry


def unsupported_reason(
    name: str,
    *,
    dtype: str,
    device: str,
    in_features: int,
    out_features: int,
    shared: bool = False,
    unequal: bool = False,
) -> str | None:
    """Say in one sentence why a named implementation cannot run a call, or return None when it can.

    `dtype` and `device` are canonical names such as "float32" and "cpu"; sizes are those of one partition, the
    largest ones of unequal ones; `shared` is for an input that all partitions share, `unequal` for sequences of sizes.
    """
    entry = get_implementation(name, unequal=unequal)
    if shared and entry.run_shared is None:
        return _shared_reason(name, UNEQUAL_IMPLEMENTATIONS if unequal else IMPLEMENTATIONS)
    unrestricted = entry.missing is None and entry.stride_bytes == 1 and entry.traced_dtypes is entry.dtypes
    unrestricted = unrestricted and entry.most_features is None
    if unrestricted and dtype in entry.dtypes and device in entry.devices:
        # Most calls end here; this runs at every one, before kernels that take a few microseconds.
        return None
    if dtype not in entry.dtypes:
        return f"`implementation`: {name!r} supports {_listed(entry.dtypes)}, got {dtype}; choose another one."
    traced = device == "meta" or torch.compiler.is_compiling()
    if traced and dtype not in entry.traced_dtypes:
        return (
            f"`implementation`: {name!r} can be traced without data (meta device, torch.compile) only in "
            f"{_listed(entry.traced_dtypes)}, got {dtype}; choose another one."
        )
    if device != "meta" and device not in entry.devices:
        return f"`implementation`: {name!r} supports devices {_listed(entry.devices)}, got {device}; move the operands."
    if entry.missing is not None:
        return f"`implementation`: {name!r} needs {entry.missing}."
    if entry.most_features is not None and max(in_features, out_features) > entry.most_features:
        return (
            f"`implementation`: {name!r} takes at most {entry.most_features} features in and out, got "
            f"in_features={in_features}, out_features={out_features}; choose another one."
        )
    if entry.stride_bytes > 1:
        item = ITEM_BYTES[dtype]
        for symbol, size in (("in_features", in_features), ("out_features", out_features)):
            if size * item % entry.stride_bytes:
                return (
                    f"`implementation`: {name!r} needs rows of a multiple of {entry.stride_bytes} bytes, got "
                    f"{symbol}={size} in {dtype}, {size * item} bytes; choose another one."
                )
    return None


def _shared_reason(name: str, table: Mapping[str, Implementation]) -> str:
    dense = ", ".join(repr(entry.name) for entry in table.values() if entry.run_shared is not None)
    return f"`implementation`: expected one with a product for a shared input, {dense}, got {name!r}; choose one."


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
