"""The truth about a parameter after one optimiser step, with the error that correct code can show.

Every first update is a monotone function f of the gradient g, so that an error of at most B in g shows as at most
`max(f(g + B) - f(g), f(g) - f(g - B))`: no tolerance is chosen, even where an optimiser hides the gradient's scale.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from parity_tests.judge.dtypes import FORMATS
from parity_tests.judge.oracle import OracleTensor
from parity_tests.judge.tolerance import Arithmetic, bound
from parity_tests.training.optimizers import OptimizerSpec

PARAMETERS: tuple[str, ...] = ("weight", "bias")
# Roundings of one update, in units of the parameters' roundoff. optax forms 1 - beta2^t in fp32, which alone costs
# about a hundred; what is left are the few products, the root and the quotient.
_UPDATE_ROUNDINGS = 16
_BIAS_CORRECTION_ROUNDINGS = 128


@dataclass(frozen=True)
class Step:
    """A parameter after one step.

    Attributes:
        value: in float64.
        limit: largest error of correct code, element by element.
    """

    value: np.ndarray
    limit: np.ndarray


def _first_update(spec: OptimizerSpec) -> Callable[[np.ndarray], np.ndarray]:
    """The first update by the gradient, before the learning rate."""
    if spec.clip_norm is not None:
        raise ValueError("optimizer: expected one without clipping, whose norm joins all partitions; choose another.")
    if spec.name == "sgd":
        factor = 1 + spec.momentum if spec.nesterov else 1.0
        return lambda g: factor * g
    # After one step the averages, corrected for their start at zero, are g and g^2; rmsprop corrects nothing.
    scale = np.sqrt(1 - spec.beta2) if spec.name == "rmsprop" else 1.0
    return lambda g: g / (scale * np.abs(g) + spec.epsilon)


def first_step(
    spec: OptimizerSpec, name: str, before: np.ndarray, gradient: OracleTensor, arithmetic: Arithmetic
) -> Step:
    """Takes one step in float64.

    Args:
        spec: the optimiser.
        name: `weight` or `bias`, which decides about weight decay.
        before: the parameter.
        gradient: the oracle's gradient.
        arithmetic: what the gradient was computed with.

    Raises:
        ValueError: if the optimiser clips.
    """
    update = _first_update(spec)
    parameter = before.astype(np.float64)
    roundoff, eta = FORMATS[arithmetic.output].roundoff, FORMATS[arithmetic.output].smallest_normal
    g, error = gradient.value.astype(np.float64), bound(gradient, arithmetic).astype(np.float64)
    decay = spec.weight_decay if spec.decays(name) else 0.0
    if decay and spec.name != "adamw":
        g = g + decay * parameter
        error = error + 2 * roundoff * (np.abs(g) + decay * np.abs(parameter))
    step = update(g)
    spread = np.maximum(update(g + error) - step, step - update(g - error))
    corrected = spec.name in ("adam", "adamw")
    roundings = _UPDATE_ROUNDINGS + (_BIAS_CORRECTION_ROUNDINGS if corrected and arithmetic.output == "float32" else 0)
    rate = float(spec.rates(1)[0])
    decoupled = decay if spec.name == "adamw" else 0.0
    value = parameter - rate * (step + decoupled * parameter)
    moved = rate * (spread + roundings * roundoff * (np.abs(step) + decoupled * np.abs(parameter)))
    limit = moved + 3 * roundoff * (np.abs(parameter) + np.abs(value)) + eta
    return Step(value, limit)
