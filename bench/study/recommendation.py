"""Recommend a competitor for a shape: by its own cell, by a cost model that was tried, or by the nearest cells."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from statistics import NormalDist, median
from typing import Any, cast

from bench.environments import device_name
from bench.plan.cells import DIVISIONS, STORAGE_DTYPES
from bench.plan.competitors import IMPLEMENTATION, Competitor
from bench.records import Record
from bench.store import Archive, CellPlaces, read_cells
from bench.study.cells import by_label, four_sizes, intervals, log_latencies
from bench.study.cost_model import (
    FAR,
    CostModel,
    Sample,
    Sizes,
    Trial,
    cell_of,
    chosen,
    doublings,
    expected_loss,
    reach,
    try_model,
    try_nearest,
)
from bench.study.process_spread import NOTHING_SEEN, ProcessSpread, log_seconds
from bench.study.ranking import Ranking, rank_cells
from bench.study.statistics import EQUIVALENCE, SLOWER, Interval, verdict
from bench.study.verdicts import leaders

SIZES: tuple[str, ...] = ("batch", "num_partitions", "in_features", "out_features")
# In doublings, over all four sizes together. Up to one the measurement speaks for the shape; up to `FAR` it is a hint.
NEAR = 1.0
SHOWN = 3
# The cells of a large sweep that lie farther away teach a model nothing about a shape.
_MOST_CELLS = 200
MEASURED, MODEL, NEAREST, NOTHING = "measured", "model", "nearest", "nothing"


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
    division: str | None = None  # one of `DIVISIONS`; None takes any

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Return the four sizes in the order of `SIZES`."""
        return self.batch, self.num_partitions, self.in_features, self.out_features


@dataclass(frozen=True)
class Time:
    """The time of a call, with its 95% interval."""

    seconds: float
    low: float
    high: float  # infinite where nothing is known of its scatter


@dataclass(frozen=True)
class Neighbour:
    """A measured cell near the shape."""

    ranking: Ranking  # of the whole cell
    distance: float  # doublings between the two, over all four sizes: `sqrt(sum log2(measured / asked)^2)`
    # Competitors that none was shown to beat: ours before what users write instead, and else the fastest first.
    leaders: tuple[str, ...]
    # Label to speed relative to the first leader, of all that were timed.
    speeds: dict[str, Interval]
    times: dict[str, Time]  # label to the time of a call
    machine: str = ""  # that it was measured on

    def competitors(self) -> dict[str, Competitor]:
        """Return the competitors by label."""
        records = {row.record.label: row.record for row in self.ranking.rows if row.record.label in self.times}
        return {label: Competitor(r.framework, r.implementation, r.mode, r.kind) for label, r in records.items()}

    def sample(self) -> Sample:
        """Return what a cost model is fitted to."""
        first = self.ranking.first
        # Relative to the leader, since ratios are paired by round.
        base = self.times[self.leaders[0]].seconds
        seconds = {label: base / speed.ratio for label, speed in self.speeds.items() if speed.ratio > 0}
        # Of one size for all partitions, see `matches`.
        sizes = cast(Sizes, (first.batch, first.num_partitions, first.in_features, first.out_features))
        return Sample(sizes, seconds, self.competitors(), cell_of(first))


@dataclass(frozen=True)
class Answer:
    """A recommendation, what it rests on, and what it costs if it is wrong."""

    basis: str  # `measured` (this very shape), `model`, `nearest`, or `nothing` if all cells are far away
    recommended: Competitor | None  # None where nothing is said
    tied: tuple[str, ...]  # labels that are not told apart from it
    expected: Time | None  # of a call; None where only other shapes were measured
    # The fastest that is told apart from it, and its speed relative to the recommended one.
    runner_up: str | None
    runner_up_speed: Interval | None
    loss: float | None  # expected share by which the recommended one is slower than the truly fastest
    model: Trial  # of the cost model on shapes that were left out
    nearest: Trial  # the same of the nearest cell's fastest
    neighbours: tuple[Neighbour, ...]  # the nearest measured cells, the nearest first


def distance(shape: Shape, record: Record) -> float:
    """Return the doublings between a shape and a measured one, over all four sizes."""
    return doublings([getattr(record, name) for name in SIZES], shape.sizes)


def matches(shape: Shape, record: Record) -> bool:
    """Return True if a cell was measured under the conditions that were asked for."""
    own = next(precision for precision, dtype in STORAGE_DTYPES.items() if dtype == shape.dtype)
    asked = (shape.dtype, shape.precision or own, shape.direction)
    there = shape.device in (None, record.device) and shape.division in (None, record.division)
    return four_sizes(record) and there and asked == (record.dtype, record.precision, record.direction)


