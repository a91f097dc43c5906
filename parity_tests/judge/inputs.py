"""Seeded inputs: the numbers that a case is judged with."""

import math
import zlib
from dataclasses import dataclass

import numpy as np

from parity_tests.judge.cases import Case, Layout
from parity_tests.judge.dtypes import numpy_dtype

# All different, so that no two factors can be exchanged unnoticed; none a power of two, so that none is exact by luck.
X_SCALE, WEIGHT_SCALE, BIAS_SCALE, COTANGENT_SCALE = 1.3, 0.7, 0.45, 1.9


@dataclass(frozen=True)
class Inputs:
    """Arrays in the storage dtype.

    Attributes:
        x: `(..., n, i)`.
        weight: `(n, i, o)`.
        bias: `(n, o)` or None.
        cotangent: `(..., n, o)`: the random `dy` of the vector-Jacobian product.
        dtype: canonical name of the storage dtype.
        layout: how a subject must lay x out in memory; the values are the same.
        zero_mean: True if the harness drew every array from zero-mean distributions (tier T3 needs it).
    """

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    cotangent: np.ndarray
    dtype: str
    layout: Layout = "contiguous"
    zero_mean: bool = True


def _generator(case: Case, seed: int) -> np.random.Generator:
    # crc32 and not hash(): the same numbers in every process and on every machine.
    return np.random.default_rng([seed, zlib.crc32(case.name.encode())])


def draw_inputs(case: Case, dtype: str, seed: int = 0) -> Inputs:
    """Draws zero-mean normal x, W, b and dy of different magnitudes, rounded to the storage dtype.

    The draw is made in float64 and rounded once, so that the same case and seed give the same real numbers, up to that
    rounding, in every dtype. W is scaled by `1 / sqrt(i)` so that y is of order one at any size.

    Args:
        case: the shape.
        dtype: `float64`, `float32`, `bfloat16` or `float16`.
        seed: any non-negative integer.

    Returns:
        The inputs, as NumPy arrays of the storage dtype.
    """
    rng = _generator(case, seed)
    target = numpy_dtype(dtype)
    n, i, o = case.num_partitions, case.in_features, case.out_features

    def normal(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(target)

    return Inputs(
        x=normal((*case.leading, n, i), X_SCALE),
        weight=normal((n, i, o), WEIGHT_SCALE / math.sqrt(i)),
        bias=normal((n, o), BIAS_SCALE) if case.bias else None,
        cotangent=normal((*case.leading, n, o), COTANGENT_SCALE),
        dtype=dtype,
        layout=case.layout,
    )


def draw_lattice(case: Case, dtype: str, seed: int = 0, limit: int = 3) -> Inputs:
    """Draws integers in `[-limit, limit]`: every product and sum is an integer.

    While the sums stay at or below the format's largest exact integer, every correct implementation, whatever its order
    of summation, returns the same bits as the oracle.

    Args:
        case: the shape.
        dtype: a storage dtype.
        seed: any non-negative integer.
        limit: largest magnitude.
    """
    rng = _generator(case, seed + 1_000_003)
    target = numpy_dtype(dtype)
    n, i, o = case.num_partitions, case.in_features, case.out_features

    def integers(shape: tuple[int, ...]) -> np.ndarray:
        return rng.integers(-limit, limit + 1, shape).astype(target)

    return Inputs(
        x=integers((*case.leading, n, i)),
        weight=integers((n, i, o)),
        bias=integers((n, o)) if case.bias else None,
        cotangent=integers((*case.leading, n, o)),
        dtype=dtype,
        layout=case.layout,
    )
