"""The timed rounds of a cell: the state of each competitor, and the decision who takes part in the next round.

A round is one block of every competitor in shuffled order, then all again in the reverse order. A competitor that is
certainly far behind leaves early; the others go on until every verdict is settled or a cap is reached. The last blocks
of a competitor are judged as well as timed.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.measure.blocks import could_be_short, too_short
from bench.measure.disturbance import Watch
from bench.measure.machine import Monitor, thermally_throttled
from bench.plan.competitors import EAGER, YARDSTICK, Competitor
from bench.plan.costs import Limits
from bench.plan.presets import Preset
from bench.records import SKIPPED
from bench.study.statistics import round_log_latency
from bench.study.stopping import RESOLVED_REASON, control_known, far_behind, stop_reason

_BASELINES = (("torch", "matmul", EAGER), ("torch", "matmul", None), ("jax", "matmul", None))


@dataclass
class Entry:
    """A competitor in a cell, and what happened to it."""

    competitor: Competitor
    handle: str
    control: bool = False
    baseline: bool = False
    prepared: bool = False
    call_s: float = 0.0
    status: str = "ok"
    reason: str = ""
    skipped: bool = False
    blocks: list[float] = field(default_factory=list)
    calls_per_block: int | None = None
    warm_up: list[float] = field(default_factory=list)
    compile_s: float | None = None
    static_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None
    memory_method: str | None = None
    judgement: dict[str, Any] | None = None
    probe: dict[str, Any] = field(default_factory=dict)
    energy_j: float | None = None
    conditions: list[Mapping[str, Any]] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    leaving: bool = False
    left: bool = False

    def fail(self, status: str, reason: str, *, skipped: bool = False) -> None:
        """End the competitor."""
        self.status, self.reason, self.skipped = status, reason, skipped

    def reject(self, reason: str) -> None:
        """End the competitor as one that did not do its work; its blocks are kept apart."""
        self.rejected.extend(self.blocks)
        self.blocks.clear()
        self.fail("mismatch", reason)

    @property
    def timed(self) -> bool:
        """True if the next round has blocks of it: it is right so far, and not yet decided."""
        return self.going and not self.left

    @property
    def label(self) -> str:
        """Tell the control from the baseline whose call it shares."""
        return self.competitor.label + (" again" if self.control else "")

    def skip(self, reason: str) -> None:
        """End the competitor because a cap of the preset keeps it out."""
        self.fail("unsupported", SKIPPED + reason, skipped=True)

    @property
    def going(self) -> bool:
        """True while it still takes part."""
        return self.status == "ok"


def choose_baseline(entries: Sequence[Entry]) -> Entry | None:
    """Return the torch product, in eager mode if it is there, else JAX's, else the first entry; never the yardstick."""
    going = [entry for entry in entries if entry.going and entry.competitor.kind != YARDSTICK]
    for framework, implementation, mode in _BASELINES:
        for entry in going:
            who = entry.competitor
            if (who.framework, who.implementation) == (framework, implementation) and mode in (None, who.mode):
                return entry
    return going[0] if going else None


def add_control(entries: list[Entry]) -> None:
    """Add the A/A control: the baseline's prepared call in the same process, timed as if it were another competitor."""
    baseline = choose_baseline(entries)
    if baseline is None:
        return
    baseline.baseline = True
    control = Entry(baseline.competitor, baseline.handle, control=True, baseline=True)
    for name in ("calls_per_block", "call_s", "compile_s", "judgement", "peak_memory_bytes", "memory_method"):
        setattr(control, name, getattr(baseline, name))
    entries.append(control)


