"""Runs cells: framework x implementation x mode x dtype x case, each against the oracle, and pairs of what ran."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from parity_tests.harness.cases import Case
from parity_tests.harness.comparison import compare_pair, pair_limits
from parity_tests.harness.entitlement import fingerprint_of
from parity_tests.harness.exact_rows import exact_rows
from parity_tests.harness.inputs import draw_inputs
from parity_tests.harness.judge import Judgement, judge, observed_class
from parity_tests.harness.oracle import Reference, reference
from parity_tests.harness.records import ParityRow, row_from_result
from parity_tests.harness.subjects.base import Subject, load_subjects
from parity_tests.harness.subjects.modes import COUNTERPARTS, DEFAULT_MODES
from parity_tests.harness.tolerance import Arithmetic

# One product over all features at once holds n * n blocks; beyond this many entries it takes some gigabytes for
# each of the weight, its mask, their product and the gradients, and the zeros say nothing new about the arithmetic.
_DENSE = ("masked", "masked_layer")
_MOST_DENSE_ENTRIES = 2**27


def _command(dtype: str, case: str, seed: int, *subjects: Subject) -> str:
    """The command that repeats a row: everything by name, the mode only where it is not the default."""
    frameworks = dict.fromkeys(subject.framework for subject in subjects)
    names = dict.fromkeys(subject.implementation for subject in subjects)
    modes = dict.fromkeys(subject.mode for subject in subjects)
    if all(subject.mode == DEFAULT_MODES[subject.framework] for subject in subjects):
        modes = {}
    options = [
        *(f"--framework {name}" for name in frameworks if len(frameworks) == 1),
        *(f"--implementation {name}" for name in names),
        *(f"--mode {name}" for name in modes),
    ]
    return f"python -m parity_tests run {' '.join(options)} --dtype {dtype} --case {case} --seed {seed}"


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
        device: that the subjects run on, for the fingerprints of what is not among them.
        precision: asked for in place of fp32's own, see ``entitlement``.
        exact: run the checks that need no tolerance as well, see ``exact_rows``.
    """
    defaults = _Defaults(subjects, device)
    asked = "" if precision is None else f" --precision {precision}"
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
                    "command": _command(dtype, case.name, seed, subject) + asked,
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
                    yield ParityRow(**where, tensor="", status="mismatch", reason=_raised(error))
                    continue
                diagnosis = "; ".join(fingerprint.diagnosis()) if fingerprint else ""
                judged.append((subject, judgement))
                for result in judgement.results:
                    yield row_from_result(
                        result,
                        **where,
                        diagnosis=diagnosis,
                        arithmetic=judgement.arithmetic.describe(),
                        observed=observed,
                    )
                yield from exact_found
            yield from _pairs(judged, truth, dtype, case, seed, asked)


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
    judged: Sequence[tuple[Subject, Judgement]], truth: Reference, dtype: str, case: Case, seed: int, asked: str
) -> Iterator[ParityRow]:
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
            worst = max(results, key=lambda result: (result.status == "mismatch", result.bound_fraction))
            frameworks = dict.fromkeys((first.framework, second.framework))
            yield row_from_result(
                worst,
                kind=kind,
                framework="+".join(frameworks),
                implementation=f"{first.implementation}+{second.implementation}"
                if kind == "pair"
                else first.implementation,
                mode=f"{first.mode}+{second.mode}",
                dtype=dtype,
                case=case.name,
                command=_command(dtype, case.name, seed, first, second) + asked,
            )
