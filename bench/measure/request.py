"""The options of `bench run`, each declared once, and what of them can be done with the workers that are there."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from bench.measure.disturbance import WHEN_BUSY
from bench.plan.cells import CACHES, DEVICES, DIRECTIONS, DIVISIONS, Cell
from bench.plan.competitors import (
    FRAMEWORKS,
    LAUNCHED,
    MODES,
    Catalogue,
    Competitor,
    competitors_for,
    further_modes,
    offered_modes,
)
from bench.plan.presets import ANY_ROUNDS, PRESETS, STEPPED_OPTIMIZERS, Preset
from parity_tests.judge.dtypes import PRECISIONS, precision_class, short_name


class SelectionError(ValueError):
    """A request that selects nothing, or something that is not there; the message is one sentence for the user."""


class LeftOutError(SelectionError):
    """A cell that none of the competitors computes which were asked for by name; those of other cells may."""


class EngineError(Exception):
    """Cells that could not be measured although nothing was wrong with the request; the message is one sentence."""


def option(default: Any, said: str, *, choices: Collection[str] = (), **details: Any) -> Any:
    """Declare an option of a command: a field of a dataclass from which the command line is derived.

    Args:
        default: its value if it is not given.
        said: its help.
        choices: its possible values; empty for any.
        details: further arguments of `typer.Option`.
    """
    return field(default=default, metadata={"choices": choices, "typer": {"help": said, **details}})


def number(text: str) -> Any:
    """Return the number that a text is, or the text: what it may be is checked where all options are."""
    try:
        return float(text)
    except ValueError:
        return text


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options that decide which cells a run measures, with which competitors and how.

    The fields are the options: `bench.commands.arguments` derives the command line from them, `plan` the cells and the
    effort, and a worker of a cluster is sent the request itself, narrowed to a cell. An empty tuple chooses nothing and
    leaves the preset's choice.
    """

    preset: str = option("smoke", "smoke, seed, workloads, sweep or full; see `list`.", choices=PRESETS)
    workload: tuple[str, ...] = option((), "Only this workload; may be repeated.")
    framework: tuple[str, ...] = option((), "Only torch or only jax.", choices=FRAMEWORKS)
    implementation: tuple[str, ...] = option((), "Only this competitor; may be repeated.")
    mode: tuple[str, ...] = option(
        (), "Only this mode, such as eager, cuda-graph or jit, with every competitor in it; repeatable.", choices=MODES
    )
    device: str = option("auto", "auto, cpu or cuda.", choices=("auto", *DEVICES))
    precision: tuple[str, ...] = option((), "fp32, tf32, bf16, fp16 or fp64.", choices=PRECISIONS)
    direction: tuple[str, ...] = option((), "forward, forward_backward or train_step.", choices=DIRECTIONS)
    division: tuple[str, ...] = option((), "stock, matched or tuned.", choices=DIVISIONS)
    cache: tuple[str, ...] = option((), "warm or cold: is the data in the last cache?", choices=CACHES)
    optimizer: str | None = option(None, "Of train_step, such as adamw or sgd.", choices=STEPPED_OPTIMIZERS)
    rounds: int | None = option(None, "Rounds of each cell.", min=1)
    cell_s: float | None = option(None, "Seconds for the rounds of an unresolved cell.", min=0)
    most_cell_s: float | None = option(
        None, "A cell whose A/A control is not known to 3% may go on for so many seconds.", min=0
    )
    probe_s: float | None = option(None, "Seconds for each further clock; 0: only speed.", min=0)
    prepare_s: float | None = option(
        None, "Most seconds to build and compile a competitor; then it is a timeout.", min=1
    )
    replicates: int | None = option(None, "Sets of fresh processes.", min=1)
    budget_s: float | None = option(
        None, "End within so many seconds, with what decides most first; says what it left out.", parser=number
    )
    seed: int = option(0, "Of the inputs and of the order.", min=0)
    # Interpreters; None is the running one.
    torch_python: str | None = None
    jax_python: str | None = None
    when_busy: str = option(
        "warn",
        "warn, wait (at most 60 s a cell) or refuse: what a cell does while others use the machine.",
        choices=WHEN_BUSY,
    )

    def __post_init__(self) -> None:
        """Give each precision its short name, however it was spelled."""
        object.__setattr__(self, "precision", tuple(map(short_name, self.precision)))

    @cached_property
    def plan(self) -> Preset:
        """The preset with the given choices in place of its own.

        With `cell_s` alone, this time ends a cell that is not resolved, and neither `most_cell_s` nor a number of
        rounds does. With `most_cell_s` a number of rounds does not either. A workload outside the preset may be named.
        """
        preset, changes = PRESETS[self.preset], {}
        if self.cell_s is not None or self.most_cell_s is not None:
            changes["rounds"] = ANY_ROUNDS
        if self.cell_s is not None:
            changes["most_cell_s"] = 0.0
        if self.prepare_s is not None:
            changes["limits"] = replace(preset.limits, prepare_s=self.prepare_s)
        for name in ("optimizer", "rounds", "cell_s", "most_cell_s", "probe_s", "replicates"):
            if (value := getattr(self, name)) is not None:
                changes[name] = value
        for name in ("workload", "direction", "division", "cache"):
            if chosen := getattr(self, name):
                changes[f"{name}s"] = chosen
        if self.precision:
            changes["precisions"] = tuple(map(precision_class, self.precision))
        return replace(preset, **changes)

    @property
    def frameworks(self) -> tuple[str, ...]:
        """The frameworks that take part, if installed."""
        return tuple(name for name in FRAMEWORKS if not self.framework or name in self.framework)

    @property
    def pythons(self) -> dict[str, str]:
        """Framework to interpreter, where not the running one."""
        given = {"torch": self.torch_python, "jax": self.jax_python}
        return {framework: python for framework, python in given.items() if python is not None}


