"""One optimiser step in NumPy float64, written from the formulas: what both built sides are compared with.

With g the gradient (clipped, and with coupled decay `w d` added), rate r, t counted from 1 and all state from 0::

    sgd      m <- mu m + g;  p <- p - r m                    Nesterov: p <- p - r (g + mu m)
    adam     m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2
             p <- p - r (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
    adamw    as adam, after p <- p (1 - r d): the decay is decoupled
    rmsprop  v <- b2 v + (1-b2) g^2;  p <- p - r g / (sqrt(v) + eps)
    adagrad  v <- v + g^2;  p <- p - r g / (sqrt(v) + eps)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from parity_tests.training.tasks import CLIP_EPSILON, OptimizerSpec

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ReferenceState:
    """Parameters and optimiser state between two steps.

    Attributes:
        parameters: by name, `...weight` and `...bias`, in float64.
        first: first moments; empty before the first step.
        second: second moments; empty before the first step.
        steps: steps taken so far.
    """

    parameters: Arrays
    first: Arrays = field(default_factory=dict)
    second: Arrays = field(default_factory=dict)
    steps: int = 0


def reference_step(spec: OptimizerSpec, state: ReferenceState, gradients: Arrays) -> ReferenceState:
    """Takes one step.

    Args:
        spec: the optimiser.
        state: parameters and moments; `ReferenceState(parameters)` before the first step.
        gradients: by the names of the parameters.

    Returns:
        The state after the step; the given one stays as it is.
    """
    step = state.steps + 1
    rate = float(spec.rates(step)[-1])
    scale = 1.0
    if spec.clip_norm is not None:
        norm = np.sqrt(sum(float(np.sum(np.square(np.asarray(g, np.float64)))) for g in gradients.values()))
        scale = min(1.0, spec.clip_norm / (norm + CLIP_EPSILON))
    parameters: dict[str, np.ndarray] = {}
    first: dict[str, np.ndarray] = {}
    second: dict[str, np.ndarray] = {}
    for name, before in state.parameters.items():
        value = np.asarray(before, np.float64)
        gradient = scale * np.asarray(gradients[name], np.float64)
        decay = spec.weight_decay if spec.decays(name) else 0.0
        if spec.name == "adamw":
            value = value * (1 - rate * decay)
        else:
            gradient = gradient + decay * value
        m, v = state.first.get(name, np.zeros_like(value)), state.second.get(name, np.zeros_like(value))
        if spec.name == "sgd":
            m = spec.momentum * m + gradient
            update = gradient + spec.momentum * m if spec.nesterov else m
        elif spec.name in ("adam", "adamw"):
            m = spec.beta1 * m + (1 - spec.beta1) * gradient
            v = spec.beta2 * v + (1 - spec.beta2) * gradient**2
            update = (m / (1 - spec.beta1**step)) / (np.sqrt(v / (1 - spec.beta2**step)) + spec.epsilon)
        else:
            v = v + gradient**2 if spec.name == "adagrad" else spec.beta2 * v + (1 - spec.beta2) * gradient**2
            update = gradient / (np.sqrt(v) + spec.epsilon)
        parameters[name], first[name], second[name] = value - rate * update, m, v
    return ReferenceState(parameters, first, second, step)
