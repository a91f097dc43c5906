"""The framework processes of a run: one worker per framework, asked with a time limit and replaced when it dies.

A request is `{"operation": name, ...}`. A reply is `{"ok": true, ...}` or `{"ok": false, "status": s, "reason": r}`,
with a status that a record may end in, or `missing` where the framework is not installed. Both ends import this file,
and a worker's interpreter may have nothing but NumPy and its framework: it needs the standard library only.
"""

import math
import os
import signal
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Self

from bench.measure.switches import without_unset
from bench.plan.competitors import FRAMEWORKS, Catalogue
from parity_tests.interpreters.interpreter import Interpreter, Message
from parity_tests.interpreters.process import ProcessError, signal_name
from parity_tests.report.files import ScratchFolder

CHECKOUT = Path(__file__).resolve().parents[2]
CPUS_VARIABLE = "PARTITIONED_LINEAR_BENCH_CPUS"
MISSING = "missing"
START_S = 180.0
KEEP_S = 60.0
# The last line of a process that could get no more memory, in whatever language it is written.
_OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "annot allocate memory", "ut of memory", "RESOURCE_EXHAUSTED")
_KERNEL_COUNTERS = Path("/proc/vmstat")


class OutOfTimeError(Exception):
    """The end of a run's budget, in the middle of something."""


class RequestError(Exception):
    """A request that ended with a status other than ok."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


def failure(status: str, reason: str) -> Message:
    """Return the reply to a request that did not succeed."""
    return {"ok": False, "status": status, "reason": one_line(reason)}


def one_line(text: str, limit: int = 300) -> str:
    """Return the text on one line, shortened to `limit` characters."""
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else joined[: limit - 3] + "..."


def worker_environment(framework: str, *, device: str, division: str, cpus: Sequence[int]) -> dict[str, str]:
    """Return the environment variables of a worker: everything that must be set before a framework is imported.

    Switches that falsify a mode, a precision or a clock are not passed on; see `switches.UNSET`.

    Args:
        framework: `torch` or `jax`.
        device: `auto`, `cpu` or `cuda`.
        division: in `matched`, XLA may not keep excess precision and JAX does not run ahead on a CPU.
        cpus: the processors that both frameworks may use.
    """
    found = without_unset(os.environ) | {CPUS_VARIABLE: ",".join(map(str, cpus))}
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
    """A running worker: an interpreter in the checkout, with a temporary folder of its own.

    Args:
        framework: `torch` or `jax`.
        environment: its environment variables.
        python: its interpreter; None for this one.
        module: its `main(channel, framework)` answers the requests.

    Raises:
        RequestError: if the interpreter cannot be started.
    """

    def __init__(
        self,
        framework: str,
        environment: Mapping[str, str],
        *,
        python: str | None = None,
        module: str = "bench.measure.workbench",
    ):
        # Whatever a worker leaves there, compile caches above all, goes with it, however it ends.
        self._scratch = ScratchFolder("worker")
        self._memory_kills = _memory_kills()
        try:
            self._interpreter = Interpreter(
                module,
                [framework],
                who="the worker process",
                python=python,
                timeout_s=START_S,
                environment={**environment, "TMPDIR": self._scratch.name},
                cwd=CHECKOUT,
            )
        except ProcessError as error:
            self._scratch.cleanup()
            if error.kind == "start":
                raise RequestError("crash", f"{python} {error.happened}") from error
            raise self._failure(error, START_S) from error
        except BaseException:
            self._scratch.cleanup()
            raise

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._interpreter.child.alive

    @property
    def pid(self) -> int:
        """Process id."""
        return self._interpreter.child.pid

    def request(self, message: Message, timeout_s: float) -> Message:
        """Send a request and wait for its reply.

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
        """Send a request without waiting, so that two workers can import their frameworks at the same time."""
        self._interpreter.send(message)

    def receive(self, timeout_s: float) -> Message:
        """Wait for the reply to the oldest request that has none; see `request`."""
        self._interpreter.timeout_s = timeout_s
        try:
            return self._interpreter.receive()
        except ProcessError as error:
            # After a line that is no message, replies could no longer be matched to requests.
            self._interpreter.kill()
            raise self._failure(error, timeout_s) from None

    def _failure(self, error: ProcessError, timeout_s: float) -> RequestError:
        """Return why there is no reply, with the last line that was printed: `oom` if memory ran out, else `crash`."""
        last, code, how = error.printed, error.status, error.happened
        if error.kind == "timeout":
            return RequestError(
                "timeout", f"no answer within {timeout_s:g} s" + (f"; it printed {last}" if last else "")
            )
        # The kernel ends the process that takes the last memory with the signal of `kill -9`, and counts that.
        killed_for_memory = code == -signal.SIGKILL and _memory_kills() > self._memory_kills
        status = "oom" if killed_for_memory or any(words in how + last for words in _OUT_OF_MEMORY) else "crash"
        if code is not None:
            how = f"ended with signal {signal_name(code)}" if code < 0 else f"ended with exit status {code}"
        if killed_for_memory:
            how += ", sent by the kernel because memory ran out"
        return RequestError(status, one_line(f"the worker process {how}" + (f": {last}" if last else "")))

    def close(self) -> None:
        """Close the connection, at which the worker ends; kill it if it does not."""
        self._interpreter.end()
        self._scratch.cleanup()


def _memory_kills() -> int:
    """Return how many processes the kernel has ended for want of memory since it started; 0 where it does not say."""
    try:
        lines = _KERNEL_COUNTERS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


Starter = Callable[[str], WorkerProcess]


