"""Ratios of durations with intervals, and the verdict on one ratio.

For round r let `d_r = log(baseline_r) - log(competitor_r)`, each the mean log duration of that round's two blocks
(order, then reverse order, which cancels a linear drift). The estimate is the geometric mean ratio of the middle three
fifths of the rounds, `exp(trimmed mean d)`: above 1 the competitor is faster than the baseline. Its interval is a
percentile bootstrap over processes, then rounds, widened for few units.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist, quantiles

import numpy as np
from scipy import special

TRIMMED = 0.2  # at either end; the share that the literature settled on
# With fewer, what is left says too little about its own scatter: the mean of all is taken.
LEAST_ROUNDS = 10


def _trimmed_rounds(rounds: int) -> int:
    # A product such as 0.2 * 15 is exact enough only after rounding.
    return int(round(TRIMMED * rounds, 9)) if rounds >= LEAST_ROUNDS else 0


def middle_rounds(rounds: int) -> int:
    """Return how many of so many rounds enter a trimmed mean.

    Some rounds on a shared host tell what another guest did: their log ratios lie far outside the rest, in both
    directions alike. No sample is deleted; a round counts by its rank.
    """
    return rounds - 2 * _trimmed_rounds(rounds)


def pseudo_values(log_ratios: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """Return one value for each round, whose mean over a process is the trimmed mean, and whose scatter is its scatter.

    The interval of a trimmed mean follows from values that are pulled in to the ends of the middle part ("winsorised"),
    with as many degrees of freedom as rounds in it (Tukey and McLaughlin, Less vulnerable confidence and significance
    procedures for location, 1963; Yuen, The two-sample trimmed t for unequal population variances, 1974).

    Args:
        log_ratios: rows of rounds, the processes behind one another.
        lengths: number of rounds of each process.
    """
    parts, start = [], 0
    for length in lengths:
        rounds = log_ratios[..., start : start + length]
        start += length
        cut = _trimmed_rounds(length)
        if cut == 0:
            parts.append(rounds)
            continue
        ordered = np.sort(rounds, axis=-1)
        pulled_in = np.clip(rounds, ordered[..., cut, None], ordered[..., length - 1 - cut, None])
        middle = ordered[..., cut : length - cut].mean(-1, keepdims=True)
        share = (length - 2 * cut) / length
        parts.append(middle + (pulled_in - pulled_in.mean(-1, keepdims=True)) / share)
    return np.concatenate(parts, axis=-1)


CONFIDENCE = 0.95
EQUIVALENCE = math.log(1.02)
RESAMPLES = 2000
# A noise floor above this is not known well: the end of an interval must pass it, and not only the estimate.
COARSE = math.log(1.15)
# A control that may differ from itself by an order of magnitude says nothing about any other ratio.
UNKNOWN = math.log(10)
FASTER, SLOWER, SAME, UNRESOLVED = "FASTER", "SLOWER", "SAME", "UNRESOLVED"
JUDGED = (FASTER, SLOWER, SAME, UNRESOLVED)


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio to the baseline with its interval; above 1 is faster than the baseline."""

    ratio: float  # baseline time over competitor time, trimmed geometric mean over rounds
    low: float  # lower end
    high: float  # upper end; infinite where a single round says nothing about spread
    rounds: int  # number of rounds behind it
    processes: int = 0  # number of processes behind it; 0 where that plays no part, as in a ratio of two runs

    def across_processes(self, spread: float) -> "Interval":
        """Return the interval of a single process, with its ends moved out by what another process may differ by.

        Args:
            spread: log ratio that processes may differ by; added in quadrature, since rounds and processes scatter
                independently.
        """
        if self.processes != 1 or self.low <= 0:
            return self
        middle = math.log(self.ratio)
        low = middle - math.hypot(middle - math.log(self.low), spread)
        high = middle + math.hypot(math.log(self.high) - middle, spread)
        return replace(self, low=math.exp(max(low, -700.0)), high=_exponential(high))


