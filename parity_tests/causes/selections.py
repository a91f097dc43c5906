"""Search for what one side selects otherwise: another mask, other rows of a table, a value in another's place.

Masks and rows are recovered from Flax's values. What is found is a hypothesis like any other, which `place` proves or
drops.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from parity_tests.causes.formulas import equal, formulas, written
from parity_tests.judge.dtypes import FORMATS, is_complex
from parity_tests.pair.localisation import Search, Segment, arrangements
from parity_tests.pair.trace import ARGUMENT, LARGEST, TIMES, VIEWS, Change

# A sentence, changes, and the operations whose results must be among Flax's values where not all results agree.
Hypothesis = tuple[str, Sequence[Change], Sequence[int]]
_MOST_OTHERS = 60  # values of the flax side that are looked at
_MOST_BEFORE = 8  # operations before what a segment reads
_MOST_CELLS = 2**22  # comparisons of rows with a table


def selected(search: Search, segment: Segment, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Yield hypotheses about masks, about rows of tables, and about a number that several operations use."""
    others = [v for step in segment.flax for v in search.flax.steps[step].writes][:_MOST_OTHERS]
    for step in steps:
        kind = _KINDS.get(search.torch.steps[step].operation)
        number = next(iter(search.torch.steps[step].writes), None)
        if kind is None or number is None:
            continue
        own, seen = search.array("torch", number), set()
        if own is None or is_complex(own):
            continue
        alike = [v for v in others if search.flax.sizes[v] == search.torch.sizes[number]]
        for array in (search.array("jax", v) for v in alike):
            for each in () if array is None or is_complex(array) else arrangements(array, own.shape):
                if (sentence := kind(search, step, own, each)) and each.tobytes() not in seen:
                    seen.add(each.tobytes())
                    yield sentence, [Change(step, value=each)], ()
    yield from _numbers(search, segment, steps)


def _first(differs: np.ndarray) -> tuple[tuple[int, ...], str]:
    place = tuple(int(k) for k in np.unravel_index(int(np.argmax(differs)), differs.shape))
    return place, f"[{', '.join(map(str, place))}]"


def _mask(search: Search, step: int, own: np.ndarray, each: np.ndarray) -> str:
    """Say where Flax keeps what torch masks, or masks what torch keeps; empty if masks do not explain a value."""
    reads = [search.array("torch", number) for number in search.torch.steps[step].reads]
    operation = search.torch.steps[step].operation
    if not reads or any(array is None for array in reads):
        return ""
    arrays = [np.broadcast_to(a, own.shape) for a in reads if a is not None and a.size <= own.size]
    if operation == "where" and len(arrays) == 2:
        kept, other = arrays
    else:
        # What a mask puts in is one number, which no other value is.
        kept = arrays[0]
        if kept.shape != own.shape:
            return ""
        filled = own[~_same(own, kept)]
        if not filled.size or (operation == "add" and (np.abs(filled) < LARGEST).any()):
            return ""
        other = np.full(own.shape, filled.ravel()[0])
    keeps, hides = _same(each, kept), _same(each, other)
    if not (keeps | hides).all():
        return ""
    # Where both are the same number nothing is told.
    told = ~_same(kept, other)
    before, after = (_same(own, kept) & told), keeps & told
    if not (before != after).any() or not after.any():
        return ""
    more, fewer = int((after & ~before).sum()), int((before & ~after).sum())
    _, where = _first(before != after)
    what = " and ".join(
        f"{word} {count} of {told.sum()} positions that the torch side {opposite}"
        for word, count, opposite in (("keeps", more, "masks"), ("masks", fewer, "keeps"))
        if count
    )
    module = search.torch.steps[step].module or "the torch side"
    return f"mask: the flax side {what} ({operation} in {module}), the first at {where}"


