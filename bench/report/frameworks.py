"""PyTorch against JAX over all cells of a run: workloads downwards, conditions to the right."""

from dataclasses import dataclass, field

from bench.environments import device_name
from bench.report.text import factor, ratio
from bench.study.frameworks import FrameworkRatio
from bench.study.identity import identity
from bench.study.ranking import Ranking
from bench.study.results import Results
from bench.study.statistics import FASTER, SAME, SLOWER

HEADING = "PyTorch against JAX"
LEGEND = (
    "The fastest competitor of each framework in a cell, whatever it is, and by how much the faster of the two beats "
    "the other; `same`: within 2%; `open`: not resolved, with JAX's speed over PyTorch's; `-`: not measured."
)


@dataclass
class Matrix:
    """What one device measured: each place is one cell of a run.

    Attributes:
        device: what it was measured on.
        rows: workloads with their sizes and direction.
        columns: precision and division.
        places: row and column to the ranking there.
    """

    device: str
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    places: dict[tuple[str, str], Ranking] = field(default_factory=dict)

    def put(self, row: str, column: str, ranking: Ranking) -> None:
        """Adds a cell, its row and column behind those that are there."""
        for name, names in ((row, self.rows), (column, self.columns)):
            if name not in names:
                names.append(name)
        self.places[row, column] = ranking


def matrices(results: Results) -> list[Matrix]:
    """The cells in which both frameworks were timed, apart by device.

    A cell that was measured twice on one device, in two environments, goes into a further matrix.
    """
    found: list[Matrix] = []
    for ranking in results.found:
        if ranking.frameworks is None:
            continue
        environment_id = ranking.first.environment_id
        known = results.environments.get(environment_id)
        # An unknown environment is nobody else's device.
        device = f"environment {environment_id}" if known is None else device_name(known)
        where = identity(ranking.first)
        place = (where.what, where.how)
        free = (one for one in found if one.device == device and place not in one.places)
        matrix = next(free, None)
        if matrix is None:
            matrix = Matrix(device)
            found.append(matrix)
        matrix.put(*place, ranking)
    return found


def verdict_text(found: FrameworkRatio | None) -> str:
    """Who is faster, and by how much."""
    if found is None:
        return "-"
    speed = found.interval.ratio
    if found.verdict == FASTER:
        return f"JAX {factor(speed)}x"
    if found.verdict == SLOWER:
        return f"torch {factor(1 / speed)}x"
    return "same" if found.verdict == SAME else f"open ({factor(speed)}x)"


def line(matrix: Matrix, row: str) -> list[str]:
    """The row of a matrix: its name and a verdict for each column."""
    shown = (matrix.places.get((row, column)) for column in matrix.columns)
    return [row] + [verdict_text(None if ranking is None else ranking.frameworks) for ranking in shown]


def framework_line(ranking: Ranking) -> list[str]:
    """One cell's comparison in words; none where a framework is missing."""
    found = ranking.frameworks
    if found is None:
        return []
    who = f"{found.jax} against {found.torch}"
    return [f"JAX over PyTorch, the fastest of each: {ratio(found.interval)}, {found.verdict} ({who})."]
