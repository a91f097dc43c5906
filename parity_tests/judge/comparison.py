"""Error over bound: the comparison of a subject with the oracle, and of two subjects with each other."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from parity_tests.judge.oracle import OracleTensor, Reference
from parity_tests.judge.tolerance import TIERS, Arithmetic, Tier, bound, bounds


@dataclass(frozen=True)
class TensorResult:
    """The verdict on one tensor.

    Attributes:
        tensor: `y`, `dx`, `dweight` or `dbias`.
        status: `ok` or `mismatch`.
        reason: one sentence for a mismatch, else empty.
        max_abs_error: largest absolute error.
        median_abs_error: median absolute error.
        bound_fraction: largest error over the T1 bound; above 1 is certainly a defect.
        bound_fraction_t2: the same for T2, or None where its assumption does not hold.
        bound_fraction_t3: the same for T3, or None.
        worst_index: index of the element with the largest fraction of T1, or None for an empty tensor.
        partition: the partition that element belongs to.
        subject_value: what the subject returned there.
        expected_value: what the oracle (or the other subject) has there.
        partition_fractions: largest error over the T1 bound in each partition, to three digits; None for a pair.
    """

    tensor: str
    status: str
    reason: str
    max_abs_error: float
    median_abs_error: float
    bound_fraction: float
    bound_fraction_t2: float | None
    bound_fraction_t3: float | None
    worst_index: tuple[int, ...] | None
    partition: int | None
    subject_value: float | None
    expected_value: float | None
    partition_fractions: tuple[float, ...] | None = None


def _errors(value: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|value - expected|; infinite where exactly one is not finite or both are but differ. NaN equals NaN here."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(value - expected)
    if np.isfinite(difference).all():
        return difference
    both_finite = np.isfinite(value) & np.isfinite(expected)
    same_special = (value == expected) | (np.isnan(value) & np.isnan(expected))
    return np.where(both_finite, difference, np.where(same_special, 0.0, np.inf))


def _fractions(errors: np.ndarray, limits: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        fractions = errors / limits
    if np.isfinite(fractions).all():
        return fractions
    # An exact element within a bound of zero is no error at all, and a NaN bound (a non-finite sum) judges by equality.
    return np.where(errors == 0, 0.0, np.where(np.isnan(fractions), np.inf, fractions))


def _mismatch(tensor: str, reason: str) -> TensorResult:
    return TensorResult(tensor, "mismatch", reason, np.inf, np.inf, np.inf, None, None, None, None, None, None)


def _shape_mismatch(tensor: str, received: tuple[int, ...], expected: tuple[int, ...]) -> TensorResult:
    return _mismatch(tensor, f"{tensor} has shape {received}, expected {expected}")


def missing_tensors(outputs: Mapping[str, np.ndarray], reference: Reference) -> list[TensorResult]:
    """A mismatch for every tensor of the oracle that a vector-Jacobian product did not return."""
    return [_mismatch(name, f"{name} is missing") for name in reference if name not in outputs]


def _by_partition(fractions: np.ndarray, axis: int) -> tuple[float, ...]:
    others = tuple(k for k in range(fractions.ndim) if k != axis)
    return tuple(float(f"{value:.3g}") for value in fractions.max(axis=others))


def _result(
    name: str,
    value: np.ndarray,
    expected: np.ndarray,
    axis: int,
    limits: Mapping[Tier, np.ndarray],
    by_partition: bool = False,
) -> TensorResult:
    value = value.astype(expected.dtype)
    if value.shape != expected.shape:
        return _shape_mismatch(name, value.shape, expected.shape)
    if value.size == 0:
        return TensorResult(name, "ok", "", 0.0, 0.0, 0.0, None, None, None, None, None, None)
    errors = _errors(value, expected)
    by_tier = {tier: _fractions(errors, limit) for tier, limit in limits.items()}
    worst = {tier: float(fractions.max()) for tier, fractions in by_tier.items()}
    index = tuple(int(k) for k in np.unravel_index(int(by_tier["T1"].argmax()), expected.shape))
    broken = next((tier for tier in TIERS if worst.get(tier, 0.0) > 1), None)
    reason = ""
    if broken is not None:
        index = tuple(int(k) for k in np.unravel_index(int(by_tier[broken].argmax()), expected.shape))
        reason = (
            f"{name}{list(index)} (partition {index[axis]}) is {float(value[index])!r}, expected "
            f"{float(expected[index])!r}: {worst[broken]:.3g} times the {broken} bound"
        )
    return TensorResult(
        tensor=name,
        status="ok" if broken is None else "mismatch",
        reason=reason,
        max_abs_error=float(errors.max()),
        median_abs_error=float(np.median(errors)),
        bound_fraction=worst["T1"],
        bound_fraction_t2=worst.get("T2"),
        bound_fraction_t3=worst.get("T3"),
        worst_index=index,
        partition=index[axis],
        subject_value=float(value[index]),
        expected_value=float(expected[index]),
        partition_fractions=_by_partition(by_tier["T1"], axis) if by_partition else None,
    )


def applicable_tiers(arithmetic: Arithmetic, zero_mean: bool) -> tuple[Tier, ...]:
    """The tiers whose assumptions hold: T2 needs roundings of zero mean, T3 zero-mean data as well."""
    if arithmetic.truncates:
        return ("T1",)
    return TIERS if zero_mean else ("T1", "T2")


def compare_tensor(
    name: str, value: np.ndarray, truth: OracleTensor, arithmetic: Arithmetic, zero_mean: bool = True
) -> TensorResult:
    """Judges one tensor of a subject against the oracle, in every tier whose assumptions hold.

    The dtype must be the one that the arithmetic promises: a result in another dtype is another function.
    """
    expected = arithmetic.dtype_of(name)
    if value.dtype.name != expected:
        return _mismatch(name, f"{name} has dtype {value.dtype.name}, expected {expected}")
    if value.shape != truth.value.shape:
        return _shape_mismatch(name, value.shape, truth.value.shape)
    tiers = applicable_tiers(arithmetic, zero_mean)
    limits = bounds(truth, arithmetic, tiers)
    return _result(name, value, truth.value, truth.partition_axis, limits, by_partition=True)


def compare_with_limit(
    name: str, value: np.ndarray, expected: np.ndarray, limit: np.ndarray, partition_axis: int
) -> TensorResult:
    """Judges one tensor against a value with a limit of its own for each element, for what no product's bound covers.

    Args:
        name: of the tensor.
        value: what the subject returned.
        expected: the truth, in float64 or wider.
        limit: largest admissible error of each element.
        partition_axis: axis of the partitions.
    """
    return _result(name, value, expected, partition_axis, {"T1": limit})


def compare(
    outputs: Mapping[str, np.ndarray], reference: Reference, arithmetic: Arithmetic, zero_mean: bool = True
) -> list[TensorResult]:
    """Judges a subject's tensors against the oracle.

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
    """Returns how far two subjects may lie apart, by tensor: the sum of both T1 bounds.

    Args:
        reference: the oracle's tensors.
        arithmetics: what either side is entitled to.
    """
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
    """Judges two subjects against each other: `|t - j| <= B_t + B_j`.

    Args:
        first: tensors of one side.
        second: tensors of the other.
        reference: the oracle's tensors.
        limits: from `pair_limits`.

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
        expected = second[name].astype(truth.value.dtype)
        results.append(_result(name, value, expected, truth.partition_axis, {"T1": limits[name]}))
    return results
