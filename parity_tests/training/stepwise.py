"""The criteria of training parity that follow single steps: replay, resynchronised steps, the masked layer's zeros."""

from collections.abc import Mapping, Sequence

import numpy as np

from parity_tests.judge.comparison import TensorResult, compare
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.oracle import reference
from parity_tests.judge.subjects import MaskedRun, TrainingSubject, Trajectory
from parity_tests.judge.tolerance import declared_arithmetic
from parity_tests.training.criteria import SEMANTIC_FACTOR, Criterion, States, distance, ratio, state_vector
from parity_tests.training.optimizers import OptimizerSpec
from parity_tests.training.tasks import TrainingTask

# So many states are judged in one evaluation of the oracle: more take memory and save no time.
_CHUNK = 50


def _followed(run: Trajectory, start: np.ndarray) -> dict[str, np.ndarray]:
    """A replay's states, updates and each kind of moment, `(steps, values)` each."""
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
    """Criterion 2: states, updates and moments at every step, in float64, each judged as in criterion 1."""
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
    """Criterion 3: at rounded float64 states, y, dx, dW and db of each layer keep the T1 bound on what it saw.

    Args:
        side: computes the gradients, in fp32.
        task: the model and its data.
        states: of the float64 run.
        steps: which of them are judged.
    """
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
    """Judges some states at once: one layer at another state is so many partitions more."""
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
    """Criterion 6: nothing outside the blocks at any step, and blocks that train as the compact weights do.

    Args:
        framework: for the report.
        masked: the run of the masked layers, in float64.
        double: the same framework's run of the compact layers, in float64.
        single: the same in fp32; their distance says how far criterion 1 lets the blocks lie from the compact weights.
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
