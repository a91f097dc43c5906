"""Search for the likely cause of a mismatch: try known mistakes in turn, the common ones first; those of parameters."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    # The layer's own judge comes here too, which works without what pairs need (einops).
    from parity_tests.pair.side import Arrays

_MOST_BLOCKS = 4  # gates of an LSTM
_MOST_HEADS = 16


def first_confirmed(
    hypotheses: Iterable[tuple[str, Callable[[], bool]]],
    most: int | None = None,
    passed_over: tuple[type[Exception], ...] = (),
) -> str:
    """Return the sentence of the first hypothesis whose test holds; empty if none does.

    Args:
        hypotheses: sentences, each with a test whether that mistake gives what was observed.
        most: number of hypotheses to stop after; None for all.
        passed_over: exceptions that a test raises where its hypothesis does not apply.
    """
    for sentence, holds in itertools.islice(hypotheses, most):
        try:
            if holds():
                return sentence
        except passed_over:
            continue
    return ""


def _submodules(arrays: "Arrays") -> tuple[dict[str, dict[str, str]], dict[str, tuple]]:
    """Return by submodule its parameters by their names within it, and what those of equal modules have in common."""
    groups: dict[str, dict[str, str]] = {}
    for name in arrays:
        parts = name.split(".")
        for depth in range(len(parts)):
            groups.setdefault(".".join(parts[:depth]), {})[".".join(parts[depth:])] = name
    signature = {
        prefix: tuple(sorted((leaf, arrays[name].shape) for leaf, name in leaves.items()))
        for prefix, leaves in groups.items()
    }
    return groups, signature


def borrowed(arrays: "Arrays", near: Collection[str]) -> Iterator[tuple[str, str, "Arrays"]]:
    """Give a submodule the parameters of another: the one nearby whose place another took, the other, the values."""
    groups, signature = _submodules(arrays)
    for own, leaves in groups.items():
        for other in groups if own and all(name in near for name in leaves.values()) else ():
            if other != own and signature[other] == signature[own]:
                yield own, other, {name: arrays[groups[other][leaf]] for leaf, name in leaves.items()}


def exchanges(arrays: "Arrays") -> Iterator[tuple[str, str, "Arrays"]]:
    """Exchange two submodules with the same parameters, the large ones first, or two parameters of the same shape."""
    groups, signature = _submodules(arrays)
    for first, second in itertools.combinations(sorted(groups, key=lambda prefix: prefix.count(".")), 2):
        if signature[first] == signature[second]:
            pairs = [(groups[first][leaf], groups[second][leaf]) for leaf in groups[first]]
            swapped = {a: arrays[b] for a, b in pairs} | {b: arrays[a] for a, b in pairs}
            yield first or "the top module", second or "the top module", swapped
    for a, b in itertools.combinations(arrays, 2):
        if arrays[a].shape == arrays[b].shape:
            yield a, b, {a: arrays[b], b: arrays[a]}


def block_orders(arrays: "Arrays") -> Iterator[tuple[tuple[int, ...], str, "Arrays"]]:
    """Permute equal blocks along the first axis, in all parameters whose first axis is the same."""
    by_length: dict[int, list[str]] = {}
    for name, array in arrays.items():
        if array.ndim:
            by_length.setdefault(array.shape[0], []).append(name)
    for length, names in by_length.items():
        for count in range(2, _MOST_BLOCKS + 1):
            if length % count or length == count:
                continue
            for order in itertools.islice(itertools.permutations(range(count)), 1, None):
                blocks = {name: np.split(arrays[name], count) for name in names}
                changed = {name: np.concatenate([blocks[name][k] for k in order]) for name in names}
                yield order, ", ".join(names), changed


def head_orders(arrays: "Arrays") -> Iterator[tuple[str, "Arrays"]]:
    """Split the outputs of projections into heads the other way round: features first."""
    projections = {name: array for name, array in arrays.items() if array.ndim and array.shape[0] > 1}
    groups = [
        [n for n, a in projections.items() if len(a) == width] for width in {len(a): 0 for a in projections.values()}
    ]
    # A rule may have split the weights alone the other way round.
    groups += [alone for names in groups if (alone := [n for n in names if projections[n].ndim > 1]) not in ([], names)]
    for names in groups:
        width = len(projections[names[0]])
        for blocks, heads in itertools.product((1, 3, 2), range(2, _MOST_HEADS + 1)):
            if width % (blocks * heads) or width == blocks * heads:
                continue
            changed = {}
            for name in names:
                split = arrays[name].reshape(blocks, width // (blocks * heads), heads, *arrays[name].shape[1:])
                changed[name] = split.swapaxes(1, 2).reshape(arrays[name].shape)
            sentence = (
                f"head order: the flax side splits what {', '.join(names)} make into features times {heads} heads"
            )
            yield f"{sentence}, the torch side into heads times features", changed