def starter(pythons: Mapping[str, str], *, device: str, division: str, cpus: Sequence[int]) -> Starter:
    """Return a function that starts the worker of a framework."""

    def start(framework: str) -> WorkerProcess:
        environment = worker_environment(framework, device=device, division=division, cpus=cpus)
        return WorkerProcess(framework, environment, python=pythons.get(framework))

    return start


class WorkerPool:
    """Starts the workers together and keeps one per framework.

    Attributes:
        hello: per framework that is there, its worker's report on itself.
        missing: per framework that is not installed, the reason.

    Args:
        start: starts the worker of a framework.
        frameworks: that take part.
        left: seconds that are left for all that is asked of them.

    Raises:
        RequestError: if a framework is installed but its worker cannot start.
        OutOfTimeError: if no time was left; so do requests, and the worker that was asked is dead then.
    """

    def __init__(
        self,
        start: Starter,
        frameworks: Sequence[str] = FRAMEWORKS,
        left: Callable[[], float] = lambda: math.inf,
    ):
        self._start, self.left = start, left
        self._workers: dict[str, WorkerProcess] = {}
        self.hello: dict[str, Message] = {}
        self.missing: dict[str, str] = {}
        try:
            for framework in frameworks:
                with _named(framework):
                    self._workers[framework] = start(framework)
            # Importing is not measured: both may do it at the same time.
            for worker in self._workers.values():
                worker.send({"operation": "hello"})
            for framework, worker in list(self._workers.items()):
                with _named(framework):
                    reply = self._in_time(worker.receive, START_S)
                    if reply.get("ok"):
                        self.hello[framework] = reply
                    elif reply.get("status") == MISSING:
                        self.missing[framework] = str(reply["reason"])
                        self._workers.pop(framework).close()
                    else:
                        raise RequestError(str(reply.get("status")), str(reply.get("reason")))
        except BaseException:
            self.close()
            raise

    def catalogues(self) -> tuple[Catalogue, ...]:
        """Return the competitors that the workers can run, torch first."""
        found = []
        for hello in self.hello.values():
            values = hello["catalogue"]
            others = {"framework": values["framework"], "missing": dict(values["missing"])}
            others["only_on"] = dict(values.get("only_on", {}))
            lists = {item.name: tuple(values.get(item.name, ())) for item in fields(Catalogue)}
            found.append(Catalogue(**{**lists, **others}))
        return tuple(found)

    def first_report(self, name: str) -> str | None:
        """Return a fact of the environment from the first framework that reports it; None if none does."""
        found = [str(reply["environment"].get(name) or "") for reply in self.hello.values()]
        return next(filter(None, found), None)

    def request(self, framework: str, message: Message, timeout_s: float) -> Message:
        """Ask the worker of a framework; see `WorkerProcess.request`."""
        return self._in_time(partial(self._workers[framework].request, message), timeout_s)

    def _in_time(self, ask: Callable[[float], Message], timeout_s: float) -> Message:
        if (left := self.left()) <= 0:
            raise OutOfTimeError
        try:
            return ask(min(timeout_s, left))
        except RequestError as error:
            if error.status == "timeout" and self.left() <= 0:
                raise OutOfTimeError from None
            raise

    def pids(self) -> dict[str, int]:
        """Return framework to the process id of its worker."""
        return {framework: worker.pid for framework, worker in self._workers.items()}

    def alive(self, framework: str) -> bool:
        """Return True while the worker of a framework runs."""
        return self._workers[framework].alive

    def replace(self, framework: str) -> None:
        """Start a new worker in place of one that died.

        Raises:
            RequestError: if the new one cannot start either.
        """
        self._workers[framework].close()
        self._workers[framework] = self._start(framework)
        self.request(framework, {"operation": "hello"}, START_S)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _named(framework: str) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        raise RequestError(error.status, f"the {framework} worker: {error.reason}") from None


class KeptPool:
    """Keeps the workers of the last cell until another kind is wanted, or until none was wanted for a while.

    A device has one owner, so that one pool at a time is enough; idle workers hold memory of the device, and therefore
    end.
    """

    def __init__(self, keep_s: float = KEEP_S):
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._idle: tuple[Hashable, WorkerPool] | None = None
        self._timer: threading.Timer | None = None

    @contextmanager
    def take(self, kind: Hashable, start: Callable[[], WorkerPool]) -> Iterator[WorkerPool]:
        """Lend workers; after a failure they end, since they may be in the middle of something.

        Args:
            kind: tells workers of one sort from those of another.
            start: starts workers of this sort.
        """
        kept = self._exchange(None)
        if kept is not None and kept[0] != kind:
            kept[1].close()
            kept = None
        pool = start() if kept is None else kept[1]
        try:
            yield pool
        except BaseException:
            pool.close()
            raise
        before = self._exchange((kind, pool))
        if before is not None:
            before[1].close()

    def close(self) -> None:
        """End idle workers."""
        kept = self._exchange(None)
        if kept is not None:
            kept[1].close()

    def _exchange(self, idle: tuple[Hashable, WorkerPool] | None) -> tuple[Hashable, WorkerPool] | None:
        """Keep these workers, and return those that were kept so far."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            kept, self._idle, self._timer = self._idle, idle, None
            if idle is not None:
                self._timer = threading.Timer(self._keep_s, self._close_if_idle, (idle[1],))
                # The end of the process ends its workers as well, since they read from it.
                self._timer.daemon = True
                self._timer.start()
        return kept

    def _close_if_idle(self, pool: WorkerPool) -> None:
        with self._lock:
            # A timer that was cancelled too late must not end workers that are lent again.
            if self._idle is None or self._idle[1] is not pool:
                return
            self._idle = self._timer = None
        pool.close()
