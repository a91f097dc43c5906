"""From a task to a torch callable."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bench.measure.timer import CacheFolder, Call, Prepared, Task, Unsupported, alternating, restart_of
from bench.measure.torch.functions import UNEQUAL_STOCK, Function, listed, resolve
from bench.plan.competitors import (
    COMPILE,
    CUDA_GRAPH,
    EAGER,
    GRAPHED_CALLABLES,
    MAX_AUTOTUNE,
    ONE_THREAD,
    REDUCE_OVERHEAD,
)
from bench.plan.workloads import AXES, FLAT
from parity_tests.frameworks.torch.modes import DispatchMode
from parity_tests.frameworks.torch.training import build_torch
from parity_tests.training.tasks import OPTIMIZERS

# Mode to torch.compile's own name for it.
COMPILE_MODES: Mapping[str, str] = MappingProxyType(
    {COMPILE: "default", REDUCE_OVERHEAD: "reduce-overhead", MAX_AUTOTUNE: "max-autotune"}
)
# From a function and the leaves that it is called with to the function that is called in its place.
Record = Callable[[Function, tuple[Any, ...]], Function]
# Calls before a CUDA graph is recorded: lazily created library handles must exist by then.
_CALLS_BEFORE_CAPTURE = 3


def _in_layout(function: Function, task: Task, *, settle: bool) -> Function:
    """Return the function on arrays as they lie in memory; `settle` asks for results that lie like the inputs."""
    axes = AXES[task.layout]
    if task.layout == FLAT:

        def flat(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y = function(x.unflatten(-1, (task.num_partitions or 1, -1)), weight, bias)
            # Rows that lie innermost are flattened without a copy, and then lie in another order than the inputs.
            y = y.flatten(-2)
            return y.contiguous() if settle else y

        return flat

    def laid_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if axes is not None:
            x = x.transpose(*axes)
        y = function(x, weight, bias)
        if axes is not None:
            y = y.transpose(*axes)
        return y.contiguous() if settle else y

    return laid_out


def _gradients(function: Function, leaves: Sequence[Any], cotangent: Tensor, *, settle: bool) -> tuple[Any, ...]:
    y = function(*leaves)
    if isinstance(leaves[1], Tensor):
        dx, dweight, dbias = torch.autograd.grad(y, leaves, cotangent)
    else:
        x, weights, biases = leaves
        dx, *others = torch.autograd.grad(y, (x, *weights, *biases), cotangent)
        dweight, dbias = others[: len(weights)], others[len(weights) :]
    return y, dx.contiguous() if settle else dx, dweight, dbias


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change a tensor, or each one of a tuple of parameters."""
    return change(value) if isinstance(value, Tensor) else tuple(change(one) for one in value)


def _named(name: str, value: Any) -> dict[str, Tensor]:
    return {name: value} if isinstance(value, Tensor) else {f"{k}.{name}": one for k, one in enumerate(value)}


class _Step:
    """One training step on parameters of its own: forward, gradients, and the optimiser's update in place."""

    def __init__(self, function: Function, arguments: tuple[Any, ...], optimizer: str, *, settle: bool, record: Record):
        x, weight, bias, self._cotangent = arguments
        self._settle = settle
        self._x = x.detach().requires_grad_()
        self._parameters = [_each(value, lambda one: one.clone().requires_grad_()) for value in (weight, bias)]
        self._first = _named("weight", weight) | _named("bias", bias)
        self._leaves = _named("weight", self._parameters[0]) | _named("bias", self._parameters[1])
        self._function = record(function, (self._x, *self._parameters))
        self._spec = OPTIMIZERS[optimizer]
        self._optimizer = build_torch(self._spec, self._leaves)

    def __call__(self) -> tuple[Any, ...]:
        leaves = (self._x, *self._parameters)
        y, dx, dweight, dbias = _gradients(self._function, leaves, self._cotangent, settle=self._settle)
        gradients = (dweight, dbias) if isinstance(dweight, Tensor) else (*dweight, *dbias)
        for leaf, gradient in zip(self._leaves.values(), gradients, strict=True):
            leaf.grad = gradient
        self._optimizer.step()
        return (y, dx, *self._parameters)

    def restart(self) -> None:
        with torch.no_grad():
            for name, value in self._first.items():
                self._leaves[name].copy_(value)
        # A fresh one: what an optimiser remembers has no common form.
        self._optimizer = build_torch(self._spec, self._leaves)


