"""Find where two models part: the first operations whose results differ while what they read agrees.

Both runs are recorded, and their values matched by fingerprints. From the results that differ one walks back, on each
side, through values without counterpart: what lies beyond the first that match has no part in it. The proof is healing:
with Flax's value in the place of torch's at the end of the segment, torch's results become Flax's. What still differs
has another place, and the search goes on from there.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from parity_tests.judge.comparison import within
from parity_tests.judge.dtypes import is_complex
from parity_tests.pair.judge import Evidence
from parity_tests.pair.legs import Pair, Values
from parity_tests.pair.side import is_output
from parity_tests.pair.trace import VIEWS, Change, Place, Trace, before_views, parameters_of, shown

_MOST_TRIED = 60  # runs of the torch side that look for an end of one place
_MOST_AXES = 5  # whose orders are tried
_SAMPLE = 4096  # elements that the likeness of two arrays is judged by
_ALIKE = 3  # arrays of the other side that are tried for one value


@dataclass
class Segment:
    """A place as the recorded runs have it."""

    torch: tuple[int, ...]  # numbers of the operations between values that agree and the end of the segment
    flax: tuple[int, ...]  # likewise
    place: Place  # in words
    # Numbers of the values, on the torch and the flax side, with which everything that follows agrees, if known
    end: tuple[int, int] | None = None
    heals: Change | None = None  # the change that puts Flax's value in
    behind: tuple[int, ...] = ()  # numbers of all operations of torch that the results hang on, where no end was found


@dataclass
class Search:
    """The recorded runs of a pair, and what is known of their values."""

    pair: Pair  # which is judged
    values: Values  # what both sides are given
    evidence: Evidence  # of the semantic leg
    failed: tuple[str, ...]  # names of the results that differ
    torch: Trace  # the run of the torch side, with the changes made so far
    flax: Trace  # the run of the flax side
    changes: tuple[Change, ...] = ()
    matches: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Match the values of both runs."""
        self.matches = matched(self.torch, self.flax)

    def rerun(self, changes: Sequence[Change], asked: Sequence[int] = (), wanted: Sequence[int] | None = ()) -> Trace:
        """Record the torch side again, with changes on top of those made before; no noise."""
        given = self.values.of("torch")
        return self.pair.sides["torch"].record(
            *given, (*self.changes, *changes), None if wanted is None else tuple(wanted), tuple(asked), noisy=False
        )

    def healed(self, change: Change) -> "Search":
        """Return the search after a place, with Flax's value put in at its end."""
        trace = dataclasses.replace(self.rerun([change], wanted=None), limits=self.torch.limits)
        changes = (*self.changes, change)
        left = tuple(name for name in self.failed if not self._agrees(trace, name))
        return Search(self.pair, self.values, self.evidence, left, trace, self.flax, changes)

    def _agrees(self, trace: Trace, name: str) -> bool:
        found, other = self.pair.as_torch("torch", trace.outcome), self.evidence.truths["jax"]
        return name in found and within(name, found[name], other[name], self.evidence.limit(name)).status == "ok"

    def agrees(self, trace: Trace) -> bool:
        """Tell whether the results of a changed run are Flax's, within the limits of float64."""
        found = self.pair.as_torch("torch", trace.outcome)
        other = self.evidence.truths["jax"]
        names = [name for name in self.failed if name in found]
        names += [name for name in found if is_output(name) and name not in names]
        return bool(names) and all(
            name in other and within(name, found[name], other[name], self.evidence.limit(name)).status == "ok"
            for name in names
        )

    def array(self, key: str, number: int) -> np.ndarray | None:
        """Return a value of a run; None for one that was too large to keep."""
        trace = self.torch if key == "torch" else self.flax
        if number in trace.numbers:
            return trace.arrays[trace.numbers.index(number)]
        side, given = self.pair.sides[key], self.values.of(key)
        changes = self.changes if key == "torch" else ()
        kept = side.record(*given, changes, (number,), (), noisy=False)
        return kept.arrays[0] if kept.arrays else None

    def equal(self, trace: Trace, torch: int, flax: int) -> bool:
        """Tell whether a value of a changed run has the fingerprint of one of Flax's."""
        if torch >= len(trace.features) or trace.sizes[torch] != self.flax.sizes[flax]:
            return False
        limit = self.torch.limits[torch] + self.flax.limits[flax]
        return bool((np.abs(trace.features[torch] - self.flax.features[flax]) <= limit).all())


