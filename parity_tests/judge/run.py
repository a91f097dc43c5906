"""Run cells: framework, implementation, mode, dtype and case, each against the oracle, and pairs of what ran."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.causes.layer import with_cause
from parity_tests.judge.comparison import TensorResult, compare, compare_pair, missing_tensors, pair_limits
from parity_tests.judge.exact import exact_rows
from parity_tests.judge.fingerprint import entitlement, fingerprint_of, observed_precision
from parity_tests.judge.inputs import Case, Inputs, draw_inputs
from parity_tests.judge.records import ParityRow, row_from_result
from parity_tests.judge.subjects import (
    COUNTERPARTS,
    DEFAULT_MODES,
    Subject,
    as_cast,
    load_subjects,
    release_programs,
    sizes_of,
    takes,
)
from parity_tests.judge.tolerance import PRECISION_OF_DTYPE, Arithmetic, Reference, reference
from parity_tests.report.text import raised

Included = Callable[[Subject, Case], bool]
# One product over all features at once holds n * n blocks; beyond this many entries it takes some gigabytes for
# each of the weight, its mask, their product and the gradients, and the zeros say nothing new about the arithmetic.
_DENSE = ("masked", "masked_layer")
_MOST_DENSE_ENTRIES = 2**27


# --- one subject ---


@dataclass(frozen=True)
class Judgement:
    """The verdict on each tensor of one subject on one case, the tensors, and the arithmetic of their bound."""

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
    """Run forward and vjp, and compare y, dx, dW and db with the oracle within the bound of the subject's arithmetic.

    In a mode that casts, numbers that the cast leaves alone are judged as well, and the worse verdict is reported.

    Args:
        subject: the one to judge.
        inputs: its inputs.
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
    """Return each tensor's worse verdict."""
    by_name = {result.tensor: result for result in others}
    return [
        other if (other := by_name.get(result.tensor)) is not None and _worse(other, result) else result
        for result in results
    ]


def _worse(first: TensorResult, second: TensorResult) -> bool:
    return (first.status == "mismatch", first.bound_fraction) > (second.status == "mismatch", second.bound_fraction)


def observed_class(judgement: Judgement, inputs: Inputs, truth: Reference, precision: str | None = None) -> str:
    """Name the precision class that the error shows, see `observed_precision`; empty for a mode that casts."""
    if judgement.arithmetic.gradients_in is not None:
        return ""
    # No class of a dtype is stricter than its own: within that bound, nothing is judged again.
    if precision is None and all(result.status == "ok" for result in judgement.results):
        return PRECISION_OF_DTYPE[inputs.dtype]
    return observed_precision(judgement.outputs, truth, inputs.dtype)


# --- pairs of subjects ---


def command_of(dtype: str, case: str, seed: int, device: str, precision: str | None, *subjects: Subject) -> str:
    """Return the command that repeats a row, with mode, device and precision only where they are not the default."""
    frameworks = dict.fromkeys(subject.framework for subject in subjects)
    names = dict.fromkeys(subject.implementation for subject in subjects)
    modes = dict.fromkeys(subject.mode for subject in subjects)
    if all(subject.mode == DEFAULT_MODES[subject.framework] for subject in subjects):
        modes = {}
    options = [
        *(f"--framework {name}" for name in frameworks if len(frameworks) == 1),
        *(f"--implementation {name}" for name in names),
        *(f"--mode {name}" for name in modes),
        *([] if device == "auto" else [f"--device {device}"]),
        *([] if precision is None else [f"--precision {precision}"]),
    ]
    return f"python -m parity_tests run {' '.join(options)} --dtype {dtype} --case {case} --seed {seed}"


def _kind_of_pair(first: Subject, second: Subject) -> str | None:
    """Return `pair` for torch against JAX in counterpart modes, `mode` for a mode against its subject's default.

    Every implementation is compared with every other in the default modes, and with itself in the others.
    """
    default = tuple(DEFAULT_MODES.values())
    if (first.framework, second.framework) == ("torch", "jax"):
        modes = (first.mode, second.mode)
        same = first.implementation == second.implementation
        return "pair" if modes == default or (same and modes in COUNTERPARTS) else None
    if (first.framework, first.implementation) != (second.framework, second.implementation):
        return None
    return "mode" if first.mode != second.mode == DEFAULT_MODES[second.framework] else None


def pair_rows(
    judged: Sequence[tuple[Subject, Judgement]],
    truth: Reference,
    dtype: str,
    case: Case,
    command: Callable[..., str],
) -> Iterator[ParityRow]:
    """Compare every two subjects that belong together, within the sum of their bounds."""
    # The same for many pairs, and dearer than a comparison.
    limits: dict[tuple[Arithmetic, Arithmetic], dict[str, np.ndarray]] = {}
    for first, first_judgement in judged:
        for second, second_judgement in judged:
            kind = _kind_of_pair(first, second)
            if kind is None:
                continue
            used = (first_judgement.arithmetic, second_judgement.arithmetic)
            if used not in limits:
                limits[used] = pair_limits(truth, used)
            results = compare_pair(first_judgement.outputs, second_judgement.outputs, truth, limits[used])
            frameworks = dict.fromkeys((first.framework, second.framework))
            where: dict[str, Any] = {
                "kind": kind,
                "framework": "+".join(frameworks),
                "implementation": "+".join(
                    [first.implementation, *([second.implementation] if kind == "pair" else [])]
                ),
                "mode": f"{first.mode}+{second.mode}",
                "dtype": dtype,
                "case": case.name,
                "command": command(first, second),
                "tensor_fractions": {result.tensor: result.bound_fraction for result in results},
            }
            # Thousands of pairs hold in a run: one row each that names its closest tensor, and one for each failure.
            failed = [result for result in results if result.status == "mismatch"]
            for result in failed or [max(results, key=lambda result: result.bound_fraction)]:
                yield row_from_result(result, **where)


