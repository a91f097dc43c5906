"""Turn ladders into rows and curves of a parity run, and choose what each set of cases trains."""

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.judge.records import ParityRow
from parity_tests.judge.subjects import FRAMEWORKS
from parity_tests.report.html import Curves
from parity_tests.report.text import raised
from parity_tests.training.criteria import TrainingReport
from parity_tests.training.ladder import RUNGS, LadderSide, climb
from parity_tests.training.optimizers import OPTIMIZERS
from parity_tests.training.tasks import TASKS

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
