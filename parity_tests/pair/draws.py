"""Seeded parameters, inputs and cotangents for a pair: random, of different magnitudes, never at an initial value."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.harness.inputs import BIAS_SCALE, COTANGENT_SCALE, X_SCALE
from parity_tests.pair.side import ParameterSpec

InputSource = Sequence[Sequence[int] | np.ndarray] | Callable[[np.random.Generator], Sequence[np.ndarray]]
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
_RELATIVE_SPREAD = (
    0.25  # e-fold of a one-signed array (a norm's scale, a variance): keeps the sign, moves every element
)


def _generator(seed: int, name: str) -> np.random.Generator:
    # crc32 and not hash(): the same numbers in every process.
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def draw_like(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws an array of the scale of ``value``, float64.

    A zero array (a bias as initialised) becomes normal with the harness' bias scale, because at zero a lost bias is
    invisible; a positive or negative one keeps its signs; any other becomes normal with its root mean square.
    """
    value = value.astype(np.float64)
    normal = rng.standard_normal(value.shape)
    if not value.any():
        return BIAS_SCALE * normal
    if (value > 0).all() or (value < 0).all():
        return value * np.exp(_RELATIVE_SPREAD * normal)
    return np.sqrt(np.mean(value**2)) * normal


def draw_parameters(
    specs: Mapping[str, ParameterSpec], seed: int, draws: Mapping[str, Draw] | None = None
) -> dict[str, np.ndarray]:
    """Draws every floating-point array of a module in float64; others stay as they are.

    Args:
        specs: arrays by name.
        seed: non-negative.
        draws: for the arrays named here, ``(rng, shape) -> array`` in place of ``draw_like``.

    Raises:
        ValueError: if ``draws`` names an unknown array or returns a wrong shape.
    """
    draws = draws or {}
    if unknown := sorted(set(draws) - set(specs)):
        raise ValueError(f"draws: expected names among {', '.join(specs)}, got {', '.join(unknown)}; choose one.")
    drawn = {}
    for name, spec in specs.items():
        rng = _generator(seed, name)
        if name in draws:
            drawn[name] = np.asarray(draws[name](rng, spec.value.shape), np.float64)
            if drawn[name].shape != spec.value.shape:
                raise ValueError(f"draws[{name!r}]: expected shape {spec.value.shape}, got {drawn[name].shape}.")
        elif is_float(spec.value):
            drawn[name] = draw_like(spec.value, rng)
        else:
            drawn[name] = spec.value
    return drawn


def is_float(array: np.ndarray) -> bool:
    """True for a floating-point array; bfloat16, which NumPy itself calls void, counts."""
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def as_stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds a floating-point array to the storage dtype; leaves integers and booleans."""
    return array.astype(dtype) if is_float(array) else array


def draw_inputs(source: InputSource, seed: int) -> tuple[np.ndarray, ...]:
    """Draws the positional inputs.

    Args:
        source: a sequence whose entries are shapes (drawn normal, float64) or arrays (taken as they are); or a function
            of a NumPy generator that returns arrays of any dtype.
        seed: non-negative.

    Raises:
        TypeError: if there is one array in place of a tuple, or an entry is neither a shape nor an array.
        ValueError: if there are no inputs.
    """
    rng = _generator(seed, "inputs")
    entries = source(rng) if callable(source) else source
    if isinstance(entries, Mapping | str) or hasattr(entries, "__array__") or not isinstance(entries, Iterable):
        # An array is a sequence as well: its rows would be taken for arguments.
        raise TypeError(
            f"inputs: expected a tuple with one entry per argument{' from the function' * callable(source)}, got "
            f"{_outlined(entries)}; for one argument {'return (array,)' if callable(source) else 'pass (array,)'}."
        )
    arrays = []
    for position, entry in enumerate(entries):
        if isinstance(entry, np.ndarray | np.generic):
            arrays.append(np.asarray(entry))
        elif callable(source) or not _is_shape(entry):
            raise TypeError(
                f"inputs[{position}]: expected a shape such as (8, 64) or a NumPy array, got {_outlined(entry)}; "
                "inputs is a tuple with one entry per argument, for one argument ((8, 64),)."
            )
        else:
            arrays.append(X_SCALE * rng.standard_normal(tuple(entry)))
    if not arrays:
        raise ValueError("inputs: expected at least one, got none; nothing would be compared.")
    for position, array in enumerate(arrays):
        if not is_float(array) and array.dtype.kind not in "iub":
            raise TypeError(f"inputs[{position}]: expected floats, integers or booleans, got {array.dtype}.")
    return tuple(arrays)


def _outlined(value: Any) -> str:
    """A value in one line: an array of any framework by its kind, dtype and shape."""
    if hasattr(value, "__array__") and hasattr(value, "shape"):
        return f"{type(value).__name__} of {getattr(value, 'dtype', 'no dtype')} and shape {tuple(value.shape)}"
    return type(value).__name__ if isinstance(value, Mapping) else repr(value)


def _is_shape(entry: object) -> bool:
    return isinstance(entry, tuple | list) and all(isinstance(size, int | np.integer) for size in entry)


def draw_cotangents(outputs: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Draws a normal cotangent, float64, for every floating-point output."""
    return {
        name: COTANGENT_SCALE * _generator(seed, f"cotangent {name}").standard_normal(value.shape)
        for name, value in outputs.items()
        if is_float(value)
    }
