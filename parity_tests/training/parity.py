"""Training parity: six criteria, all of which two frameworks must meet after K optimiser steps.

1. semantic: in float64 the two differ by at most `16 E32 2^-29`, E32 being that framework's own fp32-against-float64
   divergence: a wrong epsilon, decay or schedule shows here by orders of magnitude, where "loss within 1e-3" misses it.
2. replay: the same recorded gradients fed to both optimisers give the same states, updates and moments, step by step.
3. resynchronised: at each state of the float64 run, rounded, each layer's output and gradients keep the T1 bound.
4. free-running: each framework's fp32 error against its own float64 run lies inside an ensemble of runs with an extra
   rounding error after each step.
5. not vacuous: loss and parameters moved at least 100 times the gap, and every parameter received a gradient.
6. moments and step counts agree; what a masked layer holds outside its blocks stays exactly zero, and the blocks train
   as the compact weights do (torch alone has such a layer: in JAX nothing outside the blocks is a parameter).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parity_tests.judge.subjects import TrainingSubject
from parity_tests.training.criteria import (
    Criterion,
    distances,
    free_running,
    moments_agree,
    not_vacuous,
    semantic,
    state_vector,
    steps_counted,
)
from parity_tests.training.optimizers import OptimizerSpec
from parity_tests.training.stepwise import off_block, replayed, resynchronised
from parity_tests.training.tasks import TrainingTask


@dataclass(frozen=True)
class TrainingReport:
    """The verdict on one task and optimiser, with the curves that a report draws.

    Attributes:
        task: name of the task.
        optimizer: name of the optimiser.
        criteria: all six (some of them once a framework).
        losses: fp32 loss curves by framework.
        divergence: relative distance of each framework's fp32 run from its own float64 run, by step.
        band: the largest and smallest such distance over the noise ensemble, by framework: `(2, steps)`.
    """

    task: str
    optimizer: str
    criteria: list[Criterion]
    losses: dict[str, np.ndarray]
    divergence: dict[str, np.ndarray]
    band: dict[str, np.ndarray]

    @property
    def ok(self) -> bool:
        """True if every criterion holds and there is one."""
        return bool(self.criteria) and all(criterion.ok for criterion in self.criteria)


def training_parity(
    sides: Sequence[TrainingSubject],
    task: TrainingTask,
    spec: OptimizerSpec,
    optimizer: str,
    steps: int = 500,
    members: int = 12,
) -> TrainingReport:
    """Trains a task on both sides and judges all six criteria.

    Args:
        sides: the two frameworks.
        task: what is trained.
        spec: the optimiser.
        optimizer: its name for the report.
        steps: K.
        members: size of the noise ensemble.

    Raises:
        ValueError: unless there are two different frameworks and two members at least.
    """
    if len({side.framework for side in sides}) != 2 or members < 2:
        raise ValueError(
            f"training_parity: expected two frameworks and at least 2 members, got "
            f"{[side.framework for side in sides]} and {members}; parity needs two sides and a spread two members."
        )
    double = {side.framework: side.train(task, spec, "float64", steps)[0] for side in sides}
    single = {side.framework: side.train(task, spec, "float32", steps)[0] for side in sides}
    recorded = [
        sides[0].gradients(task, state, step + 1, "float64").gradients
        for step, state in enumerate(double[sides[0].framework].states)
    ]
    criteria = [*semantic(double, single), *replayed(sides, task, spec, recorded)]
    divergence, band = {}, {}
    for side in sides:
        name = side.framework
        criteria.append(resynchronised(side, task, double[name].states, range(steps)))
        scale = np.linalg.norm(state_vector(task.parameters))
        own = distances(single[name].states, double[name].states) / scale
        runs = side.train(task, spec, "float32", steps, members, seed=1)
        ensemble = np.stack([distances(run.states, double[name].states) / scale for run in runs])
        criteria.append(free_running(name, own, ensemble))
        divergence[name], band[name] = own, np.stack([ensemble.min(0), ensemble.max(0)])
    criteria += not_vacuous(task, double, sides)
    criteria += [moments_agree(double, single, spec), steps_counted(double, spec, steps)]
    masked = {side.framework: side.train_masked(task, spec, "float64", steps) for side in sides}
    criteria += [off_block(f, run, double[f], single[f]) for f, run in masked.items() if run is not None]
    if all(run is None for run in masked.values()):
        criteria.append(Criterion("off-block", np.inf, "no side has a layer with weights outside the blocks"))
    return TrainingReport(
        task.name, optimizer, criteria, {name: run.losses for name, run in single.items()}, divergence, band
    )
