"""Compare two runs, A before and B after, and name changes beyond those that a repetition would show.

A competitor's ratio of speeds, B over A, is the difference of the trimmed mean log latencies. Rounds of two runs cannot
be paired, so its interval adds up three kinds of noise: the scatter of processes (or of rounds where a run has one
process), at a level shared out among all comparisons; the noise floors of both runs; and the median shift of the other
competitors of the cell, which is the machine's doing or a change that all of them share.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist, median

from bench.environments import StoreError
from bench.plan.competitors import YARDSTICK
from bench.records import Record
from bench.study.cells import Identity, Spread, by_label, identity, log_latencies, paired, spread_of
from bench.study.process_spread import ProcessSpread, Scatter, apart_from_others, pooled, usual
from bench.study.ranking import Ranking, Row, rank_cells
from bench.study.statistics import (
    CONFIDENCE,
    EQUIVALENCE,
    FASTER,
    SLOWER,
    UNRESOLVED,
    Interval,
    student_t_quantile,
    verdict,
)
from parity_tests.judge.variances import Prior

LOST = "LOST"
# The finite-sample factors of Qn hold from here on, and fewer competitors do not tell what the host did between runs.
LEAST_OTHERS = 10
# Efficiency of Qn under normal errors, relative to the standard deviation.
EFFICIENCY = 0.82
# Makes Qn a standard deviation of normal errors: a quarter of their distances, which are sqrt(2) times as wide, are
# shorter than its inverse. Some of the literature has 2.2219, a misprint.
_QN = 1 / (math.sqrt(2) * NormalDist().inv_cdf(5 / 8))


@dataclass(frozen=True)
class Measured:
    """A cell of one run."""

    ranking: Ranking  # of its competitors
    spreads: Mapping[str, Spread]  # label to the spread of the log latencies, of all that were timed
    to_baseline: Mapping[str, Spread]  # label to the spread of the log ratios to the baseline, paired by round

    @property
    def floor(self) -> float:
        """Return the log ratio below which no competitor is named."""
        return math.inf if self.ranking.resolution is None else self.ranking.resolution


@dataclass(frozen=True)
class Difference:
    """One competitor in one cell of both runs, before anything is concluded from it."""

    where: Identity  # the conditions
    label: str  # of the competitor
    framework: str  # whose usual scatter its own is drawn towards
    ranked: bool  # False for a yardstick, whose change is shown and never a regression
    spreads: tuple[Spread, Spread]  # of A and of B
    estimate: float  # log of the speed in B over that in A
    shift: float  # median of the other competitors' estimates
    # Of A and of B, as `apart_from_others` returns it; empty where either has one process.
    apart: tuple[Mapping[int, float], Mapping[int, float]]
    scatter: Scatter | None  # of a process, pooled; None where either run has one
    floors: tuple[float, float]  # log ratios below which A and B name no competitor in this cell

    def interval(self, priors: Mapping[str, Prior], confidence: float) -> Interval:
        """Return the ratio of speeds, with the noise of both runs and the shift of the others in its interval."""
        units = min(spread.units for spread in self.spreads)
        noise = math.inf
        if self.scatter is not None:
            noise = math.hypot(self.scatter.towards(priors[self.framework]).reach(confidence), *self.floors)
        elif units > 1:
            quantile = student_t_quantile(0.5 + confidence / 2, min(spread.degrees for spread in self.spreads))
            noise = math.hypot(quantile * math.hypot(*(spread.error for spread in self.spreads)), *self.floors)
        return _interval(self.estimate, noise + abs(self.shift), units)


@dataclass(frozen=True)
class Change:
    """One competitor in one cell of both runs."""

    where: Identity  # the conditions
    label: str  # of the competitor
    interval: Interval | None  # speed in B over speed in A, or None where B has no right answer
    verdict: str  # FASTER, SLOWER, SAME or UNRESOLVED, of B against A; LOST where only A had a right answer
    shift: float  # as in `Difference`
    ranked: bool
    reason: str = ""  # why it was lost


@dataclass(frozen=True)
class Overall:
    """One competitor in all `cells` that both runs measured in several processes; else as in `Change`."""

    label: str
    cells: int
    interval: Interval
    verdict: str
    shift: float
    ranked: bool


@dataclass(frozen=True)
class Contradiction:
    """A competitor that is FASTER than the baseline in one run and SLOWER in the other.

    The interval is of its ratio to the baseline in B over that in A; it is beyond the noise if it leaves out 1.
    """

    where: Identity
    label: str
    interval: Interval
    beyond_noise: bool


@dataclass(frozen=True)
class Comparison:
    """Two runs, compared."""

    changes: tuple[Change, ...]  # all competitors that both runs have, cell by cell
    only_a: tuple[Identity, ...]  # cells that only one run has
    only_b: tuple[Identity, ...]
    agreeing: int  # number of FASTER or SLOWER verdicts against the baseline that both runs give alike
    contradicting: tuple[Contradiction, ...]  # competitors that one run calls FASTER and the other SLOWER
    # Cells whose baselines differ, so that their verdicts refer to different things.
    other_baseline: tuple[Identity, ...]
    one_process: bool  # True if either run measured a cell that both have in one process
    overall: tuple[Overall, ...]  # competitors over all cells of several processes

    @property
    def regressions(self) -> list[Change]:
        """Return the competitors that became slower beyond the noise in a cell, or lost their right answer there."""
        return [change for change in self.changes if change.ranked and change.verdict in (SLOWER, LOST)]

    @property
    def overall_regressions(self) -> list[Overall]:
        """Return the competitors that became slower beyond the noise in all cells together."""
        return [one for one in self.overall if one.ranked and one.verdict == SLOWER]


def measured_cells(
    groups: Iterable[Sequence[Record]], name: str, seen: Mapping[str, ProcessSpread] | None = None
) -> dict[Identity, Measured]:
    """Return the cells of a run by their conditions.

    Args:
        groups: the records of one cell and environment each.
        name: of the run's directory, for the message.
        seen: environment to what is known of the spread of its processes.

    Raises:
        StoreError: if the run holds a cell twice, from two environments.
    """
    cells: dict[Identity, Measured] = {}
    for group in groups:
        where = identity(group[0])
        if where in cells:
            if cells[where].ranking.first.environment_id == group[0].environment_id:
                raise StoreError(
                    f"{name}: {where.title} was measured twice in the environment {group[0].environment_id}, as the "
                    f"cells {cells[where].ranking.first.cell} and {group[0].cell}; give runs of one each."
                )
            raise StoreError(
                f"{name}: {where.title} was measured twice, in the environments "
                f"{cells[where].ranking.first.environment_id} and {group[0].environment_id}; choose one with --where-a "
                "or --where-b environment_id=..., or give runs of one each."
            )
        ranking = rank_cells([group], seen)[0]
        competitors = by_label(group)
        rounds = {label: log_latencies(records) for label, records in competitors.items()}
        timed = {label: rounds[label] for label, found in competitors.items() if all(r.status == "ok" for r in found)}
        spreads = {label: spread_of(one) for label, one in timed.items()}
        # As the ranking does it: a baseline that failed in one process has rounds of the others.
        pairs = paired(rounds[ranking.baseline], timed) if ranking.baseline is not None else []
        to_baseline = {label: spread for block in pairs for label, spread in block.spreads().items()}
        cells[where] = Measured(ranking, spreads, to_baseline)
    return cells


def _interval(estimate: float, noise: float, units: int) -> Interval:
    # Beyond any ratio that could be measured, and still a number.
    ends = (max(estimate - noise, -700.0), min(estimate + noise, 700.0))
    low, high = (math.exp(ends[0]), math.exp(ends[1])) if math.isfinite(noise) else (0.0, math.inf)
    return Interval(math.exp(estimate), low, high, units)


def differences(where: Identity, a: Measured, b: Measured) -> list[Difference]:
    """Return the competitors of a cell whose speed both runs know, in the order of A's ranking."""
    shared = a.spreads.keys() & b.spreads.keys()
    # Latencies, so that what took longer in A is faster in B.
    estimates = {label: a.spreads[label].mean - b.spreads[label].mean for label in shared}
    apart = [apart_from_others({label: run.spreads[label] for label in shared}) for run in (a, b)]
    found = []
    for r in (row.record for row in a.ranking.rows):
        label = r.label
        if label in shared:
            shift = median([value for name, value in estimates.items() if name != label] or [0.0])
            first, second = (run[label] if all(label in one for one in apart) else {} for run in apart)
            scatter = pooled(list(first.values()), list(second.values())) if first else None
            spreads = (a.spreads[label], b.spreads[label])
            rest = (estimates[label], shift, (first, second), scatter, (a.floor, b.floor))
            found.append(Difference(where, label, r.framework, r.kind != YARDSTICK, spreads, *rest))
    return found


