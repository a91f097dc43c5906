"""Locate partitions of unequal sizes in flat inputs and outputs and in packed parameters.

Written from the description of the packed form and not taken from the trees, since it judges them: inputs and outputs
hold partition after partition, as the bias does. The weight holds the partitions of one size beside each other, those
of the first partition's size first, each W_k (in_k, out_k) row by row.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

# The tensors whose last axis holds the features of inputs, and those whose only axis holds the weights.
_OF_INPUTS, _OF_WEIGHTS = ("x", "dx"), ("weight", "dweight")


@dataclass(frozen=True)
class Sizes:
    """The sizes of n partitions.

    Attributes:
        in_features: of each partition.
        out_features: of each partition.
    """

    in_features: tuple[int, ...]
    out_features: tuple[int, ...]

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
