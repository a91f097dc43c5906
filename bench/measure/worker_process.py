"""The coordinator's end of a worker: starts it, asks it with a time limit, and notices when it dies."""

import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.measure.protocol import Message, RequestError, decode, encode, one_line
from bench.measure.worker import CPUS_VARIABLE
from parity_tests.harness.files import ScratchFolder

CHECKOUT = Path(__file__).resolve().parents[2]
_READ_BYTES = 65536
# How a process that could not have more memory says so in its last line, whatever it is written in.
_OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "annot allocate memory", "ut of memory", "RESOURCE_EXHAUSTED")
_KERNEL_COUNTERS = Path("/proc/vmstat")


def _memory_kills() -> int:
    """How many processes the kernel has ended for want of memory since it started; 0 where it does not say."""
    try:
        lines = _KERNEL_COUNTERS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def worker_environment(framework: str, *, device: str, division: str, cpus: Sequence[int]) -> dict[str, str]:
    """Environment variables of a worker: everything that must be set before a framework is imported.

    Args:
        framework: ``torch`` or ``jax``.
        device: ``auto``, ``cpu`` or ``cuda``.
        division: in ``matched``, XLA may not keep excess precision and JAX does not run ahead on a CPU.
        cpus: the processors that both frameworks may use.
    """
    found = dict(os.environ)
    path = [str(CHECKOUT), *filter(None, [found.get("PYTHONPATH")])]
    found |= {"PYTHONPATH": os.pathsep.join(path), CPUS_VARIABLE: ",".join(map(str, cpus)), "PYTHONUNBUFFERED": "1"}
    if cpus:
        found |= {"OMP_NUM_THREADS": str(len(cpus)), "MKL_NUM_THREADS": str(len(cpus))}
    if framework == "jax":
        found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        if device == "cpu":
            found["JAX_PLATFORMS"] = "cpu"
        if division == "matched":
            found["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
            flags = [found.get("XLA_FLAGS", ""), "--xla_allow_excess_precision=false"]
            found["XLA_FLAGS"] = " ".join(filter(None, flags))
    return found


class WorkerProcess:
    """A running worker.

    Args:
        command: its argument vector.
        environment: its environment variables.

    Raises:
        RequestError: if the command cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        # A file and not a pipe: nobody reads it while the worker runs, and a full pipe would stop it.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed with the worker
        # What a worker leaves there, compile caches above all, goes with it, whichever way it ends.
        self._scratch = ScratchFolder("worker")
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**environment, "TMPDIR": self._scratch.name},
                cwd=CHECKOUT,
                # Ctrl-C is the coordinator's to handle: it ends its workers itself, after the records are safe.
                start_new_session=True,
            )
        except OSError as error:
            self._stderr.close()
            self._scratch.cleanup()
            raise RequestError("crash", f"{command[0]} cannot be started ({error.strerror})") from error
        self._buffer = b""
        self._memory_kills = _memory_kills()

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def request(self, message: Message, timeout_s: float) -> Message:
        """Sends a request and waits for its reply.

        Raises:
            RequestError: with the worker's own status; ``timeout`` if no reply came in time, ``crash`` if the process
                ended. In the last two cases it is dead afterwards.
        """
        self.send(message)
        reply = self.receive(timeout_s)
        if not reply.get("ok"):
            raise RequestError(str(reply.get("status", "crash")), str(reply.get("reason", "no reason given")))
        return reply

    def send(self, message: Message) -> None:
        """Sends a request without waiting, so that two workers can start at the same time."""
        stream = self._process.stdin
        try:
            if stream is None:
                raise BrokenPipeError
            stream.write(encode(message))
            stream.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def receive(self, timeout_s: float) -> Message:
        """Waits for the reply to the oldest request that has none; see ``request``."""
        stream = self._process.stdout
        if stream is None:
            raise RequestError("crash", "the worker has no output pipe")
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                raise RequestError("timeout", f"no answer within {timeout_s:g} s")
            data = os.read(stream.fileno(), _READ_BYTES)
            if not data:
                raise self._ended()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            return decode(line)
        except RequestError:
            # From here on nobody knows which reply belongs to which request.
            self.kill()
            raise

    def _ended(self) -> RequestError:
        """Why the process ended, with the last line that it wrote to stderr: ``oom`` if memory ran out, else ``crash``.

        The kernel sends the signal of ``kill -9`` to who takes the last memory, and counts that.
        """
        self.kill()
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else ""
        killed_for_memory = code == -signal.SIGKILL and _memory_kills() > self._memory_kills
        if killed_for_memory:
            how += ", sent by the kernel because memory ran out"
        status = "oom" if killed_for_memory or any(words in last for words in _OUT_OF_MEMORY) else "crash"
        return RequestError(status, one_line(f"the worker process ended with {how}" + (f": {last}" if last else "")))

    def kill(self) -> None:
        """Ends the process, unless it is ending by itself: then its own exit status says more than our signal."""
        try:
            self._process.wait(timeout=0.5 if self._closed() else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _closed(self) -> bool:
        """Whether the process closed its output."""
        stream = self._process.stdout
        if stream is None:
            return True
        ready, _, _ = select.select([stream], [], [], 0)
        return bool(ready) and not os.read(stream.fileno(), _READ_BYTES)

    def close(self) -> None:
        """Asks the worker to quit, and kills it if it does not."""
        try:
            self.send({"operation": "quit"})
            self._process.wait(timeout=2)
        except (RequestError, subprocess.TimeoutExpired):
            self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        self._scratch.cleanup()
