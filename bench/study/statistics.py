"""Paired ratios with intervals, and what may be concluded from them.

For round r let ``d_r = log(baseline_r) - log(competitor_r)``, each the mean log duration of that round's two blocks
(order, then reverse order, which cancels a linear drift). The estimate is the geometric mean ratio ``exp(mean d)``:
above 1 the competitor is faster than the baseline. Its interval is a percentile bootstrap over processes, then rounds,
widened about the estimate by ``sqrt(m / (m - 1)) t_{m-1} / z`` with m the number of outermost units, since a bootstrap
of few units is too narrow (Hesterberg, What teachers should know about the bootstrap, 2015).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
EQUIVALENCE = math.log(1.02)
RESAMPLES = 4000
FASTER, SLOWER, SAME, UNRESOLVED = "FASTER", "SLOWER", "SAME", "UNRESOLVED"


@dataclass(frozen=True)
class Interval:
    """A ratio to the baseline with its 95% interval; above 1 is faster than the baseline.

    Attributes:
        ratio: baseline time over competitor time, geometric mean over rounds.
        low: lower end.
        high: upper end; infinite where a single round says nothing about spread.
        rounds: number of rounds behind it.
    """

    ratio: float
    low: float
    high: float
    rounds: int


def student_t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, by bisection of its integrated density.

    With ``t = sqrt(v) tan(a)`` the distribution function is ``1/2 + C int_0^a cos(s)^(v-1) ds``, smooth enough for
    64-point Gauss-Legendre quadrature.

    Args:
        probability: in [0.5, 1).
        degrees: degrees of freedom, at least 1.

    Raises:
        ValueError: outside these ranges.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"expected 0.5 <= probability < 1 and degrees >= 1, got {probability} and {degrees}")
    nodes, weights = np.polynomial.legendre.leggauss(64)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(math.pi)

    def upper_mass(angle: float) -> float:
        points = 0.5 * angle * (nodes + 1)
        return 0.5 * angle * math.exp(log_scale) * float(weights @ np.cos(points) ** (degrees - 1))

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if upper_mass(middle) < probability - 0.5 else (low, middle)
    return math.sqrt(degrees) * math.tan(0.5 * (low + high))


def round_log_latency(block_latency_s: Sequence[float] | np.ndarray, calls_per_block: int) -> np.ndarray:
    """Mean log seconds of a call in each round, from raw blocks in order (two a round).

    Raises:
        ValueError: if the blocks are not two a round.
    """
    if len(block_latency_s) == 0 or len(block_latency_s) % 2:
        raise ValueError(f"expected two blocks a round, got {len(block_latency_s)} blocks")
    return np.log(np.asarray(block_latency_s, float) / calls_per_block).reshape(-1, 2).mean(1)


@cache
def _widening(units: int, confidence: float) -> float:
    tail = 0.5 + confidence / 2
    return math.sqrt(units / (units - 1)) * student_t_quantile(tail, units - 1) / NormalDist().inv_cdf(tail)


def ratio_interval(log_ratios: Sequence[np.ndarray], *, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """Estimates the ratio from per-round log ratios.

    Args:
        log_ratios: one array of ``d_r`` for each process replicate.
        confidence: of the interval.
        seed: of the resampling, so that a report is reproducible.

    Returns:
        The geometric mean ratio and its interval. Every process counts alike.

    Raises:
        ValueError: if there is no round at all.
    """
    processes = [np.asarray(rounds, float) for rounds in log_ratios if len(rounds)]
    if not processes:
        raise ValueError("expected at least one round, got none")
    estimate = float(np.mean([rounds.mean() for rounds in processes]))
    count = sum(len(rounds) for rounds in processes)
    units = len(processes) if len(processes) > 1 else len(processes[0])
    if units == 1:
        return Interval(math.exp(estimate), 0.0, math.inf, count)
    rng = np.random.default_rng(seed)
    # Each of the drawn processes gets rounds of its own, so that a process drawn twice does not count its noise twice.
    chosen = rng.integers(0, len(processes), (len(processes), RESAMPLES))
    drawn = np.empty(chosen.shape)
    for k, rounds in enumerate(processes):
        places = chosen == k
        drawn[places] = rounds[rng.integers(0, len(rounds), (int(places.sum()), len(rounds)))].mean(1)
    resampled = drawn.mean(0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    widening = _widening(units, confidence)
    return Interval(
        ratio=math.exp(estimate),
        low=math.exp(estimate + widening * (float(low) - estimate)),
        high=math.exp(estimate + widening * (float(high) - estimate)),
        rounds=count,
    )


def resolution(control: Interval) -> float:
    """The smallest log ratio that this cell can tell from nothing: the far end of the A/A control's interval."""
    if control.low <= 0:
        return math.inf
    return max(abs(math.log(control.low)), abs(math.log(control.high)))


def verdict(interval: Interval, floor: float | None) -> str:
    """What may be said about a competitor against the baseline.

    SAME: the whole interval lies within 2% of 1. FASTER or SLOWER: the interval leaves 1 out and the estimate lies
    beyond the resolution that the A/A control shows. Anything else, and all without a control, is UNRESOLVED.

    Args:
        interval: ratio to the baseline.
        floor: ``resolution`` of the cell's control, or None if it has none.
    """
    if interval.low <= 0 or floor is None:
        return UNRESOLVED
    low, high, middle = math.log(interval.low), math.log(interval.high), math.log(interval.ratio)
    if low >= -EQUIVALENCE and high <= EQUIVALENCE:
        return SAME
    if low > 0 and middle > floor:
        return FASTER
    if high < 0 and -middle > floor:
        return SLOWER
    return UNRESOLVED


def tukey_outliers(samples: Sequence[float]) -> int:
    """Counts the samples more than 1.5 interquartile ranges outside the quartiles; none is ever removed."""
    values = np.asarray(samples, float)
    if values.size == 0:
        return 0
    low, high = np.quantile(values, [0.25, 0.75])
    margin = 1.5 * (high - low)
    return int(((values < low - margin) | (values > high + margin)).sum())
