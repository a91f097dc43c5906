"""PyTorch's side of the stopwatch."""

import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import ml_dtypes
import numpy as np
import torch

from bench.measure import memory
from bench.measure.layouts import swapped_axes
from bench.measure.timer import Call, Prepared, Task, Trace, Unsupported
from bench.measure.torch.functions import MISSING, STOCK, YARDSTICKS
from bench.measure.torch.programs import build, counted_flops
from bench.measure.torch.tracing import traced
from bench.plan.cells import RESULTS, STORAGE_DTYPES
from bench.plan.competitors import Catalogue
from parity_tests.judge.inputs import Inputs
from torch_impl.registry import implementation_names, unsupported_reason


def _from_numpy(array: np.ndarray, device: str) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def _laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    axes = swapped_axes(layout)
    return tensor.clone() if axes is None else tensor.transpose(*axes).contiguous()


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    host = tensor.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()


class TorchTimer:
    """See `base.Timer`."""

    framework = "torch"

    def __init__(self) -> None:
        self._device, self._precision, self._division = "cpu", "ieee_fp32", "stock"

    def devices(self) -> tuple[str, ...]:
        """`cpu`, and `cuda` where this build sees a GPU."""
        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

    def catalogue(self) -> Catalogue:
        """What can be run."""
        return Catalogue(self.framework, implementation_names(), tuple(STOCK), tuple(YARDSTICKS), dict(MISSING))

    def environment(self) -> dict[str, Any]:
        """Versions and device."""
        found = {name: metadata.version(name) for name in ("triton",) if _installed(name)}
        found |= {"torch": torch.__version__, "torch_git": torch.version.git_version, "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version(), "threads": torch.get_num_threads()}
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "device_name": properties.name,
                "device_uuid": str(properties.uuid),
                "device_memory_bytes": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "l2_bytes": properties.L2_cache_size,
            }
        return found

    def refusals(self) -> list[str]:
        """What is on in this process and must not be, as a start-up file may set it."""
        found = {
            "torch.autograd.set_detect_anomaly": torch.is_anomaly_enabled(),
            "torch.set_default_dtype": torch.get_default_dtype() != torch.float32,
            "torch.set_default_device": torch.get_default_device().type != "cpu",
            "torch.autograd.set_grad_enabled(False)": not torch.is_grad_enabled(),
        }
        return [name for name, on in found.items() if on]

    def switches(self) -> dict[str, Any]:
        """The precision switches as they stand."""
        matmul = torch.backends.cuda.matmul
        return {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "mkldnn": torch.backends.mkldnn.enabled,
            "allow_bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
            "allow_fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
        }

    def configure(self, precision: str, division: str, device: str) -> None:
        """Sets the switches; the stock division leaves every switch alone."""
        if device not in self.devices():
            raise Unsupported(f"torch sees no {device} device")
        if precision == "tf32" and device == "cpu":
            raise Unsupported("a CPU has no TensorFloat-32 arithmetic")
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it costs seconds
            torch.compiler.reset()
        self._device, self._precision, self._division = device, precision, division
        if division == "stock":
            return
        # The old switch on purpose: it sets the new ones too, while after setting only those its getter raises.
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def promised_precision(self, implementation: str) -> str:
        """What was asked for; in the stock division, convolutions on a GPU use TF32 unless told otherwise."""
        conv_in_tf32 = self._division == "stock" and self._device == "cuda" and implementation == "grouped_conv"
        return "tf32" if conv_in_tf32 and self._precision == "ieee_fp32" else self._precision

    def free_bytes(self) -> int:
        """Memory that is free on the configured device."""
        return torch.cuda.mem_get_info()[0] if self._device == "cuda" else memory.free_bytes()

    def cache_bytes(self) -> int:
        """L2 of the GPU, or the last level of the CPU's caches."""
        if self._device == "cuda":
            return torch.cuda.get_device_properties(0).L2_cache_size
        return memory.last_cache_bytes()

    def arguments(self, inputs: Inputs, layout: str) -> tuple[torch.Tensor, ...]:
        """x, weight, bias, cotangent."""
        if inputs.bias is None:
            raise Unsupported("a workload without a bias")
        x, weight, bias, cotangent = (
            _from_numpy(array, self._device) for array in (inputs.x, inputs.weight, inputs.bias, inputs.cotangent)
        )
        # Copies: NumPy's memory is shared on a CPU, and every set of buffers is one of its own.
        return (_laid_out(x, layout), weight.clone(), bias.clone(), _laid_out(cotangent, layout))

    def prepare(self, task: Task, buffers: Sequence[tuple[torch.Tensor, ...]]) -> Prepared:
        """Builds the call, and compiles it by calling it once where the mode says so."""
        if task.implementation in implementation_names():
            _, i, o = buffers[0][1].shape
            reason = unsupported_reason(
                task.implementation,
                dtype=STORAGE_DTYPES[self._precision],
                device=self._device,
                in_features=i,
                out_features=o,
            )
            if reason is not None:
                raise Unsupported(reason)
        # Out of the box, a result may lie in memory as the implementation likes it.
        settle = self._division != "stock"
        return build(task, buffers, settle=settle, wait=self.wait)

    def account(self, prepared: Prepared) -> int | None:
        """Operations of the products of one call, by torch's formulas; None where it has none.

        Of a compiled function those in the graphs that Inductor turns into code.
        """
        compiled = prepared.compile_s is not None and prepared.compile_again is not None
        return prepared.program_flops if compiled else counted_flops(prepared.call)

    def trace(self, prepared: Prepared) -> Trace:
        """Runs one call under the profiler."""
        return traced(prepared.call, self._device)

    def large_product(self) -> tuple[Call, int]:
        """A square product."""
        size = 8192 if self._device == "cuda" else 1024
        dtype = getattr(torch, STORAGE_DTYPES[self._precision])
        a, b = (torch.randn(size, size, device=self._device).to(dtype) for _ in range(2))
        return lambda: a @ b, 2 * size**3

    def large_copy(self) -> tuple[Call, int]:
        """A copy of at least eight times the last cache."""
        size = max(8 * self.cache_bytes(), 2**27)
        a = torch.ones(size // 4, device=self._device)
        b = torch.empty_like(a)
        return lambda: b.copy_(a), 2 * a.nbytes

    def wait(self, result: Any) -> None:
        """Waits for the GPU; on a CPU every call has finished when it returns."""
        if self._device == "cuda":
            torch.cuda.synchronize()

    def to_numpy(self, result: Any, task: Task) -> Mapping[str, np.ndarray]:
        """The results by name."""
        results = result if isinstance(result, tuple) else (result,)
        named = dict(zip(RESULTS[task.direction], results, strict=True))
        axes = swapped_axes(task.layout)
        if axes is not None:
            named |= {name: named[name].transpose(*axes) for name in ("y", "dx") if name in named}
        return {name: _to_numpy(tensor) for name, tensor in named.items()}

    def peak_memory(self, prepared: Prepared) -> tuple[int | None, str]:
        """Allocator peak less what was live before on a GPU; growth of the resident set on a CPU.

        A CUDA graph replays in memory that it took while it was recorded: that is its figure where it is known, and
        graphs that `torch.compile` records by itself have none.
        """
        if self._device == "cpu":
            return memory.resident_growth(prepared.call)
        # A library's workspace is not this call's: graphs that torch.compile records give it back, and it comes again.
        self.wait(prepared.call())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.wait(prepared.call())
        peak = torch.cuda.max_memory_allocated() - before
        if peak > 0:
            return peak, "max_memory_allocated"
        return prepared.static_memory_bytes, "cuda_graph_capture"

    def is_out_of_memory(self, error: BaseException) -> bool:
        """The GPU's error has a class of its own, the CPU's only a text."""
        return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


TIMER = TorchTimer
