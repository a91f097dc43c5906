"""Share among the commands: consoles, options, refusals in one sentence, choices from the tables, a progress bar."""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parity_tests.interpreters.interpreter import DEFAULT_TIMEOUT_S
from parity_tests.judge.dtypes import STORAGE_DTYPES, short_name, storage_dtype
from parity_tests.judge.inputs import CASE_SETS, SMOKE, Case
from parity_tests.judge.subjects import (
    DEFAULT_MODES,
    EQUAL,
    FRAMEWORKS,
    MODES,
    SHARDS,
    UNEQUAL,
    Subject,
    absent_reasons,
    framework_available,
    load_subjects,
    modes_of,
)
from parity_tests.report.console import INTERRUPTED, PlainConsole
from parity_tests.report.files import OutputError, check_apart, check_output

DEVICES = ("auto", "cpu", "cuda")
# Precisions of products of fp32 arrays; every other dtype has one.
FP32_PRECISIONS = ("fp32", "tf32")
HOLDS, FAILED, WRONG_USAGE = 0, 1, 2
# In a pipe or a log there is no terminal to fit into: 80 columns would cut names until they cannot be told apart.
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
console = PlainConsole(width=_WIDTH)
errors = PlainConsole(stderr=True, width=_WIDTH)


def refuse(sentence: str) -> typer.Exit:
    """Print one sentence and return the exit for the caller to raise."""
    errors.print(f"error: {sentence}", soft_wrap=True)
    return typer.Exit(WRONG_USAGE)


def choices_help(choices: Iterable[str]) -> str:
    """Return help text of an option that may be repeated."""
    return f"One of {', '.join(choices)}; repeat for several; default: all."


def modes_help() -> str:
    """Return help text of `--mode`: each mode with the frameworks that have it."""
    known = ", ".join(f"{mode.name} ({' and '.join(mode.frameworks)})" for mode in MODES.values())
    defaults = " and ".join(f"{mode} for {framework}" for framework, mode in DEFAULT_MODES.items())
    return f"One of {known}; repeat for several; default: {defaults}; with --cases full: all."


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `run`: of cells, and with `--pair` of a pair."""

    framework: Annotated[tuple[str, ...], typer.Option(help=choices_help(FRAMEWORKS))] = ()
    implementation: Annotated[tuple[str, ...], typer.Option(help="Repeat for several; default: all.")] = ()
    mode: Annotated[tuple[str, ...], typer.Option(help=modes_help())] = ()
    dtype: Annotated[tuple[str, ...], typer.Option(help=choices_help(STORAGE_DTYPES))] = ()
    cases: Annotated[str, typer.Option(help=f"Which set of shapes: {', '.join(CASE_SETS)}.")] = "default"
    case: Annotated[tuple[str, ...], typer.Option(help="Single shapes by name, instead of a set.")] = ()
    train: Annotated[
        tuple[str, ...],
        typer.Option(help="Only this training, TASK:OPTIMIZER such as partitioned-mlp:adamw; repeat for several."),
    ] = ()
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto"
    seed: Annotated[int, typer.Option(min=0, help="Seed of the inputs.")] = 0
    precision: Annotated[str, typer.Option(help="How fp32 products may be computed: fp32, or tf32 (NVIDIA GPUs).")] = (
        "fp32"
    )
    pair: Annotated[str | None, typer.Option(help="Judge your own pair instead: package.module:factory.")] = None
    torch_python: Annotated[str | None, typer.Option(help="With --pair: run the torch side in this interpreter.")] = (
        None
    )
    jax_python: Annotated[str | None, typer.Option(help="With --pair: run the Flax side in this interpreter.")] = None
    timeout_s: Annotated[
        float,
        typer.Option(help="With --pair: seconds that one step may take, such as an import or one call of a side."),
    ] = DEFAULT_TIMEOUT_S
    dtypes_equal: Annotated[
        bool, typer.Option("--dtypes-equal", help="With --pair: outputs must have one dtype on both sides.")
    ] = False
    effort: Annotated[
        str, typer.Option(help="With --pair: full, or quick for a look without notes on branches and without causes.")
    ] = "full"
    values: Annotated[
        str, typer.Option(help="With --pair: drawn, or given to judge the torch module's own values too.")
    ] = "drawn"
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML, one case a row.")] = None
    html_file: Annotated[Path | None, typer.Option("--html", help="Write one self-contained page.")] = None

    def __post_init__(self) -> None:
        """Give dtypes and precision their one name, however they were spelled."""
        object.__setattr__(self, "dtype", tuple(map(storage_dtype, self.dtype)))
        object.__setattr__(self, "precision", short_name(self.precision))

    def check_files(self) -> None:
        """Refuse, before the work, files that could not be written after it."""
        named = {"--json": self.json_file, "--junit": self.junit_file, "--html": self.html_file}
        outputs = {option: path for option, path in named.items() if path is not None}
        if not outputs:
            return
        for option, path in outputs.items():
            check_writable(option, path)
        try:
            check_apart(outputs)
        except OutputError as error:
            raise refuse(str(error)) from None


def choose(option: str, values: Iterable[str], choices: Iterable[str]) -> list[str]:
    """Return the values, or refuse one that is not among the choices."""
    known = list(choices)
    for value in values:
        if value not in known:
            raise refuse(f"{option}: expected one of {', '.join(known)}, got {value!r}; choose one of these.")
    return list(values)


def chosen_frameworks(frameworks: Sequence[str]) -> list[str]:
    """Return the frameworks to load: those named, or all that are installed; refuse an absent one that was named."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = []
    for name in dict.fromkeys(choose("--framework", frameworks, FRAMEWORKS) or FRAMEWORKS):
        if framework_available(name):
            found.append(name)
        elif frameworks:
            raise refuse(f"--framework {name}: expected an installed framework, got none; install its extra.")
        else:
            console.print(f"{name} is not installed: only the other framework is compared", style="yellow")
    if not found:
        raise refuse("no framework is installed; install the extra torch, jax, cuda12 or cuda13.")
    return found