@dataclass(frozen=True)
class Near:
    """The cells of an archive that were measured under the conditions of a shape."""

    division: str | None  # the one that was asked for, else the matched one where it was measured
    places: tuple[CellPlaces, ...]  # the nearest, in the order of the records
    others: tuple[str, ...]  # further divisions that were measured
    cell_s: float | None  # median seconds that one process takes for one cell in which all take part, or None


def near_cells(shape: Shape, archive: Archive) -> Near:
    """Find the cells for a shape, by one record of each: a large sweep is read once, and only in part."""
    places = archive.places()
    heads = [group[0].without_samples() for group in read_cells(CellPlaces(p.positions[:1], 1) for p in places)]
    found = [k for k, head in enumerate(heads) if matches(shape, head)]
    counted = Counter(heads[k].division for k in found)
    division = next((name for name in ("matched", *DIVISIONS, *counted) if name in counted), None)
    found = [k for k in found if heads[k].division == division]
    nearest = sorted(found, key=lambda k: distance(shape, heads[k]))[:_MOST_CELLS]
    others = tuple(name for name in counted if name != division)
    return Near(division, tuple(places[k] for k in sorted(nearest)), others, _cell_s(heads, found))


def _moment(text: str | None) -> datetime | None:
    """Return the moment of a record's field, which may have been edited by hand."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _cell_s(heads: Sequence[Record], chosen: Sequence[int]) -> float | None:
    """Return the usual seconds of one cell in one process, as if all competitors took part in each."""
    following = dict(pairwise(sorted({start for head in heads if (start := _moment(head.started_at)) is not None})))
    taken = []
    for head in (heads[k] for k in chosen):
        start = _moment(head.started_at)
        # Earlier records do not tell their end: the next cell's start does, but for the last cell of a session.
        end = following.get(start) if start and not head.finished_at else _moment(head.finished_at)
        if start is not None and end is not None and end >= start:
            taken.append((end - start).total_seconds() / head.cell_size)
    return median(taken) * max(heads[k].cell_size for k in chosen) if taken else None


def _time(mean: float, off: float) -> Time:
    # Beyond 300 an interval says nothing.
    low, high = (math.exp(mean + end) for end in (-min(off, 300.0), min(off, 300.0)))
    return Time(math.exp(mean), low, high if math.isfinite(off) else math.inf)


def _neighbour(
    shape: Shape,
    group: Sequence[Record],
    seen: Mapping[str, ProcessSpread],
    environments: Mapping[str, Mapping[str, Any]],
) -> Neighbour | None:
    ranking = rank_cells([group], seen)[0]
    known = seen.get(group[0].environment_id, NOTHING_SEEN)
    by_competitor = by_label(group)
    # In the order of the ranking, the fastest first; a competitor with a rank has no record that failed.
    ranked = [row.record for row in ranking.rows if row.rank is not None]
    kinds = {record.label: record.kind for record in ranked if shape.framework in (None, record.framework)}
    competitors = {label: log_latencies(by_competitor[label]) for label in kinds}
    if ranking.disturbed:
        return None
    first = leaders(competitors, ranking.floor, confidence=ranking.confidence, seen=known)
    if not first:
        return None
    speeds = intervals(competitors[first[0]], competitors, ranking.confidence)
    # As in a ranking: whom few rounds could not reject after the correction does not lead if it is clearly slower.
    spread = known.reach(len(competitors) - 1)
    slower = {label for label, speed in speeds.items() if verdict(speed, ranking.floor, spread) == SLOWER}
    near = tuple(label for label in first if label not in slower)
    # Of equals, the layer that has checks, initial values and conversion.
    first = tuple(sorted(near if len(near) > 1 else first, key=lambda label: kinds[label] != IMPLEMENTATION))
    speeds = intervals(competitors[first[0]], competitors, ranking.confidence)
    times = {label: _time(*log_seconds(competitors[label], known)) for label in speeds}
    fingerprint = environments.get(group[0].environment_id)
    machine = "" if fingerprint is None else device_name(fingerprint)
    return Neighbour(ranking, distance(shape, group[0]), first, speeds, times, machine)


def neighbours(
    shape: Shape,
    groups: Iterable[Sequence[Record]],
    seen: Mapping[str, ProcessSpread] | None = None,
    environments: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Neighbour]:
    """Return the measured cells in which a competitor was timed, the nearest first.

    Args:
        shape: that a recommendation is wanted for.
        groups: the records of one cell and environment each.
        seen: environment to what is known of the spread of processes on its machine.
        environments: id to fingerprint, to name the machines.

    Returns:
        Empty if nothing was measured under these conditions. Of cells of the same sizes, rows that lie one behind the
        other come first, then the cell in which most took part: by the number of frameworks, then of competitors.
    """

    def order(neighbour: Neighbour) -> tuple[Any, ...]:
        first = neighbour.ranking.first
        frameworks = {competitor.framework for competitor in neighbour.competitors().values()}
        usual = (first.layout != "contiguous", first.cache != "warm")
        return neighbour.distance, *usual, -len(frameworks), -len(neighbour.times)

    found = (_neighbour(shape, group, seen or {}, environments or {}) for group in groups if matches(shape, group[0]))
    return sorted((neighbour for neighbour in found if neighbour is not None), key=order)


def _told(interval: Interval) -> tuple[float, float]:
    """Return the mean and the standard error of a log ratio, from its 95% interval."""
    if interval.low <= 0 or math.isinf(interval.high):
        return math.log(interval.ratio), math.inf
    return math.log(interval.ratio), math.log(interval.high / interval.low) / (2 * NormalDist().inv_cdf(0.975))


def loss_at(neighbour: Neighbour, label: str) -> float | None:
    """Return the share by which a competitor is expected to be slower than the fastest of a cell; None if not there."""
    if label not in neighbour.speeds:
        return None
    own, _ = _told(neighbour.speeds[label])
    told = {other: _told(speed) for other, speed in neighbour.speeds.items() if other != label}
    return expected_loss((mean - own, error) for mean, error in told.values())


def _pool(found: Sequence[Neighbour]) -> list[Sample]:
    """Return the cells that one model may be fitted to: those of the nearest cell's machine and conditions."""

    def alike(neighbour: Neighbour) -> tuple[Any, ...]:
        first = neighbour.ranking.first
        return (neighbour.machine, first.device, first.division, first.layout, first.cache, first.optimizer)

    return [neighbour.sample() for neighbour in found if alike(neighbour) == alike(found[0])]


