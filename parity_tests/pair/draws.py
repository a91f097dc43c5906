"""Seeded parameters, inputs and cotangents for a pair: random, of different magnitudes, never at an initial value."""

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.judge.dtypes import (
    FORMATS,
    as_stored,
    exactly,
    format_name,
    is_complex,
    is_float,
    is_inexact,
    roundoff,
    widened,
)
from parity_tests.judge.inputs import BIAS_SCALE, COTANGENT_SCALE, X_SCALE
from parity_tests.pair.calls import Layout, outlined, position, taken_apart
from parity_tests.pair.rules import Link
from parity_tests.pair.side import ParameterSpec
from parity_tests.report.text import first_line, located

# Shapes, arrays and containers of them, one an argument; by name in a mapping.
Arguments = Sequence[Any] | Mapping[int | str, Any]
InputSource = Arguments | Callable[[np.random.Generator], Arguments]
Kinds = Sequence | Mapping
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
Scale = float | Mapping[int | str, float]
# E-folds by which the elements of a one-signed array move: one that keeps its sign (a variance), and one that is drawn
# with both signs (a norm's scale), whose bounds and absolute values shall show.
_RELATIVE_SPREAD, _SIGNED_SPREAD = 0.25, 0.5


def _generator(seed: int, name: str) -> np.random.Generator:
    # crc32 and not hash(): the same numbers in every process.
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def is_one_signed(value: np.ndarray) -> bool:
    """Return whether all numbers are positive, or all negative."""
    return is_float(value) and value.size > 0 and bool((value > 0).all() or (value < 0).all())


def draw_like(value: np.ndarray, rng: np.random.Generator, signed: bool = False) -> np.ndarray:
    """Draw an array of the scale of `value`, in float64 or complex128.

    A zero array (a bias as initialised) becomes normal with the harness' bias scale, because at zero a lost bias is
    invisible; a positive or negative one keeps its signs, or with `signed` takes both (a single number the other
    one); any other becomes normal with its root mean square.
    """
    value = widened(value)
    if not (finite := np.isfinite(value)).all():  # a mask: its infinities stay
        drawn = value.copy()
        drawn[finite] = draw_like(value[finite], rng, signed)
        return drawn
    normal = _normal_like(value, rng)
    if not value.any():
        return BIAS_SCALE * normal
    if not is_one_signed(value):
        return np.sqrt(np.mean(np.abs(value) ** 2)) * normal
    if not signed:
        return value * np.exp(_RELATIVE_SPREAD * normal)
    signs = rng.choice((-1.0, 1.0), value.shape)
    if (signs > 0).all() or (value.size > 1 and (signs < 0).all()):
        signs.flat[0] *= -1.0
    return signs * value * np.exp(_SIGNED_SPREAD * normal)