def _same(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Tell element by element whether numbers are equal; all that a mask puts in count as one."""
    with np.errstate(invalid="ignore"):
        close = np.isclose(first, second, rtol=1e-9, atol=0.0, equal_nan=True)
    return close | ((first <= -LARGEST) & (second <= -LARGEST))


def _rows(search: Search, step: int, own: np.ndarray, each: np.ndarray) -> str:
    """Say which rows of a table Flax reads in the place of torch's; empty if a value is not made of its rows."""
    number = search.torch.steps[step].reads[0]
    table = search.array("torch", number)
    if table is None or not table.ndim or is_complex(table):
        return ""
    row = table.shape[1:] if search.torch.steps[step].operation != "gather" else ()
    places = table.shape[: table.ndim - len(row)]
    table = table.reshape(-1, int(np.prod(row)))
    if own.shape[own.ndim - len(row) :] != row or own.size * len(table) > _MOST_CELLS:
        return ""
    found = []
    for array in (own, each):
        rows = array.reshape(-1, table.shape[1])
        hits = np.asarray(np.isclose(rows[:, None], table[None], rtol=1e-9, atol=0.0)).all(axis=-1)
        if not hits.sum(axis=1).all():
            return ""
        found.append(hits.argmax(1).reshape(array.shape[: array.ndim - len(row)]))
    before, after = found
    if not (before != after).any():
        return ""
    place, where = _first(before != after)
    name = search.torch.parameter(number) or "the same values"
    relation = ""
    for axes in ((a, b) for b in range(before.ndim) for a in range(b)):
        if before.shape == after.shape and np.array_equal(before.swapaxes(*axes), after):
            relation = f": the index is transposed (axes {axes[0]} and {axes[1]} exchanged)"
    by = [
        np.unique((there - here) % size)
        for here, there, size in zip(
            np.unravel_index(before, places), np.unravel_index(after, places), places, strict=True
        )
    ]
    if before.size > 1 and all(len(steps) == 1 for steps in by):
        rolled = [f"{int(steps[0])} along axis {axis}" for axis, steps in enumerate(by) if steps[0]]
        relation = f": the index is rolled by {' and '.join(rolled)}"
    count = int((before != after).sum())
    return (
        f"index: the flax side reads other rows of {name} in {count} of {before.size} places, such as row "
        f"{after[place]} for row {before[place]} at {where}{relation}"
    )


def _function(search: Search, step: int, own: np.ndarray, each: np.ndarray) -> str:
    """Say which function of its operand Flax has in the place of this one; empty if it is none of the known."""
    read = search.array("torch", search.torch.steps[step].reads[0])
    if read is None or read.shape != own.shape:
        return ""
    for words, value in formulas(read, each):
        if " of it (" in words and equal(value, each):
            operation, other = search.torch.steps[step].operation, words.partition(" of it")[0]
            kind = "function" if operation in _NO_ACTIVATIONS else "activation"
            return f"{kind}: the torch side has {operation}, the flax side {other}"
    return ""


_NO_ACTIVATIONS = ("exp", "abs", "log", "sqrt", "sin", "cos", "rsqrt", "pow")
_KINDS: dict[str, Callable[[Search, int, np.ndarray, np.ndarray], str]] = {
    **dict.fromkeys(("embedding", "index", "index_select", "gather"), _rows),
    **dict.fromkeys(("where", "masked_fill", "masked_fill_", "add"), _mask),
    **dict.fromkeys(("softplus", "exp", "sigmoid", "tanh", "relu", "silu", "gelu", "abs", "log", "sqrt"), _function),
    **dict.fromkeys(("log_sigmoid_forward", "sin", "cos", "elu", "leaky_relu", "hardtanh", "rsqrt", "pow"), _function),
}


def _numbers(search: Search, segment: Segment, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Let all operations that multiply or divide by a number, or add it, do so by one of Flax's."""
    own, flax = ({}, {}), ({}, {})
    for key, numbers, found in (("torch", steps, own), ("jax", segment.flax, flax)):
        trace = search.torch if key == "torch" else search.flax
        for step in numbers:
            if trace.steps[step].operation in ("mul", "div") and (factor := _factor(search, key, step)) is not None:
                found[0].setdefault(float(f"{max(factor, 1 / factor):.9g}"), []).append((step, factor))
            if trace.steps[step].operation in ("add", "sub", "rsub") and (number := _addend(search, key, step)):
                found[1].setdefault(float(f"{abs(number):.9g}"), []).append((step, number))
    for (number, found), other in itertools.product(own[0].items(), flax[0]):
        if other != number and len(found) > 1:
            changes = [
                Change(step, f"{TIMES}{(other / number if factor > 1 else number / other)!r}") for step, factor in found
            ]
            sentence = (
                f"constant: the torch side multiplies and divides by {written(number):.6g}, the flax side by "
                f"{written(other):.6g}"
            )
            yield sentence, changes, ()
    for (number, found), other in itertools.product(own[1].items(), flax[1]):
        if other != number:
            made = [(step, search.array("torch", search.torch.steps[step].writes[0]), sign) for step, sign in found]
            changes = [Change(k, value=a + (other - number) * np.sign(sign)) for k, a, sign in made if a is not None]
            sentence = f"constant: the torch side adds or subtracts {written(number):.6g}, the flax side "
            yield f"{sentence}{written(other):.6g}", changes, ()


def _addend(search: Search, key: str, step: int) -> float | None:
    """Return the number that an operation adds to its only operand, or to the negative of it, if it is one number."""
    found = (search.torch if key == "torch" else search.flax).steps[step]
    if len(found.reads) != 1 or len(found.writes) != 1:
        return None
    before, after = search.array(key, found.reads[0]), search.array(key, found.writes[0])
    if before is None or after is None or before.shape != after.shape or is_complex(before) or before.size < 2:
        return None
    for number in (after - before, after + before):
        middle = float(np.median(number))
        if middle and np.isfinite(number).all() and equal(np.full(number.shape, middle), number):
            return middle
    return None


def _factor(search: Search, key: str, step: int) -> float | None:
    """Return the positive number that an operation multiplies its only operand by, if it is one number."""
    found = (search.torch if key == "torch" else search.flax).steps[step]
    if len(found.reads) != 1 or len(found.writes) != 1:
        return None
    before, after = search.array(key, found.reads[0]), search.array(key, found.writes[0])
    if before is None or after is None or before.shape != after.shape or is_complex(before) or not before.any():
        return None
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        return None
    factor = float(np.vdot(before, after) / np.vdot(before, before))
    usable = factor > 0 and abs(factor - 1) > FORMATS["float32"].roundoff and equal(factor * before, after)
    return factor if usable else None


def left_out(search: Search, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Let operations read what the module before them reads, as if that module were left out."""
    trace, producers = search.torch, search.torch.producers()
    for step in steps:
        for position, number in enumerate(trace.steps[step].reads):
            before = number
            while before in producers and trace.steps[producers[before]].operation in VIEWS:
                before = trace.steps[producers[before]].reads[0]
            module = trace.steps[producers[before]].module if before in producers else ""
            if not module or module == trace.steps[step].module:
                continue
            inside = [k for k, found in enumerate(trace.steps[: producers[before] + 1]) if found.module == module]
            made = {value for k in inside for value in trace.steps[k].writes}
            read = dict.fromkeys(v for k in inside for v in trace.steps[k].reads if v not in made)
            for value in read:
                array = search.array("torch", value) if trace.sizes[value] == trace.sizes[number] else None
                if array is None or trace.parameter(value) or value == number:
                    continue
                where = trace.steps[step].module or trace.steps[step].operation
                sentence = f"missing layer: {where} reads what {module} reads, which the flax side leaves out"
                yield sentence, [Change(step, ARGUMENT, position, array)], ()


def exchanged(search: Search, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Exchange two values of one shape that a segment is made of, as a divergence with its arguments reversed does."""
    trace, producers, chains = search.torch, search.torch.producers(), []
    for number in dict.fromkeys(value for step in steps for value in trace.steps[step].reads):
        chain = [number]
        while len(chain) < _MOST_BEFORE and chain[-1] in producers:
            before = [v for v in trace.steps[producers[chain[-1]]].reads if not trace.parameter(v)]
            if len(before) != 1:
                break
            chain += before
        # The earliest values have the best names.
        chains.append([v for v in reversed(chain) if v in search.matches and not trace.parameter(v)])
    seen: set[tuple[int, int]] = set()
    for first, second in itertools.combinations(chains, 2):
        for a, b in itertools.product(first, second):
            apart = a not in second and b not in first and (a, b) not in seen
            if not apart or trace.shapes[a] != trace.shapes[b] or not trace.shapes[a]:
                continue
            seen |= {(a, b), (b, a)}
            arrays = search.array("torch", a), search.array("torch", b)
            if arrays[0] is None or arrays[1] is None or equal(arrays[0], arrays[1]):
                continue
            names = " and ".join(made(search, number) for number in (a, b))
            sentence = f"order: {names} are exchanged on the flax side (arguments in the reverse order)"
            for where in (steps, range(len(trace.steps))):
                changes = [
                    Change(step, ARGUMENT, trace.steps[step].reads.index(number), other)
                    for step in where
                    for number, other in zip((a, b), arrays[::-1], strict=True)
                    if number in trace.steps[step].reads
                ]
                yield (
                    sentence + f", in {trace.steps[steps[0]].line or 'this place'} alone" * (where is steps),
                    changes,
                    (),
                )


def made(search: Search, number: int) -> str:
    """Say what a value of the torch side is."""
    trace = search.torch
    name = next((name for name, value in trace.sources.items() if value == number), "")
    if number not in trace.producers():
        return name.replace(":", " ") if name else "a constant"
    step = trace.steps[trace.producers()[number]]
    return f"the result of {step.operation} in {step.module or step.line or 'the top module'}"
