"""Wrong usage: one sentence on stderr and exit status 2, never a traceback."""

import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from parity_tests.report.console import PlainConsole
from parity_tests.report.files import OutputError, check_output
from parity_tests.report.interruption import INTERRUPTED

__all__ = ["FAILED", "INTERRUPTED", "OK", "USAGE", "UsageError", "check_choices", "check_interpreters"]
__all__ += ["check_writable", "complain", "cut_short", "tell", "tell_damage"]

OK, FAILED, USAGE = 0, 1, 2
_ERRORS = PlainConsole(stderr=True, soft_wrap=True)
# Sentences about one damaged file; whoever mends these finds the next.
_MOST_SENTENCES = 20


class UsageError(ValueError):
    """A mistake of the user's; the message is one sentence."""


def tell(sentence: object) -> None:
    """Prints a sentence on stderr."""
    _ERRORS.print(f"bench: {sentence}")


def cut_short(stopped: str, status: int) -> int:
    """Says that a command was interrupted, and returns its exit status.

    Args:
        stopped: what was left; empty if nothing was.
        status: of a command that came to its end.
    """
    if stopped:
        tell(f"{stopped}; JSON and Markdown say so, other files stay as they were.")
    return INTERRUPTED if stopped else status


def complain(error: object) -> int:
    """Prints the sentence and returns the exit status for wrong usage."""
    tell(error)
    return USAGE


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


def check_choices(argument: str, values: Iterable[str], choices: Collection[str]) -> None:
    """Refuses a value that is no choice.

    Raises:
        UsageError: with the choices listed.
    """
    for value in values:
        if value not in choices:
            raise UsageError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}; choose one of these.")


def check_interpreters(torch_python: str | None, jax_python: str | None) -> dict[str, str]:
    """Framework to interpreter, for those that were given.

    Raises:
        UsageError: if one is no program.
    """
    given = {"torch": torch_python, "jax": jax_python}
    found = {}
    for framework, python in given.items():
        if python is None:
            continue
        program = shutil.which(python)
        if program is None:
            raise UsageError(f"--{framework}-python: {python!r} is no program; give the path of a Python interpreter.")
        # The worker starts in another directory, and a symbolic link of a virtual environment must stay one.
        found[framework] = str(Path(program).absolute())
    return found


def check_writable(argument: str, path: Path | None) -> None:
    """Refuses an output file that cannot be written, before anything is measured.

    Raises:
        UsageError: if its directory is missing or the file cannot be opened.
    """
    try:
        check_output(argument, path)
    except OutputError as error:
        raise UsageError(str(error)) from error
