"""Predict the time of a call at sizes that were not measured, and try the predictions on shapes that were left out.

For each competitor, which is a formulation in a mode, the seconds of a call are::

    a + b * launches + c * bytes of x and y + d * bytes of the parameters + e * FLOPs + f * bytes of a dense matrix

with coefficients that are not negative, fitted to the relative errors (`scipy.optimize.nnls`). What the model is worth
is found out and not believed: every shape in turn is left out, the model is fitted to the others, and its choice is
looked up among everything that was timed at that shape. The regret is how much longer the chosen competitor takes than
the fastest there.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import integrate, optimize, special

from bench.plan.cells import Cell
from bench.plan.competitors import Competitor
from bench.plan.costs import DENSE_FORMS, ITEM_BYTES, executed_flops, products
from bench.plan.workloads import LAYOUTS, Workload
from bench.records import Record
from bench.study.statistics import EQUIVALENCE, student_t_quantile

# A model whose choice loses more than this on shapes that were left out gives no estimate.
MOST_MEDIAN, MOST_HIGH = 0.02, 0.10
HIGH = 0.95
# With fewer shapes left out, their 95th percentile says nothing; with as many terms as shapes, a fit says nothing.
LEAST_SHAPES = 5
_TERMS = 6
# One product for each partition, one after the other.
_ONE_BY_ONE = frozenset({"loop", "in_turn"})
# In doublings, over all four sizes together; beyond it nothing measured speaks for a shape.
FAR = 3.0

Sizes = tuple[int, int, int, int]


def doublings(sizes: Sequence[int], others: Sequence[int]) -> float:
    """Return the distance of two shapes, `sqrt(sum log2(a / b)^2)` over all four sizes."""
    return math.sqrt(sum(math.log2(a / b) ** 2 for a, b in zip(sizes, others, strict=True)))


@dataclass(frozen=True)
class Sample:
    """One measured cell: the seconds of a call of each competitor that gave a right answer."""

    sizes: Sizes  # batch, partitions, inputs and outputs of one partition
    seconds: Mapping[str, float]  # label to seconds
    competitors: Mapping[str, Competitor]  # label to competitor
    cell: Cell  # its conditions


def cell_of(record: Record, sizes: Sizes | None = None) -> Cell:
    """Return the cell of a record, or the one with other sizes under the same conditions."""
    measured = (record.batch, record.num_partitions, record.in_features, record.out_features)
    # A layout of a later version costs what the usual one costs, for all that is known here.
    layout = record.layout if record.layout in LAYOUTS else LAYOUTS[0]
    workload = Workload(record.workload, *(sizes or measured), source="", layout=layout)
    conditions = (record.direction, record.precision, record.division, record.device, record.cache)
    return Cell(workload, *conditions, record.optimizer)


def amounts(competitor: Competitor, cell: Cell) -> list[float]:
    """Return what a call costs: the terms of the model, in their order."""
    w = cell.workload
    item, n = ITEM_BYTES[cell.dtype], w.num_partitions
    rows = w.batch * (w.inputs + w.outputs)
    dense = w.inputs * w.outputs if competitor.implementation in DENSE_FORMS else 0
    # As floating-point numbers: products of sizes leave the range of integers.
    terms = [
        1,
        products(cell) * (n if competitor.implementation in _ONE_BY_ONE else 1),
        rows * item,
        (w.weights + w.outputs) * item,
        executed_flops(competitor, cell),
        dense * item,
    ]
    return [float(term) for term in terms]


def _fit(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return the coefficients with the least squared relative errors."""
    scale = terms.max(0)
    scale[scale == 0] = 1.0
    return optimize.nnls(terms / scale / seconds[:, None], np.ones(len(seconds)))[0] / scale


class CostModel:
    """The time of each competitor as a function of sizes, under one set of conditions on one machine.

    Args:
        samples: that it is fitted to; a competitor with fewer of them than the model has terms is left out.
    """

    def __init__(self, samples: Iterable[Sample]):
        rows: dict[str, list[tuple[list[float], float]]] = {}
        for sample in samples:
            for label, seconds in sample.seconds.items():
                rows.setdefault(label, []).append((amounts(sample.competitors[label], sample.cell), seconds))
        self._coefficients = {
            label: _fit(np.array([terms for terms, _ in known]), np.array([seconds for _, seconds in known]))
            for label, known in rows.items()
            if len(known) >= _TERMS
        }

    def seconds(self, competitors: Mapping[str, Competitor], cell: Cell) -> dict[str, float]:
        """Return label to the predicted seconds of a call, the fastest first, of those that the model knows."""
        found = {
            label: float(self._coefficients[label] @ amounts(competitor, cell))
            for label, competitor in competitors.items()
            if label in self._coefficients
        }
        return dict(sorted(((label, at) for label, at in found.items() if at > 0), key=lambda item: item[1]))


def chosen(seconds: Mapping[str, float], preferred: Callable[[str], bool]) -> str:
    """Return the fastest label; of those within 2% of it, the first that is preferred."""
    least = min(seconds.values())
    near = [label for label, at in seconds.items() if at <= least * math.exp(EQUIVALENCE)]
    return next(filter(preferred, near), min(seconds, key=lambda label: seconds[label]))


