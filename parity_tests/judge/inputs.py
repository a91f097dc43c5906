"""Describe and draw what a subject is judged with: cases, which are shapes, and seeded numbers."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np

from parity_tests.judge.dtypes import numpy_dtype

# The tensors whose last axis holds the features of inputs, and those whose only axis holds the weights.
_OF_INPUTS, _OF_WEIGHTS = ("x", "dx"), ("weight", "dweight")


@dataclass(frozen=True)
class Sizes:
    """The sizes of n partitions: where each lies in flat inputs and outputs and in packed parameters.

    Written from the description of the packed form and not taken from the trees, since it judges them: inputs and
    outputs hold partition after partition, as the bias does. The weight holds the partitions of one size beside each
    other, those of the first partition's size first, each W_k (in_k, out_k) row by row.
    """

    in_features: tuple[int, ...]  # of each partition
    out_features: tuple[int, ...]  # of each partition

    @cached_property
    def buckets(self) -> dict[tuple[int, int], list[int]]:
        """Return (in, out) to the partitions of this size, in the order of the packed weight."""
        found: dict[tuple[int, int], list[int]] = {}
        for k, size in enumerate(zip(self.in_features, self.out_features, strict=True)):
            found.setdefault(size, []).append(k)
        return found

    @cached_property
    def _weights(self) -> list[slice]:
        order = [k for members in self.buckets.values() for k in members]
        places = _one_after_another([self.in_features[k] * self.out_features[k] for k in order])
        return [place for _, place in sorted(zip(order, places, strict=True), key=lambda pair: pair[0])]

    @cached_property
    def _inputs(self) -> list[slice]:
        return _one_after_another(self.in_features)

    @cached_property
    def _outputs(self) -> list[slice]:
        return _one_after_another(self.out_features)

    def places(self, tensor: str) -> list[slice]:
        """Return where each partition lies along the last axis of a tensor."""
        return self._inputs if tensor in _OF_INPUTS else self._weights if tensor in _OF_WEIGHTS else self._outputs

    def labels(self, tensor: str) -> np.ndarray:
        """Return the partition of each place along the last axis of a tensor."""
        places = self.places(tensor)
        found = np.empty(max(place.stop for place in places), np.int64)
        for k, place in enumerate(places):
            found[place] = k
        return found


def _one_after_another(lengths: tuple[int, ...] | list[int]) -> list[slice]:
    stops = np.cumsum(lengths).tolist()
    return [slice(stop - length, stop) for length, stop in zip(lengths, stops, strict=True)]


Layout = Literal["contiguous", "strided", "transposed"]


@dataclass(frozen=True)
class Case:
    """One shape of `y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o]`."""

    name: str  # short and unique; appears in test ids and records
    leading: tuple[int, ...]  # leading dimensions of x; `()` for none, a 0 for an empty batch
    num_partitions: int  # `n`
    in_features: int | tuple[int, ...]  # `i`, per partition; one number for each partition where the sizes are unequal
    out_features: int | tuple[int, ...]  # `o`, likewise
    bias: bool = True  # True if there is a `b`
    # Of x in memory: `contiguous`; `strided` (every second row of a larger buffer whose other rows are NaN);
    # `transposed` (features before partitions, as in the time-series layout `[B, L, C]`)
    layout: Layout = "contiguous"

    @property
    def sizes(self) -> Sizes | None:
        """The sizes of each partition where they are given as sequences, else None."""
        if isinstance(self.in_features, int) and isinstance(self.out_features, int):
            return None
        return Sizes(*self.sizes_of_each)

    @property
    def sizes_of_each(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of inputs and outputs, one number for each partition."""
        each = [
            (size,) * self.num_partitions if isinstance(size, int) else size
            for size in (self.in_features, self.out_features)
        ]
        return each[0], each[1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of x, weight, bias and cotangent."""
        inputs, outputs = self.sizes_of_each
        if self.sizes is not None:
            weights = sum(i * o for i, o in zip(inputs, outputs, strict=True))
            x, weight, bias = (sum(inputs),), (weights,), (sum(outputs),)
        else:
            n = self.num_partitions
            x, weight, bias = (n, inputs[0]), (n, inputs[0], outputs[0]), (n, outputs[0])
        return {"x": (*self.leading, *x), "weight": weight, "bias": bias, "cotangent": (*self.leading, *bias)}

    @property
    def largest(self) -> tuple[int, int]:
        """The most inputs and the most outputs of a partition."""
        inputs, outputs = self.sizes_of_each
        return max(inputs), max(outputs)

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

UNEQUAL_SMOKE: tuple[Case, ...] = (
    # Buckets interleave: no partition of a size lies beside another of it, in inputs and outputs.
    Case("unequal-interleaved", (2, 3), 7, (4, 9, 4, 1, 9, 4, 1), (3, 5, 3, 7, 5, 3, 7)),
)

UNEQUAL_DEFAULT: tuple[Case, ...] = (
    *UNEQUAL_SMOKE,
    Case("unequal-from-one", (6,), 4, 1, (3, 8, 1, 5)),
    Case("unequal-to-one", (6,), 4, (3, 8, 1, 5), 1),
    Case("unequal-one-bucket", (5,), 3, (8, 8, 8), (16, 16, 16)),
    Case("unequal-many-buckets", (4,), 8, (1, 2, 3, 5, 8, 13, 21, 253), (4, 1, 17, 2, 2, 16, 1, 9), bias=False),
)

UNEQUAL_FULL: tuple[Case, ...] = (
    *UNEQUAL_DEFAULT,
    Case("unequal-no-leading", (), 3, (5, 2, 5), (2, 7, 2)),
    Case("unequal-strided", (6,), 3, (4, 16, 4), (8, 1, 8), layout="strided"),
    Case("unequal-cardinalities", (64,), 9, 160, (1, 9, 16, 7, 15, 6, 5, 2, 42)),
    Case("unequal-segments", (32,), 3, (128, 64, 32), (128, 64, 32)),
    Case("unequal-rows", (4096,), 3, (3, 8, 3), (8, 2, 8)),
)

CASE_SETS: dict[str, tuple[Case, ...]] = {
    "smoke": SMOKE + UNEQUAL_SMOKE,
    "default": DEFAULT + UNEQUAL_DEFAULT,
    "full": FULL + UNEQUAL_FULL,
}


# All different, so that no two factors can be exchanged unnoticed; none a power of two, so that none is exact by luck.
X_SCALE, WEIGHT_SCALE, BIAS_SCALE, COTANGENT_SCALE = 1.3, 0.7, 0.45, 1.9


@dataclass(frozen=True)
class Inputs:
    """Arrays in the storage dtype."""

    x: np.ndarray  # `(..., n, i)`; `(..., sum of i)` where the sizes are unequal
    weight: np.ndarray  # `(n, i, o)`; packed in one axis where the sizes are unequal, see `Sizes`
    bias: np.ndarray | None  # `(n, o)`, or `(sum of o,)`, or None
    cotangent: np.ndarray  # `(..., n, o)` or `(..., sum of o)`: the random `dy` of the vector-Jacobian product
    dtype: str  # canonical name of the storage dtype
    layout: Layout = "contiguous"  # in which a subject must lay out x in memory; the values are the same
    zero_mean: bool = True  # True if the harness drew every array from zero-mean distributions (tier T3 needs it)
    sizes: Sizes | None = None  # of each partition where they are unequal; None where all have one size

    @property
    def num_partitions(self) -> int:
        """The number n of partitions."""
        return len(self.weight) if self.sizes is None else len(self.sizes.in_features)

    @property
    def leading(self) -> tuple[int, ...]:
        """The leading dimensions of x."""
        return self.x.shape[: -2 if self.sizes is None else -1]

    @property
    def case(self) -> Case:
        """A nameless case of the same shapes."""
        if self.sizes is None:
            _, i, o = self.weight.shape
        else:
            i, o = self.sizes.in_features, self.sizes.out_features
        return Case("shape", self.leading, self.num_partitions, i, o, self.bias is not None, self.layout)

    def place(self, tensor: str, partition: int) -> tuple[Any, ...]:
        """Return the index of one partition in an operand or in a result."""
        if self.sizes is not None:
            return (..., self.sizes.places(tensor)[partition])
        return (partition,) if tensor.removeprefix("d") in ("weight", "bias") else (..., partition, slice(None))

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """The weight and, if there is one, the bias, by their canonical names."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def changed(self, change: Callable[[np.ndarray, int], np.ndarray], **fields: Any) -> Self:
        """Return inputs with each array changed; `change` gets an array and the axis of its partitions.

        That of unequal ones is the last one, where each of them takes as many places as it has features or weights.
        """
        return dataclasses.replace(
            self,
            x=change(self.x, len(self.leading)),
            weight=change(self.weight, 0),
            bias=None if self.bias is None else change(self.bias, 0),
            cotangent=change(self.cotangent, len(self.leading)),
            **fields,
        )

    def partitions(self, chosen: np.ndarray | range) -> Self:
        """Return the inputs of some partitions of equal sizes, in the given order."""
        return self.changed(lambda array, axis: np.take(array, np.asarray(chosen), axis))

    def alone(self, partition: int) -> "Inputs":
        """Return one partition of unequal ones as inputs of n = 1."""
        assert self.sizes is not None  # equal ones are taken together
        i, o = self.sizes.in_features[partition], self.sizes.out_features[partition]
        x, weight, dy = (
            array[self.place(name, partition)]
            for name, array in (("x", self.x), ("weight", self.weight), ("cotangent", self.cotangent))
        )
        return dataclasses.replace(
            self,
            x=x[..., None, :],
            weight=weight.reshape(1, i, o),
            bias=None if self.bias is None else self.bias[self.place("bias", partition)][None],
            cotangent=dy[..., None, :],
            sizes=None,
        )


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
    sizes, shapes = case.sizes, case.shapes
    if sizes is None:
        terms: Any = case.in_features
    else:
        terms = np.asarray(sizes.in_features)[sizes.labels("weight")]

    def normal(shape: tuple[int, ...], scale: Any) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(target)

    return Inputs(
        x=normal(shapes["x"], X_SCALE),
        weight=normal(shapes["weight"], WEIGHT_SCALE / np.sqrt(terms)),
        bias=normal(shapes["bias"], BIAS_SCALE) if case.bias else None,
        cotangent=normal(shapes["cotangent"], COTANGENT_SCALE),
        dtype=dtype,
        layout=case.layout,
        sizes=sizes,
    )


def draw_lattice(case: Case, dtype: str, seed: int = 0, limit: int = 3) -> Inputs:
    """Draw integers in `[-limit, limit]`: every product and sum is an integer.

    While the sums stay at or below the format's largest exact integer, every correct implementation, whatever its order
    of summation, returns the same bits as the oracle.
    """
    rng = _generator(case, seed + 1_000_003)
    target, shapes = numpy_dtype(dtype), case.shapes

    def integers(shape: tuple[int, ...]) -> np.ndarray:
        return rng.integers(-limit, limit + 1, shape).astype(target)

    return Inputs(
        x=integers(shapes["x"]),
        weight=integers(shapes["weight"]),
        bias=integers(shapes["bias"]) if case.bias else None,
        cotangent=integers(shapes["cotangent"]),
        dtype=dtype,
        layout=case.layout,
        sizes=case.sizes,
    )
