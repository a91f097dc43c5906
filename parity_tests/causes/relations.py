"""Search for what Flax's values have to do with torch's: the same numbers in another order, a formula, another table.

What is found is a hypothesis like any other, which `place` proves or drops.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from parity_tests.causes.formulas import along_axes, equal, formulas, is_round, order_of, same_numbers, written
from parity_tests.causes.selections import Hypothesis, left_out, made, selected
from parity_tests.judge.dtypes import FORMATS, is_complex
from parity_tests.pair.localisation import Search, Segment, arrangements
from parity_tests.pair.trace import ARGUMENT, CONSTANT, LARGEST, VIEWS, Change, Trace

_MOST_TERMS = 12
_MOST_READ = 4  # values that are tried in another order
_MOST_ROLLED = 8  # elements of an axis that is rolled
_MOST_OF_A_KIND = 40  # hypotheses
_MOST_FORMULAS = 60  # values of the flax side that a formula is looked for
UNNAMED = "in another order"


def related(search: Search, segment: Segment, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Yield hypotheses that put other numbers in; `steps` are the operations of a segment that are no views."""
    # Each kind has a share of its own: of many equal axes there are many orders.
    yield from itertools.islice(selected(search, segment, steps), _MOST_OF_A_KIND)
    for told in (True, False):
        yield from itertools.islice(_arranged(search, segment, told), _MOST_OF_A_KIND)
    yield from _weighted(search, segment)
    yield from itertools.islice(_by_formula(search, segment), _MOST_OF_A_KIND)
    yield from itertools.islice(_reformed(search, steps), _MOST_OF_A_KIND)


