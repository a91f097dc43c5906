"""Derive sentences about speeds from records: each answers one question over the cells of one kind, and is checked.

A finding is derived anew from the records each time. "In all" is said only if the verdict of every cell is that, so a
sentence that stops being true is no longer written.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.plan.competitors import COMPILE, CUDA_GRAPH, EAGER, JIT, JIT_GRAPH
from bench.records import Record
from bench.study.cells import Identity, Rounds, by_label, identity, intervals, log_latencies
from bench.study.process_spread import NOTHING_SEEN, ProcessSpread, log_seconds
from bench.study.ranking import Ranking, rank_cells
from bench.study.statistics import FASTER, SAME, SLOWER, UNRESOLVED, Interval, verdict
from bench.study.verdicts import framework_ratio
from parity_tests.judge.dtypes import short_name

ARTICLE, _OTHERS = "article-*", "[!a]*"
# By which cells are told of together.
_CONDITIONS: tuple[str, ...] = ("device", "workload", "division", "direction")
EVERYWHERE, IN_PART = "in every cell", "in part"


class Side(NamedTuple):
    """One side of a question."""

    words: str
    framework: str
    mode: str
    implementation: str | None = None  # None is the fastest of the framework in that mode
    precision: str | None = None  # None is that of the cell


@dataclass(frozen=True)
class Question:
    """A ratio that is asked for in every cell: the speed of one side over that of the other."""

    name: str
    subject: Side
    reference: Side
    headline: bool = False  # for readers who want the frameworks and modes alone


def _forms(framework: str, mode: str, words: str, slow: str) -> tuple[Side, Side]:
    return Side(f"one batched product in {words}", framework, mode, "matmul"), Side(
        {"masked": "the masked dense layer", "loop": "the loop over partitions"}[slow], framework, mode, slow
    )


# Recorded graphs are compared with recorded graphs, and calls with calls, unless both are of one framework.
QUESTIONS: tuple[Question, ...] = (
    Question("jit-or-eager", Side("compiled JAX", "jax", JIT), Side("eager PyTorch", "torch", EAGER), True),
    Question(
        "graph-or-jit-graph",
        Side("PyTorch in a CUDA graph", "torch", CUDA_GRAPH),
        Side("JAX with graphs asked for", "jax", JIT_GRAPH),
        True,
    ),
    Question(
        "graph-or-eager",
        Side("a CUDA graph of PyTorch's matmul", "torch", CUDA_GRAPH, "matmul"),
        Side("its eager calls", "torch", EAGER, "matmul"),
        True,
    ),
    Question(
        "compile-or-eager",
        Side("torch.compile of our matmul", "torch", COMPILE, "matmul"),
        Side("its eager calls", "torch", EAGER, "matmul"),
    ),
    Question("product-or-masked-torch", *_forms("torch", EAGER, "eager PyTorch", "masked")),
    Question("product-or-loop-torch", *_forms("torch", EAGER, "eager PyTorch", "loop")),
    Question("product-or-masked-jax", *_forms("jax", JIT, "JAX", "masked")),
    Question("product-or-loop-jax", *_forms("jax", JIT, "JAX", "loop")),
    *(
        Question(
            f"bf16-or-fp32-{framework}",
            Side(f"{words}'s matmul in bf16", framework, mode, "matmul", "bf16"),
            Side("the same in fp32", framework, mode, "matmul", "ieee_fp32"),
        )
        for framework, mode, words in (("torch", EAGER, "PyTorch"), ("jax", JIT, "JAX"))
    ),
)


@dataclass(frozen=True)
class Seen:
    """The answer to a question in one cell."""

    where: Identity
    interval: Interval  # speed of the subject over that of the reference
    verdict: str  # FASTER, SLOWER, SAME or UNRESOLVED


@dataclass(frozen=True)
class Finding:
    """One sentence, and the cells that it follows from."""

    question: Question
    sentence: str
    holds: str  # `in every cell`, or `in part`
    where: Mapping[str, str]  # the cells: field to pattern
    seen: tuple[Seen, ...]

    @property
    def headline(self) -> bool:
        """Return True if it is of the frameworks' modes in the article's settings, and holds in every cell."""
        matched = self.where["division"] == "matched" and self.where["workload"] == ARTICLE
        return self.question.headline and self.holds == EVERYWHERE and matched

    @property
    def conditions(self) -> list[str]:
        """Return the conditions as `--where` takes them."""
        return [f"{name}={short_name(value)}" for name, value in self.where.items()]


@dataclass(frozen=True)
class _Cell:
    where: Identity
    ranking: Ranking
    rounds: Mapping[str, Rounds]  # of the ranked competitors
    known: ProcessSpread

    def of(self, side: Side) -> dict[str, Rounds]:
        """Return the competitors of a side, the fastest first."""
        records = [row.record for row in self.ranking.rows if row.rank is not None]
        return {
            record.label: self.rounds[record.label]
            for record in records
            if (record.framework, record.mode) == (side.framework, side.mode)
            and side.implementation in (None, record.implementation)
        }


def _inverse(found: Interval) -> Interval:
    low = 0.0 if math.isinf(found.high) else 1 / found.high
    return Interval(1 / found.ratio, low, 1 / found.low if found.low > 0 else math.inf, found.rounds, found.processes)


def _within(cell: _Cell, question: Question) -> Seen | None:
    """Answer a question about two competitors, or two sets of them, of one cell."""
    subject, reference = cell.of(question.subject), cell.of(question.reference)
    if not subject or not reference:
        return None
    floor, level = cell.ranking.floor, cell.ranking.confidence
    if question.subject.framework != question.reference.framework:
        sides = {question.subject.framework: subject, question.reference.framework: reference}
        found = framework_ratio(sides, floor, confidence=level, seen=cell.known)
        if found is None or found.interval is None:
            return None
        if question.subject.framework == "jax":
            return Seen(cell.where, found.interval, found.verdict)
        said = {FASTER: SLOWER, SLOWER: FASTER}.get(found.verdict, found.verdict)
        return Seen(cell.where, _inverse(found.interval), said)
    (label, rounds), (base,) = next(iter(subject.items())), list(reference.values())[:1]
    found = intervals(base, {label: rounds}, level).get(label)
    return None if found is None else Seen(cell.where, found, verdict(found, floor, cell.known.reach(1)))


def _between(cells: Sequence[_Cell], question: Question) -> list[Seen]:
    """Answer a question about two precisions: cells that differ in nothing else, by their times."""
    by_conditions: dict[tuple[Any, ...], dict[str, _Cell]] = defaultdict(dict)
    for cell in cells:
        key = cell.where._replace(precision="", dtype="")
        by_conditions[key].setdefault(cell.where.precision, cell)
    found = []
    for both in by_conditions.values():
        subject, reference = (both.get(str(side.precision)) for side in (question.subject, question.reference))
        if subject is None or reference is None:
            continue
        times = [
            [log_seconds(rounds, cell.known) for rounds in cell.of(side).values()]
            for cell, side in ((subject, question.subject), (reference, question.reference))
        ]
        if not all(times):
            continue
        ((own, off), *_), ((base, base_off), *_) = times
        half = min(math.hypot(off, base_off), 300.0)
        interval = Interval(math.exp(base - own), math.exp(base - own - half), math.exp(base - own + half), 0)
        floors = [cell.ranking.floor for cell in (subject, reference)]
        floor = None if None in floors else max(one for one in floors if one is not None)
        found.append(Seen(subject.where, interval, verdict(interval, floor, 0.0)))
    return found


def findings(
    groups: Iterable[Sequence[Record]],
    seen: Mapping[str, ProcessSpread] | None = None,
    questions: Sequence[Question] = QUESTIONS,
    ranked: Mapping[tuple[str, str], Ranking] | None = None,
) -> list[Finding]:
    """Derive all findings.

    Args:
        groups: the records of one cell and environment each; disturbed cells are left out.
        seen: environment to what is known of the spread of processes on its machine.
        questions: that are asked.
        ranked: environment and cell to its ranking, of those that were ranked already.
    """
    cells = []
    for group in groups:
        known = (seen or {}).get(group[0].environment_id, NOTHING_SEEN)
        ranking = (ranked or {}).get((group[0].environment_id, group[0].cell)) or rank_cells([group], seen)[0]
        if ranking.disturbed or ranking.baseline is None:
            continue
        rounds = {label: log_latencies(records) for label, records in by_label(group).items()}
        cells.append(_Cell(identity(group[0]), ranking, rounds, known))
    found: list[Finding] = []
    for question in questions:
        apart: dict[tuple[str, ...], list[Seen]] = defaultdict(list)
        across = question.subject.precision is not None
        answers = _between(cells, question) if across else (_within(cell, question) for cell in cells)
        for one in answers:
            if one is not None:
                at = one.where
                apart[at.device, _family(at.workload), at.division, at.direction].append(one)
        for key, together in apart.items():
            where: dict[str, str] = dict(zip(_CONDITIONS, key, strict=True))
            found += _told(question, where, together)
    # A question to which no cell has an answer gives no sentence.
    return [one for one in found if any(seen.verdict != UNRESOLVED for seen in one.seen)]


def _family(workload: str) -> str:
    """Return the pattern of the workloads that are told of together: the article's, or those of the catalogue."""
    if workload.startswith(ARTICLE[:-1]):
        return ARTICLE
    return workload if workload.startswith("a") else _OTHERS


