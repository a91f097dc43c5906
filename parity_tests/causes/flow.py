"""Search for numbers that go another way on the flax side: a loop from its other end, a value in the place of another.

What is found is a hypothesis like any other, which `place` proves or drops.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from parity_tests.causes.formulas import same_numbers
from parity_tests.causes.selections import Hypothesis
from parity_tests.pair.localisation import Search, Segment, arrangements, walked
from parity_tests.pair.trace import ARGUMENT, REVERSED, VIEWS, Change, Trace, before_views

_FEWEST_TURNS = 3  # of a loop: the gates of a cell and query, key and value are none
_MOST_TURNS = 200
_MOST_OTHERS = 8  # values that are tried in the place of another
_APART = ("select", "slice", "unbind", "split", "chunk", "narrow", "split_with_sizes")
_JOINED = ("stack", "cat")
# Of these only the shape of what they read counts.
_OF_SHAPE = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
_COPIES = ("clone", "_to_copy", "lift_fresh")
# What reads a part: step, position among what it reads, number of the value
Reader = tuple[int, int, int]


def cut_short(search: Search) -> Iterator[Hypothesis]:
    """Return what the torch side has before its last operations, where that is what Flax returns."""
    trace, producers, changes, words = search.torch, search.torch.producers(), [], []
    behind = _counterparts(search)
    for name in search.failed:
        own, other = trace.results.get(name), search.flax.results.get(name)
        root = None if own is None else next(before_views(trace, [own]))
        earlier = behind.get(-1 if other is None else other, ())
        if root is None or root not in producers or not earlier:
            return
        array = search.array("torch", earlier[0])
        if array is None or array.size != trace.sizes[root]:
            return
        step = producers[root]
        changes.append(Change(step, "", trace.steps[step].writes.index(root), array.reshape(trace.shapes[root])))
        left = sorted(walked(trace, [root], {*earlier}))
        turn = producers.get(next(before_views(trace, earlier[:1])))
        if turn is not None and _site(trace, turn) == _site(trace, step):
            words.append(f"turns: the flax side returns what the loop at {_line(trace, step)} has some turns earlier")
        else:
            shown = ", ".join(dict.fromkeys(trace.steps[k].operation for k in left if _is_own(trace, k)))
            words.append(
                f"missing: the flax side returns {told(trace, earlier[0])}, and leaves out what the torch side goes on "
                f"with ({shown})"
            )
    if changes:
        yield "; ".join(dict.fromkeys(words)), changes, ()


def told(trace: Trace, value: int) -> str:
    """Say what a value is: where it was made."""
    root, producers = next(before_views(trace, [value])), trace.producers()
    while root in producers and trace.steps[producers[root]].operation in _COPIES:
        root = next(before_views(trace, trace.steps[producers[root]].reads[:1]))
    if name := next((name for name, number in trace.sources.items() if number == root), ""):
        kind, _, rest = name.partition(":")
        return f"{kind} {rest}" if kind in ("input", "parameter") else "a constant"
    step = producers[root]
    if not any(trace.steps[k].reads for k in walked(trace, [root], set())):
        return f"a constant ({trace.steps[step].operation})"
    return f"the result of {trace.steps[step].operation} in {_line(trace, step)}"


def _line(trace: Trace, step: int) -> str:
    found = trace.steps[step]
    return found.module + (f" ({found.line})" if found.line else "") if found.module else found.line or "the top module"


def _site(trace: Trace, step: int) -> tuple[str, str, str]:
    found = trace.steps[step]
    return found.operation, found.module, found.line


def _is_own(trace: Trace, step: int) -> bool:
    return trace.steps[step].operation not in VIEWS


def _counterparts(search: Search) -> dict[int, list[int]]:
    """Return torch's values by Flax's."""
    found: dict[int, list[int]] = {}
    for number, others in search.matches.items():
        for other in others:
            found.setdefault(other, []).append(number)
    return found


def read_instead(search: Search, segment: Segment) -> Iterator[Hypothesis]:
    """Let operations read a value that Flax reads there and torch does not, in the place of one that Flax does not."""
    trace, behind = search.torch, _counterparts(search)
    inside = segment.behind or segment.torch
    read = dict.fromkeys(v for step in inside for v in trace.steps[step].reads if v in search.matches)
    used = dict.fromkeys(v for step in segment.flax for v in search.flax.steps[step].reads if v in behind)
    known = {other for number in read for other in search.matches[number]}
    # Of the values with one fingerprint the last is meant: an input may pass through views, and be put in anew.
    others = dict.fromkeys(behind[other][-1] for other in used if other not in known)
    spare = [number for number in read if not used.keys() & {*search.matches[number]}] or [*read]
    for number, other in itertools.islice(itertools.product(spare, others), _MOST_OTHERS * 4):
        own, array = search.array("torch", number), search.array("torch", other)
        if own is None or array is None or trace.parameter(number) or own.size < 2 or own.size != array.size:
            continue
        readers = [
            (step, trace.steps[step].reads.index(number)) for step in inside if number in trace.steps[step].reads
        ]
        what = f"{told(trace, other)} on the flax side, not {told(trace, number)}"
        seen = {own.tobytes()}
        for each in itertools.islice(arrangements(array, own.shape), _MOST_OTHERS):
            if each.tobytes() in seen:
                continue
            seen.add(each.tobytes())
            for some in (readers, readers[:1])[: len(readers)]:
                where = _line(trace, some[0][0])
                operation = trace.steps[some[0][0]].operation
                yield (
                    f"input: {operation} in {where} reads {what}",
                    [Change(step, ARGUMENT, position, each) for step, position in some],
                    (),
                )


def turned_loops(search: Search, segment: Segment) -> Iterator[Hypothesis]:
    """Give each turn of a loop what the mirrored turn reads, and join what the turns make in the other order."""
    trace, parts = search.torch, _parts(search.torch)
    inside = _reached(trace, segment.behind or segment.torch, {piece for pieces in parts.values() for piece in pieces})
    found: dict[tuple[int, ...], list[tuple[int, int, dict[int, list[Reader]]]]] = {}
    for root, axis, turns in _taken_apart(search, parts, inside):
        found.setdefault(tuple(sorted(turns)), []).append((root, axis, turns))
    for indices, loops in found.items():
        for chosen in (indices, indices[1:], indices[:-1]):
            changes: list[Change] = []
            for _, _, turns in loops if len(chosen) >= _FEWEST_TURNS else ():
                changes += _mirrored(search, [turns[k] for k in chosen])
            if not changes:
                continue
            joins = [
                step
                for step in sorted(inside)
                if trace.steps[step].operation in _JOINED and len(trace.steps[step].reads) == len(chosen)
            ]
            root, axis, _ = loops[0]
            sentence = (
                f"order: the loop over axis {axis} of {told(trace, root)} runs from its other end on the flax side "
                "(reversed in time)"
            )
            yield sentence, [*changes, *(Change(step, REVERSED) for step in joins)], ()
            if joins:
                yield f"{sentence}, and its results stay in that order", changes, ()


def _parts(trace: Trace) -> dict[int, list[int]]:
    """Return the smaller views that values are taken apart into."""
    producers, parts = trace.producers(), {}
    for step in trace.steps:
        if step.operation in _APART and len(step.reads) == 1:
            root = step.reads[0]
            while root in producers and trace.steps[producers[root]].operation in VIEWS:
                before = trace.steps[producers[root]].reads
                if len(before) != 1 or trace.shapes[before[0]] != trace.shapes[root]:
                    break
                root = before[0]
            parts.setdefault(root, []).extend(v for v in step.writes if trace.sizes[v] < trace.sizes[root])
    return {root: pieces for root, pieces in parts.items() if _FEWEST_TURNS <= len(pieces) <= 4 * _MOST_TURNS}


def _reached(trace: Trace, steps: Collection[int], ends: Collection[int]) -> set[int]:
    """Return steps with all that come before them, back to some values: what two turns compute alike agrees."""
    producers, reached, left = trace.producers(), set(steps), [v for step in steps for v in trace.steps[step].reads]
    while left:
        value = left.pop()
        step = producers.get(value)
        if value not in ends and step is not None and step not in reached:
            reached.add(step)
            left += trace.steps[step].reads
    return reached


def _taken_apart(
    search: Search, parts: Mapping[int, Sequence[int]], inside: Collection[int]
) -> Iterator[tuple[int, int, dict[int, list[Reader]]]]:
    """Yield the values that are taken apart along an axis for the turns of a loop: number, axis, readers by index."""
    readers = _readers(search.torch, inside)
    for root, pieces in parts.items():
        array = search.array("torch", root)
        for axis in () if array is None else range(array.ndim):
            assert array is not None
            if not _FEWEST_TURNS <= array.shape[axis] <= _MOST_TURNS:
                continue
            turns: dict[int, list[Reader]] = {}
            for piece in pieces:
                index = _index(search, array, axis, piece)
                if index is not None and (used := readers(piece)):
                    turns.setdefault(index, []).extend(used)
            if len(turns) >= _FEWEST_TURNS:
                yield root, axis, {index: sorted(used) for index, used in turns.items()}
                break


def _index(search: Search, array: np.ndarray, axis: int, piece: int) -> int | None:
    """Return which slice along an axis a value is."""
    own = search.array("torch", piece)
    if own is None or own.size * array.shape[axis] != array.size:
        return None
    slices = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    rest = tuple(n for k, n in enumerate(array.shape) if k != axis)
    if tuple(n for n in own.shape if n > 1) != tuple(n for n in rest if n > 1):
        return None
    alike = np.flatnonzero((slices == own.ravel()).all(axis=1))
    return int(alike[0]) if len(alike) == 1 else None


def _readers(trace: Trace, inside: Collection[int]):
    """Return a function that gives what reads a value, or a view of it, within some steps."""
    by_value: dict[int, list[int]] = {}
    for number, step in enumerate(trace.steps):
        for value in step.reads:
            by_value.setdefault(value, []).append(number)

    def readers(value: int) -> list[Reader]:
        found = []
        for step in by_value.get(value, ()):
            if trace.steps[step].operation in VIEWS:
                found += [reader for view in trace.steps[step].writes for reader in readers(view)]
            elif step in inside and trace.steps[step].operation not in _OF_SHAPE:
                found.append((step, trace.steps[step].reads.index(value), value))
        return found

    return readers


def _mirrored(search: Search, turns: Sequence[list[Reader]]) -> list[Change]:
    """Let each turn read what its mirror image reads; nothing if the turns are not alike."""
    trace, changes = search.torch, []

    def kinds(readers: Sequence[Reader]) -> list[tuple]:
        return [(*_site(trace, step), position, trace.shapes[value]) for step, position, value in readers]

    if any(kinds(turn) != kinds(turns[0]) for turn in turns):
        return []
    for turn, other in zip(turns, turns[::-1], strict=True):
        for (step, position, _), (_, _, value) in zip(turn, other, strict=True):
            array = search.array("torch", value)
            if array is None:
                return []
            changes.append(Change(step, ARGUMENT, position, array))
    return changes


def goes_on(search: Search) -> str:
    """Say that Flax has torch's results, and what it does to them then; empty if that is not so."""
    flax, producers = search.flax, search.flax.producers()
    words = []
    for name in search.failed:
        own, other = search.torch.results.get(name), flax.results.get(name)
        same = search.matches.get(-1 if own is None else own, [])
        if other is None or not same or other in same or own is None:
            return ""
        first, second = search.array("torch", own), search.array("jax", same[-1])
        steps = walked(flax, [other], {*same})
        if first is None or second is None or not same_numbers(first.ravel(), second.ravel()) or not steps:
            return ""
        shown = ", ".join(dict.fromkeys(flax.steps[k].operation for k in sorted(steps) if _is_own(flax, k)))
        where = _line(flax, min(steps))
        if not any({*flax.steps[k].reads} & {*same} for k in steps) or producers[other] not in steps:
            return ""
        words.append(f"extra: the flax side has the torch side's {name} too, and goes on with {shown} in {where}")
    return "; ".join(dict.fromkeys(words))
