"""The child's end: keeps the connection where the code that runs here cannot get into its way, and says how it failed.

Messages are JSON objects, one a line; a field `payload` announces how many bytes follow the line. They come in on
standard input and go out on what was standard output; both move to descriptors of their own before anything else is
imported. What the code prints, on whatever level, goes to standard error, and its standard input is empty. Functions
that other code might replace are kept from the start.
"""

import contextlib
import ctypes
import importlib
import os
import platform
import signal
import sys
from collections.abc import Sequence
from json import JSONDecoder, JSONEncoder
from typing import Any

from parity_tests.judge.failures import located

Message = dict[str, Any]
GREETING = "parity_tests.interpreters"
# Above what a program that closes "all" descriptors up to some small number reaches.
_FIRST_DESCRIPTOR = 100
_LOST = 70


def _moved(descriptor: int) -> int:
    import fcntl  # where a parent only imports this module, there may be none

    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR)
    except OSError:  # fewer descriptors than that are allowed
        return os.dup(descriptor)


def _whole(value: Any) -> Any:
    # A NumPy scalar is the one foreign thing that may stand among plain numbers.
    return value.item()


class Channel:
    """The connection to the parent."""

    def __init__(self) -> None:
        self._requests = os.fdopen(_moved(0), "rb")
        self._replies = _moved(1)
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        os.close(empty)
        os.dup2(2, 1)
        self._encode, self._decode = JSONEncoder(default=_whole).encode, JSONDecoder().decode
        self._write, self._stat, self._process, self._exit = os.write, os.fstat, os.getpid, os._exit
        self._owner, self._identity = os.getpid(), os.fstat(self._replies).st_ino

    def send(self, message: Message, payload: bytes | None = None) -> None:
        """Sends a message; ends a forked copy of the process, which must neither speak nor listen in its place.

        Args:
            message: what JSON can carry.
            payload: arrives as the message's field `payload`.
        """
        announced = message if payload is None else message | {"payload": len(payload)}
        self._send((self._encode(announced) + "\n").encode())
        if payload:
            self._send(payload)

    def _end_copy(self) -> None:
        if self._process() != self._owner:
            self._exit(0)

    def _send(self, data: bytes) -> None:
        self._end_copy()
        try:
            # A program that closed every descriptor may have opened a file of its own under our number since.
            if self._stat(self._replies).st_ino != self._identity:
                raise OSError
            left = memoryview(data)
            while left:
                left = left[self._write(self._replies, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._write(2, b"the connection to the parent process is closed\n")
            self._exit(_LOST)

    def receive(self) -> Message | None:
        """Waits for the next message; None when the parent has closed the connection."""
        self._end_copy()
        line = self._requests.readline()
        if not line:
            return None
        message = self._decode(line.decode())
        if "payload" in message:
            message["payload"] = self._requests.read(message["payload"])
        return message


def end_with_parent() -> None:
    """Asks the kernel to end this process with its parent: a busy process does not notice a closed connection."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def run(target: str, arguments: Sequence[str]) -> None:
    """Greets the parent and calls `target.main(channel, *arguments)`; any exception becomes the last message.

    Args:
        target: the module.
        arguments: its own.
    """
    channel = Channel()
    end_with_parent()
    channel.send({"greeting": GREETING, "python": platform.python_version()})
    try:
        importlib.import_module(target).main(channel, *arguments)
    except BaseException as error:
        # SystemExit and KeyboardInterrupt too: they are raised by the code that runs here, since a terminal's Ctrl-C
        # does not reach this session.
        channel.send({"raised": located(error)})
