"""The interface of a framework's half, its data types, and the few functions that both halves share.

Imports no framework.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from bench.plan.cells import RESULTS
from bench.plan.competitors import Catalogue
from bench.plan.workloads import AXES, FLAT, SHARED
from parity_tests.judge.inputs import Inputs, Sizes
from parity_tests.report.files import ScratchFolder

Call = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """The computation that is asked of a competitor."""

    implementation: str  # a name of the tree's registry, of what users write instead, or of a yardstick
    mode: str  # how it is compiled and launched
    direction: str  # `forward`, `forward_backward` or `train_step`
    layout: str = "contiguous"  # how x and dy lie in memory, and in the matched and tuned divisions y and dx as well
    optimizer: str | None = None  # of `train_step`, by its name in the neutral specification
    num_partitions: int | None = None  # n; None where x has an axis of its own for them, and no sizes are unequal
    sizes: Sizes | None = None  # of each partition where they are unequal


@dataclass(frozen=True)
class Prepared:
    """A competitor that is ready to be called."""

    call: Call  # returns all results of the direction, possibly before they are computed
    compile_s: float | None = None  # seconds for tracing, lowering and compilation; None where nothing is compiled
    # Outputs and temporaries by the compiler's account, or the memory that a CUDA graph took while it was recorded; or
    # None
    static_memory_bytes: int | None = None
    # Operations of one call by the framework's account of the program that runs, or None
    program_flops: int | None = None
    # Compiles the same program anew, with a filled cache on disk; returns seconds
    compile_again: Callable[[], float] | None = None
    # Brings parameters and optimiser back to their first state; None where a call changes nothing
    restart: Callable[[], None] | None = None
    text: Callable[[], str | None] | None = None  # the compiled program as text, or None
    # Counts the calls in which Python ran a function that should be compiled; None without one
    uncompiled_calls: Callable[[], int] | None = None


@dataclass(frozen=True)
class Trace:
    """The executions on the device during one call."""

    kernels: Mapping[str, int]  # name to executions; on a CPU the framework's own operations
    device_busy_s: float | None  # time in which at least one of them ran; None on a CPU, where host and device are one
    copied_bytes: int | None = None  # written by operations that only copy; None where a compiler hides them


class Unsupported(Exception):
    """A request that the framework or the device cannot run; the message is the reason."""


def alternating(calls: Sequence[Call]) -> Call:
    """Return one call that runs the given ones in turn, one at a time: each set of buffers has its own."""
    if len(calls) == 1:
        return calls[0]
    turn = cycle(calls)
    return lambda: next(turn)()


def restart_of(calls: Sequence[Any]) -> Callable[[], None] | None:
    """Return a function that restarts every training step among the calls, or None if there is none."""
    steps = [call for call in calls if hasattr(call, "restart")]

    def restart() -> None:
        for step in steps:
            step.restart()

    return restart if steps else None


class Timer(ABC):
    """One framework, in its own process."""

    framework: str

    def __init__(self) -> None:
        self._device, self._precision, self._division = "cpu", "ieee_fp32", "stock"

    @abstractmethod
    def devices(self) -> tuple[str, ...]:
        """Return the names of the devices that are there: `cpu`, `cuda`."""

    @abstractmethod
    def catalogue(self) -> Catalogue:
        """Return the competitors that can be run."""

    @abstractmethod
    def environment(self) -> dict[str, Any]:
        """Return versions and device, for the fingerprint."""

    @abstractmethod
    def refusals(self) -> list[str]:
        """Return the switches of this process under which a mode or a clock would be a lie.

        Variables are not passed on to a worker, but a start-up file may set the switches.
        """

    @abstractmethod
    def switches(self) -> dict[str, Any]:
        """Return the precision switches as they stand."""

    def configure(self, precision: str, division: str, device: str) -> None:
        """Set the switches for a cell and drop the programs of earlier cells.

        Raises:
            Unsupported: if the device has no such arithmetic.
        """
        if device not in self.devices():
            raise Unsupported(f"{self.framework} sees no {device} device")
        if precision == "tf32" and device == "cpu":
            raise Unsupported("a CPU has no TensorFloat-32 arithmetic")
        self._device, self._precision, self._division = device, precision, division
        self._apply()

    @abstractmethod
    def _apply(self) -> None:
        """Set the switches of the configured cell and drop the programs of earlier ones."""

    @abstractmethod
    def promised_precision(self, implementation: str) -> str:
        """Return the precision class that a result must reach under the configured switches."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the memory that is free on the configured device."""

    @abstractmethod
    def cache_bytes(self) -> int:
        """Return the size of the last cache between the configured device's memory and its processors."""

    @abstractmethod
    def new_array(self, size: int) -> Any:
        """Return an array of so many bytes in the CPU's memory, as results get theirs, and written to."""

    def arguments(self, inputs: Inputs, layout: str, num_partitions: int) -> tuple[Any, ...]:
        """Return x, weight, bias and cotangent on the device, in buffers of their own, as the layout has them."""
        if inputs.bias is None:
            raise Unsupported("a workload without a bias")
        arrays = {"x": inputs.x, "weight": inputs.weight, "bias": inputs.bias, "cotangent": inputs.cotangent}
        return tuple(self._placed(laid_out(name, array, layout, num_partitions)) for name, array in arrays.items())

    @abstractmethod
    def _placed(self, array: np.ndarray) -> Any:
        """Return a copy on the configured device, in memory that the framework allocates."""

    @abstractmethod
    def prepare(self, task: Task, buffers: Sequence[tuple[Any, ...]]) -> Prepared:
        """Build and compile; the call is then the one that a user would write.

        Args:
            task: what to compute.
            buffers: arguments; each call takes the next set of them, then the first again.

        Raises:
            Unsupported: if the implementation does not support the call.
        """

    @abstractmethod
    def account(self, prepared: Prepared) -> int | None:
        """Return the operations of one call by the framework's own account of the program that runs, or None."""

    @abstractmethod
    def trace(self, prepared: Prepared) -> Trace:
        """Run one call under the framework's tracer."""

    @abstractmethod
    def large_product(self) -> tuple[Call, int]:
        """Return a square product that reaches the device's rate in the configured precision, and its operations."""

    @abstractmethod
    def large_copy(self) -> tuple[Call, int]:
        """Return a copy of at least eight times the last cache, and the bytes that it reads and writes."""

    @abstractmethod
    def wait(self, result: Any) -> None:
        """Return when the result is computed."""

    def to_numpy(self, result: Any, task: Task) -> dict[str, np.ndarray]:
        """Return the results by name, in the storage dtype and with the partition axis before the features.

        `y`; with gradients `dx`, `dweight`, `dbias`; after a step `dx`, `weight`, `bias`.
        """
        results = result if isinstance(result, tuple) else (result,)
        return {
            name: canonical(name, self._whole(found, task), task.layout, task.num_partitions)
            for name, found in zip(RESULTS[task.direction], results, strict=True)
        }

    def _whole(self, result: Any, task: Task) -> np.ndarray:
        """Return a result as one array, packed where a competitor has one for each partition."""
        if not isinstance(result, tuple | list):
            return self._fetched(result)
        assert task.sizes is not None  # only competitors for unequal sizes have lists of parameters
        order = [k for members in task.sizes.buckets.values() for k in members]
        if result[0].ndim == 1:
            return np.concatenate([self._fetched(part) for part in result])
        return np.concatenate([self._fetched(self._in_out(result[k])).reshape(-1) for k in order])

    def _in_out(self, weight: Any) -> Any:
        """Return the (in, out) matrix of one that a list of parameters holds."""
        return weight

    @abstractmethod
    def _fetched(self, result: Any) -> np.ndarray:
        """Return a result as an array of NumPy."""

    @abstractmethod
    def peak_memory(self, prepared: Prepared) -> tuple[int | None, str]:
        """Return the bytes over the live arguments that one call needs at its peak, and the method."""

    @abstractmethod
    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return True if an error means that memory ran out."""


def laid_out(name: str, array: np.ndarray, layout: str, num_partitions: int) -> np.ndarray:
    """Return an operand as a layout has it; `canonical` undoes it."""
    if layout == SHARED:
        if name in ("x", "dx"):
            return array[:, 0]
        # One map to all outputs, in the correctness case; n maps, for whoever is called.
        apart = array.reshape(*array.shape[:-1], num_partitions, -1)
        return np.ascontiguousarray(np.moveaxis(apart, -2, 0)[:, 0] if name.endswith("weight") else apart[..., 0, :, :])
    if name not in ("x", "dx", "y", "cotangent"):
        return array
    return array.reshape(len(array), -1) if layout == FLAT else swapped(array, layout)


def canonical(name: str, array: np.ndarray, layout: str, num_partitions: int | None) -> np.ndarray:
    """Return an operand or a result in the form of the correctness case."""
    if layout == SHARED:
        if name in ("x", "dx"):
            return array[:, None]
        if name.endswith("weight"):
            return np.moveaxis(array, 0, 1).reshape(1, array.shape[1], -1)
        return array.reshape(*array.shape[:-2], 1, -1)
    if name not in ("x", "dx", "y", "cotangent"):
        return array
    return array.reshape(len(array), num_partitions or 1, -1) if layout == FLAT else swapped(array, layout)


def swapped(array: np.ndarray, layout: str) -> np.ndarray:
    """Return the array from its layout in memory to (b, n, features), or back: a swap of axes undoes itself."""
    axes = AXES[layout]
    return array if axes is None else np.ascontiguousarray(np.swapaxes(array, *axes))


class CacheFolder:
    """A new, empty folder for the compile cache of one program; it is removed with this object.

    A cold compilation then meets an empty cache, whatever ran before and whatever the user keeps; a warm one meets the
    results of the cold one.
    """

    def __init__(self) -> None:
        self._folder = ScratchFolder("cache")
        self.path = self._folder.name


def busy_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals, in their own unit: overlapping kernels do not count twice."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
