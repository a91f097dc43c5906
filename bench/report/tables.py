"""Rankings as terminal tables."""

import os

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.report.text import RANKING_COLUMNS, baseline_line, ranking_cells, reasons
from bench.study.ranking import Ranking

_NUMERIC = {"#", "time", "ratio [95%]", "compile", "memory"}
# Every column of the ranking side by side; a pipe has no width of its own, and a cut table says nothing.
_WIDTH = 166


def wide_console() -> Console:
    """A console that never cuts a ranking, on a terminal or in a pipe."""
    return Console(width=max(_WIDTH, os.get_terminal_size().columns if os.isatty(1) else 0))


def ranking_table(ranking: Ranking) -> Table:
    """The ranking of one cell."""
    table = Table(title=escape(ranking.title), caption=escape(baseline_line(ranking)), title_justify="left")
    for column in RANKING_COLUMNS:
        table.add_column(column, justify="right" if column in _NUMERIC else "left", no_wrap=True)
    for row in ranking.rows:
        style = "bold" if row.rank == 1 else "dim" if row.rank is None else None
        table.add_row(*(escape(cell) for cell in ranking_cells(row)), style=style)
    return table


def show_rankings(console: Console, found: list[Ranking]) -> None:
    """Prints all rankings, each with the reasons of those without a speed."""
    for ranking in found:
        console.print(ranking_table(ranking))
        for line in reasons(ranking):
            console.print(f"  {escape(line)}", style="dim", soft_wrap=True)
        console.print()
