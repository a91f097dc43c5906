"""Find the likely cause of a difference between two optimisers: replay the same gradients with other settings."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from parity_tests.causes.search import first_confirmed
from parity_tests.training.criteria import SEMANTIC_FACTOR, distance, distances
from parity_tests.training.tasks import OptimizerSpec, TrainingSubject, TrainingTask

Replay = Callable[[OptimizerSpec], Mapping[str, np.ndarray]]


def explain_optimizer(spec: OptimizerSpec, replay: Replay, observed: Mapping[str, np.ndarray], limit: float) -> str:
    """Name the change to the optimiser's settings that reproduces an observed state.

    `replay` runs the trusted side with another spec over the same gradients and returns its final parameters. States
    within the Euclidean distance `limit` are equal.
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

    def reproduces(candidate: OptimizerSpec) -> bool:
        if candidate == spec:
            return False
        return distance(replay(candidate), observed) <= limit

    found = first_confirmed((sentence, lambda other=other: reproduces(other)) for sentence, other in candidates)
    return found or "none of the known settings explains it"


def replayed_cause(
    trusted: TrainingSubject,
    other: TrainingSubject,
    task: TrainingTask,
    spec: OptimizerSpec,
    steps: int,
    dtype: str = "float64",
) -> str:
    """Feed the same gradients to both optimisers in float64 and name the setting that explains their difference.

    Return nothing if they agree. `dtype` is that of the gradients: 16 bits with wider parameters is mixed precision.
    """
    states = trusted.train(task, spec, "float64", steps)[0].states
    gradients = [trusted.gradients(task, state, k + 1, dtype).gradients for k, state in enumerate(states)]
    own = [trusted.replay(task.parameters, spec, gradients, wide).states for wide in ("float64", "float32")]
    limit = SEMANTIC_FACTOR * float(distances(own[1], own[0]).max())
    observed = other.replay(task.parameters, spec, gradients, "float64").states[-1]
    if float(distances(own[0][-1:], [observed])[0]) <= limit:
        return ""

    def replay(candidate: OptimizerSpec) -> Mapping[str, np.ndarray]:
        return trusted.replay(task.parameters, candidate, gradients, "float64").states[-1]

    return explain_optimizer(spec, replay, observed, limit)
