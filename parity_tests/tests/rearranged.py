"""Inputs of the operation in other layouts, of some partitions, or shared by all, and the oracle's verdict on them.

Each is judged by an ordinary case: a layout by its canonical twin, a subset by the case of its partitions, a shared
input by the one partition that it is, with n*out outputs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.tests.drawn_calls import product_fault

# Sizes of one too, where an axis can be taken for another, and sums can take another way.
CASES = (
    Case("two-axes", (2, 3), 4, 3, 5),
    Case("empty", (0, 2), 3, 4, 4),
    Case("all-alike", (4, 4), 4, 4, 4),
    Case("one-partition", (3, 2), 1, 4, 3),
    Case("one-in-one-out", (5, 3), 3, 1, 1, bias=False),
    Case("many-rows", (64, 4), 5, 2, 3),
)


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """A layout: the axes that declare it, and the way of canonical (..., n, f) to it and back, for n partitions."""

    axes: Mapping[str, int]
    there: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray, int], np.ndarray]


def _flat_in_the_middle(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array.reshape(*array.shape[:-2], array.shape[-2] * array.shape[-1]), -1, 1)


def _split(array: np.ndarray, n: int) -> np.ndarray:
    return array.reshape(*array.shape[:-1], n, array.shape[-1] // n)


LAYOUTS = {
    "defaults by other names": Rearrangement({"in_axis": 3, "partition_axis": 2}, lambda a: a, lambda a, n: a),
    "partition-major": Rearrangement(
        {"partition_axis": 0}, lambda a: np.moveaxis(a, -2, 0), lambda a, n: np.moveaxis(a, 0, -2)
    ),
    "features before partitions": Rearrangement(
        {"in_axis": -2, "partition_axis": -1}, lambda a: a.swapaxes(-1, -2), lambda a, n: a.swapaxes(-1, -2)
    ),
    "features outermost": Rearrangement(
        {"in_axis": 0, "partition_axis": -1}, lambda a: np.moveaxis(a, -1, 0), lambda a, n: np.moveaxis(a, 0, -1)
    ),
    "partitions in the middle": Rearrangement(
        {"partition_axis": 1}, lambda a: np.moveaxis(a, -2, 1), lambda a, n: np.moveaxis(a, 1, -2)
    ),
    "flat": Rearrangement(
        {"partition_axis": -1}, lambda a: a.reshape(*a.shape[:-2], a.shape[-2] * a.shape[-1]), _split
    ),
    "flat in the middle": Rearrangement(
        {"in_axis": 1, "partition_axis": -2}, _flat_in_the_middle, lambda a, n: _split(np.moveaxis(a, 1, -1), n)
    ),
}
# What is called: (x, weight, bias, cotangent, options) -> y, dx, dweight and dbias.
Gradients = Callable[[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray, dict[str, Any]], dict[str, np.ndarray]]


def layout_fault(gradients: Gradients, case: Case, dtype: str, layout: Rearrangement, **options: Any) -> str:
    """Say where a call of a layout is not what the canonical one is by the oracle; nothing where it is."""
    inputs, n = draw_inputs(case, dtype), case.num_partitions
    x, cotangent = layout.there(inputs.x), layout.there(inputs.cotangent)
    found = gradients(x, inputs.weight, inputs.bias, cotangent, dict(layout.axes) | options)
    if found["dx"].shape != x.shape:
        return f"dx has the shape {found['dx'].shape}"
    return product_fault(found | {name: layout.back(found[name], n) for name in ("y", "dx")}, inputs)


def subset_fault(
    gradients: Gradients, case: Case, dtype: str, chosen: list[int], *, whole: bool, given: Any = None, **options: Any
) -> str:
    """Say where a call of some partitions is not what the oracle has for these alone, and zero elsewhere.

    Args:
        gradients: what is called.
        case: the case of all partitions.
        dtype: of all arrays.
        chosen: the partitions.
        whole: whether x holds all partitions, else those that are chosen.
        given: the value that is passed as `partitions`, where that is not `chosen` itself.
        **options: further ones of the call.
    """
    inputs = draw_inputs(case, dtype)
    part = inputs.partitions(np.array(chosen))
    options |= {"partitions": chosen if given is None else given}
    found = gradients(inputs.x if whole else part.x, inputs.weight, inputs.bias, part.cotangent, options)
    others = np.setdiff1d(np.arange(case.num_partitions), chosen)
    for name in {"dweight", "dbias"} & found.keys():
        if found[name][others].any():
            return f"{name} is not zero elsewhere"
        found[name] = found[name][chosen]
    if whole:
        if np.take(found["dx"], others, -2).any():
            return "dx is not zero elsewhere"
        found["dx"] = np.take(found["dx"], chosen, -2)
    return product_fault(found, part)


def shared_fault(gradients: Gradients, case: Case, dtype: str, **options: Any) -> str:
    """Say where a call of a shared input is not the one dense product that the oracle has."""
    inputs = draw_inputs(case, dtype)
    n, i, o = inputs.weight.shape
    dense = dataclasses.replace(
        inputs,
        x=inputs.x[..., :1, :],
        weight=inputs.weight.transpose(1, 0, 2).reshape(1, i, n * o),
        bias=None if inputs.bias is None else inputs.bias.reshape(1, n * o),
        cotangent=inputs.cotangent.reshape(*inputs.cotangent.shape[:-2], 1, n * o),
    )
    options = {"partition_axis": None} | options
    found = gradients(inputs.x[..., 0, :], inputs.weight, inputs.bias, inputs.cotangent, options)
    found["y"], found["dx"] = found["y"].reshape(dense.cotangent.shape), found["dx"][..., None, :]
    found["dweight"] = found["dweight"].transpose(1, 0, 2).reshape(1, i, n * o)
    if "dbias" in found:
        found["dbias"] = found["dbias"].reshape(1, n * o)
    return product_fault(found, dense)


def unequal_fault(
    gradients: Gradients,
    packing: Any,
    dtype: str,
    *,
    leading: tuple[int, ...] = (5,),
    bias: bool = True,
    **options: Any,
) -> str:
    """Say where a call of partitions of unequal sizes is not what the oracle has for each of them by itself.

    `packing` is either tree's layout of the packed parameters.
    """
    sizes = list(zip(packing.in_features, packing.out_features, strict=True))
    cases = [Case(f"partition-{k}", leading, 1, i, o, bias=bias) for k, (i, o) in enumerate(sizes)]
    parts = [draw_inputs(case, dtype, seed) for seed, case in enumerate(cases)]
    found = gradients(
        np.concatenate([part.x[..., 0, :] for part in parts], -1),
        np.concatenate([parts[k].weight.ravel() for k in packing.order]),
        np.concatenate([part.bias[0] for part in parts if part.bias is not None]) if bias else None,
        np.concatenate([part.cotangent[..., 0, :] for part in parts], -1),
        {"in_features": packing.in_features, "out_features": packing.out_features} | options,
    )
    for k, (part, (i, o)) in enumerate(zip(parts, sizes, strict=True)):
        inputs, outputs = (slice(at[k], at[k + 1]) for at in (packing.in_offsets, packing.out_offsets))
        start = packing.weight_offsets[k]
        own = {
            "y": found["y"][..., None, outputs],
            "dx": found["dx"][..., None, inputs],
            "dweight": found["dweight"][start : start + i * o].reshape(1, i, o),
        }
        if bias:
            own["dbias"] = found["dbias"][None, outputs]
        if fault := product_fault(own, part):
            return f"partition {k}: {fault}"
    return ""