def answer(shape: Shape, found: Sequence[Neighbour], *, extrapolate: bool = False) -> Answer:
    """Recommend a competitor.

    Args:
        shape: that is asked about.
        found: at least one measured cell, the nearest first; see `neighbours`.
        extrapolate: name the nearest cell's fastest even if it is far away.
    """
    first, shown, samples = found[0], tuple(found[:SHOWN]), _pool(found)

    def ours(label: str) -> bool:
        return any(sample.competitors[label].kind == IMPLEMENTATION for sample in samples if label in sample.seconds)

    tried, near = try_model(samples, ours), try_nearest(samples, ours)
    known = {label: one for sample in samples for label, one in sample.competitors.items()}
    at = CostModel(samples).seconds(known, cell_of(first.ranking.first, shape.sizes))
    if first.distance and first.distance <= FAR and tried.passed and len(at) > 1:
        return _modelled(at, known, chosen(at, ours), tried, near, shown)
    label = first.leaders[0]
    if first.distance > FAR and not extrapolate:
        return Answer(NOTHING, None, (), None, None, None, None, tried, near, shown)
    behind = {other: speed for other, speed in first.speeds.items() if other not in first.leaders}
    runner_up = max(behind, key=lambda other: behind[other].ratio, default=None)
    measured = first.distance == 0
    return Answer(
        basis=MEASURED if measured else NEAREST,
        recommended=first.competitors()[label],
        tied=first.leaders[1:],
        expected=first.times[label] if measured else None,
        runner_up=runner_up,
        runner_up_speed=None if runner_up is None else behind[runner_up],
        loss=loss_at(first, label) if measured else None,
        model=tried,
        nearest=near,
        neighbours=shown,
    )


def _modelled(
    at: Mapping[str, float],
    known: Mapping[str, Competitor],
    label: str,
    tried: Trial,
    near: Trial,
    shown: tuple[Neighbour, ...],
) -> Answer:
    """Return the answer of a cost model that was tried."""
    own = at[label]
    others = {other: (math.log(own / seconds), *tried.error(other, label)) for other, seconds in at.items()}
    del others[label]
    tied = tuple(other for other, (lead, _, _) in others.items() if abs(lead) <= EQUIVALENCE)
    runner_up = next((other for other in others if other not in tied), None)
    speed = None
    if runner_up is not None:
        lead, error, count = others[runner_up]
        half = min(reach(error, count), 300.0)
        speed = Interval(math.exp(lead), math.exp(lead - half), math.exp(lead + half), count)
    return Answer(
        basis=MODEL,
        recommended=known[label],
        tied=tied,
        expected=_time(math.log(own), reach(*tried.error(label))),
        runner_up=runner_up,
        runner_up_speed=speed,
        loss=expected_loss((lead, error) for lead, error, _ in others.values()),
        model=tried,
        nearest=near,
        neighbours=shown,
    )
