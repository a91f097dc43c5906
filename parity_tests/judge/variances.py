"""Fit what variances that were estimated from few values have in common, to draw each of them towards it.

A variance from few values may be small by luck. It is taken to be a draw from a scaled inverse chi-square distribution,
whose two parameters follow from the mean and the variance of the log variances (Smyth, Linear models and empirical
Bayes methods for assessing differential expression in microarray experiments, 2004, section 6.2). The judge fits the
rounding noise of a tensor's elements with it, the benchmark the scatter of processes.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, special


class Prior(NamedTuple):
    """The usual variance, with the weight of so many degrees of freedom."""

    variance: float
    degrees: float


def fit_prior(logs: np.ndarray, degrees: np.ndarray | float, most: float = math.inf, caution: float = 0.0) -> Prior:
    """Fit the usual variance, and how far single ones differ from it.

    Args:
        logs: of the variances, at least two.
        degrees: of freedom of each, or of all.
        most: degrees of freedom to return at most; these too where the variances differ no more than by chance.
        caution: standard errors of the variance of the log variances that are added to it: a weight that is too large
            makes intervals too short, one that is too small only costs some of what was gained.
    """
    halves = np.asarray(degrees) / 2
    values = logs - (special.digamma(halves) - np.log(halves))
    spread = float(values.var(ddof=1)) * (1 + caution * math.sqrt(2 / (len(values) - 1)))
    # How much more the log variances scatter than samples of one variance would.
    excess, center = spread - float(special.zeta(2, halves).mean()), float(values.mean())
    if excess <= 0:
        return Prior(math.exp(center), most)
    half = inverse_trigamma(excess, most / 2)
    return Prior(math.exp(center + float(special.digamma(half)) - math.log(half)), 2 * half)


def inverse_trigamma(value: float, most: float = math.inf) -> float:
    """Return where the trigamma function, which falls from infinity to 0, has this value, or `most`."""

    def excess(log_x: float) -> float:
        # The Hurwitz zeta function, which `special.polygamma` would call after much else.
        return math.log(special.zeta(2, math.exp(log_x)) / value)

    # Trigamma lies between 1/x^2 and 1/(x - 1/2).
    low, high = -math.log(value) / 2, math.log(min(most, 1 / value + 1))
    if excess(high) >= 0:
        return most
    return math.exp(optimize.brentq(excess, low, high))  # pyright: ignore[reportArgumentType]  # no full output
