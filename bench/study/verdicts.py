"""Name the fastest competitor of a cell, and judge its competitors and frameworks, corrected for their number."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.study.cells import Block, Rounds, Spread, intervals, paired
from bench.study.process_spread import ProcessSpread, Scatter, usual
from bench.study.statistics import (
    COARSE,
    CONFIDENCE,
    EQUIVALENCE,
    FASTER,
    SLOWER,
    UNKNOWN,
    UNRESOLVED,
    Interval,
    ratio_intervals,
    resolution,
    student_t_quantile,
    student_t_two_sided,
    verdict,
)

# Two variances do not say how much variances differ.
_LEAST_COMPETITORS = 3
# Of the degrees of freedom of a variance, for those that the others may add.
_MOST_FROM_OTHERS = 3


def holm(p_values: np.ndarray, error: float) -> np.ndarray:
    """Return which hypotheses fall when the chance of any false rejection is at most `error`.

    Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    order = np.argsort(p_values, kind="stable")
    passed = p_values[order] <= error / np.arange(len(p_values), 0, -1)
    rejected = np.zeros(len(p_values), bool)
    rejected[order] = np.logical_and.accumulate(passed)
    return rejected


def _moderated(spreads: Sequence[Spread]) -> list[Scatter]:
    """Return the variance of one unit of each, drawn towards the usual one among those with the same kind of unit.

    A few processes say little about their own scatter: with 18 competitors and five processes, Holm asks for 7 standard
    errors. The scatter of what all are compared with is in every ratio, and no pooling averages it out: where it is
    half of the variance, the pooled estimate has no more than four times the degrees of freedom of a single one
    (Satterthwaite, An approximate distribution of estimates of variance components, 1946).
    """
    own = [Scatter(spread.error**2 * spread.units, spread.degrees, 1 / spread.units) for spread in spreads]
    found = list(own)
    for several in (False, True):
        alike = [k for k, spread in enumerate(spreads) if bool(spread.processes) == several]
        prior = usual([own[k] for k in alike], _LEAST_COMPETITORS)
        for k in alike:
            found[k] = own[k].towards(prior, _MOST_FROM_OTHERS)
    return found


def beyond_chance(spreads: Sequence[Spread], spread_of_processes: float, error: float) -> np.ndarray:
    """Return which of several log ratios differ from 0, by two-sided t tests corrected for their number.

    Args:
        spreads: the ratios.
        spread_of_processes: log ratio within which a single process names no competitor; counted in quadrature, since
            rounds and processes scatter independently.
        error: chance that any is named although all are equal.
    """
    p_values = np.ones(len(spreads))
    known = [k for k, spread in enumerate(spreads) if spread.units > 1]
    t, degrees = [], []
    for spread, scatter in zip((spreads[k] for k in known), _moderated([spreads[k] for k in known]), strict=True):
        within = 0.0 if spread.processes else spread_of_processes
        excess = math.sqrt(max(spread.mean**2 - within**2, 0.0))
        deviation = math.sqrt(scatter.variance * scatter.inverse_processes)
        t.append(excess / deviation if deviation else math.inf if excess else 0.0)
        degrees.append(scatter.degrees)
    p_values[known] = student_t_two_sided(np.array(t), np.array(degrees))
    return holm(p_values, error)


def _far_enough(spread: Spread, floor: float | None, spread_of_processes: float, confidence: float) -> bool:
    """Return True if a lead is beyond the noise floor, and not provably within 2%."""
    if spread.units < 2 or floor is None or floor > UNKNOWN:
        return False
    reach = student_t_quantile(0.5 + confidence / 2, spread.degrees) * spread.error
    if not spread.processes:
        reach = math.hypot(reach, spread_of_processes)
    # Above 15% the floor is not known well enough for an estimate to pass it, as in `statistics.verdict`.
    return (spread.mean - reach if floor > COARSE else spread.mean) > floor and spread.mean + reach > EQUIVALENCE


def leaders(
    competitors: Mapping[str, Rounds],
    floor: float | None,
    *,
    confidence: float = CONFIDENCE,
    seen: ProcessSpread | None = None,
) -> tuple[str, ...]:
    """Return the fastest competitor, first, and all that tie with it: a single name is a winner.

    "X is the fastest" is one claim against every other competitor; X was chosen after looking, so each test is
    two-sided. A competitor ties unless it is beaten by more than the noise floor, and not by provably less than 2%.

    Args:
        competitors: label to rounds, of all that are ranked, the fastest first.
        floor: the cell's noise floor as a log ratio; without one, nothing is beaten.
        confidence: 1 less the chance of any false claim.
        seen: what is known of the spread of processes on the machine; None leaves it out, as if processes were alike.
    """
    if not competitors:
        return ()
    best = next(iter(competitors))
    others = {label: rounds for label, rounds in competitors.items() if label != best}
    # Positive where the best is faster. A competitor that shares no process with the best was never compared with it.
    leads = {
        label: spread
        for block in paired(competitors[best], others)
        for label, spread in replace(block, log_ratios=-block.log_ratios).spreads().items()
    }
    reach = 0.0 if seen is None else seen.reach(len(leads))
    beyond = beyond_chance(list(leads.values()), reach, 1 - confidence) if leads else np.zeros(0, bool)
    beaten = {
        label
        for (label, spread), named in zip(leads.items(), beyond, strict=True)
        if named and _far_enough(spread, floor, reach, confidence)
    }
    return (best, *(label for label in others if label not in beaten))


