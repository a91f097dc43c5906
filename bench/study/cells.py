"""Read the records of a cell: its conditions, its competitors paired by process and round, and its disturbance.

A window is some half a second of rounds. It was disturbed if other processes took more of the processors than daemons
do, if the hypervisor took some of them away, or if a fixed loop took far longer than it can. A ratio uses the middle
three fifths of the rounds, so one window in five may be disturbed; beyond that the cell has no verdict.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bench.plan.presets import BLOCK_S, SHORT_BLOCK
from bench.plan.workloads import SHARED, Size, size_text
from bench.records import Record
from bench.study.statistics import (
    Interval,
    middle_rounds,
    process_means,
    pseudo_values,
    ratio_intervals,
    round_log_latency,
)
from parity_tests.judge.dtypes import short_name


class Identity(NamedTuple):
    """The conditions of a cell, by which cells of two runs are paired."""

    workload: str
    num_partitions: int
    in_features: Size
    out_features: Size
    batch: int
    dtype: str
    device: str
    direction: str
    division: str
    precision: str
    layout: str
    cache: str
    optimizer: str | None

    @property
    def sizes(self) -> str:
        """Return the sizes as text, for example `B=128, n=32, 32->32`."""
        each = f"{size_text(self.in_features)}->{size_text(self.out_features)}"
        return f"B={self.batch}, n={self.num_partitions}, {each}"

    @property
    def what(self) -> str:
        """Return workload, sizes and direction."""
        return f"{self.workload} ({self.sizes}), {self.step}"

    @property
    def step(self) -> str:
        """Return the direction, and the optimiser where there is one."""
        return self.direction if self.optimizer is None else f"{self.direction} ({self.optimizer})"

    @property
    def how(self) -> str:
        """Return precision and division, and the cache where it is cold."""
        return f"{short_name(self.precision)}, {self.division}" + ("" if self.cache == "warm" else f", {self.cache}")

    @property
    def title(self) -> str:
        """Return one line for a heading."""
        return f"{self.what}, {self.how}, {self.device}"


def identity(record: Record) -> Identity:
    """Return the conditions that a record was measured under."""
    return Identity(*(getattr(record, name) for name in Identity._fields))


def four_sizes(record: Record) -> bool:
    """Return True for the map of four sizes; one shared input, or sizes that differ, make it another function."""
    return record.layout != SHARED and isinstance(record.in_features, int) and isinstance(record.out_features, int)


# Process replicate to mean log seconds of a call, in each round.
Rounds = Mapping[int, np.ndarray]


def log_latencies(records: Iterable[Record]) -> dict[int, np.ndarray]:
    """Return the rounds of one competitor, for those of its records that are ok."""
    return {
        record.process_replicate: round_log_latency(record.block_latency_s, record.calls_per_block or 1)
        for record in records
        if record.status == "ok"
    }


@dataclass(frozen=True)
class Block:
    """Competitors that share as many rounds with the reference in each process."""

    labels: tuple[str, ...]  # of the competitors, one for each row
    log_ratios: np.ndarray  # `log(reference) - log(competitor)` for each round, the processes behind one another
    lengths: tuple[int, ...]  # number of rounds of each process
    processes: tuple[int, ...]  # their numbers

    def spreads(self) -> dict[str, "Spread"]:
        """Return the spread of each competitor's log ratios."""
        return dict(zip(self.labels, spreads_of(self.log_ratios, self.lengths, self.processes), strict=True))


@dataclass(frozen=True)
class Spread:
    """A competitor's mean and its standard error."""

    mean: float  # trimmed mean of its log seconds or log ratios
    error: float  # its standard error
    units: int  # number of processes, or of rounds where there is one process
    degrees: int  # degrees of freedom of the error
    # Mean of each process by its number; empty where there is one process.
    processes: Mapping[int, float] = field(default_factory=dict)


