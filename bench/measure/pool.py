"""The workers of a run: one process per framework, replaced when it dies."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.measure.protocol import MISSING, Message, RequestError
from bench.measure.worker_process import WorkerProcess, worker_environment
from bench.plan.competitors import FRAMEWORKS, Catalogue

START_S = 180.0
Starter = Callable[[str], WorkerProcess]


def starter(
    pythons: Mapping[str, str], *, device: str, division: str, cpus: Sequence[int]
) -> Callable[[str], WorkerProcess]:
    """Returns a function that starts the worker of a framework.

    Args:
        pythons: framework to interpreter; the running one where a framework is not named.
        device: `auto`, `cpu` or `cuda`.
        division: decides the environment variables.
        cpus: the processors that the workers may use.
    """

    def start(framework: str) -> WorkerProcess:
        command = [pythons.get(framework, sys.executable), "-m", "bench.measure.worker", framework]
        return WorkerProcess(command, worker_environment(framework, device=device, division=division, cpus=cpus))

    return start


def _first_reply(framework: str, worker: WorkerProcess) -> Message:
    """Waits for a worker's first reply; says whose it is if there is none."""
    try:
        return worker.receive(START_S)
    except RequestError as error:
        raise RequestError(error.status, f"the {framework} worker: {error.reason}") from None


class WorkerPool:
    """Starts the workers together and keeps one per framework.

    Args:
        start: starts the worker of a framework.
        frameworks: which to start.

    Attributes:
        hello: per framework that is there, what its worker said about itself.
        missing: per framework that is not installed, the reason.

    Raises:
        RequestError: if a framework is installed but its worker cannot start.
    """

    def __init__(self, start: Starter, frameworks: Sequence[str] = FRAMEWORKS):
        self._start = start
        self._workers: dict[str, WorkerProcess] = {}
        self.hello: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}
        try:
            for framework in frameworks:
                self._workers[framework] = start(framework)
            # Importing is not measured: both may do it at the same time.
            for worker in self._workers.values():
                worker.send({"operation": "hello"})
            for framework, worker in list(self._workers.items()):
                reply = _first_reply(framework, worker)
                if reply.get("ok"):
                    self.hello[framework] = reply
                elif reply.get("status") == MISSING:
                    self.missing[framework] = str(reply["reason"])
                    self._workers.pop(framework).close()
                else:
                    raise RequestError(str(reply.get("status")), f"the {framework} worker: {reply.get('reason')}")
        except BaseException:
            self.close()
            raise

    def catalogues(self) -> tuple[Catalogue, ...]:
        """What the workers can run, torch first."""
        found = []
        for hello in self.hello.values():
            values = hello["catalogue"]
            lists = {name: tuple(values[name]) for name in ("implementations", "stock", "yardsticks")}
            # A worker with an older checkout may know of no missing ones.
            found.append(Catalogue(values["framework"], **lists, missing=dict(values.get("missing", {}))))
        return tuple(found)

    def request(self, framework: str, message: Message, timeout_s: float) -> Message:
        """Asks the worker of a framework; see `WorkerProcess.request`."""
        return self._workers[framework].request(message, timeout_s)

    def pids(self) -> dict[str, int]:
        """Framework to the process id of its worker."""
        return {framework: worker.pid for framework, worker in self._workers.items()}

    def alive(self, framework: str) -> bool:
        """Whether the worker of a framework still runs."""
        return self._workers[framework].alive

    def replace(self, framework: str) -> None:
        """Starts a new worker in place of one that died.

        Raises:
            RequestError: if the new one cannot start either.
        """
        self._workers[framework].close()
        self._workers[framework] = self._start(framework)
        self._workers[framework].request({"operation": "hello"}, START_S)

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
