"""JAX's side of the stopwatch."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.measure import memory
from bench.measure.jax.functions import MISSING, STOCK, YARDSTICKS
from bench.measure.jax.programs import build, compiler_options
from bench.measure.jax.tracing import traced
from bench.measure.layouts import swapped_axes
from bench.measure.timer import Call, Prepared, Task, Trace, Unsupported
from bench.plan.cells import RESULTS, STORAGE_DTYPES
from bench.plan.competitors import JIT, JIT_GRAPH, Catalogue
from jax_impl.registry import implementation_names, unsupported_reason
from parity_tests.judge.inputs import Inputs

_SWITCHES = ("jax_default_matmul_precision", "jax_enable_x64", "jax_numpy_dtype_promotion", "jax_optimization_level")
# The variables are not passed on, but a start-up file may set them: each makes a mode or a clock a lie.
_REFUSED = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs", "jax_check_tracer_leaks", "jax_enable_checks")
_PRECISIONS: Mapping[str, Any] = {
    "ieee_fp32": jax.lax.Precision.HIGHEST,
    "tf32": jax.lax.DotAlgorithmPreset.TF32_TF32_F32,
    "bf16": jax.lax.Precision.DEFAULT,
    "fp16": jax.lax.Precision.DEFAULT,
    "fp64": jax.lax.Precision.HIGHEST,
}
# No GPU of today has a larger L2; JAX itself does not say.
_LARGEST_L2_BYTES = 128 * 2**20


class JaxTimer:
    """See `base.Timer`."""

    framework = "jax"

    def __init__(self) -> None:
        self._device, self._precision, self._division = "cpu", "ieee_fp32", "stock"

    def devices(self) -> tuple[str, ...]:
        """`cpu`, and `cuda` where JAX runs on a GPU."""
        return ("cpu", "cuda") if jax.default_backend() == "gpu" else ("cpu",)

    def catalogue(self) -> Catalogue:
        """What can be run."""
        return Catalogue(self.framework, implementation_names(), tuple(STOCK), tuple(YARDSTICKS), dict(MISSING))

    def environment(self) -> dict[str, Any]:
        """Versions and device."""
        device = jax.devices()[0]
        return {
            "jax": jax.__version__,
            "jaxlib": metadata.version("jaxlib"),
            "flax": metadata.version("flax"),
            "platform_version": device.client.platform_version,
            "device_name": device.device_kind,
            "devices": len(jax.devices()),
        }

    def refusals(self) -> list[str]:
        """What is on in this process and must not be."""
        return [name for name in _REFUSED if getattr(jax.config, name, False)]

    def switches(self) -> dict[str, Any]:
        """The precision switches as they stand."""
        precision = None if self._division == "stock" else str(_PRECISIONS[self._precision])
        options = {mode: compiler_options(self._division, self._device, mode) for mode in (JIT, JIT_GRAPH)}
        return {
            "precision": precision,
            "compiler_options": {mode: found for mode, found in options.items() if found},
            **{name: getattr(jax.config, name) for name in _SWITCHES},
            "cpu_async_dispatch": os.environ.get("JAX_CPU_ENABLE_ASYNC_DISPATCH", "default"),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        }

    def configure(self, precision: str, division: str, device: str) -> None:
        """Remembers the precision that every product is given; 64-bit types are on for fp64 only."""
        if device not in self.devices():
            raise Unsupported(f"jax sees no {device} device")
        if precision == "tf32" and device == "cpu":
            raise Unsupported("a CPU has no TensorFloat-32 arithmetic")
        jax.clear_caches()
        jax.config.update("jax_enable_x64", precision == "fp64")
        self._device, self._precision, self._division = device, precision, division

    def promised_precision(self, implementation: str) -> str:
        """What was asked for; in the stock division, fp32 on a GPU is TF32 by JAX's default."""
        default_is_tf32 = self._division == "stock" and self._device == "cuda" and self._precision == "ieee_fp32"
        return "tf32" if default_is_tf32 else self._precision

    def _jax_device(self) -> Any:
        return jax.devices(self._device)[0]

    def free_bytes(self) -> int:
        """Memory that is free on the configured device."""
        if self._device == "cpu":
            return memory.free_bytes()
        stats = self._jax_device().memory_stats()
        return stats["bytes_limit"] - stats["bytes_in_use"]

    def cache_bytes(self) -> int:
        """The last level of the CPU's caches; of a GPU no less than any has."""
        return _LARGEST_L2_BYTES if self._device == "cuda" else memory.last_cache_bytes()

    def arguments(self, inputs: Inputs, layout: str) -> tuple[jax.Array, ...]:
        """x, kernel, bias, cotangent."""
        if inputs.bias is None:
            raise Unsupported("a workload without a bias")
        axes = swapped_axes(layout)

        def laid_out(array: np.ndarray) -> np.ndarray:
            return array if axes is None else np.ascontiguousarray(np.swapaxes(array, *axes))

        # Copies: on a CPU JAX may keep using NumPy's memory, and every set of buffers is one of its own.
        arrays = (laid_out(inputs.x), inputs.weight, inputs.bias, laid_out(inputs.cotangent))
        return tuple(jax.device_put(np.array(array), self._jax_device()) for array in arrays)

    def prepare(self, task: Task, buffers: Sequence[tuple[jax.Array, ...]]) -> Prepared:
        """Traces, lowers and compiles; the jitted function is then called as a user would."""
        if task.implementation in implementation_names():
            reason = unsupported_reason(task.implementation, dtype=STORAGE_DTYPES[self._precision], device=self._device)
            if reason is not None:
                raise Unsupported(reason)
        stock = self._division == "stock"
        return build(
            task,
            buffers,
            precision=None if stock else _PRECISIONS[self._precision],
            donate=not stock,
            options=compiler_options(self._division, self._device, task.mode),
        )

    def account(self, prepared: Prepared) -> int | None:
        """Operations of one call, by XLA's account of the compiled program."""
        return prepared.program_flops

    def trace(self, prepared: Prepared) -> Trace:
        """Runs one call under the profiler on a GPU, reads the program on a CPU."""
        return traced(prepared, lambda: self.wait(prepared.call()), self._device)

    def large_product(self) -> tuple[Call, int]:
        """A square product."""
        size = 8192 if self._device == "cuda" else 1024
        dtype = STORAGE_DTYPES[self._precision]
        a, b = (jax.device_put(np.ones((size, size), np.float32), self._jax_device()).astype(dtype) for _ in range(2))
        product = jax.jit(partial(jnp.matmul, precision=_PRECISIONS[self._precision]))
        return lambda: product(a, b), 2 * size**3

    def large_copy(self) -> tuple[Call, int]:
        """A copy of at least eight times the last cache."""
        size = max(8 * self.cache_bytes(), 2**27)
        a = jax.device_put(np.ones(size // 4, np.float32), self._jax_device())
        # Negation reads and writes every element, as a copy does, and cannot be left out.
        copy = jax.jit(jnp.negative)
        return lambda: copy(a), 2 * a.nbytes

    def wait(self, result: Any) -> None:
        """Waits for the results."""
        jax.block_until_ready(result)

    def to_numpy(self, result: Any, task: Task) -> Mapping[str, np.ndarray]:
        """The results by name."""
        results = result if isinstance(result, tuple) else (result,)
        named = {name: np.asarray(array) for name, array in zip(RESULTS[task.direction], results, strict=True)}
        axes = swapped_axes(task.layout)
        if axes is None:
            return named
        return named | {name: np.swapaxes(named[name], *axes) for name in ("y", "dx") if name in named}

    def peak_memory(self, prepared: Prepared) -> tuple[int | None, str]:
        """Growth of the resident set on a CPU; on a GPU the compiler's account.

        JAX's allocator keeps the peak of its whole life, so a process that has run other competitors cannot tell.
        """
        if self._device == "cpu":
            return memory.resident_growth(lambda: self.wait(prepared.call()))
        return prepared.static_memory_bytes, "memory_analysis"

    def is_out_of_memory(self, error: BaseException) -> bool:
        """XLA reports it as a status in the text."""
        return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


TIMER = JaxTimer
