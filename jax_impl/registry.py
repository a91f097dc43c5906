"""The one frozen table of implementations: name, function, and what each one is declared to support."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_impl.array_types import UnsupportedImplementationError as UnsupportedImplementationError
from jax_impl.array_types import shown
from jax_impl.implementations.by_feature import MOST_IN_FEATURES, partitioned_linear_by_feature
from jax_impl.implementations.einsum import partitioned_linear_einsum, shared_linear_einsum
from jax_impl.implementations.grouped_conv import partitioned_linear_grouped_conv
from jax_impl.implementations.grouped_matmul import partitioned_linear_grouped_matmul
from jax_impl.implementations.in_turn import partitioned_linear_in_turn
from jax_impl.implementations.loop import partitioned_linear_loop
from jax_impl.implementations.masked import partitioned_linear_masked
from jax_impl.implementations.matmul import partitioned_linear_matmul, shared_linear_matmul
from jax_impl.implementations.unequal import (
    shared_unequal_linear,
    unequal_linear_bucketed_matmul,
    unequal_linear_loop,
    unequal_linear_masked,
    unequal_linear_padded_matmul,
)
from jax_impl.implementations.vmap import partitioned_linear_vmap

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2})
"""Canonical dtype names and the size of one element in bytes."""

DTYPE_NAMES: Mapping[np.dtype, str] = MappingProxyType({jnp.dtype(name): name for name in ITEM_BYTES})
"""NumPy dtypes (bfloat16 is that of ml_dtypes) to canonical names."""

_EVERY_DTYPE = frozenset(ITEM_BYTES)
_EVERY_DEVICE = frozenset({"cpu", "cuda"})


@dataclass(frozen=True)
class Implementation:
    """One way to compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o], with its declared properties.

    Attributes:
        name: The name it is asked for by.
        run: The function (x, weight, bias, precision, dtype of y) -> y; for unequal sizes a `Packing` follows bias.
        run_shared: The same for x of shape (..., in), which all partitions share, as one dense product; None where it
            has none.
        dtypes: Canonical dtype names it accepts.
        devices: Device types it accepts, of "cpu" and "cuda" (JAX calls the latter "gpu").
        double_backward: The reverse-mode derivative of the reverse-mode derivative exists and is right.
        isolates_partitions: NaN or Inf in one partition leaves every other partition bitwise unchanged.
        maps: `jax.vmap` can map the call.
        dot_algorithms: Computes in a `jax.lax.DotAlgorithm` that is given as its precision.
        most_in_features: The largest in_features; None for any.
    """

    name: str
    run: Callable[..., Array]
    run_shared: Callable[..., Array] | None = None
    dtypes: frozenset[str] = _EVERY_DTYPE
    devices: frozenset[str] = _EVERY_DEVICE
    double_backward: bool = True
    isolates_partitions: bool = True
    maps: bool = True
    dot_algorithms: bool = True
    most_in_features: int | None = None


_TABLE = (
    Implementation("loop", partitioned_linear_loop),
    Implementation("masked", partitioned_linear_masked, isolates_partitions=False),
    Implementation("einsum", partitioned_linear_einsum, shared_linear_einsum),
    Implementation("vmap", partitioned_linear_vmap),
    Implementation("matmul", partitioned_linear_matmul, shared_linear_matmul),
    Implementation(
        "grouped_conv",
        partitioned_linear_grouped_conv,
        isolates_partitions=False,
        # XLA's convolutions have none, and JAX takes the device's default in its place without an error.
        dot_algorithms=False,
    ),
    Implementation(
        "grouped_matmul",
        partitioned_linear_grouped_matmul,
        double_backward=False,
        isolates_partitions=False,
        maps=False,
    ),
    Implementation("in_turn", partitioned_linear_in_turn),
    # A sum of elements is no product that a dot algorithm could compute.
    Implementation(
        "by_feature", partitioned_linear_by_feature, dot_algorithms=False, most_in_features=MOST_IN_FEATURES
    ),
)

_UNEQUAL_TABLE = (
    Implementation("loop", unequal_linear_loop),
    Implementation("masked", unequal_linear_masked, isolates_partitions=False),
    Implementation("bucketed_matmul", unequal_linear_bucketed_matmul, shared_unequal_linear),
    Implementation("padded_matmul", unequal_linear_padded_matmul),
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
    in_features: Any,
    out_features: Any,
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
    if dtype not in entry.dtypes:
        return f"`implementation`: {name!r} supports {_listed(entry.dtypes)}, got {dtype}; choose another one."
    if device not in entry.devices:
        return f"`implementation`: {name!r} supports devices {_listed(entry.devices)}, got {device}; move the operands."
    if entry.most_in_features is not None and in_features > entry.most_in_features:
        return (
            f"`implementation`: {name!r} takes at most {entry.most_in_features} input features, got "
            f"in_features={in_features}; choose another one."
        )
    return None


def _shared_reason(name: str, table: Mapping[str, Implementation]) -> str:
    dense = ", ".join(repr(entry.name) for entry in table.values() if entry.run_shared is not None)
    return f"`implementation`: expected one with a product for a shared input, {dense}, got {name!r}; choose one."


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
