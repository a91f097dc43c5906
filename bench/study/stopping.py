"""Decide when enough rounds were run, and which competitors need no more of them.

Looking again and again and stopping at the first good moment finds differences where there are none. So the rounds at
which a run may look are fixed (10, 14, 20, 28, 40, ...), and the k-th look is allowed an error of `0.01 / (k (k + 1))`.
These sum to 0.01 over any number of looks; the other 0.04 are left for a run that a cap ends. By the union bound the
intervals cover at the stated rate, whatever the dependence between looks. The report of a run uses the level of its
last look or of the cap (`confidence`). Over several processes it does not: see `ranking`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import numpy as np

from bench.study.pairing import Block
from bench.study.statistics import (
    CONFIDENCE,
    UNRESOLVED,
    Interval,
    middle_rounds,
    pseudo_values,
    ratio_intervals,
    student_t_quantile,
)
from bench.study.verdicts import CONTROL, measure

# A competitor leaves only if it is slower than the fastest, and apart from the baseline, by more than this.
FAR = math.log(1.25)
# Far stricter than the intervals of the report: leaving early must never decide anything.
_CONFIDENCE = 0.9999
_LEAST_ROUNDS = 4


@cache
def _quantile(degrees: int) -> float:
    return student_t_quantile(0.5 + _CONFIDENCE / 2, degrees)


def _certainly_beyond(differences: np.ndarray, margin: float) -> bool:
    """Return True if the mean of paired log differences is certainly above the margin."""
    rounds = len(differences)
    if rounds < _LEAST_ROUNDS:
        return False
    values = pseudo_values(differences, (rounds,))
    error = float(values.std(ddof=1)) / math.sqrt(rounds)
    return float(values.mean()) - _quantile(middle_rounds(rounds) - 1) * error > margin


def far_behind(log_latencies: Mapping[str, Sequence[float] | np.ndarray], baseline: str) -> list[str]:
    """List the competitors that are certainly far slower than the fastest and far from the baseline.

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


LEAST_ROUNDS = 10
# Of the length that the cell's blocks are sized for: half a second on a GPU, where a block lasts 20 ms.
LEAST_MEASURED_BLOCKS = 25
PRECISE = math.log(1.01)
# Half-width of the A/A control's interval that a run aims at, however clear the other verdicts are.
RESOLUTION = math.log(1.03)
# The round that follows the decision may widen the interval again.
_MARGIN = 0.93
# Chance of error of all looks together, and of the report of a run that none of them stopped.
_LOOKS, _CAP = 0.01, 1 - CONFIDENCE - 0.01
RESOLVED_REASON, PRECISE_REASON = "resolved", "precise"


def looks() -> Iterator[int]:
    """Yield the numbers of rounds at which a run may stop: each is the double of the one before the last."""
    one, two = LEAST_ROUNDS, 14
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
    return 1 - _CAP if stopped and rounds > LEAST_ROUNDS else CONFIDENCE


def _half_width(interval: Interval) -> float:
    return 0.5 * (math.log(interval.high) - math.log(interval.low)) if interval.low > 0 else math.inf


def control_known(control: Sequence[float] | np.ndarray) -> bool:
    """Return True if the A/A control's half-width is below 3%, so that time may end the run.

    Decided by the width alone: it says nothing about who is ahead, and needs no correction.

    Args:
        control: per-round log ratios of the baseline and its second run.
    """
    rounds = len(control)
    if rounds < LEAST_ROUNDS:
        return False
    (aa,) = ratio_intervals(np.asarray(control, float)[None], (rounds,), confidence=1 - _CAP)
    return _half_width(aa) < _MARGIN * RESOLUTION


def stop_reason(
    log_ratios: Mapping[str, Sequence[float] | np.ndarray],
    control: Sequence[float] | np.ndarray,
    *,
    measured_blocks: float,
) -> str | None:
    """Return why a cell of one process may stop now, or None.

    Args:
        log_ratios: per competitor still going, `log(baseline) - log(competitor)` of each round.
        control: the same for the A/A control.
        measured_blocks: for how long the competitor with the least time has been timed, in lengths of a block.

    Returns:
        `resolved` if every competitor's verdict is settled and the control's half-width is below 3%, `precise` if
        every interval's half-width is below 1%,
        or None to go on; always None before 10 rounds and the time of 25 blocks, and between looks.
    """
    rounds = min([len(control), *(len(values) for values in log_ratios.values())])
    if rounds < LEAST_ROUNDS or measured_blocks < LEAST_MEASURED_BLOCKS or not is_look(rounds):
        return None
    matrix = np.array([np.asarray(values, float)[:rounds] for values in (control, *log_ratios.values())])
    block = Block((CONTROL, *log_ratios), matrix, (rounds,), (0,))
    # What the report will not name is not settled. It is settled for rounds, though, where only processes differ too
    # much: no further round tells of them.
    measured = measure([block], look_confidence(rounds))
    widths = [_half_width(interval) for interval in (measured.control, *measured.intervals.values()) if interval]
    if widths[0] < RESOLUTION and UNRESOLVED not in measured.verdicts(log_ratios.keys(), 0.0).values():
        return RESOLVED_REASON
    if max(widths) < PRECISE:
        return PRECISE_REASON
    return None
