"""The verdict on one subject with one set of inputs: every tensor against the oracle, forward and backward."""

from dataclasses import dataclass

import numpy as np

from parity_tests.judge.comparison import TensorResult, compare, missing_tensors
from parity_tests.judge.entitlement import entitlement
from parity_tests.judge.fingerprint import observed_precision
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.modes import as_cast
from parity_tests.judge.oracle import Reference, reference
from parity_tests.judge.subjects import Subject
from parity_tests.judge.tolerance import PRECISION_OF_DTYPE, Arithmetic


@dataclass(frozen=True)
class Judgement:
    """One subject on one case: the verdict on each tensor, the tensors, for pairs, and what chose their bound."""

    results: list[TensorResult]
    outputs: dict[str, np.ndarray]
    arithmetic: Arithmetic


def judge(
    subject: Subject,
    inputs: Inputs,
    truth: Reference,
    forward: bool = True,
    precision: str | None = None,
    measured: Subject | None = None,
) -> Judgement:
    """Runs forward and vjp and compares y, dx, dW and db with the oracle within what the subject is entitled to.

    In a mode that casts, numbers that the cast leaves alone are judged as well, and the worse verdict is reported.

    Args:
        subject: what is judged.
        inputs: what it is given.
        truth: the oracle's tensors for these inputs.
        forward: judge the y of a call without gradients as well (another program, for a compiler), and report the
            worse of the two; without, only the y that comes with the gradients.
        precision: see `entitlement`.
        measured: see `entitlement`.
    """
    arithmetic = entitlement(subject, inputs, forward=forward, precision=precision, measured=measured)
    judgement = _judge(subject, inputs, truth, forward, arithmetic)
    exact = as_cast(subject.mode, inputs)
    if exact is None:
        return judgement
    strict = entitlement(subject, exact, forward=forward, measured=measured, representable=True)
    again = _judge(subject, exact, reference(exact), forward, strict)
    return Judgement(_worst(judgement.results, again.results), judgement.outputs, arithmetic)


def _judge(subject: Subject, inputs: Inputs, truth: Reference, forward: bool, arithmetic: Arithmetic) -> Judgement:
    outputs = subject.vjp(inputs)
    results = [*compare(outputs, truth, arithmetic, inputs.zero_mean), *missing_tensors(outputs, truth)]
    if forward:
        alone = compare({"y": subject.forward(inputs)}, truth, arithmetic, inputs.zero_mean)
        results = _worst(results, alone)
    return Judgement(results, outputs, arithmetic)


def _worst(results: list[TensorResult], others: list[TensorResult]) -> list[TensorResult]:
    """Each tensor's worse verdict."""
    by_name = {result.tensor: result for result in others}
    return [
        other if (other := by_name.get(result.tensor)) is not None and _worse(other, result) else result
        for result in results
    ]


def _worse(first: TensorResult, second: TensorResult) -> bool:
    return (first.status == "mismatch", first.bound_fraction) > (second.status == "mismatch", second.bound_fraction)


def observed_class(judgement: Judgement, inputs: Inputs, truth: Reference, precision: str | None = None) -> str:
    """Names the precision class that the error shows, see `observed_precision`; empty for a mode that casts.

    Args:
        judgement: of a subject on these inputs.
        inputs: what it was given.
        truth: the oracle's tensors for these inputs.
        precision: what was asked for in place of what the dtype promises.
    """
    if judgement.arithmetic.gradients_in is not None:
        return ""
    # No class of a dtype is stricter than its own: what keeps that bound need not be judged again.
    if precision is None and all(result.status == "ok" for result in judgement.results):
        return PRECISION_OF_DTYPE[inputs.dtype]
    return observed_precision(judgement.outputs, truth, inputs.dtype)
