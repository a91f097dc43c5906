"""Mistakes with partitions of unequal sizes: offsets, the order of the buckets, the order within a matrix.

Each is given as changed inputs, on which the oracle returns what a subject with the mistake would, or as a tensor that
is right but for where it lies.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from parity_tests.judge.inputs import Inputs, Sizes


def _rolled(name: str, by: int) -> Callable[[Inputs], Inputs | None]:
    def change(inputs: Inputs) -> Inputs | None:
        array = getattr(inputs, name)
        return None if array is None else dataclasses.replace(inputs, **{name: np.roll(array, by, axis=-1)})

    return change


def _sizes(inputs: Inputs) -> Sizes:
    assert inputs.sizes is not None  # the hypotheses of unequal partitions are tried on these alone
    return inputs.sizes


def packed(inputs: Inputs, order: Iterable[tuple[int, int]]) -> np.ndarray:
    """Return the weight with its buckets in another order, each given by its (in, out)."""
    sizes = _sizes(inputs)
    return np.concatenate([inputs.weight[sizes.places("weight")[k]] for size in order for k in sizes.buckets[size]])


def _reversed(inputs: Inputs) -> Inputs:
    return dataclasses.replace(inputs, weight=packed(inputs, reversed(_sizes(inputs).buckets)))


def _by_partition(inputs: Inputs) -> Inputs:
    """Read a weight that holds partition after partition, as inputs and outputs do."""
    return dataclasses.replace(
        inputs, weight=np.concatenate([inputs.weight[place] for place in _sizes(inputs).places("weight")])
    )


def _transposed(inputs: Inputs) -> Inputs:
    sizes, weight = _sizes(inputs), inputs.weight.copy()
    for place, i, o in zip(sizes.places("weight"), sizes.in_features, sizes.out_features, strict=True):
        weight[place] = weight[place].reshape(i, o).T.reshape(-1)
    return dataclasses.replace(inputs, weight=weight)


def _without_bias(inputs: Inputs) -> Inputs | None:
    return None if inputs.bias is None else dataclasses.replace(inputs, bias=np.zeros_like(inputs.bias))


OPERANDS: tuple[tuple[str, Callable[[Inputs], Inputs | None]], ...] = (
    ("partitions read x at offsets that are one too high", _rolled("x", -1)),
    ("partitions read x at offsets that are one too low", _rolled("x", 1)),
    ("the packed weight is read at offsets that are one too high", _rolled("weight", -1)),
    ("the packed weight is read at offsets that are one too low", _rolled("weight", 1)),
    ("the packed bias is read at offsets that are one too high", _rolled("bias", -1)),
    ("the packed bias is read at offsets that are one too low", _rolled("bias", 1)),
    ("the buckets of the packed weight are in reversed order", _reversed),
    ("the packed weight is taken to hold partition after partition", _by_partition),
    ("the kernels are transposed", _transposed),
    ("the bias is missing", _without_bias),
)


def exchanged(array: np.ndarray, places: list[slice], first: list[int], second: list[int]) -> np.ndarray:
    """Return the array with the partitions of two lists in each other's places, which are as long."""
    found = array.copy()
    for one, other in zip(first, second, strict=True):
        found[..., places[one]], found[..., places[other]] = array[..., places[other]], array[..., places[one]]
    return found


def misplaced(name: str, value: np.ndarray, sizes: Sizes) -> Iterator[tuple[str, np.ndarray]]:
    """Yield results that are right but in the wrong place: the sentence, and the value put right."""
    for by, which in ((1, "high"), (-1, "low")):
        yield f"{name} is written at offsets that are one too {which}", np.roll(value, -by, axis=-1)
    places = sizes.places(name)
    for (one, first), (other, second) in itertools.combinations(sizes.buckets.items(), 2):
        lengths = [[places[k].stop - places[k].start for k in members] for members in (first, second)]
        if lengths[0] == lengths[1]:
            said = " and ".join(f"{i}->{o}" for i, o in (one, other))
            yield f"the buckets {said} are swapped in {name}", exchanged(value, places, first, second)
