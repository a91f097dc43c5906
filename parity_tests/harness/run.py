"""Runs cells: framework x implementation x mode x dtype x case, each against the oracle, and pairs of what ran."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.harness.cases import Case
from parity_tests.harness.causes import with_cause
from parity_tests.harness.comparison import TensorResult, compare, compare_pair, missing_tensors, pair_limits
from parity_tests.harness.fingerprint import Fingerprint, take_fingerprint
from parity_tests.harness.inputs import Inputs, draw_inputs
from parity_tests.harness.oracle import Reference, reference
from parity_tests.harness.records import ParityRow, row_from_result
from parity_tests.harness.subjects.base import Subject, release_programs
from parity_tests.harness.subjects.modes import COUNTERPARTS, DEFAULT_MODES, arithmetic_of, as_cast
from parity_tests.harness.tolerance import Arithmetic

# One product over all features at once holds n * n blocks; beyond this many entries it takes some gigabytes for
# each of the weight, its mask, their product and the gradients, and the zeros say nothing new about the arithmetic.
_DENSE = ("masked", "masked_layer")
_MOST_DENSE_ENTRIES = 2**27

_PROBE_CASE = Case("fingerprint", (1,), 1, 16, 16)


@dataclass(frozen=True)
class Judgement:
    """One subject on one case: the verdict on each tensor, and the tensors, for pairs."""

    results: list[TensorResult]
    outputs: dict[str, np.ndarray]


def judge(subject: Subject, inputs: Inputs, truth: Reference, forward: bool = True) -> Judgement:
    """Runs forward and vjp and compares y, dx, dW and db with the oracle within what dtype and mode promise.

    In a mode that casts, numbers that the cast leaves alone are judged as well, and the worse verdict is reported.

    Args:
        subject: what is judged.
        inputs: what it is given.
        truth: the oracle's tensors for these inputs.
        forward: judge the y of a call without gradients as well (another program, for a compiler), and report the
            worse of the two; without, only the y that comes with the gradients.
    """
    judgement = _judge(subject, inputs, truth, forward, arithmetic_of(subject.mode, inputs.dtype))
    exact = as_cast(subject.mode, inputs)
    if exact is None:
        return judgement
    strict = arithmetic_of(subject.mode, inputs.dtype, representable=True)
    again = _judge(subject, exact, reference(exact), forward, strict)
    return Judgement(_worst(judgement.results, again.results), judgement.outputs)


def _judge(subject: Subject, inputs: Inputs, truth: Reference, forward: bool, arithmetic: Arithmetic) -> Judgement:
    outputs = subject.vjp(inputs)
    results = [*compare(outputs, truth, arithmetic, inputs.zero_mean), *missing_tensors(outputs, truth)]
    if not forward:
        return Judgement(results, outputs)
    alone = compare({"y": subject.forward(inputs)}, truth, arithmetic, inputs.zero_mean)
    return Judgement(_worst(results, alone), outputs)


def _worst(results: list[TensorResult], others: list[TensorResult]) -> list[TensorResult]:
    """Each tensor's worse verdict."""
    by_name = {result.tensor: result for result in others}
    return [
        other if (other := by_name.get(result.tensor)) is not None and _worse(other, result) else result
        for result in results
    ]


def _worse(first: TensorResult, second: TensorResult) -> bool:
    return (first.status == "mismatch", first.bound_fraction) > (second.status == "mismatch", second.bound_fraction)


def _command(dtype: str, case: str, seed: int, device: str, *subjects: Subject) -> str:
    """The command that repeats a row: everything by name, mode and device only where they are not the default."""
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
    ]
    return f"python -m parity_tests run {' '.join(options)} --dtype {dtype} --case {case} --seed {seed}"


class Diagnoses:
    """Fingerprints of the default modes, taken once per subject and dtype."""

    def __init__(self) -> None:
        """Starts empty."""
        self._taken: dict[tuple[str, str, str], Fingerprint | None] = {}

    def of(self, subject: Subject, dtype: str) -> Fingerprint | None:
        """The fingerprint, or None where the probe's shape is unsupported or the mode is not the default.

        In a compiled mode each of some hundred probes is a program, and a mode that casts says what it computes in.
        """
        if subject.mode != DEFAULT_MODES[subject.framework]:
            return None
        key = (subject.framework, subject.implementation, dtype)
        if key not in self._taken:
            unsupported = subject.unsupported_reason(_PROBE_CASE, dtype)
            self._taken[key] = None if unsupported else take_fingerprint(subject, dtype)
        return self._taken[key]


def too_dense(subject: Subject, case: Case) -> str | None:
    """One sentence if the subject's one dense matrix would be too large for this case, else None."""
    shape = (case.num_partitions * case.out_features, case.num_partitions * case.in_features)
    if subject.implementation not in _DENSE or shape[0] * shape[1] <= _MOST_DENSE_ENTRIES:
        return None
    return (
        f"{subject.implementation} multiplies by one dense matrix (n * out, n * in) = {shape}, more than the "
        f"{_MOST_DENSE_ENTRIES} entries that are compared; its arithmetic is judged on the smaller cases."
    )


