"""Define training tasks in NumPy float64, the same for both frameworks, and the interface that trains them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from parity_tests.training.optimizers import OptimizerSpec

ModelName = Literal["mlp", "nlinear"]


@dataclass(frozen=True)
class TrainingTask:
    """A model with its starting parameters and its batches."""

    name: str  # for reports
    # `mlp`: `y = tanh(x W1 + b1) W2 + b2` per partition; `nlinear`: the NLinear-I forecaster, one linear map a channel
    # on a series from which its last value was subtracted
    model: ModelName
    parameters: dict[str, np.ndarray]  # starting values by name, float64, never zero
    inputs: np.ndarray  # `(batches, batch, ...)`, float64; step k uses batch `k % batches`
    targets: np.ndarray  # `(batches, batch, ...)`, float64


@dataclass(frozen=True)
class LayerTap:
    """The arrays at one partitioned linear layer inside a model, as stored: enough to judge its gradients by T1."""

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
    """A training run."""

    losses: np.ndarray  # `(steps,)`, the loss before each update
    states: list[dict[str, np.ndarray]]  # the parameters after each update
    moments: dict[str, np.ndarray]  # the optimiser's moments after the last update, as `<parameter>/<first|second>`
    step_counts: set[int]  # the distinct step counts that the optimiser keeps at the end
    # The moments after each update; kept by a replay only
    moment_history: list[dict[str, np.ndarray]] = field(default_factory=list)


@dataclass(frozen=True)
class MaskedRun:
    """A training run of layers that hold a dense matrix of which only the diagonal blocks are used."""

    # The blocks and biases after each update, under the names and in the layout of the task's parameters
    states: list[dict[str, np.ndarray]]
    # `(steps,)`: after each update, the largest magnitude among the weights outside the blocks and their gradients, NaN
    # if one of them is
    off_block: np.ndarray


class TrainingSubject(Protocol):
    """A framework that can train a task."""

    @property
    def framework(self) -> str: ...  # noqa: D102

    def gradients(
        self, task: TrainingTask, parameters: Mapping[str, np.ndarray], step: int, dtype: str
    ) -> StepGradients:
        """Return loss and gradients at one state."""
        ...

    def train(
        self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int, members: int = 0, seed: int = 0
    ) -> list[Trajectory]:
        """Train freely; with members, that many runs with a random rounding error after every step."""
        ...

    def replay(
        self,
        parameters: Mapping[str, np.ndarray],
        spec: OptimizerSpec,
        gradients: list[dict[str, np.ndarray]],
        dtype: str,
    ) -> Trajectory:
        """Feed recorded gradients to the optimiser alone."""
        ...

    def train_masked(self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int) -> MaskedRun | None:
        """Train with dense masked layers, or None if the framework has no layer with weights outside the blocks."""
        ...


# --- tasks ---


def _stored_in_float32(array: np.ndarray) -> np.ndarray:
    """Round to numbers that fp32 holds exactly, so that fp32 and float64 runs start from the same point."""
    return array.astype(np.float32).astype(np.float64)


def partitioned_mlp() -> TrainingTask:
    """Return a two-layer partitioned MLP that learns a random teacher of the same shape, with noise."""
    rng = np.random.default_rng(0)
    n, i, hidden, o, batch, batches = 4, 12, 16, 8, 32, 16

    def layer(inputs: int, outputs: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
        weight = scale * rng.standard_normal((n, inputs, outputs)) / math.sqrt(inputs)
        return weight, 0.3 * rng.standard_normal((n, outputs))

    def forward(x: np.ndarray, w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray) -> np.ndarray:
        hidden_values = np.tanh(np.einsum("...ni,nih->...nh", x, w1) + b1)
        return np.einsum("...nh,nho->...no", hidden_values, w2) + b2

    teacher = (*layer(i, hidden, 1.5), *layer(hidden, o, 1.5))
    student = (*layer(i, hidden, 0.8), *layer(hidden, o, 0.8))
    inputs = rng.standard_normal((batches, batch, n, i))
    targets = forward(inputs, *teacher) + 0.05 * rng.standard_normal((batches, batch, n, o))
    names = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
    return TrainingTask(
        "partitioned MLP",
        "mlp",
        {name: _stored_in_float32(value) for name, value in zip(names, student, strict=True)},
        _stored_in_float32(inputs),
        _stored_in_float32(targets),
    )


def nlinear_series() -> TrainingTask:
    """Return NLinear-I on a synthetic multivariate series: a trend, two seasons and noise in each channel."""
    rng = np.random.default_rng(0)
    channels, lookback, horizon, batch, batches = 7, 48, 12, 16, 16
    length = lookback + horizon + batch * batches
    time = np.arange(length)[:, None]
    daily, weekly = 2 * np.pi * time / 24, 2 * np.pi * time / 168
    phase = rng.uniform(0, 2 * np.pi, (2, channels))
    series = (
        rng.normal(0, 0.004, channels) * time
        + rng.uniform(0.5, 1.5, channels) * np.sin(daily + phase[0])
        + rng.uniform(0.2, 0.8, channels) * np.sin(weekly + phase[1])
        + 0.1 * rng.standard_normal((length, channels))
    )
    starts = rng.permutation(length - lookback - horizon)[: batch * batches]
    window = np.stack([series[start : start + lookback + horizon] for start in starts])
    window = _stored_in_float32(window).reshape(batches, batch, lookback + horizon, channels)
    limit = 1 / math.sqrt(lookback)
    return TrainingTask(
        "NLinear-I",
        "nlinear",
        {
            "head.weight": _stored_in_float32(rng.uniform(-limit, limit, (channels, lookback, horizon))),
            "head.bias": _stored_in_float32(rng.uniform(-limit, limit, (channels, horizon))),
        },
        window[:, :, :lookback],
        window[:, :, lookback:],
    )


TASKS: dict[str, Callable[[], TrainingTask]] = {"partitioned-mlp": partitioned_mlp, "nlinear": nlinear_series}