@dataclass(frozen=True)
class Trial:
    """The choices for shapes that were left out, each held against everything that was timed at that shape."""

    cells: int  # number of cells with two competitors or more
    regrets: tuple[float, ...]  # of the cells for which a choice was made
    # For each of these cells, label to the log of measured over predicted seconds; empty without predictions.
    errors: tuple[Mapping[str, float], ...] = ()

    def _at(self, quantile: float) -> float | None:
        # Never between two values: of fewer than twenty the 95th percentile is the largest.
        return float(np.quantile(self.regrets, quantile, method="higher")) if self.regrets else None

    @property
    def median(self) -> float | None:
        """Return the median regret; None where no choice was made."""
        return float(np.median(self.regrets)) if self.regrets else None

    @property
    def high(self) -> float | None:
        """Return the 95th percentile of the regrets; None where no choice was made."""
        return self._at(HIGH)

    @property
    def passed(self) -> bool:
        """Return True if so few losses were seen that an estimate may be given."""
        median, high = self.median, self.high
        if median is None or high is None or len(self.regrets) < LEAST_SHAPES:
            return False
        return median <= MOST_MEDIAN and high <= MOST_HIGH

    def error(self, label: str, other: str | None = None) -> tuple[float, int]:
        """Return the root mean square error of a predicted log time, or of the difference of two, and its number."""
        known = [
            found[label] - (0.0 if other is None else found[other])
            for found in self.errors
            if label in found and (other is None or other in found)
        ]
        return (math.sqrt(sum(one**2 for one in known) / len(known)) if known else math.inf), len(known)


def try_model(samples: Sequence[Sample], preferred: Callable[[str], bool]) -> Trial:
    """Leave out every shape in turn, with all of its cells, and let a model of the others choose.

    As for a user's shape, no choice is made where the nearest shape is far away, or where the model knows fewer than
    two of the competitors. What the model does not know, since too few cells have it, still counts as fastest.
    """
    regrets, errors = [], []
    for sizes, out, rest in _left_out(samples):
        if not any(doublings(sizes, other.sizes) <= FAR for other in rest):
            continue
        model = CostModel(rest)
        for sample in out:
            predicted = model.seconds(sample.competitors, sample.cell)
            if len(predicted) < 2:
                continue
            taken = sample.seconds[chosen(predicted, preferred)]
            regrets.append(taken / min(sample.seconds.values()) - 1)
            errors.append({label: math.log(sample.seconds[label] / at) for label, at in predicted.items()})
    return Trial(_choices(samples), tuple(regrets), tuple(errors))


def try_nearest(samples: Sequence[Sample], preferred: Callable[[str], bool]) -> Trial:
    """Leave out every shape in turn, and choose the fastest of the nearest other one."""
    regrets = []
    for sizes, out, rest in _left_out(samples):
        near = [other for other in rest if doublings(sizes, other.sizes) <= FAR]
        for sample in out:
            for other in sorted(near, key=lambda one: doublings(sizes, one.sizes)):
                both = {label: at for label, at in other.seconds.items() if label in sample.seconds}
                if len(both) > 1:
                    regrets.append(sample.seconds[chosen(both, preferred)] / min(sample.seconds.values()) - 1)
                    break
    return Trial(_choices(samples), tuple(regrets))


def _left_out(samples: Sequence[Sample]) -> Iterable[tuple[Sizes, list[Sample], list[Sample]]]:
    for sizes in dict.fromkeys(sample.sizes for sample in samples):
        # A cell with a single competitor leaves nothing to choose.
        out = [sample for sample in samples if sample.sizes == sizes and len(sample.seconds) > 1]
        yield sizes, out, [sample for sample in samples if sample.sizes != sizes]


def _choices(samples: Sequence[Sample]) -> int:
    return sum(len(sample.seconds) > 1 for sample in samples)


def expected_loss(leads: Iterable[tuple[float, float]]) -> float:
    """Return the share by which a choice is expected to be slower than the fastest.

    Args:
        leads: for each other competitor the log of its speed over that of the choice, and the standard error of that;
            taken as independent and normal.

    Returns:
        The mean of `exp(max(0, log speeds)) - 1`; infinite where an error is.
    """
    found = [(mean, max(error, 1e-12)) for mean, error in leads]
    if not found:
        return 0.0
    if any(math.isinf(error) for _, error in found):
        return math.inf
    top = max(mean + 8 * error for mean, error in found)
    if top <= 0:
        return 0.0
    x = np.linspace(0.0, min(top, 50.0), 4001)
    below = np.ones_like(x)
    for mean, error in found:
        below = below * special.ndtr((x - mean) / error)
    return float(integrate.trapezoid((1 - below) * np.exp(x), x))


def reach(error: float, count: int) -> float:
    """Return the half width of the 95% interval of a predicted log time, from so many errors seen elsewhere."""
    return student_t_quantile(0.975, count) * error if count else math.inf
