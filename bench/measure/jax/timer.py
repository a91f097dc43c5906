"""JAX's half of the stopwatch."""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.measure import machine
from bench.measure.jax.functions import MISSING, STOCK, UNEQUAL_STOCK, YARDSTICKS
from bench.measure.jax.programs import build, compiler_options
from bench.measure.jax.xla import copied_bytes
from bench.measure.timer import Call, Prepared, Task, Timer, Trace, Unsupported, busy_s
from bench.plan.cells import DEVICES, STORAGE_DTYPES
from bench.plan.competitors import JIT, JIT_GRAPH, Catalogue
from bench.plan.workloads import SHARED
from jax_impl.registry import IMPLEMENTATIONS, implementation_names, unsupported_reason

# Instructions that move or name nothing at run time.
_NO_WORK = frozenset({"parameter", "bitcast", "tuple", "get-tuple-element", "constant"})
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?:\([^=]*?\)|\S+) ([a-z][a-z0-9\-]*)\(", re.MULTILINE)


def instructions(text: str) -> Counter[str]:
    """Count the instructions of a compiled program's entry computation that do work."""
    entry = text[text.index("ENTRY ") :]
    found = Counter(_INSTRUCTION.findall(entry[: entry.index("\n}")]))
    return Counter({name: count for name, count in found.items() if name not in _NO_WORK})


def _device_events(folder: Path) -> list[tuple[str, float, float]]:
    """Return name, start and end in nanoseconds of everything that a GPU ran."""
    found = []
    for path in sorted(folder.rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                # Streams hold kernels and copies; the other lines repeat them by module or by operation.
                if line.name.startswith("Stream"):
                    found += [(event.name, event.start_ns, event.start_ns + event.duration_ns) for event in line.events]
    return found


def traced(prepared: Prepared, call: Call, device: str) -> Trace:
    """Run a call under JAX's profiler on a GPU; on a CPU reads the compiled program instead."""
    text = None if prepared.text is None else prepared.text()
    copied = None if text is None else copied_bytes(text)
    if device == "cpu":
        return Trace({} if text is None else dict(instructions(text)), None, copied)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        events = _device_events(Path(folder))
    intervals = [(start, end) for _, start, end in events]
    return Trace(dict(Counter(name for name, _, _ in events)), busy_s(intervals) * 1e-9, copied)


_SWITCHES = ("jax_default_matmul_precision", "jax_enable_x64", "jax_numpy_dtype_promotion", "jax_optimization_level")
# The variables are not passed on, but a start-up file may set them: each makes a mode or a clock a lie.
_REFUSED = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs", "jax_check_tracer_leaks", "jax_enable_checks")
_REFUSED += ("jax_disable_most_optimizations",)
_PRECISIONS: Mapping[str, Any] = {
    "ieee_fp32": jax.lax.Precision.HIGHEST,
    "tf32": jax.lax.DotAlgorithmPreset.TF32_TF32_F32,
    "bf16": jax.lax.Precision.DEFAULT,
    "fp16": jax.lax.Precision.DEFAULT,
    "fp64": jax.lax.Precision.HIGHEST,
}
# No GPU of today has a larger L2; JAX itself does not say.
_LARGEST_L2_BYTES = 128 * 2**20


class JaxTimer(Timer):
    """JAX; see `Timer`."""

    framework = "jax"

    def devices(self) -> tuple[str, ...]:
        """Return `cpu`, and `cuda` where JAX runs on a GPU."""
        return ("cpu", "cuda") if jax.default_backend() == "gpu" else ("cpu",)

    def catalogue(self) -> Catalogue:
        """Return the competitors that can be run."""
        return Catalogue(
            self.framework,
            implementation_names(),
            tuple(STOCK),
            tuple(YARDSTICKS),
            dict(MISSING),
            unequal=implementation_names(unequal=True),
            unequal_stock=tuple(UNEQUAL_STOCK),
            shared=tuple(name for name, entry in IMPLEMENTATIONS.items() if entry.run_shared is not None),
            only_on={
                name: sorted(entry.devices) for name, entry in IMPLEMENTATIONS.items() if set(DEVICES) - entry.devices
            },
        )

    def environment(self) -> dict[str, Any]:
        """Return versions and device."""
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
        """Return the switches that are on and must not be."""
        return [name for name in _REFUSED if getattr(jax.config, name, False)]

    def switches(self) -> dict[str, Any]:
        """Return the precision switches as they stand."""
        precision = None if self._division == "stock" else str(_PRECISIONS[self._precision])
        options = {mode: compiler_options(self._division, self._device, mode) for mode in (JIT, JIT_GRAPH)}
        return {
            "precision": precision,
            "compiler_options": {mode: found for mode, found in options.items() if found},
            **{name: getattr(jax.config, name) for name in _SWITCHES},
            "cpu_async_dispatch": os.environ.get("JAX_CPU_ENABLE_ASYNC_DISPATCH", "default"),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        }

    def _apply(self) -> None:
        jax.clear_caches()
        # The precision itself is given to every product; 64-bit types are on for fp64 only.
        jax.config.update("jax_enable_x64", self._precision == "fp64")

    def promised_precision(self, implementation: str) -> str:
        """Return the precision asked for; in the stock division, fp32 on a GPU is TF32 by JAX's default."""
        default_is_tf32 = self._division == "stock" and self._device == "cuda" and self._precision == "ieee_fp32"
        return "tf32" if default_is_tf32 else self._precision

    def _jax_device(self) -> Any:
        return jax.devices(self._device)[0]

    def free_bytes(self) -> int:
        """Return the memory that is free on the configured device."""
        if self._device == "cpu":
            return machine.free_bytes()
        stats = self._jax_device().memory_stats()
        return stats["bytes_limit"] - stats["bytes_in_use"]

    def cache_bytes(self) -> int:
        """Return the size of the last level of the CPU's caches; for a GPU that of the largest L2."""
        return _LARGEST_L2_BYTES if self._device == "cuda" else machine.last_cache_bytes()

    def new_array(self, size: int) -> jax.Array:
        """Return an array of so many bytes in the CPU's memory, as results get theirs, and written to."""
        return jax.block_until_ready(jnp.ones(size, jnp.uint8, device=jax.local_devices(backend="cpu")[0]))

    def _placed(self, array: np.ndarray) -> jax.Array:
        # A copy: on a CPU JAX may keep using NumPy's memory.
        return jax.device_put(np.array(array), self._jax_device())

    def prepare(self, task: Task, buffers: Sequence[tuple[jax.Array, ...]]) -> Prepared:
        """Trace, lower and compile; the jitted function is then called as a user would."""
        unequal = task.sizes is not None
        if task.implementation in implementation_names(unequal=unequal):
            i, o = (1, 1) if task.sizes is not None else buffers[0][1].shape[1:]
            reason = unsupported_reason(
                task.implementation,
                dtype=STORAGE_DTYPES[self._precision],
                device=self._device,
                in_features=i,
                out_features=o,
                shared=task.layout == SHARED,
                unequal=unequal,
            )
            if reason is not None:
                raise Unsupported(reason)
        stock = self._division == "stock"
        return build(
            task,
            buffers,
            precision=None if stock else _PRECISIONS[self._precision],
            options=compiler_options(self._division, self._device, task.mode),
        )

    def account(self, prepared: Prepared) -> int | None:
        """Return the operations of one call, by XLA's account of the compiled program."""
        return prepared.program_flops

    def trace(self, prepared: Prepared) -> Trace:
        """Run one call under the profiler on a GPU, reads the program on a CPU."""
        return traced(prepared, lambda: self.wait(prepared.call()), self._device)

    def large_product(self) -> tuple[Call, int]:
        """Return a square product and its operations."""
        size = 8192 if self._device == "cuda" else 1024
        dtype = STORAGE_DTYPES[self._precision]
        a, b = (jax.device_put(np.ones((size, size), np.float32), self._jax_device()).astype(dtype) for _ in range(2))
        product = jax.jit(partial(jnp.matmul, precision=_PRECISIONS[self._precision]))
        return lambda: product(a, b), 2 * size**3

    def large_copy(self) -> tuple[Call, int]:
        """Return a copy and its bytes."""
        size = max(8 * self.cache_bytes(), 2**27)
        a = jax.device_put(np.ones(size // 4, np.float32), self._jax_device())
        # Negation reads and writes every element, as a copy does, and cannot be left out.
        copy = jax.jit(jnp.negative)
        return lambda: copy(a), 2 * a.nbytes

    def wait(self, result: Any) -> None:
        """Return when the results are computed."""
        jax.block_until_ready(result)

    def _fetched(self, result: jax.Array) -> np.ndarray:
        return np.asarray(result)

    def peak_memory(self, prepared: Prepared) -> tuple[int | None, str]:
        """Return the growth of the resident set on a CPU, the compiler's account on a GPU.

        JAX's allocator keeps the peak of its whole life, so a process that has run other competitors cannot tell.
        """
        if self._device == "cpu":
            return machine.resident_growth(lambda: self.wait(prepared.call()))
        return prepared.static_memory_bytes, "memory_analysis"

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return True for an error of memory, which XLA reports as a status in the text."""
        return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


TIMER = JaxTimer
