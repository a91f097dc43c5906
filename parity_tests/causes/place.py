"""Search for the cause of a mismatch at its place: changes of single operations of the torch side, each proven there.

A hypothesis counts as proven if the changed torch side has Flax's results, or, before another place, if it has Flax's
value at the end of this one.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from parity_tests.judge.dtypes import FORMATS, is_complex
from parity_tests.pair.judge import Evidence
from parity_tests.pair.legs import Pair
from parity_tests.pair.localisation import (
    Search,
    Segment,
    arrangements,
    first_segment,
    ladder,
    matched,
    record_both,
    unmatched,
)
from parity_tests.pair.side import CANNOT_RUN
from parity_tests.pair.trace import ARGUMENT, VIEWS, Change, Place, Trace, parameters_of

_MOST_PLACES = 6
_MOST_TRIED = 240
_MOST_STEPS = 24  # of a segment whose alternatives are tried
_MOST_TERMS = 12
_NORMS = ("native_layer_norm", "_fused_rms_norm")
# A sentence, changes, and the operations whose results must be among Flax's values where not all results agree.
Hypothesis = tuple[str, Sequence[Change], Sequence[int]]


@dataclass(frozen=True)
class Findings:
    """What is known about a mismatch.

    Attributes:
        cause: one sentence, empty if none was proven.
        places: where the models part, in order.
        unmatched: modules of either side without a value that the other side has.
        ladder: the modules in order, see `localisation.ladder`.
    """

    cause: str = ""
    places: tuple[Place, ...] = ()
    unmatched: tuple[str, ...] = ()
    ladder: tuple[tuple[str, str, str], ...] = ()


def _feeding(trace: Trace, steps: Sequence[int]) -> list[int]:
    """Return the last operations with parameters before some others."""
    producers, found, seen = trace.producers(), [], set(steps)
    left = [producers[value] for step in steps for value in trace.steps[step].reads if value in producers]
    while left:
        step = left.pop(0)
        if step in seen:
            continue
        seen.add(step)
        if trace.steps[step].operation not in VIEWS and parameters_of(trace, [step]):
            found.append(step)
        else:
            left += [producers[value] for value in trace.steps[step].reads if value in producers]
    return found


def cause_at(search: Search, segment: Segment) -> str:
    """Return a sentence that was proven at this place, or an empty one."""
    for sentence, changes, shown_by in itertools.islice(_hypotheses(search, segment), _MOST_TRIED):
        try:
            trace = search.rerun(changes)
        except CANNOT_RUN:
            continue
        if proven(search, segment, trace, shown_by):
            return sentence
    return ""


def proven(search: Search, segment: Segment, trace: Trace, shown_by: Sequence[int] = ()) -> bool:
    """Tell whether a changed run has Flax's results, or its value at the end of a segment that others follow."""
    if search.agrees(trace):
        return True
    if segment.place.healed != "here" or segment.end is None or trace.features.shape != search.torch.features.shape:
        return False
    known = matched(dataclasses.replace(trace, limits=search.torch.limits), search.flax) if shown_by else {}
    return search.equal(trace, *segment.end) and all(
        value in known for step in shown_by for value in search.torch.steps[step].writes[:1]
    )


def _hypotheses(search: Search, segment: Segment) -> Iterator[Hypothesis]:
    steps = [step for step in segment.torch if search.torch.steps[step].operation not in VIEWS][:_MOST_STEPS]
    asked = [*steps, *_readers_of_masks(search, steps)]
    yield from _moved_norm(search, steps, segment)
    offered = search.rerun((), asked=asked).alternatives
    for step, title, sentence in offered:
        weight = next(iter(parameters_of(search.torch, [step])), "")
        yield sentence.replace("{weight}", weight), [Change(step, title)], ()
    yield from _arranged(search, steps)
    yield from _in_proportion(search, segment)
    yield from _weighted(search, segment)
    yield from _terms(search, steps)


def _readers_of_masks(search: Search, steps: Sequence[int]) -> list[int]:
    """Return the selections among the first operations of a segment that come just before it, as a mask does."""
    producers = search.torch.producers()
    read = {value for step in steps[:1] for value in search.torch.steps[step].reads}
    found = [producers[value] for value in read if value in producers]
    return [step for step in found if search.torch.steps[step].operation in ("masked_fill", "where", "add")]


def _arranged(search: Search, steps: Sequence[int]) -> Iterator[Hypothesis]:
    """Let the first operations read the same numbers in Flax's order."""
    for step in steps[:2]:
        for position, number in enumerate(search.torch.steps[step].reads):
            if search.torch.parameter(number):
                continue
            own = search.array("torch", number)
            seen = set() if own is None else {own.tobytes()}
            for other in search.matches.get(number, [])[:4]:
                array = search.array("jax", other)
                for each in () if own is None or array is None or own.size < 2 else arrangements(array, own.shape):
                    if each.tobytes() in seen:
                        continue
                    seen.add(each.tobytes())
                    module = search.torch.steps[step].module or "this operation"
                    sentence = (
                        f"order: {module} reads the same numbers in another order on the flax side (channels first "
                        "against last before a flatten, heads merged or split in another order)"
                    )
                    yield sentence, [Change(step, ARGUMENT, position, each)], ()


