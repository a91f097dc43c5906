"""Describe an optimiser once, neutrally; both the torch.optim and the optax side are built from it.

Everything that the two libraries set by different defaults is stated here: learning rate and its step origin,
betas, epsilon and its placement (outside the square root, as torch has it), the initial accumulator, decoupled or
coupled weight decay and which parameters it touches, Nesterov without dampening, and the clip formula
`min(1, max_norm / (norm + 1e-6))`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"]
CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it; optax.clip_by_global_norm does not


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimiser, independent of the framework."""

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
