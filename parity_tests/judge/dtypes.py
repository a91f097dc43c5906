"""Name the storage dtypes, and give the constants of their arithmetic."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format.

    Attributes:
        name: canonical name, for example `"bfloat16"`.
        roundoff: unit roundoff `u`, half the spacing at 1 (round to nearest).
        smallest_normal: smallest positive normal number.
        smallest_subnormal: smallest positive number.
        largest_integer: every integer up to this magnitude is exact.
    """

    name: str
    roundoff: float
    smallest_normal: float
    smallest_subnormal: float
    largest_integer: int


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
