"""PyTorch's half of the stopwatch."""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure import machine
from bench.measure.timer import Call, Prepared, Task, Timer, Trace, Unsupported, busy_s
from bench.measure.torch.functions import MISSING, STOCK, UNEQUAL_STOCK, YARDSTICKS
from bench.measure.torch.programs import build, counted_flops
from bench.plan.cells import DEVICES, STORAGE_DTYPES
from bench.plan.competitors import Catalogue
from bench.plan.costs import ITEM_BYTES
from bench.plan.workloads import SHARED
from parity_tests.frameworks.torch.modes import DispatchMode, to_numpy, to_torch
from torch_impl.registry import IMPLEMENTATIONS, implementation_names, unsupported_reason


def _outermost(events: Sequence[object]) -> Counter[str]:
    """Return the operations that no other operation of torch's library called."""

    def inner(event: object) -> bool:
        parent = getattr(event, "cpu_parent", None)
        while parent is not None:
            if parent.name.startswith("aten::"):
                return True
            parent = parent.cpu_parent
        return False

    return Counter(
        str(event.name)  # type: ignore[attr-defined]
        for event in events
        if event.name.startswith("aten::") and not inner(event)  # type: ignore[attr-defined]
    )


def traced(call: Call, device: str) -> Trace:
    """Run a call under torch's profiler."""
    if device == "cpu":
        with profile(activities=[ProfilerActivity.CPU]) as found:
            call()
        return Trace(dict(_outermost(found.events() or ())), None)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    events = [event for event in found.events() or () if event.device_type.name == "CUDA"]
    intervals = [(event.time_range.start, event.time_range.end) for event in events]
    # The profiler's unit is the microsecond.
    return Trace(dict(Counter(event.name for event in events)), busy_s(intervals) * 1e-6)


_COPIES = frozenset(
    {"clone", "copy_", "_to_copy", "cat", "stack", "constant_pad_nd", "index_select", "index", "gather"}
)
_COPIES |= {
    "repeat",
    "slice_backward",
    "select_backward",
    "slice_scatter",
    "select_scatter",
    "index_put_",
    "index_copy_",
}


