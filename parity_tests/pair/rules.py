"""Rules between parameters, as a person writes them, to links between blocks of arrays: names, ranges, sums, ties."""

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.judge.dtypes import is_inexact
from parity_tests.pair.patterns import AxisPattern, MappingError
from parity_tests.pair.side import ParameterSpec

# (torch name, flax path), then an axis pattern, lengths that the shapes leave open, and KEEP or TIED, each optional.
Rule = tuple[Any, ...]
Specs = Mapping[str, ParameterSpec]
ZERO, KEEP, TIED = "0", "keep", "tied"
SIDES = ("torch", "flax")
ENTRY = re.compile(r"^(?P<name>.+?)\s*(\[(?P<ranges>[^\[\]]*)\])?$")
_STEP = re.compile(r"\[\s*['\"]?([^\[\]'\":,]+?)['\"]?\s*\]")  # of a path, as pytrees print it: ['w'], [0]
_MOST_NAMES = 40  # that one sentence lists
_MOST_BITS = 5  # of a constant that is added: then every format holds the sums that are drawn


@dataclass(frozen=True)
class Block:
    """A whole array, or a box of one: `in_proj_weight[0:64]`, `kernel[:, 32:64]`; `kernel[3]` loses its first axis."""

    name: str
    ranges: tuple[slice | int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """A torch block and the flax block that holds the same numbers.

    Of an expression such as `bias_ih + bias_hh` or `1 + scale`, every block has a link of its own: the block on the
    other side holds `offset + sum(factor * block)`.
    """

    torch: Block | None  # None for a flax block without counterpart
    flax: Block | None  # None for a torch block without counterpart
    pattern: AxisPattern | None  # from the one to the other; None without counterpart
    text: str  # the rule
    # True if the values stay as they are, on either side; a block without counterpart is at zero otherwise
    keep: bool = False
    tied: str = ""  # the side on which the block is linked elsewhere too: its other links hold the same numbers
    expression: str = ""  # the side on which the expression stands; empty for equal numbers
    factor: float = 1.0  # of the block in the expression
    offset: float = 0.0  # of the expression
    part: int = 0  # the place of the block in the expression


def _boxes(blocks: Sequence[Block], shape: tuple[int, ...]) -> np.ndarray:
    """Return the first and last index, plus one, of every block on every axis: (blocks, 2, axes)."""
    result = np.empty((len(blocks), 2, len(shape)), np.int64)
    result[:, 0], result[:, 1] = 0, shape
    for k, block in enumerate(blocks):
        for axis, box in enumerate(block.ranges):
            result[k, :, axis] = (box, box + 1) if isinstance(box, int) else (box.start, box.stop)
    return result


def covers_once(blocks: Sequence[Block], shape: tuple[int, ...]) -> bool:
    """Tell whether blocks are disjoint and fill an array, without an array of its size."""
    boxes = _boxes(blocks, shape)
    if sum(int(np.prod(stop - start)) for start, stop in boxes) != int(np.prod(shape)):
        return False
    starts, stops = boxes[:, 0], boxes[:, 1]
    common = np.minimum(stops[:, None], stops) - np.maximum(starts[:, None], starts)
    return int((common > 0).all(axis=-1).sum()) <= len(blocks)


def counts_of(blocks: Sequence[Block], shape: tuple[int, ...]) -> np.ndarray:
    """Return how often blocks use each element of an array."""
    counts = np.zeros(shape, np.int8)
    for block in blocks:
        counts[block.ranges] += 1
    return counts


def elements_of(counts: np.ndarray, wanted: np.ndarray) -> str:
    """Say which part of an array is meant: the whole, or the box around the elements."""
    if wanted.all():
        return ""
    where = np.argwhere(wanted)
    box = ", ".join(f"{low}:{high + 1}" for low, high in zip(where.min(0), where.max(0), strict=True))
    return f"[{box}]" if counts.ndim else ""


def plain(name: str) -> str:
    """Spell a path with dots alone: `mlp/~/linear_0.w`, `['mlp']['w']` and `layers[0].w` lose slashes and brackets."""
    return _STEP.sub(r".\1", name.strip()).replace("/", ".").lstrip(".")


def _spelled(name: str, specs: Specs) -> list[str]:
    """Return the arrays that a name may mean: as the framework spells them, else with dots alone."""
    if name in specs:
        return [name]
    dotted = plain(name)
    return [known for known in specs if plain(known) in (dotted, dotted.removeprefix("params."))]


def _unknown(name: str, side: str, specs: Specs, alike: Sequence[str] = ()) -> MappingError:
    likely = alike or (difflib.get_close_matches(name, specs, 8, 0.0) if len(specs) > _MOST_NAMES else list(specs))
    shown = ", ".join(likely) + (f", ... ({len(specs)} in all)" if len(likely) < len(specs) else "")
    return MappingError(f"params: expected a {side} parameter among {shown}, got {name!r}; choose one.")


def split_entry(entry: object, side: str, specs: Specs) -> tuple[str, str | None]:
    """Return the array that an entry names, and the ranges behind it, as they are written.

    Raises:
        MappingError: if there is no such array.
    """
    match = ENTRY.match(entry.strip()) if isinstance(entry, str) else None
    if match is None:
        raise MappingError(
            f"params: expected a {side} name such as 'weight' or 'weight[0:64]', got {entry!r}; name a parameter."
        )
    # A path may itself end in brackets.
    whole = match.string
    for name, ranges in ((whole, None), (match["name"], match["ranges"])):
        if len(found := _spelled(name, specs)) == 1:
            return found[0], ranges
    raise _unknown(match["name"], side, specs, _spelled(match["name"], specs))


def parsed_ranges(text: str | None, entry: object) -> list[slice | int]:
    """Read `0:64, :, 3`.

    Raises:
        MappingError: if that is no list of ranges and indices.
    """
    boxes: list[slice | int] = []
    for part in [] if text is None else text.split(","):
        bounds = re.match(r"^\s*(-?\d+)?\s*(:)?\s*(-?\d+)?\s*$", part)
        if bounds is None or not part.strip() or (bounds[2] is None and bounds[3] is not None):
            raise MappingError(
                f"params: expected ranges such as [0:64], [:, 2:4] or [3], got {entry!r}; write start:stop."
            )
        start, stop = (None if bound is None else int(bound) for bound in bounds.group(1, 3))
        boxes.append(slice(start, stop) if bounds[2] or start is None else start)
    return boxes


def _block(entry: object, side: str, specs: Specs) -> Block:
    name, text = split_entry(entry, side, specs)
    full = specs[name].value.shape
    boxes = parsed_ranges(text, entry)
    if len(boxes) > len(full):
        raise MappingError(f"params: expected at most {len(full)} ranges for {name} of shape {full}, got {entry!r}.")
    shape = []
    for axis, box in enumerate(boxes):
        length = full[axis]
        if isinstance(box, int):
            if not -length <= box < length:
                raise MappingError(
                    f"params: expected an index below {length} on axis {axis} of {name}, got {entry!r}; its shape is "
                    f"{full}."
                )
            boxes[axis] = box % length
            continue
        stop = length if box.stop is None else box.stop
        start = box.start or 0
        if not 0 <= start < stop <= length:
            raise MappingError(
                f"params: expected a range inside 0:{length} on axis {axis} of {name}, got {entry!r}; "
                f"its shape is {full}."
            )
        boxes[axis] = slice(start, stop)
        shape.append(stop - start)
    return Block(name, tuple(boxes), (*shape, *full[len(boxes) :]))


def terms_of(entry: object, side: str, specs: Specs) -> tuple[list[tuple[float, Block]], float]:
    """Return factors and blocks, and the constant, of `1 + scale`, `bias_ih + bias_hh`, `-bias`, or of one name.

    Raises:
        MappingError: if there is no such array, or no such block of it.
    """
    words = (
        re.split(r"\s+([+-])\s+", entry.strip()) if isinstance(entry, str) and not _spelled(entry, specs) else [entry]
    )
    terms: list[tuple[float, Block]] = []
    offset = 0.0
    for sign, word in zip(["+", *words[1::2]], words[::2], strict=True):
        factor = -1.0 if sign == "-" else 1.0
        if isinstance(word, str) and not _spelled(word, specs):
            if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?", word):
                offset += factor * float(word)
                continue
            product = re.match(r"^(?:(-)\s*)?(?:(\d+\.?\d*|\.\d+)\s*\*\s*)?(.+)$", word)
            if product is not None and (product[1] or product[2]):
                factor *= (-1.0 if product[1] else 1.0) * float(product[2] or 1)
                word = product[3]
        terms.append((factor, _block(word, side, specs)))
    if not terms:
        raise MappingError(f"params: expected a {side} name, got the number {entry!r}; name a parameter.")
    return terms, offset


def _few_bits(number: float, bits: int) -> bool:
    fraction = math.frexp(number)[0] * 2.0**bits
    return math.isfinite(number) and fraction == int(fraction)


def _check_expression(terms: Sequence[tuple[float, Block]], offset: float, specs: Specs, text: str) -> None:
    for factor, _ in terms:
        if factor == 0 or not _few_bits(factor, 1):
            raise MappingError(
                f"params: expected factors that are powers of two, which round nothing, got {factor:g} in {text}; "
                "multiply in a wrapper of the module."
            )
    if not _few_bits(offset, _MOST_BITS):
        raise MappingError(
            f"params: expected a constant of at most {_MOST_BITS} binary digits such as 1 or -0.5, got {offset:g} in "
            f"{text}; add it in a wrapper of the module."
        )
    if len(shapes := {block.shape for _, block in terms}) > 1:
        raise MappingError(f"params: expected terms of one shape, got {' and '.join(map(str, shapes))} in {text}.")
    for _, block in terms:
        if not is_inexact(specs[block.name].value):
            raise MappingError(f"params: expected real or complex numbers, got integers of {block.name} in {text}.")


def links_of(rule: Rule, torch: Specs, flax: Specs) -> list[Link]:
    """Return the links of one rule, one for every block of its expression.

    Raises:
        MappingError: if the rule cannot be read, or does not fit the shapes and types.
    """
    parts = list(rule) if isinstance(rule, tuple | list) else []
    how = parts.pop() if len(parts) > 2 and parts[-1] in (KEEP, TIED) else ""
    if not 2 <= len(parts) <= 4 or (len(parts) == 4 and not isinstance(parts[3], Mapping)):
        raise MappingError(
            "params: expected (torch name, flax path, axis pattern) with an optional dict of lengths, and 'keep' where "
            f"the values stay as they are or 'tied' where an array is mapped before, got {rule!r}."
        )
    torch_entry, flax_entry, pattern, lengths = [*parts, None, None][:4]
    keep, pattern = how == KEEP, pattern or ""
    shown = [pattern, *([how] if how else [])] if pattern or not keep else [how]
    text = f"({torch_entry!r}, {flax_entry!r}, {', '.join(map(repr, shown))})"
    if torch_entry is None or flax_entry is None:
        if (torch_entry is None) == (flax_entry is None) or how == TIED or pattern != ("" if keep else ZERO):
            raise MappingError(
                f"params: expected a counterpart, or None and '{ZERO}' for a block that is held at zero, '{KEEP}' for "
                f"one that stays as it is, got {text}."
            )
        held_torch = None if torch_entry is None else _block(torch_entry, "torch", torch)
        return [Link(held_torch, None if flax_entry is None else _block(flax_entry, "flax", flax), None, text, keep)]
    if not isinstance(pattern, str):
        raise MappingError(f"params: expected an axis pattern such as 'o i -> i o', got {pattern!r} in {text}.")
    left, torch_offset = terms_of(torch_entry, "torch", torch)
    right, flax_offset = terms_of(flax_entry, "flax", flax)
    plainly = [
        terms == [(1.0, terms[0][1])] and not offset for terms, offset in ((left, torch_offset), (right, flax_offset))
    ]
    expression = "" if all(plainly) else "flax" if plainly[0] else "torch"
    if expression:
        if how or not any(plainly):
            raise MappingError(
                f"params: expected a sum or product on one side and a name on the other, without 'keep' or 'tied', got "
                f"{text}."
            )
        _check_expression(*((left, torch_offset, torch) if plainly[1] else (right, flax_offset, flax)), text)
    try:
        axes = AxisPattern(pattern, left[0][1].shape, right[0][1].shape, lengths)
    except MappingError as error:
        raise MappingError(f"params: {text}: {error}") from None
    found = []
    for part, ((first, here), (second, there)) in enumerate(itertools.product(left, right)):
        _check_alike(torch[here.name], flax[there.name], text, bool(expression) or how == TIED)
        found.append(
            Link(
                *(here, there, axes, text, keep, TIED * (how == TIED), expression),
                *(first * second, torch_offset + flax_offset, part),
            )
        )
    return found


def _check_alike(first: ParameterSpec, second: ParameterSpec, text: str, parameters: bool) -> None:
    dtypes = first.value.dtype, second.value.dtype
    # Integers of different widths hold the same numbers: torch's are int64, JAX's int32 unless told otherwise.
    if dtypes[0] != dtypes[1] and not all(dtype.kind in "iu" for dtype in dtypes):
        raise MappingError(f"params: expected one dtype on both sides of {text}, got {dtypes[0]} and {dtypes[1]}.")
    if first.trainable and not second.trainable:
        raise MappingError(
            f"params: expected parameters on both sides of {text} or buffers on both, got a parameter and a buffer; "
            "freeze the torch parameter (requires_grad=False), or make the flax one a parameter."
        )
    if parameters and not all(spec.trainable or spec.frozen for spec in (first, second)):
        raise MappingError(f"params: expected parameters on both sides of {text}, got {first.kind} and {second.kind}.")
