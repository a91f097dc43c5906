"""Rankings as terminal tables."""

import os
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from bench.report.frameworks import HEADING, LEGEND, Matrix, line, matrices
from bench.report.text import (
    EFFICIENCY_COLUMNS,
    RANKING_COLUMNS,
    baseline_line,
    efficiency_cells,
    ranking_cells,
    reasons,
    remarks,
    titles,
    winner_line,
)
from bench.study.ranking import Ranking
from bench.study.results import Results
from bench.study.roofline import efficiencies
from parity_tests.report.console import PlainConsole
from parity_tests.report.text import printable

_NUMERIC = {"#", "time", "ratio [95%]", "compile", "memory"}
# Every column of the ranking side by side; a pipe has no width of its own, and a cut table says nothing.
_WIDTH = 166
_MOST_TABLES = 150
_MOST_PLACES = 2000


def wide_console() -> PlainConsole:
    """A console that never cuts a ranking, on a terminal or in a pipe."""
    return PlainConsole(width=max(_WIDTH, os.get_terminal_size().columns if os.isatty(1) else 0))


def ranking_table(ranking: Ranking, title: str) -> Table:
    """The ranking of one cell."""
    caption = Text(f"{printable(winner_line(ranking))}\n{printable(baseline_line(ranking))}", style="table.caption")
    table = Table(title=title, caption=caption, title_justify="left")
    for column in RANKING_COLUMNS:
        table.add_column(column, justify="right" if column in _NUMERIC else "left", no_wrap=True)
    for row in ranking.rows:
        style = "bold" if row.leads else "dim" if row.rank is None else None
        table.add_row(*ranking_cells(row), style=style)
    return table


def efficiency_table(ranking: Ranking, title: str) -> Table:
    """How well the competitors of one cell use the machine."""
    table = Table(title=f"{title}: efficiency", title_justify="left")
    for column in EFFICIENCY_COLUMNS:
        table.add_column(column, justify="left" if column == "competitor" else "right", no_wrap=True)
    for label, found in efficiencies(ranking).items():
        if found.flops_per_s is not None:
            table.add_row(*efficiency_cells(label, found))
    return table


def show_rankings(console: PlainConsole, found: Sequence[Ranking], *, efficiency: bool = False) -> None:
    """Prints all rankings, each with reasons and remarks; one line each if there are very many.

    Args:
        console: where to.
        found: rankings.
        efficiency: whether the second table is wanted too.
    """
    if len(found) > _MOST_TABLES:
        # Laying out a table takes longer than ranking a cell, and nobody scrolls through thousands.
        for ranking, title in zip(found, titles(found), strict=True):
            console.out(f"{title}: {winner_line(ranking)}")
            for line in remarks(ranking):
                console.out(f"  {line}")
        console.out(f"{len(found)} cells, one line each; --markdown, --json and --csv hold every competitor.")
        return
    for ranking, title in zip(found, titles(found), strict=True):
        console.print(ranking_table(ranking, title))
        for line in (*reasons(ranking), *remarks(ranking)):
            console.print(f"  {line}", style="dim", soft_wrap=True)
        console.print()
        if efficiency and any(row.latency_s is not None for row in ranking.rows):
            console.print(efficiency_table(ranking, title))
            console.print()


def framework_table(matrix: Matrix) -> Table:
    """One matrix for a terminal."""
    columns = matrix.columns
    shown = Table(title=f"{HEADING}: {matrix.title}", caption=LEGEND, title_justify="left")
    for k, column in enumerate(("workload", *columns)):
        shown.add_column(column, justify="right" if k else "left", no_wrap=not k)
    for row in matrix.rows:
        shown.add_row(*line(matrix, row, columns))
    return shown


def show_frameworks(console: PlainConsole, results: Results) -> None:
    """Prints PyTorch against JAX, a table for each device; nothing where no cell has both."""
    for matrix in matrices(results):
        if len(matrix.places) > _MOST_PLACES:
            console.out(f"{HEADING}: {len(matrix.places)} cells; --frameworks-csv and --json hold them.")
            continue
        console.print(framework_table(matrix))
        console.print()
