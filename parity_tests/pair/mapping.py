"""Parameters of one side to parameters of the other: explicit rules, every element used exactly once on both sides."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity_tests.harness.dtypes import numpy_dtype
from parity_tests.pair.casts import as_stored, exactly, format_name, is_inexact, roundoff
from parity_tests.pair.patterns import AxisPattern, MappingError
from parity_tests.pair.side import Arrays, ParameterSpec

Rule = tuple[str | None, str | None] | tuple[str | None, str | None, str] | tuple[str, str, str, Mapping[str, int]]
ZERO = "0"
_BLOCK = re.compile(r"^(?P<name>[^\[\]]+?)\s*(\[(?P<ranges>[^\[\]]*)\])?$")


@dataclass(frozen=True)
class Block:
    """A whole array, or a box of one: ``in_proj_weight[0:64]``, ``kernel[:, 32:64]``."""

    name: str
    ranges: tuple[slice, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """A torch block and the flax block that holds the same numbers; one of the two is None for a block held at 0."""

    torch: Block | None
    flax: Block | None
    pattern: AxisPattern | None
    text: str


def _block(entry: object, side: str, specs: Mapping[str, ParameterSpec]) -> Block:
    match = _BLOCK.match(entry.strip()) if isinstance(entry, str) else None
    if match is None:
        raise MappingError(
            f"params: expected a {side} name such as 'weight' or 'weight[0:64]', got {entry!r}; name a parameter."
        )
    name, ranges = match["name"].strip().replace("/", "."), match["ranges"]
    if name not in specs:
        raise MappingError(f"params: expected a {side} parameter among {', '.join(specs)}, got {name!r}; choose one.")
    full = specs[name].value.shape
    boxes = []
    for text in [] if ranges is None else ranges.split(","):
        bounds = re.match(r"^\s*(-?\d+)?\s*:\s*(-?\d+)?\s*$", text)
        if bounds is None:
            raise MappingError(f"params: expected ranges such as [0:64] or [:, 2:4], got {entry!r}; write start:stop.")
        boxes.append(slice(*(None if bound is None else int(bound) for bound in bounds.groups())))
    if len(boxes) > len(full):
        raise MappingError(f"params: expected at most {len(full)} ranges for {name} of shape {full}, got {entry!r}.")
    shape = list(full)
    for axis, box in enumerate(boxes):
        stop = full[axis] if box.stop is None else box.stop
        start = box.start or 0
        if not 0 <= start < stop <= full[axis]:
            raise MappingError(
                f"params: expected a range inside 0:{full[axis]} on axis {axis} of {name}, got {entry!r}; "
                f"its shape is {full}."
            )
        boxes[axis] = slice(start, stop)
        shape[axis] = stop - start
    return Block(name, tuple(boxes), tuple(shape))


def _link(rule: Rule, torch: Mapping[str, ParameterSpec], flax: Mapping[str, ParameterSpec]) -> Link:
    if not isinstance(rule, tuple | list) or not 2 <= len(rule) <= 4:
        raise MappingError(
            f"params: expected (torch name, flax path, axis pattern) with an optional dict of lengths, got {rule!r}."
        )
    torch_entry, flax_entry = rule[0], rule[1]
    pattern = rule[2] if len(rule) > 2 else ""
    text = f"({torch_entry!r}, {flax_entry!r}, {pattern!r})"
    if torch_entry is None or flax_entry is None:
        if (torch_entry is None) == (flax_entry is None) or pattern != ZERO:
            raise MappingError(
                f"params: expected a counterpart, or None and '{ZERO}' for a block that is held at zero, got {text}."
            )
        held_torch = None if torch_entry is None else _block(torch_entry, "torch", torch)
        return Link(held_torch, None if flax_entry is None else _block(flax_entry, "flax", flax), None, text)
    left, right = _block(torch_entry, "torch", torch), _block(flax_entry, "flax", flax)
    first, second = torch[left.name], flax[right.name]
    if first.value.dtype != second.value.dtype and not (_is_integer(first.value) and _is_integer(second.value)):
        raise MappingError(
            f"params: expected one dtype on both sides of {text}, got {first.value.dtype} and {second.value.dtype}."
        )
    if first.trainable != second.trainable:
        raise MappingError(
            f"params: expected parameters on both sides of {text} or buffers on both, got "
            f"{'a parameter' if first.trainable else 'a buffer'} and "
            f"{'a parameter' if second.trainable else 'a buffer'}."
        )
    try:
        lengths = rule[3] if len(rule) == 4 else None
        axes = AxisPattern(pattern or "", left.shape, right.shape, lengths)
    except MappingError as error:
        raise MappingError(f"params: {text}: {error}") from None
    return Link(left, right, axes, text)


def _is_integer(array: np.ndarray) -> bool:
    """Integers of different widths hold the same numbers: torch's are int64, JAX's int32 unless told otherwise."""
    return array.dtype.kind in "iu"


def _coverage(specs: Mapping[str, ParameterSpec], blocks: Sequence[Block]) -> dict[str, np.ndarray]:
    counts = {name: np.zeros(spec.value.shape, np.int32) for name, spec in specs.items()}
    for block in blocks:
        counts[block.name][block.ranges] += 1
    return counts


def _elements(counts: np.ndarray, wanted: np.ndarray) -> str:
    """Says which part of an array is meant: the whole, or the box around the elements."""
    if wanted.all():
        return ""
    where = np.argwhere(wanted)
    box = ", ".join(f"{low}:{high + 1}" for low, high in zip(where.min(0), where.max(0), strict=True))
    return f"[{box}]" if counts.ndim else ""


def _unused(specs: Mapping[str, ParameterSpec], counts: Mapping[str, np.ndarray]) -> list[str]:
    """Parameters, and partly mapped buffers, with elements that no rule uses. A buffer may be left out as a whole."""
    return [
        f"{name}{_elements(count, count == 0)} {specs[name].value.shape}"
        for name, count in counts.items()
        if not count.all() and (specs[name].trainable or count.any())
    ]


class ParameterMapping:
    """A bijection between the elements of the parameters of two sides.

    Args:
        rules: ``(torch name, flax path, axis pattern)``; names may carry ranges (``"in_proj_weight[0:64]"``), the
            pattern may be empty for equal shapes, a fourth entry gives lengths that the shapes leave open. A block
            without counterpart is held at zero by ``(torch name, None, "0")`` or ``(None, flax path, "0")``.
        torch: parameters and buffers of the torch side.
        flax: those of the flax side.

    Raises:
        MappingError: for an unknown, unused, duplicate, mis-shaped or mistyped entry.
    """

    def __init__(
        self, rules: Sequence[Rule], torch: Mapping[str, ParameterSpec], flax: Mapping[str, ParameterSpec]
    ) -> None:
        self.links = tuple(_link(rule, torch, flax) for rule in rules)
        self._specs = {"torch": torch, "flax": flax}
        blocks = {
            "torch": [link.torch for link in self.links if link.torch is not None],
            "flax": [link.flax for link in self.links if link.flax is not None],
        }
        counts = {side: _coverage(self._specs[side], blocks[side]) for side in blocks}
        unused = {side: _unused(self._specs[side], counts[side]) for side in blocks}
        left = (
            f"left on the torch side: {', '.join(unused['torch']) or 'nothing'}; "
            f"on the flax side: {', '.join(unused['flax']) or 'nothing'}."
        )
        for side, by_name in counts.items():
            twice = [f"{name}{_elements(count, count > 1)}" for name, count in by_name.items() if (count > 1).any()]
            if twice:
                raise MappingError(f"params: expected every element once, got {side} {', '.join(twice)} twice; {left}")
        if unused["torch"] or unused["flax"]:
            raise MappingError(f"params: expected every parameter to be mapped; {left}")
        self.torch_names = tuple(name for name, count in counts["torch"].items() if count.any())
        self.flax_names = tuple(name for name, count in counts["flax"].items() if count.any())
        self.not_compared = tuple(
            f"{side} buffer {name}"
            for side in ("torch", "flax")
            for name, count in counts[side].items()
            if count.size and not count.any()
        )

    @property
    def held_at_zero(self) -> tuple[str, ...]:
        """The rules whose block has no counterpart."""
        return tuple(link.text for link in self.links if link.pattern is None)

    def compared(self, name: str) -> np.ndarray:
        """Which elements of a torch array have a counterpart, as booleans of its shape."""
        mask = np.ones(self._specs["torch"][name].value.shape, bool)
        for link in self.links:
            if link.flax is None and link.torch is not None and link.torch.name == name:
                mask[link.torch.ranges] = False
        return mask

    def without_held(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """The same torch arrays, with the blocks that have no counterpart at zero."""
        return {name: np.where(self.compared(name), array, array.dtype.type(0)) for name, array in arrays.items()}

    def to_flax(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Flax arrays with the numbers of torch arrays, in their formats; integers in the flax array's own."""
        return self._carried("torch", "flax", arrays, self.flax_names)

    def to_torch(self, arrays: Arrays, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Torch arrays with the numbers of flax arrays, likewise; blocks without counterpart are 0.

        Args:
            arrays: by flax path.
            names: the torch arrays wanted, of which those are returned whose counterparts ``arrays`` has; default: all
                that are mapped.
        """
        return self._carried("flax", "torch", arrays, self.torch_names if names is None else names)

    def _carried(self, source: str, target: str, arrays: Arrays, names: Sequence[str]) -> dict[str, np.ndarray]:
        result: dict[str, np.ndarray] = {}
        for name in names:
            # From the block on the other side, or from nothing, to the block on this one.
            links = [
                (link, getattr(link, source), here)
                for link in self.links
                if (here := getattr(link, target)) is not None and here.name == name
            ]
            sources = [there.name for _, there, _ in links if there is not None]
            if any(there not in arrays for there in sources):
                continue
            value = self._specs[target][name].value
            # Beside no number at all, a block that is held at zero has the format of what it stands with.
            formats = [arrays[there] for there in sources] or [a for a in arrays.values() if is_inexact(a)] or [value]
            finest = min(formats, key=roundoff)
            dtype = numpy_dtype(format_name(finest.dtype)) if is_inexact(value) else value.dtype
            result[name] = as_stored(np.zeros(value.shape, value.dtype), dtype)
            for link, there, here in links:
                if there is not None and link.pattern is not None:
                    box = arrays[there.name][there.ranges]
                    box = link.pattern.forward(box) if target == "flax" else link.pattern.backward(box)
                    result[name][here.ranges] = exactly(box, result[name].dtype, link.text)
        return result
