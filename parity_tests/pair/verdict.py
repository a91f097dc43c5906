"""One tensor against what it should be, within a bound or bit for bit."""

import numpy as np

from parity_tests.harness.comparison import TensorResult
from parity_tests.pair.draws import is_float


def _errors(value: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|value - expected|; infinite where exactly one of the two is finite, so that a NaN never passes for a number."""
    finite = np.isfinite(value) & np.isfinite(expected)
    same = (value == expected) | (np.isnan(value) & np.isnan(expected))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(value - expected)
    return np.where(same, 0.0, np.where(finite, difference, np.inf))


def refused(name: str, reason: str) -> TensorResult:
    """A mismatch that is no matter of size: a wrong shape, a wrong dtype, other bits."""
    return TensorResult(name, "mismatch", reason, np.inf, np.inf, np.inf, None, None, None, None, None, None)


def within(name: str, value: np.ndarray, expected: np.ndarray, limit: np.ndarray | float) -> TensorResult:
    """Judges floating-point values by a bound, integers and booleans by equality.

    Args:
        name: of the tensor.
        value: what was computed.
        expected: the truth, or the other side's value.
        limit: element by element; without meaning for integers.
    """
    if value.shape != expected.shape:
        reason = f"{name} has shape {value.shape}, expected {expected.shape}"
        return refused(name, reason)
    if is_float(value) != is_float(expected):
        reason = f"{name} has dtype {value.dtype}, expected {expected.dtype}"
        return refused(name, reason)
    if value.size == 0:
        return TensorResult(name, "ok", "", 0.0, 0.0, 0.0, None, None, None, None, None, None)
    value, expected = value.astype(np.float64), expected.astype(np.float64)
    errors = _errors(value, expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        fractions = errors / limit
    # A bound that is not finite belongs to a truth that is not: there only equality counts, and that has error 0.
    fractions = np.where(errors == 0, 0.0, np.where(np.isfinite(limit) & ~np.isnan(fractions), fractions, np.inf))
    index = tuple(int(k) for k in np.unravel_index(int(fractions.argmax()), errors.shape))
    worst = float(fractions[index])
    reason = ""
    if worst > 1:
        reason = (
            f"{name}{list(index)} is {float(value[index])!r}, expected {float(expected[index])!r}: "
            f"{worst:.3g} times the bound"
        )
    return TensorResult(
        tensor=name,
        status="mismatch" if worst > 1 else "ok",
        reason=reason,
        max_abs_error=float(errors.max()),
        median_abs_error=float(np.median(errors)),
        bound_fraction=worst,
        bound_fraction_t2=None,
        bound_fraction_t3=None,
        worst_index=index,
        partition=None,
        subject_value=float(value[index]),
        expected_value=float(expected[index]),
    )


def same_bits(name: str, value: np.ndarray, expected: np.ndarray) -> TensorResult:
    """Judges bit for bit: signed zeros and NaN payloads count."""
    result = within(name, value, expected, 0.0)
    if result.status == "ok" and (value.dtype != expected.dtype or value.tobytes() != expected.tobytes()):
        reason = f"{name} has other bits ({value.dtype}) than what was put in ({expected.dtype})"
        return refused(name, reason)
    return result
