"""Measure one cell: prepare and judge every competitor, let one at a time run its blocks, reject impossible rates.

The outcome of a competitor is its own record; a worker that dies or hangs is replaced, and the others go on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from bench.measure.disturbance import Watch
from bench.measure.machine import ENERGY_S, Monitor, cpu_flops_limit, energy_of_a_call
from bench.measure.rounds import CellOutcome, Entry, Rounds, add_control, hopeless, rehearse
from bench.measure.workers import RequestError, WorkerPool
from bench.plan.cells import Cell
from bench.plan.competitors import Competitor
from bench.plan.costs import OVER_THE_CEILING, compulsory_bytes, peak_rates, planned_skip, useful_product_flops
from bench.plan.presets import BLOCK_S, Preset
from parity_tests.interpreters.interpreter import Message


class CellRun:
    """One cell on its way from competitors to samples.

    Args:
        cell: the conditions.
        competitors: the entries, the control excepted.
        workers: the pool.
        preset: rounds, block length and caps.
        seed: of the inputs and the order.
        report: called with a short text at each step.
        monitor: reads the device around each block.
        device_name: of the GPU, for its data sheet.
        watch: watches the machine during the rounds; None watches nothing.
        diagnose: measure memory, the other clocks, energy and compiling again too; answers and the number of products
            are checked in any case.
        rounds_left: seconds that are left for the rounds, under a budget; without one they take what they need.
    """

    def __init__(
        self,
        cell: Cell,
        competitors: Sequence[Competitor],
        workers: WorkerPool,
        preset: Preset,
        *,
        seed: int = 0,
        report: Callable[[str], None] = lambda text: None,
        monitor: Monitor | None = None,
        device_name: str = "",
        watch: Watch | None = None,
        diagnose: bool = True,
        rounds_left: Callable[[], float] | None = None,
    ):
        self._watch = watch or Watch(dict, ())
        self._monitor, self._device_name, self._diagnose = monitor or Monitor(), device_name, diagnose
        self._rounds_left = rounds_left
        self._cell, self._workers, self._preset, self._seed, self._report = cell, workers, preset, seed, report
        self._entries = [Entry(competitor, str(k)) for k, competitor in enumerate(competitors)]
        self._opened: dict[str, Message] = {}
        self._last_timed, self._block_s = "", BLOCK_S[cell.device]

    def _of(self, framework: str) -> list[Entry]:
        return [entry for entry in self._entries if entry.going and entry.competitor.framework == framework]

    def _open(self, framework: str) -> None:
        message = {"operation": "open_cell", "cell": asdict(self._cell), "seed": self._seed}
        self._opened[framework] = self._workers.request(framework, message, self._preset.limits.request_s)

    def _open_all(self) -> None:
        for framework in dict.fromkeys(entry.competitor.framework for entry in self._entries):
            try:
                self._open(framework)
            except RequestError as error:
                for entry in self._of(framework):
                    entry.fail(error.status, error.reason)
                if not self._workers.alive(framework):
                    self._workers.replace(framework)
        digests = {reply["inputs_digest"] for reply in self._opened.values()}
        if len(digests) > 1:
            for entry in self._entries:
                entry.fail("crash", "the frameworks drew different inputs from the same seed: nothing can be compared")

    def _ask(self, entry: Entry, operation: str, timeout_s: float, **fields: Any) -> Message | None:
        """Ask a worker on behalf of a competitor; return None if that ended the competitor."""
        framework = entry.competitor.framework
        try:
            return self._workers.request(
                framework, {"operation": operation, "handle": entry.handle, **fields}, timeout_s
            )
        except RequestError as error:
            for same in self._entries:
                # The control runs its baseline's call, and cannot outlive it.
                # A control whose own answer was wrong stays a mismatch.
                if same is entry or (same.control and entry.baseline and same.going):
                    same.fail(error.status, error.reason)
        if not self._workers.alive(framework):
            self._recover(framework)
        return None

    def _recover(self, framework: str) -> None:
        """Replace a dead worker and prepare its remaining competitors again; a second failure ends them too."""
        prepared = [entry for entry in self._of(framework) if entry.prepared and not entry.control]
        try:
            self._workers.replace(framework)
            self._open(framework)
        except RequestError as error:
            for entry in self._of(framework):
                entry.fail(error.status, f"the worker could not be replaced: {error.reason}")
            return
        for entry in prepared:
            # A failure here recovers again, and then prepares these once more; each failure ends one competitor.
            if entry.going and self._prepare(entry) is not None and entry.calls_per_block is not None:
                self._warm_up(entry, max_blocks=1)

    def _prepare(self, entry: Entry) -> Message | None:
        competitor = entry.competitor
        return self._ask(
            entry,
            "prepare",
            self._preset.limits.prepare_s,
            implementation=competitor.implementation,
            mode=competitor.mode,
            kind=competitor.kind,
            call_limit_s=self._preset.limits.call_s,
        )

    def _build(self, entry: Entry) -> None:
        """Build, compile and judge a competitor, unless a cap keeps it out."""
        limits = self._preset.limits
        free = self._opened[entry.competitor.framework]["free_bytes"]
        reason = planned_skip(entry.competitor, self._cell, limits, free)
        if reason is not None:
            return entry.skip(reason)
        prepared = self._prepare(entry)
        if prepared is None:
            return None
        entry.prepared, entry.call_s = True, prepared["call_s"]
        entry.compile_s, entry.static_memory_bytes = prepared["compile_s"], prepared["static_memory_bytes"]
        checked = self._ask(entry, "check", limits.request_s)
        if checked is not None:
            self._accept(entry, checked["judgement"], "before timing")
        return None

    def _drop_hopeless(self) -> None:
        limits = self._preset.limits
        for entry, cap in hopeless(self._entries, limits, self._size):
            self._ask(entry, "drop", limits.request_s)
            entry.skip(f"one call took {entry.call_s:.2g} s, over the preset's cap of {cap:.2g} s here")

    def _measure_memory(self, entry: Entry) -> None:
        used = self._ask(entry, "memory", self._preset.limits.request_s)
        if used is not None:
            entry.peak_memory_bytes, entry.memory_method = used["peak_memory_bytes"], used["memory_method"]

    def _warm_up(self, entry: Entry, *, max_blocks: int) -> Message | None:
        return self._ask(entry, "warm_up", self._preset.limits.request_s, block_s=self._block_s, max_blocks=max_blocks)

    def _size(self, entry: Entry) -> None:
        warm = self._warm_up(entry, max_blocks=self._preset.warm_up_blocks)
        if warm is not None:
            entry.calls_per_block = warm["calls_per_block"]
            entry.warm_up += warm["block_latency_s"]

    def _rehearse(self, entry: Entry) -> None:
        rehearse(entry, self._block, self._size, self._block_s)

    def _accept(self, entry: Entry, judgement: dict[str, Any], when: str) -> None:
        entry.judgement = judgement
        if judgement["status"] != "ok":
            entry.fail("mismatch", f"{when}: {judgement['reason']}")

    def _block(self, entry: Entry, verify: bool) -> dict[str, Any] | None:
        limit, framework = self._preset.limits.request_s, entry.competitor.framework
        # On a GPU the host's processors do not compute.
        after_other = self._cell.device == "cpu" and self._last_timed != framework
        self._last_timed = framework
        calls = entry.calls_per_block
        timed = self._ask(entry, "block", limit, calls=calls, after_other=after_other, verify=verify)
        if timed is not None and verify:
            self._accept(entry, timed["judgement"], "after timing")
        return timed

    def _probe(self, entry: Entry) -> None:
        """Count the program's operations, and to diagnose run the other clocks; too little work ends the competitor."""
        if entry.control:
            return
        budget = self._preset.probe_s if self._diagnose else 0.0
        found = self._ask(entry, "probe", self._preset.limits.prepare_s, budget_s=budget)
        if found is not None:
            doubt, entry.probe = found.pop("doubt"), found
            if doubt:
                entry.reject(doubt)

    def _measure_energy(self, entry: Entry) -> None:
        def run_calls() -> int | None:
            limit, calls = self._preset.limits.request_s, entry.calls_per_block
            ran = self._ask(entry, "run_for", limit, seconds=ENERGY_S, calls=calls)
            return None if ran is None else ran["calls"]

        if not entry.control:
            entry.energy_j = energy_of_a_call(self._monitor, run_calls)

    def _ceilings_of(self, framework: str) -> Message:
        try:
            return self._workers.request(framework, {"operation": "ceilings"}, self._preset.limits.request_s)
        except RequestError:
            # Only the shares of a ceiling are lost; a worker that died is needed for the probes.
            if not self._workers.alive(framework):
                self._recover(framework)
            return {}

    def _each(self, what: str, step: Callable[[Entry], None]) -> None:
        for entry in self._entries:
            if entry.going:
                self._report(f"{what} {entry.competitor.label}")
                step(entry)

    def run(self) -> CellOutcome:
        """Measure the cell."""
        self._open_all()
        self._each("preparing", self._build)
        self._drop_hopeless()
        if self._diagnose:
            self._each("measuring the memory of", self._measure_memory)
        self._each("warming up", self._size)
        self._each("rehearsing", self._rehearse)
        add_control(self._entries)
        rounds = Rounds(
            self._entries,
            self._preset,
            seed=self._seed,
            block=self._block,
            monitor=self._monitor,
            report=self._report,
            block_s=self._block_s,
            watch=self._watch,
            left=self._rounds_left,
        )
        stopped = rounds.run() if any(entry.going for entry in self._entries) else ""
        ceilings: dict[str, float] = {}
        if self._preset.probe_s > 0:
            ceilings = measured_ceilings(self._ceilings_of(framework) for framework in self._opened)
            if self._diagnose:
                self._each("measuring the energy of", self._measure_energy)
        # After the rounds: a tracer leaves its hooks behind, and compiling again replaces the program.
        self._each("probing", self._probe)
        reject_the_impossible(self._entries, self._cell, ceilings, self._device_name)
        switches = {framework: reply["switches"] for framework, reply in self._opened.items()}
        digests = [reply["inputs_digest"] for reply in self._opened.values()]
        watched = self._watch.summary(), self._watch.windows()
        return CellOutcome(tuple(self._entries), digests[0] if digests else None, switches, ceilings, stopped, *watched)


