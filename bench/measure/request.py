"""What a run is asked to do, and what of it can be done with the workers that are there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.plan.cells import Cell
from bench.plan.competitors import (
    FRAMEWORKS,
    Catalogue,
    Competitor,
    competitors_for,
    further_modes,
    offered_modes,
)
from bench.plan.presets import Preset


class SelectionError(ValueError):
    """A request that selects nothing, or something that is not there; the message is one sentence for the user."""


@dataclass(frozen=True)
class Request:
    """What a run is asked to do.

    Attributes:
        preset: cells and effort, already narrowed.
        device: `auto`, `cpu` or `cuda`.
        frameworks: which frameworks take part, if installed.
        implementations: names to keep; empty keeps all.
        modes: modes to keep, in which every competitor then runs; empty keeps those of the division and the preset.
        pythons: framework to interpreter, where not the running one.
        seed: of the inputs and the order.
        when_busy: what a cell does on a busy machine: `warn`, `wait` or `refuse`.
    """

    preset: Preset
    device: str = "auto"
    frameworks: tuple[str, ...] = FRAMEWORKS
    implementations: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    pythons: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    when_busy: str = "warn"


@dataclass
class SweepNotes:
    """What the user should know beside the records."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Adds a line once."""
        if line not in self.lines:
            self.lines.append(line)


def choose_device(asked: str, hello: Mapping[str, Mapping[str, Any]], notes: SweepNotes) -> str:
    """Turns `auto` into a device that every framework has, and refuses one that a framework lacks.

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


def check_modes(request: Request, device: str, frameworks: Sequence[str], notes: SweepNotes) -> None:
    """Notes which of the modes that were asked for a division lacks, and refuses a division that lacks them all.

    Raises:
        SelectionError: if a division has none of the modes.
    """
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


def chosen_competitors(catalogues: Sequence[Catalogue], request: Request, cell: Cell) -> tuple[Competitor, ...]:
    """Lists who takes part in a cell.

    Args:
        catalogues: what the workers can run.
        request: the selection.
        cell: where they meet.

    Returns:
        The competitors, in their order.

    Raises:
        SelectionError: if none is left, or a name that was asked for is unknown.
    """
    preset = request.preset
    compiled = preset.compiled.get(cell.workload.name, ())
    # A tuned cell without compiled competitors would be a matched one.
    if not compiled and cell.division == "tuned":
        compiled = ("matmul",)
    # Whoever names a mode wants it in this direction too.
    gradients = bool(request.modes) or cell.direction in preset.compiled_directions
    competitors = competitors_for(
        catalogues,
        compiled=compiled,
        modes=further_modes(cell.division, cell.device, compile_gradients=gradients),
        only=request.implementations,
        without=preset.left_out,
        only_modes=request.modes,
    )
    known = sorted({name for catalogue in catalogues for name in catalogue.kinds()})
    unknown = [name for name in request.implementations if name not in known]
    if unknown:
        raise SelectionError(f"implementation: nothing is called {', '.join(unknown)}; choose from {', '.join(known)}.")
    if not competitors:
        who = " or ".join(request.implementations) or "no competitor"
        how = f" in the mode {' or '.join(request.modes)}" if request.modes else ""
        raise SelectionError(
            f"implementation: no framework that takes part has {who}{how} in {cell.title}; choose another "
            "--implementation, --mode or --framework."
        )
    return competitors
