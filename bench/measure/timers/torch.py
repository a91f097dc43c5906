"""PyTorch's side of the stopwatch."""

import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import ml_dtypes
import numpy as np
import torch

from bench.measure import memory
from bench.measure.functions.torch import STOCK, YARDSTICKS, resolve
from bench.measure.timers.base import Prepared, Unsupported
from bench.plan.cells import STORAGE_DTYPES
from bench.plan.competitors import COMPILE, Catalogue
from parity_tests.harness.inputs import Inputs
from torch_impl.registry import implementation_names, unsupported_reason


def _from_numpy(array: np.ndarray, device: str) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    host = tensor.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()


class TorchTimer:
    """See ``base.Timer``."""

    framework = "torch"

    def __init__(self) -> None:
        self._device, self._precision, self._division = "cpu", "ieee_fp32", "stock"

    def devices(self) -> tuple[str, ...]:
        """``cpu``, and ``cuda`` where this build sees a GPU."""
        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

    def catalogue(self) -> Catalogue:
        """What can be run."""
        return Catalogue(self.framework, implementation_names(), tuple(STOCK), tuple(YARDSTICKS))

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

    def switches(self) -> dict[str, Any]:
        """The precision switches as they stand."""
        matmul = torch.backends.cuda.matmul
        return {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
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

    def arguments(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """x, weight, bias, cotangent."""
        if inputs.bias is None:
            raise Unsupported("a workload without a bias")
        return tuple(
            _from_numpy(array, self._device) for array in (inputs.x, inputs.weight, inputs.bias, inputs.cotangent)
        )

    def prepare(self, implementation: str, mode: str, direction: str, arguments: tuple[Any, ...]) -> Prepared:
        """Builds the call, and compiles it by calling it once where the mode says so."""
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
        function = resolve(implementation)
        if mode == COMPILE:
            # Static shapes: the second workload of a process would otherwise be compiled for any size.
            function = torch.compile(function, dynamic=False)
        # Gradients are recorded only where they are asked for: the same storage, other leaves.
        gradients = direction == "forward_backward"
        x, weight, bias = (tensor.detach().requires_grad_(gradients) for tensor in arguments[:3])
        cotangent = arguments[3]

        def forward() -> torch.Tensor:
            return function(x, weight, bias)

        def forward_backward() -> tuple[torch.Tensor, ...]:
            y = function(x, weight, bias)
            return (y, *torch.autograd.grad(y, (x, weight, bias), cotangent))

        call = forward_backward if gradients else forward
        if mode != COMPILE:
            return Prepared(call, None, None)
        start = time.perf_counter()
        self.wait(call())
        return Prepared(call, time.perf_counter() - start, None)

    def wait(self, result: Any) -> None:
        """Waits for the GPU; on a CPU every call has finished when it returns."""
        if self._device == "cuda":
            torch.cuda.synchronize()

    def to_numpy(self, result: Any) -> Mapping[str, np.ndarray]:
        """The results by name."""
        results = result if isinstance(result, tuple) else (result,)
        names = ("y", "dx", "dweight", "dbias")[: len(results)]
        return {name: _to_numpy(tensor) for name, tensor in zip(names, results, strict=True)}

    def peak_memory(self, prepared: Prepared) -> tuple[int | None, str]:
        """Allocator peak less what was live before on a GPU; growth of the resident set on a CPU."""
        if self._device == "cpu":
            return memory.resident_growth(prepared.call)
        self.wait(None)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.wait(prepared.call())
        return torch.cuda.max_memory_allocated() - before, "max_memory_allocated"

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
