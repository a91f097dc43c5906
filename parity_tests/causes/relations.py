"""Search for what Flax's values have to do with torch's: the same numbers in another order, a formula, another table.

A formula is looked for among sorted numbers, so that it does not matter how they are arranged. What is found is a
hypothesis like any other, which `place` proves or drops.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from parity_tests.judge.dtypes import FORMATS, is_complex
from parity_tests.pair.localisation import Search, Segment, arrangements
from parity_tests.pair.trace import ARGUMENT, CONSTANT, LARGEST, VIEWS, Change, Trace

_MOST_TERMS = 12
_MOST_READ = 4  # values that are tried in another order
_MOST_ROLLED = 8  # elements of an axis that is rolled
_MOST_FORMULAS = 60  # values of the flax side that a formula is looked for
_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(x, 0.0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    **{function.__name__: function for function in (np.exp, np.log, np.log1p, np.abs, np.sin, np.cos, np.square)},
}
# A sentence, changes, and the operations whose results must be among Flax's values where not all results agree.
Hypothesis = tuple[str, Sequence[Change], Sequence[int]]

_ALIKE = 1e-9  # relative; numbers of float64 that went through some operations
_ROUND = 3  # significant digits of a constant that somebody wrote


def order_of(own: np.ndarray, other: np.ndarray) -> str:
    """Say how numbers of one shape are rearranged in another array; empty if that is none of the known ways."""
    for axis, size in enumerate(own.shape):
        if size > 1 and _equal(np.flip(own, axis), other):
            return f"reversed (flipped) along axis {axis}"
    for axis, size in enumerate(own.shape):
        for by in range(1, size):
            if _equal(np.roll(own, by, axis), other):
                return f"rolled by {by} along axis {axis}"
    for first, second in ((a, b) for b in range(own.ndim) for a in range(b)):
        if own.shape[first] == own.shape[second] and _equal(own.swapaxes(first, second), other):
            return f"with axes {first} and {second} exchanged (transposed)"
    for axis, size in enumerate(own.shape):
        for blocks in (n for n in range(2, size) if size % n == 0):
            split = own.reshape(*own.shape[:axis], blocks, size // blocks, *own.shape[axis + 1 :])
            if _equal(split.swapaxes(axis, axis + 1).reshape(own.shape), other):
                others = "a shuffle, or channels first against last before a flatten"
                return f"with axis {axis} split the other way round ({blocks} groups interleaved: {others})"
    return ""


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    return bool(
        np.allclose(first, second, rtol=_ALIKE, atol=_ALIKE * np.abs(first[np.isfinite(first)]).max(initial=0.0))
    )


def same_numbers(own: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether two arrays have the same numbers in any order, up to rounding; those not finite in equal count."""
    if own.shape != other.shape or is_complex(own) != is_complex(other):
        return False
    first, second = (np.sort(array.ravel()) for array in (own, other))
    finite = np.isfinite(first)
    if not np.array_equal(finite, np.isfinite(second)):
        return False
    first, second = first[finite], second[finite]
    return bool(not first.size or (np.abs(first - second) <= _ALIKE * np.abs(first).max()).all())


