"""The criteria of training parity that judge whole runs, as pure functions; see `training`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from parity_tests.judge.subjects import TrainingSubject, Trajectory
from parity_tests.judge.tolerance import FALSE_ALARM_RATE
from parity_tests.training.optimizers import OptimizerSpec
from parity_tests.training.tasks import TrainingTask

SEMANTIC_FACTOR = 16 * 2.0**-29  # 2^-29 is the ratio of the roundoffs of float64 and fp32
MOVED_FACTOR = 100

States = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Criterion:
    """One criterion's verdict: `fraction` above 1 fails; `detail` is one sentence for a reader."""

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


def distance(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """Euclidean distance of two states."""
    return float(np.linalg.norm(state_vector(first) - state_vector(second)))


def semantic(double: Mapping[str, Trajectory], single: Mapping[str, Trajectory]) -> list[Criterion]:
    """Criterion 1, at the last step, for each framework's own E32."""
    (first, second) = double
    gap = distance(double[first].states[-1], double[second].states[-1])
    found = []
    for framework in double:
        own = distance(single[framework].states[-1], double[framework].states[-1])
        limit = SEMANTIC_FACTOR * own
        detail = f"float64 gap {gap:.3g}, allowed {limit:.3g} from {framework}'s own fp32 divergence {own:.3g}"
        found.append(Criterion(f"semantic ({framework})", ratio(gap, limit), detail))
    return found


def ratio(value: float, limit: float) -> float:
    """Returns `value / limit`: 0 for no error at all, infinite for an error where none is allowed, or for NaN."""
    if value == 0:
        return 0.0
    return value / limit if limit > 0 and np.isfinite(value) else np.inf


def free_running(framework: str, own: np.ndarray, ensemble: np.ndarray) -> Criterion:
    """Criterion 4: the run's mean log divergence is a draw from the ensemble's, by Student's prediction interval.

    One statistic for the whole run, so that nothing is picked after looking: over M members with mean m and standard
    deviation s, a further member lies below `m + t s sqrt(1 + 1/M)` but once in `1 / FALSE_ALARM_RATE` runs, with
    t the quantile of Student's distribution with M - 1 degrees of freedom. Only above: a run closer to the truth than
    runs with twice its rounding errors is no defect.

    Args:
        framework: for the report.
        own: `(steps,)` distance of the fp32 run from its own float64 run.
        ensemble: `(members, steps)` the same for runs with extra noise.
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
    return Criterion(f"free-running ({framework})", max(ratio(excess, allowed), 0.0), detail)


def not_vacuous(
    task: TrainingTask, double: Mapping[str, Trajectory], sides: Sequence[TrainingSubject]
) -> list[Criterion]:
    """Criterion 5."""
    first, second = double.values()
    gap = distance(first.states[-1], second.states[-1])
    found = []
    for side in sides:
        run = double[side.framework]
        moved = distance(run.states[-1], task.parameters)
        fell = abs(float(run.losses[0] - run.losses[-1]))
        loss_gap = abs(float(first.losses[-1] - second.losses[-1]))
        gradients = side.gradients(task, task.parameters, 0, "float64").gradients
        still = [name for name in task.parameters if not np.any(gradients.get(name, 0))]
        fraction = max(ratio(MOVED_FACTOR * gap, moved), ratio(MOVED_FACTOR * loss_gap, fell))
        detail = f"parameters moved {moved:.3g}, loss changed by {fell:.3g}"
        if still or moved == 0 or fell == 0:
            fraction, detail = np.inf, f"{detail}; without gradient: {', '.join(still) or 'none'}"
        found.append(Criterion(f"not vacuous ({side.framework})", fraction, detail))
    return found


def moments_agree(double: Mapping[str, Trajectory], single: Mapping[str, Trajectory], spec: OptimizerSpec) -> Criterion:
    """Criterion 6: the moments that the optimiser needs, on both sides, each within what criterion 1 allows."""
    first, second = double.values()
    differing = sorted(first.moments.keys() ^ second.moments.keys())
    if differing:
        return Criterion("moments", np.inf, f"only one side keeps {', '.join(differing)}")
    if bool(first.moments) != spec.keeps_moments:
        expected = ("moments", "none") if spec.keeps_moments else ("no moments", ", ".join(sorted(first.moments)))
        return Criterion("moments", np.inf, f"expected {expected[0]} of this optimiser, both sides keep {expected[1]}")
    if not first.moments:
        return Criterion("moments", 0.0, "this optimiser has none, and neither side keeps one")
    fractions = {}
    for name, value in first.moments.items():
        own = min(float(np.linalg.norm(single[f].moments[name] - double[f].moments[name])) for f in double)
        fractions[name] = ratio(float(np.linalg.norm(value - second.moments[name])), SEMANTIC_FACTOR * own)
    worst = max(fractions, key=lambda name: fractions[name])
    return Criterion("moments", fractions[worst], f"largest in {worst}")


def steps_counted(runs: Mapping[str, Trajectory], spec: OptimizerSpec, steps: int) -> Criterion:
    """Criterion 6: K steps counted wherever a side counts, which both must where the update depends on the count.

    That one library counts and the other does not is no difference for the other optimisers: torch's SGD has no use
    for a count, while every optax schedule keeps one.
    """
    wrong = [
        framework
        for framework, run in runs.items()
        if run.step_counts != {steps} and (run.step_counts or spec.counts_steps)
    ]
    kept = "; ".join(
        f"{framework} {', '.join(map(str, sorted(run.step_counts))) or 'none'}" for framework, run in runs.items()
    )
    return Criterion("step counts", np.inf if wrong else 0.0, f"counted: {kept}" + f", expected {steps}" * bool(wrong))
