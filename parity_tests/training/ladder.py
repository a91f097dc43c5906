"""Climb the ladder (weights round-trip, forward, gradients, one optimiser step, K steps) to the first failing rung.

A higher rung is not climbed once a lower one has failed: its failure would say nothing new. Ladders become rows and
curves of a parity run; what each set of cases trains is chosen here.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.causes.layer import explain
from parity_tests.causes.optimizer import explain_optimizer, replayed_cause
from parity_tests.judge.inputs import Case, Inputs, draw_inputs
from parity_tests.judge.records import ParityRow
from parity_tests.judge.run import judge
from parity_tests.judge.subjects import FRAMEWORKS, Subject
from parity_tests.judge.tolerance import reference
from parity_tests.report.html import Curves
from parity_tests.report.text import raised
from parity_tests.training.criteria import SEMANTIC_FACTOR, TrainingReport, distances, training_parity
from parity_tests.training.tasks import OPTIMIZERS, TASKS, OptimizerSpec, TrainingSubject, TrainingTask

RUNGS: tuple[str, ...] = ("weights round-trip", "forward", "dx, dW, db", "one optimiser step", "K optimiser steps")
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class LadderSide:
    """One framework on the ladder."""

    subject: Subject  # computes y and gradients
    training: TrainingSubject  # trains
    round_trip: Callable[[Arrays], Arrays]  # puts arrays into the framework's layer and takes them out again


@dataclass(frozen=True)
class Rung:
    """One rung's outcome; `cause` is a clause for a failed rung."""

    name: str
    ok: bool
    detail: str = ""
    cause: str = ""


@dataclass(frozen=True)
class LadderReport:
    """The rungs that were climbed, and the training report if the top was reached."""

    rungs: list[Rung]
    training: TrainingReport | None = None

    @property
    def first_failure(self) -> Rung | None:
        """The first failing rung, or None."""
        return next((rung for rung in self.rungs if not rung.ok), None)

    @property
    def ok(self) -> bool:
        """True if every rung was climbed and holds."""
        return self.first_failure is None and len(self.rungs) == len(RUNGS)


def _round_trip(sides: Sequence[LadderSide], inputs: Inputs) -> Rung:
    arrays = inputs.parameters
    travelled: Arrays = arrays
    for side in (*sides, sides[0]):
        travelled = side.round_trip(travelled)
        for name, array in arrays.items():
            other = np.asarray(travelled.get(name))
            if other.dtype != array.dtype or other.shape != array.shape or other.tobytes() != array.tobytes():
                detail = f"{name} changed on its way through {side.subject.framework}"
                swapped = other.shape == array.swapaxes(-1, -2).shape and np.array_equal(other, array.swapaxes(-1, -2))
                cause = "the kernel is transposed" if swapped and array.ndim == 3 else "conversion is not bit-exact"
                return Rung(RUNGS[0], False, detail, cause)
    return Rung(RUNGS[0], True)


def _computation(sides: Sequence[LadderSide], inputs: Inputs) -> Iterator[Rung]:
    truth = reference(inputs)
    judged = [(side, judge(side.subject, inputs, truth)) for side in sides]
    for rung, tensors in ((RUNGS[1], {"y"}), (RUNGS[2], {"dx", "dweight", "dbias"})):
        failed = [
            (side, judgement, result)
            for side, judgement in judged
            for result in judgement.results
            if result.tensor in tensors and result.status == "mismatch"
        ]
        if failed:
            side, judgement, result = failed[0]
            detail = f"{side.subject.framework} {side.subject.implementation}: {result.reason}"
            yield Rung(rung, False, detail, explain([result], judgement.outputs, inputs))
            return
        worst = max(r.bound_fraction for _, j in judged for r in j.results if r.tensor in tensors)
        yield Rung(rung, True, f"at most {worst:.3g} of the T1 bound")


def _one_step(sides: Sequence[LadderSide], task: TrainingTask, spec: OptimizerSpec) -> Rung:
    trusted, other = (side.training for side in sides)
    # Both sides are fed the same gradient, so that only the optimiser can make a difference.
    start = trusted.gradients(task, task.parameters, 0, "float64").gradients
    first = [trusted.replay(task.parameters, spec, [start], dtype).states for dtype in ("float64", "float32")]
    second = other.replay(task.parameters, spec, [start], "float64").states
    limit = SEMANTIC_FACTOR * float(distances(first[1], first[0])[-1])
    gap = float(distances(first[0], second)[-1])
    if gap <= limit:
        return Rung(RUNGS[3], True, f"float64 states differ by {gap:.3g}, allowed {limit:.3g}")

    def replay(candidate: OptimizerSpec) -> Arrays:
        return trusted.replay(task.parameters, candidate, [start], "float64").states[-1]

    cause = explain_optimizer(spec, replay, second[-1], limit)
    return Rung(RUNGS[3], False, f"float64 states differ by {gap:.3g}, allowed {limit:.3g}", cause)


