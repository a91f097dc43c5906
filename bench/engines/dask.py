"""Hands whole cells to dask workers, each of which owns one device, and merges what they record.

A worker offers the resource `DEVICE` once, and a cell takes it: so that a device never measures two cells at a time.
The worker runs the coordinator with framework processes of its own, exactly as a local run does, and returns records;
this process alone writes the store. The framework processes stay for the next cell; all process replicates of a cell
are measured by the same worker.
"""

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from distributed import Client, Future
from distributed import wait as wait_for

from bench.engines.base import EngineError
from bench.engines.kept_pool import KeptPool
from bench.engines.resuming import identity, recorded_cells
from bench.measure.environment import MACHINE_VARIABLE
from bench.measure.pool import WorkerPool
from bench.measure.protocol import RequestError
from bench.measure.request import Request, SelectionError, SweepNotes
from bench.measure.sweep import Progress, run_sweep, started_pool
from bench.plan.cells import DEVICES, Cell
from bench.plan.selection import plan_cells
from bench.records import Record, parse_line
from bench.store import Store

RESOURCE = "DEVICE"
_CONNECT_S = 10
# How often the workers are looked for while nothing arrives, how long they may all be gone, and how long nothing may
# arrive: a cell in a worker has limits of its own, which are far shorter.
_LOOK_S, _WITHOUT_OWNER_S, _SILENCE_S = 30.0, 600.0, 24 * 3600.0
_FETCH_S = 600.0


@dataclass
class _Collector:
    """Takes the place of a store in a worker: keeps what is recorded, to be returned."""

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
    """What a worker returns for a cell: exceptions of ours included, since their classes need not survive the way back.

    Attributes:
        batches: the records of each process replicate, as lines.
        environments: id to fingerprint.
        notes: what the user should know.
        wrong_selection: why the request selects nothing there, or None.
        failure: why the framework processes could not start, or None.
    """

    batches: tuple[bytes, ...]
    environments: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]
    wrong_selection: str | None = None
    failure: str | None = None


# Of this dask worker, which owns one device.
_KEPT = KeptPool()


def _workers(request: Request, division: str) -> AbstractContextManager[WorkerPool]:
    if request.preset.replicates > 1:
        # A replicate is there to show what differs from process to process.
        return started_pool(request, division)
    kind = (request.device, request.frameworks, tuple(sorted(request.pythons.items())), division)
    return _KEPT.take(kind, lambda: started_pool(request, division))


def measure_cell(request: Request) -> Measured:
    """Runs in a dask worker: measures the one cell that the request is narrowed to."""
    # Two machines of one kind would otherwise have the same fingerprint.
    os.environ[MACHINE_VARIABLE] = platform.node()
    collector, notes = _Collector([], {}), SweepNotes()
    wrong, failure = None, None
    try:
        run_sweep(request, collector, notes, pools=_workers)
    except SelectionError as error:
        wrong = str(error)
    except RequestError as error:
        failure = str(error)
    return Measured(tuple(collector.lines), collector.environments, tuple(notes.lines), wrong, failure)


def narrowed_to(cell: Cell, request: Request) -> Request:
    """The request for one cell, in all its process replicates."""
    preset = replace(
        request.preset,
        workloads=(cell.workload.name,),
        directions=(cell.direction,),
        precisions=(cell.precision,),
        divisions=(cell.division,),
        caches=(cell.cache,),
    )
    return replace(request, preset=preset)


def _connect(address: str, notes: SweepNotes) -> Client:
    """Connects to a scheduler that has workers with a device.

    Raises:
        SelectionError: if nobody answers there, or no worker offers a device.
    """
    try:
        client = Client(address, timeout=_CONNECT_S)
    except (OSError, ValueError) as error:
        raise SelectionError(
            f"scheduler: nobody answers at {address!r} ({type(error).__name__}); start `dask scheduler` and give its "
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
    """Returns all workers of a scheduler, and those that own a device."""
    workers = list(client.scheduler_info(n_workers=-1)["workers"].values())
    return workers, [worker for worker in workers if worker["resources"].get(RESOURCE, 0) >= 1]


def _outcome(future: Future) -> tuple[BaseException | None, Measured | None]:
    """Fetches what a finished future holds: why it failed, or what was measured."""
    try:
        error: Any = future.exception(timeout=_FETCH_S)
        measured: Any = None if error is not None else future.result(timeout=_FETCH_S)
        return error, measured
    except TimeoutError:
        return TimeoutError(f"its records did not arrive within {_FETCH_S:g} s"), None


def _arrivals(client: Client, futures: Iterable[Future]) -> Iterator[Future]:
    """Yields futures as they finish.

    Raises:
        EngineError: if nobody is left who could finish one, or none finishes for very long.
    """
    left = set(futures)
    arrived = owned = time.monotonic()
    while left:
        try:
            waited: Any = wait_for(left, timeout=_LOOK_S, return_when="FIRST_COMPLETED")
        except TimeoutError:
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
                    "what the workers do, and add --resume."
                ) from None
            continue
        arrived = owned = time.monotonic()
        left -= waited.done
        yield from waited.done


def _store(measured: Measured, store: Store, notes: SweepNotes) -> None:
    """Merges what a worker returned; a key that is there already is left as it is.

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
    """Measures every cell that the store does not hold yet, on the workers of a dask scheduler.

    Args:
        request: what to do; interpreters are paths on the workers.
        store: where the records go; each cell is durable when it arrives.
        notes: is filled with what the user should know.
        progress: called when a cell arrives.
        address: of the scheduler.

    Raises:
        SelectionError: if nothing is selected, nobody answers at the address, or no worker owns a device.
        EngineError: if cells were lost; all others are recorded.
    """
    planned = plan_cells(request.preset, DEVICES[0])
    if not planned:
        raise SelectionError("the selection is empty: no cell has this precision in this division; choose another.")
    recorded = recorded_cells(store, request)
    cells = [cell for cell in planned if identity(cell) not in recorded]
    done = count(len(planned) - len(cells) + 1)
    lost: list[str] = []
    with _connect(address, notes) as client:
        waiting: dict[Future, Cell] = {
            # A cell whose worker dies goes to another one, by dask's own rule (distributed.scheduler.allowed-failures).
            client.submit(measure_cell, narrowed_to(cell, request), pure=False, resources={RESOURCE: 1}): cell
            for cell in cells
        }
        progress(Progress(len(planned) - len(cells), len(planned), "handing out cells"))
        try:
            for future in _arrivals(client, list(waiting)):
                cell = waiting.pop(future)
                error, measured = _outcome(future)
                if measured is None or measured.failure is not None:
                    lost.append(f"{cell.title}: {error if measured is None else measured.failure}")
                else:
                    _store(measured, store, notes)
                progress(Progress(next(done), len(planned), cell.title))
        finally:
            # Also when the user interrupts: what is not wanted any more must not keep the devices busy.
            client.cancel(list(waiting))
    if lost:
        raise EngineError(f"{len(lost)} cells were lost, the first: {lost[0]}; the others are recorded: add --resume.")
