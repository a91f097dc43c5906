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
_LEAST_ROUNDS = 4


@cache
def _quantile(degrees: int) -> float:
    return student_t_quantile(0.5 + _CONFIDENCE / 2, degrees)


def _certainly_beyond(differences: np.ndarray, margin: float) -> bool:
    """Whether the mean of paired log differences is above the margin."""
    rounds = len(differences)
    if rounds < _LEAST_ROUNDS:
        return False
    values = pseudo_values(differences, (rounds,))
    error = float(values.std(ddof=1)) / math.sqrt(rounds)
    return float(values.mean()) - _quantile(middle_rounds(rounds) - 1) * error > margin


def far_behind(log_latencies: Mapping[str, Sequence[float] | np.ndarray], baseline: str) -> list[str]:
    """Lists the competitors that are certainly far slower than the fastest and far from the baseline.

    Args:
        log_latencies: competitor to the log seconds of a call in each round, all over the same rounds.
        baseline: the one that the ratios refer to; it never leaves.

    Returns:
        Names, in the order given.
    """
    values = {name: np.asarray(rounds, float) for name, rounds in log_latencies.items()}
    fastest = min(values, key=lambda name: float(values[name].mean()))
    return [
        name
        for name, rounds in values.items()
        if name != baseline
        and _certainly_beyond(rounds - values[fastest], FAR)
        and (_certainly_beyond(rounds - values[baseline], FAR) or _certainly_beyond(values[baseline] - rounds, FAR))
    ]
