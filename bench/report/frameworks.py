"""PyTorch against JAX over all cells of a run: workloads downwards, conditions to the right."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.environments import device_name, releases
from bench.report.text import factor, ratio
from bench.study.frameworks import FrameworkRatio
from bench.study.identity import identity
from bench.study.ranking import Ranking
from bench.study.results import Results
from bench.study.statistics import FASTER, SAME, SLOWER

HEADING = "PyTorch against JAX"
LEGEND = (
    "The fastest competitor of each framework in a cell, whatever it is, and by how much the faster of the two beats "
    "the other; `same`: within 2%; `open`: not resolved, with JAX's speed over PyTorch's; `-`: no speed of both."
)


@dataclass
class Matrix:
    """What one device measured: each place is one cell of a run.

    Attributes:
        device: what it was measured on.
        places: row and column to the ranking there.
    """

    device: str
    places: dict[tuple[str, str], Ranking] = field(default_factory=dict)

    @property
    def rows(self) -> list[str]:
        """Workloads with their sizes and direction, in the order in which they were measured."""
        return list(dict.fromkeys(row for row, _ in self.places))

    @property
    def columns(self) -> list[str]:
        """Precisions and divisions, in the order in which they were measured."""
        return list(dict.fromkeys(column for _, column in self.places))

    @property
    def environments(self) -> list[str]:
        """Where the cells were measured; a division has an environment of its own."""
        return list(dict.fromkeys(ranking.first.environment_id for ranking in self.places.values()))

    @property
    def title(self) -> str:
        """One line for a heading."""
        ids = self.environments
        return f"{self.device}, environment{'s' if len(ids) > 1 else ''} {', '.join(ids)}"


def matrices(results: Results) -> list[Matrix]:
    """The cells in which both frameworks were timed, apart by device and by releases of the frameworks.

    A cell that was measured twice, in two environments, goes into a further matrix, and so do workloads that share no
    condition with the others, directly or through a third: one table would be mostly empty.
    """
    found: dict[str, list[Matrix]] = {}
    for ranking in results.found:
        if ranking.frameworks is None:
            continue
        environment_id = ranking.first.environment_id
        known = results.environments.get(environment_id)
        # An unknown environment is like no other.
        key = environment_id if known is None else json.dumps([device_name(known), releases(known)], sort_keys=True)
        alike = found.setdefault(key, [])
        where = identity(ranking.first)
        place = (where.what, where.how)
        matrix = next((one for one in alike if place not in one.places), None)
        if matrix is None:
            matrix = Matrix("unknown" if known is None else device_name(known))
            alike.append(matrix)
        matrix.places[place] = ranking
    return [part for alike in found.values() for matrix in alike for part in _connected(matrix)]


def _connected(matrix: Matrix) -> list[Matrix]:
    """The parts of a matrix that have neither a row nor a column in common."""
    parts: list[tuple[set[str], set[str]]] = []
    for row, column in matrix.places:
        touched = [part for part in parts if row in part[0] or column in part[1]]
        rows, columns = {row}.union(*(part[0] for part in touched)), {column}.union(*(part[1] for part in touched))
        parts = [part for part in parts if part not in touched] + [(rows, columns)]
    found = [
        Matrix(matrix.device, {place: ranking for place, ranking in matrix.places.items() if place[0] in rows})
        for rows, _ in parts
    ]
    order = list(matrix.places)
    return sorted(found, key=lambda part: order.index(next(iter(part.places))))


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


def line(matrix: Matrix, row: str, columns: Sequence[str]) -> list[str]:
    """The row of a matrix: its name and a verdict for each column."""
    shown = (matrix.places.get((row, column)) for column in columns)
    return [row] + [verdict_text(None if ranking is None else ranking.frameworks) for ranking in shown]


def framework_line(ranking: Ranking) -> list[str]:
    """One cell's comparison in words; none where a framework is missing."""
    found = ranking.frameworks
    if found is None:
        return []
    who = f"{found.jax} against {found.torch}; interval of {found.confidence:.1%}, for all that tie"
    return [f"JAX over PyTorch, the fastest of each: {ratio(found.interval)}, {found.verdict} ({who})."]
