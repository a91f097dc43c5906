"""``bench validate``."""

from collections.abc import Sequence
from pathlib import Path

from bench.commands.usage import FAILED, OK, UsageError, check_writable, complain
from bench.environments import StoreError
from bench.report.output import OutputError, write_csv, write_json
from bench.study.validation import Count, violations


def validate_command(
    directories: Sequence[Path], *, json_file: Path | None = None, csv_file: Path | None = None
) -> int:
    """Runs ``bench validate``; its exit status is 1 if anything is wrong with the records."""
    count = Count()
    try:
        check_writable("--json", json_file)
        check_writable("--csv", csv_file)
        problems = [problem for directory in directories for problem in violations(directory, count)]
        if json_file is not None:
            write_json(json_file, {"records": count.records, "cells": count.cells, "violations": problems})
        if csv_file is not None:
            write_csv(csv_file, ["violation"], [{"violation": problem} for problem in problems])
    except (UsageError, StoreError, OutputError) as error:
        return complain(error)
    for problem in problems:
        print(problem)
    print(f"{count.records} records in {count.cells} cells: {len(problems)} violations.")
    return FAILED if problems else OK