def formulas(own: np.ndarray, other: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what makes the other numbers of these: words that follow "on the flax side it is", and the numbers.

    A constant that a few numbers would agree on by chance has to be a round one.
    """
    if own.size != other.size or own.size == 0 or is_complex(own) != is_complex(other):
        return
    first, second = np.sort(own.ravel()), np.sort(other.ravel())
    if not (np.isfinite(first).all() and np.isfinite(second).all()) or not second.any():
        return
    distinct = len(np.unique(np.round(first / (np.abs(first).max() or 1.0), 9)))
    scale = np.abs(second).max()

    def fits(values: np.ndarray) -> bool:
        return bool((np.abs(np.sort(values) - second) <= _ALIKE * max(scale, np.abs(values).max())).all())

    def told(constant: float, needed: int) -> bool:
        return distinct >= needed or _is_round(constant)

    for sign in (1.0, -1.0):
        factor = sign * float(np.linalg.norm(second) / np.linalg.norm(first)) if first.any() else 0.0
        factor = _written(factor)
        if abs(factor - 1) > FORMATS["float32"].roundoff and factor and fits(factor * first) and told(factor, 2):
            yield f"{factor:.6g} times as large", factor * own
    if is_complex(own):
        if np.imag(own).any() and fits(first.conj()):
            yield "its complex conjugate", own.conj()
        return
    offset = _written(float(np.median(second - first)))
    if abs(offset) > FORMATS["float32"].roundoff * scale and fits(first + offset) and told(offset, 3):
        yield f"{abs(offset):.6g} {'more' if offset > 0 else 'less'} (a shift by a constant)", own + offset
    complement = _written(float(np.median(second + first[::-1])))
    if complement and fits(complement - first) and told(complement, 3):
        yield f"{complement:.6g} minus it (inverted)", complement - own
    if first[0] > 0 and second[0] > 0:
        logs, others = np.log(first), np.log(second)
        for order in (1, -1) if logs.any() else ():
            power = _written(float(logs @ others[::order] / (logs @ logs)))
            # An array of ones is any power of itself.
            if abs(power - 1) > FORMATS["float32"].roundoff and fits(first**power) and told(power, 3):
                yield f"it to the power {power:.6g} (another exponent, or base of a power)", own**power
    fitting = []
    for name, function in _FUNCTIONS.items() if distinct >= 4 else ():
        with np.errstate(all="ignore"):
            values = function(first)
        if np.isfinite(values).all() and not np.array_equal(values, first) and fits(values):
            fitting.append(name)
    if fitting:
        yield f"{' or '.join(fitting)} of it (a function that torch's side lacks there)", _FUNCTIONS[fitting[0]](own)
    for order in (1, -1) if distinct >= 4 else ():
        factor, offset = map(_written, np.polyfit(first, second[::order], 1).tolist())
        # With one of them alone it would be one of the formulas above, or rounding.
        both = abs(abs(factor) - 1) > FORMATS["float32"].roundoff and abs(offset) > _ALIKE * scale
        if factor and both and fits(factor * first + offset):
            yield (
                f"{factor:.6g} times it and {abs(offset):.6g} {'more' if offset > 0 else 'less'}",
                factor * own + offset,
            )


def _written(number: float) -> float:
    """Return the number that was meant, if it has few digits: a fit errs where values do."""
    short = float(f"{number:.9g}")
    return short if abs(short - number) <= 1e-12 * abs(number) else number


def _is_round(number: float) -> bool:
    return any(abs(float(f"{each:.{_ROUND}g}") - each) <= _ALIKE * abs(each) for each in (number, 1 / (number or 1.0)))


def related(search: Search, segment: Segment, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Yield hypotheses that put other numbers in; `steps` are the operations of a segment that are no views."""
    yield from _arranged(search, segment)
    yield from _weighted(search, segment)
    yield from _by_formula(search, segment)


def remote(search: Search, segment: Segment, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Yield those that say less of a cause, to be tried when all others failed."""
    yield from _turned(search, segment)
    yield from _tables(search, steps)
    yield from _terms(search, steps, segment.place.backward)
    yield from _centred(search, steps)


def _arranged(search: Search, segment: Segment) -> Iterator[Hypothesis]:
    """Let the first operations read the numbers that Flax has in the place of theirs: in another order, or masked."""
    for number, readers, own in _read(search, segment):
        seen = {own.tobytes()}
        for array in (search.array("jax", other) for other in search.matches[number][:4]):
            for each in () if array is None else arrangements(array, own.shape):
                if each.tobytes() in seen:
                    continue
                seen.add(each.tobytes())
                if sentence := _rearranged(search, readers[0][0], number, own, each):
                    yield from ((sentence, changes, ()) for changes in _given(readers, each))


def _read(search: Search, segment: Segment) -> Iterator[tuple[int, list[tuple[int, int]], np.ndarray]]:
    """Yield the first values that both sides have and a segment reads, with all that read them from there on."""
    numbers = dict.fromkeys(number for step in segment.torch for number in search.torch.steps[step].reads)
    usual = [n for n in numbers if n in search.matches and search.torch.sizes[n] > 1 and not search.torch.parameter(n)]
    later = range(segment.torch[0], len(search.torch.steps))
    for number in usual[:_MOST_READ]:
        own = search.array("torch", number)
        reads = ((step, search.torch.steps[step].reads) for step in later)
        if own is not None:
            yield number, [(step, found.index(number)) for step, found in reads if number in found], own


def _given(readers: Sequence[tuple[int, int]], value: np.ndarray) -> Iterator[list[Change]]:
    """Yield the changes that give a value to the first of some operations, and to all of them."""
    for some in (readers[:1], readers)[: len(readers)]:
        yield [Change(step, ARGUMENT, position, value) for step, position in some]


def _turned(search: Search, segment: Segment) -> Iterator[Hypothesis]:
    """Reverse, roll or transpose what the first operations read, as an index does that Flax computes."""
    for _, readers, own in _read(search, segment):
        turned = [np.flip(own, axis) for axis, size in enumerate(own.shape) if size > 1]
        turned += [np.roll(own, by, k) for k, n in enumerate(own.shape) if n <= _MOST_ROLLED for by in range(1, n)]
        turned += [own.swapaxes(a, b) for b in range(own.ndim) for a in range(b) if own.shape[a] == own.shape[b] > 1]
        module = search.torch.steps[readers[0][0]].module or "this operation"
        for each in map(np.ascontiguousarray, turned):
            words = order_of(own, each)
            sentence = f"order: {module} reads the same numbers {words} on the flax side"
            yield from ((sentence, changes, ()) for changes in _given(readers, each) if words)


def _rearranged(search: Search, step: int, number: int, own: np.ndarray, each: np.ndarray) -> str:
    """Say what distinguishes numbers with one fingerprint, which leaves out what is not finite."""
    module = search.torch.steps[step].module or "this operation"
    left_out = ~(np.abs(own) < LARGEST) | ~(np.abs(each) < LARGEST)
    if left_out.any() and np.allclose(own[~left_out], each[~left_out], rtol=1e-9, atol=0.0):
        before, after = (array[left_out][0] for array in (own, each))
        return f"mask: {module} reads {before:g} in the masked places, {after:g} on the flax side"
    if not same_numbers(own, each):
        return ""
    words = order_of(own, each)
    if not np.isfinite(own).all():
        return f"order: {module} reads the same numbers {words} on the flax side" if words else ""
    if np.allclose(own, -each, rtol=1e-9, atol=1e-12 * np.abs(own).max()):
        return f"sign: {module} reads the negative of these numbers on the flax side{f', or {words}' * bool(words)}"
    total = own + each
    if np.ptp(total) <= 1e-9 * np.abs(total).max() and total.any():
        return f"constant: {module} reads {total.flat[0]:.6g} minus the numbers on the flax side (inverted)"
    if not words and len(np.unique(own)) < 4:
        return ""
    if "transposed" in words and _softmax_follows(search, number) and _is_product(search.torch, number):
        return "order: the scores are transposed on the flax side (query and key are exchanged)"
    known = " (channels first against last before a flatten, heads merged or split in another order)"
    words, known = (words, "") if words else ("in another order", known)
    return f"order: {module} reads the same numbers {words} on the flax side{known}"


def _is_product(trace: Trace, number: int) -> bool:
    """Tell whether a value is a product of matrices, rearranged or scaled."""
    producers = trace.producers()
    while (step := producers.get(number)) is not None and trace.steps[step].reads:
        if trace.steps[step].operation in ("bmm", "mm"):
            return True
        if trace.steps[step].operation not in (*VIEWS, "mul", "div", "clone", "_unsafe_view"):
            return False
        number = trace.steps[step].reads[0]
    return False


def _by_formula(search: Search, segment: Segment) -> Iterator[Hypothesis]:
    """Make Flax's value of the first value of a segment by a formula, then of what its first operation reads."""
    known = {number for found in search.matches.values() for number in found}
    others = [v for step in segment.flax for v in search.flax.steps[step].writes if v not in known][:_MOST_FORMULAS]
    made, read = [], []
    for step in segment.torch:
        if search.torch.steps[step].operation in VIEWS:
            continue
        made += [(step, "", k, number) for k, number in enumerate(search.torch.steps[step].writes)]
        for k, number in enumerate(search.torch.steps[step].reads if len(read) < 4 else ()):
            # Real parameters have hypotheses of their own, which name them.
            array = search.array("torch", number) if search.torch.parameter(number) else None
            if array is None or is_complex(array):
                read.append((step, ARGUMENT, k, number))
    for step, what, k, number in (*made, *read):
        alike = [other for other in others if search.flax.sizes[other] == search.torch.sizes[number]]
        own = search.array("torch", number) if alike else None
        for array in () if own is None else (search.array("jax", other) for other in alike):
            assert own is not None
            for words, value in formulas(own, array) if array is not None else ():
                yield _of_value(search, step, what, number, words), [Change(step, what, k, value)], ()


def _of_value(search: Search, step: int, what: str, number: int, words: str) -> str:
    """Say that a value is made by a formula on the flax side."""
    trace = search.torch
    producer = trace.producers().get(number)
    operation = trace.steps[producer].operation if producer is not None else "an input"
    kind, count = "constant", 0
    if "as large" in words:
        kind = "scale"
        if producer is not None and operation in ("sum", "mean"):
            count = max(int(trace.sizes[trace.steps[producer].reads[0]]), 1) / max(int(trace.sizes[number]), 1)
    if count > 1 and words.startswith(f"{1 / count if operation == 'sum' else count:.6g} times"):
        other = "mean" if operation == "sum" else "sum"
        return f"reduction: the torch side takes a {operation}, the flax side a {other}"
    kind = "power" if "power" in words else "activation" if " of it (" in words else kind
    if kind == "scale" and _softmax_follows(search, number):
        return f"attention scale: the scores are {words} on the flax side"
    reader = trace.steps[step].module or trace.steps[step].operation
    subject = f"what {reader} reads" if what == ARGUMENT else f"the result of {operation}"
    return f"{kind}: {subject} is {words} on the flax side"


def _tables(search: Search, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Let operations read Flax's tables: values that are made of constants and integers alone."""
    mapping = search.pair.mapping
    own = _constant_values(search.torch, mapping.torch_names)
    others = _constant_values(search.flax, mapping.flax_names)
    known = {number for found in search.matches.values() for number in found}
    others = [value for value in sorted(others) if value not in known and search.flax.sizes[value] > 1]
    for step in steps:
        for position, number in enumerate(search.torch.steps[step].reads):
            array = search.array("torch", number) if number in own and number not in search.matches else None
            if array is None:
                continue
            for other in (search.array("jax", v) for v in others if search.flax.sizes[v] == array.size):
                for each in arrangements(other, array.shape) if other is not None else ():
                    k = np.unravel_index(int(np.argmax(each != array)), array.shape)
                    where = ", ".join(map(str, k))
                    sentence = (
                        f"constant: the table {array.shape} that {search.torch.steps[step].operation} reads has other "
                        f"values on the flax side, such as {each[k]:.6g} for {array[k]:.6g} at [{where}]"
                    )
                    yield sentence, [Change(step, ARGUMENT, position, each)], ()


def _constant_values(trace: Trace, mapped: Collection[str]) -> set[int]:
    """Return the values that depend on no real number that a run was given, but for buffers of one side alone."""
    kept = {name: trace.parameter(number) for name, number in trace.sources.items()}
    found = {trace.sources[n] for n, own in kept.items() if n.startswith(CONSTANT) or (own and own not in mapped)}
    given = set(trace.sources.values()) - found
    for step in trace.steps:
        if all(value in found for value in step.reads):
            found.update(value for value in step.writes if value not in given)
    return found


def _weighted(search: Search, segment: Segment) -> Iterator[Hypothesis]:
    """Weigh the two terms of the sum at the end of a segment otherwise."""
    heals = segment.heals
    if heals is None or heals.value is None:
        return
    step = search.torch.steps[heals.step]
    terms = [search.array("torch", number) for number in step.reads]
    if step.operation not in ("add", "sub") or len(terms) != 2 or any(t is None or is_complex(t) for t in terms):
        return
    columns = np.stack([np.broadcast_to(t, heals.value.shape).ravel() for t in terms if t is not None], axis=1)
    weights = np.linalg.lstsq(columns, heals.value.ravel(), rcond=None)[0]
    own = np.array([1.0, 1.0 if step.operation == "add" else -1.0])
    for k, which in enumerate(("first", "second")):
        # The fit errs where values do: a factor of few digits is meant exactly.
        factor = float(f"{weights[k] / own[k]:.9g}")
        if abs(weights[1 - k] - own[1 - k]) < FORMATS["float32"].roundoff < abs(factor - 1):
            value = (own[k] * factor * columns[:, k] + own[1 - k] * columns[:, 1 - k]).reshape(heals.value.shape)
            sentence = f"scale: the {which} term of this sum is {factor:.6g} times as large on the flax side"
            yield sentence, [Change(heals.step, "", heals.output, value)], ()


def _softmax_follows(search: Search, number: int, depth: int = 6) -> bool:
    values = {number}
    for _ in range(depth):
        readers = [step for step in search.torch.steps if values & set(step.reads)]
        if any("softmax" in step.operation for step in readers):
            return True
        values = {v for step in readers for v in step.writes}
    return False


def _terms(search: Search, steps: Sequence[int], backward: bool) -> Iterator[Hypothesis]:
    """Add a value that is known on both sides to what the first operation reads."""
    trace = search.torch
    for step in steps[:2]:
        first = trace.steps[step].reads
        for position, number in enumerate(first):
            own = search.array("torch", number)
            if own is None or number not in search.matches or own.ndim < 2 or is_complex(own):
                continue
            near = [
                value
                for value in range(number - 1, -1, -1)
                if trace.shapes[value] == trace.shapes[number] and value in search.matches and value not in first
            ]
            for value in near[:_MOST_TERMS]:
                other = search.array("torch", value)
                if other is None:
                    continue
                module = trace.steps[producer].module if (producer := trace.producers().get(value)) is not None else ""
                sentence = (
                    f"residual: the flax side adds the value of {module or 'an input'} to what "
                    f"{trace.steps[step].module or 'this operation'} reads, which the torch side does not (a skip)"
                )
                if backward:
                    sentence = "gradient: the flax side has a term more in this gradient (one way is stopped in torch)"
                yield sentence, [Change(step, ARGUMENT, position, own + other)], ()


def _centred(search: Search, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Subtract the mean from what the first operation reads, wherever the segment reads it."""
    for number in search.torch.steps[steps[0]].reads if steps else ():
        own = search.array("torch", number)
        if own is None or own.ndim < 2 or search.torch.parameter(number) or not np.isfinite(own).all():
            continue
        readers = [step for step in steps if number in search.torch.steps[step].reads]
        for axes in ((-1,), (0,), tuple(range(1, own.ndim))):
            centred = own - own.mean(axes, keepdims=True)
            where = search.torch.steps[steps[0]].module or "this operation"
            sentence = (
                f"mean: the flax side subtracts the mean (over {axes}) from what {where} reads, the torch side not"
            )
            reads = (search.torch.steps[step].reads for step in readers)
            yield (
                sentence,
                [Change(k, ARGUMENT, r.index(number), centred) for k, r in zip(readers, reads, strict=True)],
                (),
            )
