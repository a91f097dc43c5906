"""What a call leaves behind: buffers (running statistics, caches, counters) as they are after it.

A side returns every buffer, changed or not, beside its outputs as `state:<name>`. Compared is what the call updates
on either side, in the torch side's names. Two modules with equal outputs and gradients may still part after one
training step: torch's BatchNorm keeps a variance divided by n - 1, Flax's one divided by n.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from parity_tests.judge.casts import is_inexact, widened
from parity_tests.pair.side import Arrays

PREFIX = "state:"
Array = TypeVar("Array")  # NumPy's, or of a framework


def named_state(buffers: Mapping[str, Array]) -> dict[str, Array]:
    """Buffers under the names that a side returns them by."""
    return {f"{PREFIX}{name}": value for name, value in buffers.items()}


def is_output(name: str) -> bool:
    """Whether a side's result is an output, and neither a gradient nor state."""
    return not name.startswith(("d_", PREFIX))


def state_of(arrays: Arrays) -> dict[str, np.ndarray]:
    """The buffers among a side's results, by their own names."""
    return {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}


def updated(arrays: Arrays, before: Arrays) -> frozenset[str]:
    """Names of the buffers that a call has changed.

    Args:
        arrays: a side's results, in a format that holds the stored numbers exactly.
        before: the arrays it was given.
    """

    def same(name: str, after: np.ndarray) -> bool:
        # A NaN that stayed one is not changed; integers and booleans have none.
        return np.array_equal(widened(after), widened(before[name]), equal_nan=is_inexact(after))

    return frozenset(name for name, after in state_of(arrays).items() if not same(name, after))
