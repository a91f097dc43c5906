"""Search for the cause of a mismatch at its place: changes of single operations of the torch side, each proven there.

A hypothesis counts as proven if the changed torch side has Flax's results, or, before another place, if it has Flax's
value at the end of this one.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from parity_tests.causes.flow import cut_short, goes_on, read_instead, turned_loops
from parity_tests.causes.relations import UNNAMED, related, remote
from parity_tests.causes.selections import Hypothesis, exchanged
from parity_tests.pair.judge import Evidence
from parity_tests.pair.legs import Pair
from parity_tests.pair.localisation import (
    Search,
    Segment,
    first_segment,
    ladder,
    matched,
    record_both,
    unmatched,
)
from parity_tests.pair.side import CANNOT_RUN
from parity_tests.pair.trace import ARGUMENT, VIEWS, Change, Place, Trace, parameters_of

_MOST_PLACES = 6
_MOST_ALONE, _MOST_RELATED = 200, 60  # runs: of single alternatives, and of each other kind of hypothesis
_COMMON = ("activation", "function", "sign", "constant: the flax side adds")
_MOST_STEPS = 24  # of a segment whose alternatives are tried
_MOST_CHOICES = 8
_ALIKE = {"rsub": "add", "sub": "add"}  # operations that are changed together
_CHOICES = ("argmax", "argmin", "topk", "sort")
_GATHERS = ("index_add", "scatter_add", "scatter_reduce")
_NORMS = ("native_layer_norm", "_fused_rms_norm")
_EXCHANGED = ("come in the order", "are exchanged between the two sides")


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


def cause_at(search: Search, segment: Segment) -> tuple[str, bool]:
    """Return a sentence that was proven at this place, or an empty one, and whether it explains all results."""
    for sentence, changes, shown_by in _hypotheses(search, segment):
        try:
            trace = search.rerun(changes)
        except CANNOT_RUN:
            continue
        if proven(search, segment, trace, shown_by):
            return sentence, search.agrees(trace)
    return "", False


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
    steps = [step for step in segment.behind or segment.torch if search.torch.steps[step].operation not in VIEWS][
        :_MOST_STEPS
    ]
    asked = [*steps, *_readers_of_masks(search, steps), *_choices(search.torch, steps), *_gathered(search, steps)]
    yield from _moved_norm(search, steps, segment)
    yield from turned_loops(search, segment)
    offered = search.rerun((), asked=asked).alternatives
    # Those that every operation has come last, or they would keep the others from being tried.
    offered = sorted(offered, key=lambda offer: offer[2].startswith(_COMMON))
    yield from itertools.islice(_alone(search, segment, offered), _MOST_ALONE)
    # What single operations have says more than a formula that their results fit.
    told = [offer for offer in offered if not offer[2].startswith(_COMMON)]
    yield from itertools.islice(_together(search, told), _MOST_RELATED)
    yield from related(search, segment, steps)
    yield from itertools.islice(_together(search, offered[len(told) :]), _MOST_RELATED)
    yield from itertools.islice(exchanged(search, steps), _MOST_RELATED)
    yield from itertools.islice(read_instead(search, segment), _MOST_RELATED)
    yield from cut_short(search)
    yield from itertools.islice(remote(search, segment, steps), _MOST_RELATED)


def _alone(search: Search, segment: Segment, offered: Sequence[tuple[int, str, str]]) -> Iterator[Hypothesis]:
    """Change single operations."""
    for step, title, sentence in offered:
        weight = next(iter(parameters_of(search.torch, [step])), "")
        sentence = sentence.replace("{weight}", weight)
        if segment.place.backward and sentence.startswith("residual"):
            sentence = "gradient: the flax side lacks a term of this sum of gradients (one way is stopped, detached)"
        yield sentence, [Change(step, title)], ()


def _together(search: Search, offered: Sequence[tuple[int, str, str]]) -> Iterator[Hypothesis]:
    """Change all operations of a segment in the same way, such as the gates of a cell."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for step, title, sentence in offered:
        operation = search.torch.steps[step].operation
        groups.setdefault((_ALIKE.get(operation, operation), title), []).append((step, sentence))
    for (_, title), found in groups.items():
        if len(found) > 1 and "{weight}" not in found[0][1]:
            yield found[0][1], [Change(step, title) for step, _ in found], ()


def _readers_of_masks(search: Search, steps: Sequence[int]) -> list[int]:
    """Return the selections among the first operations of a segment that come just before it, as a mask does."""
    producers = search.torch.producers()
    read = {value for step in steps[:1] for value in search.torch.steps[step].reads}
    found = [producers[value] for value in read if value in producers]
    return [step for step in found if search.torch.steps[step].operation in ("masked_fill", "where", "add")]


def _choices(trace: Trace, steps: Sequence[int]) -> list[int]:
    """Return the last operations up to a segment that find indices, which are no real numbers: no value leads there."""
    found = [k for k in range(max(steps, default=-1) + 1) if trace.steps[k].operation in _CHOICES and k not in steps]
    return found[-_MOST_CHOICES:]


def _gathered(search: Search, steps: Sequence[int]) -> list[int]:
    """Return the sums over one index that a segment reads: the other side may have them too, and go on to a mean."""
    producers = search.torch.producers()
    read = dict.fromkeys(value for step in steps for value in search.torch.steps[step].reads)
    found = dict.fromkeys(producers[value] for value in read if value in producers)
    return [k for k in found if search.torch.steps[k].operation.removesuffix("_") in _GATHERS and k not in steps]


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


def place_of_shapes(pair: Pair, evidence: Evidence, failed: Sequence[str]) -> tuple[Place, ...]:
    """Return the first place after which two models part whose results have different shapes: none can be put in."""
    segment = first_segment(record_both(pair, evidence, failed), healing=False)
    return () if segment is None else (segment.place,)


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
        sentence, everything = cause_at(search, segment)
        if not found and (not everything or sentence.startswith("order: ")):
            # One change throughout a side explains several places better than one for each, and exchanged inputs or
            # blocks of parameters say more than the order of numbers that come of them.
            whole = general(parameters_of(search.torch, [*segment.torch, *_feeding(search.torch, segment.torch)]))
            cause = whole if not everything or any(words in whole for words in _EXCHANGED) else ""
        if f"numbers {UNNAMED}" in sentence and any(not place.cause for place in found):
            # What was put in at a place that nobody can explain may itself lie in another order.
            sentence = ""
        found.append(dataclasses.replace(segment.place, cause=sentence))
        if cause or segment.heals is None:
            break
        search = search.healed(segment.heals)
        if everything:
            break
    if not found:
        cause = general(())
    # A line that parts again for an unknown reason, as in a loop, is not explained by what fits its first turn.
    unknown = {(place.torch, place.torch_line) for place in found if not place.cause}
    named = [place.cause for place in found if place.cause and (place.torch, place.torch_line) not in unknown]
    cause = cause or "; ".join(dict.fromkeys(named))
    return Findings(cause or goes_on(first), tuple(found), unmatched(search), ladder(first, found))