def climb(
    sides: Sequence[LadderSide],
    inputs: Inputs,
    task: TrainingTask,
    spec: OptimizerSpec,
    optimizer: str,
    steps: int = 500,
    members: int = 12,
) -> LadderReport:
    """Climb until a rung fails.

    The first side's optimiser is trusted when a cause is sought.

    Raises:
        ValueError: unless there are two sides.
    """
    if len(sides) != 2:
        raise ValueError(f"sides: expected two, got {len(sides)}; a ladder compares one framework with another.")
    rungs = [_round_trip(sides, inputs)]
    if rungs[-1].ok:
        rungs += _computation(sides, inputs)
    if rungs[-1].ok:
        rungs.append(_one_step(sides, task, spec))
    if not rungs[-1].ok:
        return LadderReport(rungs)
    training = training_parity([side.training for side in sides], task, spec, optimizer, steps, members)
    failed = next((criterion for criterion in training.criteria if not criterion.ok), None)
    if failed is None:
        worst = max(training.criteria, key=lambda criterion: criterion.fraction)
        rungs.append(Rung(RUNGS[4], True, f"closest to its limit: {worst.name}, {worst.fraction:.3g} of it"))
        return LadderReport(rungs, training)
    trusted, other = (side.training for side in sides)
    cause = replayed_cause(trusted, other, task, spec, min(steps, 50))
    cause = cause or "the optimisers agree on the same gradients: the models differ"
    rungs.append(Rung(RUNGS[4], False, f"{failed.name}: {failed.detail}", cause))
    return LadderReport(rungs, training)


# --- the trainings of a parity run ---

STEPS = 500
CASE = Case("ladder", (64,), 3, 16, 16)
# By the names of `run --train`.
TRAININGS: dict[str, tuple[str, str]] = {
    f"{task}:{optimizer}": (task, optimizer) for task in TASKS for optimizer in OPTIMIZERS
}
# Trained by each set of cases: nothing, one of each kind of optimiser, everything.
TRAINED: dict[str, tuple[tuple[str, str], ...]] = {
    "smoke": (),
    "default": (("partitioned-mlp", "momentum"), ("nlinear", "adamw-clip-warmup-cosine")),
    "full": tuple(TRAININGS.values()),
}


@dataclass(frozen=True)
class TrainingRows:
    """The rows of one ladder, and the training report if the top rung was reached."""

    rows: list[ParityRow]
    training: TrainingReport | None


def training_rows(task_name: str, optimizer: str, steps: int = STEPS, members: int = 12) -> TrainingRows:
    """Climb the ladder with torch and JAX; return a row for each rung and for each criterion of the top rung."""
    sides = [load_side(framework) for framework in FRAMEWORKS]
    report = climb(
        sides, draw_inputs(CASE, "float32"), TASKS[task_name](), OPTIMIZERS[optimizer], optimizer, steps, members
    )
    row = functools.partial(_row, task_name, optimizer)
    rows = []
    for rung in report.rungs:
        if rung.ok:
            rows.append(row("ladder", rung.name, "ok", diagnosis=f"{rung.name}: {rung.detail}" if rung.detail else ""))
        else:
            rows.append(row("ladder", rung.name, "mismatch", reason=f"{rung.detail}; likely cause: {rung.cause}"))
    rows += [row("ladder", name, "skipped", reason="a lower rung failed") for name in RUNGS[len(report.rungs) :]]
    for criterion in report.training.criteria if report.training is not None else ():
        said = {"diagnosis": criterion.detail} if criterion.ok else {"reason": criterion.detail}
        status = "ok" if criterion.ok else "mismatch"
        rows.append(row("training", criterion.name, status, bound_fraction=criterion.fraction, **said))
    return TrainingRows(rows, report.training)


def failed_training(task_name: str, optimizer: str, error: Exception) -> ParityRow:
    """Return the row of a ladder that ended in an exception, so that the other rows stay."""
    return _row(task_name, optimizer, "ladder", RUNGS[0], "mismatch", reason=raised("the training", error))


def _row(task_name: str, optimizer: str, kind: Any, case: str, status: Any, **said: Any) -> ParityRow:
    return ParityRow(
        kind=kind,
        framework="torch+jax",
        implementation=f"{task_name}: {optimizer}",
        dtype="float32",
        case=case,
        tensor="",
        status=status,
        command=f"python -m parity_tests run --train {task_name}:{optimizer}",
        **said,
    )


def curves_of(report: TrainingReport | None) -> list[Curves]:
    """Return the loss curves and each framework's divergence from its own float64 run, with its noise band."""
    if report is None:
        return []
    title = f"{report.task}, {report.optimizer}"
    drawn = [Curves(f"{title}: loss", {name: losses.tolist() for name, losses in report.losses.items()})]
    for framework, divergence in report.divergence.items():
        low, high = np.asarray(report.band[framework])
        drawn.append(
            Curves(
                f"{title}: distance of {framework}'s fp32 run from its float64 run, and the noise ensemble's band",
                {framework: divergence.tolist()},
                band=(low.tolist(), high.tolist()),
            )
        )
    return drawn


def load_side(framework: str) -> LadderSide:
    """Import a framework and return its side of the ladder, with the implementation that "auto" mostly means."""
    subjects = importlib.import_module(f"parity_tests.frameworks.{framework}.subjects")
    training = importlib.import_module(f"parity_tests.frameworks.{framework}.training")
    subject = next(subject for subject in subjects.subjects("cpu") if subject.implementation == "matmul")
    return LadderSide(subject, training.training(), subjects.round_trip)
