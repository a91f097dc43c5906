"""The checks that need no tolerance as rows of a run: integer lattices and the isolation of NaN and Inf."""

from collections.abc import Iterator, Mapping
from typing import Any

from parity_tests.judge.cases import Case
from parity_tests.judge.dtypes import FORMATS
from parity_tests.judge.exact import check_isolation, check_lattice, check_wide_lattice
from parity_tests.judge.inputs import Inputs
from parity_tests.judge.modes import MODES
from parity_tests.judge.records import ParityRow
from parity_tests.judge.subjects import Subject

# The numbers say nothing new on a larger array, and every check is a few calls more.
_MOST_ENTRIES = 2**20
_DEAR_MODES = {
    ("torch", "compile"): "each of these calls would be a compilation",
    ("torch", "sharded"): "each of these calls would go through eight processes",
}
_POISONS = (float("nan"), float("inf"))


def left_out(subject: Subject, case: Case, inputs: Inputs) -> str | None:
    """One sentence if a cell is judged against its bounds alone, else None."""
    size = inputs.x.size + inputs.weight.size + inputs.cotangent.size
    if not case.rows:
        return "an empty batch has no sums to compare without tolerance."
    if size > _MOST_ENTRIES:
        return (
            f"integers and NaN say nothing new on more than {_MOST_ENTRIES} elements; smaller cases have these checks."
        )
    if (subject.framework, subject.mode) in _DEAR_MODES:
        return f"{_DEAR_MODES[subject.framework, subject.mode]}; the other modes have the checks without tolerance."
    return None


def exact_rows(
    subject: Subject, case: Case, inputs: Inputs, where: Mapping[str, Any], seed: int = 0
) -> Iterator[ParityRow]:
    """Yields a row for each check that the case and dtype admit, in the shapes that the case is judged in anyway.

    Where none is run, one skipped row says why (see `left_out`). The lattice needs sums that stay exact in the dtype,
    the wide one sums well beyond them in a 16-bit dtype, and isolation at least two partitions. Where a mode casts, the
    dtype is the one that it computes in: a cast leaves such integers alone.

    Args:
        subject: supports the case in this dtype.
        case: the shape.
        inputs: drawn for the case.
        where: the fields of a row that say which cell it belongs to.
        seed: of the integers.
    """
    where = {**where, "kind": "exact"}
    reason = left_out(subject, case, inputs)
    if reason is not None:
        yield ParityRow(**where, tensor="", status="skipped", reason=reason)
        return

    def row(check: str, reasons: list[str]) -> ParityRow:
        status = "mismatch" if reasons else "ok"
        return ParityRow(**where, tensor=check, status=status, reason="; ".join(reasons))

    computed = MODES[subject.mode].computes_in or inputs.dtype
    largest = FORMATS[computed].largest_integer
    if max(case.in_features, case.out_features, case.rows) < largest:
        results = check_lattice(subject, case, inputs.dtype, seed)
        yield row("lattice", [result.reason for result in results if result.status != "ok"])
    # On average a product of the lattice's magnitudes is 3: from here on sums lie well beyond the exact integers.
    if computed in ("bfloat16", "float16") and largest < 2 * case.in_features <= 2**20:
        results = check_wide_lattice(subject, case, inputs.dtype, seed)
        yield row("wide lattice", [result.reason for result in results if result.status != "ok"])
    if case.num_partitions > 1:
        yield row("isolation", list(_isolation_faults(subject, inputs)))


def _isolation_faults(subject: Subject, inputs: Inputs) -> Iterator[str]:
    """What is wrong with NaN and Inf in one partition: swallowed, or seen in others though that is declared not to be.

    What declares no isolation may still have it in some shapes, where a compiler chose another algorithm.
    """
    for poison in _POISONS:
        partition = len(inputs.weight) // 2
        found = check_isolation(subject, inputs, partition, poison)
        if found.swallowed:
            yield f"{poison} in partition {partition} was swallowed in {', '.join(found.swallowed)}"
        if subject.isolates_partitions and not found.isolated:
            yield f"{poison} in partition {partition} changed the others, which are declared isolated"
