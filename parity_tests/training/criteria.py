"""Judge training parity: six criteria, all of which two frameworks must meet after K optimiser steps.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity_tests.judge.comparison import TensorResult, compare
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.tolerance import FALSE_ALARM_RATE, declared_arithmetic, reference
from parity_tests.training.tasks import MaskedRun, OptimizerSpec, TrainingSubject, TrainingTask, Trajectory

SEMANTIC_FACTOR = 16 * 2.0**-29  # 2^-29 is the ratio of the roundoffs of float64 and fp32
MOVED_FACTOR = 100

States = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Criterion:
    """The verdict of one criterion: `fraction` above 1 fails; `detail` is one sentence for a reader."""

    name: str
    fraction: float
    detail: str

    @property
    def ok(self) -> bool:
        """True if the criterion holds."""
        return self.fraction <= 1


def state_vector(state: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return all parameters of a state as one float64 vector, in the order of their names."""
    return np.concatenate([np.asarray(state[name], np.float64).ravel() for name in sorted(state)])


def distances(first: States, second: States) -> np.ndarray:
    """Return the Euclidean distance of the parameters after each step."""
    return np.array([np.linalg.norm(state_vector(a) - state_vector(b)) for a, b in zip(first, second, strict=True)])


def distance(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """Return the Euclidean distance of two states."""
    return float(np.linalg.norm(state_vector(first) - state_vector(second)))


def semantic(double: Mapping[str, Trajectory], single: Mapping[str, Trajectory]) -> list[Criterion]:
    """Judge criterion 1 at the last step, for each framework's own E32."""
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
    """Return `value / limit`: 0 for no error at all, infinite for an error where none is allowed, or for NaN."""
    if value == 0:
        return 0.0
    return value / limit if limit > 0 and np.isfinite(value) else np.inf


def free_running(framework: str, own: np.ndarray, ensemble: np.ndarray) -> Criterion:
    """Judge criterion 4: the run's mean log divergence lies in the ensemble's, by Student's prediction interval.

    One statistic for the whole run, so that nothing is picked after looking. Over M members with mean m and standard
    deviation s, a further member lies below `m + t s sqrt(1 + 1/M)` but once in `1 / FALSE_ALARM_RATE` runs, with
    t the quantile of Student's distribution with M - 1 degrees of freedom. The interval is one-sided: a run closer to
    the truth than runs with twice its rounding errors is no defect.

    `own` is the `(steps,)` distance of the fp32 run from its own float64 run, `ensemble` the `(members, steps)`
    distances of runs with extra noise.
    """
    tiny = np.finfo(np.float64).tiny
    statistic = float(np.log(np.maximum(own, tiny)).mean())
    members = np.log(np.maximum(ensemble, tiny)).mean(1)
    count = len(members)
    from scipy import stats  # an extra, which judging layers does not need

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
    """Judge criterion 5."""
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
    """Judge criterion 6 for moments: both sides keep those of the optimiser, within the limit of criterion 1."""
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
    """Judge criterion 6 for counts: K wherever a side counts, and on both sides where the update depends on the count.

    For other optimisers only one library may count: torch's SGD has no use for a count, every optax schedule keeps one.
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


# States judged in one evaluation of the oracle: more take memory and save no time.
_CHUNK = 50


def _followed(run: Trajectory, start: np.ndarray) -> dict[str, np.ndarray]:
    """Return a replay's states, updates and each kind of moment, `(steps, values)` each."""
    states = np.stack([state_vector(state) for state in run.states])
    found = {"state": states, "update": np.diff(states, axis=0, prepend=start[None])}
    for kind in sorted({name.rsplit("/", 1)[1] for name in run.moment_history[-1]}):
        # Apart, because a second moment is a square: its errors would drown among those of the first.
        found[f"{kind} moment"] = np.stack(
            [state_vector({k: v for k, v in moments.items() if k.endswith(kind)}) for moments in run.moment_history]
        )
    return found


def replayed(
    sides: Sequence[TrainingSubject], task: TrainingTask, spec: OptimizerSpec, gradients: list[dict[str, np.ndarray]]
) -> list[Criterion]:
    """Judge criterion 2: states, updates and moments at every step, within the limits of criterion 1."""
    names = [f"replay ({side.framework})" for side in sides]
    if not gradients:
        return [Criterion(name, np.inf, "no gradient was replayed") for name in names]
    double = [side.replay(task.parameters, spec, gradients, "float64") for side in sides]
    single = [side.replay(task.parameters, spec, gradients, "float32") for side in sides]
    kept = [set(run.moment_history[-1]) if run.moment_history else set() for run in (*double, *single)]
    if any(names_kept != kept[0] for names_kept in kept) or bool(kept[0]) != spec.keeps_moments:
        listed = "; ".join(", ".join(sorted(names_kept)) or "none" for names_kept in kept[: len(sides)])
        wanted = "the same moments" if spec.keeps_moments else "no moment"
        return [Criterion(name, np.inf, f"expected {wanted} on both sides, got {listed}") for name in names]
    start = state_vector(task.parameters)
    in_double = [_followed(run, start) for run in double]
    gaps = {what: np.linalg.norm(in_double[0][what] - in_double[1][what], axis=1) for what in in_double[0]}
    return [
        _worst_step(name, gaps, own, _followed(run, start))
        for name, own, run in zip(names, in_double, single, strict=True)
    ]


def _worst_step(
    name: str,
    gaps: Mapping[str, np.ndarray],
    in_double: Mapping[str, np.ndarray],
    in_single: Mapping[str, np.ndarray],
) -> Criterion:
    found = []
    for what, gap in gaps.items():
        own = np.linalg.norm(in_single[what] - in_double[what], axis=1)
        # One step's own divergence may be zero by luck; the largest so far cannot shrink again.
        limits = SEMANTIC_FACTOR * np.maximum.accumulate(own)
        fractions = np.array([ratio(a, b) for a, b in zip(gap, limits, strict=True)])
        step = int(fractions.argmax())
        detail = f"{what} at step {step} of {len(gap)}: gap {gap[step]:.3g}, allowed {limits[step]:.3g}"
        found.append(Criterion(name, float(fractions[step]), f"largest in the {detail}"))
    return max(found, key=lambda criterion: criterion.fraction)


def resynchronised(side: TrainingSubject, task: TrainingTask, states: States, steps: Sequence[int]) -> Criterion:
    """Judge criterion 3: at rounded float64 states, y, dx, dW and db of each layer keep the T1 bound."""
    name = f"resynchronised ({side.framework})"
    worst, detail, judged = 0.0, "", 0
    for begin in range(0, len(steps), _CHUNK):
        chunk = steps[begin : begin + _CHUNK]
        for layer, verdict in _verdicts(side, task, states, chunk):
            judged += 1
            if verdict.bound_fraction >= worst:
                worst = verdict.bound_fraction
                step = _step_of(verdict, task.parameters[f"{layer}.weight"].shape[0], chunk)
                detail = f"largest at step {step}, layer {layer}, {verdict.tensor}: {worst:.3g} of T1"
    if not judged:
        return Criterion(name, np.inf, "nothing was judged: no step, or no layer was seen at any")
    return Criterion(name, worst, f"{detail}; {len(steps)} steps judged")


def _step_of(verdict: TensorResult, num_partitions: int, chunk: Sequence[int]) -> str:
    if verdict.partition is None:
        return f"{chunk[0]} or later"
    return str(chunk[verdict.partition // num_partitions])


def _verdicts(
    side: TrainingSubject, task: TrainingTask, states: States, steps: Sequence[int]
) -> list[tuple[str, TensorResult]]:
    """Judge several states at once, as so many more partitions of each layer."""
    rounded = [{name: np.asarray(value).astype(np.float32) for name, value in states[k].items()} for k in steps]
    results = [side.gradients(task, state, k, "float32") for state, k in zip(rounded, steps, strict=True)]
    found: list[tuple[str, TensorResult]] = []
    for layer in dict.fromkeys(layer for result in results for layer in result.taps):
        taps = [result.taps[layer] for result in results]
        weight = np.concatenate([state[f"{layer}.weight"] for state in rounded])
        bias = np.concatenate([state[f"{layer}.bias"] for state in rounded])
        x, y, cotangent, dx = (
            np.concatenate([getattr(tap, end) for tap in taps], axis=-2) for end in ("x", "y", "cotangent", "dx")
        )
        outputs = {
            "y": y,
            "dx": dx,
            "dweight": np.concatenate([result.gradients[f"{layer}.weight"] for result in results]),
            "dbias": np.concatenate([result.gradients[f"{layer}.bias"] for result in results]),
        }
        truth = reference(Inputs(x, weight, bias, cotangent, "float32", zero_mean=False))
        found += [
            (layer, verdict) for verdict in compare(outputs, truth, declared_arithmetic("ieee_fp32"), zero_mean=False)
        ]
    return found


def off_block(framework: str, masked: MaskedRun, double: Trajectory, single: Trajectory) -> Criterion:
    """Judge criterion 6 for the masked layer: zeros outside the blocks, and blocks that train as compact weights do.

    As in criterion 1, the distance between the fp32 and the float64 run of the compact weights sets the limit.
    """
    name = f"off-block ({framework})"
    leaking = np.flatnonzero(masked.off_block != 0)  # NaN is not zero either
    if not masked.off_block.size:
        return Criterion(name, np.inf, "no step of a masked layer was judged")
    if leaking.size:
        step = int(leaking[0])
        detail = f"{leaking.size} of {masked.off_block.size} steps, the first is step {step}"
        return Criterion(name, np.inf, f"weights or gradients outside the blocks are not zero after {detail}")
    gap = distance(masked.states[-1], double.states[-1])
    limit = SEMANTIC_FACTOR * distance(single.states[-1], double.states[-1])
    detail = f"exact zeros outside the blocks after each of {masked.off_block.size} steps"
    return Criterion(name, ratio(gap, limit), f"{detail}; blocks {gap:.3g} from the compact run, allowed {limit:.3g}")


@dataclass(frozen=True)
class TrainingReport:
    """The verdict on one task and optimiser, with the curves that a report draws."""

    task: str  # name of the task
    optimizer: str  # name of the optimiser
    criteria: list[Criterion]  # all six (some of them once a framework)
    losses: dict[str, np.ndarray]  # fp32 loss curves by framework
    # Relative distance of each framework's fp32 run from its own float64 run, by step
    divergence: dict[str, np.ndarray]
    # The largest and smallest such distance over the noise ensemble, by framework: `(2, steps)`
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
    """Train a task on both sides and judge all six criteria.

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
