"""What a call leaves behind: buffers (running statistics, caches, counters) as they are after it.

A side returns every buffer, changed or not, beside its outputs as `state:<name>`. Compared is what the call updates
on either side, in the torch side's names. Two modules with equal outputs and gradients may still part after one
training step: torch's BatchNorm keeps a variance divided by n - 1, Flax's one divided by n.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from parity_tests.judge.casts import is_float, is_inexact, widened
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


def state_cause(row: str, before: Arrays, truths: Mapping[str, Arrays], bounds: Mapping[str, Arrays]) -> str:
    """Says how a buffer that a call updates comes out differently, or nothing.

    With `s' = (1 - m) s + m v` and another m, or v times a factor, on one side: `s'_flax = a s'_torch + b s`, where
    `a + b = 1` if only m differs.

    Args:
        row: the tensor's name in rows.
        before: the arrays that the sides were given, in torch names.
        truths: float64 results, by side.
        bounds: of these, by side.
    """
    name = row.removeprefix(PREFIX)
    old, torch, jax = widened(before[name]), truths["torch"][row], truths["jax"][row]
    for side, after in (("torch", torch), ("flax", jax)):
        if (after == old).all():
            return f"a call updates {name}, but not on the {side} side"
    if old.size < 3 or not is_float(torch):
        return ""
    columns = np.stack([torch.ravel(), old.ravel()], axis=1)
    (a, b), _, rank, _ = np.linalg.lstsq(columns, jax.ravel(), rcond=None)
    # The fit errs where the values do: tight enough to tell a momentum from a factor, not a proof.
    slack = 16 * float(np.max(bounds["torch"][row] + bounds["jax"][row])) + 1e-9 * float(np.abs(jax).max())
    if rank < 2 or not np.abs(columns @ [a, b] - jax.ravel()).max() <= slack:
        return ""
    if abs(a + b - 1) < 1e-6:
        return (
            f"momentum: a call moves {name} {a:.6g} times as far on the flax side (torch's momentum is the weight of "
            "the new value, Flax's that of the old one)"
        )
    return (
        f"the value that a call adds to {name} is {a:.6g} times as large on the flax side, if the momentum is the same "
        "(torch's BatchNorm keeps a variance divided by n - 1, Flax's one divided by n)"
    )