def _in_proportion(search: Search, segment: Segment) -> Iterator[Hypothesis]:
    """Multiply the first value of a segment that is proportional to one of Flax's."""
    known = {number for found in search.matches.values() for number in found}
    others = [v for step in segment.flax for v in search.flax.steps[step].writes if v not in known]
    for step in segment.torch:
        if search.torch.steps[step].operation in VIEWS:
            continue
        for output, number in enumerate(search.torch.steps[step].writes):
            own = search.torch.features[number]
            for other in others:
                there = search.flax.features[other]
                if (
                    search.flax.sizes[other] != search.torch.sizes[number]
                    or search.torch.sizes[number] < 2
                    or not own[2]
                ):
                    continue
                factor = float(np.sqrt(there[2] / own[2]))
                powers = factor ** np.array([1, 1, 2, 3, 3])
                limit = search.torch.limits[number] * powers * 2 + search.flax.limits[other]
                if abs(factor - 1) < FORMATS["float32"].roundoff or not factor:
                    continue
                for sign in (1.0, -1.0):
                    scaled = own * powers * np.array([sign, 1, 1, 1, sign])
                    array = search.array("torch", number)
                    if (np.abs(scaled - there) <= limit).all() and array is not None:
                        after = _softmax_follows(search, number)
                        what = (
                            "attention scale: the scores are"
                            if after
                            else f"scale: the result of {search.torch.steps[step].operation} is"
                        )
                        sentence = f"{what} {sign * factor:.6g} times as large on the flax side"
                        yield sentence, [Change(step, "", output, sign * factor * array)], ()


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


def _moved_norm(search: Search, steps: Sequence[int], segment: Segment) -> Iterator[Hypothesis]:
    """Take a norm after a sum in place of before what is added, or the other way round."""
    trace, producers = search.torch, search.torch.producers()
    for step in steps:
        if trace.steps[step].operation not in _NORMS:
            continue
        read = trace.steps[step].reads[0]
        module = trace.steps[step].module or "this norm"
        for later in range(step + 1, len(trace.steps)):
            found = trace.steps[later]
            if found.operation in ("add", "add_") and read in found.reads:
                sentence = (
                    f"order: {module} comes before its layer on the torch side (pre-norm), after the sum on the flax "
                    "side (post-norm)"
                )
                yield sentence, [Change(step, "no norm"), Change(later, f"norm {step}")], [later]
                break
    for step in range(min(steps, default=0), len(trace.steps)):
        if trace.steps[step].operation not in _NORMS:
            continue
        before = producers.get(trace.steps[step].reads[0])
        if before is None or trace.steps[before].operation not in ("add", "add_"):
            continue
        for value in trace.steps[before].reads:
            array = _normed(search, step, value)
            readers = [k for k in range(before) if value in trace.steps[k].reads and k >= min(steps)]
            readers += [k for k in readers if trace.steps[k].operation in VIEWS]
            if array is not None and readers:
                module = trace.steps[step].module or "this norm"
                sentence = (
                    f"order: {module} comes after the sum on the torch side (post-norm), before its layer on the flax "
                    "side (pre-norm)"
                )
                changes = [Change(step, "no norm")]
                changes += [
                    Change(k, ARGUMENT, trace.steps[k].reads.index(value), array) for k in dict.fromkeys(readers)
                ]
                yield sentence, changes, [before, step]
        break


def _normed(search: Search, step: int, value: int) -> np.ndarray | None:
    """Return what a norm makes of another value."""
    reads, writes = search.torch.steps[step].reads, search.torch.steps[step].writes
    x, own, rstd = (search.array("torch", number) for number in (value, reads[0], writes[-1]))
    weights = [search.array("torch", number) for number in reads[1:]]
    if x is None or own is None or rstd is None or any(w is None for w in weights) or x.shape != own.shape:
        return None
    axes = tuple(k for k in range(x.ndim) if rstd.shape[k] == 1) if rstd.ndim == x.ndim else (-1,)
    centred = search.torch.steps[step].operation == "native_layer_norm"

    def parts(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        middle = array - array.mean(axes, keepdims=True) if centred else array
        return middle, (middle**2).mean(axes, keepdims=True)

    epsilon = float(np.median(rstd**-2.0 - parts(own)[1].reshape(rstd.shape)))
    middle, variance = parts(x)
    result = middle / np.sqrt(variance + float(f"{epsilon:.3g}"))
    for k, weight in enumerate(weights):
        assert weight is not None
        result = result * weight if k == 0 else result + weight
    return result


def _terms(search: Search, steps: Sequence[int]) -> Iterator[Hypothesis]:
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
                yield sentence, [Change(step, ARGUMENT, position, own + other)], ()


def explained(
    pair: Pair, evidence: Evidence, failed: Sequence[str], general: Callable[[Sequence[str]], str]
) -> Findings:
    """Look for the places where two models part, and for the cause at each of them.

    Args:
        pair: which is judged.
        evidence: of the semantic leg.
        failed: names of the results that differ.
        general: returns a cause that concerns the whole of a side; it is given the torch parameters used at a place,
            which are tried first.
    """
    found: list[Place] = []
    search = record_both(pair, evidence, failed)
    first = search
    cause = ""
    while search.failed and len(found) < _MOST_PLACES and (segment := first_segment(search)) is not None:
        sentence = cause_at(search, segment)
        if not found and (not sentence or segment.place.healed != "all"):
            # One change throughout a side explains several places better than one for each.
            cause = general(parameters_of(search.torch, [*segment.torch, *_feeding(search.torch, segment.torch)]))
        found.append(dataclasses.replace(segment.place, cause=sentence))
        if cause or segment.heals is None:
            break
        search = search.healed(segment.heals)
    if not found:
        cause = general(())
    cause = cause or "; ".join(dict.fromkeys(place.cause for place in found if place.cause))
    return Findings(cause, tuple(found), unmatched(search), ladder(first, found))
