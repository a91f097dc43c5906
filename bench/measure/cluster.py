"""Hand whole cells to dask workers, each of which owns one device, and merge their records.

A worker offers the resource `DEVICE` once and a cell takes it, so that a device never measures two cells at a time.
The worker runs the sweep of that cell with framework processes of its own, exactly as a local run does, and returns
records; this process alone writes the store. The framework processes stay for the next cell; all process replicates of
a cell are measured by the same worker.
"""

import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from distributed import Client, Future
from distributed import wait as wait_for

from bench.measure.budget import Budget, in_order, left_out_sentences, steps
from bench.measure.environment import MACHINE_VARIABLE
from bench.measure.request import EngineError, LeftOutError, Request, SelectionError, SweepNotes
from bench.measure.sweep import Progress, cell_hash, planned, run_sweep, started_pool
from bench.measure.workers import KeptPool, RequestError, WorkerPool
from bench.plan.cells import Cell
from bench.plan.competitors import Competitor
from bench.plan.presets import plan_cells
from bench.record_files import RECORDS, scan
from bench.records import Record, parse_line
from bench.store import Store

RESOURCE = "DEVICE"
_CONNECT_S = 10
# The interval at which workers are looked for while nothing arrives, the longest time without any, and the longest time
# without a result: a cell in a worker has limits of its own, which are far shorter.
_LOOK_S, _WITHOUT_OWNER_S, _SILENCE_S = 30.0, 600.0, 24 * 3600.0
_FETCH_S = 600.0
# Kept for the way of a cell's records back to here, where a run has a budget.
_RETURN_S = 2.0


@dataclass
class _Collector:
    """Stands in for a store in a worker: keeps the records that are to be returned."""

    lines: list[bytes]
    environments: dict[str, Mapping[str, Any]]

    def holds(self, cell: str, process_replicate: int) -> bool:
        return False

    def append(self, records: Iterable[Record]) -> None:
        self.lines.append(b"".join(record.to_line() for record in records))

    def add_environment(self, environment_id: str, fingerprint: Mapping[str, Any]) -> None:
        self.environments[environment_id] = dict(fingerprint)


@dataclass(frozen=True)
class Measured:
    """A worker's answer for a cell; exceptions travel as text, since their classes need not survive the way back."""

    batches: tuple[bytes, ...]  # the records of each process replicate, as lines
    environments: Mapping[str, Mapping[str, Any]]  # id to fingerprint
    notes: tuple[str, ...]  # for the user
    wrong_selection: str | None = None  # why the request selects nothing there, or None
    failure: str | None = None  # why the framework processes could not start, or None
    late: bool = False  # no time was left for it


# Of this dask worker, which owns one device.
_KEPT = KeptPool()


@contextmanager
def _workers(request: Request, division: str, budget: Budget) -> Iterator[WorkerPool]:
    if request.plan.replicates > 1:
        # A replicate is there to show the differences from process to process.
        with started_pool(request, division, budget) as pool:
            yield pool
        return
    kind = (request.device, request.frameworks, tuple(sorted(request.pythons.items())), division)
    with _KEPT.take(kind, lambda: started_pool(request, division, budget)) as pool:
        pool.left = budget.left
        yield pool


def measure_cell(request: Request, first: int = 0) -> Measured:
    """Measure the one cell that the request is narrowed to, from a process replicate on; runs in a dask worker."""
    # Two machines of one kind would otherwise have the same fingerprint.
    os.environ[MACHINE_VARIABLE] = platform.node()
    collector, notes = _Collector([], {}), SweepNotes()
    wrong, failure, late = None, None, False
    try:
        run_sweep(request, collector, notes, pools=_workers, first=first)
    except EngineError:
        # Said once for all cells, where the budget was set.
        late = True
    except LeftOutError as error:
        notes.add(str(error))
    except SelectionError as error:
        wrong = str(error)
    except RequestError as error:
        failure = str(error)
    return Measured(tuple(collector.lines), collector.environments, tuple(notes.lines), wrong, failure, late)


def narrowed_to(cell: Cell, request: Request) -> Request:
    """Return the request for one cell, in all its process replicates; a command's own options stay behind."""
    options: dict[str, Any] = {one.name: getattr(request, one.name) for one in fields(Request)}
    options.update({name: (getattr(cell, name),) for name in ("direction", "precision", "division", "cache")})
    options["workload"] = (cell.workload.name,)
    return Request(**options)


