"""`bench validate` and `bench compress`: what records go through before they are published."""

from collections.abc import Sequence
from pathlib import Path

from bench.commands.usage import FAILED, OK, UsageError, check_writable, complain, cut_short
from bench.environments import StoreError
from bench.record_files import compress, records_file
from bench.report.output import OutputError, write_csv, write_json
from bench.store import sole_writer
from bench.study.validation import Count, violations
from parity_tests.report.console import PlainConsole
from parity_tests.report.interruption import interruptible


def validate_command(
    directories: Sequence[Path], *, json_file: Path | None = None, csv_file: Path | None = None
) -> int:
    """Runs `bench validate`; its exit status is 1 if anything is wrong with the records, whatever is remarked."""
    count, problems, stopped = Count(), [], ""
    try:
        check_writable("--json", json_file)
        check_writable("--csv", csv_file)
        with interruptible() as interruption:
            try:
                for directory in directories:
                    for problem in violations(directory, count):
                        problems.append(problem)  # noqa: PERF402 - an interruption keeps what is there
                interruption.settle()
            except KeyboardInterrupt:
                stopped = f"interrupted: {count.records} records were looked at, the others were left"
            if json_file is not None:
                found = {"records": count.records, "cells": count.cells, "violations": problems}
                found |= {"remarks": count.remarks} | ({"stopped": stopped} if stopped else {})
                write_json(json_file, found)
            if csv_file is not None and not stopped:
                rows = [{"violation": problem} for problem in problems]
                rows += [{"remark": remark} for remark in count.remarks]
                write_csv(csv_file, ["violation", "remark"], rows)
    except (UsageError, StoreError, OutputError) as error:
        return complain(error)
    console = PlainConsole()
    for problem in problems:
        console.out(problem)
    for remark in count.remarks:
        console.out(f"Remark: {remark}.")
    said = ", ".join(
        f"{len(found)} {what}{'' if len(found) == 1 else 's'}"
        for what, found in (("violation", problems), ("remark", count.remarks))
    )
    console.out(f"{count.records} records in {count.cells} cells: {said}.")
    console.out(
        "What records cannot show: a factor that all clocks of a cell share, and the number of calls in a block where "
        f"nothing else timed its calls ({count.unchecked} of {count.speeds} speeds here). Only another run can tell."
    )
    return cut_short(stopped, FAILED if problems else OK)


def compress_command(directories: Sequence[Path]) -> int:
    """Run `bench compress`: what was compressed before a mistake stays so."""
    try:
        for directory in directories:
            before = records_file(directory).stat().st_size
            with sole_writer(directory):
                packed = compress(directory)
            PlainConsole(soft_wrap=True).print(
                f"{packed}: {before / 1e6:.1f} MB became {packed.stat().st_size / 1e6:.1f} MB."
            )
    except StoreError as error:
        return complain(error)
    return OK
