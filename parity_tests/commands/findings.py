"""``python -m parity_tests findings``: which known traps of public libraries are present in the installed versions."""

import json
from importlib import metadata
from pathlib import Path

from rich.table import Table

from parity_tests.commands.usage import FAILED, HOLDS, check_writable, console
from parity_tests.findings import all_findings


def findings(json_file: Path | None) -> int:
    """Runs every check and prints what it measured.

    Args:
        json_file: where the results go, or None.

    Returns:
        0 if something was checked, 1 if no framework is installed. A mended trap is good news and no failure.
    """
    check_writable("--json", json_file)
    table = Table(title="traps in public libraries, measured here", title_justify="left")
    for column in ("finding", "library", "installed", "seen in", "here", "measured", "what it is"):
        table.add_column(column)
    rows = []
    for finding in all_findings():
        measured = finding.measure()
        version = metadata.version(finding.library)
        here = finding.state(measured, version)
        seen = ", ".join(finding.seen_in)
        table.add_row(finding.name, finding.library, version, seen, here, f"{measured:.3g}", finding.sentence)
        rows.append(
            {
                "name": finding.name,
                "library": finding.library,
                "version": version,
                "seen_in": list(finding.seen_in),
                "present": finding.present(measured),
                "state": here,
                "measured": measured,
                "figure": finding.figure,
                "sentence": finding.sentence,
            }
        )
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"schema_version": 1, "findings": rows}, indent=1) + "\n")
    return HOLDS if rows else FAILED
