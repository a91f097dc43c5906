"""One model of a table, its writers for terminals and Markdown, and the tables of rankings."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table as RichTable
from rich.text import Text

from bench.report.frameworks import HEADING, LEGEND, Matrix, matrices, verdict_text
from bench.report.text import (
    baseline_line,
    byte_count,
    calls,
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
from bench.study.ranking import Ranking, Row
from bench.study.results import Results
from bench.study.roofline import efficiencies
from parity_tests.report.console import PlainConsole
from parity_tests.report.text import markdown_text, printable

# Every column of the ranking side by side; a pipe has no width of its own, and a cut table says nothing.
_WIDTH = 166
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


def wide_console() -> PlainConsole:
    """Return a console that never cuts a ranking, on a terminal or in a pipe."""
    return PlainConsole(width=max(_WIDTH, os.get_terminal_size().columns if os.isatty(1) else 0))


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
            f"{row.record.precision} / {row.record.observed_precision or '-'}",
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
    texts = [
        (
            label,
            rate(found.flops_per_s),
            share(found.ceiling_fraction),
            share(found.peak_fraction),
            f"{found.waste_factor}x",
            calls(found.payback_calls),
            seconds(found.enqueue_s),
            seconds(found.waited_s),
            "-" if found.kernels_per_call is None else str(found.kernels_per_call),
        )
        for label, found in efficiencies(ranking).items()
        if found.flops_per_s is not None
    ]
    return Table(f"{title}: efficiency", ("competitor", *columns), texts, numbers=columns)


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
        # Laying out a table takes longer than ranking a cell, and nobody scrolls through thousands.
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
    """Print PyTorch against JAX, a table for each device; nothing where no cell has both."""
    for matrix in matrices(results):
        if len(matrix.places) > _MOST_PLACES:
            console.out(f"{HEADING}: {len(matrix.places)} cells; --frameworks-csv and --json hold them.")
            continue
        console.print(terminal(framework_table(matrix)))
        console.print()