def remote(search: Search, segment: Segment, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Yield those that say less of a cause, to be tried when all others failed."""
    yield from _turned(search, segment)
    yield from _tables(search, steps)
    yield from _terms(search, steps, segment.place.backward)
    yield from left_out(search, steps)
    yield from _centred(search, steps)


def _arranged(search: Search, segment: Segment, told: bool) -> Iterator[Hypothesis]:
    """Let the first operations read the numbers that Flax has in the place of theirs: in another order, or masked.

    Args:
        search: the recorded runs.
        segment: where they part.
        told: whether to yield those whose difference has a name, or the others.
    """
    for number, readers, own in _read(search, segment):
        seen = {own.tobytes()}
        for array in (search.array("jax", other) for other in search.matches[number][:4]):
            for each in () if array is None else arrangements(array, own.shape):
                if each.tobytes() in seen:
                    continue
                seen.add(each.tobytes())
                sentence = _rearranged(search, readers[0][0], number, own, each)
                if sentence and told == (UNNAMED not in sentence):
                    yield from ((sentence, changes, ()) for changes in _given(readers, each))


def _read(search: Search, segment: Segment) -> Iterator[tuple[int, list[tuple[int, int]], np.ndarray]]:
    """Yield the first values that both sides have and a segment reads, with all that read them from there on."""
    numbers = dict.fromkeys(number for step in segment.torch for number in search.torch.steps[step].reads)
    usual = [
        n for n in numbers if n in search.matches and search.torch.sizes[n] > 1 and not search.torch.is_parameter(n)
    ]
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
    words, known = (words, "") if words else (UNNAMED, known)
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
    alike_steps: dict[tuple[str, str], list[Change]] = {}
    for step, what, k, number in (*made, *read):
        alike = [other for other in others if search.flax.sizes[other] == search.torch.sizes[number]]
        own = search.array("torch", number) if alike else None
        for array in () if own is None else (search.array("jax", other) for other in alike):
            assert own is not None
            if array is None:
                continue
            over = (found for each in arrangements(array, own.shape) for found in along_axes(own, each))
            for words, value in itertools.chain(formulas(own, array), over):
                sentence, change = _of_value(search, step, what, number, words), Change(step, what, k, value)
                yield sentence, [change], ()
                if what == ARGUMENT:
                    # All that read it, as those of a deviation that is divided by and whose logarithm is taken.
                    readers = [k for k in segment.torch if number in search.torch.steps[k].reads]
                    several = [Change(k, ARGUMENT, search.torch.steps[k].reads.index(number), value) for k in readers]
                    if len(several) > 1:
                        yield sentence, several, ()
                # What is computed in several places is usually wrong in all of them.
                together = alike_steps.setdefault((search.torch.steps[step].operation, sentence), [])
                together += [change] * (step not in [other.step for other in together])
                if len(together) > 1:
                    yield sentence, [*together], ()


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
    kind = "conjugate" if "conjugate" in words else kind
    kind = "power" if "power" in words else "activation" if " of it (" in words or "over axis" in words else kind
    if kind == "scale" and (softmax := _softmax_follows(search, number)):
        scores = "scale: the logits" if "log" in softmax else "attention scale: the scores"
        return f"{scores} are {words} on the flax side{' (a temperature)' * ('log' in softmax)}"
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
    if not (np.isfinite(columns).all() and np.isfinite(heals.value).all()):
        return
    if step.operation == "add":
        yield from _mixed(search, segment, heals)
    weights = np.linalg.lstsq(columns, heals.value.ravel(), rcond=None)[0]
    own = np.array([1.0, 1.0 if step.operation == "add" else -1.0])
    for k, which in enumerate(("first", "second")):
        # The fit errs where values do: a factor of few digits is meant exactly.
        factor = float(f"{weights[k] / own[k]:.9g}")
        if abs(weights[1 - k] - own[1 - k]) < FORMATS["float32"].roundoff < abs(factor - 1):
            value = (own[k] * factor * columns[:, k] + own[1 - k] * columns[:, 1 - k]).reshape(heals.value.shape)
            sentence = f"scale: the {which} term of this sum is {factor:.6g} times as large on the flax side"
            yield sentence, [Change(heals.step, "", heals.output, value)], ()


def _mixed(search: Search, segment: Segment, heals: Change) -> Iterator[Hypothesis]:
    """Mix two terms by other weights 1 - w and w: smoothed labels, a moving average."""
    trace, producers, factors, bare = search.torch, search.torch.producers(), [], []
    for number in trace.steps[heals.step].reads:
        reads = trace.steps[producers[number]].reads if number in producers else ()
        weighted, own = search.array("torch", number), search.array("torch", reads[0]) if len(reads) == 1 else None
        if own is None or weighted is None or own.shape != weighted.shape or not own.any() or is_complex(own):
            return
        factors.append(float(np.vdot(own, weighted) / np.vdot(own, own)))
        bare.append(own)
        if not equal(factors[-1] * own, weighted):
            return
    for k, which in enumerate(("first", "second")):
        weight = written(1 - factors[k])
        if heals.value is None or not 0 < weight < 1:
            continue
        rest = bare[1 - k] * (factors[1 - k] / weight)
        apart = (rest - bare[k]).ravel()
        other = float(apart @ (heals.value - bare[k]).ravel() / (apart @ apart)) if apart.any() else math.nan
        # One number is some mixture of any other two: the weight has to be a round one.
        if (
            abs(other - weight) > FORMATS["float32"].roundoff
            and 0 <= (other := written(round(other, 9))) < 1
            and is_round(other)
        ):
            sentence = (
                f"weights: the {which} term of this sum has the weight 1 - {weight:g} on the torch side, "
                f"1 - {other:g} on the flax side, and the other the rest (label smoothing, a moving average)"
            )
            yield sentence, [Change(heals.step, "", heals.output, (1 - other) * bare[k] + other * rest)], ()


def _softmax_follows(search: Search, number: int, depth: int = 6) -> str:
    """Name the softmax that is soon taken of a value; empty if none is."""
    values = {number}
    for _ in range(depth):
        readers = [step for step in search.torch.steps if values & set(step.reads)]
        if found := next((step.operation for step in readers if "softmax" in step.operation), ""):
            return found
        values = {v for step in readers for v in step.writes}
    return ""


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


def _reformed(search: Search, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Let all that read a value read a function of it, as where a variance is taken for a deviation."""
    trace = search.torch
    for number in dict.fromkeys(v for step in steps for v in trace.steps[step].reads if not trace.parameter(v)):
        readers = [step for step in steps if number in trace.steps[step].reads]
        own = search.array("torch", number) if len(readers) > 1 else None
        if own is None or is_complex(own) or not np.isfinite(own).all():
            continue
        others = {"twice it": 2 * own, "half of it": own / 2, "the negative of it": -own, "its square": own**2}
        others |= {"its root": np.sqrt(own), "one over it": 1 / own} if (own > 0).all() else {}
        for words, value in others.items():
            reads = [Change(k, ARGUMENT, trace.steps[k].reads.index(number), value) for k in readers]
            sentence = f"function: on the flax side all that read {made(search, number)} read {words}"
            yield sentence, reads, ()