def measured_ceilings(replies: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the higher of the frameworks' rates: a ceiling is the most that the device was seen to do."""
    rates = [(name, rate) for found in replies for name, rate in found.items() if name.startswith("ceiling_")]
    # In ascending order: of rates of one name, the last stays.
    return dict(sorted(rates, key=lambda one: one[1]))


def flops_limit(
    cell: Cell, ceilings: Mapping[str, float], device_name: str, observed: str | None = None
) -> float | None:
    """Return operations a second that the device cannot exceed, by its data sheet, its kind or a measured ceiling."""
    limit = peak_rates(device_name, cell.precision, observed).get("flops_per_s")
    if limit is None and cell.device == "cpu":
        return cpu_flops_limit(cell.precision)
    if limit is None and "ceiling_flops_per_s" in ceilings:
        return OVER_THE_CEILING * ceilings["ceiling_flops_per_s"]
    return limit


def reject_the_impossible(
    entries: Iterable[Entry], cell: Cell, ceilings: Mapping[str, float], device_name: str
) -> None:
    """Reject every competitor whose rate after the rounds exceeds the hardware's: not all the work was done."""
    for entry in entries:
        if not (entry.going and entry.blocks and entry.calls_per_block):
            continue
        calls_per_s = entry.calls_per_block / median(entry.blocks)
        observed = (entry.judgement or {}).get("observed_precision")
        limits = {
            "operations": (useful_product_flops(cell), flops_limit(cell, ceilings, device_name, observed)),
            # A warm cache may deliver bytes faster than the memory can.
            "bytes of memory": (
                compulsory_bytes(cell),
                peak_rates(device_name, cell.precision).get("bytes_per_s") if cell.cache == "cold" else None,
            ),
        }
        for what, (amount, limit) in limits.items():
            if limit is not None and entry.going and amount * calls_per_s > limit:
                said = f"{amount * calls_per_s:.3g} {what} a second, over the {limit:.3g} that the device can do"
                entry.reject(f"{said}: not all was done")