def _connect(address: str, notes: SweepNotes, most_s: float) -> Client:
    """Connect to a scheduler that has workers with a device.

    Raises:
        SelectionError: if nothing answers there, or no worker offers a device.
    """
    try:
        client = Client(address, timeout=min(_CONNECT_S, max(most_s, 1.0)))
    except (OSError, ValueError) as error:
        raise SelectionError(
            f"scheduler: nothing answers at {address!r} ({type(error).__name__}); start `dask scheduler` and give its "
            "address."
        ) from error
    workers, owners = _workers_there(client)
    if not owners:
        client.close()
        raise SelectionError(
            f"scheduler: none of the {len(workers)} workers at {address!r} offers a device; start each with "
            f"`dask worker {address} --nthreads 1 --resources {RESOURCE}=1`."
        )
    for host, workers_there in Counter(worker["host"] for worker in owners).items():
        if workers_there > 1:
            notes.add(
                f"{workers_there} workers share the machine {host}: unless each has processors or a GPU of its own "
                "(taskset, CUDA_VISIBLE_DEVICES), they disturb each other."
            )
    return client


def _workers_there(client: Client) -> tuple[list[Any], list[Any]]:
    """Return all workers of a scheduler, and those that own a device."""
    workers = list(client.scheduler_info(n_workers=-1)["workers"].values())
    return workers, [worker for worker in workers if worker["resources"].get(RESOURCE, 0) >= 1]


def _outcome(future: Future) -> tuple[BaseException | None, Measured | None]:
    """Fetch the result of a finished future: the reason why it failed, or the answer of the worker."""
    try:
        error: Any = future.exception(timeout=_FETCH_S)
        measured: Any = None if error is not None else future.result(timeout=_FETCH_S)
        return error, measured
    except TimeoutError:
        return TimeoutError(f"its records did not arrive within {_FETCH_S:g} s"), None


def _arrivals(
    client: Client, futures: Collection[Future], left_s: Callable[[], float] = lambda: math.inf
) -> Iterator[Future]:
    """Yield futures as they finish, until the caller has removed all of them or no time is left.

    Raises:
        EngineError: if no worker is left that could finish one, or none finishes for very long.
    """
    arrived = owned = time.monotonic()
    while left := list(futures):
        try:
            timeout_s = max(0.0, min(_LOOK_S, left_s()))
            waited: Any = wait_for(left, timeout=timeout_s, return_when="FIRST_COMPLETED")
        except TimeoutError:
            if left_s() <= 0:
                return
            now = time.monotonic()
            owned = now if _workers_there(client)[1] else owned
            if now - owned > _WITHOUT_OWNER_S:
                raise EngineError(
                    f"{len(left)} cells are left, and no worker has offered a device for {now - owned:.0f} s; start "
                    "workers and add --resume."
                ) from None
            if now - arrived > _SILENCE_S:
                raise EngineError(
                    f"{len(left)} cells are left, and none has arrived for {(now - arrived) / 3600:.0f} hours; look "
                    "at the workers, and add --resume."
                ) from None
            continue
        arrived = owned = time.monotonic()
        yield from waited.done


def _store(measured: Measured, store: Store, notes: SweepNotes) -> None:
    """Merge a worker's answer into the store; a key that is there already is left as it is.

    Raises:
        SelectionError: if the request selects nothing.
    """
    for line in measured.notes:
        notes.add(line)
    if measured.wrong_selection is not None:
        raise SelectionError(measured.wrong_selection)
    for environment_id, fingerprint in measured.environments.items():
        store.add_environment(environment_id, fingerprint)
    for batch in measured.batches:
        records = [parse_line(line) for line in batch.splitlines(keepends=True)]
        if not store.holds(records[0].cell, records[0].process_replicate):
            store.append(records)


