"""Describe and draw what a subject is judged with: cases, which are shapes, and seeded numbers."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from parity_tests.judge.dtypes import numpy_dtype

Layout = Literal["contiguous", "strided", "transposed"]


@dataclass(frozen=True)
class Case:
    """One shape of `y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o]`.

    Attributes:
        name: short and unique; appears in test ids and records.
        leading: leading dimensions of x; `()` for none, a 0 for an empty batch.
        num_partitions: `n`.
        in_features: `i`, per partition.
        out_features: `o`, per partition.
        bias: True if there is a `b`.
        layout: of x in memory: `contiguous`; `strided` (every second row of a larger buffer whose other rows
            are NaN); `transposed` (features before partitions, as in the time-series layout `[B, L, C]`).
    """

    name: str
    leading: tuple[int, ...]
    num_partitions: int
    in_features: int
    out_features: int
    bias: bool = True
    layout: Layout = "contiguous"

    @property
    def rows(self) -> int:
        """The number of rows that one partition sees: the product of the leading dimensions."""
        return math.prod(self.leading)


SMOKE: tuple[Case, ...] = (
    Case("square", (8,), 4, 16, 16),
    Case("odd-sizes", (5,), 3, 7, 11),
    Case("leading-dims", (2, 3), 4, 8, 24),
    Case("no-bias", (6,), 4, 8, 8, bias=False),
)

DEFAULT: tuple[Case, ...] = (
    *SMOKE,
    Case("no-leading", (), 4, 8, 16),
    Case("empty-batch", (0,), 3, 8, 8),
    Case("batch-one", (1,), 5, 16, 8),
    Case("one-partition", (9,), 1, 16, 24),
    Case("one-in", (9,), 4, 1, 8),
    Case("one-out", (9,), 4, 8, 1),
    Case("strided-rows", (6,), 3, 8, 16, layout="strided"),
    Case("strided-sequences", (3, 2), 2, 8, 8, layout="strided"),
    Case("features-first", (6,), 5, 16, 8, layout="transposed"),
    Case("long-contraction", (4,), 2, 729, 16),
    Case("wide-output", (4,), 2, 8, 253),
    Case("many-rows", (512,), 2, 8, 8),
)

FULL: tuple[Case, ...] = (
    *DEFAULT,
    Case("article-base", (128,), 32, 32, 32),
    Case("recurrentgemma-gates", (64, 4), 10, 256, 256),
    Case("electricity", (16,), 321, 336, 96),
    Case("fibinet", (256,), 325, 4, 4),
    Case("mla-absorb", (32,), 128, 128, 512),
    Case("two-thousand-terms", (3,), 2, 2048, 8),
    Case("four-thousand-rows", (4096,), 2, 8, 8),
    Case("four-leading-dims", (2, 1, 3, 2), 3, 8, 8),
    Case("eight-partitions", (4,), 8, 16, 8),
)

CASE_SETS: dict[str, tuple[Case, ...]] = {"smoke": SMOKE, "default": DEFAULT, "full": FULL}


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
        layout: in which a subject must lay out x in memory; the values are the same.
        zero_mean: True if the harness drew every array from zero-mean distributions (tier T3 needs it).
    """

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    cotangent: np.ndarray
    dtype: str
    layout: Layout = "contiguous"
    zero_mean: bool = True

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """The weight and, if there is one, the bias, by their canonical names."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def changed(self, change: Callable[[np.ndarray, int], np.ndarray], **fields: Any) -> Self:
        """Return inputs with each array changed; `change` gets an array and the axis of its partitions."""
        return dataclasses.replace(
            self,
            x=change(self.x, self.x.ndim - 2),
            weight=change(self.weight, 0),
            bias=None if self.bias is None else change(self.bias, 0),
            cotangent=change(self.cotangent, self.cotangent.ndim - 2),
            **fields,
        )

    def partitions(self, chosen: np.ndarray | range) -> Self:
        """Return the inputs of some partitions, in the given order."""
        return self.changed(lambda array, axis: np.take(array, np.asarray(chosen), axis))


def _generator(case: Case, seed: int) -> np.random.Generator:
    # crc32 and not hash(): the same numbers in every process and on every machine.
    return np.random.default_rng([seed, zlib.crc32(case.name.encode())])


def draw_inputs(case: Case, dtype: str, seed: int = 0) -> Inputs:
    """Draw zero-mean normal x, W, b and dy of different magnitudes, rounded to the storage dtype.

    The draw is made in float64 and rounded once, so that the same case and seed give the same real numbers, up to that
    rounding, in every dtype. W is scaled by `1 / sqrt(i)` so that y is of order one at any size.
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
    """Draw integers in `[-limit, limit]`: every product and sum is an integer.

    While the sums stay at or below the format's largest exact integer, every correct implementation, whatever its order
    of summation, returns the same bits as the oracle.
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
