"""Exchange JSON messages with a Python interpreter that runs a module of this project: both ends.

Messages are JSON objects, one a line; a field `payload` announces how many bytes follow the line. `Interpreter` is the
parent's end. `Channel` is the child's end: messages come in on standard input and go out on what was standard output,
and both move to descriptors of their own before other code is imported. What that code prints, on whatever level, goes
to standard error, and its standard input is empty. Functions that other code might replace are kept from the start.
"""

import contextlib
import ctypes
import importlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from json import JSONDecoder, JSONEncoder
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from parity_tests.interpreters.process import ChildProcess, ProcessError, clipped
from parity_tests.report.text import located

Message = dict[str, Any]
GREETING = "parity_tests.interpreters"
# Above what a program that closes "all" descriptors up to some small number reaches.
_FIRST_DESCRIPTOR = 100
_LOST = 70
_ROOT = Path(__file__).resolve().parents[2]
DEFAULT_TIMEOUT_S = 300.0
# A Python greets before it imports anything but the standard library: minutes are for what comes after.
GREETING_S = 60.0
# Limits of what start-up files may print before.
_MOST_LINES, _MOST_LINE_BYTES = 1000, 2**16


class Interpreter:
    """Start `python -m parity_tests.interpreters target argument ...`; use as a context, which ends it.

    Args:
        target: a module whose `main(channel, *arguments)` is to run; `channel` is a `Channel`.
        arguments: its own.
        who: the child as the subject of a sentence: "the torch interpreter".
        python: the interpreter; None for this one.
        timeout_s: seconds that one message may take.
        environment: its environment variables; None for those of this process.
        cwd: its working directory; None for this process's, from which it then imports too.

    Attributes:
        child: the process.

    Raises:
        ProcessError: if it cannot be started, or is no Python that is new enough.
    """

    def __init__(
        self,
        target: str,
        arguments: Sequence[str] = (),
        *,
        who: str,
        python: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self._who, self.timeout_s = who, timeout_s
        variables = dict(os.environ if environment is None else environment)
        imports_from = _working_directory() if cwd is None else ""
        path = [str(_ROOT), *filter(None, [imports_from, variables.get("PYTHONPATH")])]
        command = [sys.executable if python is None else python, "-m", "parity_tests.interpreters", target, *arguments]
        self.child = ChildProcess(command, variables | {"PYTHONPATH": os.pathsep.join(path)}, who, cwd)
        try:
            self._greet()
        except BaseException:
            self.child.end(0)
            raise

    def _greet(self) -> None:
        """Wait for the first message; a start-up file may have printed something before it."""
        limit_s = min(self.timeout_s, GREETING_S)
        deadline = time.monotonic() + limit_s
        try:
            for _ in range(_MOST_LINES):
                line = self.child.read_line(max(0.0, deadline - time.monotonic()), _MOST_LINE_BYTES)
                if (_decoded(line) or {}).get("greeting") == GREETING:
                    return
                self.child.keep_printed(line + b"\n")
            self.child.kill()
            raise ProcessError(self._who, f"printed {_MOST_LINES} lines", "garbled")
        except ProcessError as error:
            self.child.keep_printed(self.child.unfinished)
            happened = f"gave no answer within {limit_s:g} s" if error.kind == "timeout" else error.happened
            happened += " before it greeted as a Python from 3.11 on does"
            raise ProcessError(self._who, happened, error.kind, self.child.printed, error.status) from None

    def send(self, message: Message, payload: bytes | None = None) -> None:
        """Send a message; a payload arrives as its field `payload`."""
        announced = message if payload is None else message | {"payload": len(payload)}
        self.child.write((json.dumps(announced) + "\n").encode())
        if payload:
            self.child.write(payload)

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            ProcessError: if there is none within `timeout_s`; the process is dead afterwards.
        """
        line = self.child.read_line(self.timeout_s)
        message = _decoded(line)
        if message is None:
            self.child.kill()
            happened = f"wrote something that is no message ({clipped(line.decode(errors='backslashreplace'), 80)})"
            raise ProcessError(self._who, happened, "garbled", self.child.printed)
        if "raised" in message:
            raise ProcessError(self._who, f"raised {message['raised']}", "raised", self.child.printed)
        if "payload" in message:
            message["payload"] = self.child.read_bytes(message["payload"], self.timeout_s)
        return message

    def messages_left(self) -> list[Message]:
        """Kill the process and return the messages without payload that were on their way."""
        return [message for line in self.child.lines_left() if (message := _decoded(line)) is not None]

    def kill(self) -> None:
        """End the process and all that it started, at once."""
        self.child.kill()

    def end(self) -> None:
        """Let the process end by itself, if it does so soon, and free its resources."""
        self.child.end()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process: at once if something went wrong."""
        self.child.end(0) if kind else self.child.end()


def _working_directory() -> str:
    """Return the folder that this process works in; empty where it has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _decoded(line: bytes) -> dict[str, Any] | None:
    """Return the message in a line, or None if there is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


# --- the child's end ---


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
        """Send a message, or end a forked copy of the process, which must neither speak nor listen in its place."""
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
        """Wait for the next message; None when the parent has closed the connection."""
        self._end_copy()
        line = self._requests.readline()
        if not line:
            return None
        message = self._decode(line.decode())
        if "payload" in message:
            message["payload"] = self._requests.read(message["payload"])
        return message


def end_with_parent() -> None:
    """Ask the kernel to end this process with its parent: a busy process does not notice a closed connection."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def run(target: str, arguments: Sequence[str]) -> None:
    """Greet the parent and call `target.main(channel, *arguments)`; any exception becomes the last message."""
    channel = Channel()
    end_with_parent()
    channel.send({"greeting": GREETING, "python": platform.python_version()})
    try:
        importlib.import_module(target).main(channel, *arguments)
    except BaseException as error:
        # SystemExit and KeyboardInterrupt too: they are raised by the code that runs here, since a terminal's Ctrl-C
        # does not reach this session.
        channel.send({"raised": located(error)})
