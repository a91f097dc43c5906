"""Rank the competitors of each cell by their speed over the baseline, with intervals, verdicts and efficiencies."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from bench.plan.competitors import CALLS, DEFAULT_MODE, EAGER, GRAPHS, YARDSTICK, launch
from bench.records import Record
from bench.study.cells import (
    DISTURBED,
    Rounds,
    ShortBlocks,
    by_label,
    disturbance_line,
    identity,
    is_disturbed,
    log_latencies,
    paired,
    short_blocks,
)
from bench.study.process_spread import NOTHING_SEEN, ProcessSpread
from bench.study.statistics import CONFIDENCE, JUDGED, SLOWER, Interval, confidence, tukey_outliers
from bench.study.verdicts import CONTROL, FrameworkRatio, framework_ratio, leaders, measure

BASELINE = "baseline"


@dataclass(frozen=True, slots=True)
class Row:
    """One competitor in a ranking."""

    record: Record  # its record without the samples (of the first process replicate; the failed one where any failed)
    rank: int | None  # 1 for the fastest; None for a yardstick and for a competitor without a right answer
    latency_s: float | None  # median over the replicates of the median call, or None
    interval: Interval | None  # ratio to the baseline, or None
    verdict: str  # FASTER, SLOWER, SAME, UNRESOLVED, DISTURBED, `baseline`, `yardstick`, or empty without an interval
    outliers: int  # number of blocks outside Tukey's fences
    tied: bool = False  # True if it is one of several that tie for the first place
    waited_s: float | None = None  # median seconds of a single call that was waited for, or None

    @property
    def leads(self) -> bool:
        """Return True if no competitor was shown to be faster."""
        return self.rank == 1 or self.tied


@dataclass(frozen=True)
class Ranking:
    """One cell, in one environment."""

    cell: str  # the cell's hash
    first: Record  # any record of the cell, for the fields that they share
    baseline: str | None  # label of the baseline, or None if nothing could be timed
    # Smallest log ratio that is named: the noise floor, and with a single process at least the spread of processes;
    # None without a control.
    resolution: float | None
    control: Interval | None  # the A/A interval, or None
    # Ranked competitors first, then yardsticks, then those without a speed.
    rows: tuple[Row, ...] = field(default_factory=tuple)
    replicates: int = 1  # number of process replicates
    # Labels of the fastest competitor and of all that tie with it; empty if none was timed.
    leaders: tuple[str, ...] = ()
    confidence: float = CONFIDENCE  # of the intervals, so that they hold at 95% however often the run looked at them
    # Of every record, the control's included, that has blocks much shorter than intended.
    short_blocks: tuple[ShortBlocks, ...] = ()
    # The fastest plain calls of JAX against those of PyTorch; None where neither has any.
    frameworks: FrameworkRatio | None = None
    framework_graphs: FrameworkRatio | None = None  # the same for recorded graphs
    # Noise floor as a log ratio, which is the far end of the A/A control's interval; None without a control.
    floor: float | None = None
    # Log ratio within which no competitor is named, since the cell has a single process; 0 where it has several.
    spread_of_processes: float = 0.0
    disturbed: bool = False  # True if others used the machine so that the cell has no verdict
    disturbance: str | None = None  # how much they did, in one sentence; None where the records do not tell

    @property
    def framework_ratios(self) -> dict[str, FrameworkRatio]:
        """Return kind of launch to the comparison of the frameworks, where either has a speed of it."""
        both = {CALLS: self.frameworks, GRAPHS: self.framework_graphs}
        return {kind: found for kind, found in both.items() if found is not None}

    @property
    def winner(self) -> str | None:
        """Return the label of the competitor that beats all others, corrected for their number; None if several tie."""
        return self.leaders[0] if len(self.leaders) == 1 and len(self._ranked) > 1 else None

    @property
    def tied(self) -> tuple[str, ...]:
        """Return the labels of those that tie for the first place; empty where there is a winner."""
        return () if self.winner else self.leaders

    @property
    def _ranked(self) -> list[Row]:
        return [row for row in self.rows if row.rank is not None]

    @property
    def one_process(self) -> bool:
        """Return True if the verdicts are of a single process, so that more of them could name smaller ratios."""
        return self.spread_of_processes > 0

    @property
    def half_width(self) -> float | None:
        """Return half of the width of the A/A control's interval, as a log ratio; None without a finite width."""
        if self.control is None or self.control.low <= 0 or math.isinf(self.control.high):
            return None
        return 0.5 * math.log(self.control.high / self.control.low)

    @property
    def title(self) -> str:
        """Return one line for a heading."""
        return identity(self.first).title


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(median(known)) if known else None


