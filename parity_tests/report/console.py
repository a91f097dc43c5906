"""Print to a terminal on which every string is text: parity rows, and the end of a command that cannot write there."""

import io
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity_tests.judge.records import ParityRow, Summary
from parity_tests.judge.tolerance import FALSE_ALARM_RATE, PRECISION_OF_DTYPE
from parity_tests.report.files import OutputError
from parity_tests.report.text import printable

PAIR_PACKAGES = ("einops", "scipy")  # of the extra `pair`


class PlainConsole(Console):
    """A console on which every string is text: no markup, no codes of emoji, nothing that a terminal would obey.

    What has a style of its own is passed as `rich.text.Text`, or with `style=`; what has several lines, in several
    calls.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """See `rich.console.Console`.

        Raises:
            OutputError: if nothing can be written there; one sentence.
        """
        try:
            super().print(*objects, **options)
        except OSError as error:
            name = "standard error" if self.stderr else "standard output"
            raise OutputError(f"{name}: cannot be written ({error.strerror}); make room or write to a file.") from error

    def render_str(self, text: str, **options: Any) -> Text:
        """See `rich.console.Console`: every string that is printed, alone or in a table, comes through here."""
        options |= {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(printable(text), **options)


def run_application(application: Callable[..., Any], name: str) -> None:
    """Run a command line; one that cannot write to its terminal or pipe ends with a sentence and no traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where a terminal or a pipe cannot show a character, its escape is better than an exception.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        application(prog_name=name)
    except OutputError as error:
        _silence()
        print(f"{name.split()[-1]}: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in PAIR_PACKAGES:
            raise
        extra = f"install the extra: {sys.executable} -m pip install 'partitioned-linear[pair]'"
        print(
            f"{name.split()[-1]}: expected {' and '.join(PAIR_PACKAGES)}, got no {error.name}; {extra}.",
            file=sys.stderr,
        )
        sys.exit(2)
    except SystemExit:
        try:
            sys.stdout.flush()
        except OSError:
            # Said already, or there is no reader left.
            _silence()
        raise


def _silence() -> None:
    """Let Python end without another try to write, which would say so in lines of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


# --- parity rows ---

_RATE = f"{FALSE_ALARM_RATE:.0e}"
# Subjects that are named beside the reason why they were skipped.
_NAMED = 3
_MISMATCH = Text("MISMATCH", "red")


def _fraction(rows: Sequence[ParityRow], field: str) -> str:
    values = [getattr(row, field) for row in rows if getattr(row, field) is not None]
    return f"{max(values):.3f}" if values else "-"


def _exact(rows: Sequence[ParityRow]) -> str:
    """Return how many of the checks that need no tolerance hold."""
    checks = [row.status == "ok" for row in rows if row.kind == "exact" and row.status != "skipped"]
    return f"{sum(checks)}/{len(checks)}" if checks else "-"


def _diagnosis(rows: Sequence[ParityRow]) -> str:
    """Return the fingerprint's diagnosis, and every precision class observed in place of the dtype's own."""
    said = [next((row.diagnosis for row in rows if row.diagnosis), "")]
    other = {row.observed: None for row in rows if row.observed not in ("", PRECISION_OF_DTYPE.get(row.dtype))}
    return "; ".join(filter(None, [*said, *(f"observed precision: {name}" for name in other)]))


def print_report(console: PlainConsole, rows: Sequence[ParityRow], summary: Summary) -> None:
    """Print the table, each failure with the command that reproduces it, and the skipped cells with their reasons."""
    groups: dict[tuple[str, str, str, str], list[ParityRow]] = defaultdict(list)
    for row in rows:
        # 72 pairs a case would bury the subjects: pairs are one line a dtype and mode.
        name = {"pair": "every torch-jax pair", "mode": "every implementation"}.get(row.kind, row.implementation)
        groups[row.framework, name, row.mode, row.dtype].append(row)
    title = f"parity: largest error over its bound, at most 1 (T1 certain; T2, T3 at a false-alarm rate of {_RATE})"
    table = Table(title=title, title_justify="left")
    for column in ("framework", "implementation", "mode", "dtype", "status"):
        table.add_column(column)
    for column in ("compared", "skipped", "T1", "T2", "T3", "exact"):
        table.add_column(column, justify="right")
    table.add_column("diagnosis")
    for (framework, name, mode, dtype), members in groups.items():
        compared = [row for row in members if row.status != "skipped"]
        failed = sum(row.status == "mismatch" for row in members)
        status = _MISMATCH if failed else Text("ok", "green") if compared else Text("skipped", "yellow")
        table.add_row(
            framework,
            name,
            mode,
            dtype,
            status,
            str(len(compared)),
            str(len(members) - len(compared)),
            _fraction(compared, "bound_fraction"),
            _fraction(compared, "bound_fraction_t2"),
            _fraction(compared, "bound_fraction_t3"),
            _exact(compared),
            _diagnosis(compared),
        )
    console.print(table)
    for row in rows:
        if row.status == "mismatch":
            place = " ".join(
                part for part in (row.framework, row.implementation, row.mode, row.dtype, row.case) if part
            )
            console.print(_MISMATCH, f"{place}: {row.reason}")
            if row.command:
                # Not wrapped: a command that is cut into lines cannot be pasted.
                console.print(f"  reproduce: {row.command}", soft_wrap=True)
    skipped: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.status == "skipped":
            skipped[row.reason][f"{row.framework} {row.implementation} {row.dtype}"] += 1
    for reason, who in skipped.items():
        # One line a reason: a line a subject would bury the result.
        more = f" and {len(who) - _NAMED} more" if len(who) > _NAMED else ""
        names = ", ".join(list(who)[:_NAMED]) + more
        console.print(f"skipped {who.total()} x {names}: {reason}", style="dim")
    verdict = "all compared cells hold" if summary.ok else "FAILED"
    if summary.compared == 0:
        verdict = "FAILED: nothing was compared"
    console.print(
        f"{summary.compared} compared, {summary.passed} passed, {summary.failed} failed, {summary.skipped} skipped:",
        Text(verdict, "green" if summary.ok else "red"),
    )
