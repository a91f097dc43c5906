"""Run `python -m parity_tests run`: cells, and the ladder up to K optimiser steps."""

from collections.abc import Iterator, Sequence

from parity_tests.commands.usage import (
    DEVICES,
    FAILED,
    FP32_PRECISIONS,
    HOLDS,
    Options,
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
from parity_tests.interpreters.interpreter import DEFAULT_TIMEOUT_S
from parity_tests.judge.dtypes import STORAGE_DTYPES
from parity_tests.judge.inputs import Case
from parity_tests.judge.records import ParityRow, environment, junit_document, summarize, write_json
from parity_tests.judge.run import count_cells, run_cells
from parity_tests.judge.subjects import Subject, covered
from parity_tests.report.console import interruptible, print_report
from parity_tests.report.files import write_text
from parity_tests.report.html import Curves, html_document
from parity_tests.report.text import printable
from parity_tests.training.ladder import TRAINED, TRAININGS, curves_of, failed_training, training_rows


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


def _chosen_trainings(options: Options, frameworks: Sequence[str]) -> list[tuple[str, str]]:
    """Return the named trainings, or those of the set; none where cells are selected."""
    selection = {
        "--implementation": options.implementation,
        "--mode": options.mode,
        "--dtype": options.dtype,
        "--case": options.case,
    }
    if not options.train:
        return [] if any(selection.values()) or len(frameworks) < 2 else list(TRAINED[options.cases])
    chosen = [TRAININGS[name] for name in dict.fromkeys(choose("--train", options.train, TRAININGS))]
    # A training's device and data are its own: to take these options and not heed them would be worse.
    of_cells = selection | {
        "--cases": options.cases != "default",
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


# Options that only a pair has: the value without them, and what they are.
_OF_PAIRS = {
    "torch_python": (None, "an interpreter"),
    "jax_python": (None, "an interpreter"),
    "timeout_s": (DEFAULT_TIMEOUT_S, "a time limit"),
    "dtypes_equal": (False, "it"),
    "effort": ("full", "an effort"),
    "values": ("drawn", "values"),
}


def run(options: Options) -> int:
    """Compare every implementation with the float64 oracle, torch with JAX, and their training.

    Exit status: 0 all compared cells hold, 1 a mismatch or nothing compared, 2 wrong usage or a pair that could not be
    judged to its end, 130 interrupted.
    """
    choose("--precision", [options.precision], FP32_PRECISIONS)
    precision = None if options.precision == "fp32" else options.precision
    if options.pair is not None:
        # Imported late: what judges pairs takes more than a second to load.
        from parity_tests.commands.pair import run_user_pair

        return run_user_pair(options.pair, options)
    for name, (usual, what) in _OF_PAIRS.items():
        if getattr(options, name) != usual:
            option = f"--{name.replace('_', '-')}"
            raise refuse(f"{option}: expected --pair beside {what}, got none; name a pair.")
    options.check_files()
    cases = chosen_cases(options.cases, options.case)
    dtypes = choose("--dtype", options.dtype, STORAGE_DTYPES) or list(STORAGE_DTYPES)
    device = choose("--device", [options.device], DEVICES)[0]
    if precision is not None and "float32" not in dtypes:
        raise refuse(
            f"--precision {precision}: expected float32 among --dtype, got {', '.join(dtypes)}; leave one out."
        )
    frameworks = chosen_frameworks(options.framework)
    whole = options.cases == "full" and not (options.case or options.mode)
    modes = chosen_modes(frameworks, options.mode, every=whole)
    optimizers = _chosen_trainings(options, frameworks)
    chosen = (frameworks, options.implementation, device, modes, precision, cases)
    subjects = [] if options.train else chosen_subjects(*chosen)

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
                    subjects, dtypes, cases, options.seed, advance, included, device, precision, exact=True
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