@dataclass(frozen=True)
class CellOutcome:
    """The outcome of a cell."""

    entries: tuple[Entry, ...]  # all competitors, the control last
    inputs_digest: str | None  # hash of the inputs, or None if no worker drew any
    switches: dict[str, dict[str, Any]]  # per framework, its precision switches
    # Rates of a large product and a large copy, the higher of the frameworks'
    ceilings: Mapping[str, float] = field(default_factory=dict)
    stopped: str = ""  # why no more rounds were run
    # The share of the machine that others took during the rounds
    disturbance: Mapping[str, Any] = field(default_factory=dict)
    disturbance_windows: Sequence[Mapping[str, Any]] = ()  # the same in pieces


ROUNDS, TIME = "rounds", "time"
# A round and a last one, whose results are judged as well.
_ROUNDS_KEPT = 2.5
_REPEATS_OF_A_THROTTLED_BLOCK = 2
# Of one that takes as long as a block: two for its size, and one for each further block.
_CALLS_OF_A_WARM_UP = 4

Block = Callable[[Entry, bool], dict[str, Any] | None]


def hopeless(entries: Sequence[Entry], limits: Limits, size: Callable[[Entry], None]) -> Iterator[tuple[Entry, float]]:
    """Find competitors that are both slow and far behind: the usual candidates are timed however slow the machine is.

    The baseline stays in any case. Disturbed calls end no competitor: one that seems too slow is called again, some
    time after the first calls, where that fits into the time of a request.

    Args:
        entries: all competitors of the cell, prepared.
        limits: caps.
        size: warms a competitor up, for the second opinion; its `warm_up` and `calls_per_block` get the result.

    Yields:
        A competitor that goes, and the cap in seconds a call.
    """
    baseline = choose_baseline(entries)
    fastest = min((entry.call_s for entry in entries if entry.going), default=0.0)
    cap = max(limits.call_s, limits.slowdown * fastest)
    for entry in entries:
        if not entry.going or entry is baseline or entry.call_s <= cap:
            continue
        if _CALLS_OF_A_WARM_UP * entry.call_s > limits.request_s:
            # Asked again, it would end as a timeout, and its worker with it.
            yield entry, cap
            continue
        size(entry)
        if entry.going and entry.calls_per_block:
            entry.call_s = min(entry.call_s, min(entry.warm_up) / entry.calls_per_block)
            # The second opinion is no part of the warm-up that is recorded.
            entry.warm_up.clear()
            entry.calls_per_block = None
            if entry.call_s > cap:
                yield entry, cap


def rehearse(entry: Entry, block: Block, size: Callable[[Entry], None], block_s: float) -> None:
    """Run a block before the first round, and size the competitor again where that turns out far too short.

    Its size was found within some ten milliseconds. Where the host was slow just then, all its blocks would be short;
    by now the others have found theirs, and such a time is over.
    """
    if not could_be_short(entry.warm_up, block_s):
        return
    timed = block(entry, False)
    if timed is None:
        return
    entry.warm_up.append(timed["block_latency_s"])
    if too_short(timed["block_latency_s"], block_s):
        size(entry)


