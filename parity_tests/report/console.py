"""The terminal: a console on which every string is text, and how a command line ends that cannot write to it."""

import io
import os
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from parity_tests.report.files import OutputError
from parity_tests.report.text import printable


class PlainConsole(Console):
    """A console on which every string is text: no markup, no codes of emoji, nothing that a terminal would obey.

    What has a style of its own is passed as `rich.text.Text`, or with `style=`; what has several lines, in several
    calls.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """See `rich.console.Console`.

        Raises:
            OutputError: if nothing can be written there; one sentence.
        """
        try:
            super().print(*objects, **options)
        except OSError as error:
            name = "standard error" if self.stderr else "standard output"
            raise OutputError(f"{name}: cannot be written ({error.strerror}); make room or write to a file.") from error

    def render_str(self, text: str, **options: Any) -> Text:
        """See `rich.console.Console`: every string that is printed, alone or in a table, comes through here."""
        options |= {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(printable(text), **options)


def run_application(application: Callable[..., Any], name: str, *, failed: int = 2) -> None:
    """Run a command line; one that cannot write to its terminal or pipe ends with a sentence and no traceback.

    Args:
        application: of typer; ends with SystemExit.
        name: as it is called, `python -m ...`.
        failed: exit status if the terminal or pipe takes nothing.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where a terminal or a pipe cannot show a character, its escape is better than an exception.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        application(prog_name=name)
    except OutputError as error:
        _silence()
        print(f"{name.split()[-1]}: {error}", file=sys.stderr)
        sys.exit(failed)
    except SystemExit:
        try:
            sys.stdout.flush()
        except OSError:
            # Said already, or nobody reads any more.
            _silence()
        raise


def _silence() -> None:
    """Let Python end without another try to write, which would say so in lines of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