@lru_cache(maxsize=4096)
def student_t_quantile(probability: float, degrees: float) -> float:
    """Return a quantile of Student's t distribution.

    Args:
        probability: in [0.5, 1).
        degrees: at least 1, not necessarily whole.

    Raises:
        ValueError: outside these ranges.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"expected 0.5 <= probability < 1 and degrees >= 1, got {probability} and {degrees}")
    return float(special.stdtrit(degrees, probability))


def round_log_latency(block_latency_s: Sequence[float] | np.ndarray, calls_per_block: int) -> np.ndarray:
    """Return the mean log seconds of a call in each round, from raw blocks in order (two a round).

    Raises:
        ValueError: if the blocks are not two a round.
    """
    if len(block_latency_s) == 0 or len(block_latency_s) % 2:
        raise ValueError(f"expected two blocks a round, got {len(block_latency_s)} blocks")
    logs = np.log(np.asarray(block_latency_s, float) / calls_per_block)
    return 0.5 * (logs[0::2] + logs[1::2])


def student_t_two_sided(t: np.ndarray, degrees: float | np.ndarray) -> np.ndarray:
    """Return the probability that `|T|` exceeds `|t|`.

    Args:
        t: statistics, of any shape; infinite ones have probability 0, undefined ones 1.
        degrees: degrees of freedom, positive, of all alike or of each.
    """
    mass = 2 * special.stdtr(degrees, -np.abs(np.asarray(t, float)))
    return np.where(np.isnan(mass), 1.0, mass)


@lru_cache(maxsize=1024)
def widening(units: int, degrees: int, confidence: float) -> float:
    """Return the factor by which the ends of a 95% percentile interval are moved out from the estimate.

    A bootstrap of few units is too narrow (Hesterberg, What teachers should know about the bootstrap, 2015). Another
    confidence enters through the quantile alone: the far tail of 2,000 resamples would be noise.
    """
    quantile = student_t_quantile(0.5 + confidence / 2, degrees)
    return math.sqrt(units / (units - 1)) * quantile / NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@lru_cache(maxsize=16)
def _resampling(lengths: tuple[int, ...], seed: int) -> np.ndarray:
    """Return the weights of all rounds (rows) in each bootstrap mean: processes are drawn first, then their rounds.

    The same weights serve every competitor of a cell, and every cell with as many rounds.
    """
    rng = np.random.default_rng(seed)
    ends = np.cumsum(lengths)
    weights = np.zeros((RESAMPLES, int(ends[-1])))
    # Each of the drawn processes gets rounds of its own, so that a process drawn twice does not count its noise twice.
    for chosen in rng.integers(0, len(lengths), (len(lengths), RESAMPLES)):
        for k, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            places = np.flatnonzero(chosen == k)
            drawn = rng.multinomial(length, np.full(length, 1 / length), size=len(places))
            weights[places, end - length : end] += drawn / (length * len(lengths))
    return np.ascontiguousarray(weights.T)


def _exponential(value: float) -> float:
    return math.exp(min(value, 700.0))


def process_means(log_ratios: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """Return the mean of each process, for rows of rounds behind one another: shape `(competitors, processes)`."""
    return np.add.reduceat(log_ratios, np.cumsum((0, *lengths[:-1])), axis=1) / lengths


def ratio_intervals(
    log_ratios: np.ndarray, lengths: tuple[int, ...], *, confidence: float = CONFIDENCE, seed: int = 0
) -> list[Interval]:
    """Estimate the ratios of several competitors with as many rounds each.

    Args:
        log_ratios: `d_r`, one row for each competitor, the processes behind one another.
        lengths: number of rounds of each process.
        confidence: of the intervals.
        seed: of the resampling, so that a report is reproducible.

    Returns:
        The trimmed geometric mean ratios and their intervals. Every process counts alike.
    """
    values = pseudo_values(log_ratios, lengths)
    estimates = process_means(values, lengths).mean(1)
    count = int(sum(lengths))
    units, degrees = (len(lengths), len(lengths) - 1) if len(lengths) > 1 else (count, middle_rounds(count) - 1)
    if units == 1:
        return [Interval(_exponential(float(estimate)), 0.0, math.inf, count, 1) for estimate in estimates]
    # Not a matrix product: its threads cost more than so small a sum, and its rounding differs between machines.
    resampled = np.einsum("kr,rs->ks", values, _resampling(lengths, seed))
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
    scale = widening(units, degrees, confidence)
    ends = np.stack([estimates, estimates + scale * (low - estimates), estimates + scale * (high - estimates)], axis=1)
    return [
        Interval(_exponential(m), _exponential(a), _exponential(b), count, len(lengths)) for m, a, b in ends.tolist()
    ]


def resolution(control: Interval) -> float:
    """Return the noise floor of a cell as a log ratio: the far end of the A/A control's interval."""
    if control.low <= 0:
        return math.inf
    return max(abs(math.log(control.low)), abs(math.log(control.high)))