def chosen_modes(frameworks: Sequence[str], names: Sequence[str], every: bool) -> dict[str, tuple[str, ...]]:
    """Return each framework's modes: those named that it has, else all or its default."""
    choose("--mode", names, MODES)
    if not names:
        return {framework: modes_of(framework) if every else (DEFAULT_MODES[framework],) for framework in frameworks}
    found = {framework: tuple(mode for mode in modes_of(framework) if mode in names) for framework in frameworks}
    for framework, modes in found.items():
        if not modes and any(found.values()):
            console.print(f"{framework} has no mode {', '.join(names)}: it is left out", style="yellow")
    if not any(found.values()):
        known = "; ".join(f"{framework}: {', '.join(modes_of(framework))}" for framework in frameworks)
        raise refuse(f"--mode: expected a mode of {known}, got {', '.join(names)}; choose one of these.")
    return {framework: modes for framework, modes in found.items() if modes}


def chosen_subjects(
    frameworks: Sequence[str],
    implementations: Sequence[str],
    device: str,
    modes: Mapping[str, Sequence[str]] | None = None,
    precision: str | None = None,
    cases: Sequence[Case] = SMOKE,
) -> list[Subject]:
    """Load the subjects of the frameworks, in these modes or the default, and keep the named implementations.

    Those that run none of the cases, of equal or of unequal sizes, are left out.
    """
    if "sharded" in (modes or {}).get("jax", ()):
        # Read when JAX starts; a machine with as many real devices of the platform that is asked for loses nothing.
        flags = os.environ.get("XLA_FLAGS", "")
        if "host_platform_device_count" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={SHARDS}".strip()
    found: list[Subject] = []
    kinds = dict.fromkeys(EQUAL if case.sizes is None else UNEQUAL for case in cases)
    for name, sizes in itertools.product(frameworks if modes is None else modes, kinds):
        try:
            found += load_subjects(name, device, () if modes is None else modes[name], precision, sizes)
        except ValueError as error:
            raise refuse(str(error)) from None
    for framework in frameworks if implementations else ():
        for name, reason in absent_reasons(framework, device).items():
            if name in implementations:
                raise refuse(f"--implementation {name}: {reason}")
    choose("--implementation", implementations, sorted({subject.implementation for subject in found}))
    return [subject for subject in found if not implementations or subject.implementation in implementations]


def chosen_cases(case_set: str, names: Sequence[str]) -> list[Case]:
    """Return the named cases, or the set."""
    known = {case.name: case for case in CASE_SETS["full"]}
    if not names:
        return list(CASE_SETS[choose("--cases", [case_set], CASE_SETS)[0]])
    return [known[name] for name in choose("--case", names, known)]


def check_writable(option: str, path: Path | None) -> None:
    """Refuse, before the work, a file that could not be written after it."""
    try:
        check_output(option, path)
    except OutputError as error:
        why = getattr(error.__cause__, "strerror", None) or error
        raise refuse(
            f"{option}: expected a file in a writable folder, got {path} ({why}); choose another path."
        ) from None


def write_outputs(*outputs: tuple[Path | None, Callable[[Path], None]]) -> list[str]:
    """Write the files that were asked for, even where one of them fails.

    Return one sentence for each that could not be written.
    """
    failed = []
    for path, write in outputs:
        try:
            if path is not None:
                write(path)
        except OutputError as error:
            failed.append(str(error))
    return failed


def ended(status: int, stopped: str, failed: Sequence[str]) -> int:
    """Say why a command did not come to its end, and return its exit status.

    Args:
        status: of a command that came to its end.
        stopped: one sentence about an interruption; empty for none.
        failed: sentences about files that could not be written.
    """
    if stopped:
        console.print(stopped, style="yellow")
    for sentence in failed:
        refuse(sentence)
    return INTERRUPTED if stopped else WRONG_USAGE if failed else status


_HEARTBEAT_S = 60.0


def heartbeat() -> Callable[[str], None]:
    """Return a function that prints the state of a run, once a minute at most, where no terminal shows the bar."""
    last = time.monotonic()

    def beat(text: str) -> None:
        nonlocal last
        if not sys.stderr.isatty() and time.monotonic() - last >= _HEARTBEAT_S:
            last = time.monotonic()
            errors.print(text)

    return beat


def progress_bar() -> Progress:
    """Return a bar with the remaining time, shown on a terminal only."""
    return Progress(
        TextColumn("{task.description:<64}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
