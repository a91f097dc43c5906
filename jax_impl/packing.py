"""Partitions of unequal sizes: where each one lies in flat inputs and outputs and in packed parameters; numbers alone.

Inputs (..., in_0 + in_1 + ...) and outputs (..., out_0 + out_1 + ...) hold partition after partition, as does the
packed bias, which has the layout of an output. The packed weight holds every W_k (in_k, out_k) row by row, those of
partitions of one size beside each other, so that each such bucket is a stacked weight (m, in, out) without a copy.
"""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax_impl.array_types import kind_of, shown


@dataclass(frozen=True)
class Bucket:
    """The partitions of one size.

    Attributes:
        in_features: in of each.
        out_features: out of each.
        members: Their numbers, ascending.
        runs: The same as ranges of neighbours, (first, stop) of each.
        start: Where their weights begin in the packed weight: W_k of the j-th member at start + j * in * out.
    """

    in_features: int
    out_features: int
    members: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    start: int

    @property
    def stop(self) -> int:
        """Where their weights end in the packed weight."""
        return self.start + len(self.members) * self.in_features * self.out_features


@dataclass(frozen=True)
class Packing:
    """The sizes of n partitions and what follows from them.

    Attributes:
        in_features: in_k of each partition.
        out_features: out_k of each partition.
        in_offsets: n + 1 offsets: partition k reads x[..., in_offsets[k] : in_offsets[k + 1]].
        out_offsets: n + 1 offsets: it writes y[..., out_offsets[k] : out_offsets[k + 1]], where its bias is too.
        weight_offsets: n offsets: W_k (in_k, out_k) begins there in the packed weight, row by row.
        weight_size: The number of elements of the packed weight.
        buckets: The partitions of each size, by the first of them: the order of the packed weight.
    """

    in_features: tuple[int, ...]
    out_features: tuple[int, ...]
    in_offsets: tuple[int, ...]
    out_offsets: tuple[int, ...]
    weight_offsets: tuple[int, ...]
    weight_size: int
    buckets: tuple[Bucket, ...]

    @property
    def num_partitions(self) -> int:
        """The number n of partitions."""
        return len(self.in_features)

    @property
    def order(self) -> tuple[int, ...]:
        """The partitions in the order of their weights, bucket after bucket."""
        return tuple(k for bucket in self.buckets for k in bucket.members)


def packing_of(in_features: tuple[int, ...], out_features: tuple[int, ...]) -> Packing:
    """Lay out partitions of these sizes."""
    members: dict[tuple[int, int], list[int]] = {}
    for k, size in enumerate(zip(in_features, out_features, strict=True)):
        members.setdefault(size, []).append(k)
    buckets, weight_offsets, start = [], [0] * len(in_features), 0
    for (i, o), found in members.items():
        own = set(found)
        firsts, stops = [k for k in found if k - 1 not in own], [k + 1 for k in found if k + 1 not in own]
        bucket = Bucket(i, o, tuple(found), tuple(zip(firsts, stops, strict=True)), start)
        buckets.append(bucket)
        for j, k in enumerate(found):
            weight_offsets[k] = start + j * i * o
        start = bucket.stop
    return Packing(
        in_features,
        out_features,
        tuple(itertools.accumulate(in_features, initial=0)),
        tuple(itertools.accumulate(out_features, initial=0)),
        tuple(weight_offsets),
        start,
        tuple(buckets),
    )


def has_unequal_sizes(in_features: Any, out_features: Any) -> bool:
    """Whether sizes are given per partition, by one sequence or two: the sizes in them may still be equal."""
    return any(
        isinstance(sizes, Sequence) and not isinstance(sizes, str | bytes) for sizes in (in_features, out_features)
    )


def check_packing(
    num_partitions: int,
    in_features: Any,
    out_features: Any,
    most_elements: int,
    names: tuple[str, str] = ("in_features", "out_features"),
) -> Packing:
    """Return the layout of sizes of which one is a sequence, and the other an int for all or a sequence too.

    Refuse what is no int by a TypeError; another number of sizes, one that is not positive, or too many elements by a
    ValueError. Messages call the two by `names`.
    """
    given = dict(zip(names, (in_features, out_features), strict=True))
    for argument, sizes in given.items():
        # Before an int is repeated as often as that.
        if isinstance(sizes, Sequence) and not isinstance(sizes, str | bytes) and len(sizes) != num_partitions:
            raise ValueError(
                f"`{argument}`: expected one int, or n = {num_partitions} of them, got {len(sizes)}; give each "
                f"partition its size."
            )
    packing = packing_of(*[_each_size(argument, sizes, num_partitions) for argument, sizes in given.items()])
    if packing.weight_size >= most_elements:
        largest = names[max(packing.in_features) < max(packing.out_features)]
        raise ValueError(
            f"`{largest}`: expected sizes whose packed weight has fewer than {most_elements} elements, got "
            f"{shown(packing.weight_size)}; give smaller sizes."
        )
    return packing


def _each_size(argument: str, given: Any, num_partitions: int) -> tuple[int, ...]:
    sequence = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    values: list[Any] = list(given) if sequence else [given]
    sizes = []
    for value in values:
        try:
            size = None if isinstance(value, bool) else operator.index(value)
        except Exception:
            size = None
        if size is None:
            raise TypeError(
                f"`{argument}`: expected a positive int for each partition, got {shown(value)}, "
                f"{kind_of(value)}; pass ints."
            )
        if size <= 0:
            raise ValueError(f"`{argument}`: expected positive sizes, got {shown(value)}; pass at least 1 for each.")
        sizes.append(size)
    return tuple(sizes) if sequence else tuple(sizes) * num_partitions
