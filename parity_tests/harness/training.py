"""Training parity: six criteria, all of which two frameworks must meet after K optimiser steps.

1. semantic: in float64 the two differ by at most ``16 E32 2^-29``, E32 being that framework's own fp32-against-float64
   divergence: a wrong epsilon, decay or schedule shows here by orders of magnitude, where "loss within 1e-3" misses it.
2. replay: the same recorded gradients fed to both optimisers give the same states and moments, step by step.
3. resynchronised: at states of the float64 run, rounded, each layer's gradients keep the T1 bound.
4. free-running: each framework's fp32 error against its own float64 run lies inside an ensemble of runs with an extra
   rounding error after each step.
5. not vacuous: loss and parameters moved at least 100 times the gap, and every parameter received a gradient.
6. moments and step counts agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity_tests.harness.comparison import compare
from parity_tests.harness.inputs import Inputs
from parity_tests.harness.optimizers import OptimizerSpec
from parity_tests.harness.oracle import reference
from parity_tests.harness.subjects.base import TrainingSubject, Trajectory
from parity_tests.harness.tasks import TrainingTask
from parity_tests.harness.tolerance import declared_arithmetic

SEMANTIC_FACTOR = 16 * 2.0**-29  # 2^-29 is the ratio of the roundoffs of float64 and fp32
MOVED_FACTOR = 100
# The logarithm of a run's divergence is close to normal over members; a correct run leaves this many sigmas once in
# some hundred million, and a defect moves it by far more.
ENSEMBLE_SIGMAS = 5.5
# An ensemble of a dozen knows its own spread only so well: one member's factor of 2 is never evidence.
LEAST_LOG_SPREAD = float(np.log(2.0)) / 2

States = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Criterion:
    """One criterion's verdict: ``fraction`` above 1 fails; ``detail`` is one sentence for a reader."""

    name: str
    fraction: float
    detail: str

    @property
    def ok(self) -> bool:
        """True if the criterion holds."""
        return self.fraction <= 1


@dataclass(frozen=True)
class TrainingReport:
    """The verdict on one task and optimiser, with the curves that a report draws.

    Attributes:
        task: name of the task.
        optimizer: name of the optimiser.
        criteria: all six (some of them once a framework).
        losses: fp32 loss curves by framework.
        divergence: relative distance of each framework's fp32 run from its own float64 run, by step.
        band: the largest and smallest such distance over the noise ensemble, by framework: ``(2, steps)``.
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


def _vector(state: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(state[name], np.float64).ravel() for name in sorted(state)])


def distances(first: States, second: States) -> np.ndarray:
    """Euclidean distance of the parameters after each step."""
    return np.array([np.linalg.norm(_vector(a) - _vector(b)) for a, b in zip(first, second, strict=True)])


def _gap(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    return float(np.linalg.norm(_vector(first) - _vector(second)))


def semantic(double: Mapping[str, Trajectory], single: Mapping[str, Trajectory]) -> list[Criterion]:
    """Criterion 1, at the last step, for each framework's own E32."""
    (first, second) = double
    gap = _gap(double[first].states[-1], double[second].states[-1])
    found = []
    for framework in double:
        own = _gap(single[framework].states[-1], double[framework].states[-1])
        limit = SEMANTIC_FACTOR * own
        detail = f"float64 gap {gap:.3g}, allowed {limit:.3g} from {framework}'s own fp32 divergence {own:.3g}"
        found.append(Criterion(f"semantic ({framework})", _ratio(gap, limit), detail))
    return found


def _ratio(value: float, limit: float) -> float:
    if value == 0:
        return 0.0
    return value / limit if limit > 0 and np.isfinite(value) else np.inf


def replayed(
    sides: Sequence[TrainingSubject], task: TrainingTask, spec: OptimizerSpec, gradients: list[dict[str, np.ndarray]]
) -> list[Criterion]:
    """Criterion 2: states at every step and moments at the end, in float64, judged as in criterion 1."""
    double = [side.replay(task.parameters, spec, gradients, "float64") for side in sides]
    single = [side.replay(task.parameters, spec, gradients, "float32") for side in sides]
    gaps = distances(double[0].states, double[1].states)
    found = []
    for side, in_double, in_single in zip(sides, double, single, strict=True):
        own = distances(in_single.states, in_double.states)
        # The first step's own divergence may be zero by luck; the largest so far cannot shrink again.
        limits = SEMANTIC_FACTOR * np.maximum.accumulate(own)
        fractions = np.array([_ratio(gap, limit) for gap, limit in zip(gaps, limits, strict=True)])
        worst = int(fractions.argmax())
        detail = f"largest at step {worst}: gap {gaps[worst]:.3g}, allowed {limits[worst]:.3g}"
        found.append(Criterion(f"replay ({side.framework})", float(fractions[worst]), detail))
    return found


