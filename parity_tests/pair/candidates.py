"""Candidates for a proposed mapping: arrays of repeated layers as one, and what fits what by shape and by name."""

import difflib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from parity_tests.pair.side import ParameterSpec

Shape = tuple[int, ...]
_SAME_LEAF = (
    {"weight", "kernel", "scale", "embedding", "w"},
    {"bias", "b"},
    {"running_mean", "mean"},
    {"running_var", "var"},
)
_KERNELS = ("kernel", "w")  # inputs first; Equinox's "weight" is laid out as torch's
_SYNONYMS = {"q": "query", "k": "key", "v": "value", "proj": "", "norm": "layernorm", "fc": "dense", "linear": "dense"}
_SYNONYMS |= {"params": "", "~": "", "batch": "", "stats": ""}
_AXES = "abcdefg"
# In the order in which torch stores them one after the other.
_BLOCKS = (("query", "key", "value"), ("r", "z", "n"), ("i", "f", "g", "o"))
_MOST_COMBINATIONS = 20  # of arrays of one shape that a fused one may hold


@dataclass(frozen=True)
class Unit:
    """One array, or the arrays of repeated layers, which differ in one number of their names."""

    entry: str  # the name, with `{k}` in the place of the number
    members: tuple[str, ...]  # names, in the order of the number
    shape: Shape  # of each
    spec: ParameterSpec = field(compare=False)  # of the first


@dataclass(frozen=True)
class Candidate:
    """A way to map one torch unit."""

    torch: tuple[Unit, ...]  # the unit
    flax: tuple[Unit, ...]  # the units that it may be; several for a fused array
    entries: tuple[tuple[str, str], ...]  # pairs of a torch and a flax entry
    patterns: tuple[str, ...]  # from the former to the latter, the conventional one first
    score: float  # likeness of the names
    certain: bool  # whether the names say so
    fused: str = ""  # the side on which one array holds several, or empty

    @functools.cached_property
    def members(self) -> frozenset[str]:
        """Return the arrays that this takes, with their sides."""
        sides = {"torch": self.torch, "flax": self.flax}
        return frozenset(f"{side} {name}" for side, found in sides.items() for unit in found for name in unit.members)


def units(specs: Mapping[str, ParameterSpec]) -> list[Unit]:
    """Join the arrays that differ in the first number of their names only, where the numbers are evenly spaced."""
    groups: dict[tuple, dict[int, str]] = {}
    for name, spec in specs.items():
        if match := re.search(r"\d+", name):
            kind = (spec.value.shape, str(spec.value.dtype), spec.trainable, spec.frozen)
            key = (name[: match.start()], name[match.end() :], *kind)
            groups.setdefault(key, {})[int(match[0])] = name
    joined: dict[str, Unit] = {}
    for (head, tail, *_), found in groups.items():
        numbers = sorted(found)
        steps = set(np.diff(numbers).tolist())
        if len(numbers) < 2 or len(steps) > 1:
            continue
        (step,), first = steps, numbers[0]
        place = f"{{{f'{step}*' * (step > 1)}k{f'+{first}' * (first > 0)}}}"
        members = tuple(found[number] for number in numbers)
        unit = Unit(f"{head}{place}{tail}", members, specs[members[0]].value.shape, specs[members[0]])
        joined |= dict.fromkeys(members, unit)
    alone = {name: Unit(name, (name,), spec.value.shape, spec) for name, spec in specs.items()}
    return list(dict.fromkeys((alone | joined).values()))


@functools.cache
def words(name: str) -> tuple[str, ...]:
    """Return the meaningful words of a name before the last one, numbers and templates among them."""
    parts = [part for part in re.split(r"[._/\[\]]+", re.sub(r"\{[^}]*\}", ".#.", name.lower())) if part]
    split = [piece for part in parts[:-1] for piece in re.findall(r"#|\d+|[^\d#]+", part)]
    return tuple(word for word in (_SYNONYMS.get(piece, piece) for piece in split) if word)


def leaf(name: str) -> str:
    """Return the last word of a name."""
    return re.split(r"[./]", name)[-1]


def _is_called(leaf: str, kind: str) -> bool:
    """Tell whether a name such as `weight_ih` or `in_proj_bias` is of a kind; single letters are whole names."""
    return kind in leaf if len(kind) > 1 else kind == leaf


def same_leaf(torch: str, flax: str) -> bool:
    """Tell whether two arrays are of one kind, as torch's weight and Flax's kernel."""
    first, second = leaf(torch), leaf(flax)
    return any(any(_is_called(first, kind) for kind in kinds) and second in kinds for kinds in _SAME_LEAF)