def spreads_of(rows: np.ndarray, lengths: tuple[int, ...], processes: tuple[int, ...]) -> list[Spread]:
    """Return the spread of each row: over processes where there are several, else over rounds.

    Args:
        rows: one value a round, the processes behind one another.
        lengths: number of rounds of each process.
        processes: their numbers.
    """
    units = pseudo_values(rows, lengths)
    degrees = middle_rounds(units.shape[1]) - 1
    several = len(lengths) > 1
    if several:
        units, degrees = process_means(units, lengths), len(lengths) - 1
    count = units.shape[1]
    errors = units.std(1, ddof=1) / math.sqrt(count) if count > 1 else np.full(len(units), math.inf)
    return [
        Spread(
            float(means.mean()),
            float(error),
            count,
            degrees,
            dict(zip(processes, means.tolist(), strict=True)) if several else {},
        )
        for means, error in zip(units, errors, strict=True)
    ]


def spread_of(rounds: Rounds) -> Spread:
    """Return the spread of one competitor's log seconds."""
    processes = tuple(sorted(rounds))
    row = np.concatenate([rounds[k] for k in processes])[None]
    return spreads_of(row, tuple(len(rounds[k]) for k in processes), processes)[0]


def paired(reference: Rounds, others: Mapping[str, Rounds]) -> list[Block]:
    """Pair competitors with a reference; those that share no round with it are left out.

    A process that ended early has fewer rounds: only rounds in which both took part are paired.
    """
    groups: dict[tuple[tuple[int, int], ...], list[str]] = defaultdict(list)
    for label, rounds in others.items():
        shared = [(k, min(len(reference[k]), len(rounds[k]))) for k in sorted(reference.keys() & rounds.keys())]
        if shared:
            groups[tuple(shared)].append(label)
    blocks = []
    for shared, labels in groups.items():
        base = np.concatenate([reference[k][:count] for k, count in shared])
        rows = np.stack([np.concatenate([others[label][k][:count] for k, count in shared]) for label in labels])
        blocks.append(
            Block(tuple(labels), base - rows, tuple(count for _, count in shared), tuple(k for k, _ in shared))
        )
    return blocks


def intervals(reference: Rounds, others: Mapping[str, Rounds], confidence: float) -> dict[str, Interval]:
    """Return the ratio of each competitor to the reference; above 1 is faster than the reference."""
    found: dict[str, Interval] = {}
    for block in paired(reference, others):
        estimated = ratio_intervals(block.log_ratios, block.lengths, confidence=confidence)
        found.update(zip(block.labels, estimated, strict=True))
    return found