def _raised(error: Exception) -> str:
    """One sentence for a call that ended in an exception: its type and the first line of its message."""
    message = (str(error).strip().splitlines() or ["no message"])[0]
    return f"the call raised {type(error).__name__}: {message[:300]}"


Included = Callable[[Subject, Case], bool]


def _every(subject: Subject, case: Case) -> bool:
    return True


def count_cells(
    subjects: Sequence[Subject], dtypes: Sequence[str], cases: Sequence[Case], included: Included = _every
) -> int:
    """How many cells ``run_cells`` runs, each announced once by its ``progress``."""
    return len(dtypes) * sum(included(subject, case) for subject in subjects for case in cases)


def run_cells(
    subjects: Sequence[Subject],
    dtypes: Sequence[str],
    cases: Sequence[Case],
    seed: int = 0,
    progress: Callable[[str], None] = lambda label: None,
    included: Included = _every,
    device: str = "auto",
) -> Iterator[ParityRow]:
    """Yields a row per subject, dtype, case and tensor, then rows for pairs of the same dtype and case.

    A subject that raises fails its cell, and the others go on.

    Args:
        subjects: of one framework or both; pairs of frameworks need both.
        dtypes: storage dtypes.
        cases: shapes.
        seed: of the inputs.
        progress: called with a label before each cell.
        included: which subject runs which case; the others are no cells.
        device: as the subjects were loaded with, for the commands that reproduce rows.
    """
    diagnoses = Diagnoses()
    for dtype in dtypes:
        for case in cases:
            chosen = [subject for subject in subjects if included(subject, case)]
            inputs = draw_inputs(case, dtype, seed)
            truth = reference(inputs)
            judged: list[tuple[Subject, Judgement]] = []
            for subject in chosen:
                progress(f"{subject.framework} {subject.implementation} {subject.mode} {dtype} {case.name}")
                where: dict[str, Any] = {
                    "kind": "oracle",
                    "framework": subject.framework,
                    "implementation": subject.implementation,
                    "mode": subject.mode,
                    "dtype": dtype,
                    "case": case.name,
                    "command": _command(dtype, case.name, seed, device, subject),
                }
                reason = subject.unsupported_reason(case, dtype) or too_dense(subject, case)
                if reason is not None:
                    yield ParityRow(**where, tensor="", status="skipped", reason=reason)
                    continue
                # Whatever one call raises must not cost the rows of all others.
                try:
                    fingerprint = diagnoses.of(subject, dtype)
                    judgement = judge(subject, inputs, truth)
                except Exception as error:
                    yield ParityRow(**where, tensor="", status="mismatch", reason=_raised(error))
                    continue
                diagnosis = "; ".join(fingerprint.diagnosis()) if fingerprint else ""
                judged.append((subject, judgement))
                for result in judgement.results:
                    verdict = with_cause(result, judgement.outputs, inputs, arithmetic_of(subject.mode, dtype))
                    yield row_from_result(verdict, **where, diagnosis=diagnosis)
            yield from _pairs(judged, truth, dtype, case, seed, device)
            release_programs()


def _kind_of_pair(first: Subject, second: Subject) -> str | None:
    """``pair`` for torch against JAX in counterpart modes, ``mode`` for a mode against its subject's default.

    Every implementation meets every other in the default modes; in the others it meets itself.
    """
    default = tuple(DEFAULT_MODES.values())
    if (first.framework, second.framework) == ("torch", "jax"):
        modes = (first.mode, second.mode)
        same = first.implementation == second.implementation
        return "pair" if modes == default or (same and modes in COUNTERPARTS) else None
    if (first.framework, first.implementation) != (second.framework, second.implementation):
        return None
    return "mode" if first.mode != second.mode == DEFAULT_MODES[second.framework] else None


def _pairs(
    judged: Sequence[tuple[Subject, Judgement]], truth: Reference, dtype: str, case: Case, seed: int, device: str
) -> Iterator[ParityRow]:
    # The same for every pair of two modes, and dearer than a comparison.
    limits: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for first, first_judgement in judged:
        for second, second_judgement in judged:
            kind = _kind_of_pair(first, second)
            if kind is None:
                continue
            modes = (first.mode, second.mode)
            if modes not in limits:
                limits[modes] = pair_limits(truth, (arithmetic_of(modes[0], dtype), arithmetic_of(modes[1], dtype)))
            results = compare_pair(first_judgement.outputs, second_judgement.outputs, truth, limits[modes])
            frameworks = dict.fromkeys((first.framework, second.framework))
            where: dict[str, Any] = {
                "kind": kind,
                "framework": "+".join(frameworks),
                "implementation": f"{first.implementation}+{second.implementation}"
                if kind == "pair"
                else first.implementation,
                "mode": f"{first.mode}+{second.mode}",
                "dtype": dtype,
                "case": case.name,
                "command": _command(dtype, case.name, seed, device, first, second),
                "tensor_fractions": {result.tensor: result.bound_fraction for result in results},
            }
            # Some thousand pairs hold in a run: one row each that names its closest tensor, and one for each failure.
            failed = [result for result in results if result.status == "mismatch"]
            for result in failed or [max(results, key=lambda result: result.bound_fraction)]:
                yield row_from_result(result, **where)