def matched(torch: Trace, flax: Trace) -> dict[int, list[int]]:
    """Return for every value of the torch run the values of the flax run with the same numbers."""
    found: dict[int, list[int]] = {}
    sizes = flax.sizes
    by_size = {size: np.flatnonzero(sizes == size) for size in set(sizes.tolist())}
    for number, size in enumerate(torch.sizes.tolist()):
        if size in by_size:
            others = by_size[size]
            limit = torch.limits[number] + flax.limits[others]
            alike = (np.abs(torch.features[number] - flax.features[others]) <= limit).all(axis=1)
            if alike.any():
                found[number] = others[alike].tolist()
    return found


def walked(trace: Trace, starts: Sequence[int], matches: frozenset[int] | set[int]) -> set[int]:
    """Return the steps behind some values, up to values that have a counterpart."""
    producers, steps, left = trace.producers(), set(), [value for value in starts if value not in matches]
    seen = set(left)
    while left:
        step = producers.get(left.pop())
        if step is None:
            continue
        steps.add(step)
        for value in trace.steps[step].reads:
            if value not in seen and value not in matches:
                seen.add(value)
                left.append(value)
    return steps


def record_both(pair: Pair, evidence: Evidence, failed: Sequence[str]) -> Search:
    """Record both sides, with the backward pass if gradients differ."""
    assert evidence.values is not None
    values = evidence.values
    if all(map(is_output, failed)):
        values = dataclasses.replace(values, cotangents=None)
    traces = {key: side.record(*values.of(key)) for key, side in pair.sides.items()}
    return Search(pair, values, evidence, tuple(failed), traces["torch"], traces["jax"])


def first_segment(search: Search, healing: bool = True) -> Segment | None:
    """Return the first place where the two runs part, its end proven by healing if that is possible, and asked for."""
    open_ended: frozenset[int] = frozenset()
    starts = {
        "torch": [search.torch.results[name] for name in _own(search, "torch") if name in search.torch.results],
        "jax": [search.flax.results[name] for name in _own(search, "jax") if name in search.flax.results],
    }
    known_flax = {number for found in search.matches.values() for number in found}
    torch = walked(search.torch, starts["torch"], set(search.matches))
    flax = walked(search.flax, starts["jax"], known_flax)
    if not torch or not flax:
        # Everything agrees but for its order: what reads a value is then the place, or the result itself.
        ends = {key: _producers(trace, starts[key]) for key, trace in (("torch", search.torch), ("jax", search.flax))}
        if not torch and flax:
            # Flax goes on with torch's result, which its own is then put in the place of.
            open_ended = frozenset(before_views(search.torch, starts["torch"]))
            ends["torch"] = _producers(search.torch, [*open_ended])
        torch, flax = torch or ends["torch"], flax or ends["jax"]
    if not torch or not flax:
        return None
    firsts = [first_operation(trace, steps) for trace, steps in ((search.torch, torch), (search.flax, flax))]
    segment = Segment((firsts[0],), (firsts[1],), Place("", ""))
    if found := _healed(search, sorted(torch), sorted(flax), open_ended) if healing else None:
        step, end, change, everything = found
        producer = search.flax.producers()[end[1]]
        own = walked(search.torch, [end[0]], set(search.matches))
        other = walked(search.flax, [end[1]], known_flax) or {producer}
        segment = Segment(tuple(sorted(own | {step})), tuple(sorted(other)), segment.place, end, change)
        segment.place = _place(search, segment, "all" if everything else "here")
    else:
        segment.place = _place(search, segment, "")
        segment.behind = tuple(sorted(torch))
    return segment


def _producers(trace: Trace, values: Sequence[int]) -> set[int]:
    producers = trace.producers()
    return {producers[value] for value in values if value in producers}


def _own(search: Search, key: str) -> Iterator[str]:
    """Return the failing results under a side's own names: gradients have other ones on the flax side."""
    links = search.pair.mapping.links
    for name in search.failed:
        torch = name.removeprefix("d_")
        if key == "jax" and name.startswith("d_"):
            others = [link.flax.name for link in links if link.torch and link.flax and link.torch.name == torch]
            yield from (f"d_{other}" for other in dict.fromkeys(others or [torch]))
        else:
            yield name


