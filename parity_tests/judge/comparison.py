"""Judge arrays by error over bound: a subject against the oracle, two subjects or two sides against each other."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from parity_tests.judge.dtypes import distances, exactly, is_complex, is_float, is_inexact, parts
from parity_tests.judge.tolerance import TIERS, Arithmetic, OracleTensor, Reference, Tier, bound, bounds

UNDECIDED = "undecided"
_PARTS = ("real part", "imaginary part")


@dataclass(frozen=True)
class TensorResult:
    """The verdict on one tensor."""

    tensor: str  # `y`, `dx`, `dweight` or `dbias`; of a user's pair `y`, `y.<path>`, `d_<parameter>`, `state:<buffer>`
    status: str  # `ok` or `mismatch`; `undecided` where there is no bound or no truth to judge by
    reason: str = ""  # one sentence for a mismatch, else empty
    max_abs_error: float = 0.0  # largest absolute error
    median_abs_error: float = 0.0  # median absolute error
    bound_fraction: float = 0.0  # largest error over the T1 bound, or the calibrated one; above 1 is certainly a defect
    bound_fraction_t2: float | None = None  # the same for T2, or None where its assumption does not hold
    bound_fraction_t3: float | None = None  # the same for T3, or None
    # Index of the element with the largest fraction, or None for an empty tensor
    worst_index: tuple[int, ...] | None = None
    partition: int | None = None  # the partition that element belongs to
    subject_value: float | None = None  # what the subject returned there
    expected_value: float | None = None  # what the oracle (or the other subject) has there
    # Largest error over the T1 bound in each partition, to three digits; None for a pair
    partition_fractions: tuple[float, ...] | None = None


def refused(tensor: str, reason: str, status: str = "mismatch") -> TensorResult:
    """Return a mismatch that is no matter of size (a shape, a dtype, other bits), or an undecided verdict."""
    return TensorResult(tensor, status, reason, np.inf, np.inf, np.inf)


def _errors(value: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return |value - expected|; infinite where one is not finite and the other is not the same; NaN equals NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(value - expected)
    if np.isfinite(difference).all():
        return difference
    both_finite = np.isfinite(value) & np.isfinite(expected)
    same_special = (value == expected) | (np.isnan(value) & np.isnan(expected))
    return np.where(both_finite, difference, np.where(same_special, 0.0, np.inf))


def _fractions(errors: np.ndarray, limits: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        fractions = errors / limits
    if np.isfinite(fractions).all():
        return fractions
    # An exact element within a bound of zero is no error at all, and a NaN bound (a non-finite sum) judges by equality.
    return np.where(errors == 0, 0.0, np.where(np.isnan(fractions), np.inf, fractions))


def _index(array: np.ndarray) -> tuple[int, ...]:
    """Return where the largest element is."""
    return tuple(int(k) for k in np.unravel_index(int(array.argmax()), array.shape))


def _verdict(
    name: str,
    value: np.ndarray,
    expected: np.ndarray,
    limits: Mapping[Tier | None, np.ndarray],
    axis: int | None = None,
    by_part: bool = False,
    by_partition: bool = False,
    labels: np.ndarray | None = None,
) -> TensorResult:
    """Judge real numbers by bounds.

    Args:
        name: of the tensor.
        value: what was computed.
        expected: in the same format and shape.
        limits: largest admissible errors by tier, T1 first; by None for a calibrated bound.
        axis: of the partitions; None for a user's pair, which has none.
        by_part: whether the last axis holds the real and the imaginary part.
        by_partition: whether to add the largest fraction of each partition.
        labels: the partition of each place along the axis, where a partition has several of them.
    """
    if value.size == 0:
        return TensorResult(name, "ok")
    errors = _errors(value, expected)
    fractions = {tier: _fractions(errors, limit) for tier, limit in limits.items()}
    first = fractions[next(iter(limits))]
    worst = {tier: float(found.max()) for tier, found in fractions.items()}
    broken = [tier for tier in limits if worst[tier] > 1]
    index, reason = _index(fractions[broken[0]] if broken else first), ""
    if broken:
        place = f"the {_PARTS[index[-1]]} of {name}{list(index[:-1])}" if by_part else f"{name}{list(index)}"
        partition = "" if axis is None else f" (partition {_partition(index, axis, labels)})"
        bound_name = f"the {broken[0]} bound" if broken[0] else "the bound"
        gap = f"{worst[broken[0]]:.3g} times {bound_name}"
        if axis is None and not np.isfinite(errors[index]):
            gap = "what is not finite has to be equal on both sides"
        reason = f"{place}{partition} is {float(value[index])!r}, expected {float(expected[index])!r}: {gap}"
    return TensorResult(
        tensor=name,
        status="mismatch" if broken else "ok",
        reason=reason,
        max_abs_error=float(errors.max()),
        median_abs_error=float(np.median(errors)),
        bound_fraction=float(first.max()),
        bound_fraction_t2=worst.get("T2"),
        bound_fraction_t3=worst.get("T3"),
        worst_index=index[:-1] if by_part else index,
        partition=None if axis is None else _partition(index, axis, labels),
        subject_value=float(value[index]),
        expected_value=float(expected[index]),
        partition_fractions=_by_partition(first, axis, labels) if by_partition and axis is not None else None,
    )


def _partition(index: tuple[int, ...], axis: int, labels: np.ndarray | None) -> int:
    return index[axis] if labels is None else int(labels[index[axis]])


def _by_partition(fractions: np.ndarray, axis: int, labels: np.ndarray | None) -> tuple[float, ...]:
    largest = fractions.max(axis=tuple(k for k in range(fractions.ndim) if k != axis))
    if labels is not None:
        largest = np.array([largest[labels == k].max() for k in range(labels.max() + 1)])
    return tuple(float(f"{value:.3g}") for value in largest)


def _shape_mismatch(tensor: str, received: tuple[int, ...], expected: tuple[int, ...]) -> TensorResult:
    return refused(tensor, f"{tensor} has shape {received}, expected {expected}")


def within(name: str, value: np.ndarray, expected: np.ndarray, limit: np.ndarray | float) -> TensorResult:
    """Judge real and complex numbers by a calibrated bound, complex ones part by part; others by equality.

    What is not finite on one side has to be equal on the other. A bound that is not finite decides nothing.

    Args:
        name: of the tensor.
        value: what was computed.
        expected: the truth, or the other side's value.
        limit: element by element, complex (a bound for each part) for complex numbers; without meaning for integers.
    """
    if value.shape != expected.shape:
        return _shape_mismatch(name, value.shape, expected.shape)
    if (is_float(value), is_complex(value)) != (is_float(expected), is_complex(expected)):
        return refused(name, f"{name} has dtype {value.dtype}, expected {expected.dtype}")
    if value.size and not is_inexact(value):
        return _equal(name, value, expected)
    divided = is_complex(value)
    limit = np.broadcast_to(limit, value.shape)
    limit = parts(exactly(limit, np.dtype(np.complex128), "limit") if divided else limit)
    value, expected = parts(value), parts(expected)
    open_ = ~np.isfinite(limit) & np.isfinite(value) & np.isfinite(expected)
    result = _verdict(name, value, expected, {None: np.where(open_, np.inf, limit)}, by_part=divided)
    if result.status != "ok" or not open_.any():
        return result
    first = [int(k) for k in np.argwhere(open_)[0]]
    reason = (
        f"{name}{first[:-1] if divided else first} cannot be judged: rounding alone decides whether a value behind it "
        "is finite, so that there is no bound; give inputs, or draws of the parameters, away from there"
    )
    return refused(name, reason, UNDECIDED)


def _equal(name: str, value: np.ndarray, expected: np.ndarray) -> TensorResult:
    """Compare integers and booleans as such: float64 does not tell all 64-bit integers apart."""
    errors = distances(value, expected)
    index = _index(errors)
    wrong = bool(errors.any())
    return TensorResult(
        tensor=name,
        status="mismatch" if wrong else "ok",
        reason=f"{name}{list(index)} is {value[index]}, expected {expected[index]}" if wrong else "",
        max_abs_error=float(errors.max()),
        median_abs_error=float(np.median(errors)),
        bound_fraction=np.inf if wrong else 0.0,
        worst_index=index,
        subject_value=float(value[index]),
        expected_value=float(expected[index]),
    )


def same_bits(name: str, value: np.ndarray, expected: np.ndarray) -> TensorResult:
    """Judge bit for bit: signed zeros and NaN payloads count."""
    result = within(name, value, expected, 0.0)
    if result.status == "ok" and (value.dtype != expected.dtype or value.tobytes() != expected.tobytes()):
        reason = f"{name} has other bits ({value.dtype}) than what was put in ({expected.dtype})"
        return refused(name, reason)
    return result


def missing_tensors(outputs: Mapping[str, np.ndarray], reference: Reference) -> list[TensorResult]:
    """Return a mismatch for every tensor of the oracle that a vector-Jacobian product did not return."""
    return [refused(name, f"{name} is missing") for name in reference if name not in outputs]


def applicable_tiers(arithmetic: Arithmetic, zero_mean: bool) -> tuple[Tier, ...]:
    """Return the tiers whose assumptions hold: T2 needs roundings of zero mean, T3 zero-mean data as well."""
    if arithmetic.truncates:
        return ("T1",)
    return TIERS if zero_mean else ("T1", "T2")


def compare_tensor(
    name: str, value: np.ndarray, truth: OracleTensor, arithmetic: Arithmetic, zero_mean: bool = True
) -> TensorResult:
    """Judge one tensor of a subject against the oracle, in every tier whose assumptions hold.

    The dtype must be the one that the arithmetic promises: a result in another dtype is another function.
    """
    expected = arithmetic.dtype_of(name)
    if value.dtype.name != expected:
        return refused(name, f"{name} has dtype {value.dtype.name}, expected {expected}")
    if value.shape != truth.value.shape:
        return _shape_mismatch(name, value.shape, truth.value.shape)
    tiers = applicable_tiers(arithmetic, zero_mean)
    limits = bounds(truth, arithmetic, tiers)
    value = value.astype(truth.value.dtype)
    axis, labels = truth.partition_axis, truth.labels
    return _verdict(name, value, truth.value, {**limits}, axis, by_partition=True, labels=labels)


def compare_with_limit(
    name: str,
    value: np.ndarray,
    expected: np.ndarray,
    limit: np.ndarray,
    partition_axis: int,
    labels: np.ndarray | None = None,
) -> TensorResult:
    """Judge one tensor by a limit for each element, for tensors without a derived bound, such as optimiser updates."""
    if value.shape != expected.shape:
        return _shape_mismatch(name, value.shape, expected.shape)
    return _verdict(name, value.astype(expected.dtype), expected, {"T1": limit}, partition_axis, labels=labels)


def compare(
    outputs: Mapping[str, np.ndarray], reference: Reference, arithmetic: Arithmetic, zero_mean: bool = True
) -> list[TensorResult]:
    """Judge a subject's tensors against the oracle.

    Args:
        outputs: any of `y`, `dx`, `dweight`, `dbias`, as NumPy arrays.
        reference: the oracle's tensors for the same inputs.
        arithmetic: what the subject is entitled to, see `tolerance.declared_arithmetic`.
        zero_mean: False for data that the harness did not draw.

    Returns:
        One result per tensor of `outputs`, in its order.

    Raises:
        ValueError: if `outputs` is empty or names a tensor that the oracle does not have.
    """
    if not outputs:
        raise ValueError(
            "outputs: expected at least one of y, dx, dweight, dbias, got none; nothing would be compared."
        )
    unknown = [name for name in outputs if name not in reference]
    if unknown:
        raise ValueError(
            f"outputs: expected names among {', '.join(reference)}, got {', '.join(unknown)}; "
            "a subject without bias has no dbias."
        )
    return [compare_tensor(name, value, reference[name], arithmetic, zero_mean) for name, value in outputs.items()]


def pair_limits(reference: Reference, arithmetics: tuple[Arithmetic, Arithmetic]) -> dict[str, np.ndarray]:
    """Return how far two subjects may lie apart, by tensor: the sum of both T1 bounds."""
    first, second = arithmetics
    if first == second:
        return {name: 2 * bound(truth, first) for name, truth in reference.items()}
    return {name: bound(truth, first) + bound(truth, second) for name, truth in reference.items()}


def compare_pair(
    first: Mapping[str, np.ndarray],
    second: Mapping[str, np.ndarray],
    reference: Reference,
    limits: Mapping[str, np.ndarray],
) -> list[TensorResult]:
    """Judge two subjects against each other: `|t - j| <= B_t + B_j`.

    Raises:
        ValueError: if the two do not have the same tensors.
    """
    if set(first) != set(second):
        raise ValueError(
            f"pair: expected the same tensors on both sides, got {sorted(first)} and {sorted(second)}; "
            "run both in the same direction."
        )
    results = []
    for name, value in first.items():
        truth = reference[name]
        if value.shape != truth.value.shape or second[name].shape != truth.value.shape:
            results.append(_shape_mismatch(name, value.shape, second[name].shape))
            continue
        pair = value.astype(truth.value.dtype), second[name].astype(truth.value.dtype)
        results.append(_verdict(name, *pair, {"T1": limits[name]}, truth.partition_axis, labels=truth.labels))
    return results
