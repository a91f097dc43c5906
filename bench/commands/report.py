"""``bench report``."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.commands.usage import FAILED, OK, UsageError, check_writable, complain
from bench.records import Record
from bench.report.chart import ChartError, save_chart
from bench.report.export import summary, write_json
from bench.report.markdown import report
from bench.report.readme import ReadmeError, results_block, with_block
from bench.report.tables import show_rankings, wide_console
from bench.report.text import summary_line
from bench.store import StoreError, read_environments, read_records
from bench.study.ranking import rankings, tally


def _read(directories: Sequence[Path]) -> tuple[list[Record], dict[str, dict[str, Any]]]:
    records: list[Record] = []
    environments: dict[str, dict[str, Any]] = {}
    for directory in directories:
        records.extend(read_records(directory))
        environments.update(read_environments(directory))
    repeated = [key for key, count in Counter(record.key for record in records).items() if count > 1]
    if repeated:
        raise UsageError(f"two of the records share the key {repeated[0]}; give each directory once.")
    if not records:
        raise UsageError(f"{', '.join(map(str, directories))}: no complete record; run the benchmark first.")
    return records, environments


def _update_readme(path: Path, block: str, *, check: bool) -> int:
    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(f"--readme: {path} cannot be read ({error.strerror}); give an existing file.") from error
    fresh = with_block(text, block)
    if not check:
        path.write_text(fresh)
        return OK
    if fresh == text:
        return OK
    print(f"bench: the results in {path} are stale; run the same command without --check.", file=sys.stderr)
    return FAILED


def report_command(
    directories: Sequence[Path],
    *,
    markdown: Path | None,
    json_file: Path | None,
    chart: Path | None,
    readme: Path | None,
    check: bool,
) -> int:
    """Runs ``bench report`` and returns its exit status."""
    try:
        if check and readme is None:
            raise UsageError("--check: needs --readme; name the README to check.")
        check_writable("--markdown", markdown)
        check_writable("--json", json_file)
        check_writable("--chart", chart)
        records, environments = _read(directories)
        found = rankings(records)
        if readme is not None:
            status = _update_readme(readme, results_block(records, environments), check=check)
            if check:
                return status
        if chart is not None:
            save_chart(found, chart)
        if markdown is not None:
            markdown.write_text(report(records, environments))
        if json_file is not None:
            write_json(json_file, summary(records, environments))
    except (UsageError, StoreError, ChartError) as error:
        return complain(error)
    except ReadmeError as error:
        return complain(f"{readme}: {error}")
    console = wide_console()
    show_rankings(console, found)
    console.print(f"Outcomes: {summary_line(tally(records))}.", markup=False)
    return OK
