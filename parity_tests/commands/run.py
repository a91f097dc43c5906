"""Run `python -m parity_tests run`: cells, and the ladder up to K optimiser steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parity_tests.commands.usage import (
    DEVICES,
    FAILED,
    HOLDS,
    check_writable,
    choose,
    chosen_cases,
    chosen_frameworks,
    chosen_modes,
    chosen_subjects,
    console,
    ended,
    heartbeat,
    progress_bar,
    refuse,
    write_outputs,
)
from parity_tests.judge.dtypes import STORAGE_DTYPES
from parity_tests.judge.inputs import Case
from parity_tests.judge.records import ParityRow, environment, summarize, write_json
from parity_tests.judge.run import count_cells, run_cells
from parity_tests.judge.subjects import Subject, covered
from parity_tests.report.console import print_report
from parity_tests.report.files import OutputError, check_apart, write_text
from parity_tests.report.html import Curves, html_document
from parity_tests.report.interruption import interruptible
from parity_tests.report.junit import junit_document
from parity_tests.report.text import printable
from parity_tests.training.ladder import TRAINED, TRAININGS, curves_of, failed_training, training_rows


@dataclass(frozen=True)
class Options:
    """The command's options; see `run --help`."""

    frameworks: tuple[str, ...]
    implementations: tuple[str, ...]
    modes: tuple[str, ...]
    dtypes: tuple[str, ...]
    case_set: str
    cases: tuple[str, ...]
    trainings: tuple[str, ...]
    device: str
    seed: int
    precision: str | None
    json_file: Path | None
    junit_file: Path | None
    html_file: Path | None


def _written(
    options: Options, rows: Sequence[ParityRow], curves: Sequence[Curves], cells_left: int, stopped: str
) -> list[str]:
    """Write the files; return one sentence for each that could not be written."""
    junit, html = options.junit_file, options.html_file
    return write_outputs(
        (options.json_file, lambda path: write_json(path, rows, cells_left, stopped)),
        (junit, lambda path: write_text("--junit", path, junit_document(rows, stopped))),
        (
            html,
            lambda path: write_text("--html", path, html_document(rows, environment(), curves, cells_left=cells_left)),
        ),
    )


def check_files(options: Options) -> None:
    """Refuse, before the work, files that could not be written after it."""
    outputs = {"--json": options.json_file, "--junit": options.junit_file, "--html": options.html_file}
    for option, path in outputs.items():
        check_writable(option, path)
    try:
        check_apart(outputs)
    except OutputError as error:
        raise refuse(str(error)) from None


def _chosen_trainings(options: Options, frameworks: Sequence[str]) -> list[tuple[str, str]]:
    """Return the named trainings, or those of the set; none where cells are selected."""
    selection = {
        "--implementation": options.implementations,
        "--mode": options.modes,
        "--dtype": options.dtypes,
        "--case": options.cases,
    }
    if not options.trainings:
        return [] if any(selection.values()) or len(frameworks) < 2 else list(TRAINED[options.case_set])
    chosen = [TRAININGS[name] for name in dict.fromkeys(choose("--train", options.trainings, TRAININGS))]
    # A training's device and data are its own: to take these options and not heed them would be worse.
    of_cells = selection | {
        "--cases": options.case_set != "default",
        "--device": options.device != "auto",
        "--seed": options.seed,
    }
    beside = [option for option, value in of_cells.items() if value]
    if beside:
        raise refuse(
            f"--train: expected no option of cells beside it, got {', '.join(beside)}; "
            "run trainings and selected cells one after the other."
        )
    if len(frameworks) < 2:
        raise refuse(
            f"--train: expected torch and jax, got {frameworks[0]} alone; leave --framework out and install both."
        )
    return chosen


def run(options: Options) -> int:
    """Compare, print the report and write the files.

    Returns:
        0 if all compared cells hold, 1 for a mismatch or if nothing was compared, 130 if interrupted; what was compared
        until then is written and reported, with the number of cells that were left.
    """
    check_files(options)
    cases = chosen_cases(options.case_set, options.cases)
    dtypes = choose("--dtype", options.dtypes, STORAGE_DTYPES) or list(STORAGE_DTYPES)
    device = choose("--device", [options.device], DEVICES)[0]
    if options.precision is not None and "float32" not in dtypes:
        raise refuse(
            f"--precision {options.precision}: expected float32 among --dtype, got {', '.join(dtypes)}; leave one out."
        )
    frameworks = chosen_frameworks(options.frameworks)
    whole = options.case_set == "full" and not (options.cases or options.modes)
    modes = chosen_modes(frameworks, options.modes, every=whole)
    optimizers = _chosen_trainings(options, frameworks)
    chosen = (frameworks, options.implementations, device, modes, options.precision, cases)
    subjects = [] if options.trainings else chosen_subjects(*chosen)

    def included(subject: Subject, case: Case) -> bool:
        return not whole or covered(subject.framework, subject.mode, case)

    rows: list[ParityRow] = []
    curves: list[Curves] = []
    left = total = count_cells(subjects, dtypes, cases, included) + len(optimizers)
    begun, stopped = 0, ""
    beat = heartbeat()
    with interruptible() as interruption:
        with progress_bar() as progress:
            task = progress.add_task("", total=total)

            def advance(label: str) -> None:
                nonlocal begun
                interruption.check()
                beat(f"{begun} of {total} cells; now {label}")
                # An announced cell has begun, and the ones before it are finished.
                progress.update(task, description=printable(label), completed=begun)
                begun += 1

            def work() -> Iterator[ParityRow]:
                yield from run_cells(
                    subjects, dtypes, cases, options.seed, advance, included, device, options.precision, exact=True
                )
                for task_name, optimizer in optimizers:
                    advance(f"training: {task_name}, {optimizer}")
                    try:
                        report = training_rows(task_name, optimizer)
                    except Exception as error:
                        yield failed_training(task_name, optimizer, error)
                        continue
                    curves.extend(curves_of(report.training))
                    yield from report.rows

            try:
                for row in work():
                    # A library may have made another exception of the interruption: then this is no mismatch.
                    interruption.check()
                    rows.append(row)
                interruption.settle()
            except KeyboardInterrupt:
                # The cell in flight counts as left: its rows may be there in part.
                left = total - begun + min(begun, 1)
                stopped = f"interrupted: {left} of {total} cells were left"
        # The files first: printing can be interrupted again, or its reader leaves early.
        failed = _written(options, rows, curves, left if stopped else 0, stopped)
    summary = summarize(rows)
    print_report(console, rows, summary)
    said = f"{stopped}; what was compared until then is above and in the files" if stopped else ""
    return ended(HOLDS if summary.ok else FAILED, said, failed)