def ratio_differences(where: Identity, a: Measured, b: Measured) -> list[Difference]:
    """Return the same of the ratios to the baseline: rounds are paired, so no shift is in them."""
    found = []
    for r in (row.record for row in a.ranking.rows):
        label = r.label
        if label in a.to_baseline.keys() & b.to_baseline.keys() and label != a.ranking.baseline:
            first, second = a.to_baseline[label], b.to_baseline[label]
            processes = [[*spread.processes.values()] for spread in (first, second)]
            # Of speeds, where latencies are the minuend in A: the ratio in B over the ratio in A.
            estimate, scatter = second.mean - first.mean, pooled(*processes) if all(processes) else None
            rest = (estimate, 0.0, ({}, {}), scatter, (a.floor, b.floor))
            found.append(Difference(where, label, r.framework, r.kind != YARDSTICK, (first, second), *rest))
    return found


def usual_scatter(found: Iterable[Difference]) -> dict[str, Prior]:
    """Return the scatter that is usual in each framework."""
    scatters: dict[str, list[Scatter]] = {}
    for one in found:
        scatters.setdefault(one.framework, []).extend([] if one.scatter is None else [one.scatter])
    return {framework: usual(group) for framework, group in scatters.items()}


def _sets(apart: Sequence[Mapping[int, float]]) -> list[float]:
    """Return how far each set of processes is off on average; a set's share of a cell is one over its processes."""
    numbers = sorted({k for cell in apart for k in cell})
    return [len(numbers) * sum(cell[k] / len(cell) for cell in apart if k in cell) / len(apart) for k in numbers]


