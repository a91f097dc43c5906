"""Runs cells: framework x implementation x dtype x case, each against the oracle, and each torch-JAX pair."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.harness.cases import Case
from parity_tests.harness.comparison import TensorResult, compare, compare_pair, missing_tensors
from parity_tests.harness.fingerprint import Fingerprint, take_fingerprint
from parity_tests.harness.inputs import Inputs, draw_inputs
from parity_tests.harness.oracle import Reference, reference
from parity_tests.harness.records import ParityRow, row_from_result
from parity_tests.harness.subjects.base import Subject
from parity_tests.harness.tolerance import PRECISION_OF_DTYPE, declared_arithmetic

_PROBE_CASE = Case("fingerprint", (1,), 1, 16, 16)


@dataclass(frozen=True)
class Judgement:
    """One subject on one case: the verdict on each tensor, and the tensors, for pairs."""

    results: list[TensorResult]
    outputs: dict[str, np.ndarray]


def judge(subject: Subject, inputs: Inputs, truth: Reference, forward: bool = True) -> Judgement:
    """Runs forward and vjp and compares y, dx, dW and db with the oracle within what the dtype promises.

    Args:
        subject: what is judged.
        inputs: what it is given.
        truth: the oracle's tensors for these inputs.
        forward: judge the y of a call without gradients as well (another program, for a compiler), and report the
            worse of the two; without, only the y that comes with the gradients.
    """
    arithmetic = declared_arithmetic(PRECISION_OF_DTYPE[inputs.dtype])
    outputs = subject.vjp(inputs)
    results = [*compare(outputs, truth, arithmetic, inputs.zero_mean), *missing_tensors(outputs, truth)]
    if not forward:
        return Judgement(results, outputs)
    (alone,) = compare({"y": subject.forward(inputs)}, truth, arithmetic, inputs.zero_mean)
    merged = [alone if result.tensor == "y" and _worse(alone, result) else result for result in results]
    return Judgement(merged, outputs)


def _worse(first: TensorResult, second: TensorResult) -> bool:
    return (first.status == "mismatch", first.bound_fraction) > (second.status == "mismatch", second.bound_fraction)


def _command(framework: str, implementation: str, dtype: str, case: str, seed: int) -> str:
    return (
        f"python -m parity_tests run --framework {framework} --implementation {implementation} --dtype {dtype} "
        f"--case {case} --seed {seed}"
    )


class Diagnoses:
    """Fingerprints, taken once per subject and dtype."""

    def __init__(self) -> None:
        """Starts empty."""
        self._taken: dict[tuple[str, str, str], Fingerprint | None] = {}

    def of(self, subject: Subject, dtype: str) -> Fingerprint | None:
        """The fingerprint, or None where the probe's shape is unsupported."""
        key = (subject.framework, subject.implementation, dtype)
        if key not in self._taken:
            unsupported = subject.unsupported_reason(_PROBE_CASE, dtype)
            self._taken[key] = None if unsupported else take_fingerprint(subject, dtype)
        return self._taken[key]


def run_cells(
    subjects: Sequence[Subject],
    dtypes: Sequence[str],
    cases: Sequence[Case],
    seed: int = 0,
    progress: Callable[[str], None] = lambda label: None,
) -> Iterator[ParityRow]:
    """Yields a row per subject, dtype, case and tensor, then a row per torch-JAX pair of the same dtype and case.

    Args:
        subjects: of one framework or both; pairs need both.
        dtypes: storage dtypes.
        cases: shapes.
        seed: of the inputs.
        progress: called with a label before each cell.
    """
    diagnoses = Diagnoses()
    for dtype in dtypes:
        for case in cases:
            inputs = draw_inputs(case, dtype, seed)
            truth = reference(inputs)
            judged: list[tuple[Subject, Judgement]] = []
            for subject in subjects:
                progress(f"{subject.framework} {subject.implementation} {dtype} {case.name}")
                where: dict[str, Any] = {
                    "kind": "oracle",
                    "framework": subject.framework,
                    "implementation": subject.implementation,
                    "dtype": dtype,
                    "case": case.name,
                    "command": _command(subject.framework, subject.implementation, dtype, case.name, seed),
                }
                reason = subject.unsupported_reason(case, dtype)
                if reason is not None:
                    yield ParityRow(**where, tensor="", status="skipped", reason=reason)
                    continue
                fingerprint = diagnoses.of(subject, dtype)
                diagnosis = "; ".join(fingerprint.diagnosis()) if fingerprint else ""
                judgement = judge(subject, inputs, truth)
                judged.append((subject, judgement))
                for result in judgement.results:
                    yield row_from_result(result, **where, diagnosis=diagnosis)
            yield from _pairs(judged, truth, dtype, case, seed)


def _pairs(
    judged: Sequence[tuple[Subject, Judgement]], truth: Reference, dtype: str, case: Case, seed: int
) -> Iterator[ParityRow]:
    arithmetic = declared_arithmetic(PRECISION_OF_DTYPE[dtype])
    for first, first_judgement in judged:
        for second, second_judgement in judged:
            if (first.framework, second.framework) != ("torch", "jax"):
                continue
            results = compare_pair(first_judgement.outputs, second_judgement.outputs, truth, (arithmetic, arithmetic))
            worst = max(results, key=lambda result: (result.status == "mismatch", result.bound_fraction))
            yield row_from_result(
                worst,
                kind="pair",
                framework="torch+jax",
                implementation=f"{first.implementation}+{second.implementation}",
                dtype=dtype,
                case=case.name,
                command=f"python -m parity_tests run --dtype {dtype} --case {case.name} --seed {seed} "
                f"--implementation {first.implementation} --implementation {second.implementation}",
            )
