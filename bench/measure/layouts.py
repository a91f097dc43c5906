"""How x and dy lie in memory. A layout is a transposition of two axes, and therefore its own inverse."""

from collections.abc import Mapping
from types import MappingProxyType

# Layout to the two axes of (b, n, features) that change places in memory; None where the axes are in order.
#   contiguous       (b, n, i): the partition axis before the features
#   partition_major  (n, b, i): what a batched product takes
#   time_series      (b, i, n): (batch, time, channel), whose contraction axis is strided
AXES: Mapping[str, tuple[int, int] | None] = MappingProxyType(
    {"contiguous": None, "partition_major": (0, 1), "time_series": (1, 2)}
)


def swapped_axes(layout: str) -> tuple[int, int] | None:
    """The axes that change places between memory and mathematics.

    Raises:
        ValueError: for a layout that is none.
    """
    if layout not in AXES:
        raise ValueError(f"layout: expected one of {', '.join(AXES)}, got {layout!r}; choose one of these.")
    return AXES[layout]
