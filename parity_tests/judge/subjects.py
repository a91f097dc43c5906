"""The interface of a subject, and how subjects are found without importing a framework that nobody asked for."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from parity_tests.judge.cases import Case
from parity_tests.judge.inputs import Inputs
from parity_tests.training.optimizers import OptimizerSpec
from parity_tests.training.tasks import TrainingTask

FRAMEWORKS: tuple[str, ...] = ("torch", "jax")


class Subject(Protocol):
    """One implementation in one framework.

    Attributes:
        framework: `torch` or `jax`.
        implementation: a name of the framework's table, or the name of a layer class's subject.
        mode: a name of `modes.MODES`: how calls are run.
        isolates_partitions: whether a NaN in one partition leaves the others untouched.
    """

    @property
    def framework(self) -> str: ...  # noqa: D102

    @property
    def implementation(self) -> str: ...  # noqa: D102

    @property
    def mode(self) -> str: ...  # noqa: D102

    @property
    def isolates_partitions(self) -> bool: ...  # noqa: D102

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """One sentence if this subject cannot run the case in this dtype, else None."""
        ...

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Returns y, in the storage dtype or the one that the mode computes in."""
        ...

    def vjp(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Returns `y`, `dx`, `dweight` and, with a bias, `dbias`, in the storage dtype."""
        ...


@dataclass(frozen=True)
class LayerTap:
    """What one partitioned linear layer saw inside a model, as stored: enough to judge its gradients by T1."""

    x: np.ndarray
    y: np.ndarray
    cotangent: np.ndarray
    dx: np.ndarray


@dataclass(frozen=True)
class StepGradients:
    """Loss and gradients at one state, with a tap for each layer by name."""

    loss: float
    gradients: dict[str, np.ndarray]
    taps: dict[str, LayerTap]


@dataclass(frozen=True)
class Trajectory:
    """A training run.

    Attributes:
        losses: `(steps,)`, the loss before each update.
        states: the parameters after each update.
        moments: the optimiser's moments after the last update, as `<parameter>/<first|second>`.
        step_counts: the distinct step counts that the optimiser keeps at the end.
        moment_history: the moments after each update; kept by a replay only.
    """

    losses: np.ndarray
    states: list[dict[str, np.ndarray]]
    moments: dict[str, np.ndarray]
    step_counts: set[int]
    moment_history: list[dict[str, np.ndarray]] = field(default_factory=list)


@dataclass(frozen=True)
class MaskedRun:
    """A training run of layers that hold a dense matrix of which only the diagonal blocks are used.

    Attributes:
        states: the blocks and biases after each update, under the names and in the layout of the task's parameters.
        off_block: `(steps,)`: after each update, the largest magnitude among the weights outside the blocks and
            their gradients, NaN if one of them is.
    """

    states: list[dict[str, np.ndarray]]
    off_block: np.ndarray


class TrainingSubject(Protocol):
    """A framework that can train a task."""

    @property
    def framework(self) -> str: ...  # noqa: D102

    def gradients(
        self, task: TrainingTask, parameters: Mapping[str, np.ndarray], step: int, dtype: str
    ) -> StepGradients:
        """Loss and gradients at one state."""
        ...

    def train(
        self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int, members: int = 0, seed: int = 0
    ) -> list[Trajectory]:
        """Trains freely; with members, that many runs with a random rounding error after every step."""
        ...

    def replay(
        self,
        parameters: Mapping[str, np.ndarray],
        spec: OptimizerSpec,
        gradients: list[dict[str, np.ndarray]],
        dtype: str,
    ) -> Trajectory:
        """Feeds recorded gradients to the optimiser alone."""
        ...

    def train_masked(self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int) -> MaskedRun | None:
        """Trains with dense masked layers, or None if the framework has no layer with weights outside the blocks."""
        ...


def framework_available(framework: str) -> bool:
    """True if the framework can be imported here (it is not imported by asking)."""
    packages = {"torch": ("torch",), "jax": ("jax", "flax")}[framework]
    return all(package_available(package) for package in packages)


def package_available(name: str) -> bool:
    """Returns True if a package can be found here, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # an import hook that forbids it, or a stand-in that says nothing about itself
        return False


def check_precision(precision: str | None, has_tf32: bool) -> None:
    """Refuses TF32 where there is none: a bound for it would only be too wide.

    Raises:
        ValueError: in one sentence.
    """
    if precision == "tf32" and not has_tf32:
        raise ValueError(
            "precision: expected ieee_fp32 on a CPU, which has no TF32 arithmetic, got 'tf32'; leave it out, or use "
            "--device cuda where there is a GPU."
        )


def load_subjects(
    framework: str, device: str = "auto", modes: Sequence[str] = (), precision: str | None = None
) -> Sequence[Subject]:
    """Imports a framework and returns all its subjects.

    Args:
        framework: `torch` or `jax`.
        device: `auto` (a GPU if there is one), `cpu` or `cuda`.
        modes: of the framework, see `modes.modes_of`; none for its default.
        precision: `tf32` to let products of fp32 arrays round their operands to TF32; None for fp32's own.

    Raises:
        ValueError: for another framework, a device that is not there, or TF32 on a CPU.
        ImportError: if the framework is not installed.
    """
    return _subjects_of(framework).subjects(device, modes, precision)


def load_plain_linear(framework: str, device: str = "auto") -> Subject:
    """Imports a framework and returns its own Linear, as a subject for inputs with one partition.

    Args:
        framework: `torch` or `jax`.
        device: `auto` (a GPU if there is one), `cpu` or `cuda`.

    Raises:
        ValueError: for another framework, or a device that is not there.
        ImportError: if the framework is not installed.
    """
    return _subjects_of(framework).plain_linear(device)


def _subjects_of(framework: str) -> Any:
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework: expected one of {', '.join(FRAMEWORKS)}, got {framework!r}; choose one of these.")
    return importlib.import_module(f"parity_tests.frameworks.{framework}.subjects")


def release_programs() -> None:
    """Drops what the frameworks that were loaded have compiled so far.

    JAX keeps every program, and a program for a CPU takes memory maps, one or more for each of its products: after some
    hundred cells a process would have as many as Linux allows (65530) and crash.
    """
    for framework in FRAMEWORKS:
        module = sys.modules.get(f"parity_tests.frameworks.{framework}.subjects")
        if module is not None:
            module.release_programs()
