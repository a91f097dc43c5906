"""The time that a run may take: which cells decide most, what each is expected to take, and what no time was left for.

First come the base settings, which are those of the plan's first workload, in every division and precision; then the
other workloads, those first whose frameworks were farthest apart in the run that is published for such a device; then
further sets of processes. A cell is begun if it is expected to end in time; one that does not leaves no record.

The estimates are of a CPU with two cores and of an H200. What cells took in this run corrects them.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from types import MappingProxyType
from typing import NamedTuple

from bench.environments import StoreError
from bench.measure.request import Request, SelectionError, chosen_competitors
from bench.plan.cells import DIVISIONS, Cell
from bench.plan.competitors import (
    CALLS,
    COMPILE,
    COMPILED_MODES,
    GRAPHS,
    IMPLEMENTATION,
    MAX_AUTOTUNE,
    REDUCE_OVERHEAD,
    STOCK,
    YARDSTICK,
    Catalogue,
    Competitor,
    launch,
)
from bench.plan.costs import executed_flops, planned_skip, useful_flops, working_bytes
from bench.plan.presets import BLOCK_S, Preset, plan_cells
from bench.record_files import records_file, run_directory, scan
from bench.records import Record

# Longer runs are meant to have no budget; the clocks of a system take no timeout of any length.
MOST_BUDGET_S = 1e7
# Between the blocks and to the end of a run; what a run of thousands of records shows takes longer.
_END_S, _END_OF_A_RECORD_S = 4.0, 0.003
# Before the first start was seen: importing the frameworks.
_START_S: Mapping[str, float] = MappingProxyType({"cpu": 6.0, "cuda": 12.0})
# The first cells tell how long others take; the longest of the last few does, since a cell that is begun in vain costs
# more than one that is not begun.
_REMEMBERED, _MARGIN = 4, 1.1
# Until a cell has ended: another machine, or a busy one, may be this many times slower than those of the estimates.
_FIRST_PACE = 3.0
# Device to operations and bytes a second of a usual call, to the seconds of a launch, and of building a competitor that
# is not compiled, that XLA compiles, that Inductor compiles and that it tunes.
_FLOPS_PER_S: Mapping[str, float] = MappingProxyType({"cpu": 3e10, "cuda": 2e13})
_BYTES_PER_S: Mapping[str, float] = MappingProxyType({"cpu": 5e9, "cuda": 1e12})
_LAUNCH_S = 5e-5
_BUILD_S: Mapping[str, tuple[float, float, float, float]] = MappingProxyType(
    {"cpu": (0.05, 0.3, 8.0, 20.0), "cuda": (0.2, 1.5, 6.0, 30.0)}
)
# Judging in float64: operations a second of NumPy, and seconds for an element of a result.
_ORACLE_FLOPS_PER_S, _JUDGED_ELEMENT_S = 1e10, 1e-7
# Counting the operations of a program.
_COUNT_S = 0.02
# Of a GPU, in which the energy of a second of calls is measured; and tracing.
_ENERGY_S, _TRACE_S = 1.2, 0.2
# Compiling with the cache filled.
_AGAIN = 0.4
_CEILINGS_S = 1.0
_CALLS_BESIDE_BLOCKS = 12
# The published run that tells where the frameworks are far apart.
_PUBLISHED: Mapping[str, str] = MappingProxyType({"cpu": "cpu-epyc-2core-catalogue", "cuda": "h200"})
_BASE, _ALL = "base", "all"


class Seconds(NamedTuple):
    """The expected duration of a cell."""

    before: float  # of its rounds: building, judging and warming up
    rounds: float
    after: float  # the further clocks

    @property
    def total(self) -> float:
        """The sum."""
        return sum(self)


def expected_seconds(cell: Cell, competitors: Sequence[Competitor], plan: Preset, *, diagnose: bool) -> Seconds:
    """Return what a cell is expected to take, by the amounts of work and the effort of the preset."""
    device, block_s = cell.device, BLOCK_S[cell.device]
    elements = cell.workload.elements * (1 if cell.direction == "forward" else 2)
    before, after, a_round = useful_flops(cell) / _ORACLE_FLOPS_PER_S + elements * _JUDGED_ELEMENT_S, 0.0, 0.0
    calls = {
        who: _LAUNCH_S
        + executed_flops(who, cell) / _FLOPS_PER_S[device]
        + working_bytes(who, cell) / _BYTES_PER_S[device]
        for who in competitors
        if planned_skip(who, cell, plan.limits, 2**62) is None
    }
    fastest = min(calls.values(), default=0.0)
    for who, call_s in calls.items():
        tuned = who.mode == MAX_AUTOTUNE
        plain, jitted, compiled, autotuned = _BUILD_S[device]
        build = autotuned if tuned else compiled if who.mode in (COMPILE, REDUCE_OVERHEAD) else plain
        build = jitted if who.mode in COMPILED_MODES and who.framework == "jax" else build
        build = min(build, plan.limits.prepare_s)
        before += build + elements * _JUDGED_ELEMENT_S + _CALLS_BESIDE_BLOCKS * call_s
        if call_s > max(plan.limits.call_s, plan.limits.slowdown * fastest):
            continue
        block = max(block_s, call_s)
        before += plan.warm_up_blocks * block
        # The second block of the round, and refilling the caches before each.
        a_round += 2.6 * block
        after += _COUNT_S + call_s
        if diagnose and plan.probe_s > 0:
            after += 3 * plan.probe_s + _TRACE_S + _AGAIN * build + (_ENERGY_S if device == "cuda" else 0.0)
    # The baseline runs again as its control.
    a_round *= 1 + 1 / max(1, len(calls))
    rounds = max(plan.least_rounds * a_round, min(plan.cell_s, plan.rounds * a_round))
    return Seconds(before, rounds, after + (_CEILINGS_S if plan.probe_s > 0 else 0.0))


@dataclass
class Budget:
    """The clock of a run, and what it learns of the time of its cells.

    Args:
        seconds: from now on; None for a run that has all the time it takes.
    """

    seconds: float | None
    _begun: float = field(default_factory=lambda: time.monotonic(), init=False)
    _paces: list[float] = field(default_factory=list, init=False)
    _start_s: float | None = field(default=None, init=False)
    _first_pace: float = field(default=_FIRST_PACE, init=False)
    needed_s: float = field(default=math.inf, init=False)  # by the shortest cell for which there was no time
    in_vain_s: float | None = field(default=None, init=False)  # spent on a cell that the end cut short

    @property
    def limited(self) -> bool:
        """True if there is an end."""
        return self.seconds is not None

    def left(self) -> float:
        """Return the seconds that are left."""
        return math.inf if self.seconds is None else self._begun + self.seconds - time.monotonic()

    def start_s(self, device: str) -> float:
        """Return what starting the workers is expected to take."""
        return _START_S.get(device, _START_S["cpu"]) if self._start_s is None else self._start_s

    def started(self, seconds: float) -> None:
        """Note how long the workers took to start."""
        self._start_s = seconds

    def expected(self, cell: Cell, competitors: Sequence[Competitor], plan: Preset, *, diagnose: bool) -> Seconds:
        """Return what a cell is expected to take here; see `expected_seconds`."""
        pace = self.pace
        return Seconds(*(pace * one for one in expected_seconds(cell, competitors, plan, diagnose=diagnose)))

    @property
    def pace(self) -> float:
        """How many times as long as by the estimates cells are expected to take here."""
        return _MARGIN * max(self._paces[-_REMEMBERED:]) if self._paces else self._first_pace

    def dares(self) -> bool:
        """Return True once, if no cell has ended: nothing is lost by one that may be as fast as by the estimates."""
        if self._paces or self._first_pace <= 1.0:
            return False
        self.needed_s /= self._first_pace
        self._first_pace = 1.0
        return True

    def reaches(self, expected: Seconds) -> bool:
        """Return True if there is time for a cell."""
        if expected.total > self.left():
            self.needed_s = min(self.needed_s, expected.total)
            return False
        return True

    def took(self, expected: Seconds, seconds: float) -> None:
        """Note how long a cell took."""
        self._paces.append(seconds * self.pace / expected.total)


class Queue:
    """The cells of one step; one that was postponed comes again as soon as there is time for it.

    Args:
        cells: in their order.
        budget: the clock.
    """

    def __init__(self, cells: Sequence[Cell], budget: Budget):
        self._cells, self._budget = list(reversed(cells)), budget
        self._postponed: list[tuple[Cell, float]] = []

    def postpone(self, cell: Cell, seconds: float) -> None:
        """Keep a cell that takes so long by the estimates, which may turn out to be too high."""
        self._postponed.append((cell, seconds))

    def __iter__(self) -> Iterator[Cell]:
        """Yield the first cell that was postponed and now fits, else the next one."""
        while True:
            fits = (k for k, (_, s) in enumerate(self._postponed) if s * self._budget.pace <= self._budget.left())
            if (k := next(fits, None)) is not None:
                yield self._postponed.pop(k)[0]
            elif self._cells:
                yield self._cells.pop()
            elif not (self._postponed and self._budget.dares()):
                return


def end_s(records: int) -> float:
    """Return the seconds to keep for the report of so many records."""
    return _END_S + _END_OF_A_RECORD_S * records


def steps(plan: Preset, *, limited: bool, first: int = 0) -> list[tuple[int, str, str]]:
    """Return what a run does with one set of workers each: a process replicate, a division and which of its cells.

    Without a budget all cells of the divisions in their order. With one the matched division is first, where alone
    the frameworks are compared like with like.
    """
    replicates = range(first, plan.replicates)
    if not limited:
        return [(replicate, division, _ALL) for replicate in replicates for division in plan.divisions]
    divisions = sorted(plan.divisions, key=lambda name: (name != "matched", DIVISIONS.index(name)))
    # The second time the base settings are among all cells again: those for which there seemed to be no time.
    parts = (_BASE, _ALL) if len(divisions) > 1 else (_ALL,)
    found = [(first, division, part) for part in parts for division in divisions] if replicates else []
    return found + [(replicate, division, _ALL) for replicate in replicates[1:] for division in divisions]


def in_order(cells: Sequence[Cell], plan: Preset, part: str = _ALL) -> list[Cell]:
    """Return the cells of one step, those first that decide most."""
    base = plan.workloads[0]
    found = [cell for cell in cells if part == _ALL or cell.workload.name == base]
    if not any(cell.workload.name != base for cell in found):
        return found
    apart = published(cells[0].device)
    # What was never measured comes last: nothing says that it decides anything.
    return sorted(found, key=lambda cell: (cell.workload.name != base, -apart.distance(cell)))


@dataclass(frozen=True)
class Published:
    """What the published run of a kind of device tells before anything is measured."""

    records: Sequence[Record] = ()  # without samples

    @cached_property
    def _distances(self) -> dict[tuple[str, ...], float]:
        """Cell to how far apart the frameworks' best were, as a log ratio: of plain calls or of graphs, the larger."""
        best: dict[tuple[str, ...], dict[tuple[str, str], float]] = {}
        for one in self.records:
            if one.latency_s and not one.control and one.kind != YARDSTICK:
                fastest = best.setdefault((one.workload, one.direction, one.precision, one.division), {})
                side = (launch(one.mode, one.device), one.framework)
                fastest[side] = min(fastest.get(side, math.inf), one.latency_s)
        return {
            key: max(abs(math.log(found[kind, "jax"] / found[kind, "torch"])) for kind in kinds)
            for key, found in best.items()
            if (kinds := [kind for kind in (CALLS, GRAPHS) if {(kind, "jax"), (kind, "torch")} <= found.keys()])
        }

    def distance(self, cell: Cell) -> float:
        """Return the distance in a cell, else half the largest in the same sizes under other conditions, else 0.

        Half, so that no workload is measured under all conditions before others that are known to be far apart.
        """
        key = (cell.workload.name, cell.direction, cell.precision, cell.division)
        others = [found for other, found in self._distances.items() if other[0] == key[0]]
        return self._distances.get(key, max(others, default=0.0) / 2)

    def catalogues(self, frameworks: Sequence[str]) -> tuple[Catalogue, ...]:
        """Return the competitors that took part, as those that would: an estimate starts no worker."""
        found = []
        for framework in frameworks:
            own = [one for one in self.records if one.framework == framework]

            def names(kind: str, own: Sequence[Record] = own, *, unequal: bool = False) -> tuple[str, ...]:
                alike = [one for one in own if one.kind == kind and _unequal(one) == unequal]
                return tuple(dict.fromkeys(one.implementation for one in alike)) or ("matmul",)

            equal, stock = names(IMPLEMENTATION), names(STOCK)
            unequal = names(IMPLEMENTATION, unequal=True)
            found.append(Catalogue(framework, equal, stock, names(YARDSTICK), unequal=unequal, shared=equal[:2]))
        return tuple(found)