def verdict(interval: Interval, floor: float | None, spread: float = 0.0) -> str:
    """Return the verdict on one ratio alone; among several competitors, `verdicts` corrects for their number.

    SAME: the whole interval lies within 2% of 1. FASTER or SLOWER: the interval leaves 1 out and the estimate lies
    beyond the noise floor; where the floor itself is above 15%, the near end of the interval lies beyond it. Anything
    else, and everything without a control or with one that spans more than a factor of 10, is UNRESOLVED. The interval
    of a single process counts with the spread of processes in it.

    Args:
        interval: ratio to the baseline.
        floor: the cell's noise floor as a log ratio, or None if it has no control.
        spread: log ratio that processes may differ by.
    """
    if interval.low <= 0 or floor is None or floor > UNKNOWN:
        return UNRESOLVED
    wide = interval.across_processes(spread)
    low, high, middle = math.log(wide.low), math.log(wide.high), math.log(wide.ratio)
    if low >= -EQUIVALENCE and high <= EQUIVALENCE:
        return SAME
    near, size = (low, middle) if middle > 0 else (-high, -middle)
    if near <= 0 or (near if floor > COARSE else size) <= floor:
        return UNRESOLVED
    return FASTER if middle > 0 else SLOWER


def tukey_outliers(samples: Sequence[float]) -> int:
    """Count the samples more than 1.5 interquartile ranges outside the quartiles; none is ever removed."""
    if len(samples) < 2:
        return 0
    # In plain Python, since a few dozen samples are sorted before an array of them is made.
    values = sorted(samples)
    low, _, high = quantiles(values, n=4, method="inclusive")
    margin = 1.5 * (high - low)
    return bisect_left(values, low - margin) + len(values) - bisect_right(values, high + margin)


# Chance of error of all looks together, and of the report of a run that none of them stopped.
_LOOKS, CAP_ERROR = 0.01, 1 - CONFIDENCE - 0.01
RESOLVED_REASON, PRECISE_REASON = "resolved", "precise"
# Half-width of the A/A control's interval that a run aims at, however clear the other verdicts are.
RESOLUTION = math.log(1.03)
FIRST_LOOK = 10


# Looking again and again and stopping at the first good moment finds differences where there are none. So the rounds
# at which a run may look are fixed (10, 14, 20, 28, 40, ...), and the k-th look is allowed an error of `0.01 / (k (k +
# 1))`. These sum to 0.01 over any number of looks; the other 0.04 are left for a run that a cap ends. By the union
# bound the intervals cover at the stated rate, whatever the dependence between looks.
def looks() -> Iterator[int]:
    """Yield the numbers of rounds at which a run may stop: each is the double of the one before the last."""
    one, two = FIRST_LOOK, 14
    while True:
        yield one
        one, two = two, 2 * one


def is_look(rounds: int) -> bool:
    """Return True if a run may stop after so many rounds."""
    return next(look for look in looks() if look >= rounds) == rounds


def look_confidence(rounds: int) -> float:
    """Return the confidence of the intervals at the look after so many rounds."""
    earlier = next(k for k, look in enumerate(looks()) if look >= rounds)
    return 1 - _LOOKS / ((earlier + 1) * (earlier + 2))


def confidence(rounds: int, stopped: str) -> float:
    """Return the confidence that makes the intervals of a finished run hold at 95%.

    Args:
        rounds: of one process.
        stopped: the record's reason; without one, or where a cap left room for one look only, nothing was chosen by
            looking and the full 5% is there.
    """
    if stopped in (RESOLVED_REASON, PRECISE_REASON):
        return look_confidence(rounds)
    return 1 - CAP_ERROR if stopped and rounds > FIRST_LOOK else CONFIDENCE
