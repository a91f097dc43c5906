"""Show rows to a person in a terminal, and to a CI system as JUnit XML with one case a row."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from xml.etree import ElementTree

from rich.table import Table
from rich.text import Text

from parity_tests.judge.records import ParityRow, Summary, summarize
from parity_tests.judge.tolerance import FALSE_ALARM_RATE, PRECISION_OF_DTYPE
from parity_tests.report.console import PlainConsole
from parity_tests.report.text import printable

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
        # One line a reason: what holds for all subjects would bury the result.
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


def _case(row: ParityRow) -> ElementTree.Element:
    parts = (row.kind, row.framework, row.implementation, row.mode, row.dtype)
    place = printable(".".join(part for part in parts if part))
    name = printable(" ".join(part for part in (row.case, row.tensor) if part))
    case = ElementTree.Element("testcase", {"classname": place, "name": name, "time": "0"})
    if row.status == "mismatch":
        failure = ElementTree.SubElement(case, "failure", {"message": printable(row.reason)})
        details = [f"error over bound: {row.bound_fraction}", row.diagnosis, row.command]
        failure.text = "\n".join(printable(line) for line in details if line)
    elif row.status == "skipped":
        ElementTree.SubElement(case, "skipped", {"message": printable(row.reason)})
    return case


def junit_document(rows: Sequence[ParityRow], stopped: str = "") -> str:
    """Return a JUnit document with one case a row: failures with their reason and the command that reproduces them.

    `stopped` says why the run did not come to its end; it becomes a case of its own, with an error.
    """
    summary = summarize(rows)
    counts = {
        "tests": str(len(rows) + bool(stopped)),
        "failures": str(summary.failed),
        "skipped": str(summary.skipped),
        "errors": str(int(bool(stopped))),
    }
    root = ElementTree.Element("testsuites", {"name": "parity", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": "parity", **counts})
    suite.extend(_case(row) for row in rows)
    if stopped:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "run", "name": "comes to its end", "time": "0"})
        ElementTree.SubElement(case, "error", {"message": printable(stopped)})
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
