"""``bench run``."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from bench.commands.usage import (
    FAILED,
    INTERRUPTED,
    OK,
    UsageError,
    check_choices,
    check_interpreters,
    check_writable,
    complain,
)
from bench.measure.protocol import RequestError
from bench.measure.sweep import Progress, Request, SelectionError, SweepNotes, run_sweep
from bench.plan.cells import DEVICES, DIRECTIONS, DIVISIONS, PRECISIONS
from bench.plan.competitors import FRAMEWORKS
from bench.plan.presets import PRESETS, narrowed
from bench.plan.workloads import UnknownWorkloadError, workload
from bench.report.export import summary, write_json
from bench.report.markdown import environment_lines, report
from bench.report.tables import show_rankings, wide_console
from bench.report.text import summary_line
from bench.store import Store, StoreError, read_environments
from bench.study.ranking import rankings, tally


@dataclass(frozen=True)
class Options:
    """The command's options; see ``bench run --help``."""

    out: Path
    preset: str
    workloads: tuple[str, ...]
    frameworks: tuple[str, ...]
    implementations: tuple[str, ...]
    device: str
    precisions: tuple[str, ...]
    directions: tuple[str, ...]
    divisions: tuple[str, ...]
    rounds: int | None
    replicates: int | None
    seed: int
    torch_python: str | None
    jax_python: str | None
    resume: bool
    json_file: Path | None


def _request(options: Options) -> Request:
    """Checks the options against the tables that they name."""
    check_choices("--preset", [options.preset], PRESETS)
    try:
        for name in options.workloads:
            workload(name)
    except UnknownWorkloadError as error:
        raise UsageError(f"--workload: {error}") from error
    check_choices("--framework", options.frameworks, FRAMEWORKS)
    check_choices("--device", [options.device], ("auto", *DEVICES))
    check_choices("--precision", options.precisions, PRECISIONS)
    check_choices("--direction", options.directions, DIRECTIONS)
    check_choices("--division", options.divisions, DIVISIONS)
    check_writable("--json", options.json_file)
    preset = narrowed(
        PRESETS[options.preset],
        workloads=options.workloads,
        directions=options.directions,
        precisions=options.precisions,
        divisions=options.divisions,
        rounds=options.rounds,
        replicates=options.replicates,
    )
    return Request(
        preset=preset,
        device=options.device,
        frameworks=tuple(name for name in FRAMEWORKS if not options.frameworks or name in options.frameworks),
        implementations=options.implementations,
        pythons=check_interpreters(options.torch_python, options.jax_python),
        seed=options.seed,
    )


@contextmanager
def _progress_bar() -> Iterator[ProgressBar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # On stderr, so that the tables can be piped; a slow refresh, since the bar must not compete with what is measured.
    console = Console(stderr=True)
    with ProgressBar(
        *columns, console=console, refresh_per_second=2, transient=True, disable=not console.is_terminal
    ) as bar:
        yield bar


def _measure(request: Request, store: Store, notes: SweepNotes) -> bool:
    """Runs the sweep; returns whether it was interrupted."""
    with _progress_bar() as bar:
        task = bar.add_task("starting", total=None)

        def show(state: Progress) -> None:
            bar.update(task, description=state.text[:100], completed=state.done, total=state.total)

        try:
            run_sweep(request, store, notes, show)
        except KeyboardInterrupt:
            return True
    return False


def run_command(options: Options) -> int:
    """Runs ``bench run`` and returns its exit status."""
    notes = SweepNotes()
    try:
        request = _request(options)
        store = Store(options.out, resume=options.resume)
        if store.set_aside_bytes:
            notes.add(f"{store.set_aside_bytes} bytes of an unfinished cell were set aside; it is measured again.")
        interrupted = _measure(request, store, notes)
    except (UsageError, SelectionError, StoreError) as error:
        return complain(error)
    except RequestError as error:
        print(f"bench: a worker cannot start: {error}", file=sys.stderr)
        return FAILED
    _show(options, store, notes)
    if interrupted:
        print(f"bench: interrupted; what was measured is in {options.out}; add --resume to continue.", file=sys.stderr)
        return INTERRUPTED
    counts = tally(store.records)
    return FAILED if not counts.get("ok") or counts.get("mismatch") or counts.get("crash") else OK


def _show(options: Options, store: Store, notes: SweepNotes) -> None:
    """Prints the rankings and writes the report: both from the records alone."""
    console = wide_console()
    environments = read_environments(options.out)
    for environment_id in dict.fromkeys(record.environment_id for record in store.records):
        for line in environment_lines(environment_id, environments[environment_id]):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print()
    show_rankings(console, rankings(store.records))
    for line in notes.lines:
        console.print(line, markup=False)
    console.print(f"Outcomes: {summary_line(tally(store.records))}.", markup=False)
    (options.out / "report.md").write_text(report(store.records, environments, notes.lines))
    console.print(
        f"Records: {options.out / 'records.jsonl'}; report: {options.out / 'report.md'}", markup=False, soft_wrap=True
    )
    if options.json_file is not None:
        write_json(options.json_file, summary(store.records, environments, notes.lines))
