"""Time in which at least one of several overlapping events was going on."""

from collections.abc import Iterable


def busy_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals, in their own unit: overlapping kernels do not count twice."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
