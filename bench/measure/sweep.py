"""A whole run: every cell of a preset, in every division and process replicate, into a store."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

from bench.measure.conditions import monitor_for
from bench.measure.coordinator import CellRun
from bench.measure.environment import environment_id, fingerprint
from bench.measure.pool import WorkerPool, starter
from bench.measure.processors import allowed_cpus
from bench.measure.recording import cell_hash, records_of
from bench.plan.cells import DEVICES, Cell
from bench.plan.competitors import FRAMEWORKS, Competitor, competitors_for, further_modes, offered_modes
from bench.plan.presets import Preset
from bench.plan.selection import plan_cells
from bench.records import Record


class RecordStore(Protocol):
    """Where a sweep puts what it measured: a ``Store``, or what stands in for it in a worker of a cluster."""

    def holds(self, cell: str, process_replicate: int) -> bool:
        """Whether a cell is there."""
        ...

    def append(self, records: Iterable[Record]) -> None:
        """Keeps the records of one cell."""
        ...

    def add_environment(self, environment_id: str, fingerprint: Mapping[str, Any]) -> None:
        """Keeps what the records name as their environment."""
        ...


class SelectionError(ValueError):
    """A request that selects nothing, or something that is not there; the message is one sentence for the user."""


@dataclass(frozen=True)
class Request:
    """What a run is asked to do.

    Attributes:
        preset: cells and effort, already narrowed.
        device: ``auto``, ``cpu`` or ``cuda``.
        frameworks: which frameworks take part, if installed.
        implementations: names to keep; empty keeps all.
        modes: modes to keep, in which every competitor then runs; empty keeps those of the division and the preset.
        pythons: framework to interpreter, where not the running one.
        seed: of the inputs and the order.
    """

    preset: Preset
    device: str = "auto"
    frameworks: tuple[str, ...] = FRAMEWORKS
    implementations: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    pythons: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0


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


@dataclass
class SweepNotes:
    """What the user should know beside the records."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Adds a line once."""
        if line not in self.lines:
            self.lines.append(line)


def choose_device(asked: str, hello: Mapping[str, Mapping[str, Any]], notes: SweepNotes) -> str:
    """Turns ``auto`` into a device that every framework has, and refuses one that a framework lacks.

    Raises:
        SelectionError: if the device that was asked for is not there.
    """
    found = {framework: tuple(reply["devices"]) for framework, reply in hello.items()}
    if asked != "auto":
        lacking = [framework for framework, devices in found.items() if asked not in devices]
        if lacking:
            raise SelectionError(f"device: {' and '.join(lacking)} cannot use {asked!r} here; choose another --device.")
        return asked
    if all("cuda" in devices for devices in found.values()):
        return "cuda"
    with_gpu = [framework for framework, devices in found.items() if "cuda" in devices]
    if with_gpu:
        notes.add(f"Only {with_gpu[0]} sees a GPU: everything runs on the CPU, where the frameworks can be compared.")
    return "cpu"


def _competitors(pool: WorkerPool, request: Request, cell: Cell) -> tuple[Competitor, ...]:
    preset = request.preset
    compiled = preset.compiled.get(cell.workload.name, ())
    # A tuned cell without compiled competitors would be a matched one.
    if not compiled and cell.division == "tuned":
        compiled = ("matmul",)
    # Whoever names a mode wants it in this direction too.
    gradients = bool(request.modes) or cell.direction in preset.compiled_directions
    return competitors_for(
        pool.catalogues(),
        compiled=compiled,
        modes=further_modes(cell.division, cell.device, compile_gradients=gradients),
        only=request.implementations,
        without=preset.left_out,
        only_modes=request.modes,
    )


def _check_modes(request: Request, device: str, frameworks: Sequence[str], notes: SweepNotes) -> None:
    """Notes which of the modes that were asked for a division lacks, and refuses a division that lacks them all."""
    for division in request.preset.divisions if request.modes else ():
        offered = offered_modes(division, device, frameworks)
        lacking = [mode for mode in request.modes if mode not in offered]
        if len(lacking) == len(request.modes):
            raise SelectionError(
                f"mode: expected one of {', '.join(offered)} in the {division} division on {device}, "
                f"got {', '.join(lacking)}; choose one of these, or another --division."
            )
        for mode in lacking:
            notes.add(f"The {division} division has no {mode} on {device} with {' and '.join(frameworks)}: left out.")


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
    """
    preset = request.preset
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
                _check_modes(request, device, tuple(pool.hello), notes)
                place = fingerprint(pool.hello, device=device, division=division, cpus=allowed_cpus())
                place_id = environment_id(place)
                store.add_environment(place_id, place)
                for cell in plan_cells(replace(preset, divisions=(division,)), device):
                    _run_cell(cell, replicate, request, store, pool, place_id, partial(_tell, progress, done, total))
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
) -> None:
    competitors = _competitors(pool, request, cell)
    known = sorted({name for catalogue in pool.catalogues() for name in catalogue.kinds()})
    unknown = [name for name in request.implementations if name not in known]
    if unknown or not competitors:
        raise SelectionError(f"implementation: nothing is called {', '.join(unknown)}; choose from {', '.join(known)}.")
    key = cell_hash(cell, competitors, request.preset, seed=request.seed, environment_id=place_id)
    if store.holds(key, replicate):
        return
    started_at = datetime.now(UTC)
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
            device_name=_device_name(pool),
        )
    )
