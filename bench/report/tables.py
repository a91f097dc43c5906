"""One model of a table, its writers for terminals and Markdown, and the tables of rankings and of the frameworks."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from rich.table import Table as RichTable
from rich.text import Text

from bench.environments import device_name, releases
from bench.plan.competitors import CALLS
from bench.report.text import (
    baseline_line,
    byte_count,
    calls,
    factor,
    outcome,
    parity,
    place,
    rate,
    ratio,
    reasons,
    remarks,
    seconds,
    share,
    titles,
    winner_line,
)
from bench.study.cells import DISTURBED, identity
from bench.study.ranking import Ranking, Row, efficiencies, training_memory
from bench.study.results import Results
from bench.study.statistics import FASTER, SAME, SLOWER
from bench.study.verdicts import FrameworkRatio
from parity_tests.judge.dtypes import short_name
from parity_tests.report.console import PlainConsole
from parity_tests.report.text import markdown_text, printable

HEADING = "PyTorch against JAX"
LEGEND = (
    "The fastest competitor of each framework in a cell, whatever it is, and by how much the faster of the two beats "
    "the other; in brackets the mode of JAX's and that of PyTorch's; `same`: within 2%; `open`: not resolved, with "
    "JAX's speed over PyTorch's; `disturbed`: others used the machine; `only`: the other framework has no speed to set "
    "against it; `-`: no speed. Recorded graphs are compared with recorded graphs, in columns of their own."
)


MEMORY_LEGEND = (
    "Peak memory of a call with gradients over that of the loop, as users write it in the same framework, in the same "
    "cells and measured alike; below 1x is less than the loop takes."
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


_MOST_TABLES = 150
_MOST_PLACES = 2000


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str  # above it on a terminal; a page has a heading of its own
    columns: Sequence[str]  # headings
    rows: Sequence[Sequence[str]]  # as many texts each
    numbers: Iterable[str] = ()  # columns that are aligned to the right on a terminal
    wrapped: Iterable[str] = ()  # columns that may be broken there, into several lines of a row
    # Column to width there; the rows are then set apart by lines.
    widths: Mapping[str, int] = field(default_factory=dict)
    styles: Sequence[str | None] = ()  # of each row there, or empty
    caption: Sequence[str] = ()  # lines below it there

    def only(self, columns: Mapping[str, str]) -> "Table":
        """Return the table with some of its columns, each under another heading."""
        places = [self.columns.index(name) for name in columns]
        return Table(self.title, tuple(columns.values()), [[row[k] for k in places] for row in self.rows])


def markdown(table: Table) -> list[str]:
    """Write a table as lines of Markdown."""
    lines = ["| " + " | ".join(map(markdown_text, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    return lines + ["| " + " | ".join(map(markdown_text, row)) + " |" for row in table.rows]


def terminal(table: Table) -> RichTable:
    """Write a table for a terminal."""
    caption = Text("\n".join(map(printable, table.caption)), style="table.caption") if table.caption else None
    shown = RichTable(title=table.title, caption=caption, title_justify="left", show_lines=bool(table.widths))
    for column in table.columns:
        shown.add_column(
            column,
            justify="right" if column in table.numbers else "left",
            no_wrap=column not in table.wrapped and not table.widths,
            width=table.widths.get(column),
        )
    for k, row in enumerate(table.rows):
        shown.add_row(*row, style=table.styles[k] if table.styles else None)
    return shown


def ranking_table(ranking: Ranking, title: str = "", rows: Sequence[Row] | None = None) -> Table:
    """Return the ranking of one cell, or some rows of it."""
    chosen = ranking.rows if rows is None else rows
    columns = ("#", "competitor", "time", "ratio [95%]", "verdict", "precision asked / observed")
    texts = [
        (
            place(row),
            row.record.label,
            seconds(row.latency_s),
            ratio(row.interval),
            row.verdict or outcome(row.record),
            f"{short_name(row.record.precision)} / {short_name(row.record.observed_precision or '-')}",
            parity(row.record),
            seconds(row.record.compile_s),
            byte_count(row.record.peak_memory_bytes),
        )
        for row in chosen
    ]
    return Table(
        title,
        (*columns, "parity (error/bound)", "compile", "memory"),
        texts,
        numbers={"#", "time", "ratio [95%]", "compile", "memory"},
        styles=["bold" if row.leads else "dim" if row.rank is None else None for row in chosen],
        caption=(winner_line(ranking), baseline_line(ranking)),
    )


def efficiency_table(ranking: Ranking, title: str = "") -> Table:
    """Return how well the competitors of one cell use the machine."""
    columns = ("useful FLOP/s", "of measured ceiling", "of data sheet", "waste", "compiling pays after")
    columns += ("enqueue", "one call, waited for", "kernels a call")
    figures = {label: found for label, found in efficiencies(ranking).items() if found.flops_per_s is not None}
    # Records of earlier runs do not tell it.
    copied = any(found.copied_bytes is not None for found in figures.values())
    columns += ("copied",) if copied else ()
    texts = [
        (
            label,
            rate(found.flops_per_s),
            share(found.ceiling_fraction),
            share(found.peak_fraction),
            f"{round(found.waste_factor, 2):g}x",
            calls(found.payback_calls),
            seconds(found.enqueue_s),
            seconds(found.waited_s),
            "-" if found.kernels_per_call is None else str(found.kernels_per_call),
            *([byte_count(found.copied_bytes)] if copied else []),
        )
        for label, found in figures.items()
    ]
    return Table(f"{title}: efficiency", ("competitor", *columns), texts, numbers=columns)


def training_memory_table(rankings: Sequence[Ranking]) -> Table:
    """Return the memory of calls with gradients beside the loop's, by competitor; without a row where there is none."""
    texts = [
        (
            one.label,
            one.direction,
            one.device,
            str(len(one.over_loop)),
            byte_count(int(median(one.memory_bytes))),
            *(f"{figure(one.over_loop):.2f}x" for figure in (median, min, max)),
        )
        for one in sorted(training_memory(rankings), key=lambda one: (one.device, one.direction, median(one.over_loop)))
    ]
    columns = ("competitor", "direction", "device", "cells", "memory, median", "of the loop's, median", "least", "most")
    return Table("Memory of training beside the loop's", columns, texts, numbers=columns[3:], caption=(MEMORY_LEGEND,))