class Rounds:
    """Runs the rounds.

    Args:
        entries: all competitors of the cell and the control.
        preset: caps.
        seed: of the order.
        block: runs one block of an entry and judges it if the second argument is true; None if that ended it.
        monitor: reads the device around each block.
        report: called with a short text at each round.
        block_s: length that blocks were sized for, in seconds.
        watch: watches the machine between blocks; None watches nothing.
        left: returns the seconds that a budget leaves for rounds; the last one ends before, and noise prolongs none.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        preset: Preset,
        *,
        seed: int,
        block: Block,
        monitor: Monitor,
        report: Callable[[str], None],
        block_s: float,
        watch: Watch | None = None,
        left: Callable[[], float] | None = None,
    ):
        self._watch, self._left = watch or Watch(dict, ()), left
        self._entries, self._preset, self._block = entries, preset, block
        self._block_s = block_s
        self._monitor, self._report = monitor, report
        self._order = random.Random(seed)
        self._control_known = False

    def run(self) -> str:
        """Run rounds until one of the reasons to stop, and return it: resolved, precise, rounds or time."""
        preset, spent, stop = self._preset, 0.0, None
        most_s = max(preset.cell_s, preset.most_cell_s if self._left is None else 0.0)
        for number in range(1, preset.rounds + 1):
            self._report(f"round {number} of at most {preset.rounds}")
            # Known before the round begins, because its last blocks are judged as well as timed.
            expected = spent * (1 + 1 / number)
            if (
                stop is None
                and number >= preset.least_rounds
                and (expected > most_s or (expected > preset.cell_s and (self._control_known or not self._controlled)))
            ):
                stop = TIME
            # A cell that does not end leaves no record, so that a budget may end it after any round. This round and
            # another one must fit, if this is not to be the last.
            a_round = spent / (number - 1) if number > 1 else self._expected_round_s()
            if self._left is not None and _ROUNDS_KEPT * a_round > self._left():
                stop = TIME
            last = stop is not None or number == preset.rounds
            started = time.monotonic()
            self._watch.round_begins()
            self._round(last=last)
            self._watch.round_ends(last=last or not any(entry.timed for entry in self._entries))
            spent += time.monotonic() - started
            if last:
                return stop or ROUNDS
            if not any(entry.timed for entry in self._entries):
                return RESOLVED_REASON
            stop = self._decide(number)
        return ROUNDS

    def _expected_round_s(self) -> float:
        return 2 * sum(max(self._block_s, entry.call_s) for entry in self._entries if entry.timed)

    def _round(self, *, last: bool) -> None:
        shuffled = [entry for entry in self._entries if entry.timed]
        self._order.shuffle(shuffled)
        for reverse in (False, True):
            if reverse:
                self._watch.round_turns()
            for entry in reversed(shuffled) if reverse else shuffled:
                if entry.going:
                    self._one(entry, verify=reverse and (last or entry.leaving))
        for entry in shuffled:
            entry.left = entry.leaving

    def _one(self, entry: Entry, *, verify: bool) -> None:
        for repeats_left in reversed(range(1 + _REPEATS_OF_A_THROTTLED_BLOCK)):
            timed = self._block(entry, verify)
            conditions = self._monitor.read()
            if timed is None:
                return
            if thermally_throttled(conditions) and repeats_left:
                entry.rejected.append(timed["block_latency_s"])
                continue
            entry.blocks.append(timed["block_latency_s"])
            if conditions:
                entry.conditions.append(conditions)
            return

    @property
    def _controlled(self) -> bool:
        """True while baseline and control are still there: without either, nothing more can be learned."""
        return sum(entry.timed for entry in self._entries if entry.baseline) == 2

    def _decide(self, number: int) -> str | None:
        """Mark the entries that leave with the next round; return the reason if that round is the last."""
        baseline = next((entry for entry in self._entries if entry.baseline and not entry.control), None)
        if baseline is None or not baseline.timed:
            return None
        logs = {
            entry.label: round_log_latency(entry.blocks, entry.calls_per_block or 1)
            for entry in self._entries
            if entry.timed and len(entry.blocks) == 2 * number
        }
        if baseline.label not in logs:
            return None
        control = next((entry.label for entry in self._entries if entry.control), None)
        # The control stays as long as the baseline: it says what the cell can resolve.
        rivals = {label: values for label, values in logs.items() if label != control}
        far = set(far_behind(rivals, baseline.label)) if number + 1 >= self._preset.least_rounds else set()
        for entry in self._entries:
            entry.leaving = entry.leaving or (entry.timed and not entry.control and entry.label in far)
        if control not in logs:
            return None
        aa = logs[baseline.label] - logs[control]
        self._control_known = control_known(aa)
        ratios = {
            label: logs[baseline.label] - values
            for label, values in rivals.items()
            if label != baseline.label and label not in far
        }
        measured_s = min((sum(entry.blocks) for entry in self._entries if entry.label in ratios), default=math.inf)
        return stop_reason(ratios, aa, measured_blocks=measured_s / self._block_s)
