"""From one side's layout to the other's: axis patterns of inputs and outputs, and which outputs correspond."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import einops
import numpy as np

from parity_tests.pair.calls import OUTPUT, Layout, Layouts
from parity_tests.pair.patterns import AxisPattern, MappingError

# A name on both sides, or one on each.
Outputs = Sequence[str | Sequence[str]] | Mapping[str, str]
Shapes = Mapping[str, tuple[int, ...]]


class Correspondence:
    """Hold which output of one side is which of the other, and in which layout.

    Args:
        outputs: names, or pairs `(torch name, flax name)`; None for all, by equal names.
        patterns: by position or name of a torch output, from the torch layout to the flax layout.

    Raises:
        ValueError: for outputs that are no names or pairs of names, each used once.
    """

    def __init__(self, outputs: Outputs | None, patterns: Layouts) -> None:
        self._pairs, self._given = checked_outputs(outputs), patterns
        self._patterns: dict[str, tuple[str, Mapping[str, int]]] = {}
        # By torch name, once a side has returned.
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._axes: dict[str, AxisPattern] = {}

    def chosen(self, key: str) -> tuple[str, ...] | None:
        """Return the names that are wanted of a side, or None for all."""
        return None if self._pairs is None else tuple(pair[key == "jax"] for pair in self._pairs)

    def read(self, shapes: Shapes) -> None:
        """Read the patterns for outputs of these shapes.

        Raises:
            MappingError: for a pattern of an output that is not there: it would be applied to nothing.
        """
        for key, pattern in self._given.items():
            name = output_named(key, list(shapes))
            if name is None or name in self._patterns:
                raise MappingError(
                    f"output_patterns: expected names among {', '.join(shapes)}, got {key}; choose one of them, or a "
                    "position, once."
                )
            self._patterns[name] = read_pattern(pattern, f"output_patterns[{key!r}]", shapes[name])

    def torch_name(self, key: str, name: str) -> str:
        """Return the torch side's name of a side's output."""
        return renamed(name, self._pairs or ()) if key == "jax" else name

    def to_torch(self, key: str, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return a side's outputs under the torch side's names, and in its layout."""
        named = {self.torch_name(key, name): array for name, array in outputs.items()}
        if key == "jax":
            return {name: self._back(name, array) for name, array in named.items()}
        self._shapes |= {name: array.shape for name, array in named.items()}
        return named

    def to_flax(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return arrays like torch outputs under the flax side's names, and in its layout, once both are known."""
        return {
            renamed(name, self._pairs or (), back=True): (
                self._axes[name].forward(array) if name in self._axes else array
            )
            for name, array in arrays.items()
        }

    def _back(self, name: str, array: np.ndarray) -> np.ndarray:
        """Rearrange an output of the flax side to the torch side's layout."""
        if name not in self._patterns:
            return array
        (pattern, lengths), option = self._patterns[name], f"output_patterns[{name!r}]"
        try:
            self._axes[name] = AxisPattern(pattern, self._shapes[name], array.shape, lengths)
        except (MappingError, TypeError) as error:
            # Another size is a mismatch: its own layout still says in which axis, where that decides the other one.
            left, _, right = (half.strip() for half in pattern.partition("->"))
            try:
                return rearrangement((f"{right} -> {left}", lengths), array.shape, option).forward(array)
            except MappingError:
                if array.shape != self._shapes[name] and len(_axes(right)) == array.ndim:
                    return array
            raise MappingError(
                f"{option}: expected a pattern from the torch side's shape {self._shapes[name]} to the flax side's "
                f"{array.shape}, got {pattern!r} ({error})."
            ) from None
        return self._axes[name].backward(array)


def checked_outputs(outputs: Outputs | None) -> tuple[tuple[str, str], ...] | None:
    """Return the outputs that correspond, `(torch name, flax name)`, under the names that the judge knows them by.

    Raises:
        ValueError: for anything but names and pairs of names, each used once.
    """
    if outputs is None:
        return None
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        outputs = [*outputs.items()] if isinstance(outputs, Mapping) else [outputs]
    pairs = []
    for entry in outputs:
        both = (entry, entry) if isinstance(entry, str | int) else tuple(entry) if isinstance(entry, Sequence) else ()
        if len(both) != 2 or not all(isinstance(n, str | int) and not isinstance(n, bool) for n in both) or "" in both:
            raise ValueError(
                "outputs: expected names such as 'logits', or pairs (torch name, flax name) such as ('0', 'logits'), "
                f"got {entry!r:.80}."
            )
        pairs.append(tuple(_output(str(name)) for name in both))
    for side, names in (("torch", [t for t, _ in pairs]), ("flax", [f for _, f in pairs])):
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"outputs: expected every output once, got {twice[0]} of {side} twice; leave one out.")
    if not pairs:
        raise ValueError("outputs: expected at least one name, got none; nothing would be compared.")
    return tuple(pairs)