def framework_table(matrix: Matrix) -> Table:
    """Return PyTorch against JAX on one device."""
    columns = matrix.columns
    found = [[matrix.places.get((row, column)) for column in columns] for row in matrix.rows]
    texts = [
        (row, *(verdict_text(None if one is None else one.ratio) for one in places))
        for row, places in zip(matrix.rows, found, strict=True)
    ]
    title = f"{HEADING}: {matrix.title}"
    return Table(title, ("workload", *columns), texts, numbers=columns, wrapped=columns, caption=(LEGEND,))


def show_rankings(console: PlainConsole, found: Sequence[Ranking], *, efficiency: bool = False) -> None:
    """Print all rankings, each with reasons and remarks; one line each if there are very many."""
    if len(found) > _MOST_TABLES:
        # Laying out a table takes longer than ranking a cell, and thousands are too long to read.
        for ranking, title in zip(found, titles(found), strict=True):
            console.out(f"{title}: {winner_line(ranking)}")
            for line in remarks(ranking):
                console.out(f"  {line}")
        console.out(f"{len(found)} cells, one line each; --markdown, --json and --csv hold every competitor.")
        return
    for ranking, title in zip(found, titles(found), strict=True):
        console.print(terminal(ranking_table(ranking, title)))
        for line in (*reasons(ranking), *remarks(ranking)):
            console.print(f"  {line}", style="dim", soft_wrap=True)
        console.print()
        if efficiency and (table := efficiency_table(ranking, title)).rows:
            console.print(terminal(table))
            console.print()


def show_frameworks(console: PlainConsole, results: Results) -> None:
    """Print PyTorch against JAX, a table for each device, and the memory of training, each where there is any."""
    for matrix in matrices(results):
        if len(matrix.places) > _MOST_PLACES:
            console.out(f"{HEADING}: {len(matrix.places)} cells; --frameworks-csv and --json hold them.")
            continue
        console.print(terminal(framework_table(matrix)))
        console.print()
    if (memory := training_memory_table(results.found)).rows:
        console.print(terminal(memory))
        console.print()