def arrangements(array: np.ndarray, shape: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the numbers of an array in a shape: as they are, and with their axes in every other order."""
    if array.size != int(np.prod(shape)):
        return
    axes = array.squeeze() if array.ndim > _MOST_AXES else array
    orders = itertools.permutations(range(axes.ndim)) if axes.ndim <= _MOST_AXES else [tuple(range(axes.ndim))]
    seen = set()
    for order in orders:
        kept = tuple(axis for axis in order if axes.shape[axis] > 1)
        if kept not in seen:
            seen.add(kept)
            yield np.ascontiguousarray(axes.transpose(order)).reshape(shape)


def likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two arrays of one shape, from a sample of their elements."""
    pace = max(first.size // _SAMPLE, 1)
    a, b = first.ravel()[::pace], second.ravel()[::pace]
    usable = np.isfinite(a) & np.isfinite(b)
    a, b = a[usable], b[usable]
    if a.size < 2:
        return 1.0
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(abs(np.vdot(a, b))) / norm if norm > 0 else 0.0


def _candidates(
    search: Search, torch: Sequence[int], flax: Sequence[int], open_ended: frozenset[int]
) -> Iterator[tuple[int, int, int, np.ndarray, int]]:
    """Yield step, output, values and Flax's numbers in torch's arrangement, the earliest operations first."""
    arrays = dict(zip(search.torch.numbers, search.torch.arrays, strict=True))
    others = dict(zip(search.flax.numbers, search.flax.arrays, strict=True))
    unmatched = {v for found in search.matches.values() for v in found}
    free = [value for step in flax for value in search.flax.steps[step].writes if value not in unmatched]
    for step in torch:
        if search.torch.steps[step].operation in VIEWS:
            continue
        for output, number in enumerate(search.torch.steps[step].writes):
            if (number in search.matches and number not in open_ended) or number not in arrays:
                continue
            own, found = arrays[number], []
            for value in free:
                if value in others and others[value].size == own.size and is_complex(others[value]) == is_complex(own):
                    found += [(likeness(own, each), value, each) for each in arrangements(others[value], own.shape)]
            last = search.flax.results.values() if number in open_ended else ()
            found.sort(key=lambda entry: (entry[1] not in last, -entry[0], entry[1]))
            for _, value, each in found[:_ALIKE]:
                yield step, output, number, each, value


def _healed(
    search: Search, torch: Sequence[int], flax: Sequence[int], open_ended: frozenset[int]
) -> tuple[int, tuple[int, int], Change, bool] | None:
    """Find the earliest value that, replaced by Flax's, makes the results agree, or else what follows.

    A wrong pair of values makes nothing agree that parameters take part in: the right one does, up to the next place.
    """
    using = {value for step in search.torch.steps if parameters_of(search.torch, [step]) for value in step.writes}
    best, most = None, 0
    for step, output, number, each, value in itertools.islice(
        _candidates(search, torch, flax, open_ended), _MOST_TRIED
    ):
        change = Change(step, "", output, each)
        trace = search.rerun([change])
        everything = search.agrees(trace)
        gained = (
            set(matched(dataclasses.replace(trace, limits=search.torch.limits), search.flax))
            if (trace.features.shape == search.torch.features.shape)
            else set()
        )
        # Copies and views of the value that was put in agree with it in any case.
        copies = {
            k for k in gained if (np.abs(trace.features[k] - trace.features[number]) <= search.torch.limits[k]).all()
        }
        gained -= {number, *search.matches, *copies}
        found = step, (number, value), change, everything
        if everything or gained & using:
            return found
        if len(gained) > most:
            best, most = found, len(gained)
    return best if most > 1 else None


def _place(search: Search, segment: Segment, healed: str) -> Place:
    names = {}
    for key, trace, steps in (("torch", search.torch, segment.torch), ("flax", search.flax, segment.flax)):
        first = _first(trace, steps)
        names[key] = _name(trace, first, key), trace.steps[first].line, _operations(trace, steps)
    backward = _is_backward(search, segment)
    if backward and (other := _mapped(search, search.torch.steps[segment.torch[0]].module)):
        # Where one side has no backward pass at all, its first operation stands elsewhere.
        names["flax"] = other, names["flax"][1], names["flax"][2]
    return Place(
        names["torch"][0],
        names["flax"][0],
        names["torch"][2],
        names["flax"][2],
        names["torch"][1],
        names["flax"][1],
        _after(search, segment),
        healed,
        backward=backward,
    )


def _first(trace: Trace, steps: Sequence[int]) -> int:
    """Return the first operation that is more than a view."""
    return next((step for step in steps if trace.steps[step].operation not in VIEWS), steps[0])


def first_operation(trace: Trace, steps: Collection[int]) -> int:
    """Return the first operation on a value: zeros that one side alone starts from are no place, nor is a view."""
    found = [step for step in steps if trace.steps[step].reads and trace.steps[step].operation not in VIEWS]
    return min(found or steps)


def _is_backward(search: Search, segment: Segment) -> bool:
    """Tell whether the first operation comes after all outputs are known."""
    if all(map(is_output, search.failed)):
        return False
    outputs = [value for name, value in search.torch.results.items() if is_output(name)]
    known = _producers(search.torch, outputs)
    return bool(known) and segment.torch[0] > max(known)


def _mapped(search: Search, module: str) -> str:
    """Name the Flax module with the parameters of a torch module; empty if there is none, or several."""
    links = [link for link in search.pair.mapping.links if link.torch is not None and link.flax is not None]
    found = {
        link.flax.name.rpartition(".")[0]
        for link in links
        if link.torch and link.flax and module and link.torch.name.rpartition(".")[0] == module
    }
    return shown(found.pop()) if len(found) == 1 else ""


def _name(trace: Trace, step: int, key: str) -> str:
    """Name the module of an operation; without any, the parameters that it uses."""
    found = trace.steps[step]
    if found.module:
        return shown(found.module) if key == "flax" else found.module
    used = parameters_of(trace, [step])
    return ", ".join(used)


def _operations(trace: Trace, steps: Sequence[int]) -> tuple[str, ...]:
    return tuple(trace.steps[step].operation for step in steps if trace.steps[step].operation not in VIEWS)


def _after(search: Search, segment: Segment) -> tuple[str, str]:
    """Name the modules of the last values before the segment that agree."""
    found = []
    for key, trace, steps in (("torch", search.torch, segment.torch), ("flax", search.flax, segment.flax)):
        producers = trace.producers()
        read = [v for v in trace.steps[_first(trace, steps)].reads if not trace.parameter(v)]
        read = [producers[v] for v in read if v in producers]
        last = max(read, default=None)
        while last is not None and trace.steps[last].operation in VIEWS and trace.steps[last].reads:
            last = producers.get(trace.steps[last].reads[0])
        name = "" if last is None else trace.steps[last].module
        found.append(shown(name) if key == "flax" else name)
    return found[0], found[1]


def ladder(search: Search, places: Sequence[Place]) -> tuple[tuple[str, str, str], ...]:
    """Return the modules in order of execution, by both names, each with `agrees`, `differs` or `place`."""
    producers = search.flax.producers()
    last: dict[str, tuple[str, str]] = {}
    for step in search.torch.steps:
        for value in step.writes if step.operation not in VIEWS else ():
            others = [search.flax.steps[producers[k]].module for k in search.matches.get(value, ()) if k in producers]
            known = last.get(step.module, ("", ""))[0]
            last[step.module] = shown(others[0]) if others else known, "agrees" if others else "differs"
    named = {place.torch: place.flax for place in places}
    return tuple(
        (name or "the top module", named.get(name) or other, "place" if name in named else state)
        for name, (other, state) in last.items()
    )


def unmatched(search: Search) -> tuple[str, ...]:
    """Name the modules of both sides none of whose values have a counterpart."""
    found = []
    matched_flax = {number for numbers in search.matches.values() for number in numbers}
    for key, trace, known in (("torch", search.torch, set(search.matches)), ("flax", search.flax, matched_flax)):
        by_module: dict[str, bool] = {}
        for step in trace.steps:
            if step.module and step.operation not in VIEWS and step.writes:
                by_module[step.module] = by_module.get(step.module, False) or any(v in known for v in step.writes)
        names = [shown(name) if key == "flax" else name for name, has in by_module.items() if not has]
        found += [f"{key} {name}" for name in names]
    return tuple(found)
