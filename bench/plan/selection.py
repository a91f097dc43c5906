"""From a preset to the cells that a run measures: the options of a command narrow it, and a device makes it cells."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from bench.plan.cells import Cell
from bench.plan.presets import ANY_ROUNDS, Preset
from bench.plan.workloads import workload


def narrowed(
    preset: Preset,
    *,
    workloads: Sequence[str] = (),
    directions: Sequence[str] = (),
    precisions: Sequence[str] = (),
    divisions: Sequence[str] = (),
    caches: Sequence[str] = (),
    optimizer: str | None = None,
    rounds: int | None = None,
    cell_s: float | None = None,
    most_cell_s: float | None = None,
    probe_s: float | None = None,
    prepare_s: float | None = None,
    replicates: int | None = None,
) -> Preset:
    """Returns the preset with the given selections in place of its own; an empty one keeps the preset's.

    With `cell_s` alone, this time is what ends a cell that is not resolved, and neither `most_cell_s` nor a number
    of rounds does. With `most_cell_s` a number of rounds does not either. A workload that the preset does not contain
    may be named too: `workload` decides what exists.
    """
    return replace(
        preset,
        workloads=tuple(workloads) or preset.workloads,
        directions=tuple(directions) or preset.directions,
        precisions=tuple(precisions) or preset.precisions,
        divisions=tuple(divisions) or preset.divisions,
        caches=tuple(caches) or preset.caches,
        optimizer=optimizer or preset.optimizer,
        rounds=rounds or (preset.rounds if cell_s is None and most_cell_s is None else ANY_ROUNDS),
        cell_s=preset.cell_s if cell_s is None else cell_s,
        most_cell_s=most_cell_s if most_cell_s is not None else preset.most_cell_s if cell_s is None else 0.0,
        probe_s=preset.probe_s if probe_s is None else probe_s,
        limits=preset.limits if prepare_s is None else replace(preset.limits, prepare_s=prepare_s),
        replicates=preset.replicates if replicates is None else replicates,
    )


def _left_out(division: str, precision: str, direction: str) -> str:
    """Why a combination of conditions is no cell, or an empty text."""
    if division == "stock" and precision == "tf32":
        return "The stock division has no tf32, since it runs what one gets by asking for nothing: left out."
    if direction == "train_step" and precision == "fp16":
        return "There is no train_step in fp16, where the optimizer's usual epsilon is zero: left out."
    return ""


def left_out(preset: Preset) -> tuple[str, ...]:
    """Says in a sentence each which combinations of a preset's conditions are no cells."""
    conditions = itertools.product(preset.divisions, preset.precisions, preset.directions)
    return tuple(dict.fromkeys(found for one in conditions if (found := _left_out(*one))))


def plan_cells(preset: Preset, device: str) -> tuple[Cell, ...]:
    """Lists the cells: division by division, since a division needs its own processes; directions innermost.

    Args:
        preset: the selection.
        device: `cpu` or `cuda`.

    Returns:
        The cells in the order in which they are measured, without repeats.

    Raises:
        UnknownWorkloadError: for a name that no workload has.
    """
    workloads = [workload(name) for name in preset.workloads]
    cells = [
        Cell(
            found,
            direction,
            precision,
            division,
            device,
            cache,
            preset.optimizer if direction == "train_step" else None,
        )
        for division in preset.divisions
        for found in workloads
        for precision in preset.precisions
        for cache in preset.caches
        for direction in preset.directions
        if not _left_out(division, precision, direction)
    ]
    return tuple(dict.fromkeys(cells))
