"""Print to a terminal on which every string is text, and end commands in order: full pipes, Ctrl-C, SIGTERM."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from rich.console import Console
from rich.text import Text

from parity_tests.report.files import OutputError
from parity_tests.report.text import printable

INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_Item = TypeVar("_Item")


class Interruption:
    """Tell if the user asked for an end, and decide what a signal does now.

    Attributes:
        asked: True from the first signal on.
    """

    def __init__(self, *, polled: bool = False) -> None:
        self.asked = False
        self._polled = polled
        self._settled = False
        self._late = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if the user asked for an end and the exception was lost.

        Python's own is raised wherever the program happens to be; in a finaliser or a callback of a library it is
        printed or dropped, or becomes another one, and the work would go on.
        """
        if self.asked and not self._settled:
            raise KeyboardInterrupt

    def settle(self) -> None:
        """Begin the writing of files, which must be finished: from here on a signal is only remembered.

        Call it where the work ends, within the `try` that expects KeyboardInterrupt. A signal that came after all the
        work was done ends the program when the files are there.
        """
        self._settled = True

    def until_asked(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yield items until the user asks for an end: for work that a signal does not end halfway through an item."""
        for item in items:
            if self.asked:
                return
            yield item

    def finish(self) -> None:
        """Raise KeyboardInterrupt if the first signal came after the work."""
        if self._late:
            raise KeyboardInterrupt

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Answer a signal."""
        first, self.asked = not self.asked, True
        self._late |= first and self._settled
        # In impatience a user sends a second one: it must not cost the files, but end what only polls.
        if not self._settled and first != self._polled:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible(*, polled: bool = False) -> Iterator[Interruption]:
    """Let the first Ctrl-C or SIGTERM end the work in order: KeyboardInterrupt is raised once, later ones are ignored.

    With `polled`, the first one is only remembered, for `until_asked`; a second one raises.
    """
    interruption = Interruption(polled=polled)
    # Only the main thread may set a handler, and only it is interrupted.
    own = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, interruption.handle) for number in _SIGNALS} if own else {}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    interruption.finish()


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
    """Run a command line; one that cannot write to its terminal or pipe ends with a sentence and no traceback."""
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
