"""Presets: which cells a run measures and how long each may take, and the cells that a device makes of them."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from bench.plan.cells import DIVISIONS, PRECISIONS, Cell
from bench.plan.costs import Limits
from bench.plan.workloads import WORKLOADS, preset_sweep, workload
from parity_tests.training.tasks import OPTIMIZERS

# Shortest block in seconds. A GPU works through a queue, and the block must be long beside filling it and waiting for
# its end. A CPU has no queue; there the host is what disturbs: its speed drifts within some ten milliseconds (on a
# shared two-core machine by 20%), so competitors are compared the better the closer their blocks lie together. Blocks
# of 3 ms knew the ratio of two equals three times as well as blocks of 20 ms over the same time.
BLOCK_S: Mapping[str, float] = MappingProxyType({"cpu": 0.003, "cuda": 0.02})
# A block that lasts less than this part of its time was sized by a disturbance: it is sized for 15% more than its
# length, and speeds drift by 20%.
SHORT_BLOCK = 0.5
# A step adds the optimiser's own time, the same for all, to that of forward and backward: asked for by name.
USUAL_DIRECTIONS: tuple[str, ...] = ("forward", "forward_backward")
# Clipping joins all partitions in one norm, and a schedule changes nothing about the time of a step.
STEPPED_OPTIMIZERS: tuple[str, ...] = tuple(name for name, spec in OPTIMIZERS.items() if spec.clip_norm is None)


@dataclass(frozen=True)
class Preset:
    """A selection of cells and the effort spent on each."""

    name: str  # what the command line calls it
    summary: str  # one sentence
    workloads: tuple[str, ...]  # names of the catalogue or of sweep points
    rounds: int  # most rounds of each cell; a round is one block of every competitor, then all again in reverse order
    limits: Limits  # caps
    directions: tuple[str, ...] = USUAL_DIRECTIONS
    precisions: tuple[str, ...] = ("ieee_fp32",)  # precision classes
    divisions: tuple[str, ...] = ("matched",)
    # Workload name to the implementations that run under `torch.compile` as well
    compiled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Directions in which they do; compiling the gradients takes most of the time
    compiled_directions: tuple[str, ...] = USUAL_DIRECTIONS
    replicates: int = 1  # how often everything is measured in fresh processes
    warm_up_blocks: int = 6  # most blocks spent on waiting for a steady state
    # Time for the rounds of one cell, in seconds; the round that exceeds it is the last, but not before `least_rounds`
    cell_s: float = math.inf
    most_cell_s: float = 0.0  # where this is more, a cell whose A/A control is not yet known to 3% goes on for so long
    least_rounds: int = 5  # fewest rounds of each cell
    # Seconds for each of the further clocks of a competitor in the first process; 0 leaves them out, and energy,
    # ceilings and compiling again too
    probe_s: float = 0.05
    caches: tuple[str, ...] = ("warm",)  # `warm`, `cold`
    optimizer: str = "adamw"  # of the direction `train_step`, by its name in the neutral specification
    left_out: tuple[str, ...] = ()  # competitors that take part only where they are asked for by name


_SEED = (
    "article-base",
    "article-batch-1",
    "article-batch-2048",
    "article-n8",
    "article-in8096",
    "article-in256",
    "article-out8096",
    "article-out256",
    "electricity-336-96",
    "recurrentgemma-2b-gates-1024",
)
# Drawing an array takes twice its size, and each worker holds its own: larger ones are for machines with much memory.
_MOST_ELEMENTS = 2**28
_MODERATE = tuple(name for name, found in WORKLOADS.items() if found.elements <= _MOST_ELEMENTS)
_PATIENT = Limits(
    executed_flops=2e11, unrolled_products=40, memory_fraction=0.5, call_s=0.5, slowdown=4, prepare_s=90, request_s=300
)
_SHORT = Limits(
    executed_flops=2e9, unrolled_products=16, memory_fraction=0.25, call_s=0.05, slowdown=6, prepare_s=40, request_s=60
)

# More than any time allows.
ANY_ROUNDS = 10**6

# Modules around the same products. Keras takes longer to import than a small cell takes to measure.
_KERAS = ("stock:keras.EinsumDense",)
_MODULES = (
    *_KERAS,
    "stock:einops.EinMix",
    "stock:equinox.filter_vmap",
    "stock:torch.func",
    "stock:nnx.LinearGeneral",
    "stock:linen.DenseGeneral",
)

_ALL = (
    Preset(
        "smoke",
        "three small workloads and few rounds: does everything run, and roughly how fast (under a minute on two cores)",
        ("article-base", "article-batch-1", "recurrentgemma-2b-gates-256"),
        rounds=10,
        cell_s=2.0,
        least_rounds=3,
        limits=_SHORT,
        compiled={"article-base": ("matmul",)},
        compiled_directions=("forward",),
        warm_up_blocks=1,
        probe_s=0,
        left_out=_MODULES,
    ),
    Preset(
        "seed",
        "the source article's settings and two real models, in five sets of processes (forty minutes on two cores)",
        _SEED,
        rounds=ANY_ROUNDS,
        cell_s=6.0,
        most_cell_s=45.0,
        least_rounds=4,
        # One process, however many rounds it has, does not give the verdicts that the next one gives.
        replicates=5,
        warm_up_blocks=2,
        probe_s=0.01,
        left_out=_MODULES,
        # All that the article's claims need: its dense layer in its largest setting, forward and backward.
        limits=replace(_PATIENT, executed_flops=1.32e10),
        compiled={"article-base": ("matmul", "einsum"), "recurrentgemma-2b-gates-1024": ("matmul",)},
    ),
    Preset(
        "workloads",
        "every workload of the catalogue whose arrays take at most 1 GiB in fp32",
        _MODERATE,
        rounds=ANY_ROUNDS,
        cell_s=30.0,
        least_rounds=10,
        limits=replace(_PATIENT, executed_flops=1e12, call_s=2.0, prepare_s=300, request_s=300),
        compiled=dict.fromkeys(_MODERATE, ("matmul",)),
    ),
    Preset(
        "sweep",
        "around the article's base: batch, partitions and sizes on a log grid, few rounds of each",
        preset_sweep(),
        rounds=ANY_ROUNDS,
        cell_s=5.0,
        warm_up_blocks=2,
        limits=replace(_PATIENT, executed_flops=2e10, call_s=0.2),
    ),
    Preset(
        "full",
        "every workload of the catalogue, precision and division, in three process replicates",
        tuple(WORKLOADS),
        rounds=ANY_ROUNDS,
        cell_s=30.0,
        least_rounds=10,
        limits=replace(_PATIENT, executed_flops=1e13, call_s=5.0, unrolled_products=1000, prepare_s=600, request_s=600),
        precisions=PRECISIONS,
        divisions=DIVISIONS,
        compiled=dict.fromkeys(WORKLOADS, ("matmul", "einsum")),
        replicates=3,
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})


def _left_out(division: str, precision: str, direction: str) -> str:
    """Return why a combination of conditions is no cell, or an empty text."""
    if division == "stock" and precision == "tf32":
        return "The stock division has no tf32, since it runs what one gets by asking for nothing: left out."
    if direction == "train_step" and precision == "fp16":
        return "There is no train_step in fp16, where the optimizer's usual epsilon is zero: left out."
    return ""


def left_out(preset: Preset) -> tuple[str, ...]:
    """Return the combinations of a preset's conditions that are no cells, in one sentence each."""
    conditions = itertools.product(preset.divisions, preset.precisions, preset.directions)
    return tuple(dict.fromkeys(found for one in conditions if (found := _left_out(*one))))


def plan_cells(preset: Preset, device: str) -> tuple[Cell, ...]:
    """List the cells: division by division, since a division needs its own processes; directions innermost.

    Raises:
        UnknownWorkloadError: for a name that no workload has.
    """
    workloads, optimizers = [workload(name) for name in preset.workloads], {"train_step": preset.optimizer}
    cells = [
        Cell(found, direction, precision, division, device, cache, optimizers.get(direction))
        for division in preset.divisions
        for found in workloads
        for precision in preset.precisions
        for cache in preset.caches
        for direction in preset.directions
        if not _left_out(division, precision, direction)
    ]
    return tuple(dict.fromkeys(cells))