def by_label(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each competitor, in the order of the processes; the control is left out."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.process_replicate):
        if not record.control:
            found[record.label].append(record)
    return dict(found)


DISTURBED = "DISTURBED"
WINDOW_S = 0.5
# In processors: what daemons take; a twentieth of a large machine, whose idle processors they run on.
_OTHERS, _OTHERS_OF_ALL = 0.15, 0.05
_STEAL_OF_ALL = 0.05
# Clocks that rise and fall stretch the loop by less.
_STRETCH = 2.0
# Of the rounds, the slowest fifth is no part of a ratio.
_TOLERATED = 0.2


def disturbed_window(window: Mapping[str, Any], cpus: int) -> bool:
    """Say whether others used the machine during a window.

    Args:
        window: `other_cpus` and `steal_cpus` in processors, `stretch` as a factor or None.
        cpus: the number of processors that the workers may use.
    """
    stretch = window.get("stretch")
    return (
        window["other_cpus"] > max(_OTHERS, _OTHERS_OF_ALL * cpus)
        or window["steal_cpus"] > _STEAL_OF_ALL * cpus
        or (stretch is not None and stretch > _STRETCH)
    )


def taken_by_others(found: Mapping[str, Any], cpus: int) -> str:
    """Describe the processor time that others took."""
    said = f"other processes take {found['other_cpus']:.2f} of {cpus} processors"
    return said + (f" and the hypervisor {found['steal_cpus']:.2f}" if found["steal_cpus"] >= 0.005 else "")


def is_disturbed(records: Iterable[Record]) -> bool:
    """Say whether a cell was disturbed, all its processes together; records that do not tell count as quiet."""
    by_process = {record.process_replicate: record.disturbance for record in records if record.disturbance}
    windows = sum(found["windows"] for found in by_process.values())
    return sum(found["disturbed_windows"] for found in by_process.values()) > _TOLERATED * windows


def disturbance_line(records: Iterable[Record]) -> str | None:
    """Return how disturbed a cell was, in one sentence; None where its records do not tell."""
    records = list(records)
    by_process = {record.process_replicate: record.disturbance for record in records if record.disturbance}
    if not by_process:
        return None
    found = list(by_process.values())
    worst = max(found, key=lambda one: one["disturbed_windows"] / max(1, one["windows"]))
    windows, hit = sum(one["windows"] for one in found), sum(one["disturbed_windows"] for one in found)
    waiting = ", ".join(f"{name} {share:.2f}" for name, share in worst["waiting"].items())
    load = "not known" if worst["load"] is None else f"{worst['load']:.2f}"
    put_off = "not known" if worst["put_off_per_s"] is None else f"{worst['put_off_per_s']:.0f}"
    said = (
        f"Machine: {taken_by_others(worst, worst['cpus'])} (at most {worst['other_cpus_most']:.2f}), load {load}; "
        f"seconds in which threads waited for a processor, in each second: {waiting or 'not known'}; "
        f"involuntary context switches in each second: {put_off}; "
        f"a fixed loop took {worst['stretch'] or 1:.2f} times its shortest; {hit} of {windows} windows disturbed"
    )
    return said + (": no verdict." if is_disturbed(records) else ".")


@dataclass(frozen=True, slots=True)
class ShortBlocks:
    """The blocks of one record, some of which lasted less than half of the intended time."""

    label: str  # of the competitor
    control: bool  # True for those of the A/A control
    process_replicate: int  # number of the set of processes
    short: int  # number that lasted less than half of the intended time, of all `blocks`
    blocks: int
    calls_per_block: int
    median_s: float  # lengths of blocks
    shortest_s: float
    intended_s: float  # the least length that a block was meant to have

    @property
    def sentence(self) -> str:
        """Return one line for a reader."""
        who = f"{self.label}, A/A control" if self.control else self.label
        return (
            f"{who}, process {self.process_replicate}: {self.short} of {self.blocks} blocks lasted less than half of "
            f"the {self.intended_s * 1e3:.3g} ms intended (median {self.median_s * 1e3:.3g} ms, shortest "
            f"{self.shortest_s * 1e3:.3g} ms, calls in each: {self.calls_per_block})"
        )


def short_blocks(records: Iterable[Record]) -> tuple[ShortBlocks, ...]:
    """Return an account for each record with blocks that lasted less than half of the intended time.

    The number of calls in a block is found by a few calls before the first round. Where these were slow, later blocks
    last less than was intended, and the clock and the wait at the end weigh more in them. The samples are as true as
    any others: this is worth a remark, and no fault of the record.
    """
    found = []
    for record in records:
        blocks = record.block_latency_s
        # Records of earlier runs do not say it; it has been the same since.
        intended = record.block_s if record.block_s is not None else BLOCK_S.get(record.device)
        # The shortest tells of all others, and most records end here.
        if not blocks or intended is None or min(blocks) >= SHORT_BLOCK * intended:
            continue
        found.append(
            ShortBlocks(
                label=record.label,
                control=record.control,
                process_replicate=record.process_replicate,
                short=sum(block < SHORT_BLOCK * intended for block in blocks),
                blocks=len(blocks),
                calls_per_block=record.calls_per_block or 1,
                median_s=float(median(blocks)),
                shortest_s=min(blocks),
                intended_s=intended,
            )
        )
    return tuple(found)
