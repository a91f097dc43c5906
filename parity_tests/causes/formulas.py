"""Compare two arrays of numbers: the same in another order, or one a formula of the other.

A formula is looked for among sorted numbers, so that it does not matter how they are arranged.
"""

from collections.abc import Callable, Iterator

import numpy as np

from parity_tests.judge.dtypes import FORMATS, is_complex

_ALIKE = 1e-9  # relative; numbers of float64 that went through some operations
_ROUND = 3  # significant digits of a constant that somebody wrote
_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(x, 0.0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    **{function.__name__: function for function in (np.exp, np.log, np.log1p, np.abs, np.sin, np.cos, np.square)},
}


def order_of(own: np.ndarray, other: np.ndarray) -> str:
    """Say how numbers of one shape are rearranged in another array; empty if that is none of the known ways."""
    for axis, size in enumerate(own.shape):
        if size > 1 and equal(np.flip(own, axis), other):
            return f"reversed (flipped) along axis {axis}"
    for axis, size in enumerate(own.shape):
        for by in range(1, size):
            if equal(np.roll(own, by, axis), other):
                return f"rolled by {by} along axis {axis}"
    for first, second in ((a, b) for b in range(own.ndim) for a in range(b)):
        if own.shape[first] == own.shape[second] and equal(own.swapaxes(first, second), other):
            return f"with axes {first} and {second} exchanged (transposed)"
    for axis, size in enumerate(own.shape):
        for blocks in (n for n in range(2, size) if size % n == 0):
            split = own.reshape(*own.shape[:axis], blocks, size // blocks, *own.shape[axis + 1 :])
            if equal(split.swapaxes(axis, axis + 1).reshape(own.shape), other):
                others = "a shuffle, or channels first against last before a flatten"
                return f"with axis {axis} split the other way round ({blocks} groups interleaved: {others})"
    for axis, size in enumerate(own.shape):
        # One part of what was joined along an axis.
        same = np.asarray(np.isclose(own, other, rtol=_ALIKE).all(tuple(k for k in range(own.ndim) if k != axis)))
        part = range(int(np.argmin(same)), size - int(np.argmin(same[::-1])))
        if 0 < len(part) < size and (words := order_of(own.take(part, axis), other.take(part, axis))):
            return f"{words}, in {part.start}:{part.stop} of axis {axis} alone"
    return ""


def equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Tell whether two arrays are equal up to the rounding of some operations."""
    return bool(
        np.allclose(first, second, rtol=_ALIKE, atol=_ALIKE * np.abs(first[np.isfinite(first)]).max(initial=0.0))
    )


def same_numbers(own: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether two arrays have the same numbers in any order, up to rounding; those not finite in equal count."""
    if own.shape != other.shape or is_complex(own) != is_complex(other):
        return False
    first, second = (np.sort(array.ravel()) for array in (own, other))
    finite = np.isfinite(first)
    if not np.array_equal(finite, np.isfinite(second)):
        return False
    first, second = first[finite], second[finite]
    return bool(not first.size or (np.abs(first - second) <= _ALIKE * np.abs(first).max()).all())


def formulas(own: np.ndarray, other: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what makes the other numbers of these: words that follow "on the flax side it is", and the numbers.

    A constant that a few numbers would agree on by chance has to be a round one.
    """
    if own.size != other.size or own.size == 0 or is_complex(own) != is_complex(other):
        return
    first, second = np.sort(own.ravel()), np.sort(other.ravel())
    if not (np.isfinite(first).all() and np.isfinite(second).all()) or not second.any():
        return
    distinct = len(np.unique(np.round(first / (np.abs(first).max() or 1.0), 9)))
    scale = np.abs(second).max()

    def fits(values: np.ndarray) -> bool:
        return bool((np.abs(np.sort(values) - second) <= _ALIKE * max(scale, np.abs(values).max())).all())

    def told(constant: float, needed: int) -> bool:
        return distinct >= needed or is_round(constant)

    for sign in (1.0, -1.0):
        factor = sign * float(np.linalg.norm(second) / np.linalg.norm(first)) if first.any() else 0.0
        factor = written(factor)
        if abs(factor - 1) > FORMATS["float32"].roundoff and factor and fits(factor * first) and told(factor, 2):
            yield f"{factor:.6g} times as large", factor * own
    if is_complex(own):
        if np.imag(own).any() and fits(first.conj()):
            yield "its complex conjugate", own.conj()
        return
    offset = written(float(np.median(second - first)))
    if abs(offset) > FORMATS["float32"].roundoff * scale and fits(first + offset) and told(offset, 3):
        yield f"{abs(offset):.6g} {'more' if offset > 0 else 'less'} (a shift by a constant)", own + offset
    complement = written(float(np.median(second + first[::-1])))
    if complement and fits(complement - first) and told(complement, 3):
        yield f"{complement:.6g} minus it (inverted)", complement - own
    if first[0] > 0 and second[0] > 0:
        logs, others = np.log(first), np.log(second)
        for order in (1, -1) if logs.any() else ():
            power = written(float(logs @ others[::order] / (logs @ logs)))
            # An array of ones is any power of itself.
            if abs(power - 1) > FORMATS["float32"].roundoff and fits(first**power) and told(power, 3):
                yield f"it to the power {power:.6g} (another exponent, or base of a power)", own**power
    below = first < 0
    if below.any() and not below.all() and first[below].any():
        slope = written(float(second[below] @ first[below] / (first[below] @ first[below])))
        if abs(slope - 1) > FORMATS["float32"].roundoff and slope and fits(np.where(below, slope * first, first)):
            yield (
                f"{slope:.6g} times as large where it is negative (another slope)",
                np.where(own < 0, slope * own, own),
            )
    fitting = []
    for name, function in _FUNCTIONS.items() if distinct >= 4 else ():
        with np.errstate(all="ignore"):
            values = function(first)
        if np.isfinite(values).all() and not np.array_equal(values, first) and fits(values):
            fitting.append(name)
    if fitting:
        yield f"{' or '.join(fitting)} of it (a function that torch's side lacks there)", _FUNCTIONS[fitting[0]](own)
    for order in (1, -1) if distinct >= 4 else ():
        factor, offset = map(written, np.polyfit(first, second[::order], 1).tolist())
        # With one of them alone it would be one of the formulas above, or rounding.
        both = abs(abs(factor) - 1) > FORMATS["float32"].roundoff and abs(offset) > _ALIKE * scale
        if factor and both and fits(factor * first + offset):
            yield (
                f"{factor:.6g} times it and {abs(offset):.6g} {'more' if offset > 0 else 'less'}",
                factor * own + offset,
            )


def written(number: float) -> float:
    """Return the number that was meant, if it has few digits: a fit errs where values do."""
    short = float(f"{number:.9g}")
    return short if abs(short - number) <= 1e-12 * abs(number) else number


def is_round(number: float) -> bool:
    """Tell whether a number, or one over it, has few digits."""
    return any(abs(float(f"{each:.{_ROUND}g}") - each) <= _ALIKE * abs(each) for each in (number, 1 / (number or 1.0)))
