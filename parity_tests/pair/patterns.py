"""Axis patterns between two layouts of an array, `"(h d) i -> i h d"`, and name patterns of what is left out."""

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import einops
import numpy as np

_GRADIENT = "d_"
_FLIP = re.compile(r"\bflip\(\s*(\w+)\s*\)")


class MappingError(ValueError):
    """Refuse a parameter mapping that is no bijection between the sides, or does not fit their shapes and types."""


def _groups(side: str, pattern: str) -> list[tuple[str, ...]]:
    tokens = re.findall(r"\([^()]*\)|[^\s()]+", side)
    if "".join(tokens).replace(" ", "") != re.sub(r"\s", "", side) or "..." in side or "…" in side:
        raise MappingError(
            f"pattern: expected axes and groups such as '(h d) i -> i h d', got {pattern!r}; write every axis out."
        )
    return [tuple(token.strip("()").split()) for token in tokens]


def _solve(groups: Sequence[tuple[str, ...]], shape: Sequence[int], known: dict[str, int]) -> bool:
    """Fill in the lengths that one side decides, unchecked; return whether something new was learnt."""
    learnt = False
    for group, size in zip(groups, shape, strict=True):
        unknown = [axis for axis in group if axis not in known and not axis.isdigit()]
        if len(unknown) == 1:
            rest = int(np.prod([int(axis) if axis.isdigit() else known[axis] for axis in group if axis != unknown[0]]))
            if rest == 0 or size % rest:
                raise MappingError(f"axis group ({' '.join(group)}): expected a multiple of {rest}, got {size}.")
            known[unknown[0]] = size // rest
            learnt = True
    return learnt


def _lengths_of(groups: Sequence[tuple[str, ...]], known: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(np.prod([int(a) if a.isdigit() else known[a] for a in group], dtype=int)) for group in groups)


class AxisPattern:
    """Permute, group, split and reverse the axes of one shape into another, and back.

    Lengths are solved from both shapes.

    Args:
        pattern: einops style, `"o i -> i o"`; `flip(h)` reverses the axis h, on either side; empty for the same shape.
        source: shape on the left.
        target: shape on the right.
        lengths: of axes that the shapes do not decide.

    Raises:
        MappingError: if the pattern cannot be read, or does not take `source` to `target`.
    """

    def __init__(
        self, pattern: str, source: tuple[int, ...], target: tuple[int, ...], lengths: Mapping[str, int] | None = None
    ) -> None:
        self.pattern = pattern.strip()
        self._lengths: dict[str, int] = {}
        self._flipped: tuple[int, ...] = ()
        if not self.pattern:
            if source != target:
                raise MappingError(
                    f"expected equal shapes without an axis pattern, got {source} and {target}; "
                    "add one such as 'o i -> i o'."
                )
            return
        # Twice reversed, on the left and on the right, is not reversed.
        reversals = Counter(_FLIP.findall(self.pattern))
        halves = _FLIP.sub(r"\1", self.pattern).split("->")
        if len(halves) != 2:
            raise MappingError(f"pattern: expected one '->', got {pattern!r}; write for example 'o i -> i o'.")
        left, right = (_groups(half, pattern) for half in halves)
        for groups, shape in ((left, source), (right, target)):
            if len(groups) != len(shape):
                raise MappingError(
                    f"pattern {pattern!r}: expected {len(groups)} axes in '{_text(groups)}', got shape {shape}."
                )
        known = dict(lengths or {})
        axes = {axis for group in (*left, *right) for axis in group if not axis.isdigit()}
        for axis, length in known.items():
            if axis not in axes or isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 1:
                raise MappingError(
                    f"pattern {pattern!r}: expected positive integers for axes in it, got {length!r} for {axis!r}."
                )
        while _solve(left, source, known) or _solve(right, target, known):
            pass
        if missing := sorted(axes - set(known)):
            raise MappingError(
                f"pattern {pattern!r}: expected lengths that the shapes {source} and {target} decide, got none for "
                f"{', '.join(missing)}; give them as a fourth entry such as {{{missing[0]!r}: 4}}."
            )
        for groups, shape in ((left, source), (right, target)):
            if _lengths_of(groups, known) != tuple(shape):
                raise MappingError(
                    f"pattern {pattern!r}: expected shape {_lengths_of(groups, known)} for '{_text(groups)}', "
                    f"got {shape}."
                )
        self._lengths = {axis: known[axis] for axis in axes}
        # By way of a layout in which every axis stands by itself.
        names = [axis for group in left for axis in group if not axis.isdigit()]
        self._flipped = tuple(k for k, axis in enumerate(names) if reversals[axis] % 2)
        self._left, self._right, self._apart = halves[0].strip(), halves[1].strip(), " ".join(names)
        try:
            einops.rearrange(np.empty(source, np.int8), f"{self._left} -> {self._right}", **self._lengths)
        except einops.EinopsError as error:
            sentence = str(error).strip().splitlines()[-1].strip()
            raise MappingError(
                f"pattern {pattern!r}: expected a permutation of axes, got one where {sentence}"
            ) from None

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Rearrange the left layout to the right one; of an array without axes also a NumPy scalar."""
        return self._rearranged(array, self._left, self._right) if self.pattern else array

    def backward(self, array: np.ndarray) -> np.ndarray:
        """Rearrange the right layout to the left one."""
        return self._rearranged(array, self._right, self._left) if self.pattern else array

    def _rearranged(self, array: np.ndarray, source: str, target: str) -> np.ndarray:
        array = np.asarray(array)
        if self._flipped:
            array = np.flip(einops.rearrange(array, f"{source} -> {self._apart}", **self._lengths), self._flipped)
            source = self._apart
        return np.array(einops.rearrange(array, f"{source} -> {target}", **self._lengths))


def right_shape(pattern: str, source: tuple[int, ...], lengths: Mapping[str, int] | None = None) -> tuple[int, ...]:
    """Return the shape on the right of a pattern, where the left one decides it; see `AxisPattern`.

    Raises:
        MappingError: if it does not, or the pattern does not fit.
    """
    if not pattern.strip():
        return source
    halves = _FLIP.sub(r"\1", pattern).split("->")
    left, right = (_groups(half, pattern) for half in (halves[0], halves[-1]))
    known = dict(lengths or {})
    while len(left) == len(source) and _solve(left, source, known):
        pass
    if missing := sorted({axis for group in right for axis in group if not axis.isdigit()} - set(known)):
        raise MappingError(
            f"pattern {pattern!r}: expected lengths that the shape {source} decides, got none for "
            f"{', '.join(missing)}; give them as a fourth entry such as {{{missing[0]!r}: 4}}, or pass like=."
        )
    return _lengths_of(right, known)


def _text(groups: Sequence[tuple[str, ...]]) -> str:
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)


class LeftOut:
    """Hold what `not_compared=` names: unmapped arrays of either side, and gradients (`d_<torch name>`).

    Args:
        patterns: names, in which `*` and `?` stand for any characters.

    Raises:
        TypeError: for anything but a sequence of strings.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        known = isinstance(patterns, Iterable) and not isinstance(patterns, str)
        if not known or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(
                f"not_compared: expected a tuple of names or patterns, got {patterns!r}; for one pass ('running_*',)."
            )
        self._patterns = tuple(patterns)

    def covers(self, name: str) -> bool:
        """Return whether a pattern matches; a gradient only by a pattern that itself begins with `d_`."""
        return any(_matches(name, pattern) for pattern in self._patterns)

    def check(self, unmapped: Sequence[str], gradients: Sequence[str]) -> None:
        """Refuse a pattern that names nothing.

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