def robust_scale(values: Sequence[float]) -> float:
    """Return the standard deviation of at least ten values that may hold outliers, by Qn.

    Qn is a quantile, 1/4 of the way up, of the distances of all pairs, by the factors that make it right for samples of
    normal values of this size (Rousseeuw and Croux, Alternatives to the median absolute deviation, 1993).
    """
    count = len(values)
    half = count // 2 + 1
    distances = sorted(abs(x - y) for x, y in combinations(values, 2))
    return _QN * count / (count + (1.4 if count % 2 else 3.8)) * distances[half * (half - 1) // 2 - 1]


def overall(found: Iterable[Difference], alpha: float) -> tuple[Overall, ...]:
    """Return the change of every competitor over all its cells: of a few percent, which no single cell can show.

    The estimate is the mean over cells. A set of processes, one of each framework for all cells, counts as one
    observation, whatever the cells of a set have in common (a sum over clusters, as in Liang and Zeger, Longitudinal
    data analysis using generalized linear models, 1986). Host drift slower than one run shows only between runs: two
    runs of the same code, hours apart, differed by five times what their processes scatter. So the median change of the
    other competitors counts as noise, and the noise is at least as wide as all others scatter about it.

    Args:
        found: the differences, cell by cell.
        alpha: chance that any of the intervals leaves out the truth; they share it alike.

    Returns:
        In the order of first appearance, without those of fewer than two cells of several processes.
    """
    cells: dict[str, list[Difference]] = {}
    for one in found:
        if one.scatter is not None:
            cells.setdefault(one.label, []).append(one)
    groups = {label: group for label, group in cells.items() if len(group) > 1}
    estimates = {label: sum(one.estimate for one in group) / len(group) for label, group in groups.items()}
    shifts = {label: sum(one.shift for one in group) / len(group) for label, group in groups.items()}
    level = 1 - alpha / max(len(groups), 1)
    result = []
    for label, group in groups.items():
        first, second = (_sets([one.apart[k] for one in group]) for k in (0, 1))
        others = [estimates[name] - shifts[name] for name in groups if name != label]
        noise = pooled(first, second).reach(level)
        if len(others) >= LEAST_OTHERS:
            quantile = student_t_quantile(0.5 + level / 2, EFFICIENCY * (len(others) - 1))
            noise = max(noise, quantile * robust_scale(others))
        interval = _interval(estimates[label], noise + abs(shifts[label]), min(len(first), len(second)))
        said = verdict(interval, EQUIVALENCE)
        result.append(Overall(label, len(group), interval, said, shifts[label], group[0].ranked))
    return tuple(result)


def _changes(
    rows: Iterable[Row],
    after: Mapping[str, Row],
    where: Identity,
    known: Mapping[str, Difference],
    priors: Mapping[str, Prior],
    level: float,
) -> Iterable[Change]:
    for row in rows:
        label = row.record.label
        if label not in after or row.latency_s is None:
            continue
        if label in known:
            one, interval = known[label], known[label].interval(priors, level)
            said = verdict(interval, 0.0) if math.isfinite(interval.high) else UNRESOLVED
            yield Change(where, label, interval, said, one.shift, one.ranked)
            continue
        failed = after[label].record
        # A cap of the preset is a decision about effort, not an answer that went wrong.
        if not failed.skipped:
            reason = f"{failed.status}, {failed.reason}"
            yield Change(where, label, None, LOST, 0.0, row.record.kind != YARDSTICK, reason)


def compare(a: Mapping[Identity, Measured], b: Mapping[Identity, Measured]) -> Comparison:
    """Compare the earlier run with the later one, both as `measured_cells` returns them."""
    both = [where for where in a if where in b]
    found = {where: differences(where, a[where], b[where]) for where in both}
    everything = [one for group in found.values() for one in group]
    alpha = 1 - CONFIDENCE
    together = overall(everything, alpha / 2)
    # Where nothing can be said about all cells together, the single ones have all of the 5%.
    level = 1 - (alpha / 2 if together else alpha) / max(len(everything), 1)
    priors = usual_scatter(everything)
    changes: list[Change] = []
    agreeing, opposite, other_baseline = 0, set(), []
    for where, group in found.items():
        rows, after = a[where].ranking.rows, {row.record.label: row for row in b[where].ranking.rows}
        changes += _changes(rows, after, where, {one.label: one for one in group}, priors, level)
        if a[where].ranking.baseline != b[where].ranking.baseline:
            other_baseline.append(where)
            continue
        for row in rows:
            pair = {row.verdict, after[row.record.label].verdict if row.record.label in after else None}
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
    """Return opposite verdicts, each with its interval at a level shared out among all ratios to the baseline.

    Any of these could have become opposite, and each verdict may be wrong with a chance of 5%: among hundreds some are
    expected to be opposite.
    """
    found = [one for where in a if where in b for one in ratio_differences(where, a[where], b[where])]
    priors, level = usual_scatter(found), 1 - (1 - CONFIDENCE) / max(len(found), 1)
    chosen = [(one, one.interval(priors, level)) for one in found if (one.where, one.label) in opposite]
    return tuple(Contradiction(one.where, one.label, i, not i.low <= 1 <= i.high) for one, i in chosen)