# Label of the A/A control among the competitors, since it shares the baseline's.
CONTROL = ""
# Of the chance that an interval leaves out the truth, 5%.
_SHARE = 0.4


@dataclass(frozen=True)
class Measured:
    """The ratios of one cell to its baseline, before anything is concluded from them."""

    intervals: dict[str, Interval]  # label to ratio
    # Label to the ratio to the mean of the baseline's two runs, which is known better than either.
    tested: dict[str, Spread]
    control: Interval | None  # ratio of the A/A control, or None
    floor: float | None  # the noise floor as a log ratio, or None without a control
    confidence: float  # of the intervals

    def verdicts(self, compared: Collection[str], spread_of_processes: float) -> dict[str, str]:
        """Return the verdict on each of some competitors: that of its own interval, unless chance alone could name it.

        The chance that any is named although all are equal is meant to be 2%; competitors whose noise differs tenfold
        come to 3% in simulated cells.

        Args:
            compared: labels of those that get a verdict.
            spread_of_processes: log ratio within which a single process names no competitor.
        """
        labels = [label for label in self.intervals if label in compared]
        error = _SHARE * (1 - self.confidence)
        named = beyond_chance([self.tested[label] for label in labels], spread_of_processes, error)
        found = {label: verdict(self.intervals[label], self.floor, spread_of_processes) for label in labels}
        chance = {label for label, beyond in zip(labels, named, strict=True) if not beyond}
        return {
            label: UNRESOLVED if said in (FASTER, SLOWER) and label in chance else said for label, said in found.items()
        }


def _tested(block: Block, control: Mapping[int, np.ndarray]) -> dict[str, Spread]:
    """Return the ratios of a block to the mean of the baseline's two runs, round by round."""
    if all(k in control and len(control[k]) >= count for k, count in zip(block.processes, block.lengths, strict=True)):
        again = [control[k][:count] for k, count in zip(block.processes, block.lengths, strict=True)]
        block = replace(block, log_ratios=block.log_ratios - 0.5 * np.concatenate(again))
    return block.spreads()


def measure(blocks: Sequence[Block], confidence: float) -> Measured:
    """Return the ratios of a cell.

    Args:
        blocks: all that were timed, paired with the baseline; the control under the label `CONTROL`.
        confidence: of the intervals.
    """
    control: dict[int, np.ndarray] = {}
    for block in blocks:
        if CONTROL in block.labels:
            rounds = np.split(block.log_ratios[block.labels.index(CONTROL)], np.cumsum(block.lengths)[:-1])
            control = dict(zip(block.processes, rounds, strict=True))
    intervals: dict[str, Interval] = {}
    tested: dict[str, Spread] = {}
    for block in blocks:
        found = ratio_intervals(block.log_ratios, block.lengths, confidence=confidence)
        intervals |= zip(block.labels, found, strict=True)
        tested |= _tested(block, control)
    again = intervals.pop(CONTROL, None)
    return Measured(intervals, tested, again, None if again is None else resolution(again), confidence)


# The verdict is that of the second: its speed over that of the first.
REFERENCE, RIVAL = "torch", "jax"


@dataclass(frozen=True, slots=True)
class FrameworkRatio:
    """The two frameworks in one cell and one kind of launch."""

    # Label of PyTorch's fastest competitor, an implementation or what users write instead; None where it has no speed.
    torch: str | None
    jax: str | None  # label of JAX's, or None
    interval: Interval | None  # speed of JAX over that of PyTorch, of these two; None where a side is missing
    verdict: str  # FASTER, SLOWER, SAME or UNRESOLVED, of JAX against PyTorch; empty where a side is missing
    confidence: float  # of the interval, so that it holds at 95% however the two were chosen


def framework_ratio(
    ranked: Mapping[str, Mapping[str, Rounds]],
    floor: float | None,
    *,
    confidence: float,
    seen: ProcessSpread | None = None,
) -> FrameworkRatio | None:
    """Compare the fastest competitor of JAX with that of PyTorch in one cell and one kind of launch.

    Which of several equals comes first in its framework is chance, and to choose it by the same rounds that judge it
    would favour the framework with more of them. So the error is shared out (Bonferroni) among the pairs of those that
    tie for the first place of their framework.

    Args:
        ranked: framework to label to rounds, of all that are ranked, the fastest first.
        floor: the cell's noise floor as a log ratio, or None.
        confidence: 1 less the chance of a false verdict.
        seen: what is known of the spread of processes on the machine; None leaves it out, as if processes were alike.

    Returns:
        None where neither framework has a competitor, or the two fastest share no round.
    """
    if not all(ranked.get(framework) for framework in (REFERENCE, RIVAL)):
        alone = {framework: next(iter(ranked.get(framework) or ()), None) for framework in (REFERENCE, RIVAL)}
        if not any(alone.values()):
            return None
        return FrameworkRatio(alone[REFERENCE], alone[RIVAL], None, "", confidence)
    first: dict[str, str] = {}
    pairs = 1
    for framework in (REFERENCE, RIVAL):
        competitors = ranked[framework]
        tied = leaders(competitors, floor, confidence=confidence, seen=seen)
        first[framework] = tied[0]
        pairs *= len(tied)
    level = 1 - (1 - confidence) / pairs
    torch, jax = first[REFERENCE], first[RIVAL]
    found = intervals(ranked[REFERENCE][torch], {jax: ranked[RIVAL][jax]}, level).get(jax)
    if found is None:
        return None
    spread = 0.0 if seen is None else seen.reach(pairs)
    return FrameworkRatio(torch, jax, found, verdict(found, floor, spread), level)
