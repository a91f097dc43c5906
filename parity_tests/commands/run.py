"""``python -m parity_tests run``: cells, and the ladder up to K optimiser steps."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from parity_tests.commands.usage import (
    DEVICES,
    FAILED,
    HOLDS,
    INTERRUPTED,
    check_writable,
    choose,
    chosen_cases,
    chosen_frameworks,
    chosen_modes,
    chosen_subjects,
    console,
    heartbeat,
    progress_bar,
    refuse,
)
from parity_tests.harness.cases import Case
from parity_tests.harness.dtypes import STORAGE_DTYPES
from parity_tests.harness.html import Curves, html_document
from parity_tests.harness.junit import junit_document
from parity_tests.harness.records import ParityRow, environment, summarize, write_json
from parity_tests.harness.report import print_report
from parity_tests.harness.run import count_cells, run_cells
from parity_tests.harness.subjects.base import Subject
from parity_tests.harness.subjects.modes import covered
from parity_tests.harness.training_run import TRAINED, TRAININGS, curves_of, failed_training, training_rows

_INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Options:
    """The command's options; see ``run --help``."""

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


def _write(options: Options, rows: Sequence[ParityRow], curves: Sequence[Curves], cells_left: int) -> None:
    if options.json_file is not None:
        write_json(options.json_file, rows, cells_left)
    if options.junit_file is not None:
        options.junit_file.write_text(junit_document(rows))
    if options.html_file is not None:
        options.html_file.write_text(html_document(rows, environment(), curves, cells_left=cells_left))


def check_files(options: Options) -> None:
    """Refuses before the work what could not be written after it."""
    check_writable("--json", options.json_file)
    check_writable("--junit", options.junit_file)
    check_writable("--html", options.html_file)


def _chosen_trainings(options: Options, frameworks: Sequence[str]) -> list[tuple[str, str]]:
    """The named tasks and optimisers, or those of the set; a selection of cells asks for just these and for none."""
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


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Gives a function that raises KeyboardInterrupt if the user asked for it and the exception was lost.

    Python's own is raised wherever the program happens to be; in a finaliser or a callback of a library it is printed
    or dropped, and the run would go on.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    # Only the main thread may set a handler, and only it is interrupted. A job that is ended from outside, by a batch
    # system's time limit for one, is told by SIGTERM.
    own = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handle) for number in _INTERRUPTIONS} if own else {}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(options: Options) -> int:
    """Compares, prints the report, writes the files.

    Returns:
        0 if all compared cells hold, 1 for a mismatch or if nothing was compared, 130 if interrupted; what was compared
        until then is reported and written, with the number of cells that were left.
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
    # Trainings that are named are all that is asked for.
    chosen = (frameworks, options.implementations, device, modes, options.precision)
    subjects = [] if options.trainings else chosen_subjects(*chosen)

    def included(subject: Subject, case: Case) -> bool:
        return not whole or covered(subject.framework, subject.mode, case)

    rows: list[ParityRow] = []
    curves: list[Curves] = []
    total = count_cells(subjects, dtypes, cases, included) + len(optimizers)
    begun, interrupted = 0, False
    beat = heartbeat()
    with progress_bar() as progress, _interruptible() as check_interruption:
        task = progress.add_task("", total=total)

        def advance(label: str) -> None:
            nonlocal begun
            check_interruption()
            beat(f"{begun} of {total} cells; now {label}")
            # What is announced has begun, and what was announced before it is finished.
            progress.update(task, description=label, completed=begun)
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
                rows.append(row)  # noqa: PERF402 - one by one, so that an interruption keeps what is there
        except KeyboardInterrupt:
            interrupted = True
    # The cell in flight counts as left: its rows may be there in part.
    left = total - begun + 1 if interrupted and begun else total - begun
    if interrupted:
        # A second Ctrl-C, in impatience, must not cost the files.
        for number in _INTERRUPTIONS:
            signal.signal(number, signal.SIG_IGN)
    summary = summarize(rows)
    print_report(console, rows, summary)
    _write(options, rows, curves, left)
    if interrupted:
        console.print(
            f"[yellow]interrupted: {left} of {total} cells were left; what was compared until then is above and in the "
            "files[/]"
        )
        return INTERRUPTED
    return HOLDS if summary.ok else FAILED
