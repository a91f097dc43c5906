"""Handle Ctrl-C, and SIGTERM, by which batch systems announce the end of a job: the work done until then is kept."""

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_Item = TypeVar("_Item")


class Interruption:
    """Tell if the user asked for an end, and decide what a signal does now.

    Attributes:
        asked: True from the first signal on.
        held: set while something is in hand that must not be lost: a signal is then only remembered, for `check`.
    """

    def __init__(self, *, polled: bool = False) -> None:
        self.asked = self.held = False
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
        if not (self._settled or self.held) and first != self._polled:
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
