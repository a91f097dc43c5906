"""Two runs, all cells together: a change of a few percent that no single cell can show.

A competitor's change is the mean, over the cells that both runs measured in several processes, of its log ratio of
speeds. What chance contributes to it follows from the scatter of the sets of processes: a set, one process of each
framework for all cells, counts as one observation, whatever the cells of a set have in common (a sum over clusters, as
in Liang and Zeger, Longitudinal data analysis using generalized linear models, 1986). Nothing is assumed about cells
being independent, and a cell that has fewer processes than others enters with those that it has.

What the host does for longer than a run takes does not scatter within a run, but between runs only. Two things tell of
it: the median change of the others, which counts as noise as in a single cell, and how far the changes of all others
scatter about it. Two whole runs of the same code on this project's two-core CPU, hours apart, showed both: JAX's
competitors 5% slower and PyTorch's 9%, each by five times what its processes scatter. So noise is what the processes
say or what the others say, whichever is more. The scale of the others is Rousseeuw and Croux's Qn (Alternatives to the
median absolute deviation, 1993): a few that really changed do not stretch it. Less than 2% is never named.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

from bench.study.differences import Difference
from bench.study.scatter import pooled
from bench.study.statistics import EQUIVALENCE, Interval, student_t_quantile, verdict

# The factors of Qn below hold from here on, and fewer say little: what the host did to each of them between the runs is
# then not known.
LEAST_OTHERS = 10
# Of Qn under normal errors, beside a standard deviation's.
EFFICIENCY = 0.82
# Makes Qn a standard deviation of normal errors: a quarter of their distances, which are sqrt(2) times as wide, are
# shorter than its inverse. Some of the literature has 2.2219, a misprint.
_QN = 1 / (math.sqrt(2) * NormalDist().inv_cdf(5 / 8))


@dataclass(frozen=True)
class Overall:
    """One competitor in all cells that both runs measured in several processes.

    Attributes:
        label: who.
        cells: how many.
        interval: geometric mean of the speed in B over the speed in A.
        verdict: FASTER, SLOWER, SAME or UNRESOLVED, of B against A.
        shift: mean of the median log ratios of the others, which is counted as noise.
        ranked: False for a yardstick, whose change is shown and never a regression.
    """

    label: str
    cells: int
    interval: Interval
    verdict: str
    shift: float
    ranked: bool


def _sets(apart: Sequence[Mapping[int, float]]) -> list[float]:
    """Mean over cells by which each set of processes is off; a set's share of a cell is one over its processes."""
    numbers = sorted({k for cell in apart for k in cell})
    return [len(numbers) * sum(cell[k] / len(cell) for cell in apart if k in cell) / len(apart) for k in numbers]


def robust_scale(values: Sequence[float]) -> float:
    """Standard deviation of at least ten values, not knowing which of them are outliers: Qn.

    A quantile of the distances of all pairs, 1/4 of the way up, by the factors that make it right for samples of
    normal values of this size.
    """
    count = len(values)
    half = count // 2 + 1
    distances = sorted(abs(x - y) for x, y in combinations(values, 2))
    return _QN * count / (count + (1.4 if count % 2 else 3.8)) * distances[half * (half - 1) // 2 - 1]


def _reach_of_others(others: Sequence[float], confidence: float) -> float:
    """How far a competitor may be from the shift of all, as these are."""
    if len(others) < LEAST_OTHERS:
        return 0.0
    return student_t_quantile(0.5 + confidence / 2, EFFICIENCY * (len(others) - 1)) * robust_scale(others)


def overall(found: Iterable[Difference], alpha: float) -> tuple[Overall, ...]:
    """The change of every competitor over all its cells.

    Args:
        found: its differences, cell by cell.
        alpha: chance that any of the intervals leaves out the truth; they share it alike.

    Returns:
        In the order of first appearance, without those of fewer than two cells of several processes.
    """
    cells: dict[str, list[Difference]] = {}
    for one in found:
        if one.scatter is not None:
            cells.setdefault(one.label, []).append(one)
    groups = {label: group for label, group in cells.items() if len(group) > 1}
    estimates = {label: sum(one.estimate for one in group) / len(group) for label, group in groups.items()}
    shifts = {label: sum(one.shift for one in group) / len(group) for label, group in groups.items()}
    level = 1 - alpha / max(len(groups), 1)
    result = []
    for label, group in groups.items():
        estimate, shift = estimates[label], shifts[label]
        first, second = (_sets([one.apart[k] for one in group]) for k in (0, 1))
        others = [estimates[name] - shifts[name] for name in groups if name != label]
        noise = max(pooled(first, second).reach(level), _reach_of_others(others, level)) + abs(shift)
        ends = (max(estimate - noise, -700.0), min(estimate + noise, 700.0))
        interval = Interval(math.exp(estimate), math.exp(ends[0]), math.exp(ends[1]), min(len(first), len(second)))
        result.append(Overall(label, len(group), interval, verdict(interval, EQUIVALENCE), shift, group[0].ranked))
    return tuple(result)
