"""Name the storage dtypes and precisions, give the constants of their arithmetic, and cast between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format."""

    name: str  # canonical name, for example `"bfloat16"`
    roundoff: float  # unit roundoff `u`, half the spacing at 1 (round to nearest)
    smallest_normal: float  # smallest positive normal number
    smallest_subnormal: float  # smallest positive number
    largest_integer: int  # every integer up to this magnitude is exact


def _format(name: str, significand_bits: int, min_exponent: int) -> FloatFormat:
    return FloatFormat(
        name=name,
        roundoff=2.0**-significand_bits,
        smallest_normal=2.0**min_exponent,
        # 2**-1074 is still a positive Python float, so this is exact for every format here.
        smallest_subnormal=2.0 ** (min_exponent - significand_bits + 1),
        largest_integer=2**significand_bits,
    )


FORMATS: dict[str, FloatFormat] = {
    "float64": _format("float64", 53, -1022),
    "float32": _format("float32", 24, -126),
    "tf32": _format("tf32", 11, -126),
    "float16": _format("float16", 11, -14),
    "bfloat16": _format("bfloat16", 8, -126),
}

STORAGE_DTYPES: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")

_NUMPY = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def numpy_dtype(name: str) -> np.dtype:
    """Return the NumPy dtype of a storage dtype (bfloat16 through ml_dtypes).

    Raises:
        ValueError: if `name` is not a storage dtype.
    """
    if name not in _NUMPY:
        raise ValueError(f"dtype: expected one of {', '.join(_NUMPY)}, got {name!r}; choose one of these.")
    return _NUMPY[name]


# Changes of arrays from one format to another. Each keeps every value or raises (`widened`, `exactly`), or it is the
# rounding to the storage dtype that is meant (`as_stored`). There is no third kind in the judge: a cast that drops an
# imaginary part, high bits of an integer or digits of a number makes two different arrays equal.
_REAL_PART = {"complex64": "float32", "complex128": "float64"}


def is_float(array: np.ndarray) -> bool:
    """Tell whether an array is of floating point; bfloat16, which NumPy itself calls void, counts."""
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def is_complex(array: np.ndarray) -> bool:
    """Tell whether an array holds complex numbers."""
    return array.dtype.kind == "c"


def is_inexact(array: np.ndarray) -> bool:
    """Tell whether an array holds numbers that are rounded and have gradients, real or complex."""
    return is_float(array) or is_complex(array)


def format_name(dtype: object) -> str:
    """Return the name of a floating-point dtype, or of a complex dtype's parts."""
    return _REAL_PART.get(str(dtype), str(dtype))


def roundoff(array: np.ndarray) -> float:
    """Return the unit roundoff of an array's format; 0 for integers and booleans."""
    return FORMATS[format_name(array.dtype)].roundoff if is_inexact(array) else 0.0


def storage_format(arrays: Sequence[np.ndarray]) -> np.dtype:
    """Return the coarsest real format among arrays, or among the parts of complex ones; float64 if all are integers."""
    coarsest = max(arrays, key=roundoff)
    return numpy_dtype(format_name(coarsest.dtype)) if is_inexact(coarsest) else np.dtype(np.float64)


def as_stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round real and complex numbers to the storage dtype; leaves integers and booleans.

    There are no complex numbers of 16-bit parts: they stay `complex64`, as they do in models that are stored so.
    """
    if is_complex(array):
        return array.astype(np.complex128 if dtype == np.float64 else np.complex64)
    with np.errstate(over="ignore"):  # to infinity, which the judge notes
        return array.astype(dtype) if is_float(array) else array


def exactly(array: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """Return the array in another format, which must hold every value of it.

    Raises:
        ValueError: if a value would change.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        # Of a complex number a real format can hold the real part at most.
        cast = (np.real(array) if dtype.kind != "c" else array).astype(dtype)
        back = (np.real(cast) if not is_complex(array) else cast).astype(array.dtype)
    if not np.array_equal(back, array, equal_nan=is_inexact(array)):
        raise ValueError(f"{what}: expected values that {dtype} holds, got others in {array.dtype}; round them.")
    return cast


def widened(array: np.ndarray) -> np.ndarray:
    """Return the same numbers in float64, or in complex128; integers and booleans as they are."""
    if not is_inexact(array):
        return array
    return exactly(array, np.dtype(np.complex128 if is_complex(array) else np.float64), "array")


def parts(array: np.ndarray) -> np.ndarray:
    """Return real numbers in float64, complex ones as pairs of real and imaginary part on a last axis."""
    wide = widened(array)
    return np.stack([np.real(wide), np.imag(wide)], axis=-1) if is_complex(array) else wide


def from_parts(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Invert `parts`."""
    if not is_complex(like):
        return values
    result = np.empty(values.shape[:-1], np.complex128)
    result.real, result.imag = values[..., 0], values[..., 1]  # not a + 1j b: that makes a NaN of an infinite part
    return result


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return |first - second| of integers or booleans of any width, in float64: 0 only where they are equal."""
    # As Python's integers, which have no size.
    difference = np.abs(first.astype(object) - second.astype(object)).astype(np.float64)
    return np.where(first == second, 0.0, difference)


def looks_rounded(array: np.ndarray, name: str) -> np.ndarray:
    """Tell which numbers use the lower half of a format's significand, as a rounded one nearly always does.

    A number such as 0.5, 3 or 1024 leaves the lower half at zero and was written exactly.
    """
    bits = -int(np.log2(FORMATS[name].roundoff))
    significand, _ = np.frexp(np.where(np.isfinite(array), array, 0.0))
    scaled = significand * 2.0 ** (bits // 2)
    return np.trunc(scaled) != scaled


def differ_beyond(first: np.ndarray, second: np.ndarray, roundoff: float) -> bool:
    """Tell whether two results differ by more than a rounding of their largest number."""
    if first.shape != second.shape or first.tobytes() == second.tobytes():
        return first.shape != second.shape
    if not is_inexact(first) or not roundoff:
        return True
    finite = np.isfinite(first)
    if not np.array_equal(first[~finite], second[~finite], equal_nan=True) or not np.isfinite(second[finite]).all():
        return True
    return bool((np.abs(first - second)[finite] > roundoff * np.abs(first[finite]).max(initial=0.0)).any())


# --- precisions: the one vocabulary of all commands; rows and records hold the long spellings ---

# Name to the precision class of rows and records, and to the storage dtype.
PRECISIONS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "fp32": ("ieee_fp32", "float32"),
        "tf32": ("tf32", "float32"),
        "bf16": ("bf16", "bfloat16"),
        "fp16": ("fp16", "float16"),
        "fp64": ("fp64", "float64"),
    }
)


def short_name(name: str) -> str:
    """Return the name of the precision that a spelling means, such as `fp32` for `float32`; other text as it is."""
    return next((short for short, spellings in PRECISIONS.items() if name in spellings), name)


def precision_class(name: str) -> str:
    """Return the precision class that a spelling means, such as `ieee_fp32` for `fp32`; other text as it is."""
    return PRECISIONS.get(short_name(name), (name,))[0]


def storage_dtype(name: str) -> str:
    """Return the storage dtype of a spelling, such as `bfloat16` for `bf16`; other text and `tf32` as they are."""
    return name if name == "tf32" else PRECISIONS.get(short_name(name), (name,))[-1]