# --- cells ---


def _in_default_mode(subject: Subject, known: dict[tuple[str, str], dict[str, Subject]], device: str) -> Subject | None:
    """Return the subject in its default mode: itself, one that was given, or one that is loaded.

    Its fingerprint tells how a device treats subnormals.
    """
    if subject.mode == DEFAULT_MODES[subject.framework]:
        return subject
    kind = (subject.framework, sizes_of(subject))
    if kind not in known:
        loaded = load_subjects(subject.framework, device, sizes=kind[1])
        known[kind] = {other.implementation: other for other in loaded}
    return known[kind].get(subject.implementation)


def too_dense(subject: Subject, case: Case) -> str | None:
    """Return one sentence if the subject's one dense matrix would be too large for this case, else None."""
    inputs, outputs = case.sizes_of_each
    shape = (sum(outputs), sum(inputs))
    if subject.implementation not in _DENSE or shape[0] * shape[1] <= _MOST_DENSE_ENTRIES:
        return None
    return (
        f"{subject.implementation} multiplies by one dense matrix of all outputs and inputs, {shape}, more than the "
        f"{_MOST_DENSE_ENTRIES} entries that are compared; its arithmetic is judged on the smaller cases."
    )


def _every(subject: Subject, case: Case) -> bool:
    return True


def count_cells(
    subjects: Sequence[Subject], dtypes: Sequence[str], cases: Sequence[Case], included: Included = _every
) -> int:
    """Count the cells of `run_cells`, each announced once by its `progress`."""
    return len(dtypes) * sum(takes(subject, case) and included(subject, case) for subject in subjects for case in cases)


def run_cells(
    subjects: Sequence[Subject],
    dtypes: Sequence[str],
    cases: Sequence[Case],
    seed: int = 0,
    progress: Callable[[str], None] = lambda label: None,
    included: Included = _every,
    device: str = "auto",
    precision: str | None = None,
    exact: bool = False,
) -> Iterator[ParityRow]:
    """Yield a row for each subject, dtype, case and tensor, then rows for pairs of the same dtype and case.

    Subjects of equal partitions run the cases of equal sizes, those of unequal ones the others. A subject that raises
    fails its cell, and the others go on.

    Args:
        subjects: of one framework or both; pairs of frameworks need both.
        dtypes: storage dtypes.
        cases: shapes.
        seed: of the inputs.
        progress: called with a label before each cell.
        included: which subject runs which case; the others are no cells.
        device: the one that the subjects were loaded with.
        precision: asked for in place of fp32's own, see `entitlement`.
        exact: run the checks that need no tolerance as well, see `exact_rows`.
    """
    defaults: dict[tuple[str, str], dict[str, Subject]] = {}
    for subject in subjects:
        if subject.mode == DEFAULT_MODES[subject.framework]:
            defaults.setdefault((subject.framework, sizes_of(subject)), {})[subject.implementation] = subject
    for dtype in dtypes:
        for case in cases:
            chosen = [subject for subject in subjects if takes(subject, case) and included(subject, case)]
            inputs = draw_inputs(case, dtype, seed)
            truth = reference(inputs)
            judged: list[tuple[Subject, Judgement]] = []
            command = functools.partial(command_of, dtype, case.name, seed, device, precision)
            for subject in chosen:
                progress(f"{subject.framework} {subject.implementation} {subject.mode} {dtype} {case.name}")
                where: dict[str, Any] = {
                    "kind": "oracle",
                    "framework": subject.framework,
                    "implementation": subject.implementation,
                    "mode": subject.mode,
                    "dtype": dtype,
                    "case": case.name,
                    "command": command(subject),
                }
                reason = subject.unsupported_reason(case, dtype) or too_dense(subject, case)
                if reason is not None:
                    yield ParityRow(**where, tensor="", status="skipped", reason=reason)
                    continue
                # Whatever one call raises must not cost the rows of all others.
                try:
                    fingerprint = fingerprint_of(subject, dtype)
                    measured = _in_default_mode(subject, defaults, device)
                    judgement = judge(subject, inputs, truth, precision=precision, measured=measured)
                    observed = observed_class(judgement, inputs, truth, precision)
                    exact_found = list(exact_rows(subject, case, inputs, where, seed)) if exact else []
                except Exception as error:
                    yield ParityRow(**where, tensor="", status="mismatch", reason=raised("the call", error))
                    continue
                diagnosis = "; ".join(fingerprint.diagnosis()) if fingerprint else ""
                judged.append((subject, judgement))
                for result in judgement.results:
                    if result.status == "mismatch":
                        result = with_cause(result, judgement.outputs, inputs, judgement.arithmetic)
                    yield row_from_result(
                        result,
                        **where,
                        diagnosis=diagnosis,
                        arithmetic=judgement.arithmetic.describe(),
                        observed=observed,
                    )
                yield from exact_found
            yield from pair_rows(judged, truth, dtype, case, command)
            release_programs()