def _level(records: Sequence[Record], processes: int) -> float:
    """Return the confidence of a cell's intervals that makes them hold at 95% however often its run looked."""
    if processes > 1:
        # A process stops by what it alone has seen: none could choose a moment at which the processes' means, whose
        # scatter the interval is made of, happen to be close to each other.
        return CONFIDENCE
    return max(confidence(len(r.block_latency_s) // 2, r.stopped if r.status == "ok" else "") for r in records)


def _rank_cell(records: Sequence[Record], seen: ProcessSpread) -> Ranking:
    by_competitor = by_label(records)
    baseline = next((record.label for record in records if record.baseline and not record.control), None)
    rounds = {label: log_latencies(group) for label, group in by_competitor.items()}
    reference = rounds[baseline] if baseline is not None else {}
    level = _level(records, processes=len(reference))
    failed = {label: worst for label, group in by_competitor.items() if (worst := _worst(group)) is not None}
    timed = {label: group for label, group in by_competitor.items() if label not in failed}
    # The control together with the competitors, whose rounds it shares.
    repeated = log_latencies(record for record in records if record.control)
    compared = [label for label, group in timed.items() if label != baseline and group[0].kind != YARDSTICK]
    single = len(reference.keys() & repeated.keys()) == 1
    reach = seen.reach(len(compared))
    measured = measure(paired(reference, {CONTROL: repeated} | {label: rounds[label] for label in timed}), level)
    verdicts = measured.verdicts(compared, reach)
    floor, least = measured.floor, measured.floor
    if single and floor is not None:
        least = max(floor, reach)
    rows: list[Row] = []
    for label, group in timed.items():
        said = verdicts.get(label, "")
        if label == baseline:
            said = BASELINE
        elif group[0].kind == YARDSTICK:
            said = YARDSTICK
        latency = _median(record.latency_s for record in group)
        outliers = sum(tukey_outliers(record.block_latency_s) for record in group)
        waited = _median(seconds for record in group for seconds in record.synchronised_latency_s)
        interval = measured.intervals.get(label)
        rows.append(Row(group[0].without_samples(), None, latency, interval, said, outliers, waited_s=waited))

    def speed(row: Row) -> float:
        return -row.interval.ratio if row.interval is not None else row.latency_s or 0.0

    rows.sort(key=speed)
    ranked = [row for row in rows if row.record.kind != YARDSTICK]
    competitors = {row.record.label: rounds[row.record.label] for row in ranked}
    first = leaders(competitors, floor, confidence=level, seen=seen)
    # With few rounds the correction for many competitors may reject none; a competitor that is SLOWER than the baseline
    # still does not tie with the fastest. None becomes a winner by that.
    slower = {row.record.label for row in ranked if row.verdict == SLOWER}
    near = tuple(label for label in first if label not in slower)
    first = near if len(near) > 1 else first
    ordered = [
        replace(row, rank=k, tied=len(first) > 1 and row.record.label in first) for k, row in enumerate(ranked, start=1)
    ]
    ordered += [row for row in rows if row.record.kind == YARDSTICK]
    ordered += [Row(worst.without_samples(), None, None, None, "", 0) for worst in failed.values()]
    between = {
        kind: framework_ratio(_by_framework(ranked, rounds, kind), floor, confidence=level, seen=seen)
        for kind in (CALLS, GRAPHS)
    }
    ranking = Ranking(
        cell=records[0].cell,
        first=records[0].without_samples(),
        baseline=baseline,
        resolution=least,
        control=measured.control,
        rows=tuple(ordered),
        replicates=len({record.process_replicate for record in records}),
        leaders=first,
        confidence=level,
        short_blocks=short_blocks(records),
        frameworks=between[CALLS],
        framework_graphs=between[GRAPHS],
        floor=floor,
        spread_of_processes=reach if single else 0.0,
        disturbance=disturbance_line(records),
    )
    return _withheld(ranking) if is_disturbed(records) else ranking


def _withheld(ranking: Ranking) -> Ranking:
    """Return the ranking of a disturbed cell: figures in their order, and no verdict on any of them."""

    def without_verdict(found: FrameworkRatio | None) -> FrameworkRatio | None:
        return found and replace(found, verdict=found.verdict and DISTURBED)

    return replace(
        ranking,
        rows=tuple(
            replace(row, verdict=DISTURBED if row.verdict in JUDGED else row.verdict, tied=False)
            for row in ranking.rows
        ),
        leaders=(),
        frameworks=without_verdict(ranking.frameworks),
        framework_graphs=without_verdict(ranking.framework_graphs),
        # Nothing is named, however far apart.
        resolution=math.inf,
        floor=math.inf,
        disturbed=True,
    )


def _by_framework(ranked: Sequence[Row], rounds: Mapping[str, Rounds], kind: str) -> dict[str, dict[str, Rounds]]:
    apart: dict[str, dict[str, Rounds]] = defaultdict(dict)
    for row in ranked:
        if launch(row.record.mode, row.record.device) != kind:
            continue
        apart[row.record.framework][row.record.label] = rounds[row.record.label]
    return apart


def _worst(group: Sequence[Record]) -> Record | None:
    return next((record for record in group if record.status != "ok"), None)


def rank_cells(groups: Iterable[Sequence[Record]], seen: Mapping[str, ProcessSpread] | None = None) -> list[Ranking]:
    """Rank the competitors of every cell.

    Args:
        groups: the records of one cell and environment each.
        seen: environment to what is known of the spread of processes on its machine; see `seen_spreads`.
    """
    known = seen or {}
    return [_rank_cell(group, known.get(group[0].environment_id, NOTHING_SEEN)) for group in groups]


def tally(records: Iterable[Record]) -> dict[str, int]:
    """Count records by outcome, the control runs left out; competitors that a cap kept out count as `skipped`."""
    counts: dict[str, int] = defaultdict(int)
    for record in records:
        if not record.control:
            counts["skipped" if record.skipped else record.status] += 1
    return dict(counts)


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Derived figures of one competitor in one cell; None where a part of them was not measured."""

    flops_per_s: float | None  # useful operations a second: a dense form earns nothing for its zeros
    bytes_per_s: float | None  # compulsory bytes a second
    ceiling_fraction: float | None  # least possible time by the rates measured in the same session, over the time taken
    peak_fraction: float | None  # the same by the data sheet
    waste_factor: float  # how many times the useful products are carried out
    payback_calls: float | None  # calls after which compiling has paid; infinite if it never does
    # Label of the eager calls that compiling is compared with: of the same implementation, else of the baseline.
    payback_against: str | None
    enqueue_s: float | None  # host seconds until a call returns
    waited_s: float | None  # median seconds of a single call that is waited for
    kernels_per_call: int | None  # executions on the device in one call
    copied_bytes: int | None  # written in one call by operations that only copy


def least_s(record: Record, flops_per_s: float | None, bytes_per_s: float | None) -> float | None:
    """Return the least seconds of a call, by its operations or by its bytes, whichever takes longer."""
    bounds = [
        amount / rate
        for amount, rate in ((record.useful_flops, flops_per_s), (record.compulsory_bytes, bytes_per_s))
        if rate
    ]
    return max(bounds) if bounds else None


def _payback(record: Record, latency_s: float | None, eager: Row | None) -> tuple[float | None, str | None]:
    if record.mode == EAGER or record.compile_s is None or latency_s is None or eager is None:
        return None, None
    saved = (eager.latency_s or 0.0) - latency_s
    return record.compile_s / saved if saved > 0 else math.inf, eager.record.label


def efficiencies(ranking: Ranking) -> dict[str, Efficiency]:
    """Return label to figures, for every row of a ranking."""
    eager = {row.record.label: row for row in ranking.rows if row.record.mode == EAGER and row.latency_s is not None}
    same = {(row.record.framework, row.record.implementation): row for row in eager.values()}
    # A failed baseline has no speed.
    baseline = eager.get(ranking.baseline or "")
    found = {}
    for row in ranking.rows:
        r, taken = row.record, row.latency_s
        ceiling = least_s(r, r.ceiling_flops_per_s, r.ceiling_bytes_per_s)
        peak = least_s(r, r.peak_flops_per_s, r.peak_bytes_per_s)
        payback, against = _payback(r, taken, same.get((r.framework, r.implementation), baseline))
        found[r.label] = Efficiency(
            flops_per_s=r.useful_flops / taken if taken else None,
            bytes_per_s=r.compulsory_bytes / taken if taken else None,
            ceiling_fraction=ceiling / taken if ceiling and taken else None,
            peak_fraction=peak / taken if peak and taken else None,
            waste_factor=r.waste_factor,
            payback_calls=payback,
            payback_against=against,
            enqueue_s=r.enqueue_s,
            waited_s=row.waited_s,
            kernels_per_call=sum(r.kernels.values()) if r.kernels else None,
            copied_bytes=r.copied_bytes,
        )
    return found


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """The peak memory of one competitor's calls with gradients, over that of the loop in the same framework."""

    label: str
    direction: str
    device: str
    memory_bytes: tuple[int, ...]  # of each cell
    over_loop: tuple[float, ...]  # likewise


def training_memory(rankings: Iterable[Ranking]) -> list[TrainingMemory]:
    """Return the memory of every competitor that computes gradients in a cell with a loop, and was measured alike."""
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for ranking in rankings:
        known = [row.record for row in ranking.rows if row.record.peak_memory_bytes and row.record.status == "ok"]
        known = [r for r in known if r.direction != "forward" and not r.control]
        loops = {
            (r.framework, r.memory_method): r.peak_memory_bytes
            for r in known
            if r.implementation == "loop" and r.mode == DEFAULT_MODE.get(r.framework)
        }
        for r in known:
            loop = loops.get((r.framework, r.memory_method))
            if loop and r.peak_memory_bytes:
                ratios = found.setdefault((r.label, r.direction, r.device), [])
                ratios.append((r.peak_memory_bytes, r.peak_memory_bytes / loop))
    return [
        TrainingMemory(*key, tuple(taken for taken, _ in ratios), tuple(ratio for _, ratio in ratios))
        for key, ratios in found.items()
    ]