class _Copies(DispatchMode):
    """Adds up what operations write that only copy, and collects the names of all others."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.others = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in _COPIES:
            # A number of Python's that joins an operation is cast too, and is no array.
            self.written += result.numel() * result.element_size() if result.ndim else 0
        else:
            self.others.add(f"aten::{name}")
        return result


def copied_bytes(call: Call, item_bytes: int) -> int:
    """Return the bytes that one call writes in operations that only copy.

    Args:
        call: operation by operation, not compiled.
        item_bytes: of one number, for the copies that a product makes of its operands inside a library's call.
    """
    with _Copies() as seen:
        call()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        call()
    inside = 0
    for event in found.events() or ():
        parent = event.cpu_parent if event.name == "aten::copy_" else None
        while parent is not None and parent.name not in seen.others:
            parent = parent.cpu_parent
        shape = event.input_shapes[0] if parent is not None else []
        inside += math.prod(shape) * item_bytes if shape else 0
    return seen.written + inside


class TorchTimer(Timer):
    """PyTorch; see `Timer`."""

    framework = "torch"

    def devices(self) -> tuple[str, ...]:
        """Return `cpu`, and `cuda` where this build sees a GPU."""
        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

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
        """Return the switches that are on and must not be."""
        found = {
            "torch.autograd.set_detect_anomaly": torch.is_anomaly_enabled(),
            "torch.set_default_dtype": torch.get_default_dtype() != torch.float32,
            "torch.set_default_device": torch.get_default_device().type != "cpu",
            "torch.autograd.set_grad_enabled(False)": not torch.is_grad_enabled(),
        }
        return [name for name, on in found.items() if on]

    def switches(self) -> dict[str, Any]:
        """Return the precision switches as they stand."""
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

    def _apply(self) -> None:
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it costs seconds
            torch.compiler.reset()
        # The stock division leaves every switch alone.
        if self._division == "stock":
            return
        # The old switch on purpose: it sets the new ones too, while after setting only those its getter raises.
        torch.set_float32_matmul_precision("high" if self._precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = self._precision == "tf32"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def promised_precision(self, implementation: str) -> str:
        """Return the precision asked for; in the stock division, convolutions on a GPU use TF32 by default."""
        conv_in_tf32 = self._division == "stock" and self._device == "cuda" and implementation == "grouped_conv"
        return "tf32" if conv_in_tf32 and self._precision == "ieee_fp32" else self._precision

    def free_bytes(self) -> int:
        """Return the memory that is free on the configured device."""
        return torch.cuda.mem_get_info()[0] if self._device == "cuda" else machine.free_bytes()

    def cache_bytes(self) -> int:
        """Return the size of the GPU's L2, or of the last level of the CPU's caches."""
        if self._device == "cuda":
            return torch.cuda.get_device_properties(0).L2_cache_size
        return machine.last_cache_bytes()

    def new_array(self, size: int) -> torch.Tensor:
        """Return an array of so many bytes in the CPU's memory, as results get theirs, and written to."""
        return torch.ones(size, dtype=torch.uint8)

    def _placed(self, array: np.ndarray) -> torch.Tensor:
        return to_torch(array, torch.device(self._device)).clone()

    def prepare(self, task: Task, buffers: Sequence[tuple[torch.Tensor, ...]]) -> Prepared:
        """Build the call, and compile it by calling it once where the mode says so."""
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
        # Out of the box, a result may lie in memory as the implementation likes it.
        settle = self._division != "stock"
        return build(task, buffers, settle=settle, wait=self.wait)

    def account(self, prepared: Prepared) -> int | None:
        """Return the operations of the products of one call, by torch's formulas; None where it has none.

        Of a compiled function those in the graphs that Inductor turns into code.
        """
        compiled = prepared.compile_s is not None and prepared.compile_again is not None
        return prepared.program_flops if compiled else counted_flops(prepared.call)

    def trace(self, prepared: Prepared) -> Trace:
        """Run one call under the profiler; copies are seen where no compiler and no graph hides the operations."""
        found = traced(prepared.call, self._device)
        if prepared.compile_s is not None:
            return found
        return replace(found, copied_bytes=copied_bytes(prepared.call, ITEM_BYTES[STORAGE_DTYPES[self._precision]]))

    def large_product(self) -> tuple[Call, int]:
        """Return a square product and its operations."""
        size = 8192 if self._device == "cuda" else 1024
        dtype = getattr(torch, STORAGE_DTYPES[self._precision])
        a, b = (torch.randn(size, size, device=self._device).to(dtype) for _ in range(2))
        return lambda: a @ b, 2 * size**3

    def large_copy(self) -> tuple[Call, int]:
        """Return a copy and its bytes."""
        size = max(8 * self.cache_bytes(), 2**27)
        a = torch.ones(size // 4, device=self._device)
        b = torch.empty_like(a)
        return lambda: b.copy_(a), 2 * a.nbytes

    def wait(self, result: Any) -> None:
        """Wait for the GPU; on a CPU every call has finished when it returns."""
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _in_out(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def _fetched(self, result: torch.Tensor) -> np.ndarray:
        return to_numpy(result)

    def peak_memory(self, prepared: Prepared) -> tuple[int | None, str]:
        """Return the allocator's peak less the live memory on a GPU, the growth of the resident set on a CPU.

        A CUDA graph replays in memory that it took while it was recorded: that is its figure where it is known, and
        graphs that `torch.compile` records by itself have none.
        """
        if self._device == "cpu":
            return machine.resident_growth(prepared.call)
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
        """Return True for an error of memory: the GPU's has a class of its own, the CPU's only a text."""
        return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


TIMER = TorchTimer
