"""``python -m parity_tests run``: cells, and the ladder up to K optimiser steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parity_tests.commands.usage import (
    DEVICES,
    FAILED,
    HOLDS,
    INTERRUPTED,
    check_writable,
    choose,
    chosen_cases,
    chosen_frameworks,
    chosen_subjects,
    console,
    progress_bar,
)
from parity_tests.harness.dtypes import STORAGE_DTYPES
from parity_tests.harness.html import Curves, html_document
from parity_tests.harness.junit import junit_document
from parity_tests.harness.records import ParityRow, environment, summarize, write_json
from parity_tests.harness.report import print_report
from parity_tests.harness.run import run_cells
from parity_tests.harness.training_run import TRAINED, curves_of, training_rows


@dataclass(frozen=True)
class Options:
    """The command's options; see ``run --help``."""

    frameworks: tuple[str, ...]
    implementations: tuple[str, ...]
    dtypes: tuple[str, ...]
    case_set: str
    cases: tuple[str, ...]
    device: str
    seed: int
    json_file: Path | None
    junit_file: Path | None
    html_file: Path | None


def _write(options: Options, rows: Sequence[ParityRow], curves: Sequence[Curves]) -> None:
    if options.json_file is not None:
        write_json(options.json_file, rows)
    if options.junit_file is not None:
        options.junit_file.write_text(junit_document(rows))
    if options.html_file is not None:
        options.html_file.write_text(html_document(rows, environment(), curves))


def check_files(options: Options) -> None:
    """Refuses before the work what could not be written after it."""
    check_writable("--json", options.json_file)
    check_writable("--junit", options.junit_file)
    check_writable("--html", options.html_file)


def run(options: Options) -> int:
    """Compares, prints the report, writes the files.

    Returns:
        0 if all compared cells hold, 1 for a mismatch or if nothing was compared, 130 if interrupted; what was compared
        until then is reported and written.
    """
    check_files(options)
    cases = chosen_cases(options.case_set, options.cases)
    dtypes = choose("--dtype", options.dtypes, STORAGE_DTYPES) or list(STORAGE_DTYPES)
    device = choose("--device", [options.device], DEVICES)[0]
    frameworks = chosen_frameworks(options.frameworks)
    subjects = chosen_subjects(frameworks, options.implementations, device)
    # A selection of cells asks for just these; the ladder belongs to a whole set.
    selective = options.implementations or options.cases or options.dtypes
    optimizers = () if selective or len(frameworks) < 2 else TRAINED[options.case_set]
    rows: list[ParityRow] = []
    curves: list[Curves] = []
    interrupted = False
    with progress_bar() as progress:
        task = progress.add_task("", total=len(subjects) * len(dtypes) * len(cases) + len(optimizers))

        def advance(label: str) -> None:
            progress.update(task, description=label, advance=1)

        def work() -> Iterator[ParityRow]:
            yield from run_cells(subjects, dtypes, cases, options.seed, advance)
            for task_name, optimizer in optimizers:
                advance(f"training: {task_name}, {optimizer}")
                report = training_rows(task_name, optimizer)
                curves.extend(curves_of(report.training))
                yield from report.rows

        try:
            for row in work():
                rows.append(row)  # noqa: PERF402 - one by one, so that an interruption keeps what is there
        except KeyboardInterrupt:
            interrupted = True
    summary = summarize(rows)
    print_report(console, rows, summary)
    _write(options, rows, curves)
    if interrupted:
        console.print("[yellow]interrupted: what was compared until then is above and in the files[/]")
        return INTERRUPTED
    return HOLDS if summary.ok else FAILED