@dataclass
class SweepNotes:
    """Sentences for the user, beside the records."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Add a line once."""
        if line not in self.lines:
            self.lines.append(line)


def choose_device(asked: str, hello: Mapping[str, Mapping[str, Any]], notes: SweepNotes) -> str:
    """Turn `auto` into a device that every framework has, and refuse one that a framework lacks.

    Raises:
        SelectionError: if the device that was asked for is not there.
    """
    found = {framework: tuple(reply["devices"]) for framework, reply in hello.items()}
    if asked != "auto":
        lacking = [framework for framework, devices in found.items() if asked not in devices]
        if lacking:
            raise SelectionError(f"device: {' and '.join(lacking)} cannot use {asked!r} here; choose another --device.")
        return asked
    with_gpu = [framework for framework, devices in found.items() if "cuda" in devices]
    if len(with_gpu) == len(found):
        return "cuda"
    if with_gpu:
        notes.add(f"Only {with_gpu[0]} sees a GPU: everything runs on the CPU, where the frameworks can be compared.")
    return "cpu"


def check_modes(request: Request, device: str, frameworks: Sequence[str], notes: SweepNotes) -> None:
    """Note which of the modes that were asked for a division lacks, and refuse a division that lacks them all.

    Raises:
        SelectionError: if a division has none of the modes.
    """
    for division in request.plan.divisions if request.mode else ():
        offered = offered_modes(division, device, frameworks)
        lacking = [mode for mode in request.mode if mode not in offered]
        if len(lacking) == len(request.mode):
            raise SelectionError(
                f"mode: expected one of {', '.join(offered)} in the {division} division on {device} with "
                f"{' and '.join(frameworks)}, got {', '.join(lacking)}; choose one of these, or another --division, "
                "--device or --framework."
            )
        for mode in lacking:
            notes.add(f"The {division} division has no {mode} on {device} with {' and '.join(frameworks)}: left out.")


def chosen_competitors(catalogues: Sequence[Catalogue], request: Request, cell: Cell) -> tuple[Competitor, ...]:
    """List who takes part in a cell.

    Raises:
        LeftOutError: if all that were asked for by name compute other sizes or layouts.
        SelectionError: if none is left, or a name that was asked for is unknown.
    """
    plan = request.plan
    compiled = plan.compiled.get(cell.workload.name, ())
    # A tuned cell without compiled competitors would be a matched one.
    if not compiled and cell.division == "tuned":
        compiled = ("matmul",)
    if compiled and cell.workload.unequal:
        compiled = ("bucketed_matmul",)
    # A mode that is named is wanted in this direction too.
    gradients = bool(request.mode) or cell.direction in plan.compiled_directions
    further = partial(further_modes, cell.division, cell.device, direction=cell.direction, named=request.mode)
    competitors = competitors_for(
        catalogues,
        compiled=compiled,
        modes=further(compile_gradients=gradients),
        launched=LAUNCHED if cell.device == "cuda" else (),
        launches=further(compile_gradients=False),
        device=cell.device,
        only=request.implementation,
        without=plan.left_out,
        only_modes=request.mode,
        workload=cell.workload,
    )
    known = sorted({name for catalogue in catalogues for name in catalogue.kinds()})
    unknown = [name for name in request.implementation if name not in known]
    if unknown:
        raise SelectionError(f"implementation: nothing is called {', '.join(unknown)}; choose from {', '.join(known)}.")
    able = {name for catalogue in catalogues for name in catalogue.kinds(cell.workload)}
    if request.implementation and not able & set(request.implementation):
        raise LeftOutError(
            f"implementation: expected one for {cell.workload.name}, {', '.join(sorted(able))}, got "
            f"{', '.join(request.implementation)}: left out."
        )
    if not competitors:
        who = " or ".join(request.implementation) or "a competitor"
        how = f" in the mode {' or '.join(request.mode)}" if request.mode else ""
        # Another direction may have the mode, as training steps alone have `jit-donate`.
        elsewhere = set(request.mode) & set(offered_modes(cell.division, cell.device, request.frameworks))
        raise (LeftOutError if elsewhere else SelectionError)(
            f"implementation: no framework that takes part has {who}{how} in {cell.title}; choose another "
            "--implementation, --mode, --direction or --framework."
        )
    return competitors