def _output(name: str) -> str:
    return name if name == OUTPUT or name.startswith(f"{OUTPUT}.") else f"{OUTPUT}.{name}"


def renamed(name: str, pairs: Sequence[tuple[str, str]], back: bool = False) -> str:
    """Return the torch side's name of a flax output, or `back`."""
    for pair in sorted(pairs, key=lambda pair: -len(pair[1 - back])):
        there, here = pair[back], pair[1 - back]
        if name == here or name.startswith(f"{here}."):
            return there + name.removeprefix(here)
    return name


def output_named(key: object, names: Sequence[str]) -> str | None:
    """Return which output a user means: by position, or by its name with or without `y.` before it."""
    if isinstance(key, int) and not isinstance(key, bool):
        spelled = [f"{OUTPUT}.{key}", *([OUTPUT] if key == 0 else [])]
    else:
        spelled = [key, f"{OUTPUT}.{key}"] if isinstance(key, str) else []
    return next((name for name in spelled if name in names), None)


def read_pattern(pattern: Any, option: str, shape: tuple[int, ...]) -> tuple[str, Mapping[str, int]]:
    """Return an axis pattern's text, which must have as many axes on the left as the shape, and lengths."""
    text, lengths = pattern if isinstance(pattern, tuple | list) and len(pattern) == 2 else (pattern, {})
    if not isinstance(text, str) or text.count("->") != 1 or not isinstance(lengths, Mapping):
        raise MappingError(
            f"{option}: expected an axis pattern such as 'b c h w -> b h w c', or one with lengths such as "
            f"('b (h w) c -> b h w c', {{'h': 4}}), got {pattern!r:.80}."
        )
    if len(_axes(text.partition("->")[0])) != len(shape):
        raise MappingError(f"{option}: expected {len(shape)} axes on the left for shape {shape}, got {text!r}.")
    return text, lengths


def _axes(half: str) -> list[str]:
    """Return the axes and groups of one half of a pattern."""
    return re.findall(r"\([^()]*\)|[^\s()]+", half)


def rearrangement(pattern: Any, shape: tuple[int, ...], option: str) -> AxisPattern:
    """Return the axis pattern that takes an array of one shape to another layout.

    Raises:
        MappingError: if it cannot be read, does not fit, or leaves a length open.
    """
    text, lengths = read_pattern(pattern, option, shape)
    try:
        target = einops.rearrange(np.empty(shape, np.int8), text, **lengths).shape
        return AxisPattern(text, shape, target, lengths)
    except (einops.EinopsError, MappingError, TypeError) as error:
        said = str(error).strip().splitlines()[-1].strip()
        raise MappingError(
            f"{option}: expected a permutation such as 'b c h w -> b h w c', with groups in brackets, of the axes of "
            f"shape {shape}, got {text!r} ({said})."
        ) from None


def both_layouts(layout: Layout, arrays: Sequence[np.ndarray], patterns: Layouts) -> dict[str, tuple[np.ndarray, ...]]:
    """Return the inputs of each side.

    Raises:
        MappingError: if a pattern does not fit its input, or there is no such input.
    """
    chosen = layout.resolved(patterns)
    flax = (
        rearrangement(chosen[k], x.shape, "input_patterns").forward(x) if k in chosen else x
        for k, x in enumerate(arrays)
    )
    return {"torch": tuple(arrays), "jax": tuple(flax)}


def example_of_outputs(torch: Sequence[str], flax: Sequence[str]) -> str:
    """Return an example of `outputs=`: equal names first, else the first of either side."""
    common = [name for name in torch if name in flax]
    first = [(name.removeprefix("y."),) * 2 for name in common] or [
        (torch[0].removeprefix("y."), flax[0].removeprefix("y.")) if torch and flax else ("0", "logits")
    ]
    return repr(first)
