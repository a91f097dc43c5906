"""What the workbench asks of a framework. Imports no framework."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import numpy as np

from bench.plan.competitors import Catalogue
from parity_tests.judge.inputs import Inputs

Call = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """What a competitor is asked to compute, and how.

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
    """What ran on the device during one call.

    Attributes:
        kernels: name to executions; on a CPU the framework's own operations.
        device_busy_s: time in which at least one of them ran; None on a CPU, where host and device are one.
    """

    kernels: Mapping[str, int]
    device_busy_s: float | None


class Unsupported(Exception):
    """The framework, or the device, cannot run what was asked; the message is the reason."""


def in_turn(calls: Sequence[Call]) -> Call:
    """One call that runs the given ones in turn, one at a time: each set of buffers has its own."""
    if len(calls) == 1:
        return calls[0]
    turn = cycle(calls)
    return lambda: next(turn)()


class Timer(Protocol):
    """One framework, in its own process."""

    framework: str

    def devices(self) -> tuple[str, ...]:
        """Names of the devices that are there: `cpu`, `cuda`."""
        ...

    def catalogue(self) -> Catalogue:
        """What can be run."""
        ...

    def environment(self) -> dict[str, Any]:
        """Versions and device, for the fingerprint."""
        ...

    def refusals(self) -> list[str]:
        """Switches of this process under which a mode or a clock would be a lie."""
        ...

    def switches(self) -> dict[str, Any]:
        """The precision switches as they stand."""
        ...

    def configure(self, precision: str, division: str, device: str) -> None:
        """Sets the switches for a cell and drops what earlier cells compiled.

        Raises:
            Unsupported: if the device has no such arithmetic.
        """
        ...

    def promised_precision(self, implementation: str) -> str:
        """The precision class that a result must reach under the configured switches."""
        ...

    def free_bytes(self) -> int:
        """Memory that is free on the configured device."""
        ...

    def cache_bytes(self) -> int:
        """Size of the last cache between the configured device's memory and its processors."""
        ...

    def arguments(self, inputs: Inputs, layout: str) -> tuple[Any, ...]:
        """x, weight, bias and cotangent on the configured device, in buffers of their own; x and dy in the layout."""
        ...

    def prepare(self, task: Task, buffers: Sequence[tuple[Any, ...]]) -> Prepared:
        """Builds and compiles.

        Args:
            task: what to compute.
            buffers: arguments; each call takes the next set of them, then the first again.

        Raises:
            Unsupported: if the implementation does not support the call.
        """
        ...

    def account(self, prepared: Prepared) -> int | None:
        """Operations of one call by the framework's own account of what runs, or None."""
        ...

    def trace(self, prepared: Prepared) -> Trace:
        """Runs one call under the framework's tracer."""
        ...

    def large_product(self) -> tuple[Call, int]:
        """A product large enough to reach the device's rate in the configured precision, and its operations."""
        ...

    def large_copy(self) -> tuple[Call, int]:
        """A copy large enough to reach the memory's rate, and the bytes that it reads and writes."""
        ...

    def wait(self, result: Any) -> None:
        """Returns when the result is computed."""
        ...

    def to_numpy(self, result: Any, task: Task) -> Mapping[str, np.ndarray]:
        """The results by name, in the storage dtype and with the partition axis before the features.

        `y`; with gradients `dx`, `dweight`, `dbias`; after a step `dx`, `weight`, `bias`.
        """
        ...

    def peak_memory(self, prepared: Prepared) -> tuple[int | None, str]:
        """Bytes over the live arguments that one call needs at its peak, and the method."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error means that memory ran out."""
        ...