def _told(question: Question, where: dict[str, str], together: Sequence[Seen]) -> list[Finding]:
    """Return one finding of all precisions where they agree, else one of each."""
    precisions = list(dict.fromkeys(one.where.precision for one in together))
    alike = len({one.verdict for one in together}) == 1 and together[0].verdict != UNRESOLVED
    if alike or len(precisions) == 1 or question.subject.precision is not None:
        return [_finding(question, where, together)]
    return [
        _finding(question, where | {"precision": name}, [one for one in together if one.where.precision == name])
        for name in precisions
    ]


def _finding(question: Question, where: dict[str, str], seen: Sequence[Seen]) -> Finding:
    verdicts = {one.verdict for one in seen}
    holds = EVERYWHERE if len(verdicts) == 1 and UNRESOLVED not in verdicts else IN_PART
    return Finding(question, _sentence(question, where, seen, holds), holds, where, tuple(seen))


def _rounded(value: float, up: bool) -> str:
    """Write a factor with two or three digits, rounded outwards, so that what is said of a range is true of all."""
    digits = 2 if value < 2 else 1 if value < 20 else 0
    scaled = value * 10**digits
    # What is a whole number but for the last bits is not moved to the next.
    return f"{(math.ceil(scaled - 1e-9) if up else math.floor(scaled + 1e-9)) / 10**digits:.{digits}f}x"


