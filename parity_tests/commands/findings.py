"""Run `python -m parity_tests findings`: look for known traps of public libraries in the installed versions."""

import math
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from parity_tests.commands.usage import FAILED, HOLDS, check_writable, console, ended, write_outputs
from parity_tests.findings import Finding, all_findings
from parity_tests.report.console import interruptible
from parity_tests.report.files import write_json
from parity_tests.report.text import raised


def _measured(finding: Finding) -> tuple[float | None, str]:
    """Return the figure of a check, or None with a reason."""
    if missing := finding.missing():
        return None, missing
    try:
        return finding.measure(), ""
    except Exception as error:
        # A release may have moved what the check calls: the others still say something.
        return None, raised("the check", error)


def _row(finding: Finding, measured: float | None, reason: str) -> dict[str, Any]:
    if measured is None:
        return {"name": finding.name, "library": finding.library, "state": "skipped", "reason": reason}
    version = metadata.version(finding.library)
    return {
        "name": finding.name,
        "library": finding.library,
        "version": version,
        "seen_in": list(finding.seen_in),
        "present": finding.present(measured),
        "state": finding.state(measured, version),
        # JSON has no infinity: a check that measures whether something works at all.
        "measured": measured if math.isfinite(measured) else None,
        "figure": finding.figure,
        "sentence": finding.sentence,
    }


def _cells(finding: Finding, measured: float | None, row: dict[str, Any]) -> tuple[str, ...]:
    name, seen = (finding.name, finding.library), ", ".join(finding.seen_in)
    if measured is None:
        return (*name, "", seen, "SKIPPED", "", "", row["reason"])
    return (*name, row["version"], seen, row["state"], f"{measured:.3g}", finding.figure, finding.sentence)


def findings(json_file: Path | None) -> int:
    """Run every check and print its figure.

    Args:
        json_file: for the results, or None.

    Returns:
        0 if something was checked, 1 if no framework is installed, 130 if interrupted; what was measured until then is
        written and printed. A mended trap is good news and no failure.
    """
    check_writable("--json", json_file)
    title = "traps in public libraries, measured here: above 1 the trap is there"
    table = Table(title=title, title_justify="left")
    for column in ("finding", "library", "installed", "seen in", "here", "measured", "of what", "what it is"):
        table.add_column(column)
    rows: list[dict[str, Any]] = []
    stopped = ""
    with interruptible() as interruption:
        try:
            for finding in all_findings():
                measured, reason = _measured(finding)
                interruption.check()
                rows.append(_row(finding, measured, reason))
                table.add_row(*_cells(finding, measured, rows[-1]))
            interruption.settle()
        except KeyboardInterrupt:
            stopped = f"interrupted: {len(rows)} findings were measured, the others were left"
        document = {"schema_version": 1, "stopped": stopped, "findings": rows}
        failed = write_outputs((json_file, lambda path: write_json("--json", path, document)))
    console.print(table)
    return ended(HOLDS if any(row["state"] != "skipped" for row in rows) else FAILED, stopped, failed)
