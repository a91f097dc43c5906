"""Sweeps: shapes on a log grid around the article's base, named after their sizes."""

import re
from collections.abc import Iterable, Sequence
from itertools import product

from bench.plan.shapes import Workload

SWEEP_SOURCE = "a sweep around the source article's base (B=128, n=32, 32->32)"
_BASE = {"batch": 128, "num_partitions": 32, "in_features": 32, "out_features": 32}
# One spelling for one shape: no leading zeros.
_NAME = re.compile(r"sweep-b([1-9]\d*)-n([1-9]\d*)-i([1-9]\d*)-o([1-9]\d*)")


def sweep_workload(batch: int, num_partitions: int, in_features: int, out_features: int) -> Workload:
    """The workload of one point; its name tells its sizes, for example `sweep-b128-n32-i32-o32`."""
    name = f"sweep-b{batch}-n{num_partitions}-i{in_features}-o{out_features}"
    return Workload(name, batch, num_partitions, in_features, out_features, SWEEP_SOURCE)


def parse_sweep(name: str) -> Workload | None:
    """The workload that a sweep's name means, or None if it is no such name."""
    found = _NAME.fullmatch(name)
    return sweep_workload(*map(int, found.groups())) if found else None


def log_grid(low: int, high: int, factor: int = 2) -> tuple[int, ...]:
    """Sizes from `low` to at most `high`, each `factor` times the one before.

    Raises:
        ValueError: if the grid has no end or no beginning.
    """
    if low < 1 or high < low or factor < 2:
        raise ValueError(f"grid: expected 1 <= low <= high and factor >= 2, got {low}, {high}, {factor}; change these.")
    sizes = [low]
    while sizes[-1] * factor <= high:
        sizes.append(sizes[-1] * factor)
    return tuple(sizes)


def sweep(
    *,
    batch: Sequence[int] = (),
    num_partitions: Sequence[int] = (),
    in_features: Sequence[int] = (),
    out_features: Sequence[int] = (),
) -> tuple[Workload, ...]:
    """Every combination of the given sizes; an axis that is not given stays at the article's base.

    Args:
        batch: values of `b`.
        num_partitions: values of `n`.
        in_features: values of `i`.
        out_features: values of `o`.

    Returns:
        The workloads, the last axis fastest, without repeats.
    """
    axes = (batch, num_partitions, in_features, out_features)
    values = [tuple(axis) or (base,) for axis, base in zip(axes, _BASE.values(), strict=True)]
    return tuple(dict.fromkeys(sweep_workload(*sizes) for sizes in product(*values)))


def _names(workloads: Iterable[Workload]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(workload.name for workload in workloads))


def preset_sweep() -> tuple[str, ...]:
    """Names of the ready-made sweep: each axis alone over its range, then a coarse grid of batch, count and size."""
    lines = (
        *sweep(batch=(*log_grid(1, 4096, 4), 128)),
        *sweep(num_partitions=log_grid(1, 512, 2)),
        *sweep(in_features=log_grid(2, 1024, 2)),
        *sweep(out_features=log_grid(2, 1024, 2)),
    )
    coarse = [
        sweep_workload(batch, n, size, size) for batch, n, size in product((1, 128, 2048), (2, 32, 256), (8, 32, 128))
    ]
    return _names((*lines, *coarse))
