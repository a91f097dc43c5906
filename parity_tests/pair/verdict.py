"""One tensor against what it should be, within a bound or bit for bit."""

import numpy as np

from parity_tests.judge.comparison import TensorResult
from parity_tests.pair.casts import distances, exactly, is_complex, is_float, is_inexact, parts

UNDECIDED = "undecided"
_PARTS = ("real part", "imaginary part")


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


def undecided(name: str, reason: str) -> TensorResult:
    """Neither held nor a mismatch: there is no bound or no truth to judge by."""
    return TensorResult(name, UNDECIDED, reason, np.inf, np.inf, np.inf, None, None, None, None, None, None)


def within(name: str, value: np.ndarray, expected: np.ndarray, limit: np.ndarray | float) -> TensorResult:
    """Judges real and complex numbers by a bound, complex ones part by part; integers and booleans by equality.

    What is not finite on one side has to be equal on the other. A bound that is not finite decides nothing.

    Args:
        name: of the tensor.
        value: what was computed.
        expected: the truth, or the other side's value.
        limit: element by element, complex (a bound for each part) for complex numbers; without meaning for integers.
    """
    if value.shape != expected.shape:
        reason = f"{name} has shape {value.shape}, expected {expected.shape}"
        return refused(name, reason)
    if (is_float(value), is_complex(value)) != (is_float(expected), is_complex(expected)):
        reason = f"{name} has dtype {value.dtype}, expected {expected.dtype}"
        return refused(name, reason)
    if value.size == 0:
        return TensorResult(name, "ok", "", 0.0, 0.0, 0.0, None, None, None, None, None, None)
    if not is_inexact(value):
        return _equal(name, value, expected)
    divided = is_complex(value)
    limit = np.broadcast_to(limit, value.shape)
    limit = parts(exactly(limit, np.dtype(np.complex128), "limit") if divided else limit)
    value, expected = parts(value), parts(expected)
    errors = _errors(value, expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        fractions = np.where(errors == 0, 0.0, errors / limit)
    open_ = ~np.isfinite(limit) & np.isfinite(value) & np.isfinite(expected)
    fractions = np.where(open_, 0.0, np.where(np.isnan(fractions), np.inf, fractions))
    index = tuple(int(k) for k in np.unravel_index(int(fractions.argmax()), errors.shape))
    worst = float(fractions[index])
    place = f"the {_PARTS[index[-1]]} of {name}{list(index[:-1])}" if divided else f"{name}{list(index)}"
    reason, status = "", "ok"
    if worst > 1:
        status = "mismatch"
        reason = f"{place} is {float(value[index])!r}, expected {float(expected[index])!r}: "
        if np.isfinite(errors[index]):
            reason += f"{worst:.3g} times the bound"
        else:
            reason += "what is not finite has to be equal on both sides"
    elif open_.any():
        first = tuple(int(k) for k in np.argwhere(open_)[0])
        return undecided(
            name,
            f"{name}{list(first[:-1] if divided else first)} cannot be judged: rounding alone decides whether a value "
            "behind it is finite, so that there is no bound; give inputs, or draws of the parameters, away from there",
        )
    return TensorResult(
        tensor=name,
        status=status,
        reason=reason,
        max_abs_error=float(errors.max()),
        median_abs_error=float(np.median(errors)),
        bound_fraction=worst,
        bound_fraction_t2=None,
        bound_fraction_t3=None,
        worst_index=index[:-1] if divided else index,
        partition=None,
        subject_value=float(value[index]),
        expected_value=float(expected[index]),
    )


def _equal(name: str, value: np.ndarray, expected: np.ndarray) -> TensorResult:
    """Integers and booleans, compared as such: float64 does not tell all 64-bit integers apart."""
    errors = distances(value, expected)
    index = tuple(int(k) for k in np.unravel_index(int(errors.argmax()), errors.shape))
    reason = f"{name}{list(index)} is {value[index]}, expected {expected[index]}" if errors.any() else ""
    fraction = np.inf if reason else 0.0
    return TensorResult(
        tensor=name,
        status="mismatch" if reason else "ok",
        reason=reason,
        max_abs_error=float(errors.max()),
        median_abs_error=float(np.median(errors)),
        bound_fraction=fraction,
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