def _normal_like(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw normal numbers of variance 1, complex ones where the array is."""
    if not is_complex(array):
        return rng.standard_normal(array.shape)
    return (rng.standard_normal(array.shape) + 1j * rng.standard_normal(array.shape)) / np.sqrt(2)


def _of_kind(array: np.ndarray, like: np.ndarray, what: str) -> np.ndarray:
    """Return the numbers that a user's function has drawn, widened, for an array of this kind.

    Raises:
        ValueError: if the array cannot hold them: complex numbers for a real one, 0.5 for an integer.
    """
    if is_inexact(like):
        return widened(exactly(array, np.dtype(np.complex128 if is_complex(like) else np.float64), what))
    return exactly(array, like.dtype, what)


def draw_parameters(
    specs: Mapping[str, ParameterSpec],
    seed: int,
    draws: Mapping[str, Draw] | None = None,
    scale: Scale | None = None,
    signed: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Draw every floating-point array of a module in float64; others stay as they are.

    Args:
        specs: arrays by name.
        seed: non-negative.
        draws: for the arrays named here, `(rng, shape) -> array` in place of `draw_like`.
        scale: factors by name, see `checked_scale`; a single number is one of the inputs.
        signed: one-signed arrays that are drawn with both signs.

    Raises:
        ValueError: if `draws` names an unknown array or returns a wrong shape.
    """
    draws = draws or {}
    if unknown := sorted(str(name) for name in set(draws) - set(specs)):
        raise ValueError(f"draws: expected names among {', '.join(specs)}, got {', '.join(unknown)}; choose one.")
    drawn = {}
    for name, spec in specs.items():
        rng = _generator(seed, name)
        if name in draws:
            drawn[name] = _drawn_by(draws[name], f"draws[{name!r}]", rng, spec.value)
        elif is_inexact(spec.value):
            drawn[name] = draw_like(spec.value, rng, name in signed)
        else:
            drawn[name] = spec.value
        if isinstance(scale, Mapping) and name in scale and is_inexact(drawn[name]):
            drawn[name] = scale[name] * drawn[name]
    return drawn


def _drawn_by(draw: Draw, what: str, rng: np.random.Generator, like: np.ndarray) -> np.ndarray:
    try:
        array = np.asarray(draw(rng, like.shape))
    except Exception as error:  # a user's function may raise anything
        raise ValueError(
            f"{what}: expected a function (rng, shape) -> array of numbers, got {first_line(error)}; write one such as "
            "lambda rng, shape: rng.random(shape)."
        ) from error
    if array.dtype.kind not in "biufcV" or array.shape != like.shape:
        raise ValueError(f"{what}: expected numbers of shape {like.shape}, got {array.dtype} of shape {array.shape}.")
    return _of_kind(array, like, what)


def _on_a_grid(values: Sequence[np.ndarray], constant: float, like: np.ndarray) -> list[np.ndarray]:
    """Round terms so that their sum, with a constant of few binary digits, is exact in the format of an array.

    All terms of an element become multiples of one power of two, which is coarse enough for the sum.

    Args:
        values: real or complex terms of one shape, in float64.
        constant: that is added.
        like: of the format.
    """
    if is_complex(np.asarray(sum(values))):
        real, imaginary = ([part(value) for value in values] for part in (np.real, np.imag))
        halves = _on_a_grid(real, constant, like), _on_a_grid(imaginary, 0.0, like)
        return [first + 1j * second for first, second in zip(*halves, strict=True)]
    bits = -np.log2(FORMATS[format_name(like.dtype)].roundoff)
    terms = len(values) + bool(constant)
    if constant:  # a larger term would have a grid too coarse for the constant
        most = abs(constant) * 2.0 ** (bits - 6) / terms
        values = [np.clip(value, -most, most) for value in values]
    largest = terms * np.maximum.reduce([*map(np.abs, values), np.full_like(values[0], abs(constant))])
    step = 2.0 ** (np.ceil(np.log2(np.where(largest > 0, largest, 1.0))) - bits)
    return [np.round(value / step) * step for value in values]


def made_exact(torch: dict[str, np.ndarray], links: Sequence[Link]) -> dict[str, list[np.ndarray]]:
    """Round numbers so that a rule's expression is exact in their format: both sides are given the same.

    Args:
        torch: arrays by name; those of the expression are replaced.
        links: of one rule, in the order of the expression.

    Returns:
        The flax blocks, by rule, where flax has the expression.
    """
    blocks = [link.torch for link in links if link.torch is not None]
    blocks = blocks if links[0].expression == "torch" else blocks[:1]
    factors = [link.factor for link in links]
    names = [block.name for block in blocks]
    finest = min((torch[name] for name in names), key=roundoff)
    for name in names:
        torch[name] = np.array(torch[name])
    values = [widened(torch[block.name][block.ranges]) for block in blocks]
    if links[0].expression == "torch":
        values = [factor * value for factor, value in zip(factors, values, strict=True)]
        values = _on_a_grid(values, links[0].offset, finest)
        values = [value / factor for factor, value in zip(factors, values, strict=True)]
        terms = {}
    else:
        # Other terms of flax's sum: the same numbers in another order, half as large.
        rolled = [np.roll(values[0].ravel(), k).reshape(values[0].shape) / 2 for k in range(1, len(links))]
        whole, *others = _on_a_grid([*values, *rolled], links[0].offset, finest)
        values = [whole]
        first = whole - links[0].offset - sum(others, np.zeros(()))
        pattern = links[0].pattern
        assert pattern is not None
        parts = zip(factors, [first, *others], strict=True)
        terms = {links[0].text: [pattern.forward(part / factor + 0.0) for factor, part in parts]}
    for block, value in zip(blocks, values, strict=True):
        torch[block.name][block.ranges] = exactly(np.asarray(value + 0.0), torch[block.name].dtype, links[0].text)
    return terms


def checked_scale(scale: Scale | None, inputs: "Inputs", names: Collection[str]) -> Scale | None:
    """Refuse factors that are none, or of what is not drawn.

    Args:
        scale: a factor of all inputs that are drawn from shapes, or factors by input (position or name) and by the
            torch name of a parameter.
        inputs: as drawn.
        names: of the parameters that are drawn.

    Raises:
        ValueError: in one sentence.
    """
    if scale is None:
        return None
    drawn = [inputs.layout.names[k] for k in sorted(inputs.drawn)]
    places = map(position, drawn)
    factors = scale if isinstance(scale, Mapping) else dict.fromkeys(drawn, scale)
    for key, factor in factors.items():
        if isinstance(factor, bool) or not isinstance(factor, int | float | np.number) or not 0 < factor < np.inf:
            raise ValueError(f"scale: expected a positive number, got {factor!r} for {key!r}; 10.0 draws wider values.")
        if inputs.layout.index(key) not in inputs.drawn and key not in names:
            raise ValueError(
                f"scale: expected positions of inputs that are drawn from shapes ({', '.join(places) or 'none'}) or "
                f"parameters among {', '.join(names)}, got {key!r}; scale given arrays yourself."
            )
    if not factors:
        raise ValueError(f"scale: expected inputs that are drawn from shapes, got arrays and {scale!r}; scale them.")
    return scale


@dataclass(frozen=True)
class Inputs:
    """The arrays of a call.

    Attributes:
        arrays: in order.
        layout: how they become arguments.
        drawn: positions of those that were drawn from shapes.
    """

    arrays: tuple[np.ndarray, ...]
    layout: Layout
    drawn: frozenset[int]


def draw_inputs(source: InputSource, seed: int, scale: Scale | None = None) -> Inputs:
    """Draw the inputs.

    Args:
        source: one entry an argument, or a dict with entries by name, and by number for positional ones. An entry is a
            shape (drawn normal, float64), an array, or a dict, list, tuple or dataclass of these; numbers, texts and
            None are passed as they are. Or a function of a NumPy generator that returns the arrays, of any dtype.
        seed: non-negative.
        scale: what is drawn from shapes is multiplied by, see `checked_scale`.

    Raises:
        TypeError: if there is one array in place of a tuple, or an entry is none of these.
        ValueError: if there are no inputs.
    """
    rng = _generator(seed, "inputs")
    entries = _called(source, rng) if callable(source) else source
    if not callable(source) and _is_shape(entries) and len(entries) > 0:
        raise TypeError(
            f"inputs[0]: expected a shape such as (8, 64) or a NumPy array, got {entries[0]!r}; inputs is a tuple with "
            "one entry per argument, for one argument ((8, 64),)."
        )
    if isinstance(entries, str) or hasattr(entries, "__array__") or not isinstance(entries, Kinds):
        # An array is a sequence as well: its rows would be taken for arguments. So are the sizes of a shape.
        raise TypeError(
            f"inputs: expected a tuple with one entry per argument{' from the function' * callable(source)}, got "
            f"{outlined(entries)}; for one argument {'return' if callable(source) else 'pass'} (array,)."
        )
    shapes: list[str] = []

    def leaf(entry: Any, name: str) -> np.ndarray | None:
        if isinstance(entry, np.ndarray | np.generic):
            array = np.asarray(entry)
            if not is_inexact(array) and array.dtype.kind not in "iub":
                raise TypeError(f"inputs[{position(name)}]: expected numbers or booleans, got {array.dtype}.")
            return array
        if callable(source) or not _is_shape(entry):
            return None
        shapes.append(name)
        return X_SCALE * rng.standard_normal(_sizes(tuple(entry), name))

    layout, arrays = taken_apart(entries, leaf)
    drawn = {layout.names.index(name) for name in shapes}
    if not arrays:
        raise ValueError(
            "inputs: expected at least one, got none (a shape is a tuple of integers, an array is NumPy's); nothing "
            "would be compared."
        )
    by_key = scale if isinstance(scale, Mapping) else {layout.names[k]: scale or 1.0 for k in drawn}
    factors = {layout.index(key): factor for key, factor in by_key.items()}
    scaled = (factors.get(k, 1.0) * array if k in drawn else array for k, array in enumerate(arrays))
    return Inputs(tuple(scaled), layout, frozenset(drawn))


def stored_apart(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round drawn numbers to a storage dtype so that those near each other stay different.

    Of equal numbers each library takes its own as the maximum, and shares the gradient out in its own way.
    """
    stored = as_stored(array, dtype)
    if dtype.itemsize != 2 or not is_float(array):
        return stored
    most = round(4 / roundoff(stored))  # numbers of one slice: more would not find room around their own magnitude
    sizes = np.cumprod(stored.shape[::-1])
    length = int(max(sizes[sizes <= most], default=most))
    flat, codes = array.ravel(), np.abs(stored).ravel().view(np.uint16)
    for start in range(0, flat.size, length):
        for negative in (False, True):
            where = start + np.flatnonzero(np.signbit(flat[start : start + length]) == negative)
            where = where[np.argsort(np.abs(flat[where]), kind="stable")]
            steps = np.arange(where.size)  # wider than the codes
            codes[where] = np.maximum.accumulate(codes[where] - steps) + steps
    return np.copysign(codes.view(dtype).reshape(stored.shape), stored)


def _called(source: Callable[[np.random.Generator], Arguments], rng: np.random.Generator) -> Arguments:
    try:
        return source(rng)
    except Exception as error:  # a user's function may raise anything
        raise ValueError(
            "inputs: expected a function of a NumPy generator that returns the arrays, got one that raised "
            f"{located(error)}."
        ) from error


def _sizes(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    if any(size < 0 for size in shape):
        raise ValueError(f"inputs[{position(name)}]: expected sizes of at least 0, got {shape}.")
    return shape


def _is_shape(entry: object) -> bool:
    if not isinstance(entry, tuple | list) or hasattr(entry, "_fields"):
        return False
    return all(isinstance(size, int | np.integer) and not isinstance(size, bool) for size in entry)


def draw_cotangents(outputs: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Draw a normal cotangent, in float64 or complex128, for every real or complex output."""
    return {
        name: COTANGENT_SCALE * _normal_like(value, _generator(seed, f"cotangent {name}"))
        for name, value in outputs.items()
        if is_inexact(value)
    }
