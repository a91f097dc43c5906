"""`bench run`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from bench.archive import Damage
from bench.commands.usage import (
    FAILED,
    INTERRUPTED,
    OK,
    USAGE,
    UsageError,
    check_choices,
    check_interpreters,
    check_writable,
    complain,
    tell,
    tell_damage,
)
from bench.engines import ENGINES, EngineError
from bench.environments import StoreError, check_environments, read_environments
from bench.measure.disturbance import WHEN_BUSY, BusyError
from bench.measure.protocol import RequestError
from bench.measure.request import Request, SelectionError, SweepNotes
from bench.measure.sweep import Progress, run_sweep
from bench.plan.cells import CACHES, DEVICES, DIRECTIONS, DIVISIONS, PRECISIONS
from bench.plan.competitors import FRAMEWORKS, MODES
from bench.plan.presets import PRESETS, STEPPED_OPTIMIZERS
from bench.plan.selection import left_out, narrowed
from bench.plan.workloads import UnknownWorkloadError, workload
from bench.report.export import write_summary, write_table
from bench.report.markdown import environment_lines, write_report
from bench.report.output import OutputError
from bench.report.tables import show_frameworks, show_rankings, wide_console
from bench.report.text import resolution_line, summary_line
from bench.store import Store, sole_writer
from bench.study.results import Results, read_results
from parity_tests.report.console import PlainConsole
from parity_tests.report.interruption import Interruption, interruptible
from parity_tests.report.text import printable


@dataclass(frozen=True)
class Options:
    """The command's options; see `bench run --help`."""

    out: Path
    preset: str
    workloads: tuple[str, ...]
    frameworks: tuple[str, ...]
    implementations: tuple[str, ...]
    modes: tuple[str, ...]
    device: str
    precisions: tuple[str, ...]
    directions: tuple[str, ...]
    divisions: tuple[str, ...]
    caches: tuple[str, ...]
    optimizer: str | None
    rounds: int | None
    cell_s: float | None
    most_cell_s: float | None
    probe_s: float | None
    prepare_s: float | None
    replicates: int | None
    seed: int
    torch_python: str | None
    jax_python: str | None
    resume: bool
    when_busy: str
    json_file: Path | None
    csv_file: Path | None = None
    engine: str = "local"
    scheduler: str | None = None


Engine = Callable[[Request, Store, SweepNotes, Callable[[Progress], None]], None]


def _engine(options: Options) -> Engine:
    """The function that measures: here, or on the workers of a scheduler."""
    check_choices("--engine", [options.engine], ENGINES)
    if (options.engine == "dask") != (options.scheduler is not None):
        raise UsageError("--scheduler: expected with --engine dask, and only there; give both or neither.")
    if options.scheduler is None:
        return run_sweep
    try:
        from bench.engines.dask import run_on_cluster
    except ModuleNotFoundError as error:
        raise UsageError(f"--engine: dask needs the package {error.name}; install the extra `dask`.") from error
    return partial(run_on_cluster, address=options.scheduler)


def _request(options: Options) -> Request:
    """Checks the options against the tables that they name."""
    check_choices("--preset", [options.preset], PRESETS)
    try:
        for name in options.workloads:
            workload(name)
    except UnknownWorkloadError as error:
        raise UsageError(f"--workload: {error}") from error
    check_choices("--framework", options.frameworks, FRAMEWORKS)
    check_choices("--mode", options.modes, MODES)
    check_choices("--device", [options.device], ("auto", *DEVICES))
    check_choices("--precision", options.precisions, PRECISIONS)
    check_choices("--direction", options.directions, DIRECTIONS)
    check_choices("--division", options.divisions, DIVISIONS)
    check_choices("--cache", options.caches, CACHES)
    check_choices("--optimizer", [options.optimizer] if options.optimizer else [], STEPPED_OPTIMIZERS)
    check_choices("--when-busy", [options.when_busy], WHEN_BUSY)
    check_writable("--json", options.json_file)
    check_writable("--csv", options.csv_file)
    preset = narrowed(
        PRESETS[options.preset],
        workloads=options.workloads,
        directions=options.directions,
        precisions=options.precisions,
        divisions=options.divisions,
        caches=options.caches,
        optimizer=options.optimizer,
        rounds=options.rounds,
        cell_s=options.cell_s,
        most_cell_s=options.most_cell_s,
        probe_s=options.probe_s,
        prepare_s=options.prepare_s,
        replicates=options.replicates,
    )
    return Request(
        preset=preset,
        device=options.device,
        frameworks=tuple(name for name in FRAMEWORKS if not options.frameworks or name in options.frameworks),
        implementations=options.implementations,
        modes=options.modes,
        pythons=check_interpreters(options.torch_python, options.jax_python),
        seed=options.seed,
        when_busy=options.when_busy,
    )