def _range(ratios: Sequence[float]) -> str:
    if len(ratios) == 1:
        return _rounded(ratios[0], up=False)
    low, high = _rounded(min(ratios), up=False), _rounded(max(ratios), up=True)
    return low if low == high else f"{low} to {high}"


_WHEN = {"forward": "Forward", "forward_backward": "With gradients", "train_step": "In a training step"}


def _sentence(question: Question, where: Mapping[str, str], seen: Sequence[Seen], holds: str) -> str:
    """Write one finding as a sentence."""
    subject, reference = question.subject.words, question.reference.words
    precisions = ", ".join(dict.fromkeys(short_name(one.where.precision) for one in seen))
    conditions = f"{where['division']}" + ("" if question.subject.precision else f", {precisions}")
    kind = {ARTICLE: "article setting", _OTHERS: "other workload"}.get(where["workload"], "cell")
    cells, names = f"{len(seen)} cell{'' if len(seen) == 1 else 's'}", {one.where.workload for one in seen}
    count = "both" if len(names) == 2 else f"all {len(names)}"
    all_of = f"in {count} {kind}s that were measured" if len(names) > 1 else f"in {names.pop()}"
    place = f"{all_of} ({conditions}: {cells})"
    when, ratios = _WHEN.get(where["direction"], where["direction"]), [one.interval.ratio for one in seen]
    if holds == EVERYWHERE:
        said = seen[0].verdict
        if said == SAME:
            return f"{when}, {subject} is as fast as {reference}, within 2%, {place}."
        if said == SLOWER:
            return f"{when}, {subject} takes {_range([1 / ratio for ratio in ratios])} the time of {reference} {place}."
        return f"{when}, {subject} is {_range(ratios)} as fast as {reference} {place}."
    parts = []
    for verdict_, words in ((FASTER, "faster"), (SLOWER, "slower")):
        own = [one.interval.ratio for one in seen if one.verdict == verdict_]
        if own:
            parts.append(f"{words} in {len(own)} ({_range(own if verdict_ == FASTER else [1 / one for one in own])})")
    if rest := sum(one.verdict not in (FASTER, SLOWER) for one in seen):
        parts.append(f"not told apart in {rest}")
    return f"{when}, {subject} against {reference} in {cells} of {kind}s ({conditions}): {', '.join(parts)}."
