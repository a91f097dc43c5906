"""A whole run: every cell of a plan, in every division and process replicate, from its measurement to its records."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any, Protocol

from bench.measure.budget import Budget, Queue, in_order, left_out_sentences, steps
from bench.measure.coordinator import CellOutcome, CellRun
from bench.measure.disturbance import Gate, Watch
from bench.measure.environment import fingerprint
from bench.measure.machine import allowed_cpus, monitor_for
from bench.measure.request import (
    EngineError,
    LeftOutError,
    Request,
    SelectionError,
    SweepNotes,
    check_modes,
    choose_device,
    chosen_competitors,
)
from bench.measure.rounds import Entry
from bench.measure.switches import sentences
from bench.measure.workers import OutOfTimeError, WorkerPool, starter
from bench.plan.cells import DEVICES, Cell
from bench.plan.competitors import Catalogue, Competitor
from bench.plan.costs import compulsory_bytes, peak_rates, useful_flops, waste_factor
from bench.plan.presets import BLOCK_S, Preset, plan_cells
from bench.records import HARNESS_VERSION, Record, digest, schema_version_of


class RecordStore(Protocol):
    """Where a sweep puts its records: a `Store`, or its stand-in in a worker of a cluster."""

    def holds(self, cell: str, process_replicate: int) -> bool:
        """Return True if a cell is there."""
        ...

    def append(self, records: Iterable[Record]) -> None:
        """Keep the records of one cell."""
        ...

    def add_environment(self, environment_id: str, fingerprint: Mapping[str, Any]) -> None:
        """Keep the environment that records name."""
        ...


@dataclass(frozen=True)
class Progress:
    """The state of a run."""

    done: int  # cells that are finished, those of an earlier run included
    total: int  # all cells
    text: str  # the present step


# Lends workers for the cells of a division; the caller's with statement gives them back.
Pools = Callable[[Request, str, Budget], AbstractContextManager[WorkerPool]]


def started_pool(request: Request, division: str, budget: Budget) -> WorkerPool:
    """Start the framework processes for one division.

    Raises:
        OutOfTimeError: if the budget ends before they are there.
        SelectionError: if no framework is there.
        RequestError: if a framework is installed but its worker cannot start.
    """
    start = starter(request.pythons, device=request.device, division=division, cpus=allowed_cpus())
    begun = time.monotonic()
    pool = WorkerPool(start, request.frameworks, budget.left)
    budget.started(time.monotonic() - begun)
    if not pool.hello:
        pool.close()
        reasons = "; ".join(pool.missing.values())
        raise SelectionError(
            f"no framework can be measured: {reasons}; install one or give --torch-python or --jax-python."
        )
    return pool


def run_sweep(
    request: Request,
    store: RecordStore,
    notes: SweepNotes,
    progress: Callable[[Progress], None] = lambda state: None,
    *,
    pools: Pools = started_pool,
    first: int = 0,
) -> None:
    """Measure every cell that the store does not hold yet, with a budget those for which there is time.

    Args:
        request: the options of the run.
        store: where the records go; each cell is durable before the next begins.
        notes: collects sentences for the user.
        progress: called often.
        pools: lends workers, which must be fresh ones for every process replicate.
        first: process replicate that is measured; those before it are there.

    Raises:
        SelectionError: if nothing is selected, or no framework is there.
        LeftOutError: if no cell is one of the competitors that were asked for; a few are notes.
        RequestError: if a framework is installed but its worker cannot start.
        BusyError: if the machine is busy before a cell and `when_busy` is `refuse`.
        EngineError: if there is no time for any cell.
    """
    plan, gate, budget = request.plan, Gate(request.when_busy, allowed_cpus()), Budget(request.budget_s)
    waiting = {(replicate, cell.title): cell for replicate in range(first, plan.replicates) for cell in planned(plan)}
    total, left_out, measured = len(waiting), list[LeftOutError](), 0
    catalogues: Sequence[Catalogue] = ()
    device = DEVICES[0]

    def report(text: str) -> None:
        progress(Progress(total - len(waiting), total, text))
        if budget.left() <= 0:
            raise OutOfTimeError

    for replicate, division, part in steps(plan, limited=budget.limited, first=first):
        own = [cell for (k, _), cell in waiting.items() if (k, cell.division) == (replicate, division)]
        cells: Sequence[Cell] = [replace(cell, device=device) for cell in own]
        if budget.limited and not _worth_starting(cells, replicate, request, catalogues, budget):
            continue
        # The end of the budget leaves the workers in the middle of something: they end, and others may be there in
        # time for what remains.
        with suppress(OutOfTimeError):
            report("starting the workers")
            with pools(request, division, budget) as pool:
                for framework, reason in pool.missing.items():
                    notes.add(f"Without {framework}: {reason}.")
                device = choose_device(request.device, pool.hello, notes)
                check_modes(request, device, tuple(pool.hello), notes)
                for line in sentences(tuple(pool.hello), len(allowed_cpus())):
                    notes.add(line)
                place = fingerprint(pool.hello, device=device, division=division, cpus=allowed_cpus())
                store.add_environment(digest(place), place)
                catalogues = pool.catalogues()
                cells = plan_cells(replace(plan, divisions=(division,)), device)
                queue = Queue(in_order(cells, plan, part) if budget.limited else cells, budget)
                for cell in queue:
                    if (replicate - 1, cell.title) in waiting or (replicate, cell.title) not in waiting:
                        continue
                    try:
                        measured += _run_cell(
                            cell, replicate, request, store, pool, digest(place), report, gate, budget
                        )
                    except _NoTimeError as error:
                        queue.postpone(cell, error.seconds)
                        continue
                    except LeftOutError as error:
                        left_out.append(error)
                    del waiting[replicate, cell.title]
    if len(left_out) == total:
        raise left_out[0]
    for error in left_out:
        notes.add(str(error))
    for line in left_out_sentences([(replicate, cell) for (replicate, _), cell in waiting.items()], total):
        notes.add(line)
    if waiting and not measured:
        needs = f", and the shortest cell {budget.needed_s:.0f} s or more" if budget.needed_s < math.inf else ""
        if budget.in_vain_s is not None:
            needs = f", and the cell that was begun had not ended after {budget.in_vain_s:.0f} s"
        begins = budget.start_s(request.device)
        raise EngineError(f"the budget ended before a cell: the workers take about {begins:.0f} s to start{needs}")
    progress(Progress(total - len(waiting), total, "done"))


def _worth_starting(
    cells: Sequence[Cell], replicate: int, request: Request, catalogues: Sequence[Catalogue], budget: Budget
) -> bool:
    """Return True if there is time to start workers and for one of the cells, as far as is known before the first."""
    left = budget.left() - budget.start_s(request.device)
    if left <= 0 or not catalogues:
        return left > 0

    def fits(cell: Cell) -> bool:
        try:
            who = chosen_competitors(catalogues, request, cell)
        except LeftOutError:
            return True
        return budget.expected(cell, who, request.plan, diagnose=replicate == 0).total <= left

    return any(map(fits, cells))


class _NoTimeError(Exception):
    """A cell that is expected to take longer than there is time.

    Args:
        seconds: that it takes by the estimates.
    """

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds


def planned(plan: Preset) -> tuple[Cell, ...]:
    """List the cells of a plan before the device is known.

    Raises:
        SelectionError: if there is none.
    """
    found = plan_cells(plan, DEVICES[0])
    if not found:
        raise SelectionError("the selection is empty: no cell has this precision in this division; choose another.")
    return found


def _run_cell(
    cell: Cell,
    replicate: int,
    request: Request,
    store: RecordStore,
    pool: WorkerPool,
    environment_id: str,
    report: Callable[[str], None],
    gate: Gate,
    budget: Budget,
) -> bool:
    """Measure a cell and keep its records; return False if they are there."""
    plan, competitors = request.plan, chosen_competitors(pool.catalogues(), request, cell)
    key = cell_hash(cell, competitors, plan, seed=request.seed, environment_id=environment_id)
    if store.holds(key, replicate):
        return False
    expected = budget.expected(cell, competitors, plan, diagnose=replicate == 0)
    if not budget.reaches(expected):
        raise _NoTimeError(expected.total / budget.pace)
    gate.pass_when_quiet(pool.pids, report)
    started_at, begun = datetime.now(UTC), time.monotonic()
    # Another seed in each replicate: the order and the inputs are part of what varies between processes.
    seed = request.seed + replicate
    device_name = pool.first_report("device_name") or ""
    run = CellRun(
        cell,
        competitors,
        pool,
        plan,
        seed=seed,
        report=lambda text: report(f"{cell.title}: {text}"),
        monitor=monitor_for(cell.device, pool.first_report("device_uuid")),
        device_name=device_name,
        watch=Watch(pool.pids, allowed_cpus()),
        # Memory, kernels and compile times hardly differ from process to process; speeds do, and so do mistakes.
        diagnose=replicate == 0,
        left=budget.left,
        after_s=expected.after if budget.limited else None,
    )
    try:
        outcome = run.run()
    except OutOfTimeError:
        budget.in_vain_s = time.monotonic() - begun
        raise
    taken_s = time.monotonic() - begun
    budget.took(expected, taken_s)
    # Not read anew: the machine's calendar clock may be set meanwhile.
    finished_at = started_at + timedelta(seconds=taken_s)
    own = {"cell": key, "process_replicate": replicate, "seed": seed, "environment_id": environment_id}
    own |= {"started_at": _timestamp(started_at), "finished_at": _timestamp(finished_at)}
    shared = own | _shared(cell, outcome)
    store.append(_record(entry, shared, outcome, cell, device_name) for entry in outcome.entries)
    return True


def cell_hash(cell: Cell, competitors: Sequence[Competitor], preset: Preset, *, seed: int, environment_id: str) -> str:
    """Identify a comparison: the conditions, who takes part, the effort, the source and the environment."""
    return digest(
        {
            "cell": asdict(cell),
            "competitors": [asdict(competitor) for competitor in competitors],
            "effort": [
                preset.rounds,
                preset.least_rounds,
                # A JSON number: no limit is written as null.
                preset.cell_s if math.isfinite(preset.cell_s) else None,
                preset.most_cell_s,
                BLOCK_S[cell.device],
                preset.warm_up_blocks,
                preset.probe_s,
                asdict(preset.limits),
            ],
            "seed": seed,
            "environment": environment_id,
            "harness": HARNESS_VERSION,
        }
    )


# Fields that a record takes over under the same name.
_OF_WORKLOAD = ("num_partitions", "in_features", "out_features", "batch", "layout")
_OF_CELL = ("dtype", "device", "direction", "division", "precision", "cache", "optimizer")
_OF_ENTRY = ("status", "reason", "skipped", "compile_s", "peak_memory_bytes", "memory_method", "static_memory_bytes")
_OF_ENTRY += ("control", "baseline", "energy_j")
_OF_PROBE = ("enqueue_s", "device_busy_s", "compile_warm_s", "program_flops", "copied_bytes")


def _record(entry: Entry, shared: dict[str, Any], outcome: CellOutcome, cell: Cell, device_name: str) -> Record:
    switches = outcome.switches.get(entry.competitor.framework, {})
    who, right = entry.competitor, entry.going
    judgement = entry.judgement or {}
    peaks = peak_rates(device_name, cell.precision, judgement.get("observed_precision"))
    identity = [shared["cell"], shared["process_replicate"], asdict(who), entry.control]
    blocks, calls = tuple(entry.blocks), entry.calls_per_block
    taken: dict[str, Any] = {name: getattr(entry, name) for name in _OF_ENTRY}
    taken |= {name: entry.probe.get(name) for name in _OF_PROBE}
    return Record(
        **shared,
        **asdict(who),
        **taken,
        key=digest(identity),
        observed_precision=judgement.get("observed_precision"),
        peak_flops_per_s=peaks.get("flops_per_s"),
        peak_bytes_per_s=peaks.get("bytes_per_s"),
        block_latency_s=blocks if right else (),
        calls_per_block=calls,
        latency_s=median(blocks) / calls if right and calls else None,
        rejected_block_latency_s=tuple(entry.rejected) + (() if right else blocks),
        warm_up_block_latency_s=tuple(entry.warm_up),
        bound_fraction=judgement.get("bound_fraction"),
        parity=judgement.get("tensors", {}),
        waste_factor=waste_factor(who, cell),
        switches=switches,
        conditions=tuple(entry.conditions),
        kernels=entry.probe.get("kernels", {}),
        disturbance=outcome.disturbance,
        disturbance_windows=tuple(outcome.disturbance_windows) if entry.baseline and not entry.control else (),
        prepared_call_s=entry.call_s or None,
        synchronised_latency_s=tuple(entry.probe.get("synchronised_latency_s", ())),
    )


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")


def _shared(cell: Cell, outcome: CellOutcome) -> dict[str, Any]:
    """Return what the records of a cell have in common, but for what tells of the run."""
    return {
        "schema_version": schema_version_of(cell.workload.in_features, cell.workload.out_features),
        "cell_size": len(outcome.entries),
        "workload": cell.workload.name,
        **{name: getattr(cell.workload, name) for name in _OF_WORKLOAD},
        **{name: getattr(cell, name) for name in _OF_CELL},
        "useful_flops": useful_flops(cell),
        "compulsory_bytes": compulsory_bytes(cell),
        "inputs_digest": outcome.inputs_digest,
        "ceiling_flops_per_s": outcome.ceilings.get("ceiling_flops_per_s"),
        "ceiling_bytes_per_s": outcome.ceilings.get("ceiling_bytes_per_s"),
        "stopped": outcome.stopped,
        "block_s": BLOCK_S[cell.device],
    }
