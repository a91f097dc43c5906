"""What the workbench asks of a framework. Imports no framework."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bench.plan.competitors import Catalogue
from parity_tests.harness.inputs import Inputs

Call = Callable[[], Any]


@dataclass(frozen=True)
class Prepared:
    """A competitor that is ready to be called.

    Attributes:
        call: returns all results of the direction, possibly before they are computed.
        compile_s: seconds for tracing, lowering and compilation; None where nothing is compiled.
        static_memory_bytes: outputs and temporaries by the compiler's account, or None.
    """

    call: Call
    compile_s: float | None
    static_memory_bytes: int | None


class Unsupported(Exception):
    """The framework, or the device, cannot run what was asked; the message is the reason."""


class Timer(Protocol):
    """One framework, in its own process."""

    framework: str

    def devices(self) -> tuple[str, ...]:
        """Names of the devices that are there: ``cpu``, ``cuda``."""
        ...

    def catalogue(self) -> Catalogue:
        """What can be run."""
        ...

    def environment(self) -> dict[str, Any]:
        """Versions and device, for the fingerprint."""
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

    def arguments(self, inputs: Inputs) -> tuple[Any, ...]:
        """x, weight, bias and cotangent on the configured device."""
        ...

    def prepare(self, implementation: str, mode: str, direction: str, arguments: tuple[Any, ...]) -> Prepared:
        """Builds and compiles.

        Raises:
            Unsupported: if the implementation does not support the call.
        """
        ...

    def wait(self, result: Any) -> None:
        """Returns when the result is computed."""
        ...

    def to_numpy(self, result: Any) -> Mapping[str, np.ndarray]:
        """``y``, and with gradients ``dx``, ``dweight``, ``dbias``, in the storage dtype."""
        ...

    def peak_memory(self, prepared: Prepared) -> tuple[int | None, str]:
        """Bytes over the live arguments that one call needs at its peak, and the method."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error means that memory ran out."""
        ...
