"""One framework in one process: `python -m bench.measure.worker torch` (or `jax`), driven over its pipes.

Needs NumPy, the framework, the tree that it measures and the parity harness; none of the benchmark's own other needs.
"""

import gc
import importlib
import os
import sys
from functools import cached_property
from typing import BinaryIO

from bench.measure.protocol import MISSING, Message, decode, encode, failure
from bench.measure.timer import Timer, Unsupported
from bench.measure.workbench import Workbench
from parity_tests.interpreters.interpreter import end_with_parent
from parity_tests.judge.subjects import FRAMEWORKS, framework_available

CPUS_VARIABLE = "PARTITIONED_LINEAR_BENCH_CPUS"


def _private_stdout() -> BinaryIO:
    """Keeps the pipe for replies; whatever a library prints goes to stderr, where it cannot break the protocol."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def _pin_to_cpus() -> None:
    """Before the framework is imported, since it sizes its thread pools by what it may use then."""
    cpus = os.environ.get(CPUS_VARIABLE)
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})


class _Dispatcher:
    """Turns requests into replies; the framework is imported by the first request, so that its failure is a reply."""

    def __init__(self, framework: str):
        self._framework = framework

    @cached_property
    def _timer(self) -> Timer:
        timer = importlib.import_module(f"bench.measure.{self._framework}.timer").TIMER()
        # A framework brings a million objects that live for ever: a collection before each measurement need not look.
        gc.collect()
        gc.freeze()
        return timer

    @cached_property
    def _workbench(self) -> Workbench:
        return Workbench(self._timer)

    def reply(self, request: Message) -> Message:
        """Answers one request."""
        if not framework_available(self._framework):
            needs = "jax and flax are" if self._framework == "jax" else "torch is"
            return failure(MISSING, f"{needs} not installed in {sys.executable}")
        timer = self._timer
        try:
            return {"ok": True, **self._workbench.operations()[request["operation"]](request)}
        except Unsupported as error:
            return failure("unsupported", str(error))
        except (MemoryError, RuntimeError, ValueError, TypeError, NotImplementedError, ArithmeticError) as error:
            # A competitor may fail in any of these ways; the sentence goes into its record, the worker stays usable.
            status = "oom" if timer.is_out_of_memory(error) else "crash"
            return failure(status, f"{type(error).__name__}: {error}")


def serve(framework: str, requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers requests until `quit` or the end of the pipe."""
    dispatcher = _Dispatcher(framework)
    for line in iter(requests.readline, b""):
        request = decode(line)
        if request.get("operation") == "quit":
            break
        replies.write(encode(dispatcher.reply(request)))
        replies.flush()


def main(arguments: list[str]) -> int:
    """Runs a worker; returns its exit status."""
    if len(arguments) != 1 or arguments[0] not in FRAMEWORKS:
        print(f"usage: python -m bench.measure.worker {'|'.join(FRAMEWORKS)}", file=sys.stderr)
        return 2
    replies = _private_stdout()
    end_with_parent()
    _pin_to_cpus()
    serve(arguments[0], sys.stdin.buffer, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
