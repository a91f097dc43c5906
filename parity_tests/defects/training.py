"""Plant defects in training: one side runs another optimiser, or other constants, than the spec says."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from parity_tests.causes.optimizer import replayed_cause
from parity_tests.defects.subject import Killing
from parity_tests.judge.inputs import draw_inputs
from parity_tests.judge.subjects import FRAMEWORKS
from parity_tests.training.ladder import CASE, climb, load_side
from parity_tests.training.tasks import (
    OPTIMIZERS,
    TASKS,
    MaskedRun,
    OptimizerSpec,
    StepGradients,
    TrainingSubject,
    TrainingTask,
    Trajectory,
)


@dataclass(frozen=True)
class TrainingDefect:
    """One way for a training loop to differ."""

    name: str  # the planted mistake
    optimizer: str  # the optimiser of `OPTIMIZERS` in which it matters
    change: Callable[[OptimizerSpec], OptimizerSpec]  # the spec that the spoiled side runs
    cause: str  # must be in the answer of `causes.optimizer`


def _replace(**fields) -> Callable[[OptimizerSpec], OptimizerSpec]:
    return lambda spec: dataclasses.replace(spec, **fields)


TRAINING_DEFECTS: tuple[TrainingDefect, ...] = (
    TrainingDefect("optimiser epsilon 1e-7 for 1e-8", "adam", _replace(epsilon=1e-7), "epsilon is 1e-07"),
    TrainingDefect("weight decay 1e-4 for 1e-2", "adamw", _replace(weight_decay=1e-4), "weight decay is 0.0001"),
    TrainingDefect("schedule off by one", "adamw-clip-warmup-cosine", _replace(first_step=1), "off by one step"),
    TrainingDefect("clipping off", "momentum-clip", _replace(clip_norm=None), "not clipped"),
    TrainingDefect("bias decayed", "sgd-weight-decay", _replace(decay_bias=True), "touches the biases"),
    TrainingDefect("Nesterov for heavy ball", "momentum", _replace(nesterov=True), "Nesterov"),
    TrainingDefect("coupled decay for decoupled", "adamw", _replace(name="adam"), "coupled"),
    TrainingDefect("no warm-up", "adamw-clip-warmup-cosine", _replace(warmup_steps=0), "no warm-up"),
    TrainingDefect("Adagrad epsilon 1e-7 for 1e-10", "adagrad", _replace(epsilon=1e-7), "epsilon is 1e-07"),
)


@dataclass(frozen=True)
class SpoiledTraining:
    """A training subject that runs another spec than it is told."""

    side: TrainingSubject
    change: Callable[[OptimizerSpec], OptimizerSpec]
    framework: str

    def gradients(
        self, task: TrainingTask, parameters: Mapping[str, np.ndarray], step: int, dtype: str
    ) -> StepGradients:
        """Answer as the healthy side."""
        return self.side.gradients(task, parameters, step, dtype)

    def train(
        self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int, members: int = 0, seed: int = 0
    ) -> list[Trajectory]:
        """Run with the changed spec."""
        return self.side.train(task, self.change(spec), dtype, steps, members, seed)

    def replay(
        self,
        parameters: Mapping[str, np.ndarray],
        spec: OptimizerSpec,
        gradients: list[dict[str, np.ndarray]],
        dtype: str,
    ) -> Trajectory:
        """Run with the changed spec."""
        return self.side.replay(parameters, self.change(spec), gradients, dtype)

    def train_masked(self, task: TrainingTask, spec: OptimizerSpec, dtype: str, steps: int) -> MaskedRun | None:
        """Run with the changed spec."""
        return self.side.train_masked(task, self.change(spec), dtype, steps)


def plant(defect: TrainingDefect, side: TrainingSubject) -> SpoiledTraining:
    """Return a copy of a side that has the defect."""
    return SpoiledTraining(side, defect.change, side.framework)


def spec_of(defect: TrainingDefect) -> OptimizerSpec:
    """Return the spec that both sides are told to run."""
    return OPTIMIZERS[defect.optimizer]


def observe_training(defect: TrainingDefect, dtype: str = "float32", steps: int = 60) -> Killing:
    """Plant a defect in the JAX side; it is killed only if its cause is named as well.

    In float32 the whole ladder is climbed. In 16 bits a model is trained with wider parameters: the gradients that it
    computed in `dtype` are fed to both optimisers.
    """
    trusted, healthy = (load_side(framework) for framework in FRAMEWORKS)
    spoiled = dataclasses.replace(healthy, training=plant(defect, healthy.training))
    task, spec = TASKS["partitioned-mlp"](), spec_of(defect)
    if dtype == "float32":
        report = climb([trusted, spoiled], draw_inputs(CASE, dtype), task, spec, defect.optimizer, steps, members=2)
        cause = report.first_failure.cause if report.first_failure else ""
        return Killing(defect.cause in cause, cause)
    cause = replayed_cause(trusted.training, spoiled.training, task, spec, steps, dtype)
    agrees = not replayed_cause(trusted.training, healthy.training, task, spec, steps, dtype)
    return Killing(agrees and defect.cause in cause, cause)
