"""The fastest competitor of a cell, where the measurement names one; and how claims among many are corrected.

Many competitors are many chances to be wrong. Each is tested by a two-sided t test of its log ratio against 0, per
process where there are several, else per round (trimmed), and the p values are corrected by Holm's step-down procedure
(Holm, A simple sequentially rejective multiple test procedure, 1979). A single process names nobody within the spread
of processes, which counts in quadrature: rounds and processes scatter independently.

A few processes say little about their own scatter: with 18 competitors and five processes, Holm asks for 7 standard
errors. So a variance is drawn towards what is usual in its cell, as `scatter` does it for a comparison of two runs. How
far is limited, because the scatter of what all are compared with is in every ratio, and no pooling averages it out:
where it is half of the variance, the pooled estimate has no more than four times the degrees of freedom of a single one
(Satterthwaite, An approximate distribution of estimates of variance components, 1946).

"X is the fastest" is one claim against every other competitor. X, the first in the ranking, is tested so against each
other one; two-sided, since X was chosen after looking. A competitor ties with X unless it is beaten, by more than the
noise floor of the cell, and not by provably less than 2%.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bench.study.pairing import Rounds, Spread, paired, spreads_of
from bench.study.process_spread import ProcessSpread
from bench.study.scatter import Scatter, usual
from bench.study.statistics import (
    COARSE,
    CONFIDENCE,
    EQUIVALENCE,
    UNKNOWN,
    student_t_quantile,
    student_t_two_sided,
)

# Two variances do not say how much variances differ.
_LEAST_COMPETITORS = 3
# Of the degrees of freedom of a variance, for those that the others may add.
_MOST_FROM_OTHERS = 3


def holm(p_values: np.ndarray, error: float) -> np.ndarray:
    """Return which hypotheses fall when the chance of any false rejection is at most `error`."""
    order = np.argsort(p_values, kind="stable")
    passed = p_values[order] <= error / np.arange(len(p_values), 0, -1)
    rejected = np.zeros(len(p_values), bool)
    rejected[order] = np.logical_and.accumulate(passed)
    return rejected


def _moderated(spreads: Sequence[Spread]) -> list[Scatter]:
    """Return the variance of one unit of each, drawn towards what is usual among those with the same kind of unit."""
    own = [Scatter(spread.error**2 * spread.units, spread.degrees, 1 / spread.units) for spread in spreads]
    found = list(own)
    for several in (False, True):
        alike = [k for k, spread in enumerate(spreads) if bool(spread.processes) == several]
        prior = usual([own[k] for k in alike], _LEAST_COMPETITORS)
        for k in alike:
            found[k] = prior.moderate(own[k], _MOST_FROM_OTHERS)
    return found


def beyond_chance(spreads: Sequence[Spread], spread_of_processes: float, error: float) -> np.ndarray:
    """Return which of several log ratios differ from 0, corrected for their number.

    Args:
        spreads: the ratios.
        spread_of_processes: log ratio within which a single process names nobody; counted in quadrature.
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
    """Return whether a lead is beyond the noise floor, and not provably within 2%."""
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
        for label, spread in zip(
            block.labels, spreads_of(-block.log_ratios, block.lengths, block.processes), strict=True
        )
    }
    reach = 0.0 if seen is None else seen.reach(len(leads))
    beyond = beyond_chance(list(leads.values()), reach, 1 - confidence) if leads else np.zeros(0, bool)
    beaten = {
        label
        for (label, spread), named in zip(leads.items(), beyond, strict=True)
        if named and _far_enough(spread, floor, reach, confidence)
    }
    return (best, *(label for label in others if label not in beaten))