def _as_it_is(function: Function, leaves: tuple[Any, ...]) -> Function:
    return function


def _bound(
    function: Function, task: Task, arguments: tuple[Any, ...], *, settle: bool, record: Record = _as_it_is
) -> Call:
    """Return a call without arguments for one set of buffers; `record` may replace the function for its leaves."""
    if task.direction == "train_step":
        return _Step(function, arguments, str(task.optimizer), settle=settle, record=record)
    # Gradients are recorded only where they are asked for: the same storage, other leaves.
    gradients = task.direction == "forward_backward"
    leaves = tuple(_each(value, lambda one: one.detach().requires_grad_(gradients)) for value in arguments[:3])
    function = record(function, leaves)
    if gradients:
        return lambda: _gradients(function, leaves, arguments[3], settle=settle)
    return lambda: function(*leaves)


@cache
def _recording_stream() -> torch.cuda.Stream:
    """Return one stream for warming up and recording: a library's workspace belongs to a stream, and is there by then.

    Otherwise the first recording would be charged with it (32 MiB on an H200).
    """
    return torch.cuda.Stream()


def _graphed(call: Call) -> tuple[Call, int]:
    """Return the call recorded as a CUDA graph, and the peak of the memory taken while recording, in bytes.

    Its results stay in the graph's own buffers, as its users know; a replay takes no memory beside them.
    """
    side = _recording_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_CALLS_BEFORE_CAPTURE):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph, stream=side):
        results = call()
    taken = torch.cuda.max_memory_allocated() - before

    def replay() -> Any:
        graph.replay()
        return results

    return replay, taken


