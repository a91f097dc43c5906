"""`bench run`: check the options, measure, write the report and show it."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from bench.commands.arguments import (
    FAILED,
    INTERRUPTED,
    OK,
    USAGE,
    CsvFile,
    JaxPython,
    JsonFile,
    TorchPython,
    UsageError,
    check_choices,
    check_interpreters,
    check_outputs,
    complain,
    tell,
    tell_damage,
    wide_console,
)
from bench.environments import StoreError, check_environments, read_environments
from bench.measure.budget import MOST_BUDGET_S, end_s, forecast
from bench.measure.disturbance import BusyError
from bench.measure.request import EngineError, Request, SelectionError, SweepNotes, option
from bench.measure.sweep import Progress, run_sweep
from bench.measure.workers import RequestError
from bench.plan.presets import left_out
from bench.plan.workloads import UnknownWorkloadError, workload
from bench.report.export import write_summary, write_table
from bench.report.markdown import environment_lines, write_report
from bench.report.tables import show_frameworks, show_rankings
from bench.report.text import resolution_line, summary_line
from bench.store import Damage, Store, sole_writer
from bench.study.results import Results, read_results
from parity_tests.report.console import Interruption, PlainConsole, interruptible
from parity_tests.report.files import OutputError
from parity_tests.report.text import printable

_INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True)
class RunOptions(Request):
    """The options of `bench run`: those of a request, and those of the command itself."""

    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the records and the report.")]
    torch_python: TorchPython = None
    jax_python: JaxPython = None
    engine: str = option("local", "local, or dask: workers that own a device each.", choices=("local", "dask"))
    scheduler: str | None = option(None, "Of the dask scheduler, with --engine dask.", metavar="ADDRESS")
    resume: Annotated[bool, typer.Option("--resume", help="Continue the records in DIR; repeats nothing.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the options; measure and write nothing.")] = False
    json_file: JsonFile = None
    csv_file: CsvFile = None


Engine = Callable[[Request, Store, SweepNotes, Callable[[Progress], None]], None]


def _checked(options: RunOptions) -> RunOptions:
    """Return the options with whole paths of interpreters; refuse a value that is none of its choices.

    Raises:
        UsageError: with one sentence.
    """
    for one in fields(options):
        value = getattr(options, one.name)
        given = value if isinstance(value, tuple) else () if value is None else (value,)
        if choices := one.metadata.get("choices"):
            check_choices(f"--{one.name.replace('_', '-')}", given, choices)
    try:
        for name in options.workload:
            workload(name)
    except UnknownWorkloadError as error:
        raise UsageError(f"--workload: {error}") from error
    if options.budget_s is not None and not (
        isinstance(options.budget_s, float) and 0 < options.budget_s <= MOST_BUDGET_S
    ):
        raise UsageError(
            f"--budget-s: expected seconds above 0, at most {MOST_BUDGET_S:.0f}, got {options.budget_s!r}; give "
            "the time that the run may take."
        )
    if (options.engine == "dask") != (options.scheduler is not None):
        raise UsageError("--scheduler: expected with --engine dask, and only there; give both or neither.")
    check_outputs({"--json": options.json_file, "--csv": options.csv_file}, out=options.out / "report.md")
    pythons = check_interpreters(options.torch_python, options.jax_python)
    return replace(options, torch_python=pythons.get("torch"), jax_python=pythons.get("jax"))


def _engine(options: RunOptions) -> Engine:
    """Return the function that measures: here, or on the workers of a scheduler."""
    if options.scheduler is None:
        return run_sweep
    try:
        from bench.measure.cluster import run_on_cluster
    except ModuleNotFoundError as error:
        raise UsageError(f"--engine: dask needs the package {error.name}; install the extra `dask`.") from error
    return partial(run_on_cluster, address=options.scheduler)


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


def _measure(engine: Engine, request: Request, store: Store, notes: SweepNotes, interruption: Interruption) -> str:
    """Run the sweep; return why it ended early, in a sentence, or nothing."""
    with _progress_bar() as bar:
        task = bar.add_task("starting", total=None)

        def show(state: Progress) -> None:
            interruption.check()
            bar.update(task, description=printable(state.text)[:100], completed=state.done, total=state.total)

        ended = ""
        try:
            try:
                engine(request, store, notes, show)
            except BusyError as error:
                ended = str(error).removesuffix(".")
            except RequestError as error:
                ended = f"a worker cannot start: {error}"
            except EngineError as error:
                ended = str(error)
            interruption.settle()
        except KeyboardInterrupt:
            return _INTERRUPTED
    return ended


def run_command(options: RunOptions) -> int:
    """Measure a preset and show the ranking of every workload and direction.

    Exit status: 0 if every timed result was right; 1 after a mismatch or a crash, or if nothing could be timed;
    2 for wrong usage.
    """
    # What this process has computed until now is the least that has passed since the command was typed.
    begun = time.monotonic() - time.process_time()
    notes = SweepNotes()
    results, failed, damage = None, None, Damage()
    # Until the files are there: a second Ctrl-C, in impatience, must not cost them.
    with interruptible() as interruption:
        try:
            options = _checked(options)
            engine = _engine(options)
            for line in left_out(options.plan):
                notes.add(line)
            if options.budget_s is not None and options.most_cell_s:
                notes.add("With --budget-s noise prolongs no cell: --most-cell-s has no effect.")
            if options.dry_run:
                for line in forecast(options) if options.budget_s is not None else ():
                    print(line)
                return OK
            with sole_writer(options.out):
                store = Store(options.out, resume=options.resume)
                environments = read_environments(options.out)
                # All that there are: with the new one they are written again.
                check_environments({*store.environment_ids, *environments}, environments, str(options.out))
                if store.set_aside_bytes:
                    notes.add(
                        f"{store.set_aside_bytes} bytes of an unfinished cell were set aside; it is measured again."
                    )
                given = options
                if options.budget_s is not None:
                    spent = time.monotonic() - begun + end_s(len(store))
                    given = replace(options, budget_s=max(0.0, options.budget_s - spent))
                stopped = _measure(engine, given, store, notes, interruption)
        except (UsageError, SelectionError, StoreError) as error:
            return complain(error)
        interrupted = stopped == _INTERRUPTED
        if stopped and store.environment_ids:
            stopped += f"; what was measured is in {options.out}; add --resume to continue"
        elif stopped:
            stopped += ". Nothing was measured"
        if store.environment_ids:
            try:
                results = replace(read_results([options.out], damage=damage), stopped=stopped)
                _write(options, notes, results)
            except (StoreError, OutputError) as error:
                # The records are safe by now; only what is derived from them is missing.
                failed = error
    if results is not None:
        _show(options, notes, results)
    else:
        print(*map(printable, notes.lines), sep="\n", end="\n" * bool(notes.lines))
    if failed is not None:
        complain(failed)
    damaged = tell_damage(damage.sentences, OK) != OK
    if stopped:
        tell(f"{stopped.removesuffix('.')}.")
    if interrupted:
        return INTERRUPTED
    if failed is not None or damaged:
        return USAGE
    outcomes: Mapping[str, int] = {} if results is None else results.outcomes
    return FAILED if stopped or not outcomes.get("ok") or outcomes.get("mismatch") or outcomes.get("crash") else OK


def _write(options: RunOptions, notes: SweepNotes, results: Results) -> None:
    """Write the report and the files that were asked for, from the records alone."""
    write_report("report", options.out / "report.md", results, notes.lines)
    if options.json_file is not None:
        write_summary(options.json_file, results, notes.lines)
    if options.csv_file is not None:
        write_table(options.csv_file, results)


def _show(options: RunOptions, notes: SweepNotes, results: Results) -> None:
    """Print the rankings, from the records alone."""
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
