"""``python -m parity_tests findings``: which known traps of public libraries are present in the installed versions."""

import json
import math
from importlib import metadata
from pathlib import Path

from rich.table import Table

from parity_tests.commands.usage import FAILED, HOLDS, check_writable, console
from parity_tests.findings import Finding, all_findings
from parity_tests.harness.failures import raised


def _measured(finding: Finding) -> tuple[float | None, str]:
    """What a check measured, or None and why not."""
    if missing := finding.missing():
        return None, missing
    try:
        return finding.measure(), ""
    except Exception as error:
        # A release may have moved what the check calls: the others still say something.
        return None, raised("the check", error)


def findings(json_file: Path | None) -> int:
    """Runs every check and prints what it measured.

    Args:
        json_file: where the results go, or None.

    Returns:
        0 if something was checked, 1 if no framework is installed. A mended trap is good news and no failure.
    """
    check_writable("--json", json_file)
    title = "traps in public libraries, measured here: above 1 the trap is there"
    table = Table(title=title, title_justify="left")
    for column in ("finding", "library", "installed", "seen in", "here", "measured", "of what", "what it is"):
        table.add_column(column)
    rows = []
    for finding in all_findings():
        seen = ", ".join(finding.seen_in)
        measured, reason = _measured(finding)
        if measured is None:
            table.add_row(finding.name, finding.library, "", seen, "SKIPPED", "", "", reason)
            rows.append({"name": finding.name, "library": finding.library, "state": "skipped", "reason": reason})
            continue
        version = metadata.version(finding.library)
        here = finding.state(measured, version)
        table.add_row(
            finding.name, finding.library, version, seen, here, f"{measured:.3g}", finding.figure, finding.sentence
        )
        rows.append(
            {
                "name": finding.name,
                "library": finding.library,
                "version": version,
                "seen_in": list(finding.seen_in),
                "present": finding.present(measured),
                "state": here,
                # JSON has no infinity: a check that measures whether something works at all.
                "measured": measured if math.isfinite(measured) else None,
                "figure": finding.figure,
                "sentence": finding.sentence,
            }
        )
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"schema_version": 1, "findings": rows}, indent=1, allow_nan=False) + "\n")
    return HOLDS if any(row["state"] != "skipped" for row in rows) else FAILED