def _gate(torch: str, owners: Sequence[str]) -> bool:
    """Tell whether torch's `_ih` or `_hh` meets Flax's `ii`, `dense_i`, ... or `hi`, `dense_h`, ..."""
    kind = "i" if "_ih" in leaf(torch) else "h" if "_hh" in leaf(torch) else ""
    return bool(kind) and all(re.fullmatch(rf"(dense_)?{kind}\w?_?", owner) for owner in owners)


def _owner(path: str) -> str:
    parts = re.split(r"[./]", path)
    return parts[-2] if len(parts) > 1 else path


def _likeness(torch: str, flax: Sequence[str]) -> tuple[float, bool]:
    first = words(torch)
    letters = [difflib.SequenceMatcher(None, " ".join(first), " ".join(words(path))).ratio() for path in flax]
    same = all(same_leaf(torch, path) for path in flax)
    certain = same and (_gate(torch, [_owner(path) for path in flax]) or (len(flax) == 1 and first == words(flax[0])))
    return 2.0 * same + sum(letters) / len(letters) + certain, certain


def _fit(torch: ParameterSpec, flax: ParameterSpec) -> bool:
    """Tell whether the one may be the other: a frozen parameter may be a buffer elsewhere."""
    numbers = [spec.value.dtype.kind in "iub" for spec in (torch, flax)]
    return numbers[0] == numbers[1] and (torch.frozen or torch.trainable == flax.trainable)


@functools.cache
def patterns(source: Shape, target: Shape, kernel: bool, same_layout: bool = False) -> tuple[str, ...]:
    """Return patterns that take one shape to the other, the conventional one first.

    Args:
        source: torch's.
        target: flax's.
        kernel: whether flax's array has its inputs before its outputs.
        same_layout: whether torch's has so, too.
    """
    found: list[tuple[int, str]] = []
    axes = list(range(len(target)))
    # Flax kernels begin with the window, then the inputs, and end with the outputs; torch weights begin with the
    # outputs, then the inputs: a rotation, or with a window of its own this order; transposed, inputs first.
    usual = [*(axes[k:] + axes[:k] for k in range(1, len(axes))), axes[-1:] + axes[-2:-1] + axes[:-2]]
    if len(source) == len(target) > 2:
        usual = [usual[-1], axes[-2:] + axes[:-2]]
    if same_layout:
        usual = [axes]
    for permutation in itertools.permutations(range(len(target))):
        # The torch axes, in order, made of runs of the permuted flax axes.
        for groups in _grouped([target[k] for k in permutation], source):
            names = iter(permutation)
            members = [[_AXES[next(names)] for _ in group] for group in groups]
            left = " ".join(axes[0] if len(axes) == 1 else f"({' '.join(axes)})" for axes in members)
            rank = usual.index(list(permutation)) if kernel and list(permutation) in usual else len(usual) * kernel
            found.append((rank, f"{left} -> {' '.join(_AXES[: len(target)])}"))
    found.sort(key=lambda entry: entry[0])
    same = f"{' '.join(_AXES[: len(target)])} -> {' '.join(_AXES[: len(target)])}"
    return tuple("" if pattern == same else pattern for _, pattern in found)


def _grouped(sizes: Sequence[int], source: Sequence[int]) -> Iterator[list[list[int]]]:
    """Split `sizes` into consecutive runs whose products are `source`."""
    if not source:
        if not sizes:
            yield []
        return
    product = 1
    for count in range(1, len(sizes) - len(source) + 2):
        product *= sizes[count - 1]
        if product == source[0]:
            for rest in _grouped(sizes[count:], source[1:]):
                yield [list(sizes[:count]), *rest]


def _stacked(unit: Unit, count: int) -> Iterator[tuple[str, Shape]]:
    """Yield the ways to take one of `count` layers out of an array: an entry and the shape of the layer."""
    for axis, size in enumerate(unit.shape):
        if size == count and len(unit.members) == 1:
            yield f"{unit.entry}[{':, ' * axis}{{k}}]", (*unit.shape[:axis], *unit.shape[axis + 1 :])


def _layer_by_layer(torch: Unit, flax: Unit) -> Iterator[tuple[str, str, Shape, Shape, bool]]:
    """Yield entries and shapes of corresponding layers, and whether torch's is a stack."""
    if len(torch.members) == len(flax.members):
        yield torch.entry, flax.entry, torch.shape, flax.shape, False
    elif len(flax.members) == 1:
        for entry, shape in _stacked(flax, len(torch.members)):
            yield torch.entry, entry, torch.shape, shape, False
    elif len(torch.members) == 1:
        for entry, shape in _stacked(torch, len(flax.members)):
            yield entry, flax.entry, shape, flax.shape, True


