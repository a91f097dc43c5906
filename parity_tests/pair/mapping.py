"""Parameters of one side to parameters of the other: explicit rules, every element used exactly once on both sides."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.judge.dtypes import as_stored, exactly, format_name, is_inexact, numpy_dtype, roundoff, widened
from parity_tests.pair.draws import made_exact
from parity_tests.pair.patterns import MappingError
from parity_tests.pair.rules import (
    KEEP,
    SIDES,
    TIED,
    Block,
    Link,
    Rule,
    Specs,
    counts_of,
    covers_once,
    elements_of,
    links_of,
)
from parity_tests.pair.side import Arrays
from parity_tests.pair.templates import expanded

_OTHER = {"torch": "flax", "flax": "torch"}


class ParameterMapping:
    """A bijection between the elements of the parameters of two sides.

    Args:
        rules: `(torch name, flax path, axis pattern)`. Names may carry ranges and indices (`"in_proj_weight[0:64]"`,
            `"kernel[:, 3]"`) and stand for all layers (`"layers.{k}.weight"`, `"layers.kernel[{k}]"`, see
            `rules.expanded`); the pattern may be empty for equal shapes, a fourth entry gives lengths that the shapes
            leave open. On one side of a rule there may be a sum, `"bias_ih + bias_hh"`, `"1 + scale"` or `"-bias"`. A
            block without counterpart is held at zero by `(torch name, None, "0")` or `(None, flax path, "0")`, and
            stays as it is by `"keep"` in the place of `"0"`; `"keep"` as the last entry of a rule with two names says
            that both sides keep their own values, which must be the same; `"tied"` that one side uses an array, which
            another rule maps, for two of the other side.
        torch: parameters and buffers of the torch side.
        flax: parameters and buffers of the flax side.
        left_out: whether a frozen parameter of this name may be unmapped; a buffer always may be.

    Attributes:
        torch_names: torch arrays that are mapped, as `flax_names` on the other side, and `unmapped` by side.
        drawn: those that do not stay as they are, and do not follow from others that they are tied to.
        trained: those that are trained on either side.
        half_trained: those that are frozen, or buffers, and mapped to parameters of the flax side.
        untrained: frozen torch parameters that are mapped to what is no parameter of the flax side either.
        stateful: those that are buffers on either side.
        kept_by_both: those of which both sides keep their own values.
        kept: rules that leave values as they are.
        held_at_zero: rules whose block has no counterpart and is at zero.
        added_up: those whose gradient is a sum, over arrays that are tied on the other side.
        notes: of sums and ties, for a report.

    Raises:
        MappingError: for an unknown, unused, duplicate, mis-shaped or mistyped entry.
    """

    def __init__(
        self, rules: Sequence[Rule], torch: Specs, flax: Specs, left_out: Callable[[str], bool] = lambda name: False
    ) -> None:
        self._specs = {"torch": torch, "flax": flax}
        found = [link for rule in expanded(rules, self._specs) for link in links_of(rule, torch, flax)]
        self._blocks = {side: self._owned(found, side) for side in SIDES}
        self.links = tuple(self._with_tied_side(link, found) for link in found)
        for link in self.links:
            if link.tied:
                other = _OTHER[link.tied]
                block = getattr(link, other)
                self._blocks[other].setdefault(block.name, []).append(block)
        self.torch_names, self.flax_names = (
            tuple(name for name in self._specs[side] if name in self._blocks[side]) for side in SIDES
        )
        self.unmapped = {
            side: tuple(n for n, spec in specs.items() if spec.value.size and n not in self._blocks[side])
            for side, specs in self._specs.items()
        }
        self._check_coverage(left_out)
        self.held_at_zero = tuple(link.text for link in self.links if link.pattern is None and not link.keep)
        self.kept = tuple(link.text for link in self.links if link.keep)
        self.kept_by_both = frozenset(link.torch.name for link in self.links if link.keep and link.torch and link.flax)
        self.drawn = tuple(
            n for n in self.torch_names if not all(link.keep or link.tied == "flax" for link in self._links(n))
        )
        # The flax arrays that hold a torch array's elements.
        other = {n: [flax[link.flax.name] for link in self._links(n) if link.flax] for n in self.torch_names}
        shared = [name for name in self.torch_names if other[name]]
        followers = {n for n in shared if all(link.tied == "flax" for link in self._links(n))}
        self.trained = tuple(
            n for n in shared if n not in followers and (torch[n].trainable or any(spec.trainable for spec in other[n]))
        )
        self.half_trained = tuple(name for name in self.trained if not torch[name].trainable)
        self.untrained = tuple(n for n in shared if torch[n].frozen and n not in (*self.trained, *followers))
        self.stateful = tuple(
            name
            for name in shared
            if not (torch[name].trainable or torch[name].frozen) or any(not spec.trainable for spec in other[name])
        )
        again = {side: {getattr(link, side).name for link in self.links if link.tied == side} for side in SIDES}
        pairs = [(link.torch.name, link.flax.name) for link in self.links if link.torch and link.flax]
        holders = {name for name, path in pairs if path in again["flax"]}
        self.added_up = frozenset(again["torch"] | (holders - followers))
        self.notes = tuple(dict.fromkeys(self._notes()))

    def _notes(self) -> Iterator[str]:
        for link in self.links:
            if link.tied:
                yield (
                    f"{link.text}: the {link.tied} side has one array for two, so that gradients are added up on the "
                    f"{_OTHER[link.tied]} side"
                )
            elif link.part or link.offset:
                yield f"{link.text}: its terms are rounded: the {_OTHER[link.expression]} side has the exact sum"

    def _owned(self, links: Sequence[Link], side: str) -> dict[str, list[Block]]:
        """Return every block that rules map, but for ties, once; by array."""
        blocks: dict[str, list[Block]] = {}
        for link in links:
            block = getattr(link, side)
            if block is not None and not link.tied and (link.part == 0 or link.expression == side):
                blocks.setdefault(block.name, []).append(block)
        return blocks

    def _with_tied_side(self, link: Link, links: Sequence[Link]) -> Link:
        """Find the side on which a tied block is mapped by other rules as well."""
        if not link.tied:
            return link
        covered = {}
        for side in SIDES:
            block = getattr(link, side)
            owned = counts_of(self._blocks[side].get(block.name, []), self._specs[side][block.name].value.shape)
            covered[side] = owned[block.ranges] > 0
        tied = [side for side in SIDES if covered[side].all() and not covered[_OTHER[side]].any()]
        if not tied:
            raise MappingError(
                f"params: expected one side of {link.text} to be mapped by another rule and the other side by none, "
                f"got {' and '.join(side for side in SIDES if covered[side].any()) or 'neither'} mapped; "
                f"{TIED!r} is for one array that serves as two."
            )
        (side,) = tied
        name = getattr(link, side).name
        partners = [other for other in links if (block := getattr(other, side)) is not None and block.name == name]
        if any(other.expression or other.keep or other.pattern is None for other in partners):
            raise MappingError(f"params: expected {name} of {link.text} to be mapped as it is by the other rule.")
        return dataclasses.replace(link, tied=side)

    def _check_coverage(self, left_out: Callable[[str], bool]) -> None:
        """Refuse elements that are used twice, and parameters and partly mapped buffers with elements left over."""
        wrong: dict[str, dict[str, np.ndarray]] = {side: {} for side in SIDES}
        for side, specs in self._specs.items():
            for name, spec in specs.items():
                blocks = self._blocks[side].get(name, [])
                if spec.value.size and not covers_once(blocks, spec.value.shape):
                    wrong[side][name] = counts_of(blocks, spec.value.shape)
        unused = {
            side: [
                f"{name}{elements_of(count, count == 0)} {self._specs[side][name].value.shape}"
                for name, count in wrong[side].items()
                if not count.all() and (count.any() or self._is_required(side, name, left_out))
            ]
            for side in SIDES
        }
        left = (
            f"left on the torch side: {', '.join(unused['torch']) or 'nothing'}; "
            f"on the flax side: {', '.join(unused['flax']) or 'nothing'}"
        )
        for side in SIDES:
            twice = [f"{name}{elements_of(n, n > 1)}" for name, n in wrong[side].items() if (n > 1).any()]
            if twice:
                raise MappingError(
                    f"params: expected every element once, got {side} {', '.join(twice)} twice; {left}; a rule for one "
                    f"array that serves as two ends in {TIED!r}."
                )
        frozen = [name for name in self.unmapped["torch"] if self._specs["torch"][name].frozen]
        if unused["torch"] or unused["flax"]:
            kept = (
                f"; a frozen parameter without counterpart is kept by ({frozen[0]!r}, None, {KEEP!r})" if frozen else ""
            )
            raise MappingError(f"params: expected every parameter to be mapped; {left}{kept}.")

    def _is_required(self, side: str, name: str, left_out: Callable[[str], bool]) -> bool:
        spec = self._specs[side][name]
        return spec.trainable or (spec.frozen and not left_out(name))

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

    def compared(self, name: str, gradients: bool = False) -> np.ndarray:
        """Return a mask of the elements of a torch array that have a counterpart, for its gradients of its own."""
        mask = np.ones(self._specs["torch"][name].value.shape, bool)
        for link in self._links(name):
            if link.torch is not None and (link.flax is None or (gradients and link.tied == "flax")):
                mask[link.torch.ranges] = False
        return mask

    def without_held(self, arrays: Arrays, gradients: bool = False) -> dict[str, np.ndarray]:
        """Return the same torch arrays, with the blocks that have no counterpart at zero."""
        return {
            name: np.where(self.compared(name, gradients), array, array.dtype.type(0)) for name, array in arrays.items()
        }

    def both(self, drawn: Arrays, own: Mapping[str, Arrays]) -> dict[str, dict[str, np.ndarray]]:
        """Return all arrays of both sides, `torch` and `jax`: drawn numbers, zeros and kept values in their places.

        Numbers of an expression are rounded so that its result is exact in their format: both sides get the same.
        """
        torch = dict(own["torch"]) | self.without_held(drawn)
        for link in self.links:
            if link.keep and link.torch is not None:
                torch[link.torch.name] = np.array(torch[link.torch.name])
                torch[link.torch.name][link.torch.ranges] = own["torch"][link.torch.name][link.torch.ranges]
        parts: dict[str, list[np.ndarray]] = {}
        for links in self._expressions():
            parts |= made_exact(torch, links)
        flax = self.to_flax({name: torch[name] for name in self.torch_names})
        for link in self.links:
            if link.keep and link.flax is not None:
                flax[link.flax.name][link.flax.ranges] = own["jax"][link.flax.name][link.flax.ranges]
            if link.flax is not None and link.text in parts:
                box = parts[link.text][link.part]
                flax[link.flax.name][link.flax.ranges] = exactly(box, flax[link.flax.name].dtype, link.text)
        for link in self.links:
            if link.tied == "flax" and link.torch and link.flax and link.pattern:
                box = link.pattern.backward(flax[link.flax.name][link.flax.ranges])
                torch[link.torch.name] = np.array(torch[link.torch.name])
                torch[link.torch.name][link.torch.ranges] = box
        return {"torch": torch, "jax": dict(own["jax"]) | flax}

    def _expressions(self) -> Iterator[list[Link]]:
        links: list[Link] = []
        for link in self.links:
            if links and not (link.expression and link.part):
                yield links
                links = []
            links += [link] if link.expression else []
        if links:
            yield links

    def to_flax(self, arrays: Arrays, rounded: bool = False) -> dict[str, np.ndarray]:
        """Return flax arrays with the numbers and formats of torch arrays; integers in the flax array's own format."""
        return {name: self.carried("flax", name, arrays, rounded=rounded) for name in self.flax_names}

    def to_torch(
        self, arrays: Arrays, names: Sequence[str] | None = None, beside: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return torch arrays with the numbers of flax arrays, likewise; blocks without counterpart are 0.

        A sum leaves its terms open: the first one is what remains beside the others, of `beside` or zero.
        """
        names = self.torch_names if names is None else names
        return {name: self.carried("torch", name, arrays, beside) for name in names}

    def _links_into(self, target: str, name: str) -> list[tuple[Link, Block | None, Block]]:
        """Return links with the block on the other side, or nothing, and the block in one array of this side."""
        return [
            (link, getattr(link, _OTHER[target]), here)
            for link in self.links
            if (here := getattr(link, target)) is not None and here.name == name and link.tied != target
        ]

    def format_of(self, target: str, name: str, arrays: Mapping[str, Any]) -> np.dtype:
        """Return the format in which `carried` returns an array: the finest of its numbers, an integer array's own."""
        value = self._specs[target][name].value
        sources = [there.name for _, there, _ in self._links_into(target, name) if there and there.name in arrays]
        # Beside no number at all, a block that is held at zero has the format of what it stands with.
        formats = [arrays[there] for there in sources] or [a for a in arrays.values() if is_inexact(a)] or [value]
        parts = numpy_dtype(format_name(min(formats, key=roundoff).dtype)) if is_inexact(value) else value.dtype
        return as_stored(np.zeros((), value.dtype), parts).dtype

    def carried(
        self, target: str, name: str, arrays: Mapping[str, Any], beside: Arrays | None = None, rounded: bool = False
    ) -> np.ndarray:
        """Return one array of a side with the numbers of the other side's arrays.

        Args:
            target: `torch` or `flax`, the side of the array.
            name: of the array.
            arrays: of the other side; those that are missing count as zero.
            beside: arrays of the same side, for the terms of a sum that the sum leaves open; else they are zero.
            rounded: whether the result of an expression may be rounded, as in a trained checkpoint.
        """
        source = _OTHER[target]
        links = self._links_into(target, name)
        result = np.zeros(self._specs[target][name].value.shape, self.format_of(target, name, arrays))
        sums: dict[str, tuple[Block, np.ndarray]] = {}
        for link, there, here in links:
            if there is None or there.name not in arrays or link.pattern is None:
                continue
            if link.expression == target and link.part:
                if beside is not None:
                    result[here.ranges] = beside[here.name][here.ranges]
                continue
            box = arrays[there.name][there.ranges]
            box = link.pattern.forward(box) if target == "flax" else link.pattern.backward(box)
            if link.expression == source:
                _, total = sums.get(link.text, (here, np.asarray(link.offset)))
                sums[link.text] = (here, total + link.factor * widened(box))
            elif link.expression:
                sums[link.text] = (here, (widened(box) - self._other_terms(target, link, beside)) / link.factor)
            else:
                result[here.ranges] = exactly(box, result.dtype, link.text)
        for text, (here, exact) in sums.items():
            total = exact + 0.0  # no negative zero, as where they were drawn
            if target == "flax" and not rounded:
                result[here.ranges] = exactly(total, result.dtype, text)
            else:
                stored = as_stored(total, result.dtype)
                result[here.ranges] = stored if rounded else np.where(widened(stored) == total, stored, np.nan)
        return result

    def _other_terms(self, target: str, first: Link, beside: Arrays | None) -> Any:
        """Return the constant of an expression and its terms but for the first."""
        total: Any = first.offset
        for link in self.links if beside is not None else ():
            block = getattr(link, target)
            if link.text == first.text and link.part and beside is not None:
                total = total + link.factor * widened(beside[block.name][block.ranges])
        return total

    def gradients(self, side: str, found: Arrays) -> dict[str, np.ndarray]:
        """Return the gradients of one side in torch names, those that the other side's arrays have too.

        Where arrays are tied on one side, the gradients of the other side are added up. Where flax adds up several
        arrays, each of them has a gradient of its own, `<torch name> (<flax path>)`.

        Args:
            side: `torch` or `flax`.
            found: its gradients by its own names; a missing one is zero.
        """
        inexact = [array for array in found.values() if is_inexact(array)]
        dtype = min(inexact, key=roundoff).dtype if inexact else np.dtype(np.float64)
        result: dict[str, np.ndarray] = {}
        for name in self.trained:
            shape = self._specs["torch"][name].value.shape
            if side == "torch":
                own = found.get(name, np.zeros(shape, dtype))
                result[name] = self.without_held({name: own}, gradients=True)[name]
            else:
                formats = [found[link.flax.name] for link in self._links(name) if link.flax and link.flax.name in found]
                finest = min(formats, key=roundoff).dtype if formats else dtype
                result[name] = np.zeros(shape, finest)
            if name in self.added_up:
                result[name] = np.array(widened(result[name]))
        for link in self.links:
            if link.torch is None or link.flax is None or link.pattern is None:
                continue
            if side == "torch" and link.tied == "flax" and link.torch.name in found:
                self._add_tied(result, link, found[link.torch.name])
            if link.torch.name not in result:
                continue
            own = result[link.torch.name]
            if link.expression == "flax" and link.part:
                key = f"{link.torch.name} ({link.flax.name})"
                result[key] = np.zeros_like(own)
                result[key][link.torch.ranges] = own[link.torch.ranges] if side == "torch" else 0
                own = result[key]
            if side == "flax" and link.tied != "flax" and link.flax.name in found:
                box = link.pattern.backward(found[link.flax.name][link.flax.ranges])
                factor = link.factor if link.expression == "torch" else 1 / link.factor
                box = box * box.dtype.type(factor) if link.expression else box
                own[link.torch.ranges] = own[link.torch.ranges] + box
        return result

    def _add_tied(self, result: dict[str, np.ndarray], tied: Link, gradient: np.ndarray) -> None:
        """Add the gradient of a torch array to those that have the flax array that it shares with them."""
        assert tied.torch is not None
        assert tied.flax is not None
        assert tied.pattern is not None
        shared = np.zeros(self._specs["flax"][tied.flax.name].value.shape, widened(gradient).dtype)
        shared[tied.flax.ranges] = tied.pattern.forward(widened(gradient)[tied.torch.ranges])
        for link in self.links:
            if link.torch and link.flax and link.pattern and link.flax.name == tied.flax.name and not link.tied:
                own = result[link.torch.name]
                own[link.torch.ranges] = own[link.torch.ranges] + link.pattern.backward(shared[link.flax.ranges])
