"""Two runs, A before and B after: who became faster or slower, beyond what a repetition would show anyway.

For each competitor that both runs timed under the same conditions, the ratio of speeds is B over A, the difference of
the trimmed mean log latencies. Rounds of two runs cannot be paired, so its interval adds up three kinds of noise:

- the spread within each run (over processes where there are several, else over rounds), by Student's t at a level that
  is shared out among all comparisons, so that equal runs fail with a chance of 5% in all and not in each;
- the floors of both runs, below which they name nobody: the far ends of their A/A intervals, what the same code in the
  same run may differ by, and at least 2% of a run of one process, since processes differ;
- the median shift of the other competitors of the cell: what all of them share is the machine's doing, or a change
  that they all share, and cannot be told apart from it.

Where one run says FASTER than the baseline and the other SLOWER, the ratios to the baseline are compared in the same
way, without a shift, which they do not have: each verdict may be wrong with a chance of 5%, so among hundreds some are
expected to be opposite. Only those beyond both runs' noise, at a level shared out among all competitors of all cells,
since any of them could have become opposite, contradict for good.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from bench.plan.competitors import YARDSTICK
from bench.study.identity import Identity
from bench.study.measured_cells import Measured, Spread
from bench.study.statistics import (
    CONFIDENCE,
    FASTER,
    SLOWER,
    UNRESOLVED,
    Interval,
    student_t_quantile,
    verdict,
)

LOST = "LOST"


@dataclass(frozen=True)
class Change:
    """One competitor in one cell of both runs.

    Attributes:
        where: the conditions.
        label: who.
        interval: speed in B over speed in A, or None where B has no right answer.
        verdict: FASTER, SLOWER, SAME or UNRESOLVED, of B against A; LOST where only A had a right answer.
        shift: median log ratio of the other competitors, which is counted as noise.
        ranked: False for a yardstick, whose change is shown and never a regression.
        reason: why it was lost.
    """

    where: Identity
    label: str
    interval: Interval | None
    verdict: str
    shift: float
    ranked: bool
    reason: str = ""


@dataclass(frozen=True)
class Contradiction:
    """A competitor that is FASTER than the baseline in one run and SLOWER in the other.

    Attributes:
        where: the conditions.
        label: who.
        interval: its ratio to the baseline in B over that in A.
        beyond_noise: whether that interval leaves out 1: the runs differ by more than both runs' noise.
    """

    where: Identity
    label: str
    interval: Interval
    beyond_noise: bool


@dataclass(frozen=True)
class Comparison:
    """What two runs came to.

    Attributes:
        changes: all competitors that both runs have, cell by cell.
        only_a: cells that only A has.
        only_b: cells that only B has.
        agreeing: number of FASTER or SLOWER verdicts against the baseline that both runs give alike.
        contradicting: where one run says FASTER and the other SLOWER.
        other_baseline: cells whose baselines differ, so that their verdicts refer to different things.
        one_process: whether either run measured a cell that both have in one process.
    """

    changes: tuple[Change, ...]
    only_a: tuple[Identity, ...]
    only_b: tuple[Identity, ...]
    agreeing: int
    contradicting: tuple[Contradiction, ...]
    other_baseline: tuple[Identity, ...]
    one_process: bool

    @property
    def regressions(self) -> list[Change]:
        """What became slower beyond the noise, or lost its right answer."""
        return [change for change in self.changes if change.ranked and change.verdict in (SLOWER, LOST)]


def _interval(a: Spread, b: Spread, floors: tuple[float, float], shift: float, confidence: float) -> Interval:
    estimate = a.mean - b.mean
    units = min(a.units, b.units)
    noise = math.inf
    if units > 1:
        reach = student_t_quantile(0.5 + confidence / 2, min(a.degrees, b.degrees)) * math.hypot(a.error, b.error)
        noise = math.hypot(reach, *floors) + abs(shift)
    # Beyond any ratio that could be measured, and still a number.
    ends = (max(estimate - noise, -700.0), min(estimate + noise, 700.0))
    low, high = (math.exp(ends[0]), math.exp(ends[1])) if math.isfinite(noise) else (0.0, math.inf)
    return Interval(math.exp(estimate), low, high, units)


def _floors(a: Measured, b: Measured) -> tuple[float, float]:
    first, second = (math.inf if run.ranking.resolution is None else run.ranking.resolution for run in (a, b))
    return first, second


def _contradiction(where: Identity, label: str, a: Measured, b: Measured, confidence: float) -> Contradiction:
    # Of speeds, where latencies are the minuend in A: the ratio in B over the ratio in A.
    interval = _interval(b.to_baseline[label], a.to_baseline[label], _floors(a, b), 0.0, confidence)
    return Contradiction(where, label, interval, not interval.low <= 1 <= interval.high)


def _changes(where: Identity, a: Measured, b: Measured, confidence: float) -> list[Change]:
    ratios = {label: a.spreads[label].mean - b.spreads[label].mean for label in a.spreads.keys() & b.spreads.keys()}
    floors = _floors(a, b)
    after = {row.record.label: row for row in b.ranking.rows}
    changes = []
    for row in a.ranking.rows:
        label = row.record.label
        ranked = row.record.kind != YARDSTICK
        if label not in after or row.latency_s is None:
            continue
        if label not in ratios:
            failed = after[label].record
            # A cap of the preset is a decision about effort, not an answer that went wrong.
            if not failed.skipped:
                changes.append(Change(where, label, None, LOST, 0.0, ranked, f"{failed.status}, {failed.reason}"))
            continue
        others = [value for name, value in ratios.items() if name != label]
        shift = median(others) if others else 0.0
        interval = _interval(a.spreads[label], b.spreads[label], floors, shift, confidence)
        said = verdict(interval, 0.0) if math.isfinite(interval.high) else UNRESOLVED
        changes.append(Change(where, label, interval, said, shift, ranked))
    return changes


def compare(a: Mapping[Identity, Measured], b: Mapping[Identity, Measured]) -> Comparison:
    """Compares two runs; see the head of this file.

    Args:
        a: the earlier run, as ``measured_cells`` returns it.
        b: the later one.
    """
    both = [where for where in a if where in b]
    count = sum(len(a[where].spreads.keys() & b[where].spreads.keys()) for where in both)
    confidence = 1 - (1 - CONFIDENCE) / max(count, 1)
    changes = [change for where in both for change in _changes(where, a[where], b[where], confidence)]
    agreeing, opposite, other_baseline = 0, [], []
    for where in both:
        if a[where].ranking.baseline != b[where].ranking.baseline:
            other_baseline.append(where)
            continue
        after = {row.record.label: row.verdict for row in b[where].ranking.rows}
        for row in a[where].ranking.rows:
            pair = {row.verdict, after.get(row.record.label)}
            agreeing += pair in ({FASTER}, {SLOWER})
            if pair == {FASTER, SLOWER}:
                opposite.append((where, row.record.label))
    return Comparison(
        changes=tuple(changes),
        only_a=tuple(where for where in a if where not in b),
        only_b=tuple(where for where in b if where not in a),
        agreeing=agreeing,
        contradicting=tuple(_contradiction(where, label, a[where], b[where], confidence) for where, label in opposite),
        other_baseline=tuple(other_baseline),
        one_process=any(run[where].ranking.replicates == 1 for where in both for run in (a, b)),
    )
