"""Two runs, A before and B after: who became faster or slower, beyond what a repetition would show anyway.

For each competitor that both runs timed under the same conditions, the ratio of speeds is B over A, the difference of
the trimmed mean log latencies. Rounds of two runs cannot be paired, so its interval adds up three kinds of noise:

- the spread within each run, by Student's t at a level that is shared out among all comparisons, so that equal runs
  fail with a chance of 5% in all and not in each: over processes as `scatter` learns it from all competitors
  together, and over rounds where a run has one process;
- the floors of both runs, below which they name nobody: the far ends of their A/A intervals, what the same code in the
  same run may differ by, and of a run of one process at least the spread of processes (`process_spread`);
- the median shift of the other competitors of the cell: what all of them share is the machine's doing, or a change
  that they all share, and cannot be told apart from it.

What is too small for a single cell may show in all cells together: see `overall`, which has half of the 5%.

Where one run says FASTER than the baseline and the other SLOWER, the ratios to the baseline are compared in the same
way, without a shift, which they do not have: each verdict may be wrong with a chance of 5%, so among hundreds some are
expected to be opposite. Only those beyond both runs' noise, at a level shared out among all competitors of all cells,
since any of them could have become opposite, contradict for good.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bench.plan.competitors import YARDSTICK
from bench.study.differences import Difference, differences, ratio_differences, usual_scatter
from bench.study.identity import Identity
from bench.study.measured_cells import Measured
from bench.study.overall import Overall, overall
from bench.study.scatter import Prior
from bench.study.statistics import CONFIDENCE, FASTER, SLOWER, UNRESOLVED, Interval, verdict

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
        overall: competitors over all cells of several processes.
    """

    changes: tuple[Change, ...]
    only_a: tuple[Identity, ...]
    only_b: tuple[Identity, ...]
    agreeing: int
    contradicting: tuple[Contradiction, ...]
    other_baseline: tuple[Identity, ...]
    one_process: bool
    overall: tuple[Overall, ...]

    @property
    def regressions(self) -> list[Change]:
        """What became slower beyond the noise in a cell, or lost its right answer there."""
        return [change for change in self.changes if change.ranked and change.verdict in (SLOWER, LOST)]

    @property
    def overall_regressions(self) -> list[Overall]:
        """What became slower beyond the noise in all cells together."""
        return [one for one in self.overall if one.ranked and one.verdict == SLOWER]


def _changes(
    where: Identity,
    a: Measured,
    b: Measured,
    known: Mapping[str, Difference],
    priors: Mapping[str, Prior],
    level: float,
) -> list[Change]:
    after = {row.record.label: row for row in b.ranking.rows}
    changes = []
    for row in a.ranking.rows:
        label = row.record.label
        if label not in after or row.latency_s is None:
            continue
        if label not in known:
            failed = after[label].record
            # A cap of the preset is a decision about effort, not an answer that went wrong.
            if not failed.skipped:
                ranked = row.record.kind != YARDSTICK
                changes.append(Change(where, label, None, LOST, 0.0, ranked, f"{failed.status}, {failed.reason}"))
            continue
        interval = known[label].interval(priors, level)
        said = verdict(interval, 0.0) if math.isfinite(interval.high) else UNRESOLVED
        changes.append(Change(where, label, interval, said, known[label].shift, known[label].ranked))
    return changes


def compare(a: Mapping[Identity, Measured], b: Mapping[Identity, Measured]) -> Comparison:
    """Compares two runs; see the head of this file.

    Args:
        a: the earlier run, as `measured_cells` returns it.
        b: the later one.
    """
    both = [where for where in a if where in b]
    found = {where: differences(where, a[where], b[where]) for where in both}
    everything = [one for group in found.values() for one in group]
    alpha = 1 - CONFIDENCE
    together = overall(everything, alpha / 2)
    # Where nothing can be said about all cells together, the single ones have all of the 5%.
    level = 1 - (alpha / 2 if together else alpha) / max(len(everything), 1)
    priors = usual_scatter(everything)
    changes = [
        change
        for where, group in found.items()
        for change in _changes(where, a[where], b[where], {one.label: one for one in group}, priors, level)
    ]
    agreeing, opposite, other_baseline = 0, set(), []
    for where in both:
        if a[where].ranking.baseline != b[where].ranking.baseline:
            other_baseline.append(where)
            continue
        after = {row.record.label: row.verdict for row in b[where].ranking.rows}
        for row in a[where].ranking.rows:
            pair = {row.verdict, after.get(row.record.label)}
            agreeing += pair in ({FASTER}, {SLOWER})
            if pair == {FASTER, SLOWER}:
                opposite.add((where, row.record.label))
    return Comparison(
        changes=tuple(changes),
        only_a=tuple(where for where in a if where not in b),
        only_b=tuple(where for where in b if where not in a),
        agreeing=agreeing,
        contradicting=_contradictions(a, b, opposite),
        other_baseline=tuple(other_baseline),
        one_process=any(run[where].ranking.replicates == 1 for where in both for run in (a, b)),
        overall=together,
    )


def _contradictions(
    a: Mapping[Identity, Measured], b: Mapping[Identity, Measured], opposite: set[tuple[Identity, str]]
) -> tuple[Contradiction, ...]:
    """Opposite verdicts, each with what all ratios to the baseline together say about their noise."""
    if not opposite:
        return ()
    found = [one for where in a if where in b for one in ratio_differences(where, a[where], b[where])]
    priors = usual_scatter(found)
    level = 1 - (1 - CONFIDENCE) / len(found)
    result = []
    for one in found:
        if (one.where, one.label) in opposite:
            interval = one.interval(priors, level)
            result.append(Contradiction(one.where, one.label, interval, not interval.low <= 1 <= interval.high))
    return tuple(result)
