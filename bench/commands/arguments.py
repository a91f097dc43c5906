"""Options that several commands have, checks of what was given, and the ends of a command.

Wrong usage is one sentence on stderr and exit status 2, never a traceback.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.environments import ENVIRONMENTS, StoreError
from bench.record_files import COMPRESSED, RECORDS, run_directory
from bench.records import Record
from bench.report.export import SHARED
from bench.report.markdown import PageError
from bench.report.pictures import ChartError
from bench.store import TORN, Damage
from parity_tests.judge.dtypes import precision_class, storage_dtype
from parity_tests.report.console import INTERRUPTED, PlainConsole
from parity_tests.report.files import OutputError, check_apart, check_output
from parity_tests.report.text import printable

__all__ = ["FAILED", "INTERRUPTED", "OK", "USAGE", "UsageError", "check_choices", "check_interpreters"]
__all__ += [
    "check_folder",
    "check_outputs",
    "complain",
    "cut_short",
    "reading",
    "selection",
    "tell",
    "tell_damage",
    "wide_console",
]

OK, FAILED, USAGE = 0, 1, 2
_ERRORS = PlainConsole(stderr=True, soft_wrap=True)
# Every column of the ranking side by side; a pipe has no width of its own, and a cut table says nothing.
_WIDTH = 166
# Sentences about one damaged file; further ones are found when these are mended.
_MOST_SENTENCES = 20


def _file(help_text: str) -> Any:
    return typer.Option(metavar="F", help=help_text)


def _run(metavar: str, help_text: str) -> Any:
    return typer.Argument(metavar=metavar, parser=run_directory, help=help_text)


JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="F", help="Write the result as JSON to this file too.")
]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", metavar="F", help="Write the rows as comma-separated values to this file too.")
]
MarkdownFile = Annotated[Path | None, _file("Write the whole report as Markdown.")]
Page = Annotated[Path | None, _file("Replace the block of this page that shows DIR.")]
PageFile = Annotated[Path | None, _file("Write one self-contained page (.html) for a browser, with filters.")]
ShortFile = Annotated[Path | None, _file("Write the sections of that page as short Markdown.")]
PictureFolder = Annotated[
    Path | None, typer.Option(metavar="D", help="Draw the pictures of that page into this folder, as SVG and PNG.")
]
Chart = Annotated[Path | None, _file("Draw ratios with intervals (.svg, .png, .html).")]
WinnerMap = Annotated[Path | None, _file("Draw the winner at each size (.svg, .png, .html).")]
Roofline = Annotated[Path | None, _file("Draw rates against the machine's ceilings (.svg, .png, .html).")]
FrameworkMap = Annotated[Path | None, _file("Draw PyTorch against JAX (.svg, .png, .html).")]
FrameworksCsv = Annotated[Path | None, _file("Write PyTorch against JAX, one line a cell.")]
Directory = Annotated[Path, _run("DIR", "Directory of a run, or a name such as h200.")]
Directories = Annotated[list[Path], _run("DIR...", "Directories of runs, or names such as h200.")]
EarlierRun = Annotated[Path, _run("A", "Directory of the earlier run.")]
LaterRun = Annotated[Path, _run("B", "Directory of the later run.")]
TorchPython = Annotated[str | None, typer.Option(metavar="P", help="Interpreter with torch; default: this one.")]
JaxPython = Annotated[str | None, typer.Option(metavar="P", help="Interpreter with jax and flax; default: this one.")]


def _cells_where(run: str) -> Any:
    return typer.Option(
        metavar="FIELD=PATTERN", help=f"{run}Only cells such as direction=forward, workload=article-*; may be repeated."
    )


Where = Annotated[list[str] | None, _cells_where("")]
WhereA = Annotated[list[str] | None, _cells_where("A: ")]
WhereB = Annotated[list[str] | None, _cells_where("B: ")]


class UsageError(ValueError):
    """A mistake of the user's; the message is one sentence."""


MISTAKES = (UsageError, StoreError, OutputError, PageError, ChartError)


def selection(option: str, conditions: Sequence[str] | None) -> Callable[[Record], bool]:
    """Return a function that tells if a cell meets conditions such as `direction=forward` or `workload=article-*`.

    Args:
        option: that the conditions were given to.
        conditions: a field and a pattern each; a cell must meet all of them.

    Raises:
        UsageError: if one is no condition on what the competitors of a cell share.
    """
    wanted = []
    for condition in conditions or ():
        name, sign, pattern = condition.partition("=")
        if not sign or name not in SHARED:
            names = ", ".join(SHARED)
            raise UsageError(f"{option}: expected FIELD=PATTERN with one of {names}, got {condition!r}; name one.")
        spelled = {"precision": precision_class, "observed_precision": precision_class, "dtype": storage_dtype}
        wanted.append((name, spelled.get(name, str)(pattern)))
    # No closure: it travels to other processes.
    return partial(_meets, tuple(wanted))


