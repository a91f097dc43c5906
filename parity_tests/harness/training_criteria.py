"""The six criteria of training parity, each a pure judgement of trajectories; see ``training``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from parity_tests.harness.comparison import compare
from parity_tests.harness.inputs import Inputs
from parity_tests.harness.optimizers import OptimizerSpec
from parity_tests.harness.oracle import reference
from parity_tests.harness.subjects.base import TrainingSubject, Trajectory
from parity_tests.harness.tasks import TrainingTask
from parity_tests.harness.tolerance import FALSE_ALARM_RATE, declared_arithmetic

SEMANTIC_FACTOR = 16 * 2.0**-29  # 2^-29 is the ratio of the roundoffs of float64 and fp32
MOVED_FACTOR = 100

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


def state_vector(state: Mapping[str, np.ndarray]) -> np.ndarray:
    """All parameters of a state as one float64 vector, in the order of their names."""
    return np.concatenate([np.asarray(state[name], np.float64).ravel() for name in sorted(state)])


def distances(first: States, second: States) -> np.ndarray:
    """Euclidean distance of the parameters after each step."""
    return np.array([np.linalg.norm(state_vector(a) - state_vector(b)) for a, b in zip(first, second, strict=True)])


def _gap(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    return float(np.linalg.norm(state_vector(first) - state_vector(second)))


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
    """Criterion 4: the run's mean log divergence is a draw from the ensemble's, by Student's prediction interval.

    One statistic for the whole run, so that nothing is picked after looking: over M members with mean m and standard
    deviation s, a further member lies below ``m + t s sqrt(1 + 1/M)`` but once in ``1 / FALSE_ALARM_RATE`` runs, with
    t the quantile of Student's distribution with M - 1 degrees of freedom. Only above: a run closer to the truth than
    runs with twice its rounding errors is no defect.

    Args:
        framework: for the report.
        own: ``(steps,)`` distance of the fp32 run from its own float64 run.
        ensemble: ``(members, steps)`` the same for runs with extra noise.
    """
    tiny = np.finfo(np.float64).tiny
    statistic = float(np.log(np.maximum(own, tiny)).mean())
    members = np.log(np.maximum(ensemble, tiny)).mean(1)
    count = len(members)
    quantile = float(stats.t.ppf(1 - FALSE_ALARM_RATE, count - 1))
    allowed = quantile * float(members.std(ddof=1)) * float(np.sqrt(1 + 1 / count))
    excess = statistic - float(members.mean())
    detail = (
        f"geometric mean divergence {np.exp(statistic):.3g}, ensemble {np.exp(members.mean()):.3g} "
        f"with a factor of {np.exp(allowed):.3g} allowed"
    )
    return Criterion(f"free-running ({framework})", max(_ratio(excess, allowed), 0.0), detail)


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
