"""Branches of clamps, selections and comparisons that no value took: two functions that part only there look equal.

A side watches one run of its own and reports every operation with branches to `Branches`; what comes out are
sentences for the report, with a way to reach the branch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from parity_tests.judge.dtypes import FORMATS

_MOST_PLACES = 4  # that one sentence lists
# A bound beyond which float32 holds nothing is none.
_LARGEST_BOUND = 2.0**127
_WIDER = 2.0  # how far beyond a bound the values are to reach by the scale that is proposed


@dataclass(frozen=True)
class Branch:
    """One branch of an operation.

    Attributes:
        what: that takes it, as "a value above 20".
        taken: whether anything did.
        bound: where it begins, or None where it is no matter of size.
        above: whether it lies above its bound.
    """

    what: str
    taken: bool
    bound: float | None = None
    above: bool = True


@dataclass
class _Seen:
    operation: str
    place: str
    low: float
    high: float
    branches: dict[str, Branch] = field(default_factory=dict)


def is_bound(value: float | None) -> bool:
    """Return whether a clamp's limit is one that float32 values can reach."""
    return value is not None and abs(value) < _LARGEST_BOUND


def softplus_parts(beta: float, threshold: float) -> float | None:
    """Return where torch's softplus becomes linear, or None where float32 could not tell it from the smooth one."""
    return threshold / beta if math.exp(-threshold) > FORMATS["float32"].roundoff else None


class Branches:
    """Collects over all calls of every operation which of its branches were taken."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._seen: dict[object, _Seen] = {}

    def see(
        self, call: object, operation: str, place: str, branches: Iterable[Branch], low: float, high: float
    ) -> None:
        """Take note of one evaluation.

        Args:
            call: which call of an operation it is; several evaluations of one, as in a loop, are taken together.
            operation: as the report shows it, with its bounds.
            place: module path or line, may be empty.
            branches: all that it has.
            low: the smallest value that it was given; NaN for what has no size.
            high: the largest.
        """
        seen = self._seen.setdefault(call, _Seen(operation, place, low, high))
        seen.low, seen.high = min(seen.low, low), max(seen.high, high)
        for branch in branches:
            known = seen.branches.get(branch.what)
            if known is None or branch.taken:
                seen.branches[branch.what] = branch

    def forget(self, call: object) -> None:
        """Leave out a call that another one reports, as the comparison behind a selection."""
        self._seen.pop(call, None)

    def sentences(self) -> tuple[str, ...]:
        """Return a sentence for every branch that was never taken, equal ones of several places as one."""
        groups: dict[tuple[str, str], list[_Seen]] = {}
        for seen in self._seen.values():
            for branch in seen.branches.values():
                if not branch.taken:
                    groups.setdefault((seen.operation, branch.what), []).append(seen)
        return tuple(_sentence(operation, what, group) for (operation, what), group in groups.items())


def _sentence(operation: str, what: str, group: Sequence[_Seen]) -> str:
    places = list(dict.fromkeys(seen.place for seen in group if seen.place))
    more = f" and {len(places) - _MOST_PLACES} more" * (len(places) > _MOST_PLACES)
    where = f" in {', '.join(places[:_MOST_PLACES])}{more}" if places else ""
    low, high = min(seen.low for seen in group), max(seen.high for seen in group)
    values = "" if math.isnan(low) or math.isnan(high) else f" (its values went from {low:.3g} to {high:.3g})"
    return f"{operation}{where} never met {what}{values}; {_advice(group[0].branches[what], low, high)}"


def _advice(branch: Branch, low: float, high: float) -> str:
    reached = high if branch.above else low
    if branch.bound and math.isfinite(reached) and reached * branch.bound > 0:
        # Beyond a large bound by wider draws, below a small one by narrower ones.
        outwards = (branch.bound > 0) == branch.above
        factor = branch.bound / reached * (_WIDER if outwards else 1 / _WIDER)
        text = f"{float(f'{factor:.2g}'):g}"
        return f"draws {text} times as large may reach it (scale=)"
    return "inputs= or draws= that reach it would show whether the sides agree there"
