"""The correctness inputs' shapes: what is compared, not yet the numbers."""

import math
from dataclasses import dataclass
from typing import Literal

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
        bias: whether `b` is there.
        layout: how x lies in memory: `contiguous`; `strided` (every second row of a larger buffer whose other rows
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
