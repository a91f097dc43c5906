"""Axis patterns between two layouts of one array: `"(h d) i -> i h d"`, with the lengths solved from both shapes."""

import re
from collections.abc import Mapping, Sequence

import einops
import numpy as np


class MappingError(ValueError):
    """A parameter mapping that is not a bijection between the two sides, or does not fit their shapes and types."""


def _groups(side: str, pattern: str) -> list[tuple[str, ...]]:
    tokens = re.findall(r"\([^()]*\)|[^\s()]+", side)
    if "".join(tokens).replace(" ", "") != re.sub(r"\s", "", side) or "..." in side or "…" in side:
        raise MappingError(
            f"pattern: expected axes and groups such as '(h d) i -> i h d', got {pattern!r}; write every axis out."
        )
    return [tuple(token.strip("()").split()) for token in tokens]


def _solve(groups: Sequence[tuple[str, ...]], shape: Sequence[int], known: dict[str, int]) -> bool:
    """Fills in the lengths that one side decides; True if something new was learnt. None of it is checked here."""
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
    """A permutation, grouping and splitting of axes that maps one shape to another, and back.

    Args:
        pattern: einops style, `"o i -> i o"`; empty for the same shape.
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
        if not self.pattern:
            if source != target:
                raise MappingError(
                    f"expected equal shapes without an axis pattern, got {source} and {target}; "
                    "add one such as 'o i -> i o'."
                )
            return
        halves = self.pattern.split("->")
        if len(halves) != 2:
            raise MappingError(f"pattern: expected one '->', got {pattern!r}; write for example 'o i -> i o'.")
        left, right = (_groups(half, pattern) for half in halves)
        for groups, shape in ((left, source), (right, target)):
            if len(groups) != len(shape):
                raise MappingError(
                    f"pattern {pattern!r}: expected {len(groups)} axes in '{_text(groups)}', got shape {shape}."
                )
        known = dict(lengths or {})
        while _solve(left, source, known) or _solve(right, target, known):
            pass
        axes = {axis for group in (*left, *right) for axis in group if not axis.isdigit()}
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
        self._reverse = f"{halves[1].strip()} -> {halves[0].strip()}"
        try:
            einops.rearrange(np.empty(source, np.int8), self.pattern, **self._lengths)
        except einops.EinopsError as error:
            sentence = str(error).strip().splitlines()[-1].strip()
            raise MappingError(
                f"pattern {pattern!r}: expected a permutation of axes, got one where {sentence}"
            ) from None

    def forward(self, array: np.ndarray) -> np.ndarray:
        """From the left layout to the right one; of an array without axes also the NumPy scalar that it gives."""
        return np.array(einops.rearrange(np.asarray(array), self.pattern, **self._lengths)) if self.pattern else array

    def backward(self, array: np.ndarray) -> np.ndarray:
        """From the right layout to the left one."""
        return np.array(einops.rearrange(np.asarray(array), self._reverse, **self._lengths)) if self.pattern else array


def _text(groups: Sequence[tuple[str, ...]]) -> str:
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)
