"""A whole run: every cell of a preset, in every division and process replicate, into a store."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol

from bench.measure.conditions import monitor_for
from bench.measure.coordinator import CellRun
from bench.measure.disturbance import Gate, Watch
from bench.measure.environment import environment_id, fingerprint
from bench.measure.pool import WorkerPool, starter
from bench.measure.processors import allowed_cpus
from bench.measure.recording import cell_hash, records_of
from bench.measure.request import (
    Request,
    SelectionError,
    SweepNotes,
    check_modes,
    choose_device,
    chosen_competitors,
)
from bench.measure.switches import sentences
from bench.plan.cells import DEVICES, Cell
from bench.plan.selection import plan_cells
from bench.records import Record


class RecordStore(Protocol):
    """Where a sweep puts what it measured: a `Store`, or what stands in for it in a worker of a cluster."""

    def holds(self, cell: str, process_replicate: int) -> bool:
        """Whether a cell is there."""
        ...

    def append(self, records: Iterable[Record]) -> None:
        """Keeps the records of one cell."""
        ...

    def add_environment(self, environment_id: str, fingerprint: Mapping[str, Any]) -> None:
        """Keeps what the records name as their environment."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        done: cells that are finished, those of an earlier run included.
        total: all cells.
        text: what is happening.
    """

    done: int
    total: int
    text: str


def _device_name(pool: WorkerPool) -> str:
    """The name that a framework's driver reports; empty where none does."""
    names = [reply["environment"].get("device_name", "") for reply in pool.hello.values()]
    return next((name for name in names if name), "")


def started_pool(request: Request, division: str) -> WorkerPool:
    """Starts the framework processes for one division.

    Raises:
        SelectionError: if no framework is there.
        RequestError: if a framework is installed but its worker cannot start.
    """
    start = starter(request.pythons, device=request.device, division=division, cpus=allowed_cpus())
    pool = WorkerPool(start, request.frameworks)
    if not pool.hello:
        pool.close()
        reasons = "; ".join(pool.missing.values())
        raise SelectionError(
            f"no framework can be measured: {reasons}; install one or give --torch-python or --jax-python."
        )
    return pool


# What lends workers for the cells of a division; the caller's with statement gives them back.
Pools = Callable[[Request, str], AbstractContextManager[WorkerPool]]


def run_sweep(
    request: Request,
    store: RecordStore,
    notes: SweepNotes,
    progress: Callable[[Progress], None] = lambda state: None,
    *,
    pools: Pools = started_pool,
) -> None:
    """Measures every cell that the store does not hold yet.

    Args:
        request: what to do.
        store: where the records go; each cell is durable before the next begins.
        notes: is filled with what the user should know.
        progress: called often.
        pools: lends workers, which must be fresh ones for every process replicate.

    Raises:
        SelectionError: if nothing is selected, or no framework is there.
        RequestError: if a framework is installed but its worker cannot start.
        BusyError: if the machine is busy before a cell and `when_busy` is `refuse`.
    """
    preset, gate = request.preset, Gate(request.when_busy, allowed_cpus())
    total = len(plan_cells(preset, DEVICES[0])) * preset.replicates
    if total == 0:
        raise SelectionError("the selection is empty: no cell has this precision in this division; choose another.")
    done = 0
    for replicate in range(preset.replicates):
        for division in preset.divisions:
            progress(Progress(done, total, "starting the workers"))
            with pools(request, division) as pool:
                for framework, reason in pool.missing.items():
                    notes.add(f"Without {framework}: {reason}.")
                device = choose_device(request.device, pool.hello, notes)
                check_modes(request, device, tuple(pool.hello), notes)
                for line in sentences(tuple(pool.hello), len(allowed_cpus())):
                    notes.add(line)
                place = fingerprint(pool.hello, device=device, division=division, cpus=allowed_cpus())
                place_id = environment_id(place)
                store.add_environment(place_id, place)
                for cell in plan_cells(replace(preset, divisions=(division,)), device):
                    _run_cell(
                        cell, replicate, request, store, pool, place_id, partial(_tell, progress, done, total), gate
                    )
                    done += 1
    progress(Progress(done, total, "done"))


def _tell(progress: Callable[[Progress], None], done: int, total: int, text: str) -> None:
    progress(Progress(done, total, text))


def _run_cell(
    cell: Cell,
    replicate: int,
    request: Request,
    store: RecordStore,
    pool: WorkerPool,
    place_id: str,
    report: Callable[[str], None],
    gate: Gate,
) -> None:
    competitors = chosen_competitors(pool.catalogues(), request, cell)
    key = cell_hash(cell, competitors, request.preset, seed=request.seed, environment_id=place_id)
    if store.holds(key, replicate):
        return
    gate.pass_when_quiet(pool.pids, report)
    started_at, begun = datetime.now(UTC), time.monotonic()
    # Another seed in each replicate: the order and the inputs are part of what varies between processes.
    seed = request.seed + replicate
    uuid = next(
        (r["environment"]["device_uuid"] for r in pool.hello.values() if "device_uuid" in r["environment"]), None
    )
    run = CellRun(
        cell,
        competitors,
        pool,
        request.preset,
        seed=seed,
        report=lambda text: report(f"{cell.title}: {text}"),
        monitor=monitor_for(cell.device, uuid),
        device_name=_device_name(pool),
        watch=Watch(pool.pids, allowed_cpus()),
        # Memory, kernels and compile times hardly differ from process to process; speeds do, and so do mistakes.
        diagnose=replicate == 0,
    )
    outcome = run.run()
    store.append(
        records_of(
            outcome,
            cell,
            cell_key=key,
            process_replicate=replicate,
            seed=seed,
            environment_id=place_id,
            started_at=started_at,
            # Not read anew: somebody may set the machine's calendar clock meanwhile.
            finished_at=started_at + timedelta(seconds=time.monotonic() - begun),
            device_name=_device_name(pool),
        )
    )