@contextmanager
def _progress_bar() -> Iterator[ProgressBar]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # On stderr, so that the tables can be piped; a slow refresh, since the bar must not compete with what is measured.
    console = PlainConsole(stderr=True)
    with ProgressBar(
        *columns, console=console, refresh_per_second=2, transient=True, disable=not console.is_terminal
    ) as bar:
        yield bar


def _measure(engine: Engine, request: Request, store: Store, notes: SweepNotes, interruption: Interruption) -> bool:
    """Runs the sweep; returns whether it was interrupted."""
    with _progress_bar() as bar:
        task = bar.add_task("starting", total=None)

        def show(state: Progress) -> None:
            interruption.check()
            bar.update(task, description=printable(state.text)[:100], completed=state.done, total=state.total)

        try:
            engine(request, store, notes, show)
            interruption.settle()
        except KeyboardInterrupt:
            return True
    return False


def run_command(options: Options) -> int:
    """Runs `bench run` and returns its exit status."""
    notes = SweepNotes()
    results, failed, damage = None, None, Damage()
    # Until the files are there: a second Ctrl-C, in impatience, must not cost them.
    with interruptible() as interruption:
        try:
            request, engine = _request(options), _engine(options)
            for line in left_out(request.preset):
                notes.add(line)
            with sole_writer(options.out):
                store = Store(options.out, resume=options.resume)
                environments = read_environments(options.out)
                # All that there are: with the new one they are written again.
                check_environments({*store.environment_ids, *environments}, environments, str(options.out))
                if store.set_aside_bytes:
                    notes.add(
                        f"{store.set_aside_bytes} bytes of an unfinished cell were set aside; it is measured again."
                    )
                interrupted = _measure(engine, request, store, notes, interruption)
        except (UsageError, SelectionError, StoreError) as error:
            return complain(error)
        except BusyError as error:
            tell(f"{error} What was measured before is in {options.out}; add --resume to continue.")
            return FAILED
        except RequestError as error:
            tell(f"a worker cannot start: {error}")
            return FAILED
        except EngineError as error:
            tell(error)
            return FAILED
        stopped = f"interrupted; what was measured is in {options.out}; add --resume to continue" if interrupted else ""
        if store.environment_ids:
            try:
                results = replace(read_results([options.out], damage=damage), stopped=stopped)
                _write(options, notes, results)
            except (StoreError, OutputError) as error:
                # The records are safe by now; only what is derived from them is missing.
                failed = error
    if results is not None:
        _show(options, notes, results)
    if failed is not None:
        complain(failed)
    damaged = tell_damage(damage.sentences, OK) != OK
    if interrupted:
        tell(f"{stopped}.")
        return INTERRUPTED
    if failed is not None or damaged:
        return USAGE
    outcomes: Mapping[str, int] = {} if results is None else results.outcomes
    return FAILED if not outcomes.get("ok") or outcomes.get("mismatch") or outcomes.get("crash") else OK


def _write(options: Options, notes: SweepNotes, results: Results) -> None:
    """Writes the report and the files that were asked for, from the records alone."""
    write_report("report", options.out / "report.md", results, notes.lines)
    if options.json_file is not None:
        write_summary(options.json_file, results, notes.lines)
    if options.csv_file is not None:
        write_table(options.csv_file, results)


def _show(options: Options, notes: SweepNotes, results: Results) -> None:
    """Prints the rankings, from the records alone."""
    console = wide_console()
    for environment_id in results.places():
        for line in environment_lines(environment_id, results.environments[environment_id]):
            console.print(line, soft_wrap=True)
    console.print()
    show_rankings(console, results.found)
    show_frameworks(console, results)
    for line in notes.lines:
        console.print(line)
    console.print(f"Outcomes: {summary_line(results.outcomes)}. {resolution_line(results.found)}")
    console.print(f"Records: {options.out / 'records.jsonl'}; report: {options.out / 'report.md'}", soft_wrap=True)
