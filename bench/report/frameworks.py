"""Lay out PyTorch against JAX over all cells of a run: workloads downwards, conditions to the right."""

import json
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.environments import device_name, releases
from bench.plan.competitors import CALLS
from bench.report.text import factor, ratio
from bench.study.disturbance import DISTURBED
from bench.study.pairing import identity
from bench.study.ranking import Ranking
from bench.study.results import Results
from bench.study.statistics import FASTER, SAME, SLOWER
from bench.study.verdicts import FrameworkRatio

HEADING = "PyTorch against JAX"
LEGEND = (
    "The fastest competitor of each framework in a cell, whatever it is, and by how much the faster of the two beats "
    "the other; in brackets the mode of JAX's and that of PyTorch's; `same`: within 2%; `open`: not resolved, with "
    "JAX's speed over PyTorch's; `disturbed`: others used the machine; `only`: the other framework has no speed to set "
    "against it; `-`: no speed. Recorded graphs are compared with recorded graphs, in columns of their own."
)


class Place(NamedTuple):
    """One square of a matrix."""

    ranking: Ranking
    ratio: FrameworkRatio


@dataclass
class Matrix:
    """The cells that one device measured."""

    device: str  # what it was measured on
    # Row and column to the ranking there, and the comparison of one kind of launch.
    places: dict[tuple[str, str], Place] = field(default_factory=dict)

    @property
    def rows(self) -> list[str]:
        """Return workloads with their sizes and direction, in the order in which they were measured."""
        return list(dict.fromkeys(row for row, _ in self.places))

    @property
    def columns(self) -> list[str]:
        """Return precisions and divisions, in the order in which they were measured."""
        return list(dict.fromkeys(column for _, column in self.places))

    @property
    def environments(self) -> list[str]:
        """Return the environments of the cells; a division has one of its own."""
        return list(dict.fromkeys(place.ranking.first.environment_id for place in self.places.values()))

    @property
    def title(self) -> str:
        """Return one line for a heading."""
        ids = self.environments
        return f"{self.device}, environment{'s' if len(ids) > 1 else ''} {', '.join(ids)}"


def matrices(results: Results) -> list[Matrix]:
    """Return the cells in which both frameworks were timed, apart by device and by releases of the frameworks.

    A cell that was measured twice, in two environments, goes into a further matrix, and so do workloads that share no
    condition with the others, directly or through a third: one table would be mostly empty.
    """
    found: dict[str, list[Matrix]] = {}
    for ranking in results.found:
        if not ranking.framework_ratios:
            continue
        environment_id = ranking.first.environment_id
        known = results.environments.get(environment_id)
        # An unknown environment is like no other.
        key = environment_id if known is None else json.dumps([device_name(known), releases(known)], sort_keys=True)
        alike = found.setdefault(key, [])
        where = identity(ranking.first)
        places = {
            (where.what, where.how if kind == CALLS else f"{where.how}, {kind}"): Place(ranking, ratio)
            for kind, ratio in ranking.framework_ratios.items()
        }
        matrix = next((one for one in alike if not places.keys() & one.places.keys()), None)
        if matrix is None:
            matrix = Matrix("unknown" if known is None else device_name(known))
            alike.append(matrix)
        matrix.places.update(places)
    parts = [part for alike in found.values() for matrix in alike for part in _connected(matrix)]
    # A run of one framework compares nothing.
    return [part for part in parts if any(place.ratio.interval is not None for place in part.places.values())]


def _connected(matrix: Matrix) -> list[Matrix]:
    """Return the parts of a matrix that have neither a row nor a column in common."""
    parts: list[tuple[set[str], set[str]]] = []
    for row, column in matrix.places:
        touched = [part for part in parts if row in part[0] or column in part[1]]
        rows, columns = {row}.union(*(part[0] for part in touched)), {column}.union(*(part[1] for part in touched))
        parts = [part for part in parts if part not in touched] + [(rows, columns)]
    found = [
        Matrix(matrix.device, {where: place for where, place in matrix.places.items() if where[0] in rows})
        for rows, _ in parts
    ]
    order = list(matrix.places)
    return sorted(found, key=lambda part: order.index(next(iter(part.places))))


def _mode(label: str) -> str:
    """Return the mode that a label ends with."""
    return label.rpartition("(")[2].removesuffix(")").removeprefix("compile-")


def verdict_text(found: FrameworkRatio | None) -> str:
    """Name the faster framework, its factor, and the mode of each."""
    if found is None:
        return "-"
    if found.torch is None or found.jax is None or found.interval is None:
        name, label = ("torch", found.torch) if found.jax is None else ("JAX", found.jax)
        return f"{name} only ({_mode(str(label))})"
    speed, modes = found.interval.ratio, f"{_mode(found.jax)} / {_mode(found.torch)}"
    if found.verdict == FASTER:
        return f"JAX {factor(speed)}x ({modes})"
    if found.verdict == SLOWER:
        return f"torch {factor(1 / speed)}x ({modes})"
    if found.verdict == SAME:
        return f"same ({modes})"
    return f"{'disturbed' if found.verdict == DISTURBED else 'open'}: {factor(speed)}x ({modes})"


def framework_line(ranking: Ranking) -> list[str]:
    """Return one cell's comparison in words, a line for each kind of launch that both frameworks have."""
    lines = []
    for kind, found in ranking.framework_ratios.items():
        if found.interval is None:
            continue
        who = f"{found.jax} against {found.torch}; interval of {found.confidence:.1%}, for all that tie"
        of = "the fastest of each" if kind == CALLS else "the fastest recorded graph of each"
        lines.append(f"JAX over PyTorch, {of}: {ratio(found.interval)}, {found.verdict} ({who}).")
    return lines
