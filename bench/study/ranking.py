"""From records to rankings: for each cell, who is how much faster than the baseline, and how certain that is."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.plan.competitors import YARDSTICK
from bench.records import Record
from bench.study.statistics import (
    Interval,
    ratio_interval,
    resolution,
    round_log_latency,
    tukey_outliers,
    verdict,
)

BASELINE = "baseline"


@dataclass(frozen=True)
class Row:
    """One competitor in a ranking.

    Attributes:
        record: its record (of the first process replicate; the worst one where any replicate failed).
        rank: 1 for the fastest; None for a yardstick and for a competitor without a right answer.
        latency_s: median over the replicates of the median call, or None.
        interval: ratio to the baseline, or None.
        verdict: FASTER, SLOWER, SAME, UNRESOLVED, ``baseline``, ``yardstick``, or empty without an interval.
        outliers: number of blocks outside Tukey's fences.
    """

    record: Record
    rank: int | None
    latency_s: float | None
    interval: Interval | None
    verdict: str
    outliers: int


@dataclass(frozen=True)
class Ranking:
    """One cell, in one environment.

    Attributes:
        cell: the cell's hash.
        first: any record of the cell, for what they have in common.
        baseline: label of the baseline, or None if nothing could be timed.
        resolution: smallest log ratio that can be told from nothing, or None without a control.
        control: the A/A interval, or None.
        rows: ranked competitors first, then yardsticks, then those without a speed.
        replicates: number of process replicates.
    """

    cell: str
    first: Record
    baseline: str | None
    resolution: float | None
    control: Interval | None
    rows: tuple[Row, ...] = field(default_factory=tuple)
    replicates: int = 1

    @property
    def title(self) -> str:
        """One line for a heading."""
        r = self.first
        return (
            f"{r.workload} (B={r.batch}, n={r.num_partitions}, {r.in_features}->{r.out_features}), {r.direction}, "
            f"{r.precision}, {r.division}, {r.device}"
        )


def _log_latencies(records: Iterable[Record]) -> dict[int, np.ndarray]:
    """Process replicate to mean log latency of each round, for the records that are ok."""
    return {
        record.process_replicate: round_log_latency(record.block_latency_s, record.calls_per_block or 1)
        for record in records
        if record.status == "ok"
    }


def _interval(baseline: dict[int, np.ndarray], competitor: dict[int, np.ndarray]) -> Interval | None:
    # A process that ended early has fewer rounds: only rounds in which both took part are paired.
    shared = [
        (baseline[k][: len(competitor[k])], competitor[k][: len(baseline[k])])
        for k in sorted(baseline.keys() & competitor.keys())
    ]
    return ratio_interval([b - c for b, c in shared]) if shared else None


def _rank_cell(records: Sequence[Record]) -> Ranking:
    by_competitor: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if not record.control:
            by_competitor[record.label].append(record)
    baseline = next((record.label for record in records if record.baseline and not record.control), None)
    reference = _log_latencies(by_competitor[baseline]) if baseline is not None else {}
    control = _interval(reference, _log_latencies(record for record in records if record.control))
    floor = None if control is None else resolution(control)

    rows: list[Row] = []
    for label, group in by_competitor.items():
        worst = next((record for record in group if record.status != "ok"), None)
        if worst is not None:
            rows.append(Row(worst, None, None, None, "", 0))
            continue
        interval = _interval(reference, _log_latencies(group))
        said = "" if interval is None else verdict(interval, floor)
        if label == baseline:
            said = BASELINE
        elif group[0].kind == YARDSTICK:
            said = YARDSTICK
        latency = float(np.median([record.latency_s for record in group if record.latency_s is not None]))
        outliers = sum(tukey_outliers(record.block_latency_s) for record in group)
        rows.append(Row(group[0], None, latency, interval, said, outliers))

    def speed(row: Row) -> float:
        return -row.interval.ratio if row.interval is not None else row.latency_s or 0.0

    timed = sorted((row for row in rows if row.latency_s is not None), key=speed)
    ranked = [row for row in timed if row.record.kind != YARDSTICK]
    ordered = [Row(r.record, k, r.latency_s, r.interval, r.verdict, r.outliers) for k, r in enumerate(ranked, start=1)]
    ordered += [row for row in timed if row.record.kind == YARDSTICK]
    ordered += [row for row in rows if row.latency_s is None]
    replicates = len({record.process_replicate for record in records})
    return Ranking(records[0].cell, records[0], baseline, floor, control, tuple(ordered), replicates)


def rankings(records: Iterable[Record]) -> list[Ranking]:
    """Ranks the competitors of every cell; cells of different environments stay apart.

    Args:
        records: of one run or several.

    Returns:
        One ranking for each cell, in the order in which the cells were recorded.
    """
    cells: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        cells[(record.environment_id, record.cell)].append(record)
    return [_rank_cell(group) for group in cells.values()]


def tally(records: Iterable[Record]) -> dict[str, int]:
    """Counts records by outcome, the control runs left out; competitors that a cap kept out count as ``skipped``."""
    counts: dict[str, int] = defaultdict(int)
    for record in records:
        if not record.control:
            counts["skipped" if record.skipped else record.status] += 1
    return dict(counts)
