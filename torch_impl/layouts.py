"""Where an input holds partitions and features, and which partitions are meant; shapes and numbers alone."""

import operator
from collections.abc import Sequence
from typing import Any

from torch_impl.array_types import kind_of, shown

IN_AXIS, PARTITION_AXIS = -1, -2


def check_axes(in_axis: Any, partition_axis: Any) -> None:
    """Refuse, by a TypeError, axes that are no ints; the partition axis may be None."""
    for argument, axis in (("in_axis", in_axis), ("partition_axis", partition_axis)):
        if isinstance(axis, bool) or not isinstance(axis, int | None) or (axis is None and argument == "in_axis"):
            wanted = "an int, or None for an input that all partitions share" if argument != "in_axis" else "an int"
            raise TypeError(f"`{argument}`: expected {wanted}, got {shown(axis)}; pass the number of an axis of x.")


def find_axes(
    shape: Sequence[Any],
    num_partitions: int,
    in_features: int,
    *,
    chosen: int,
    in_axis: int,
    partition_axis: int | None,
) -> tuple[int | None, int]:
    """Return the axes of partitions and features, counted from the first one; raise a ValueError if sizes do not fit.

    The former is None for an input that all partitions share. Where both are one axis it is flat: it holds the features
    of one partition after those of another. An input holds the `chosen` partitions or all n.
    """
    rank, (n, i) = len(shape), (num_partitions, in_features)
    axes = [in_axis] if partition_axis is None else [in_axis, partition_axis]
    if not all(-rank <= axis < rank for axis in axes):
        raise ValueError(
            f"`x`: expected axes {' and '.join(map(shown, axes))} for features and partitions, got shape "
            f"{shown(tuple(shape))}; pass other axes or another shape."
        )
    feature_axis, *others = [axis % rank for axis in axes]
    counts, flat = (n,) if chosen == n else (chosen, n), others == [feature_axis]
    if flat:
        fits = shape[feature_axis] in [count * i for count in counts]
    else:
        fits = shape[feature_axis] == i and (not others or shape[others[0]] in counts)
    if not fits:
        # Put together where it is needed: torch.compile cannot trace it.
        wanted = f"in = {i} along in_axis={in_axis}"
        if flat:
            wanted = f"n*in = {' or '.join(f'{count} * {i} = {count * i}' for count in counts)} along axis {in_axis}"
        elif others:
            wanted = f"n = {' or '.join(map(str, counts))} along partition_axis={partition_axis} and {wanted}"
        raise ValueError(f"`x`: expected {wanted}, got {shown(tuple(shape))}; {layout_advice(shape, n, i)}.")
    return (others[0] if others else None), feature_axis


def layout_advice(shape: Sequence[Any], num_partitions: int, in_features: int, out_features: int | None = None) -> str:
    """Say what to do about an input whose shape does not fit, by what it looks like."""
    n, i, last = num_partitions, in_features, [None, None, *shape][-2:]
    if last[1] == n * i:
        return "for flat features (..., n*in) pass partition_axis=-1, the axis of in_axis"
    if last == [n, i]:
        return "keep the defaults in_axis=-1 and partition_axis=-2"
    if last == [i, n]:
        return "for features before partitions pass in_axis=-2 and partition_axis=-1"
    if last == [1, i]:
        return "an axis of size one is not broadcast, drop it and pass partition_axis=None for a shared input"
    if last[1] == i and n in shape[:-2]:
        return f"for partitions on another axis pass partition_axis={list(shape).index(n)}"
    if last[1] == i:
        return f"pass n = {n} partitions on axis -2, or partition_axis=None for an input that all of them share"
    if last == [n, out_features]:
        return "its last axis has the size of out: exchange in and out, or the last two axes of the weight"
    if last[0] == n:
        return "give sizes per partition, never totals: its last axis holds the features of one partition"
    if isinstance(last[1], int) and n > 1 and last[1] % n:
        return f"its last axis is no multiple of n = {n}, so it holds no flat features either, pass (..., n, in)"
    return "say by in_axis and partition_axis where its features and partitions are"


def static_indices(partitions: Any, num_partitions: int) -> list[int]:
    """Return the indices of partitions that are known; refuse other values by a TypeError, or by a ValueError."""
    advice = "pass a list, a range or an integer array of one axis"
    ordered = isinstance(partitions, Sequence) or hasattr(partitions, "__array__")
    if isinstance(partitions, str | bytes) or not ordered:
        raise TypeError(f"`partitions`: expected indices of partitions, got {kind_of(partitions)}; {advice}.")
    try:
        values = list(partitions)
        if any(type(value).__name__ in ("bool", "bool_") for value in values):
            raise TypeError
        # A tensor of PyTorch with one element is an index to Python, whatever its axes, and a bool too.
        others = [value for value in values if not isinstance(value, int)]
        if any(getattr(value, "ndim", 0) or "bool" in str(getattr(value, "dtype", "")) for value in others):
            raise TypeError
        indices = [operator.index(value) for value in values]
    except Exception as error:
        raise TypeError(f"`partitions`: expected indices of partitions, got {shown(partitions)}; {advice}.") from error
    return check_indices(indices, num_partitions)


def check_indices(indices: list[int], num_partitions: int) -> list[int]:
    """Refuse, by a ValueError, no index at all and those that are out of range."""
    wrong = [index for index in indices if not 0 <= index < num_partitions]
    if wrong or not indices:
        raise ValueError(
            f"`partitions`: expected indices from 0 to n - 1 = {num_partitions - 1}, got "
            f"{shown(wrong[0]) if wrong else 'none'}; pass at least one of these."
        )
    return indices
