"""From a task to a JAX callable."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.core import Tracer

from bench.measure.jax.functions import UNEQUAL_STOCK, Function, listed, resolve, with_parameters
from bench.measure.jax.xla import kept_in, repeated_product_flops
from bench.measure.timer import CacheFolder, Prepared, Task, Unsupported, alternating, restart_of
from bench.plan.competitors import AOT, DONATE, JIT, JIT_GRAPH, NNX_JIT
from bench.plan.workloads import AXES, FLAT
from jax_impl import PartitionedLinear, UnsupportedImplementationError
from parity_tests.frameworks.jax.training import build_optax
from parity_tests.training.tasks import OPTIMIZERS

# The learning-rate table of an optimiser is finite; JAX clamps an index past its end, so that the last rate stays.
_RATES = 1


def compiler_options(division: str, device: str, mode: str) -> dict[str, Any]:
    """Return XLA's options for the programs of a division; empty for its defaults.

    On a GPU the matched division compares `jit`, `aot` and `jit-donate` with torch's eager mode, which records no CUDA
    graph, so that XLA may record none either; `jit-graph` is compared with `cuda-graph`, in the tuned division too. By
    default XLA records no graph of fewer than five kernels, and the forward pass of this map is one kernel: `jit-graph`
    records any. `nnx.jit` takes no options: on a GPU its program is the one of XLA's defaults in every division.
    """
    if device != "cuda" or division == "stock" or mode == NNX_JIT:
        return {}
    options: dict[str, Any] = {"xla_gpu_graph_min_graph_size": 1} if mode == JIT_GRAPH else {}
    if division == "tuned":
        options["xla_gpu_exhaustive_tiling_search"] = True
    elif mode != JIT_GRAPH:
        options["xla_gpu_enable_command_buffer"] = ""
    return options


def _in_layout(function: Function, task: Task) -> Function:
    """Return the function on arrays as they lie in memory; it transposes, since XLA's arrays have no strides."""
    axes = AXES[task.layout]
    if task.layout == FLAT:
        n = task.num_partitions or 1

        def flat(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            return function(x.reshape(len(x), n, -1), kernel, bias).reshape(len(x), -1)

        return flat
    if axes is None:
        return function

    def laid_out(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.swapaxes(function(jnp.swapaxes(x, *axes), kernel, bias), *axes)

    return laid_out


class _Uncompiled:
    """Counts the calls that run a function on arrays; `jit` runs it on tracers, and then no more."""

    calls = 0

    def note(self, x: jax.Array) -> None:
        if not isinstance(x, Tracer):
            self.calls += 1


def _program(function: Function, task: Task, uncompiled: _Uncompiled) -> tuple[Callable[..., Any], int]:
    """Return the traced function of a direction, and how many of (x, kernel, bias, cotangent) it takes.

    A new function object each time, since jit would find an earlier precision's program under the same one.
    """
    if task.direction == "forward":

        def forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            uncompiled.note(x)
            return function(x, kernel, bias)

        return forward, 3

    def forward_backward(x: jax.Array, kernel: jax.Array, bias: jax.Array, cotangent: jax.Array) -> Any:
        uncompiled.note(x)
        y, vjp = jax.vjp(function, x, kernel, bias)
        return (y, *vjp(cotangent))

    return forward_backward, 4


def _step_program(
    function: Function, task: Task, uncompiled: _Uncompiled, *, donate: bool, options: dict[str, Any] | None
) -> tuple[Any, Callable[[Any], Any]]:
    """Return the jitted training step, and the function that makes the optimiser's first state."""
    optimizer = build_optax(OPTIMIZERS[str(task.optimizer)], _RATES)
    direct = replace(task, direction="forward_backward")
    differentiate, _ = _program(function, direct, uncompiled)

    def step(params: Mapping[str, jax.Array], state: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        y, dx, dweight, dbias = differentiate(x, params["weight"], params["bias"], cotangent)
        updates, state = optimizer.update({"weight": dweight, "bias": dbias}, state, params)
        return y, dx, optax.apply_updates(params, updates), state

    # torch updates in place; giving the old parameters and state up is how a JAX user gets the same.
    return jax.jit(step, donate_argnums=(0, 1) if donate else (), compiler_options=options), optimizer.init


class _Step:
    """Keeps parameters and optimiser state between calls, as a training loop does."""

    def __init__(self, call: Callable[..., Any], init: Callable[[Any], Any], arguments: tuple[jax.Array, ...]):
        self._x, weight, bias, self._cotangent = arguments
        self._first = {"weight": weight, "bias": bias}
        self._call, self._init = call, init
        self.restart()

    def arguments(self) -> tuple[Any, ...]:
        return self._params, self._state, self._x, self._cotangent

    def restart(self) -> None:
        self._params = jax.tree.map(jnp.copy, self._first)
        self._state = self._init(self._params)

    def __call__(self) -> tuple[jax.Array, ...]:
        y, dx, self._params, self._state = self._call(*self.arguments())
        return y, dx, self._params["weight"], self._params["bias"]


class _LayerCall:
    """Calls a function under `nnx.jit` with a layer that holds the parameters, which a step updates in place.

    Args:
        call: the jitted function, of the layer, the optimiser in a step, x, and with gradients the cotangent.
        arguments: x, kernel, bias, cotangent.
        task: what is computed.
        transformation: of a step; None elsewhere.
    """

    def __init__(self, call: Callable[..., Any], arguments: tuple[jax.Array, ...], task: Task, transformation: Any):
        x, self._kernel, self._bias, cotangent = arguments
        self._call, self._task, self._transformation = call, task, transformation
        self._inputs = (x,) if task.direction == "forward" else (x, cotangent)
        if transformation is None:
            self.arguments = (self._layer(), *self._inputs)
        else:
            # Only a step has one, see `restart_of`.
            self.restart = self._restart
            self._restart()

    def _layer(self) -> Any:
        sizes = self._task.sizes
        i, o = self._kernel.shape[1:] if sizes is None else (sizes.in_features, sizes.out_features)

        def build() -> PartitionedLinear:
            dtype = self._kernel.dtype
            n = len(self._kernel) if sizes is None else len(sizes.in_features)
            return PartitionedLinear(n, i, o, param_dtype=dtype, rngs=nnx.Rngs(0))

        return with_parameters(build, kernel=self._kernel, bias=self._bias)

    def _restart(self) -> None:
        layer = jax.tree.map(jnp.copy, self._layer())
        self.arguments = (layer, nnx.Optimizer(layer, self._transformation, wrt=nnx.Param), *self._inputs)

    def __call__(self) -> Any:
        results = self._call(*self.arguments)
        layer: Any = self.arguments[0]
        return results if self._transformation is None else (*results, layer.kernel[...], layer.bias[...])


def _layer_program(program: Callable[..., Any], task: Task) -> tuple[Any, Callable[..., _LayerCall]]:
    """Return a program under `nnx.jit`, and what binds it to a set of arguments, see `_LayerCall`."""

    def call(layer: Any, x: jax.Array, *cotangent: jax.Array) -> Any:
        return program(x, layer.kernel[...], layer.bias[...], *cotangent)

    def step(layer: Any, optimizer: nnx.Optimizer, x: jax.Array, cotangent: jax.Array) -> Any:
        y, dx, dkernel, dbias = call(layer, x, cotangent)
        gradients = nnx.state(layer, nnx.Param)
        nnx.replace_by_pure_dict(gradients, {"kernel": dkernel, "bias": dbias})
        optimizer.update(layer, gradients)
        return y, dx

    stepped = task.direction == "train_step"
    transformation = build_optax(OPTIMIZERS[str(task.optimizer)], _RATES) if stepped else None
    jitted: Any = nnx.jit(step) if stepped else nnx.jit(call)
    return jitted, partial(_LayerCall, task=task, transformation=transformation)


def build(
    task: Task,
    buffers: Sequence[tuple[Any, ...]],
    *,
    precision: Any,
    options: Mapping[str, Any],
) -> Prepared:
    """Trace, lower and compile the program of a task; the jitted function is then called as a user would.

    Args:
        task: what to compute.
        buffers: sets of x, kernel, bias, cotangent; each call takes the next.
        precision: of every product; None for the framework's default.
        options: XLA's options for this program.

    Raises:
        Unsupported: if the implementation or the mode cannot run here.
    """
    if task.mode not in (JIT, JIT_GRAPH, AOT, DONATE, NNX_JIT):
        raise Unsupported(f"jax has no mode {task.mode!r}")
    if task.mode == DONATE and task.direction != "train_step":
        raise Unsupported(f"{DONATE} is for train_step: the arguments of {task.direction} are those of every call")
    function = _in_layout(resolve(task, precision), task)
    if task.sizes is not None and task.implementation in UNEQUAL_STOCK:
        buffers = [listed(arguments, task.sizes) for arguments in buffers]
    # Given to jit and not to the compilation: calling a compiled program takes some 8% longer than calling jit.
    compiler = dict(options) or None
    uncompiled = _Uncompiled()
    if task.mode == NNX_JIT:
        direct = task if task.direction == "forward" else replace(task, direction="forward_backward")
        jitted, bound = _layer_program(_program(function, direct, uncompiled)[0], task)
        given = bound(jitted, arguments=buffers[0]).arguments
    elif task.direction == "train_step":
        jitted, init = _step_program(function, task, uncompiled, donate=task.mode == DONATE, options=compiler)
        given, bound = _Step(jitted, init, buffers[0]).arguments(), partial(_Step, init=init)
    else:
        program, taken = _program(function, task, uncompiled)
        jitted, given = jax.jit(program, compiler_options=compiler), buffers[0][:taken]

        def bound(call: Callable[..., Any], *, arguments: tuple[Any, ...]) -> Any:
            return partial(call, *arguments[:taken])

    cache = CacheFolder()

    def timed_compilation() -> tuple[float, Any]:
        with kept_in(cache.path):
            start = time.perf_counter()
            compiled = jitted.lower(*given).compile()
            return time.perf_counter() - start, compiled

    def again() -> float:
        jax.clear_caches()
        return timed_compilation()[0]

    try:
        compile_s, compiled = timed_compilation()
    except UnsupportedImplementationError as error:
        raise Unsupported(str(error)) from error

    calls = [bound(compiled if task.mode == AOT else jitted, arguments=arguments) for arguments in buffers]
    analysis = compiled.memory_analysis()
    return Prepared(
        alternating(calls),
        compile_s,
        None if analysis is None else analysis.output_size_in_bytes + analysis.temp_size_in_bytes,
        program_flops=_flops(compiled),
        compile_again=again,
        restart=restart_of(calls),
        text=compiled.as_text,
        uncompiled_calls=lambda: uncompiled.calls,
    )


def _flops(compiled: Any) -> int | None:
    analysis = compiled.cost_analysis()
    found = analysis.get("flops") if isinstance(analysis, Mapping) else None
    return int(found) + repeated_product_flops(compiled.as_text()) if found and found > 0 else None
