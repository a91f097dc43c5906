"""Parameters of one side to parameters of the other: explicit rules, every element used exactly once on both sides."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.judge.dtypes import as_stored, exactly, format_name, is_inexact, numpy_dtype, roundoff
from parity_tests.pair.patterns import AxisPattern, MappingError
from parity_tests.pair.side import Arrays, ParameterSpec

# (torch name, flax path), then an axis pattern, lengths that the shapes leave open, and KEEP, each of them optional.
Rule = tuple[Any, ...]
Specs = Mapping[str, ParameterSpec]
ZERO, KEEP = "0", "keep"
SIDES = ("torch", "flax")
_ENTRY = re.compile(r"^(?P<name>.+?)\s*(\[(?P<ranges>[^\[\]]*)\])?$")
_MOST_NAMES = 40  # that one sentence lists


@dataclass(frozen=True)
class Block:
    """A whole array, or a box of one: `in_proj_weight[0:64]`, `kernel[:, 32:64]`."""

    name: str
    ranges: tuple[slice, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """A torch block and the flax block that holds the same numbers.

    Attributes:
        torch: None for a flax block without counterpart.
        flax: None for a torch block without counterpart.
        pattern: from the one to the other; None without counterpart.
        text: the rule.
        keep: True if the values stay as they are, on either side; a block without counterpart is at zero otherwise.
    """

    torch: Block | None
    flax: Block | None
    pattern: AxisPattern | None
    text: str
    keep: bool = False


def _spelled(name: str, side: str, specs: Specs) -> str:
    """Return the name of an array, as the framework spells it or with dots for slashes."""
    if name in specs:
        return name
    alike = [known for known in specs if known.replace("/", ".") == name.replace("/", ".")]
    if len(alike) == 1:
        return alike[0]
    likely = alike or (difflib.get_close_matches(name, specs, 8, 0.0) if len(specs) > _MOST_NAMES else list(specs))
    shown = ", ".join(likely) + (f", ... ({len(specs)} in all)" if len(likely) < len(specs) else "")
    raise MappingError(f"params: expected a {side} parameter among {shown}, got {name!r}; choose one.")


def _block(entry: object, side: str, specs: Specs) -> Block:
    match = _ENTRY.match(entry.strip()) if isinstance(entry, str) else None
    if match is None:
        raise MappingError(
            f"params: expected a {side} name such as 'weight' or 'weight[0:64]', got {entry!r}; name a parameter."
        )
    # A key may itself end in brackets.
    whole = str(entry).strip()
    name, ranges = (whole, None) if whole in specs else (_spelled(match["name"], side, specs), match["ranges"])
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


def _link(rule: Rule, torch: Specs, flax: Specs) -> Link:
    parts = list(rule) if isinstance(rule, tuple | list) else []
    keep = len(parts) > 2 and parts[-1] == KEEP
    if not 2 <= len(parts) - keep <= 4 or (len(parts) - keep == 4 and not isinstance(parts[3], Mapping)):
        raise MappingError(
            "params: expected (torch name, flax path, axis pattern) with an optional dict of lengths, and 'keep' where "
            f"the values stay as they are, got {rule!r}."
        )
    torch_entry, flax_entry, pattern, lengths = [*parts[: len(parts) - keep], None, None][:4]
    pattern = pattern or ""
    text = f"({torch_entry!r}, {flax_entry!r}, {pattern or KEEP * keep!r}{f', {KEEP!r}' * bool(keep and pattern)})"
    if torch_entry is None or flax_entry is None:
        if (torch_entry is None) == (flax_entry is None) or pattern != ("" if keep else ZERO):
            raise MappingError(
                f"params: expected a counterpart, or None and '{ZERO}' for a block that is held at zero, '{KEEP}' for "
                f"one that stays as it is, got {text}."
            )
        held_torch = None if torch_entry is None else _block(torch_entry, "torch", torch)
        return Link(held_torch, None if flax_entry is None else _block(flax_entry, "flax", flax), None, text, keep)
    left, right = _block(torch_entry, "torch", torch), _block(flax_entry, "flax", flax)
    _check_alike(torch[left.name], flax[right.name], text)
    if not isinstance(pattern, str):
        raise MappingError(f"params: expected an axis pattern such as 'o i -> i o', got {pattern!r} in {text}.")
    try:
        axes = AxisPattern(pattern, left.shape, right.shape, lengths)
    except MappingError as error:
        raise MappingError(f"params: {text}: {error}") from None
    return Link(left, right, axes, text, keep)


def _check_alike(first: ParameterSpec, second: ParameterSpec, text: str) -> None:
    dtypes = first.value.dtype, second.value.dtype
    # Integers of different widths hold the same numbers: torch's are int64, JAX's int32 unless told otherwise.
    if dtypes[0] != dtypes[1] and not all(dtype.kind in "iu" for dtype in dtypes):
        raise MappingError(f"params: expected one dtype on both sides of {text}, got {dtypes[0]} and {dtypes[1]}.")
    if first.trainable and not second.trainable:
        raise MappingError(
            f"params: expected parameters on both sides of {text} or buffers on both, got a parameter and a buffer; "
            "freeze the torch parameter (requires_grad=False), or make the flax one a parameter."
        )


def _coverage(specs: Specs, blocks: Sequence[Block]) -> dict[str, np.ndarray]:
    counts = {name: np.zeros(spec.value.shape, np.int32) for name, spec in specs.items()}
    for block in blocks:
        counts[block.name][block.ranges] += 1
    return counts


def _elements(counts: np.ndarray, wanted: np.ndarray) -> str:
    """Say which part of an array is meant: the whole, or the box around the elements."""
    if wanted.all():
        return ""
    where = np.argwhere(wanted)
    box = ", ".join(f"{low}:{high + 1}" for low, high in zip(where.min(0), where.max(0), strict=True))
    return f"[{box}]" if counts.ndim else ""


class ParameterMapping:
    """A bijection between the elements of the parameters of two sides.

    Args:
        rules: `(torch name, flax path, axis pattern)`; names may carry ranges (`"in_proj_weight[0:64]"`), the
            pattern may be empty for equal shapes, a fourth entry gives lengths that the shapes leave open. A block
            without counterpart is held at zero by `(torch name, None, "0")` or `(None, flax path, "0")`, and stays
            as it is by `"keep"` in the place of `"0"`; `"keep"` as the last entry of a rule with two names says
            that both sides keep their own values, which must be the same.
        torch: parameters and buffers of the torch side.
        flax: parameters and buffers of the flax side.
        left_out: whether a frozen parameter of this name may be unmapped; a buffer always may be.

    Attributes:
        torch_names: torch arrays that are mapped, as `flax_names` on the other side, and `unmapped` by side.
        drawn: those that do not stay as they are.
        trained: those that are trained on either side.
        half_trained: those that are frozen, or buffers, and mapped to parameters of the flax side.
        untrained: frozen torch parameters that are mapped to what is no parameter of the flax side either.
        stateful: those that are buffers on either side.
        kept_by_both: those of which both sides keep their own values.
        kept: rules that leave values as they are.
        held_at_zero: rules whose block has no counterpart and is at zero.

    Raises:
        MappingError: for an unknown, unused, duplicate, mis-shaped or mistyped entry.
    """

    def __init__(
        self, rules: Sequence[Rule], torch: Specs, flax: Specs, left_out: Callable[[str], bool] = lambda name: False
    ) -> None:
        self.links = tuple(_link(rule, torch, flax) for rule in rules)
        self._specs = {"torch": torch, "flax": flax}
        blocks = {
            "torch": [link.torch for link in self.links if link.torch is not None],
            "flax": [link.flax for link in self.links if link.flax is not None],
        }
        counts = {side: _coverage(self._specs[side], blocks[side]) for side in SIDES}
        self.torch_names, self.flax_names = (
            tuple(name for name, count in counts[side].items() if count.any()) for side in SIDES
        )
        self.unmapped = {
            side: tuple(name for name, count in counts[side].items() if count.size and not count.any())
            for side in SIDES
        }
        self._check_coverage(counts, left_out)
        self.held_at_zero = tuple(link.text for link in self.links if link.pattern is None and not link.keep)
        self.kept = tuple(link.text for link in self.links if link.keep)
        self.kept_by_both = frozenset(link.torch.name for link in self.links if link.keep and link.torch and link.flax)
        self.drawn = tuple(name for name in self.torch_names if not all(link.keep for link in self._links(name)))
        # The flax arrays that hold a torch array's elements.
        other = {n: [flax[link.flax.name] for link in self._links(n) if link.flax] for n in self.torch_names}
        shared = [name for name in self.torch_names if other[name]]
        self.trained = tuple(n for n in shared if torch[n].trainable or any(spec.trainable for spec in other[n]))
        self.half_trained = tuple(name for name in self.trained if not torch[name].trainable)
        self.untrained = tuple(name for name in shared if torch[name].frozen and name not in self.trained)
        self.stateful = tuple(
            name
            for name in shared
            if not (torch[name].trainable or torch[name].frozen) or any(not spec.trainable for spec in other[name])
        )

    def _check_coverage(self, counts: Mapping[str, Mapping[str, np.ndarray]], left_out: Callable[[str], bool]) -> None:
        """Refuse elements that are used twice, and parameters and partly mapped buffers with elements left over."""
        unused: dict[str, list[str]] = {}
        for side, by_name in counts.items():
            specs = self._specs[side]
            unused[side] = [
                f"{name}{_elements(count, count == 0)} {specs[name].value.shape}"
                for name, count in by_name.items()
                if not count.all()
                and (count.any() or specs[name].trainable or (specs[name].frozen and not left_out(name)))
            ]
        left = (
            f"left on the torch side: {', '.join(unused['torch']) or 'nothing'}; "
            f"on the flax side: {', '.join(unused['flax']) or 'nothing'}"
        )
        for side, by_name in counts.items():
            twice = [f"{name}{_elements(count, count > 1)}" for name, count in by_name.items() if (count > 1).any()]
            if twice:
                raise MappingError(f"params: expected every element once, got {side} {', '.join(twice)} twice; {left}.")
        frozen = [name for name in self.unmapped["torch"] if self._specs["torch"][name].frozen]
        if unused["torch"] or unused["flax"]:
            kept = (
                f"; a frozen parameter without counterpart is kept by ({frozen[0]!r}, None, {KEEP!r})" if frozen else ""
            )
            raise MappingError(f"params: expected every parameter to be mapped; {left}{kept}.")

    def kept_alone(self, side: str) -> Iterator[Block]:
        """Return the blocks of one side that stay as they are and have no counterpart."""
        for link in self.links:
            block = link.torch if side == "torch" else link.flax
            if link.keep and link.pattern is None and block is not None:
                yield block

    def constants(self, side: str) -> tuple[str, ...]:
        """Return the arrays of one side without counterpart: unmapped, or kept as a whole."""
        side = "torch" if side == "torch" else "flax"
        blocks = [(link, getattr(link, side)) for link in self.links]
        others = {block.name for link, block in blocks if block and not (link.keep and link.pattern is None)}
        names = self.torch_names if side == "torch" else self.flax_names
        return (*self.unmapped[side], *(name for name in names if name not in others))

    def _links(self, name: str) -> list[Link]:
        return [link for link in self.links if link.torch is not None and link.torch.name == name]

    def compared(self, name: str) -> np.ndarray:
        """Return a mask of the elements of a torch array that have a counterpart."""
        mask = np.ones(self._specs["torch"][name].value.shape, bool)
        for link in self._links(name):
            if link.flax is None and link.torch is not None:
                mask[link.torch.ranges] = False
        return mask

    def without_held(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Return the same torch arrays, with the blocks that have no counterpart at zero."""
        return {name: np.where(self.compared(name), array, array.dtype.type(0)) for name, array in arrays.items()}

    def both(self, drawn: Arrays, own: Mapping[str, Arrays]) -> dict[str, dict[str, np.ndarray]]:
        """Return all arrays of both sides, `torch` and `jax`: drawn numbers, zeros and kept values in their places."""
        torch = dict(own["torch"]) | self.without_held(drawn)
        for link in self.links:
            if link.keep and link.torch is not None:
                torch[link.torch.name] = np.array(torch[link.torch.name])
                torch[link.torch.name][link.torch.ranges] = own["torch"][link.torch.name][link.torch.ranges]
        flax = self.to_flax({name: torch[name] for name in self.torch_names})
        for link in self.links:
            if link.keep and link.flax is not None:
                flax[link.flax.name][link.flax.ranges] = own["jax"][link.flax.name][link.flax.ranges]
        return {"torch": torch, "jax": dict(own["jax"]) | flax}

    def to_flax(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Return flax arrays with the numbers and formats of torch arrays; integers in the flax array's own format."""
        return self._carried("torch", "flax", arrays, self.flax_names)

    def to_torch(self, arrays: Arrays, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return torch arrays with the numbers of flax arrays, likewise; blocks without counterpart are 0."""
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
            sources = [there.name for _, there, _ in links if there is not None and there.name in arrays]
            value = self._specs[target][name].value
            # Beside no number at all, a block that is held at zero has the format of what it stands with.
            formats = [arrays[there] for there in sources] or [a for a in arrays.values() if is_inexact(a)] or [value]
            finest = min(formats, key=roundoff)
            dtype = numpy_dtype(format_name(finest.dtype)) if is_inexact(value) else value.dtype
            result[name] = as_stored(np.zeros(value.shape, value.dtype), dtype)
            for link, there, here in links:
                if there is not None and there.name in arrays and link.pattern is not None:
                    box = arrays[there.name][there.ranges]
                    box = link.pattern.forward(box) if target == "flax" else link.pattern.backward(box)
                    result[name][here.ranges] = exactly(box, result[name].dtype, link.text)
        return result
