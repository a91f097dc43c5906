"""The protocol of a framework's half, its data types, and the few functions that both halves share.

Imports no framework.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from bench.plan.competitors import Catalogue
from parity_tests.judge.inputs import Inputs
from parity_tests.report.files import ScratchFolder

Call = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """The computation that is asked of a competitor.

    Attributes:
        implementation: a name of the tree's registry, of what users write instead, or of a yardstick.
        mode: how it is compiled and launched.
        direction: `forward`, `forward_backward` or `train_step`.
        layout: how x and dy lie in memory, and in the matched and tuned divisions y and dx as well.
        optimizer: of `train_step`, by its name in the neutral specification.
    """

    implementation: str
    mode: str
    direction: str
    layout: str = "contiguous"
    optimizer: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A competitor that is ready to be called.

    Attributes:
        call: returns all results of the direction, possibly before they are computed.
        compile_s: seconds for tracing, lowering and compilation; None where nothing is compiled.
        static_memory_bytes: outputs and temporaries by the compiler's account, or what a CUDA graph took while it was
            recorded; or None.
        program_flops: operations of one call by the framework's account of the program that runs, or None.
        compile_again: compiles the same program anew, with what is cached on disk; returns seconds.
        restart: brings parameters and optimiser back to their first state; None where a call changes nothing.
        text: the compiled program as text, or None.
        uncompiled_calls: how often Python ran what the mode says is compiled; None where nothing is compiled.
    """

    call: Call
    compile_s: float | None = None
    static_memory_bytes: int | None = None
    program_flops: int | None = None
    compile_again: Callable[[], float] | None = None
    restart: Callable[[], None] | None = None
    text: Callable[[], str | None] | None = None
    uncompiled_calls: Callable[[], int] | None = None


@dataclass(frozen=True)
class Trace:
    """The executions on the device during one call.

    Attributes:
        kernels: name to executions; on a CPU the framework's own operations.
        device_busy_s: time in which at least one of them ran; None on a CPU, where host and device are one.
    """

    kernels: Mapping[str, int]
    device_busy_s: float | None


class Unsupported(Exception):
    """The framework, or the device, cannot run what was asked; the message is the reason."""


def in_turn(calls: Sequence[Call]) -> Call:
    """Return one call that runs the given ones in turn, one at a time: each set of buffers has its own."""
    if len(calls) == 1:
        return calls[0]
    turn = cycle(calls)
    return lambda: next(turn)()


class Timer(Protocol):
    """One framework, in its own process."""

    framework: str

    def devices(self) -> tuple[str, ...]:
        """Return the names of the devices that are there: `cpu`, `cuda`."""
        ...

    def catalogue(self) -> Catalogue:
        """Return the competitors that can be run."""
        ...

    def environment(self) -> dict[str, Any]:
        """Return versions and device, for the fingerprint."""
        ...

    def refusals(self) -> list[str]:
        """Return the switches of this process under which a mode or a clock would be a lie."""
        ...

    def switches(self) -> dict[str, Any]:
        """Return the precision switches as they stand."""
        ...

    def configure(self, precision: str, division: str, device: str) -> None:
        """Set the switches for a cell and drops what earlier cells compiled.

        Raises:
            Unsupported: if the device has no such arithmetic.
        """
        ...

    def promised_precision(self, implementation: str) -> str:
        """Return the precision class that a result must reach under the configured switches."""
        ...

    def free_bytes(self) -> int:
        """Return the memory that is free on the configured device."""
        ...

    def cache_bytes(self) -> int:
        """Return the size of the last cache between the configured device's memory and its processors."""
        ...

    def arguments(self, inputs: Inputs, layout: str) -> tuple[Any, ...]:
        """Return x, weight, bias and cotangent on the device, in buffers of their own; x and dy in the layout."""
        ...

    def prepare(self, task: Task, buffers: Sequence[tuple[Any, ...]]) -> Prepared:
        """Build and compiles.

        Args:
            task: what to compute.
            buffers: arguments; each call takes the next set of them, then the first again.

        Raises:
            Unsupported: if the implementation does not support the call.
        """
        ...

    def account(self, prepared: Prepared) -> int | None:
        """Return the operations of one call by the framework's own account of the program that runs, or None."""
        ...

    def trace(self, prepared: Prepared) -> Trace:
        """Run one call under the framework's tracer."""
        ...

    def large_product(self) -> tuple[Call, int]:
        """Return a product large enough to reach the device's rate in the configured precision, and its operations."""
        ...

    def large_copy(self) -> tuple[Call, int]:
        """Return a copy large enough to reach the memory's rate, and the bytes that it reads and writes."""
        ...

    def wait(self, result: Any) -> None:
        """Return when the result is computed."""
        ...

    def to_numpy(self, result: Any, task: Task) -> Mapping[str, np.ndarray]:
        """Return the results by name, in the storage dtype and with the partition axis before the features.

        `y`; with gradients `dx`, `dweight`, `dbias`; after a step `dx`, `weight`, `bias`.
        """
        ...

    def peak_memory(self, prepared: Prepared) -> tuple[int | None, str]:
        """Return the bytes over the live arguments that one call needs at its peak, and the method."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return True if an error means that memory ran out."""
        ...


# Layout to the two axes of (b, n, features) that change places in memory; None where the axes are in order.
#   contiguous       (b, n, i): the partition axis before the features
#   partition_major  (n, b, i): what a batched product takes
#   time_series      (b, i, n): (batch, time, channel), whose contraction axis is strided
AXES: Mapping[str, tuple[int, int] | None] = MappingProxyType(
    {"contiguous": None, "partition_major": (0, 1), "time_series": (1, 2)}
)


def swapped_axes(layout: str) -> tuple[int, int] | None:
    """The axes that change places between memory and mathematics.

    Raises:
        ValueError: for a layout that is none.
    """
    if layout not in AXES:
        raise ValueError(f"layout: expected one of {', '.join(AXES)}, got {layout!r}; choose one of these.")
    return AXES[layout]


class CacheFolder:
    """A new, empty folder that is removed with this object.

    Attributes:
        path: where it is.
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
