"""The cells of one run, with the spread of every competitor, for a comparison with another run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from bench.archive import Archive
from bench.environments import StoreError
from bench.study.identity import Identity, identity
from bench.study.pairing import by_label, log_latencies, paired
from bench.study.ranking import Ranking, rank_cells
from bench.study.statistics import process_means
from bench.study.trimming import middle_rounds, pseudo_values
from parity_tests.harness.interruption import Interruption


@dataclass(frozen=True)
class Spread:
    """A competitor in one run.

    Attributes:
        mean: trimmed mean of its log seconds or log ratios.
        error: its standard error.
        units: number of processes, or of rounds where there is one process.
        degrees: degrees of freedom of the error.
        processes: mean of each process by its number; empty where there is one process.
    """

    mean: float
    error: float
    units: int
    degrees: int
    processes: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """A cell of one run: its ranking, and the spread of everybody who was timed.

    Attributes:
        ranking: of its competitors.
        spreads: of their log latencies.
        to_baseline: of their log ratios to the baseline, paired by round.
    """

    ranking: Ranking
    spreads: Mapping[str, Spread]
    to_baseline: Mapping[str, Spread]


def measured_cells(archive: Archive, name: str, interruption: Interruption | None = None) -> dict[Identity, Measured]:
    """The cells of a run by their conditions.

    Args:
        archive: the run.
        name: its directory, for the message.
        interruption: by which the user may end it; what was read until then is kept.

    Raises:
        StoreError: if it holds one of them twice, from two environments.
    """
    cells: dict[Identity, Measured] = {}
    for group in archive.cells() if interruption is None else interruption.until_asked(archive.cells()):
        where = identity(group[0])
        if where in cells:
            raise StoreError(
                f"{name}: {where.title} was measured twice, in the environments "
                f"{cells[where].ranking.first.environment_id} and {group[0].environment_id}; choose one with --where-a "
                "or --where-b environment_id=..., or give runs of one each."
            )
        ranking = rank_cells([group])[0]
        groups = by_label(group)
        rounds = {label: log_latencies(records) for label, records in groups.items()}
        timed = {
            label: rounds[label]
            for label, records in groups.items()
            if all(record.status == "ok" for record in records)
        }
        spreads = {
            label: _spreads(np.concatenate(list(found.values()))[None], tuple(map(len, found.values())), tuple(found))[
                0
            ]
            for label, found in timed.items()
        }
        # As the ranking does it: a baseline that failed in one process has rounds of the others.
        pairs = paired(rounds[ranking.baseline], timed) if ranking.baseline is not None else []
        to_baseline = {
            label: spread
            for block in pairs
            for label, spread in zip(
                block.labels, _spreads(block.log_ratios, block.lengths, block.processes), strict=True
            )
        }
        cells[where] = Measured(ranking, spreads, to_baseline)
    return cells


def _spreads(rows: np.ndarray, lengths: tuple[int, ...], processes: tuple[int, ...]) -> list[Spread]:
    """The spread of each row: over processes where there are several, else over rounds.

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
