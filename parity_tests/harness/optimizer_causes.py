"""Likely causes of a difference between two optimisers, found by replaying the same gradients with other settings."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from parity_tests.harness.optimizers import OptimizerSpec

Replay = Callable[[OptimizerSpec], Mapping[str, np.ndarray]]


def explain_optimizer(spec: OptimizerSpec, replay: Replay, observed: Mapping[str, np.ndarray], limit: float) -> str:
    """Returns which change to the optimiser's settings reproduces an observed state.

    Args:
        spec: what both sides were meant to run.
        replay: runs the trusted side with another spec over the same gradients and returns its final parameters.
        observed: the other side's final parameters.
        limit: Euclidean distance within which two states are equal.
    """
    decay = spec.weight_decay
    candidates: list[tuple[str, OptimizerSpec]] = [
        (f"epsilon is {value:g} instead of {spec.epsilon:g}", dataclasses.replace(spec, epsilon=value))
        for value in (1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 0.0)
        if value != spec.epsilon and spec.name != "sgd"
    ]
    candidates += [
        (f"weight decay is {value:g} instead of {decay:g}", dataclasses.replace(spec, weight_decay=value))
        for value in (0.0, 1e-4, 1e-2)
        if value != decay
    ]
    candidates += [
        ("weight decay also touches the biases", dataclasses.replace(spec, decay_bias=not spec.decay_bias)),
        ("Nesterov momentum is switched", dataclasses.replace(spec, nesterov=not spec.nesterov and spec.momentum > 0)),
        ("the gradient is not clipped", dataclasses.replace(spec, clip_norm=None)),
        ("there is no warm-up", dataclasses.replace(spec, warmup_steps=0)),
        ("the schedule is off by one step", dataclasses.replace(spec, first_step=spec.first_step + 1)),
        ("weight decay is coupled", dataclasses.replace(spec, name="adam" if spec.name == "adamw" else spec.name)),
    ]
    for sentence, candidate in candidates:
        if candidate == spec:
            continue
        state = replay(candidate)
        distance = np.sqrt(sum(float(np.sum((state[k] - observed[k]).astype(np.float64) ** 2)) for k in observed))
        if distance <= limit:
            return sentence
    return "none of the known settings explains it"
