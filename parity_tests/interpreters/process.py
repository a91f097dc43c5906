"""Start a child process, exchange lines with it under time limits, and end it with all that it started.

The child leads a session and a process group of its own. Its standard input and output carry lines, or bytes that a
line announced. Its standard error is read all the time, so that a full pipe never stops it, and only the last of it is
kept. No wait is for a pipe to close, which a process left behind can hold open for ever: the child's own end counts.
"""

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from parity_tests.report.text import printable

# Marks a child, in its environment and in that of all that it starts: a process that left the group is known by it. The
# mark of a child's own child begins with the child's.
MARK_VARIABLE = "PARITY_TESTS_PROCESS"
_CHUNK_BYTES = 65536
_KEPT_BYTES = 65536
_MOST_LINE_BYTES = 2**28
# The interval at which the end of the process is looked for where the kernel does not report it.
_POLL_S = 0.05
# The time that a process may take to end after it closed its connection, or was killed.
_ENDING_S = 2.0
_KILLED_S = 10.0


class ProcessError(ConnectionError):
    """A child that gives no answer, and has been ended.

    Args:
        who: the child, as the subject of a sentence.
        happened: the rest of the sentence: "ended with status 7".
        kind: `start`, `ended`, `timeout`, `garbled` or `raised`.
        printed: the last line that the child printed, or empty.
        status: the exit status, negative for a signal; None where it did not end by itself.
    """

    def __init__(self, who: str, happened: str, kind: str, printed: str = "", status: int | None = None) -> None:
        self.happened, self.kind, self.printed, self.status = happened, kind, printed, status
        super().__init__(f"{who} {happened}{self.last_words}")

    @property
    def last_words(self) -> str:
        """The end of the sentence: the last line that the child printed, and advice about a time limit."""
        if self.kind == "start":
            return ""
        said = f"; it printed last: {self.printed}" if self.printed else "; it printed nothing"
        return said + ("; if it is only slow, allow more by --timeout-s (timeout_s)" if self.kind == "timeout" else "")


def clipped(text: str, most: int = 200) -> str:
    """Return the text on one line, with control characters escaped, and without its middle if it is long."""
    if len(text) <= most:
        return printable(text)
    return f"{printable(text[: most // 2])} ... {printable(text[-(most // 2) :])}"