def run_on_cluster(
    request: Request,
    store: Store,
    notes: SweepNotes,
    progress: Callable[[Progress], None] = lambda state: None,
    *,
    address: str,
) -> None:
    """Measure every cell that the store does not hold yet, on the workers of a dask scheduler.

    Args:
        request: the options of the run; interpreters are paths on the workers.
        store: where the records go; each cell is durable when it arrives.
        notes: collects sentences for the user.
        progress: called when a cell arrives.
        address: of the scheduler.

    Raises:
        SelectionError: if nothing is selected, nothing answers at the address, or no worker owns a device.
        EngineError: if cells were lost, all others are recorded; or if a budget leaves time for none.
    """
    budget = Budget(request.budget_s)
    jobs, total = _jobs(request, store, limited=budget.limited)
    todo, done = len(jobs), total - len(jobs)
    lost, late = list[str](), list[_Job]()
    with _connect(address, notes, budget.left()) as client:
        waiting: dict[Future, _Job] = {}

        def hand_out() -> None:
            # With a budget a cell is handed out when a device is free for it, since what is left then is its own.
            most = len(_workers_there(client)[1]) if budget.limited else len(jobs)
            while jobs and len(waiting) < max(1, most) and not any(one.before(jobs[0]) for one in waiting.values()):
                job = jobs.pop(0)
                if budget.left() < _RETURN_S or any(one.before(job) for one in late):
                    late.append(job)
                    continue
                narrowed = narrowed_to(job.cell, job.request)
                if budget.limited:
                    narrowed = replace(narrowed, budget_s=budget.left() - _RETURN_S)
                # A cell whose worker dies goes to another one, by dask's own rule
                # (distributed.scheduler.allowed-failures).
                waiting[client.submit(measure_cell, narrowed, job.first, pure=False, resources={RESOURCE: 1})] = job

        progress(Progress(done, total, "handing out cells"))
        try:
            hand_out()
            for future in _arrivals(client, waiting, budget.left):
                job = waiting.pop(future)
                error, measured = _outcome(future)
                if measured is None or measured.failure is not None:
                    lost.append(f"{job.cell.title}: {error if measured is None else measured.failure}")
                else:
                    _store(measured, store, notes)
                    if measured.late:
                        late.append(job)
                done += 1
                progress(Progress(done, total, job.cell.title))
                hand_out()
        finally:
            # Also when the user interrupts: cells that are not wanted any more must not keep the devices busy.
            client.cancel(list(waiting))
    late += waiting.values()
    for line in left_out_sentences([(job.first, job.cell) for job in late], total):
        notes.add(line)
    if late and len(late) == todo:
        raise EngineError("the budget ended before a worker had measured a cell")
    if lost:
        raise EngineError(f"{len(lost)} cells were lost, the first: {lost[0]}; the others are recorded: add --resume.")


@dataclass(frozen=True)
class _Job:
    """A cell in some of its process replicates, as one worker measures it."""

    cell: Cell
    first: int  # replicate that is not there yet
    request: Request  # in whose plan the replicate after the last one is the number of replicates

    def before(self, other: "_Job") -> bool:
        """Return True if it is an earlier replicate of the same cell."""
        return self.cell == other.cell and self.first < other.first


def _jobs(request: Request, store: Store, *, limited: bool) -> tuple[list[_Job], int]:
    """Return what is to be handed out, in this order, and how much there is with what is recorded.

    With a budget each process replicate is handed out by itself, the first of all cells before the second of any.
    """
    cells: Sequence[Cell] = planned(request.plan)
    if not limited:
        recorded = recorded_cells(store, request)
        return [_Job(cell, 0, request) for cell in cells if identity(cell) not in recorded], len(cells)
    if request.device == "cuda":
        cells = plan_cells(request.plan, request.device)
    jobs = []
    for first in range(request.plan.replicates):
        until = replace(request, replicates=first + 1)
        recorded = recorded_cells(store, until)
        ordered = (
            cell
            for _, division, part in steps(replace(until.plan, replicates=1), limited=True)
            for cell in in_order([c for c in cells if c.division == division], request.plan, part)
        )
        jobs += [_Job(cell, first, until) for cell in ordered if identity(cell) not in recorded]
    return jobs, len(cells) * request.plan.replicates


def identity(source: Cell | Record) -> tuple[object, ...]:
    """Return what two cells have in common if they are the same, whatever the device."""
    name = source.workload.name if isinstance(source, Cell) else source.workload
    return name, source.direction, source.precision, source.division, source.cache, source.optimizer


def recorded_cells(store: Store, request: Request) -> set[tuple[object, ...]]:
    """Return the cells that a resumed run need not hand out again, before any worker has reported its environment.

    Such a cell is there in every process replicate, with this effort and every competitor that is asked for by name.
    Its hash depends on environment and competitors, which only a worker knows: both are taken from its records, so that
    the conditions, the effort and the seed are compared.
    """
    if not store.environment_ids:
        return set()
    groups: dict[tuple[str, str], list[Record]] = {}
    for line in scan(store.directory / RECORDS):
        record = line.record().without_samples()
        if request.device in ("auto", record.device):
            groups.setdefault((record.environment_id, record.cell), []).append(record)
    wanted = {
        device: {identity(cell): cell for cell in plan_cells(request.plan, device)}
        for device in {group[0].device for group in groups.values()}
    }
    found = set()
    for (environment, key), group in groups.items():
        who, replicates = identity(group[0]), {record.process_replicate for record in group}
        cell = wanted[group[0].device].get(who)
        one = min(replicates)
        competitors = [
            Competitor(record.framework, record.implementation, record.mode, record.kind)
            for record in group
            if record.process_replicate == one and not record.control
        ]
        if (
            cell is not None
            and replicates >= set(range(request.plan.replicates))
            and set(request.implementation) <= {competitor.implementation for competitor in competitors}
            and key == cell_hash(cell, competitors, request.plan, seed=request.seed, environment_id=environment)
        ):
            found.add(who)
    return found
