"""Pair cells by their conditions, and the competitors of a cell by process and round."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bench.records import Record
from bench.study.statistics import (
    Interval,
    middle_rounds,
    process_means,
    pseudo_values,
    ratio_intervals,
    round_log_latency,
)


class Identity(NamedTuple):
    """The conditions of a cell, by which cells of two runs are paired."""

    workload: str
    num_partitions: int
    in_features: int
    out_features: int
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
    def what(self) -> str:
        """Return workload, sizes and direction."""
        sizes = f"B={self.batch}, n={self.num_partitions}, {self.in_features}->{self.out_features}"
        return f"{self.workload} ({sizes}), {self.step}"

    @property
    def step(self) -> str:
        """Return the direction, and the optimiser where there is one."""
        return self.direction if self.optimizer is None else f"{self.direction} ({self.optimizer})"

    @property
    def how(self) -> str:
        """Return precision and division, and the cache where it is cold."""
        return f"{self.precision}, {self.division}" + ("" if self.cache == "warm" else f", {self.cache}")

    @property
    def title(self) -> str:
        """Return one line for a heading."""
        return f"{self.what}, {self.how}, {self.device}"


def identity(record: Record) -> Identity:
    """Return the conditions that a record was measured under."""
    return Identity(*(getattr(record, name) for name in Identity._fields))


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