def _meets(wanted: Iterable[tuple[str, str]], record: Record) -> bool:
    return all(fnmatchcase(str(getattr(record, name)), pattern) for name, pattern in wanted)


def check_choices(argument: str, values: Iterable[str], choices: Collection[str]) -> None:
    """Refuse a value that is no choice.

    Raises:
        UsageError: with the choices listed.
    """
    for value in values:
        if value not in choices:
            raise UsageError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}; choose one of these.")


def check_interpreters(torch_python: str | None, jax_python: str | None) -> dict[str, str]:
    """Return framework to interpreter, for those that were given.

    Raises:
        UsageError: if one is no program.
    """
    found = {}
    for framework, python in (("torch", torch_python), ("jax", jax_python)):
        if python is None:
            continue
        program = shutil.which(python)
        if program is None:
            raise UsageError(f"--{framework}-python: {python!r} is no program; give the path of a Python interpreter.")
        # The worker starts in another directory, and a symbolic link of a virtual environment must stay one.
        found[framework] = str(Path(program).absolute())
    return found


def check_writable(argument: str, path: Path | None) -> None:
    """Refuse an output file that cannot be written, before anything is measured or read.

    Raises:
        UsageError: if its directory is missing or the file cannot be opened.
    """
    try:
        check_output(argument, path)
    except OutputError as error:
        raise UsageError(str(error)) from error
    # Raw data is never replaced by what is drawn from it.
    if path is not None and Path(os.path.realpath(path)).name in (RECORDS, COMPRESSED, TORN, ENVIRONMENTS):
        raise UsageError(f"{argument}: {path} has the name of a run's own records; choose another file.")


def check_folder(argument: str, path: Path | None) -> None:
    """Refuse a folder that could not be made or written, and make none.

    Raises:
        UsageError: with the reason.
    """
    if path is None:
        return
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{argument}: {printable(path)} is no folder that can be written; choose another.")


def check_outputs(outputs: Mapping[str, Path | None], **others: Path | None) -> None:
    """Refuse output files that cannot be written, or that are one and the same.

    Args:
        outputs: option to path.
        **others: option, without its dashes, to what is written besides, and needs no trial.

    Raises:
        UsageError: with the options.
    """
    named = {argument: path for argument, path in outputs.items() if path is not None}
    if not named:
        return
    for argument, path in named.items():
        check_writable(argument, path)
    try:
        check_apart({f"--{name}": path for name, path in others.items()} | named)
    except OutputError as error:
        raise UsageError(str(error)) from error


def wide_console() -> PlainConsole:
    """Return a console that never cuts a ranking, on a terminal or in a pipe."""
    return PlainConsole(width=max(_WIDTH, os.get_terminal_size().columns if os.isatty(1) else 0))


def tell(sentence: object) -> None:
    """Print a sentence on stderr."""
    _ERRORS.print(f"bench: {sentence}")


def complain(error: object) -> int:
    """Print a sentence on stderr, and return the exit status for wrong usage."""
    tell(error)
    return USAGE


def cut_short(stopped: str, status: int) -> int:
    """Say that a command was interrupted, and return its exit status.

    Args:
        stopped: what was left; empty if nothing was.
        status: of a command that came to its end.
    """
    if stopped:
        tell(f"{stopped}; JSON and Markdown say so, other files stay as they were.")
    return INTERRUPTED if stopped else status


def tell_damage(sentences: Sequence[str], status: int) -> int:
    """Print what could not be read of records, and return the exit status.

    Args:
        sentences: one for each part that was left out.
        status: that the command would have without them.

    Returns:
        The status of wrong usage if anything was left out: whatever was shown is not all that the files hold.
    """
    for sentence in sentences[:_MOST_SENTENCES]:
        complain(sentence)
    if len(sentences) > _MOST_SENTENCES:
        complain(f"{len(sentences) - _MOST_SENTENCES} further damaged lines were left out; see `bench validate`.")
    return USAGE if sentences else status


@contextmanager
def reading() -> Iterator[Damage]:
    """Collect the damage of records; a mistake that ends the command is preceded by what was found until then."""
    damage = Damage()
    try:
        yield damage
    except MISTAKES:
        tell_damage(damage.sentences, FAILED)
        raise