def _unequal(record: Record) -> bool:
    return not (isinstance(record.in_features, int) and isinstance(record.out_features, int))


@cache
def published(device: str) -> Published:
    """Read the published run for a kind of device; without one nothing is known."""
    try:
        path = records_file(run_directory(_PUBLISHED[device]))
        return Published([line.record().without_samples() for line in scan(path)])
    except StoreError:
        return Published()


def left_out_sentences(cells: Sequence[tuple[int, Cell]], total: int) -> list[str]:
    """Say which cells no time was left for: how many, and by their conditions which workloads.

    Args:
        cells: process replicate and cell.
        total: number of all, with those that are measured.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for replicate, cell in cells:
        _, _, conditions = cell.title.partition("), ")
        groups.setdefault((conditions, cell.workload.name), []).append(replicate)
    lines: dict[tuple[str, str], list[str]] = {}
    for (conditions, name), replicates in groups.items():
        which = ", ".join(map(str, replicates))
        lines.setdefault((conditions, "" if which == "0" else f", process {which}"), []).append(name)
    said = f"There was no time for {len(cells)} of {total} cells; the same command with --resume goes on with them."
    listed = (f"Left out, {what}{which}: {', '.join(names)}." for (what, which), names in lines.items())
    return [said, *listed] if cells else []


def forecast(request: Request) -> list[str]:
    """Say before anything is started for which cells a budget is expected to reach, and for which it is not.

    The competitors are those of the published run; without a named device they are expected to run on a CPU.
    """
    plan, device = request.plan, "cuda" if request.device == "cuda" else "cpu"
    budget, catalogues = Budget(None), published(device).catalogues(request.frameworks)
    spent, late, reached, workers = end_s(0), dict[tuple[int, Cell], None](), set[tuple[int, Cell]](), None
    for replicate, division, part in steps(plan, limited=True):
        spent += budget.start_s(device) * (workers != (replicate, division))
        workers = (replicate, division)
        for cell in in_order(plan_cells(replace(plan, divisions=(division,)), device), plan, part):
            try:
                competitors = chosen_competitors(catalogues, request, cell)
            except SelectionError:
                # The workers may know more names; what they lack is said when they are there.
                competitors = ()
            needed = expected_seconds(cell, competitors, plan, diagnose=replicate == 0).total
            if (replicate, cell) in reached:
                continue
            if spent + needed > (request.budget_s or 0.0):
                late[replicate, cell] = None
                continue
            spent += needed
            late.pop((replicate, cell), None)
            reached.add((replicate, cell))
    total = len(reached) + len(late)
    said = f"{request.budget_s:g} s are expected to reach for {len(reached)} of {total} cells"
    where = f"a device like that of the published run {_PUBLISHED[device]}"
    return [f"{said}, by estimates for {where}.", *left_out_sentences(list(late), total)[1:]]
