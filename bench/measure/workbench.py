"""The worker's end: holds the competitors of one cell, judges them and times their blocks, whatever the framework.

Run as `python -m parity_tests.interpreters bench.measure.workbench torch` (or `jax`). Needs NumPy, the framework, the
tree that it measures and the parity harness; nothing else that the benchmark needs.
"""

import gc
import importlib
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from bench.measure.blocks import BlockSize, measure_single_calls, run_for, shortest_call_s, time_block, warm_up
from bench.measure.machine import free_bytes, large_pages
from bench.measure.switches import cuda_packages, installed_distributions, recorded
from bench.measure.timer import Prepared, Task, Timer, Unsupported
from bench.measure.verification import Judgement, Oracle, Verifier, inputs_digest, results_digest
from bench.measure.workers import CPUS_VARIABLE, MISSING, failure
from bench.plan.cells import Cell
from bench.plan.competitors import YARDSTICK
from bench.plan.costs import buffer_sets, least_product_flops
from bench.plan.workloads import Workload
from parity_tests.interpreters.interpreter import Channel, Message
from parity_tests.judge.inputs import draw_inputs
from parity_tests.judge.subjects import framework_available

# The frameworks count differently around the edges (padding, fused additions); a product left out is a third.
_COUNTED_FRACTION = 0.9
_CALLS_BEFORE_TIMING = 3
_GIVE_UP = 10  # one call this many times over the limit is no disturbance, and is not repeated
# Inputs are drawn in float64, rounded to the storage dtype, and copied to the device.
_BYTES_AN_ELEMENT = 16
_ONE_CALL = BlockSize(1, 1)
_OPERATIONS = ("hello", "open_cell", "prepare", "check", "memory", "probe", "run_for", "ceilings")
_OPERATIONS += ("warm_up", "block", "drop")


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

    def check_compiled(self) -> None:
        """Refuse a compiled mode in which Python ran the function: its time would be that of another mode.

        Raises:
            Unsupported: if it did.
        """
        count = 0 if self.prepared.uncompiled_calls is None else self.prepared.uncompiled_calls()
        if count:
            raise Unsupported(
                f"{self.task.mode} did not compile it: Python ran the function in {count} calls; a switch of the "
                "framework turns compilation off, or the compiler gave up"
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

    def perform(self, request: Message) -> Message:
        """Carry out the operation that a request names."""
        operation = request["operation"]
        if operation not in _OPERATIONS:
            raise ValueError(f"operation: expected one of {', '.join(_OPERATIONS)}, got {operation!r}; name one.")
        return getattr(self, operation)(request)

    def hello(self, request: Message) -> Message:
        """Report what this worker can do, and the switches before they were touched."""
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
            "large_pages": large_pages(timer.new_array),
            "cuda_packages": cuda_packages(installed_distributions()),
        }

    def open_cell(self, request: Message) -> Message:
        """Forget the last cell, set the switches and draw the inputs."""
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

    @property
    def _open(self) -> Cell:
        assert self._cell is not None  # open_cell comes first: the coordinator's contract
        return self._cell

    def _oracle(self, *, dense: bool) -> Oracle:
        """Return the inputs with their truth; the last workload's are kept, since its other direction comes next."""
        workload, dtype = self._open.workload, self._open.dtype
        key = (workload, dtype, self._seed, dense)
        if key not in self._oracles:
            self._oracles = {known: oracle for known, oracle in self._oracles.items() if known[:3] == key[:3]}
            case = workload.dense_case() if dense else workload.case()
            self._oracles[key] = Oracle(draw_inputs(case, dtype, self._seed))
        return self._oracles[key]

    def _feed(self, *, dense: bool) -> tuple[list[tuple[Any, ...]], Verifier]:
        """Return arguments on the device, shared by all competitors, with the verifier of the same numbers."""
        if dense not in self._feeds:
            cell, oracle = self._open, self._oracle(dense=dense)
            count = buffer_sets(cell, self._timer.cache_bytes())
            n = 1 if dense else cell.workload.num_partitions
            buffers = [self._timer.arguments(oracle.inputs, cell.workload.layout, n) for _ in range(count)]
            self._feeds[dense] = (buffers, Verifier(oracle, cell.direction, cell.optimizer))
        return self._feeds[dense]

    def prepare(self, request: Message) -> Message:
        """Build, compile and call a competitor; reply with the duration of one call after that."""
        cell, name = self._open, request["implementation"]
        dense = request["kind"] == YARDSTICK
        buffers, verifier = self._feed(dense=dense)
        n, sizes = (1, None) if dense else (cell.workload.num_partitions, cell.workload.case().sizes)
        task = Task(name, request["mode"], cell.direction, cell.workload.layout, cell.optimizer, n, sizes)
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
        held.check_compiled()
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
        """Judge the results of the last call of `prepare`."""
        held = self._held[request["handle"]]
        result, held.first_result = held.first_result, None
        return {"judgement": asdict(self._judge(held, result))}

    def memory(self, request: Message) -> Message:
        """Measure the peak memory of one call; small results may fit into pages that the process holds already."""
        held = self._held[request["handle"]]
        peak, method = self._timer.peak_memory(held.prepared)
        if peak is not None:
            peak = max(peak, held.result_bytes, held.prepared.static_memory_bytes or 0)
        return {"peak_memory_bytes": peak, "memory_method": method}

    def probe(self, request: Message) -> Message:
        """Count the operations of the program; then single calls, enqueueing, tracing and compiling again.

        The reply has fields of a record, and `doubt`: one sentence if the program does less than the function needs. A
        `budget_s` of 0 leaves everything out but the count. Compiling comes last, since it replaces the program.
        """
        timer, prepared, cell = self._timer, self._held[request["handle"]].prepared, self._open
        flops, needed, doubt = timer.account(prepared), least_product_flops(cell), ""
        # On a GPU libraries do the products, and their calls' counts differ between versions: recorded, not judged.
        if flops is not None and cell.device == "cpu" and flops < _COUNTED_FRACTION * needed:
            doubt = f"the program that runs does {flops:.3g} operations, and the function needs {needed:.3g}"
        found: Message = {"program_flops": flops, "doubt": doubt}
        if request["budget_s"] > 0:
            found |= asdict(measure_single_calls(prepared.call, timer.wait, budget_s=request["budget_s"]))
            trace = timer.trace(prepared)
            found |= {"kernels": dict(trace.kernels), "device_busy_s": trace.device_busy_s}
            found["copied_bytes"] = trace.copied_bytes
            found["compile_warm_s"] = None if prepared.compile_again is None else prepared.compile_again()
        return found

    def run_for(self, request: Message) -> Message:
        """Run calls for some time, while the coordinator reads the device's energy before and after."""
        call = self._held[request["handle"]].prepared.call
        seconds, calls = request["seconds"], request["calls"]
        return {"calls": run_for(call, self._timer.wait, seconds=seconds, calls_at_a_time=calls)}

    def ceilings(self, request: Message) -> Message:
        """Measure the rates of a large product and of a large copy, on this device and in this cell's precision."""
        precision, timer = self._open.precision, self._timer
        if precision not in self._ceilings:
            product, flops = timer.large_product()
            copy, moved = timer.large_copy()
            self._ceilings[precision] = {
                "ceiling_flops_per_s": flops / shortest_call_s(product, timer.wait),
                "ceiling_bytes_per_s": moved / shortest_call_s(copy, timer.wait),
            }
        return dict(self._ceilings[precision])

    def warm_up(self, request: Message) -> Message:
        """Find how many calls fill a block, then run blocks until they no longer get faster."""
        held = self._held[request["handle"]]
        held.size, blocks = warm_up(held.prepared.call, self._timer.wait, request["block_s"], request["max_blocks"])
        return {"calls_per_block": held.size.calls, "block_latency_s": blocks}

    def block(self, request: Message) -> Message:
        """Time one block; judge the result of its last call where the request says so."""
        held = self._held[request["handle"]]
        # The coordinator's number of calls: a worker that replaced another may have found another size.
        size = replace(held.size, calls=request["calls"])
        elapsed, result = time_block(held.prepared.call, self._timer.wait, size, after_other=request["after_other"])
        reply: Message = {"block_latency_s": elapsed}
        if request["verify"]:
            held.check_compiled()
            reply["judgement"] = asdict(self._judge(held, result))
        return reply

    def drop(self, request: Message) -> Message:
        """Forget a competitor."""
        self._held.pop(request["handle"], None)
        return {}


class Dispatcher:
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
        """Answer one request."""
        if not framework_available(self._framework):
            needs = "jax and flax are" if self._framework == "jax" else "torch is"
            return failure(MISSING, f"{needs} not installed in {sys.executable}")
        timer = self._timer
        try:
            return {"ok": True, **self._workbench.perform(request)}
        except Unsupported as error:
            return failure("unsupported", str(error))
        except (MemoryError, RuntimeError, ValueError, TypeError, NotImplementedError, ArithmeticError) as error:
            # A competitor may fail in any of these ways; the sentence goes into its record, the worker stays usable.
            status = "oom" if timer.is_out_of_memory(error) else "crash"
            return failure(status, f"{type(error).__name__}: {error}")


def main(channel: Channel, framework: str) -> None:
    """Answer requests until the coordinator closes the connection."""
    cpus = os.environ.get(CPUS_VARIABLE)
    # Before the framework is imported, since it sizes its thread pools by what it may use then.
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    dispatcher = Dispatcher(framework)
    while (request := channel.receive()) is not None:
        channel.send(dispatcher.reply(request))
