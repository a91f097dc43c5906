"""Arrays that no rule maps: on which of them results depend, and what the user consents to leave uncompared.

A buffer at its initial value (a mean of 0, a variance of 1, a counter at 0) hides a port that ignores it. One that
results depend on is therefore refused until a rule maps or keeps it, or `not_compared=` names it. A table is another
matter, of positions or of a mask, that a call leaves as it is and that the other side computes: its numbers differ from
one another and show in the results, which are compared. It is listed.
"""

import fnmatch
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from parity_tests.judge.casts import as_stored, is_inexact
from parity_tests.pair.draws import draw_like
from parity_tests.pair.mapping import KEEP
from parity_tests.pair.patterns import MappingError
from parity_tests.pair.side import Arrays
from parity_tests.pair.state import PREFIX

if TYPE_CHECKING:
    from parity_tests.pair.legs import Pair, Values

_SIDES = (("torch", "torch"), ("jax", "flax"))
_GRADIENT = "d_"
_ONE_BY_ONE = 16  # arrays that are changed one by one; more of them are changed together where they have one last name
_MOST_NAMES = 12  # that a refusal lists


class LeftOut:
    """What `not_compared=` names: unmapped arrays of either side, and gradients (`d_<torch name>`).

    Args:
        patterns: names, in which `*` and `?` stand for any characters.

    Raises:
        TypeError: for anything but a sequence of strings.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(
                f"not_compared: expected a tuple of names or patterns, got {patterns!r}; for one pass ('running_*',)."
            )
        self._patterns = tuple(patterns)

    def covers(self, name: str) -> bool:
        """Return whether a pattern matches; a gradient only by a pattern that itself begins with `d_`."""
        return any(_matches(name, pattern) for pattern in self._patterns)

    def check(self, unmapped: Sequence[str], gradients: Sequence[str]) -> None:
        """Refuse a pattern that names nothing.

        Args:
            unmapped: arrays of either side that no rule maps.
            gradients: names of gradients.

        Raises:
            MappingError: with the names that there are.
        """
        for pattern in self._patterns:
            if not any(_matches(name, pattern) for name in (*unmapped, *gradients)):
                known = ", ".join(dict.fromkeys(unmapped)) or "none"
                raise MappingError(
                    f"not_compared: expected names or patterns of buffers and frozen parameters that no rule maps "
                    f"({known}), or of gradients such as {next(iter(gradients), 'd_weight')}, got {pattern!r}."
                )


def _matches(name: str, pattern: str) -> bool:
    if name.startswith(_GRADIENT) and not pattern.startswith(_GRADIENT):
        return False
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def depended_on(run: Callable[[Arrays], Arrays], own: Arrays, names: Sequence[str]) -> tuple[str, ...]:
    """Return the arrays of one side on which its results depend, found by changing them.

    What a call makes of an array itself does not count.

    Args:
        run: a call's results when some of the arrays are others.
        own: the arrays as they are.
        names: of the arrays to try; many of them are changed together where they have one last name.
    """
    if not names:
        return ()
    before = run({})

    def matter(group: Sequence[str]) -> bool:
        try:
            after = run({name: _changed(own[name]) for name in group})
        except Exception:  # an index out of range, an assertion of the module: the array was used
            return True
        hidden = {f"{PREFIX}{name}" for name in group}
        return any(not _same(value, after.get(name)) for name, value in before.items() if name not in hidden)

    if not matter(names):
        return ()
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name if len(names) <= _ONE_BY_ONE else name.rpartition(".")[2], []).append(name)
    found = {name for group in groups.values() if matter(group) for name in group}
    return tuple(name for name in names if name in found)


def _changed(value: np.ndarray) -> np.ndarray:
    """Return other values that the array might hold: of its own signs and magnitude, indices inside their range."""
    if value.dtype == np.bool_:
        return ~value
    if not is_inexact(value):
        rolled = np.roll(value.ravel(), 1).reshape(value.shape)
        return rolled if (rolled != value).any() else value + value.dtype.type(1)
    if not np.isfinite(value).all():  # an additive mask
        return np.where(np.isfinite(value), value, value.dtype.type(0))
    return as_stored(draw_like(value, np.random.default_rng(0)), value.dtype)


def _same(first: np.ndarray, second: np.ndarray | None) -> bool:
    return second is not None and np.array_equal(first, second, equal_nan=is_inexact(first))


def refuse_unmapped(pair: "Pair", values: "Values", state: bool) -> None:
    """Refuse a pair with unmapped arrays that results depend on, or that a call updates on both sides.

    Args:
        pair: after a truth of both sides, which says what a call updates.
        values: that it was computed of.
        state: whether updated buffers are compared at all.

    Raises:
        MappingError: with what to do about them.
    """
    covers, unmapped = pair.left_out.covers, pair.mapping.unmapped
    names = {side: [name for name in unmapped[side] if not covers(name)] for side in unmapped}
    found: list[tuple[str, str]] = []
    for key, side in _SIDES:
        parameters, inputs = values.parameters[key], values.inputs[key]
        cotangents = None if values.cotangents is None else values.cotangents[key]

        def run(changed: Arrays, key: str = key, inputs: Any = inputs, cotangents: Any = cotangents) -> Arrays:
            return pair.sides[key].truth({**values.parameters[key], **changed}, inputs, cotangents)

        found += [(side, name) for name in depended_on(run, parameters, names[side])]
    found, pair.tables = _without_tables(pair, found)
    if state:
        # One that a call updates on one side alone is listed; two may be meant as one, a counter on either side.
        sizes = {side: {name: pair.specs[key][name].value.size for name in names[side]} for key, side in _SIDES}
        updated = {side: [name for name in names[side] if name in pair.updated[key]] for key, side in _SIDES}
        for side, other in (("torch", "flax"), ("flax", "torch")):
            there = {sizes[other][name] for name in updated[other]}
            found += [(side, name) for name in updated[side] if sizes[side][name] in there]
    if found:
        raise MappingError(_refusal(tuple(dict.fromkeys(found))))


def _without_tables(pair: "Pair", found: list[tuple[str, str]]) -> tuple[list, tuple]:
    """Split off the tables of one side; with arrays left on both sides, one may be meant as the other."""
    keys = {side: key for key, side in _SIDES}
    if len({side for side, _ in found}) > 1:
        return found, ()
    tables = tuple(
        (side, name)
        for side, name in found
        if name not in pair.updated[keys[side]] and _differ(pair.specs[keys[side]][name].value)
    )
    return [entry for entry in found if entry not in tables], tables


def _refusal(found: Sequence[tuple[str, str]]) -> str:
    names = [f"{side} buffer {name}" for side, name in found]
    shown = ", ".join(names[:_MOST_NAMES]) + f" and {len(names) - _MOST_NAMES} more" * (len(names) > _MOST_NAMES)
    patterns = dict.fromkeys(f"*.{name.rpartition('.')[2]}" if "." in name else name for _, name in found)
    consent = ", ".join(map(repr, patterns)) + "," * (len(patterns) == 1)
    side, name = found[0]
    rule = (name, None, KEEP) if side == "torch" else (None, name, KEEP)
    return (
        "params: expected a rule for every buffer that results depend on, or that a call updates on both sides, got "
        f"none for {shown}; map them (at its initial value a buffer hides a port that ignores it), keep constants by "
        f"rules such as {rule!r}, or consent by not_compared=({consent})."
    )


def _differ(value: np.ndarray) -> bool:
    return bool((value != value.ravel()[0]).any())
