"""Runs cells: framework x implementation x mode x dtype x case, each against the oracle, and pairs of what ran."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from parity_tests.causes.layer import with_cause
from parity_tests.judge.cases import Case
from parity_tests.judge.cell import Judgement, judge, observed_class
from parity_tests.judge.entitlement import fingerprint_of
from parity_tests.judge.exact_rows import exact_rows
from parity_tests.judge.failures import raised
from parity_tests.judge.inputs import draw_inputs
from parity_tests.judge.modes import DEFAULT_MODES
from parity_tests.judge.oracle import reference
from parity_tests.judge.pairs import command_of, pair_rows
from parity_tests.judge.records import ParityRow, row_from_result
from parity_tests.judge.subjects import Subject, load_subjects, release_programs

# One product over all features at once holds n * n blocks; beyond this many entries it takes some gigabytes for
# each of the weight, its mask, their product and the gradients, and the zeros say nothing new about the arithmetic.
_DENSE = ("masked", "masked_layer")
_MOST_DENSE_ENTRIES = 2**27


class _Defaults:
    """The same implementation in its framework's default mode: its fingerprint tells how a device treats subnormals."""

    def __init__(self, subjects: Sequence[Subject], device: str):
        self._device = device
        self._known: dict[str, dict[str, Subject]] = {}
        for subject in subjects:
            if subject.mode == DEFAULT_MODES[subject.framework]:
                self._known.setdefault(subject.framework, {})[subject.implementation] = subject

    def of(self, subject: Subject) -> Subject | None:
        """The subject itself in its default mode; in another, the one that was given, or one of the framework's own."""
        if subject.mode == DEFAULT_MODES[subject.framework]:
            return subject
        if subject.framework not in self._known:
            loaded = load_subjects(subject.framework, self._device)
            self._known[subject.framework] = {other.implementation: other for other in loaded}
        return self._known[subject.framework].get(subject.implementation)


def too_dense(subject: Subject, case: Case) -> str | None:
    """One sentence if the subject's one dense matrix would be too large for this case, else None."""
    shape = (case.num_partitions * case.out_features, case.num_partitions * case.in_features)
    if subject.implementation not in _DENSE or shape[0] * shape[1] <= _MOST_DENSE_ENTRIES:
        return None
    return (
        f"{subject.implementation} multiplies by one dense matrix (n * out, n * in) = {shape}, more than the "
        f"{_MOST_DENSE_ENTRIES} entries that are compared; its arithmetic is judged on the smaller cases."
    )


Included = Callable[[Subject, Case], bool]


def _every(subject: Subject, case: Case) -> bool:
    return True


def count_cells(
    subjects: Sequence[Subject], dtypes: Sequence[str], cases: Sequence[Case], included: Included = _every
) -> int:
    """How many cells `run_cells` runs, each announced once by its `progress`."""
    return len(dtypes) * sum(included(subject, case) for subject in subjects for case in cases)


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
    """Yields a row per subject, dtype, case and tensor, then rows for pairs of the same dtype and case.

    A subject that raises fails its cell, and the others go on.

    Args:
        subjects: of one framework or both; pairs of frameworks need both.
        dtypes: storage dtypes.
        cases: shapes.
        seed: of the inputs.
        progress: called with a label before each cell.
        included: which subject runs which case; the others are no cells.
        device: as the subjects were loaded with, for the commands that reproduce rows and for the fingerprints of what
            is not among them.
        precision: asked for in place of fp32's own, see `entitlement`.
        exact: run the checks that need no tolerance as well, see `exact_rows`.
    """
    defaults = _Defaults(subjects, device)
    for dtype in dtypes:
        for case in cases:
            chosen = [subject for subject in subjects if included(subject, case)]
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
                    measured = defaults.of(subject)
                    judgement = judge(subject, inputs, truth, precision=precision, measured=measured)
                    observed = observed_class(judgement, inputs, truth, precision)
                    exact_found = list(exact_rows(subject, case, inputs, where, seed)) if exact else []
                except Exception as error:
                    yield ParityRow(**where, tensor="", status="mismatch", reason=raised("the call", error))
                    continue
                diagnosis = "; ".join(fingerprint.diagnosis()) if fingerprint else ""
                judged.append((subject, judgement))
                for result in judgement.results:
                    yield row_from_result(
                        with_cause(result, judgement.outputs, inputs, judgement.arithmetic),
                        **where,
                        diagnosis=diagnosis,
                        arithmetic=judgement.arithmetic.describe(),
                        observed=observed,
                    )
                yield from exact_found
            yield from pair_rows(judged, truth, dtype, case, command)
            release_programs()
