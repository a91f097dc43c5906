"""JAX's side of the stopwatch."""

import os
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

from bench.measure import memory
from bench.measure.functions.jax import STOCK, YARDSTICKS, resolve
from bench.measure.timers.base import Prepared, Unsupported
from bench.plan.cells import STORAGE_DTYPES
from bench.plan.competitors import Catalogue
from jax_impl import UnsupportedImplementationError
from jax_impl.registry import implementation_names, unsupported_reason
from parity_tests.harness.inputs import Inputs

_SWITCHES = ("jax_default_matmul_precision", "jax_enable_x64")
_PRECISIONS: Mapping[str, Any] = {
    "ieee_fp32": jax.lax.Precision.HIGHEST,
    "tf32": jax.lax.DotAlgorithmPreset.TF32_TF32_F32,
    "bf16": jax.lax.Precision.DEFAULT,
    "fp16": jax.lax.Precision.DEFAULT,
    "fp64": jax.lax.Precision.HIGHEST,
}


class JaxTimer:
    """See ``base.Timer``."""

    framework = "jax"

    def __init__(self) -> None:
        self._device, self._precision, self._division = "cpu", "ieee_fp32", "stock"

    def devices(self) -> tuple[str, ...]:
        """``cpu``, and ``cuda`` where JAX runs on a GPU."""
        return ("cpu", "cuda") if jax.default_backend() == "gpu" else ("cpu",)

    def catalogue(self) -> Catalogue:
        """What can be run."""
        return Catalogue(self.framework, implementation_names(), tuple(STOCK), tuple(YARDSTICKS))

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

    def switches(self) -> dict[str, Any]:
        """The precision switches as they stand."""
        precision = None if self._division == "stock" else str(_PRECISIONS[self._precision])
        return {
            "precision": precision,
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

    def arguments(self, inputs: Inputs) -> tuple[jax.Array, ...]:
        """x, kernel, bias, cotangent."""
        if inputs.bias is None:
            raise Unsupported("a workload without a bias")
        arrays = (inputs.x, inputs.weight, inputs.bias, inputs.cotangent)
        return tuple(jax.device_put(array, self._jax_device()) for array in arrays)

    def prepare(self, implementation: str, mode: str, direction: str, arguments: tuple[Any, ...]) -> Prepared:
        """Traces, lowers and compiles; the jitted function is then called as a user would."""
        if implementation in implementation_names():
            n, i, o = arguments[1].shape
            reason = unsupported_reason(
                implementation,
                dtype=STORAGE_DTYPES[self._precision],
                device=self._device,
                num_partitions=n,
                in_features=i,
                out_features=o,
            )
            if reason is not None:
                raise Unsupported(reason)
        function = resolve(implementation, None if self._division == "stock" else _PRECISIONS[self._precision])

        def forward_backward(x: jax.Array, kernel: jax.Array, bias: jax.Array, cotangent: jax.Array) -> Any:
            y, vjp = jax.vjp(function, x, kernel, bias)
            return (y, *vjp(cotangent))

        # A new function object, since jit would find an earlier precision's program under the same one.
        def forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            return function(x, kernel, bias)

        jitted, given = (
            (jax.jit(forward), arguments[:3]) if direction == "forward" else (jax.jit(forward_backward), arguments)
        )
        start = time.perf_counter()
        try:
            compiled = jitted.lower(*given).compile()
        except UnsupportedImplementationError as error:
            raise Unsupported(str(error)) from error
        compile_s = time.perf_counter() - start
        analysis = compiled.memory_analysis()
        static = None if analysis is None else analysis.output_size_in_bytes + analysis.temp_size_in_bytes
        return Prepared(lambda: jitted(*given), compile_s, static)

    def wait(self, result: Any) -> None:
        """Waits for the results."""
        jax.block_until_ready(result)

    def to_numpy(self, result: Any) -> Mapping[str, np.ndarray]:
        """The results by name."""
        results = result if isinstance(result, tuple) else (result,)
        names = ("y", "dx", "dweight", "dbias")[: len(results)]
        return {name: np.asarray(array) for name, array in zip(names, results, strict=True)}

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
