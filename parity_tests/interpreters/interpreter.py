"""A Python interpreter that runs a module of this project and exchanges JSON messages with it."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from parity_tests.interpreters.child import GREETING, Message
from parity_tests.interpreters.process import ChildProcess, ProcessError, clipped

_ROOT = Path(__file__).resolve().parents[2]
DEFAULT_TIMEOUT_S = 300.0
# A Python greets before it imports anything but the standard library: minutes are for what comes after.
GREETING_S = 60.0
# What start-up files may print before.
_MOST_LINES, _MOST_LINE_BYTES = 1000, 2**16


class Interpreter:
    """Starts `python -m parity_tests.interpreters target argument ...`; use as a context, which ends it.

    Args:
        target: a module whose `main(channel, *arguments)` is to run, see `child`.
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
        """Waits for the first message; a start-up file may have printed something before it."""
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
        """Sends a message; a payload arrives as its field `payload`."""
        announced = message if payload is None else message | {"payload": len(payload)}
        self.child.write((json.dumps(announced) + "\n").encode())
        if payload:
            self.child.write(payload)

    def receive(self) -> Message:
        """Waits for the next message.

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
        """Kills the process and returns the messages without payload that were on their way."""
        return [message for line in self.child.lines_left() if (message := _decoded(line)) is not None]

    def kill(self) -> None:
        """Ends the process and all that it started, at once."""
        self.child.kill()

    def end(self) -> None:
        """Lets the process end by itself, if it does so soon, and frees what it held."""
        self.child.end()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the process: at once if something went wrong."""
        self.child.end(0) if kind else self.child.end()


def _working_directory() -> str:
    """Where this process works; empty where that folder has been removed."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _decoded(line: bytes) -> dict[str, Any] | None:
    """Returns the message in a line, or None if there is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
