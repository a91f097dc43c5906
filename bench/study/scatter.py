"""How far the processes of two runs scatter, learnt from all competitors together.

A handful of processes says little about its own scatter: at a level that 1,000 comparisons share out, an interval of
4 degrees of freedom reaches 21 standard errors to either side, and one of 8 degrees 8. Three things help, none of which
needs more processes:

- what all others of a cell share in a process, the host's doing, is taken out of it;
- both runs tell of one scatter, since it is the machine's and the frameworks' and not that of the code which changed;
- a variance is drawn towards what is usual in its framework, by as much as the variances of all competitors agree: it
  is taken to be a draw from a scaled inverse chi-square distribution, whose two parameters follow from the mean and the
  variance of the log variances (Smyth, Linear models and empirical Bayes methods for assessing differential expression
  in microarray experiments, 2004, section 6.2).

On the records of this project's two-core CPU they shorten the median reach of five processes against five from a
ratio of 2.7x to 1.3x, and of three against three from thousands to 1.6x.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy import optimize, special

from bench.study.pairing import Spread
from bench.study.statistics import student_t_quantile

# With fewer competitors, the scatter of their variances is a guess.
LEAST_COMPETITORS = 20
# Standard errors of the variance of the log variances that are added to it.
CAUTION = 1.0
# From here on Student's t is a normal distribution for all that a comparison needs.
MOST_DEGREES = 200.0


@dataclass(frozen=True)
class Scatter:
    """Variance of the mean of one process, about the mean of its run.

    Attributes:
        variance: pooled over both runs.
        degrees: its degrees of freedom.
        inverse_processes: `1/m_A + 1/m_B`, which makes the variance of a difference of runs of it.
    """

    variance: float
    degrees: float
    inverse_processes: float

    def reach(self, confidence: float) -> float:
        """Half width of the interval of the difference of two runs."""
        error = math.sqrt(self.variance * self.inverse_processes)
        return student_t_quantile(0.5 + confidence / 2, self.degrees) * error


def pooled(a: Sequence[float], b: Sequence[float]) -> Scatter:
    """The common scatter of the processes of two runs, at least two in each."""
    degrees = len(a) + len(b) - 2
    squares = sum(float(np.var(values)) * len(values) for values in (a, b))
    return Scatter(squares / degrees, degrees, 1 / len(a) + 1 / len(b))


def apart_from_others(spreads: Mapping[str, Spread]) -> dict[str, dict[int, float]]:
    """How far each process is off its competitor's mean, less the median by which it is off for all others.

    Args:
        spreads: the competitors of one cell in one run, by label.

    Returns:
        By label and process, centred on 0; without the competitors of a single process.
    """
    off = {
        label: {k: value - spread.mean for k, value in spread.processes.items()}
        for label, spread in spreads.items()
        if spread.processes
    }
    apart = {}
    for label, own in off.items():
        rest: dict[int, float] = {}
        for k, value in own.items():
            others = [other[k] for name, other in off.items() if name != label and k in other]
            rest[k] = value - (median(others) if others else 0.0)
        center = sum(rest.values()) / len(rest)
        apart[label] = {k: value - center for k, value in rest.items()}
    return apart


def _inverse_trigamma(value: float) -> float:
    """Return where the trigamma function, which falls from infinity to 0, has this value, or `MOST_DEGREES / 2`."""

    def excess(log_x: float) -> float:
        # The Hurwitz zeta function, which `special.polygamma` would call after much else.
        return math.log(special.zeta(2, math.exp(log_x)) / value)

    low, high = -math.log(value) / 2, math.log(MOST_DEGREES / 2)
    # Above 1/x^2 everywhere, so that the root is not below `low`.
    return math.exp(float(optimize.brentq(excess, low, high))) if excess(high) < 0 else MOST_DEGREES / 2


@dataclass(frozen=True)
class Prior:
    """What is usual: a scatter of this variance, with the weight of so many degrees of freedom."""

    variance: float
    degrees: float

    def moderate(self, scatter: Scatter, most_from_others: float = math.inf) -> Scatter:
        """Draw a scatter towards what is usual.

        Args:
            scatter: of one competitor.
            most_from_others: of its degrees of freedom, so many times are added at most.
        """
        weight = min(self.degrees, most_from_others * scatter.degrees)
        degrees = weight + scatter.degrees
        variance = (weight * self.variance + scatter.degrees * scatter.variance) / degrees
        return Scatter(variance, min(degrees, MOST_DEGREES), scatter.inverse_processes)


def usual(scatters: Sequence[Scatter], least: int = LEAST_COMPETITORS) -> Prior:
    """Return what is usual among these; a prior of no weight where there are fewer than `least`, too few to say."""
    if len(scatters) < least:
        return Prior(0.0, 0.0)
    variances = np.array([scatter.variance for scatter in scatters])
    # A variance of 0 has no logarithm and is an accident of the clock's resolution.
    logs = np.log(np.maximum(variances, max(1e-5 * float(np.median(variances)), 1e-30)))
    halves = np.array([scatter.degrees / 2 for scatter in scatters])
    values = logs - (special.digamma(halves) - np.log(halves))
    spread = float(values.var(ddof=1))
    # How much more the log variances scatter than samples of one variance would, and as much more as it may well be:
    # a weight that is too large makes intervals too short, one that is too small only costs some of what was gained.
    excess = spread * (1 + CAUTION * math.sqrt(2 / (len(values) - 1))) - float(special.zeta(2, halves).mean())
    center = float(values.mean())
    if excess <= 0:
        return Prior(math.exp(center), MOST_DEGREES)
    half = _inverse_trigamma(excess)
    return Prior(math.exp(center + special.digamma(half) - math.log(half)), 2 * half)
