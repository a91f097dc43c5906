"""Who is the fastest, if anybody is: claims among many competitors, corrected for their number.

"X is the fastest" is one claim against every other competitor. X, the first in the ranking, is tested against each
other by a two-sided t test of their paired log ratios (per process where there are several, else per round, trimmed;
two-sided, since X was chosen after looking), and the p values are corrected by Holm's step-down procedure
(Holm, A simple sequentially rejective multiple test procedure, 1979). Who is not beaten so, or by no more than the
cell names (what its A/A control differs from itself by, or 2% where there is one process), or by provably less than 2%,
ties with X.
"""

import math
from collections.abc import Mapping

import numpy as np

from bench.study.pairing import Rounds, paired
from bench.study.statistics import (
    CONFIDENCE,
    EQUIVALENCE,
    process_means,
    student_t_quantile,
    student_t_two_sided,
)
from bench.study.trimming import middle_rounds, pseudo_values


def holm(p_values: np.ndarray, error: float) -> np.ndarray:
    """Which hypotheses fall when the chance of any false rejection is at most ``error``."""
    order = np.argsort(p_values, kind="stable")
    passed = p_values[order] <= error / np.arange(len(p_values), 0, -1)
    rejected = np.zeros(len(p_values), bool)
    rejected[order] = np.logical_and.accumulate(passed)
    return rejected


def leaders(
    competitors: Mapping[str, Rounds], floor: float | None, *, confidence: float = CONFIDENCE
) -> tuple[str, ...]:
    """The fastest competitor, first, and everybody who ties with it: one name is a winner.

    Args:
        competitors: label to rounds, of everybody who is ranked, the fastest first.
        floor: smallest log ratio that the cell can tell from nothing; None or infinite beats nobody.
        confidence: 1 less the chance of any false claim.
    """
    if not competitors:
        return ()
    best = next(iter(competitors))
    # Who shares no process with the best was never compared with it.
    tied = dict.fromkeys(competitors, True)
    labels: list[str] = []
    p_values: list[np.ndarray] = []
    beyond: list[np.ndarray] = []
    others = {label: rounds for label, rounds in competitors.items() if label != best}
    for block in paired(competitors[best], others):
        # Positive where the best is faster.
        advantage = -block.log_ratios
        units = pseudo_values(advantage, block.lengths)
        degrees = middle_rounds(units.shape[1]) - 1
        if len(block.lengths) > 1:
            units, degrees = process_means(units, block.lengths), len(block.lengths) - 1
        count = units.shape[1]
        labels += block.labels
        if count < 2:
            p_values.append(np.ones(len(block.labels)))
            beyond.append(np.zeros(len(block.labels), bool))
            continue
        mean, error = units.mean(1), units.std(1, ddof=1) / math.sqrt(count)
        with np.errstate(divide="ignore", invalid="ignore"):
            p_values.append(student_t_two_sided(mean / error, degrees))
        reach = student_t_quantile(0.5 + confidence / 2, degrees) * error
        beyond.append((mean > (math.inf if floor is None else floor)) & (mean + reach > EQUIVALENCE))
    if labels:
        beaten = holm(np.concatenate(p_values), 1 - confidence) & np.concatenate(beyond)
        tied |= dict(zip(labels, (~beaten).tolist(), strict=True))
    tied.pop(best)
    return (best, *(label for label in tied if tied[label]))
