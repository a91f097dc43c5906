"""The coordinator's end of a worker: starts it, asks it with a time limit, and notices when it dies."""

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.measure.protocol import Message, RequestError, decode, encode, one_line
from bench.measure.switches import without_unset
from bench.measure.worker import CPUS_VARIABLE
from parity_tests.interpreters.process import ChildProcess, ProcessError, signal_name
from parity_tests.report.files import ScratchFolder

CHECKOUT = Path(__file__).resolve().parents[2]
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

    Switches that would make a mode, a precision or a clock a lie are not passed on; see `switches.UNSET`.

    Args:
        framework: `torch` or `jax`.
        device: `auto`, `cpu` or `cuda`.
        division: in `matched`, XLA may not keep excess precision and JAX does not run ahead on a CPU.
        cpus: the processors that both frameworks may use.
    """
    found = without_unset(os.environ)
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
    """A running worker, with the language of `protocol` over a child of `interpreters`.

    Args:
        command: its argument vector.
        environment: its environment variables.

    Raises:
        RequestError: if the command cannot be started.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        # What a worker leaves there, compile caches above all, goes with it, whichever way it ends.
        self._scratch = ScratchFolder("worker")
        variables = {**environment, "TMPDIR": self._scratch.name}
        try:
            self._child = ChildProcess(command, variables, "the worker process", cwd=CHECKOUT)
        except ProcessError as error:
            self._scratch.cleanup()
            raise RequestError("crash", f"{command[0]} {error.happened}") from error
        self._memory_kills = _memory_kills()

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._child.alive

    @property
    def pid(self) -> int:
        """Process id."""
        return self._child.pid

    def request(self, message: Message, timeout_s: float) -> Message:
        """Sends a request and waits for its reply.

        Raises:
            RequestError: with the worker's own status; `timeout` if no reply came in time, `crash` if the process
                ended. In the last two cases it is dead afterwards, with all that it started.
        """
        self.send(message)
        reply = self.receive(timeout_s)
        if not reply.get("ok"):
            raise RequestError(str(reply.get("status", "crash")), str(reply.get("reason", "no reason given")))
        return reply

    def send(self, message: Message) -> None:
        """Sends a request without waiting, so that two workers can start at the same time."""
        self._child.write(encode(message))

    def receive(self, timeout_s: float) -> Message:
        """Waits for the reply to the oldest request that has none; see `request`."""
        try:
            return decode(self._child.read_line(timeout_s))
        except ProcessError as error:
            raise self._failure(error, timeout_s) from None
        except RequestError:
            # From here on nobody knows which reply belongs to which request.
            self.kill()
            raise

    def _failure(self, error: ProcessError, timeout_s: float) -> RequestError:
        """Says why there is no reply, with the last line that was printed: `oom` if memory ran out, else `crash`.

        The kernel sends the signal of `kill -9` to who takes the last memory, and counts that.
        """
        last, code = error.printed, error.status
        if error.kind == "timeout":
            return RequestError(
                "timeout", f"no answer within {timeout_s:g} s" + (f"; it printed {last}" if last else "")
            )
        killed_for_memory = code == -signal.SIGKILL and _memory_kills() > self._memory_kills
        status = "oom" if killed_for_memory or any(words in last for words in _OUT_OF_MEMORY) else "crash"
        how = error.happened
        if code is not None:
            how = f"ended with signal {signal_name(code)}" if code < 0 else f"ended with exit status {code}"
        if killed_for_memory:
            how += ", sent by the kernel because memory ran out"
        return RequestError(status, one_line(f"the worker process {how}" + (f": {last}" if last else "")))

    def kill(self) -> None:
        """Ends the process and all that it started."""
        self._child.kill()

    def close(self) -> None:
        """Asks the worker to quit, and kills it if it does not."""
        self.send({"operation": "quit"})
        self._child.end()
        self._scratch.cleanup()
