"""PyTorch with the partitions divided over processes: the subject, and the processes that it keeps.

A process group has one size for its life, so the processes are started anew when another number of partitions asks for
another size; between calls of the same size they stay.
"""

import atexit
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parity_tests.frameworks.torch.shard import serve
from parity_tests.frameworks.torch.subject import TorchSubject
from parity_tests.judge.cases import Case
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.modes import shards_of
from parity_tests.report.files import ScratchFolder

_TIMEOUT_S = 120.0
_LOOK_S, _END_S = 0.5, 10.0
_MOST_OF_A_SOCKET = 100


@functools.cache
def _context() -> Any:
    """How processes are started: never forked from this one, whose thread pools a child may hang in.

    A server that has imported PyTorch and done nothing yet forks them: eight start-ups cost little more than one.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([serve.__module__])
    return context


@functools.cache
def _folder() -> ScratchFolder:
    """Of this process, for the files through which groups find themselves, and for the socket of the server."""
    folder = ScratchFolder("shards", at_exit=False)
    # After the one that multiprocessing removes in it, with a priority of -100.
    util.Finalize(None, folder.cleanup, exitpriority=-200)
    return folder


@contextlib.contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Makes `tempfile` put into a folder what others ask it for: the server's socket outlives a killed process.

    A socket's name has some hundred characters at most: where the folder's is long, it stays where it was.
    """
    fits = len(os.fsencode(folder)) + len("/pymp-xxxxxxxx/listener-xxxxxxxx") < _MOST_OF_A_SOCKET
    before, tempfile.tempdir = tempfile.tempdir, folder if fits else tempfile.tempdir
    try:
        yield
    finally:
        tempfile.tempdir = before


class _Shards:
    """Processes of one group; every one is sent each task, the first one answers with whole tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = _context()
        store = str(Path(_folder().name) / f"store-{uuid.uuid4().hex}")
        self._ends, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, store, theirs), daemon=True)
            with _temporary_files_in(_folder().name):
                process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, task: tuple[Any, ...]) -> dict[str, np.ndarray]:
        """Sends a task to every process and returns the first one's answer.

        Raises:
            RuntimeError: if there is none in time, a process has ended, or the task failed; one sentence.
        """
        answers: list[Any] = []
        # Sending waits for a reader and an answer comes in parts: in a thread, both together have one time limit.
        thread = threading.Thread(target=self._exchange, args=(task, answers), daemon=True)
        thread.start()
        deadline = time.monotonic() + _TIMEOUT_S
        while thread.is_alive() and time.monotonic() < deadline and all(p.is_alive() for p in self._processes):
            thread.join(_LOOK_S)
        # What was answered by a process that has ended since counts.
        thread.join(0 if thread.is_alive() and all(p.is_alive() for p in self._processes) else _LOOK_S)
        if not answers or isinstance(answers[0], OSError | EOFError):
            codes = [process.exitcode for process in self._processes if process.exitcode is not None]
            close_shards()
            what = f"the end of a process (status {codes[0]})" if codes else "none"
            raise RuntimeError(
                f"shards: expected an answer within {_TIMEOUT_S:g} s, got {what}; see the processes' stderr."
            )
        if isinstance(answers[0], str):
            raise RuntimeError(f"shards: expected tensors, got the error {answers[0]}")
        return answers[0]

    def _exchange(self, task: tuple[Any, ...], answers: list[Any]) -> None:
        try:
            for end in self._ends:
                end.send(task)
            answers.append(self._ends[0].recv())
        except (EOFError, OSError) as error:
            answers.append(error)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(_END_S)


_running: list[_Shards] = []


def close_shards() -> None:
    """Ends the processes, if any run."""
    while _running:
        _running.pop().close()


@functools.cache
def _close_at_exit() -> None:
    atexit.register(close_shards)


def _shards(size: int) -> _Shards:
    if not _running or _running[0].size != size:
        close_shards()
        _close_at_exit()
        _running.append(_Shards(size))
    return _running[0]


@dataclass(frozen=True)
class ShardedTorchSubject:
    """A subject with its partitions divided over processes; see `base.Subject`.

    Where the implementation runs on DTensors the whole layer is sharded, as a user would have it. Where it does not,
    each process calls it with its own partitions as ordinary tensors, and only the results are put together.
    """

    source: TorchSubject
    framework: str = "torch"
    mode: str = "sharded"

    @property
    def implementation(self) -> str:
        """The name of what each process calls."""
        return self.source.implementation

    @property
    def isolates_partitions(self) -> bool:
        """As without shards; between two processes everything is isolated."""
        return self.source.isolates_partitions

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """One sentence if nothing can be divided here, else None."""
        device = self.source.device.type
        if device != "cpu":
            return f"mode sharded: expected processes on CPUs, got {device}; use --device cpu."
        if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
            return "mode sharded: this PyTorch was built without gloo."
        shards = shards_of(case.num_partitions)
        if shards == 1:
            return f"mode sharded: {case.num_partitions} partitions are divided by no number of devices at hand."
        own = dataclasses.replace(case, num_partitions=case.num_partitions // shards)
        return self.source.unsupported_reason(own, dtype)

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Returns y."""
        return self._run(inputs, gradients=False)["y"]

    def vjp(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Returns y, dx, dweight and dbias."""
        return self._run(inputs, gradients=True)

    def _run(self, inputs: Inputs, gradients: bool) -> dict[str, np.ndarray]:
        return _shards(shards_of(len(inputs.weight))).run((self.implementation, inputs, gradients))
