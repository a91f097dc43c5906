"""Define optimisers and training tasks, the same for both frameworks, and the interface that trains them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

ModelName = Literal["mlp", "nlinear"]

# --- optimisers ---

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"]
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it; optax.clip_by_global_norm does not


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimiser, described once: both the torch.optim and the optax side are built from it.

    Everything that the two libraries set by different defaults is stated: learning rate and its step origin, betas,
    epsilon and its placement, the initial accumulator, decoupled or coupled weight decay and which parameters it
    touches, Nesterov without dampening, and the clip formula `min(1, max_norm / (norm + 1e-6))`.
    """

    name: OptimizerName  # the algorithm
    learning_rate: float  # peak learning rate
    momentum: float = 0.0  # for `sgd`; 0 for none
    nesterov: bool = False  # for `sgd` with momentum
    beta1: float = 0.9  # for `adam` and `adamw`
    beta2: float = 0.999  # for `adam` and `adamw`; the averaging constant of `rmsprop`
    epsilon: float = 1e-8  # added to the root of the second moment, outside the root
    weight_decay: float = 0.0  # coupled (added to the gradient) for all but `adamw`, decoupled for `adamw`
    # True if biases decay too. Our bias is 2-D: the common rule "decay what has two or more dimensions" would decay it,
    # so the choice is explicit
    decay_bias: bool = False
    clip_norm: float | None = None  # largest global norm of the gradient, or None
    # The learning rate rises linearly over this many steps; its first value is `peak / warmup_steps`
    warmup_steps: int = 0
    cosine_steps: int = 0  # after the warm-up it falls along a cosine to 0 over this many steps; 0 for a constant rate
    first_step: int = 0  # the schedule's step at the first update: 0 unless an origin is off

    def rates(self, steps: int) -> np.ndarray:
        """Return the learning rate of each of the first `steps` steps, in float64; step 0 is the first update.

        A table and not a schedule object: optax's schedules return float32 even under x64.
        """
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}; a schedule needs a step.")
        return np.array([self.learning_rate * self._factor(step + self.first_step) for step in range(steps)])

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if not self.cosine_steps:
            return 1.0
        done = min(step - self.warmup_steps, self.cosine_steps) / self.cosine_steps
        return 0.5 * (1 + math.cos(math.pi * done))

    @property
    def keeps_moments(self) -> bool:
        """True if the algorithm averages or sums gradients over the steps: all but plain SGD."""
        return self.name != "sgd" or self.momentum != 0

    @property
    def counts_steps(self) -> bool:
        """True if an update depends on the number of steps apart from the schedule: Adam's bias correction."""
        return self.name in ("adam", "adamw")

    def decays(self, parameter: str) -> bool:
        """Return True if weight decay touches a parameter, by its name `...weight` or `...bias`."""
        return self.weight_decay > 0 and (self.decay_bias or not parameter.endswith("bias"))


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sgd": OptimizerSpec("sgd", 0.05),
    "sgd-weight-decay": OptimizerSpec("sgd", 0.05, weight_decay=1e-2),
    "momentum": OptimizerSpec("sgd", 0.02, momentum=0.9),
    "nesterov": OptimizerSpec("sgd", 0.02, momentum=0.9, nesterov=True),
    "adam": OptimizerSpec("adam", 3e-3),
    "adamw": OptimizerSpec("adamw", 3e-3, weight_decay=1e-2),
    "rmsprop": OptimizerSpec("rmsprop", 1e-3, beta2=0.99),
    "adagrad": OptimizerSpec("adagrad", 2e-2, epsilon=1e-10),
    "adamw-clip-warmup-cosine": OptimizerSpec(
        "adamw", 5e-3, weight_decay=1e-2, clip_norm=0.5, warmup_steps=20, cosine_steps=480
    ),
    "momentum-clip": OptimizerSpec("sgd", 0.02, momentum=0.9, clip_norm=0.25),
}


def optimizer(name: str) -> OptimizerSpec:
    """Return an optimiser of `OPTIMIZERS` by its name.

    Raises:
        ValueError: for another name, with the choices.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}; choose one of these.")
    return OPTIMIZERS[name]


# --- the interface of a framework ---


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
