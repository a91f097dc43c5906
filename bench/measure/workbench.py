"""What a worker does, whatever its framework: holds the competitors of one cell, judges them and times their blocks."""

import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.measure.blocks import BlockSize, time_block, warm_up
from bench.measure.clocks import run_for
from bench.measure.cuda_packages import cuda_packages, installed_distributions
from bench.measure.memory import free_bytes
from bench.measure.probes import ceilings_of, probed
from bench.measure.protocol import Message
from bench.measure.switches import recorded
from bench.measure.timer import Prepared, Task, Timer, Unsupported
from bench.measure.verification import Judgement, Oracle, Verifier, inputs_digest, results_digest
from bench.plan.cells import Cell
from bench.plan.competitors import YARDSTICK
from bench.plan.costs import buffer_sets
from bench.plan.workloads import Workload
from parity_tests.judge.inputs import draw_inputs

_CALLS_BEFORE_TIMING = 3
_GIVE_UP = 10  # one call this many times over the limit is no disturbance, and is not repeated
# Inputs are drawn in float64, rounded to the storage dtype, and copied to the device.
_BYTES_AN_ELEMENT = 16
_ONE_CALL = BlockSize(1, 1)


@dataclass
class _Held:
    """A prepared competitor."""

    task: Task
    prepared: Prepared
    verifier: Verifier
    promised: str
    right_digest: str | None = None
    judgement: Judgement | None = None
    first_result: Any = None
    result_bytes: int = 0
    size: BlockSize = _ONE_CALL


def _check_compiled(held: _Held) -> None:
    """Refuses a compiled mode in which Python ran the function: its time would be that of another mode.

    Raises:
        Unsupported: if it did.
    """
    count = 0 if held.prepared.uncompiled_calls is None else held.prepared.uncompiled_calls()
    if count:
        raise Unsupported(
            f"{held.task.mode} did not compile it: Python ran the function in {count} calls; a switch of the framework "
            "turns compilation off, or the compiler gave up"
        )


