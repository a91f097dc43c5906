"""Who need not be timed any longer: competitors that are certainly far from everything that is still to be decided."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from bench.study.statistics import student_t_quantile
from bench.study.trimming import middle_rounds, pseudo_values

# A competitor leaves only if it is slower than the fastest, and apart from the baseline, by more than this.
FAR = math.log(1.25)
# Far stricter than the intervals of the report: leaving early must never decide anything.
_CONFIDENCE = 0.9999
_LEAST_ROUNDS = 3


@cache
def _quantile(degrees: int) -> float:
    return student_t_quantile(0.5 + _CONFIDENCE / 2, degrees)


def _least_mean(values: np.ndarray, scatter: float, degrees: int) -> float:
    """Lower end of the mean of the pseudo-values of paired log differences."""
    own = float(values.std(ddof=1))
    return float(values.mean()) - _quantile(degrees) * max(own, scatter) / math.sqrt(len(values))


def far_behind(log_latencies: Mapping[str, Sequence[float] | np.ndarray], baseline: str) -> list[str]:
    """Lists the competitors that are certainly far slower than the fastest and far from the baseline.

    Args:
        log_latencies: competitor to the log seconds of a call in each round, all over the same rounds.
        baseline: the one that the ratios refer to; it never leaves.

    Returns:
        Names, in the order given.
    """
    values = {name: np.asarray(rounds, float) for name, rounds in log_latencies.items()}
    rounds = len(values[baseline])
    if rounds < _LEAST_ROUNDS or len(values) < 2:
        return []
    beside = {name: pseudo_values(own - values[baseline], (rounds,)) for name, own in values.items()}
    fastest = min(beside, key=lambda name: float(beside[name].mean()))
    behind = {name: pseudo_values(own - values[fastest], (rounds,)) for name, own in values.items()}
    # Few rounds say little about the scatter of one difference. The host disturbs all alike, so that together they say
    # enough; whoever scatters more than the others is judged by its own.
    scatter = math.sqrt(float(np.mean([np.var(own, ddof=1) for name, own in beside.items() if name != baseline])))
    degrees = (len(values) - 1) * (middle_rounds(rounds) - 1)
    return [
        name
        for name in values
        if name != baseline
        and _least_mean(behind[name], scatter, degrees) > FAR
        and max(_least_mean(beside[name], scatter, degrees), _least_mean(-beside[name], scatter, degrees)) > FAR
    ]
