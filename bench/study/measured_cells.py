"""The cells of one run, with the spread of every competitor, for a comparison with another run."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bench.archive import Archive
from bench.environments import StoreError
from bench.study.identity import Identity, identity
from bench.study.pairing import Spread, by_label, log_latencies, paired, spreads_of
from bench.study.process_spread import ProcessSpread
from bench.study.ranking import Ranking, rank_cells
from parity_tests.report.interruption import Interruption


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


def measured_cells(
    archive: Archive,
    name: str,
    seen: Mapping[str, ProcessSpread] | None = None,
    interruption: Interruption | None = None,
) -> dict[Identity, Measured]:
    """Return the cells of a run by their conditions.

    Args:
        archive: the run.
        name: its directory, for the message.
        seen: environment to what is known of how its processes differ.
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
        ranking = rank_cells([group], seen)[0]
        groups = by_label(group)
        rounds = {label: log_latencies(records) for label, records in groups.items()}
        timed = {
            label: rounds[label]
            for label, records in groups.items()
            if all(record.status == "ok" for record in records)
        }
        spreads = {
            label: spreads_of(
                np.concatenate(list(found.values()))[None], tuple(map(len, found.values())), tuple(found)
            )[0]
            for label, found in timed.items()
        }
        # As the ranking does it: a baseline that failed in one process has rounds of the others.
        pairs = paired(rounds[ranking.baseline], timed) if ranking.baseline is not None else []
        to_baseline = {
            label: spread
            for block in pairs
            for label, spread in zip(
                block.labels, spreads_of(block.log_ratios, block.lengths, block.processes), strict=True
            )
        }
        cells[where] = Measured(ranking, spreads, to_baseline)
    return cells