class Workbench:
    """The operations behind the worker's requests; each method takes a request and returns the fields of its reply."""

    def __init__(self, timer: Timer):
        self._timer = timer
        self._held: dict[str, _Held] = {}
        self._cell: Cell | None = None
        self._seed = 0
        self._ceilings: dict[str, dict[str, float]] = {}
        self._oracles: dict[tuple[Workload, str, int, bool], Oracle] = {}
        self._feeds: dict[bool, tuple[list[tuple[Any, ...]], Verifier]] = {}

    def operations(self) -> dict[str, Callable[[Message], Message]]:
        """Request name to method."""
        return {
            "hello": self.hello,
            "open_cell": self.open_cell,
            "prepare": self.prepare,
            "check": self.check,
            "memory": self.memory,
            "probe": self.probe,
            "run_for": self.run_for,
            "ceilings": self.ceilings,
            "warm_up": self.warm_up,
            "block": self.block,
            "drop": self.drop,
        }

    def hello(self, request: Message) -> Message:
        """What this worker can do, and the switches before anyone touched them."""
        timer = self._timer
        if refused := timer.refusals():
            raise Unsupported(
                f"{', '.join(refused)} is on when the process starts, and what is measured would not be what its row "
                f"says; find the start-up file (sitecustomize, usercustomize) of {sys.executable} that sets it"
            )
        return {
            "catalogue": asdict(timer.catalogue()),
            "devices": timer.devices(),
            "environment": timer.environment(),
            "python": platform.python_version(),
            "variables": recorded(os.environ),
            "default_switches": timer.switches(),
            "cuda_packages": cuda_packages(installed_distributions()),
        }

    def open_cell(self, request: Message) -> Message:
        """Forgets the last cell, sets the switches and draws the inputs."""
        self._held.clear()
        self._feeds.clear()
        gc.collect()
        values = dict(request["cell"])
        self._cell = Cell(**{**values, "workload": Workload(**values["workload"])})
        self._seed = request["seed"]
        self._timer.configure(self._cell.precision, self._cell.division, self._cell.device)
        needed, free = _BYTES_AN_ELEMENT * self._cell.workload.elements, free_bytes()
        if needed > free:
            raise Unsupported(
                f"the inputs take about {needed / 2**30:.1f} GiB to draw, and {free / 2**30:.1f} GiB are free"
            )
        digest = inputs_digest(self._oracle(dense=False).inputs)
        return {"inputs_digest": digest, "switches": self._timer.switches(), "free_bytes": self._timer.free_bytes()}

    def _oracle(self, *, dense: bool) -> Oracle:
        """The inputs with their truth; those of the last workload are kept, because its other direction comes next."""
        assert self._cell is not None  # open_cell comes first: the coordinator's contract
        key = (self._cell.workload, self._cell.dtype, self._seed, dense)
        if key not in self._oracles:
            self._oracles = {known: oracle for known, oracle in self._oracles.items() if known[:3] == key[:3]}
            case = self._cell.workload.dense_case() if dense else self._cell.workload.case()
            self._oracles[key] = Oracle(draw_inputs(case, self._cell.dtype, self._seed))
        return self._oracles[key]

    def _feed(self, *, dense: bool) -> tuple[list[tuple[Any, ...]], Verifier]:
        """Arguments on the device, shared by all competitors of the cell, with the verifier of the same numbers."""
        if dense not in self._feeds:
            assert self._cell is not None
            cell, oracle = self._cell, self._oracle(dense=dense)
            count = buffer_sets(cell, self._timer.cache_bytes())
            buffers = [self._timer.arguments(oracle.inputs, cell.workload.layout) for _ in range(count)]
            self._feeds[dense] = (buffers, Verifier(oracle, cell.direction, cell.optimizer))
        return self._feeds[dense]

    def prepare(self, request: Message) -> Message:
        """Builds, compiles and calls a competitor; replies with the duration of one call after that."""
        assert self._cell is not None
        cell = self._cell
        buffers, verifier = self._feed(dense=request["kind"] == YARDSTICK)
        name = request["implementation"]
        task = Task(name, request["mode"], cell.direction, cell.workload.layout, cell.optimizer)
        prepared = self._timer.prepare(task, buffers)
        held = _Held(task, prepared, verifier, self._timer.promised_precision(name))
        self._held[request["handle"]] = held
        durations = []
        for _ in range(_CALLS_BEFORE_TIMING):
            start = time.perf_counter()
            result = prepared.call()
            self._timer.wait(result)
            durations.append(time.perf_counter() - start)
            held.first_result = result
            if durations[-1] > _GIVE_UP * request["call_limit_s"]:
                break
        _check_compiled(held)
        return {
            "call_s": min(durations),
            "compile_s": prepared.compile_s,
            "static_memory_bytes": prepared.static_memory_bytes,
        }

    def _judge(self, held: _Held, result: Any) -> Judgement:
        if held.prepared.restart is not None:
            # After any number of steps only rounding would be judged: the first step is taken again.
            held.prepared.restart()
            result = held.prepared.call()
        outputs = self._timer.to_numpy(result, held.task)
        digest = results_digest(outputs)
        held.result_bytes = sum(array.nbytes for array in outputs.values())
        # The same bits as a result that was judged before have the same judgement.
        if held.judgement is None or digest != held.right_digest:
            held.judgement = held.verifier.judge(outputs, held.promised)
            held.right_digest = digest
        return held.judgement

    def check(self, request: Message) -> Message:
        """Judges the results of the last call of `prepare`."""
        held = self._held[request["handle"]]
        result, held.first_result = held.first_result, None
        return {"judgement": asdict(self._judge(held, result))}

    def memory(self, request: Message) -> Message:
        """Measures the peak memory of one call; small results may fit into pages that the process holds already."""
        held = self._held[request["handle"]]
        peak, method = self._timer.peak_memory(held.prepared)
        if peak is not None:
            peak = max(peak, held.result_bytes, held.prepared.static_memory_bytes or 0)
        return {"peak_memory_bytes": peak, "memory_method": method}

    def probe(self, request: Message) -> Message:
        """The other clocks, apart from the timed blocks: single calls, enqueueing, tracing, compiling again."""
        assert self._cell is not None
        return probed(self._timer, self._held[request["handle"]].prepared, self._cell, request["budget_s"])

    def run_for(self, request: Message) -> Message:
        """Runs calls for some time, while the coordinator reads the device's energy before and after."""
        held = self._held[request["handle"]]
        call, wait = held.prepared.call, self._timer.wait
        return {"calls": run_for(call, wait, seconds=request["seconds"], calls_at_a_time=request["calls"])}

    def ceilings(self, request: Message) -> Message:
        """The rates of a large product and of a large copy, on this device and in this cell's precision."""
        assert self._cell is not None
        if self._cell.precision not in self._ceilings:
            self._ceilings[self._cell.precision] = ceilings_of(self._timer)
        return dict(self._ceilings[self._cell.precision])

    def warm_up(self, request: Message) -> Message:
        """Finds how many calls fill a block, then runs blocks until they no longer get faster."""
        held = self._held[request["handle"]]
        call, wait = held.prepared.call, self._timer.wait
        held.size, blocks = warm_up(call, wait, request["block_s"], request["max_blocks"])
        return {"calls_per_block": held.size.calls, "block_latency_s": blocks}

    def block(self, request: Message) -> Message:
        """Times one block; judges the result of its last call where the request says so."""
        held = self._held[request["handle"]]
        # The coordinator's number of calls: a worker that replaced another may have found another size.
        size = replace(held.size, calls=request["calls"])
        call, wait = held.prepared.call, self._timer.wait
        elapsed, result = time_block(call, wait, size, after_other=request["after_other"])
        reply: Message = {"block_latency_s": elapsed}
        if request["verify"]:
            _check_compiled(held)
            reply["judgement"] = asdict(self._judge(held, result))
        return reply

    def drop(self, request: Message) -> Message:
        """Forgets a competitor."""
        self._held.pop(request["handle"], None)
        return {}
