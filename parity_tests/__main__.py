"""Command line of the parity judge: ``python -m parity_tests run`` and ``python -m parity_tests defects``."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parity_tests.harness.cases import CASE_SETS, Case
from parity_tests.harness.defects import DEFECTS, killed
from parity_tests.harness.dtypes import STORAGE_DTYPES
from parity_tests.harness.records import ParityRow, summarize, write_json
from parity_tests.harness.report import print_report
from parity_tests.harness.run import run_cells
from parity_tests.harness.subjects.base import FRAMEWORKS, Subject, framework_available, load_subjects

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_console = Console()
_errors = Console(stderr=True)

DEVICES = ("auto", "cpu", "cuda")


def _help(choices: Iterable[str]) -> str:
    return f"One of {', '.join(choices)}; repeat for several; default: all."


def _refuse(sentence: str) -> typer.Exit:
    _errors.print(f"error: {sentence}", highlight=False)
    return typer.Exit(2)


def _choose(option: str, values: Iterable[str], choices: Iterable[str]) -> list[str]:
    """Refuses what is not among the choices, which are the tables' own names."""
    for value in values:
        if value not in choices:
            raise _refuse(f"{option}: expected one of {', '.join(choices)}, got {value!r}; choose one of these.")
    return list(values)


def _subjects(frameworks: list[str], implementations: list[str], device: str) -> list[Subject]:
    """Loads the chosen subjects; a framework that is absent is an error if it was named, and said if it was not."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    chosen = _choose("--framework", frameworks, FRAMEWORKS) or list(FRAMEWORKS)
    found: list[Subject] = []
    for name in chosen:
        if not framework_available(name):
            if frameworks:
                raise _refuse(f"--framework {name}: expected an installed framework, got none; install its extra.")
            _console.print(f"[yellow]{name} is not installed: only the other framework is compared[/]")
            continue
        try:
            found += load_subjects(name, device)
        except ValueError as error:
            raise _refuse(str(error)) from None
    if not found:
        raise _refuse("no framework is installed; install the extra torch, jax, cuda12 or cuda13.")
    names = sorted({subject.implementation for subject in found})
    _choose("--implementation", implementations, names)
    return [subject for subject in found if not implementations or subject.implementation in implementations]


def _cases(case_set: str, names: list[str]) -> list[Case]:
    known = {case.name: case for case in CASE_SETS["full"]}
    if not names:
        return list(CASE_SETS[_choose("--cases", [case_set], CASE_SETS)[0]])
    return [known[name] for name in _choose("--case", names, known)]


def _writable(path: Path | None) -> None:
    """Refuses before hours of work what would fail after them."""
    if path is not None and (path.is_dir() or not os.access(path.resolve().parent, os.W_OK)):
        raise _refuse(f"--json: expected a file in a writable folder, got {path}; choose another path.")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<48}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_errors,
        transient=True,
        disable=not sys.stderr.isatty(),
    )


@app.command()
def run(
    framework: Annotated[list[str] | None, typer.Option(help=_help(FRAMEWORKS))] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=_help(STORAGE_DTYPES))] = None,
    cases: Annotated[str, typer.Option(help=f"Which set of shapes: {', '.join(CASE_SETS)}.")] = "default",
    case: Annotated[list[str] | None, typer.Option(help="Single shapes by name, instead of a set.")] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the inputs.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Compare every implementation with the float64 oracle, and torch with JAX.

    Exit status: 0 all compared cells hold, 1 a mismatch or nothing compared, 2 wrong usage.
    """
    _writable(json_file)
    chosen_cases = _cases(cases, case or [])
    subjects = _subjects(framework or [], implementation or [], _choose("--device", [device], DEVICES)[0])
    dtypes = _choose("--dtype", dtype or [], STORAGE_DTYPES) or list(STORAGE_DTYPES)
    rows: list[ParityRow] = []
    with _progress() as progress:
        task = progress.add_task("", total=len(subjects) * len(dtypes) * len(chosen_cases))

        def advance(label: str) -> None:
            progress.update(task, description=label, advance=1)

        rows.extend(run_cells(subjects, dtypes, chosen_cases, seed, advance))
    summary = summarize(rows)
    print_report(_console, rows, summary)
    if json_file is not None:
        write_json(json_file, rows)
    raise typer.Exit(0 if summary.ok else 1)


@app.command()
def defects(
    framework: Annotated[list[str] | None, typer.Option(help=_help(FRAMEWORKS))] = None,
    implementation: Annotated[str, typer.Option(help="The healthy subject that is spoiled.")] = "matmul",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the score to this file.")] = None,
) -> None:
    """Plant defects in copies of correct code and count how many the judge kills.

    Exit status: 0 all killed, 1 a survivor (or nothing planted), 2 wrong usage.
    """
    _writable(json_file)
    subjects = _subjects(framework or [], [implementation], "auto")
    planted, survivors = 0, []
    for subject in subjects:
        for defect in DEFECTS:
            for dtype in defect.dtypes:
                planted += 1
                dead = killed(defect, subject, dtype)
                if not dead:
                    survivors.append(f"{subject.framework} {dtype}: {defect.name}")
                _console.print(
                    f"{'killed  ' if dead else 'SURVIVED'} {subject.framework:<6} {dtype:<9} {defect.name}",
                    style=None if dead else "red",
                    highlight=False,
                )
    _console.print(f"planted {planted}, killed {planted - len(survivors)}, survivors {len(survivors)}")
    if json_file is not None:
        score = {
            "schema_version": 1,
            "planted": planted,
            "killed": planted - len(survivors),
            "survivors": survivors,
        }
        json_file.write_text(json.dumps(score, indent=1) + "\n")
    raise typer.Exit(1 if survivors or not planted else 0)


if __name__ == "__main__":
    app(prog_name="python -m parity_tests")
