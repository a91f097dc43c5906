"""Decide when enough rounds were run, and which competitors need no more of them.

A run is not over before its A/A control is known to 3%: a cell in which all others are far behind would otherwise stop
without having found out what it can resolve, and time goes where the noise is.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bench.study.cells import Block
from bench.study.statistics import (
    CAP_ERROR,
    FIRST_LOOK,
    PRECISE_REASON,
    RESOLUTION,
    RESOLVED_REASON,
    UNRESOLVED,
    Interval,
    is_look,
    look_confidence,
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


def _certainly_beyond(differences: np.ndarray, margin: float) -> bool:
    """Return True if the mean of paired log differences is certainly above the margin."""
    rounds = len(differences)
    if rounds < _LEAST_ROUNDS:
        return False
    values = pseudo_values(differences, (rounds,))
    error = float(values.std(ddof=1)) / math.sqrt(rounds)
    quantile = student_t_quantile(0.5 + _CONFIDENCE / 2, middle_rounds(rounds) - 1)
    return float(values.mean()) - quantile * error > margin


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


# Of the length that the cell's blocks are sized for: half a second on a GPU, where a block lasts 20 ms.
LEAST_MEASURED_BLOCKS = 25
PRECISE = math.log(1.01)
# The round that follows the decision may widen the interval again.
_MARGIN = 0.93


def _half_width(interval: Interval) -> float:
    return 0.5 * (math.log(interval.high) - math.log(interval.low)) if interval.low > 0 else math.inf


def control_known(control: Sequence[float] | np.ndarray) -> bool:
    """Return True if the A/A control's half-width is below 3%, so that time may end the run.

    The width alone decides: it does not depend on which competitor is ahead, and needs no correction.

    Args:
        control: per-round log ratios of the baseline and its second run.
    """
    rounds = len(control)
    if rounds < FIRST_LOOK:
        return False
    (aa,) = ratio_intervals(np.asarray(control, float)[None], (rounds,), confidence=1 - CAP_ERROR)
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
    if rounds < FIRST_LOOK or measured_blocks < LEAST_MEASURED_BLOCKS or not is_look(rounds):
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