class _GraphedCallables:
    """Makes two CUDA graphs of a function, one forward and one backward, as `make_graphed_callables` does for a layer.

    x and the parameters are the ones that are recorded, so that a call copies the cotangent alone; new rows are copied
    to where x lies.

    Attributes:
        seconds: that recording took.
        taken: bytes that the graphs of the first set of buffers keep: results, gradients and the cotangent's copy.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.taken: int | None = None

    def __call__(self, function: Function, leaves: tuple[Any, ...]) -> Function:
        if self.taken is None:
            # Thrown away: the first one on its stream is charged with the workspaces of the libraries.
            torch.cuda.make_graphed_callables(function, leaves)
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        graphed: Any = torch.cuda.make_graphed_callables(function, leaves)
        self.seconds += time.perf_counter() - start
        self.taken = self.taken or torch.cuda.memory_allocated() - before
        return graphed


def _in_this_thread(call: Call) -> Call:
    """Return the call with its backward in the calling thread; a training loop sets the switch once."""

    def run() -> Any:
        with torch.autograd.set_multithreading_enabled(False):
            return call()

    return run


def _watched(function: Function) -> tuple[Function, Callable[[], int]]:
    """Return the function, and a count of the calls in which Python ran it: none where it runs compiled."""
    seen = [0]

    def watched(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # True while Dynamo traces, so that the branch is not in what it compiles.
        if not torch.compiler.is_compiling():
            seen[0] += 1
        return function(x, weight, bias)

    return watched, lambda: seen[0]


class _ProductCounter(DispatchMode):
    """Adds up torch's own formulas for the operations of products and convolutions, and products of elements.

    Not `FlopCounterMode`, which hooks into modules and then refuses `torch.autograd.grad` on their parameters.
    """

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        elif func in _FACTORS and _is_outer(args[_FACTORS[func]], result):
            self.flops += 2 * result.numel()
        return result


# Operation to where the factors stand that it multiplies, element by element.
_FACTORS = {torch.ops.aten.mul.Tensor: slice(0, 2), torch.ops.aten.addcmul.default: slice(1, 3)}


def _is_outer(factors: Sequence[Any], result: Tensor) -> bool:
    """Say whether elements that are multiplied stand for a product: a factor is repeated, and is no number."""
    return all(isinstance(factor, Tensor) and factor.ndim for factor in factors) and any(
        factor.numel() < result.numel() for factor in factors
    )


def counted_flops(call: Call) -> int | None:
    """Return the operations of the products and convolutions in one call, or None where none is known."""
    with _ProductCounter() as counter:
        call()
    return counter.flops or None


def build(
    task: Task,
    buffers: Sequence[tuple[Any, ...]],
    *,
    settle: bool,
    wait: Callable[[Any], None],
) -> Prepared:
    """Build the callable of a task and compile it where the mode says so.

    Args:
        task: what to compute.
        buffers: sets of x, weight, bias, cotangent; each call takes the next.
        settle: results must lie in memory as the inputs do.
        wait: returns when a result is computed.

    Raises:
        Unsupported: if torch cannot run the mode here.
    """
    plain = _in_layout(resolve(task), task, settle=settle)
    if task.sizes is not None and task.implementation in UNEQUAL_STOCK:
        buffers = [listed(arguments, task.sizes) for arguments in buffers]
    watched, uncompiled_calls = _watched(plain)
    if task.mode in (EAGER, ONE_THREAD, CUDA_GRAPH, GRAPHED_CALLABLES):
        function = plain
    elif task.mode in COMPILE_MODES:
        # Static shapes: the second workload of a process would otherwise be compiled for any size.
        function = torch.compile(watched, dynamic=False, mode=COMPILE_MODES[task.mode])
    else:
        raise Unsupported(f"torch has no mode {task.mode!r}")
    if task.mode == GRAPHED_CALLABLES:
        record = _GraphedCallables()
        calls = [_bound(function, task, arguments, settle=settle, record=record) for arguments in buffers]
        return Prepared(alternating(calls), record.seconds, record.taken, restart=restart_of(calls))
    calls = [_bound(function, task, arguments, settle=settle) for arguments in buffers]
    if task.mode == CUDA_GRAPH:
        if task.direction == "train_step":
            raise Unsupported("an optimiser that counts its steps on the host cannot be replayed as a CUDA graph")
        start = time.perf_counter()
        graphs = [_graphed(call) for call in calls]
        compile_s = time.perf_counter() - start
        return Prepared(alternating([replay for replay, _ in graphs]), compile_s, graphs[0][1])

    if task.mode not in COMPILE_MODES:
        run = [_in_this_thread(call) for call in calls] if task.mode == ONE_THREAD else calls
        return Prepared(alternating(run), restart=restart_of(calls))
    compile_s, flops, compile_again = _compiled(lambda: wait(calls[0]()))
    x, weight = buffers[0][:2]
    only_factors = isinstance(weight, Tensor) and x.numel() == weight.numel() == weight.shape[0]
    # Factors alone look like any multiplication; and torch has no formula for some operations, in whatever graph.
    if only_factors or counted_flops(_bound(plain, task, buffers[0], settle=settle)) is None:
        flops = None
    return Prepared(
        alternating(calls),
        compile_s,
        program_flops=flops,
        compile_again=compile_again,
        restart=restart_of(calls),
        uncompiled_calls=uncompiled_calls,
    )


def _compiled(first_call: Callable[[], None]) -> tuple[float, int | None, Callable[[], float]]:
    """Compile by calling, with an empty cache on disk.

    Returns:
        Seconds, operations of the products in the compiled program, and what compiles again with the cache filled.
    """
    # Inductor takes seconds to import, and most workers never compile.
    from bench.measure.torch.inductor import kept_in, products_seen

    cache = CacheFolder()

    def timed() -> tuple[float, int | None]:
        # What is seen belongs to what Inductor looks up: both compilations need the same.
        with kept_in(cache.path), products_seen() as seen:
            start = time.perf_counter()
            first_call()
            return time.perf_counter() - start, seen.flops

    def again() -> float:
        torch.compiler.reset()
        return timed()[0]

    return *timed(), again
