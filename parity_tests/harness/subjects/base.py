"""The interface of a subject, and how subjects are found without importing a framework that nobody asked for."""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from parity_tests.harness.cases import Case
from parity_tests.harness.inputs import Inputs

FRAMEWORKS: tuple[str, ...] = ("torch", "jax")


class Subject(Protocol):
    """One implementation in one framework.

    Attributes:
        framework: ``torch`` or ``jax``.
        implementation: a name of the framework's table, or the name of a layer class's subject.
        isolates_partitions: whether a NaN in one partition leaves the others untouched.
    """

    framework: str
    implementation: str
    isolates_partitions: bool

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """One sentence if this subject cannot run the case in this dtype, else None."""
        ...

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Returns y, in the storage dtype."""
        ...

    def vjp(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Returns ``y``, ``dx``, ``dweight`` and, with a bias, ``dbias``, in the storage dtype."""
        ...


def framework_available(framework: str) -> bool:
    """True if the framework can be imported here (it is not imported by asking)."""
    packages = {"torch": ("torch",), "jax": ("jax", "flax")}[framework]
    return all(importlib.util.find_spec(package) is not None for package in packages)


def load_subjects(framework: str, device: str = "auto") -> Sequence[Subject]:
    """Imports a framework and returns all its subjects.

    Args:
        framework: ``torch`` or ``jax``.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.

    Raises:
        ValueError: for another framework, or a device that is not there.
        ImportError: if the framework is not installed.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework: expected one of {', '.join(FRAMEWORKS)}, got {framework!r}; choose one of these.")
    return importlib.import_module(f"parity_tests.harness.subjects.{framework}").subjects(device)