class ChildProcess:
    """A running child.

    Args:
        command: its argument vector.
        environment: its environment variables.
        who: the child as the subject of a sentence: "the torch interpreter".
        cwd: its working directory; None for this process's.

    Attributes:
        printed_bytes: number of bytes that it has printed.

    Raises:
        ProcessError: if the command cannot be started.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], who: str, cwd: str | Path | None = None
    ) -> None:
        self._who = who
        self._mark = f"{os.environ.get(MARK_VARIABLE, '')}/{secrets.token_hex(8)}"
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                # Prints leave the process at once: the last ones are worth the most where it dies.
                env={**environment, MARK_VARIABLE: self._mark, "PYTHONUNBUFFERED": "1"},
                cwd=cwd,
                # Ctrl-C is the parent's to handle: it ends its children itself, after what they found is safe.
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ProcessError(who, f"cannot be started ({reason})", "start") from error
        self._pipes = [pipe for pipe in (self._process.stdin, self._process.stdout, self._process.stderr) if pipe]
        self._input, self._output, self._errors = (pipe.fileno() for pipe in self._pipes)
        self._pending, self._unread, self._printed = bytearray(), bytearray(), bytearray()
        self._arrived: list[bytes] = []
        self.printed_bytes = 0
        self._searched = 0
        self._exited = self._closed = self._reaped = False
        self._selector = selectors.DefaultSelector()
        for descriptor, act in ((self._output, self._read_answers), (self._errors, self._read_printed)):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ, act)
        os.set_blocking(self._input, False)
        try:
            self._end: int | None = os.pidfd_open(self._process.pid)
            self._selector.register(self._end, selectors.EVENT_READ, self._notice_exit)
        except (AttributeError, OSError):
            self._end = None

    @property
    def pid(self) -> int:
        """The process id, which is also its group's."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return not self._has_exited()

    @property
    def printed(self) -> str:
        """The last line that the process printed, made printable; empty if it printed nothing."""
        lines = self.printed_lines(1)
        return lines[0] if lines else ""

    def printed_lines(self, most: int) -> list[str]:
        """Return the last lines that the process printed, made printable, without the empty ones."""
        text = bytes(self._printed).decode(errors="backslashreplace")
        return [clipped(line.strip()) for line in text.splitlines() if line.strip()][-most:]

    @property
    def unfinished(self) -> bytes:
        """The bytes that came without an end of line yet."""
        return bytes(self._unread)

    def keep_printed(self, data: bytes) -> None:
        """Take what the process printed; only the last of it is kept."""
        self.printed_bytes += len(data)
        self._printed += data
        del self._printed[:-_KEPT_BYTES]

    def write(self, data: bytes) -> None:
        """Send data, as far as the pipe takes it at once; the rest goes while the answer is waited for."""
        self._pending += data
        self._write_pending()
        if self._pending and self._input not in self._selector.get_map():
            self._selector.register(self._input, selectors.EVENT_WRITE, self._write_pending)

    def read_line(self, timeout_s: float, most_bytes: int = _MOST_LINE_BYTES) -> bytes:
        """Wait for the next line.

        Args:
            timeout_s: seconds until the process is ended.
            most_bytes: the length of a line at which it is ended.

        Raises:
            ProcessError: if there is none; the process and its group are dead afterwards.
        """
        return self._taken(timeout_s, self._take_line, most_bytes)

    def await_line(self, timeout_s: float) -> None:
        """Wait until a line is there, or until none will come; nothing is taken, so that Ctrl-C loses nothing here."""
        deadline = time.monotonic() + timeout_s
        while not (self._has_line() or self._closed or self._exited) and self._wait(deadline):
            pass

    def read_bytes(self, count: int, timeout_s: float) -> bytes:
        """Wait for as many bytes as a line announced; see `read_line`."""
        return self._taken(timeout_s, lambda: self._take_bytes(count), count)

    def _taken(self, timeout_s: float, take: Callable[[], bytes | None], most_bytes: int) -> bytes:
        deadline = time.monotonic() + timeout_s
        while (data := take()) is None:
            if len(self._unread) > most_bytes:
                raise self._killed(f"wrote {len(self._unread)} bytes without an end of line", "garbled")
            if self._closed or self._exited:
                self._drain()
                if (data := take()) is None:
                    raise self._ended()
                break
            if not self._wait(deadline):
                raise self._killed(f"gave no answer within {timeout_s:g} s", "timeout")
        return data

    def lines_left(self) -> list[bytes]:
        """Kill the process and return the lines that it had written and that were not read."""
        self.kill()
        self._drain()
        return list(iter(self._take_line, None))

    def _gather(self) -> None:
        while self._arrived:
            self._unread += self._arrived[0]
            del self._arrived[0]

    def _take_bytes(self, count: int) -> bytes | None:
        self._gather()
        if len(self._unread) < count:
            return None
        data = bytes(self._unread[:count])
        del self._unread[:count]
        self._searched = 0
        return data

    def _has_line(self) -> bool:
        self._gather()
        end = self._unread.find(b"\n", self._searched)
        self._searched = len(self._unread) if end < 0 else end
        return end >= 0

    def _take_line(self) -> bytes | None:
        if not self._has_line():
            return None
        end = self._unread.index(b"\n", self._searched)
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        self._searched = 0
        return line

    def _wait(self, deadline: float) -> bool:
        """Wait until anything happens; return False when the time is up."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        if self._end is None and self._has_exited():
            self._exited = True
            return True
        # A day-long limit is more than some kernels take at once.
        for key, _ in self._selector.select(min(remaining, _POLL_S if self._end is None else 3600.0)):
            key.data()
        return True

    def _notice_exit(self) -> None:
        self._exited = True
        if self._end is not None:
            self._selector.unregister(self._end)

    def _read_answers(self) -> bool:
        # Ctrl-C may raise between any two steps of Python, and bytes that were read must not be lost to it: one step
        # reads and keeps them.
        try:
            self._arrived.extend(map(os.read, (self._output,), (_CHUNK_BYTES,)))
        except BlockingIOError:
            return False
        if self._arrived[-1]:
            return True
        if self._output in self._selector.get_map():
            self._selector.unregister(self._output)
        self._closed = True
        return False

    def _read_printed(self) -> bool:
        data = self._read(self._errors)
        self.keep_printed(data)
        return bool(data)

    def _read(self, descriptor: int) -> bytes:
        """Read what is there; a pipe that was closed at its other end is not watched any more."""
        try:
            data = os.read(descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            return b""
        if not data and descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)
        return data

    def _write_pending(self) -> None:
        try:
            while self._pending:
                del self._pending[: os.write(self._input, self._pending)]
        except BlockingIOError:
            return
        except BrokenPipeError:
            # It reads no more; why, its end will tell.
            self._pending.clear()
        if self._input in self._selector.get_map():
            self._selector.unregister(self._input)

    def _drain(self) -> None:
        """Read what the pipes still hold; something left behind may go on writing, so that there is an end to it."""
        deadline = time.monotonic() + _ENDING_S
        # Both are read each time: "or" would leave the second pipe to the end of the first.
        while any([self._read_answers(), self._read_printed()]) and time.monotonic() < deadline:
            pass

    def _has_exited(self) -> bool:
        """Look without reaping: until then the process id, and with it the group's, belongs to no other process."""
        if self._reaped or self._process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except (AttributeError, ChildProcessError):
            return self._process.poll() is not None

    def _killed(self, happened: str, kind: str) -> ProcessError:
        self.kill()
        return ProcessError(self._who, happened, kind, self.printed)

    def _ended(self) -> ProcessError:
        """Say how the process ended; it is given a moment, since its own status says more than our signal."""
        deadline = time.monotonic() + _ENDING_S
        while not self._exited and self._wait(deadline):
            pass
        by_itself = self._has_exited()
        self._drain()
        self.kill()
        status = self._process.returncode if by_itself else None
        happened = "closed its connection" if status is None else f"ended with status {status}"
        happened += f" ({signal_name(status)})" if status is not None and status < 0 else ""
        return ProcessError(self._who, happened, "ended", self.printed, status)

    def kill(self) -> None:
        """End the process, its group, and what left the group but still carries the mark in its environment."""
        if self._reaped:
            return
        # The group first, and even if the process has ended: it is not reaped yet, so that the number is still its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        # A process that hangs in the kernel cannot be waited for; nothing else can be done about it either.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_KILLED_S)
        self._reaped = True
        kill_marked(self._mark)

    def end(self, grace_s: float = _ENDING_S) -> None:
        """Close the connection, let the process end by itself for a moment, kill the rest and free everything."""
        try:
            self._pending.clear()
            if self._input in self._selector.get_map():
                self._selector.unregister(self._input)
            self._pipes[0].close()
            deadline = time.monotonic() + grace_s
            while not self._reaped and not self._exited and self._wait(deadline):
                pass
        finally:
            self.kill()
            self._selector.close()
            for pipe in self._pipes:
                pipe.close()
            if self._end is not None:
                os.close(self._end)
                self._end = None


def signal_name(status: int) -> str:
    """Return the name of the signal that a negative exit status stands for, or its number where it has no name."""
    try:
        return signal.Signals(-status).name
    except ValueError:
        return str(-status)


def kill_marked(mark: str) -> None:
    """Kill every process whose environment has the mark: one that made itself a daemon has left its group."""
    variable = f"{MARK_VARIABLE}={mark}".encode()
    # A killed process may have started another one meanwhile.
    for _ in range(3):
        found = [path for path in Path("/proc").glob("[0-9]*/environ") if variable in _environment_of(path)]
        if not found:
            return
        for path in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(path.parent.name), signal.SIGKILL)


def _environment_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