def resynchronised(side: TrainingSubject, task: TrainingTask, states: States, steps: Sequence[int]) -> Criterion:
    """Criterion 3: at rounded float64 states, y, dW and db of each layer keep the T1 bound on what the layer saw."""
    worst, detail = 0.0, "no step was judged"
    for step in steps:
        state = {name: np.asarray(value).astype(np.float32) for name, value in states[step].items()}
        result = side.gradients(task, state, step, "float32")
        for name, tap in result.taps.items():
            weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
            inputs = Inputs(tap.x, weight, bias, tap.cotangent, "float32", zero_mean=False)
            outputs = {
                "y": tap.y,
                "dweight": result.gradients[f"{name}.weight"],
                "dbias": result.gradients[f"{name}.bias"],
            }
            for verdict in compare(outputs, reference(inputs), declared_arithmetic("ieee_fp32"), zero_mean=False):
                if verdict.bound_fraction >= worst:
                    worst = verdict.bound_fraction
                    detail = f"largest at step {step}, layer {name}, {verdict.tensor}: {worst:.3g} of T1"
    return Criterion(f"resynchronised ({side.framework})", worst if steps else np.inf, detail)


def free_running(framework: str, own: np.ndarray, ensemble: np.ndarray) -> Criterion:
    """Criterion 4: the run's divergence, on a log scale, inside the ensemble's spread at its worst step.

    Args:
        framework: for the report.
        own: ``(steps,)`` distance of the fp32 run from its own float64 run.
        ensemble: ``(members, steps)`` the same for runs with extra noise.
    """
    tiny = np.finfo(np.float64).tiny
    logs = np.log(np.maximum(ensemble, tiny))
    centre, spread = logs.mean(0), np.maximum(logs.std(0, ddof=1), LEAST_LOG_SPREAD)
    # Only above: a run closer to the truth than runs with twice its rounding errors is no defect.
    excess = (np.log(np.maximum(own, tiny)) - centre) / (ENSEMBLE_SIGMAS * spread)
    worst = int(excess.argmax())
    detail = f"largest at step {worst}: divergence {own[worst]:.3g}, ensemble around {np.exp(centre[worst]):.3g}"
    return Criterion(f"free-running ({framework})", float(max(excess[worst], 0.0)), detail)


def not_vacuous(
    task: TrainingTask, double: Mapping[str, Trajectory], sides: Sequence[TrainingSubject]
) -> list[Criterion]:
    """Criterion 5."""
    first, second = double.values()
    gap = _gap(first.states[-1], second.states[-1])
    found = []
    for side in sides:
        run = double[side.framework]
        moved = _gap(run.states[-1], task.parameters)
        fell = abs(float(run.losses[0] - run.losses[-1]))
        loss_gap = abs(float(first.losses[-1] - second.losses[-1]))
        gradients = side.gradients(task, task.parameters, 0, "float64").gradients
        still = [name for name in task.parameters if not np.any(gradients[name])]
        fraction = max(_ratio(MOVED_FACTOR * gap, moved), _ratio(MOVED_FACTOR * loss_gap, fell))
        detail = f"parameters moved {moved:.3g}, loss changed by {fell:.3g}"
        if still or moved == 0:
            fraction, detail = np.inf, f"{detail}; without gradient: {', '.join(still) or 'nothing moved'}"
        found.append(Criterion(f"not vacuous ({side.framework})", fraction, detail))
    return found


def moments_agree(double: Mapping[str, Trajectory], single: Mapping[str, Trajectory], steps: int) -> list[Criterion]:
    """Criterion 6: each moment within what criterion 1 allows, the same moments on both sides, and K steps counted."""
    first, second = double.values()
    found = []
    if first.moments.keys() != second.moments.keys():
        differing = sorted(first.moments.keys() ^ second.moments.keys())
        return [Criterion("moments", np.inf, f"only one side keeps {', '.join(differing)}")]
    if first.moments:
        fractions = {}
        for name, value in first.moments.items():
            own = min(float(np.linalg.norm(single[f].moments[name] - double[f].moments[name])) for f in double)
            fractions[name] = _ratio(float(np.linalg.norm(value - second.moments[name])), SEMANTIC_FACTOR * own)
        worst = max(fractions, key=lambda name: fractions[name])
        found.append(Criterion("moments", fractions[worst], f"largest in {worst}"))
    counted = {framework: run.step_counts for framework, run in double.items() if run.step_counts}
    wrong = {framework: counts for framework, counts in counted.items() if counts != {steps}}
    detail = f"{steps} steps counted" if not wrong else f"expected {steps}, got {wrong}"
    return [*found, Criterion("step counts", np.inf if wrong else 0.0, detail)]


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
        for step, state in enumerate(double[sides[0].framework].states[:50])
    ]
    criteria = [*semantic(double, single), *replayed(sides, task, spec, recorded)]
    divergence, band = {}, {}
    for side in sides:
        name = side.framework
        criteria.append(resynchronised(side, task, double[name].states, range(0, steps, max(1, steps // 20))))
        scale = np.linalg.norm(_vector(task.parameters))
        own = distances(single[name].states, double[name].states) / scale
        runs = side.train(task, spec, "float32", steps, members, seed=1)
        ensemble = np.stack([distances(run.states, double[name].states) / scale for run in runs])
        criteria.append(free_running(name, own, ensemble))
        divergence[name], band[name] = own, np.stack([ensemble.min(0), ensemble.max(0)])
    criteria += not_vacuous(task, double, sides) + moments_agree(double, single, steps)
    return TrainingReport(
        task.name, optimizer, criteria, {name: run.losses for name, run in single.items()}, divergence, band
    )
