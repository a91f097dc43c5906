"""Plants a defect in a copy of a subject and asks the judge: is it rejected, and for which likely cause?"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from parity_tests.causes.layer import explain
from parity_tests.judge.cases import Case
from parity_tests.judge.exact import check_isolation
from parity_tests.judge.inputs import Inputs, draw_inputs
from parity_tests.judge.oracle import Reference, reference
from parity_tests.judge.run import judge
from parity_tests.judge.subjects import Subject

Outputs = dict[str, np.ndarray]
Spoil = Callable[[Subject, Inputs], Outputs]

# Square, so that a transposed kernel still fits; three partitions, so that a shift is no exchange; bias and many rows.
CASE = Case("defects", (512,), 3, 32, 32)


@dataclass(frozen=True)
class Defect:
    """One way to be wrong.

    Attributes:
        name: what was planted.
        spoil: evaluates the subject with the defect.
        cause: what `causes.explain` must say; for `isolation`, what the check says.
        dtypes: storage dtypes in which the defect changes the function; in others it is equivalent to correct code.
        isolation: True if only the isolation check can see it.
        forward: whether it is in y as computed without gradients.
        backward: whether it is in y and the gradients as computed together.
    """

    name: str
    spoil: Spoil
    cause: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    isolation: bool = False
    forward: bool = True
    backward: bool = True


@dataclass(frozen=True)
class Killing:
    """What the judge made of a planted defect.

    Attributes:
        killed: whether it was rejected, and the healthy subject was not.
        cause: the likely cause that was named.
    """

    killed: bool
    cause: str


@dataclass(frozen=True)
class SpoiledSubject:
    """A subject with a defect planted."""

    subject: Subject
    defect: Defect
    framework: str
    implementation: str
    isolates_partitions: bool
    mode: str

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """As the healthy subject."""
        return self.subject.unsupported_reason(case, dtype)

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Returns the spoiled y."""
        return self.defect.spoil(self.subject, inputs)["y"] if self.defect.forward else self.subject.forward(inputs)

    def vjp(self, inputs: Inputs) -> Outputs:
        """Returns the spoiled tensors."""
        return self.defect.spoil(self.subject, inputs) if self.defect.backward else self.subject.vjp(inputs)


def plant(defect: Defect, subject: Subject) -> SpoiledSubject:
    """Returns a copy of the subject that has the defect."""
    return SpoiledSubject(
        subject, defect, subject.framework, subject.implementation, subject.isolates_partitions, subject.mode
    )


@functools.cache
def _problem(dtype: str, seed: int) -> tuple[Inputs, Reference]:
    inputs = draw_inputs(CASE, dtype, seed)
    return inputs, reference(inputs)


def _verdict(candidate: Subject, dtype: str, seed: int, isolation: bool, measured: Subject) -> Killing:
    """Whether the judge rejects a subject, and why; the bound is that of the subject that was measured."""
    inputs, truth = _problem(dtype, seed)
    if isolation:
        swallowed = check_isolation(candidate, inputs, partition=1, poison=float("nan")).swallowed
        return Killing(bool(swallowed), f"NaN does not reach {', '.join(swallowed)}" if swallowed else "")
    judgement = judge(candidate, inputs, truth, measured=measured)
    rejected = any(result.status == "mismatch" for result in judgement.results)
    return Killing(rejected, explain(judgement.results, judgement.outputs, inputs, judgement.arithmetic))


# Once for all defects that are planted in the same subject.
_healthy = functools.cache(_verdict)


def observe(defect: Defect, subject: Subject, dtype: str, seed: int = 0) -> Killing:
    """Plants a defect and judges it.

    Args:
        defect: what is planted.
        subject: the healthy subject.
        dtype: storage dtype.
        seed: of the inputs.

    Returns:
        Whether the defect was killed (and the healthy subject passes the same check), and the cause that was named.
    """
    spoiled = _verdict(plant(defect, subject), dtype, seed, defect.isolation, subject)
    # Rejecting a subject that was broken before says nothing about the defect.
    healthy = not _healthy(subject, dtype, seed, defect.isolation, subject).killed
    return Killing(spoiled.killed and healthy, spoiled.cause)
