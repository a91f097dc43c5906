"""Check without tolerance: integer lattices, and NaN and Inf that stay in their partition."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.judge.dtypes import FORMATS
from parity_tests.judge.inputs import Case, Inputs, draw_lattice
from parity_tests.judge.records import ParityRow
from parity_tests.judge.subjects import MODES, Subject
from parity_tests.judge.tolerance import reference


def lattice_limit(case: Case, dtype: str) -> int:
    """Return the largest integer magnitude, at most 3, whose sums stay exact in `dtype` for this case.

    A sum of K products of integers up to m has magnitude at most K m^2, plus m for the bias.

    Raises:
        ValueError: if not even +-1 stays exact.
    """
    terms = max(*case.largest, case.rows)
    exact = FORMATS[dtype].largest_integer
    for limit in (3, 2, 1):
        if terms * limit * limit + limit <= exact:
            return limit
    raise ValueError(f"case {case.name}: expected at most {exact - 1} terms for exact sums in {dtype}, got {terms}.")


def _difference(name: str, value: np.ndarray, expected: np.ndarray) -> list[str]:
    """Say where a tensor is not bit for bit as expected; nothing if it is."""
    expected = expected.astype(value.dtype)
    if value.shape != expected.shape:
        return [f"{name} has shape {value.shape}, expected {expected.shape}"]
    # -0.0 and 0.0 are the same integer: an empty sum may carry either sign.
    unequal = ~((value == expected) | (np.isnan(value) & np.isnan(expected)))
    if not unequal.any():
        return []
    index = tuple(int(k[0]) for k in np.nonzero(unequal))
    return [f"{name}{list(index)} is {float(value[index])!r}, expected exactly {float(expected[index])!r}"]


def check_lattice(subject: Subject, case: Case, dtype: str, seed: int = 0) -> list[str]:
    """Say where y, dx, dW and db differ from the oracle on integers whose sums are exact."""
    inputs = draw_lattice(case, dtype, seed, lattice_limit(case, MODES[subject.mode].computes_in or dtype))
    truth = reference(inputs)
    outputs = subject.vjp(inputs)
    wrong = [f"{name} is missing" for name in truth if name not in outputs]
    for name, value in outputs.items():
        wrong += _difference(name, value, truth[name].value)
    return wrong


def check_wide_lattice(subject: Subject, case: Case, dtype: str, seed: int = 0) -> list[str]:
    """Say where y is not rounded once, on sums beyond the output's exact integers but exact in an fp32 accumulator.

    All products are positive, so that the running sum passes the output format's largest exact integer early; an
    accumulator of that format then loses every odd term. y only, and any bias is zero, because a bias may legitimately
    be added after the rounding. Where the mode casts, the output format is that of the cast.
    """
    fmt = FORMATS[MODES[subject.mode].computes_in or dtype]
    inputs = draw_lattice(case, dtype, seed, limit=3)
    bias = None if inputs.bias is None else np.zeros_like(inputs.bias)
    positive = dataclasses.replace(inputs, x=np.abs(inputs.x), weight=np.abs(inputs.weight), bias=bias)
    largest = int(
        (positive.x.astype(np.float64).max(initial=0) * positive.weight.astype(np.float64).max()) * case.largest[0]
    )
    if not fmt.largest_integer < largest <= FORMATS["float32"].largest_integer:
        raise ValueError(
            f"case {case.name}: expected sums between {fmt.largest_integer} and 2**24 for {fmt.name}, "
            f"got up to {largest}; choose in_features accordingly."
        )
    return _difference("y", subject.forward(positive), reference(positive)["y"].value)


@dataclass(frozen=True)
class Isolation:
    """The effect of NaN or an infinity in one partition."""

    isolated: bool  # True if every other partition of every tensor has the same bits as without it
    # The tensors in whose poisoned partition something is finite, `forward` being y without gradients; none in right
    # code
    swallowed: tuple[str, ...]


def check_isolation(
    subject: Subject, inputs: Inputs, partition: int, poison: float, *, plain_forward: bool = True
) -> Isolation:
    """Poison one partition of x, W, b and dy and look at the others.

    With `plain_forward`, look at y without gradients too.
    """

    def spoiled(name: str, array: np.ndarray, value: float) -> np.ndarray:
        array = array.copy()
        array[inputs.place(name, partition)] = value
        return array

    operands = inputs.parameters | {"x": inputs.x, "cotangent": inputs.cotangent}
    poisoned: dict[str, Any] = {name: spoiled(name, array, poison) for name, array in operands.items()}
    dirty_inputs = dataclasses.replace(inputs, **poisoned, zero_mean=False)
    # Each tensor has terms from poisoned operands alone in that partition: nothing in it can be finite.
    clean, dirty = subject.vjp(inputs), subject.vjp(dirty_inputs)
    if plain_forward:
        clean, dirty = (
            {**found, "forward": subject.forward(a)} for found, a in ((clean, inputs), (dirty, dirty_inputs))
        )

    def others(name: str, array: np.ndarray) -> bytes:
        return spoiled(name, array, 0.0).tobytes()

    def shows(name: str) -> bool:
        return not np.isfinite(dirty[name][inputs.place(name, partition)].astype(np.float64)).any()

    isolated = all(others(name, clean[name]) == others(name, dirty[name]) for name in clean)
    return Isolation(isolated, tuple(name for name in dirty if not shows(name)))


# --- the checks as rows of a run ---

# The numbers say nothing new on a larger array, and every check is a few calls more.
_MOST_ENTRIES = 2**20
_DEAR_MODES = {
    ("torch", "compile"): "each of these calls would be a compilation",
    ("torch", "sharded"): "each of these calls would go through eight processes",
}
_POISONS = (float("nan"), float("inf"))


def left_out(subject: Subject, case: Case, inputs: Inputs) -> str | None:
    """Return one sentence if a cell is judged against its bounds alone, else None."""
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
    """Yield a row for each check that the case and dtype admit, in the shapes that the case is judged in anyway.

    Where none is run, one skipped row says why (see `left_out`). The lattice needs sums that stay exact in the dtype,
    the wide one sums well beyond them in a 16-bit dtype, and isolation at least two partitions. Where a mode casts, the
    dtype is the one that it computes in: a cast leaves such integers alone.
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
    if max(*case.largest, case.rows) < largest:
        yield row("lattice", check_lattice(subject, case, inputs.dtype, seed))
    # On average a product of the lattice's magnitudes is 3: from here on sums lie well beyond the exact integers.
    if computed in ("bfloat16", "float16") and largest < 2 * case.largest[0] <= 2**20:
        yield row("wide lattice", check_wide_lattice(subject, case, inputs.dtype, seed))
    if case.num_partitions > 1:
        yield row("isolation", list(_isolation_faults(subject, inputs)))


def _isolation_faults(subject: Subject, inputs: Inputs) -> Iterator[str]:
    """Yield what is wrong with NaN and Inf in one partition: swallowed, or seen in others that are declared isolated.

    A subject that declares no isolation may still have it in some shapes, where a compiler chose another algorithm.
    """
    for poison in _POISONS:
        partition = inputs.num_partitions // 2
        found = check_isolation(subject, inputs, partition, poison)
        if found.swallowed:
            yield f"{poison} in partition {partition} was swallowed in {', '.join(found.swallowed)}"
        if subject.isolates_partitions and not found.isolated:
            yield f"{poison} in partition {partition} changed the others, which are declared isolated"