def candidates(torch: Sequence[Unit], flax: Sequence[Unit]) -> Iterator[Candidate]:
    """Yield every way in which a torch unit may be one or several flax units, or one of several in a flax unit."""
    for first in torch:
        for second in flax:
            ways = _layer_by_layer(first, second) if _fit(first.spec, second.spec) else ()
            for left, right, source, target, stack in ways:
                found = patterns(source, target, leaf(second.entry) in _KERNELS, stack)
                if found:
                    score, certain = _likeness(first.entry, [second.entry])
                    yield Candidate((first,), (second,), ((left, right),), found, score, certain)
                    break
        for chosen in _families(first, flax):
            yield from _fused_in_torch(first, chosen)
    for second in flax:
        for chosen in _families(second, torch):
            yield from _fused_in_flax(chosen, second)


def _families(whole: Unit, others: Sequence[Unit]) -> Iterator[tuple[Unit, ...]]:
    """Yield arrays of one owner, shape and name that one array may hold one after the other."""
    families: dict[tuple, list[Unit]] = {}
    for unit in others:
        fits = _fit(whole.spec, unit.spec) or _fit(unit.spec, whole.spec)
        if fits and len(unit.members) == len(whole.members) and unit.shape and whole.shape:
            parent = re.split(r"[./]", unit.entry)[:-2]
            families.setdefault((leaf(unit.entry), unit.shape, *parent), []).append(unit)
    for (_, shape, *_), found in families.items():
        count, rest = divmod(whole.spec.value.size, max(int(np.prod(shape)), 1))
        if rest or not 2 <= count <= 4 or count > len(found):
            continue
        combinations = list(itertools.islice(itertools.combinations(found, count), _MOST_COMBINATIONS + 1))
        if len(combinations) > _MOST_COMBINATIONS:
            letters = {letter: [u for u in found if _owner(u.entry).startswith(letter)] for letter in "ih"}
            combinations = [tuple(group) for group in letters.values() if len(group) == count]
        yield from combinations


def _fused_in_torch(whole: Unit, chosen: tuple[Unit, ...]) -> Iterator[Candidate]:
    length, rest = divmod(whole.shape[0], len(chosen))
    found = () if rest else patterns((length, *whole.shape[1:]), chosen[0].shape, leaf(chosen[0].entry) in _KERNELS)
    if found:
        ordered = in_order(chosen)
        score, certain = _likeness(whole.entry, [unit.entry for unit in ordered])
        certain = certain or _are_known(ordered)
        entries = [(f"{whole.entry}[{length * k}:{length * (k + 1)}]", unit.entry) for k, unit in enumerate(ordered)]
        yield Candidate((whole,), ordered, tuple(entries), found, score, certain, "torch")


def _fused_in_flax(chosen: tuple[Unit, ...], whole: Unit) -> Iterator[Candidate]:
    ordered = in_order(chosen)
    # An axis of its own, else the last one that can be divided.
    for axis in sorted(range(len(whole.shape)), key=lambda axis: (whole.shape[axis] != len(chosen), -axis)):
        length, rest = divmod(whole.shape[axis], len(chosen))
        target = (*whole.shape[:axis], *(() if length == 1 else (length,)), *whole.shape[axis + 1 :])
        found = () if rest else patterns(chosen[0].shape, target, leaf(whole.entry) in _KERNELS)
        if found:
            boxes = [f"{k}" if length == 1 else f"{length * k}:{length * (k + 1)}" for k in range(len(chosen))]
            entries = [(u.entry, f"{whole.entry}[{':, ' * axis}{b}]") for u, b in zip(ordered, boxes, strict=True)]
            score = sum(_likeness(unit.entry, [whole.entry])[0] for unit in chosen) / len(chosen)
            certain = _are_known(ordered) and all(same_leaf(unit.entry, whole.entry) for unit in chosen)
            yield Candidate(ordered, (whole,), tuple(entries), found, score, certain, "flax")
            return


def in_order(chosen: tuple[Unit, ...]) -> tuple[Unit, ...]:
    """Order units as such blocks are stored, if their names are known ("query", or "hz")."""
    places = _places(chosen)
    return tuple(chosen[k] for k in sorted(range(len(chosen)), key=places.__getitem__)) if places else chosen


def _are_known(chosen: tuple[Unit, ...]) -> bool:
    """Tell whether units are the query, key and value of one attention."""
    return bool(places := _places(chosen)) and len(places) == 3 and _owner(chosen[0].entry)[-1:] not in "rzn"


def _places(chosen: tuple[Unit, ...]) -> list[int]:
    owners = [_owner(unit.entry).rstrip("_").removesuffix("_proj") for unit in chosen]
    owners = [_SYNONYMS.get(owner, owner) for owner in owners]
    for blocks in _BLOCKS:
        places = [next((k for k, block in enumerate(blocks) if owner.endswith(block)), -1) for owner in owners]
        if -1 not in places and len(set(places)) == len(places):
            return places
    return []
