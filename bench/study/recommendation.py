"""Recommend an implementation for a shape: the leaders of the nearest measured cells, and how far those are."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.plan.cells import STORAGE_DTYPES
from bench.plan.competitors import IMPLEMENTATION
from bench.records import Record
from bench.study.cells import by_label, intervals, log_latencies
from bench.study.process_spread import NOTHING_SEEN, ProcessSpread
from bench.study.ranking import Ranking, rank_cells
from bench.study.statistics import SLOWER, Interval, verdict
from bench.study.verdicts import leaders

SIZES: tuple[str, ...] = ("batch", "num_partitions", "in_features", "out_features")
# In doublings, over all four sizes together. Up to one the measurement speaks for the shape; up to three it is a hint.
NEAR, FAR = 1.0, 3.0
SHOWN = 3


@dataclass(frozen=True)
class Shape:
    """The shape and conditions that a recommendation is wanted for."""

    batch: int  # rows of one partition
    num_partitions: int  # `n`
    in_features: int  # per partition
    out_features: int  # per partition
    dtype: str = "float32"  # storage dtype
    direction: str = "forward"  # `forward`, `forward_backward` or `train_step`
    device: str | None = None  # `cpu` or `cuda`; None takes the only one that was measured
    framework: str | None = None  # `torch` or `jax`; None compares both
    precision: str | None = None  # that was asked for; None is the dtype's own, which is never TF32


@dataclass(frozen=True)
class Neighbour:
    """A measured cell near the shape."""

    ranking: Ranking  # of the whole cell
    distance: float  # doublings between the two, over all four sizes: `sqrt(sum log2(measured / asked)^2)`
    leaders: tuple[str, ...]  # our implementations that none of ours was shown to beat, the fastest first
    # Label to speed relative to the first leader, of all of our implementations that were timed.
    speeds: dict[str, Interval]


def distance(shape: Shape, record: Record) -> float:
    """Return the doublings between a shape and a measured one, over all four sizes."""
    return math.sqrt(sum(math.log2(getattr(record, name) / getattr(shape, name)) ** 2 for name in SIZES))


def matches(shape: Shape, record: Record) -> bool:
    """Return True if a cell was measured under the conditions that were asked for."""
    own = next(precision for precision, dtype in STORAGE_DTYPES.items() if dtype == shape.dtype)
    asked = (shape.dtype, shape.precision or own, shape.direction)
    return asked == (record.dtype, record.precision, record.direction) and shape.device in (None, record.device)


def _neighbour(shape: Shape, group: Sequence[Record], seen: Mapping[str, ProcessSpread]) -> Neighbour | None:
    ranking = rank_cells([group], seen)[0]
    known = seen.get(group[0].environment_id, NOTHING_SEEN)
    by_competitor = by_label(group)
    # In the order of the ranking, the fastest first; a competitor with a rank has no record that failed.
    ours = [row.record for row in ranking.rows if row.rank is not None and row.record.kind == IMPLEMENTATION]
    competitors = {
        record.label: log_latencies(by_competitor[record.label])
        for record in ours
        if shape.framework in (None, record.framework)
    }
    if ranking.disturbed:
        return None
    first = leaders(competitors, ranking.floor, confidence=ranking.confidence, seen=known)
    if not first:
        return None
    speeds = intervals(competitors[first[0]], competitors, ranking.confidence)
    # As in a ranking: whom few rounds could not reject after the correction does not lead if it is clearly slower.
    reach = known.reach(len(competitors) - 1)
    slower = {label for label, speed in speeds.items() if verdict(speed, ranking.floor, reach) == SLOWER}
    near = tuple(label for label in first if label not in slower)
    return Neighbour(ranking, distance(shape, group[0]), near if len(near) > 1 else first, speeds)


def nearest(
    shape: Shape, groups: Iterable[Sequence[Record]], seen: Mapping[str, ProcessSpread] | None = None
) -> list[Neighbour]:
    """Return the nearest measured cells in which one of our implementations was timed, the nearest first.

    Args:
        shape: that a recommendation is wanted for.
        groups: the records of one cell and environment each.
        seen: environment to what is known of the spread of processes on its machine.

    Returns:
        At most three; empty if nothing was measured under these conditions. Of cells of the same sizes the one in which
        most took part comes first: first by the number of frameworks, then by that of our implementations.
    """
    kept: list[tuple[float, int, int, int, Sequence[Record]]] = []
    for k, group in enumerate(groups):
        if matches(shape, group[0]):
            timed = {record.label: record for record in group if record.kind == IMPLEMENTATION and record.latency_s}
            frameworks = {record.framework for record in timed.values()}
            kept.append((distance(shape, group[0]), -len(frameworks), -len(timed), k, group))
            # A few more than are shown, since in some none of ours may have been timed.
            kept = sorted(kept, key=lambda item: item[:4])[: 4 * SHOWN]
    found = (_neighbour(shape, group, seen or {}) for *_, group in kept)
    return [neighbour for neighbour in found if neighbour is not None][:SHOWN]
