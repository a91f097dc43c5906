"""Two runs, all cells together: a change of a few percent that no single cell can show.

A competitor's change is the mean, over the cells that both runs measured in several processes, of its log ratio of
speeds. What chance contributes to it follows from the scatter of the sets of processes: a set, one process of each
framework for all cells, counts as one observation, whatever the cells of a set have in common (a sum over clusters, as
in Liang and Zeger, Longitudinal data analysis using generalized linear models, 1986). Nothing is assumed about cells
being independent, and a cell that has fewer processes than others enters with those that it has.

As in a single cell, the median change of the others counts as noise. Less than 2% is never named: a run takes an hour,
and what the host does for longer than that scatters between runs only.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.study.differences import Difference
from bench.study.scatter import pooled
from bench.study.statistics import EQUIVALENCE, Interval, verdict


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
    result = []
    for label, group in groups.items():
        first, second = (_sets([one.apart[k] for one in group]) for k in (0, 1))
        estimate = sum(one.estimate for one in group) / len(group)
        shift = sum(one.shift for one in group) / len(group)
        noise = pooled(first, second).reach(1 - alpha / len(groups)) + abs(shift)
        ends = (max(estimate - noise, -700.0), min(estimate + noise, 700.0))
        interval = Interval(math.exp(estimate), math.exp(ends[0]), math.exp(ends[1]), min(len(first), len(second)))
        result.append(Overall(label, len(group), interval, verdict(interval, EQUIVALENCE), shift, group[0].ranked))
    return tuple(result)
