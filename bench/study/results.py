"""What reports are made of: rankings, outcomes and environments of one run or several."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.archive import Archive, Damage, keep_every_cell
from bench.environments import device_name
from bench.records import Record
from bench.study.archive_ranking import ranked_archive
from bench.study.ranking import Ranking, rankings, tally
from parity_tests.report.interruption import Interruption


@dataclass(frozen=True)
class Results:
    """Everything that a report shows.

    Attributes:
        found: one ranking for each cell, in the order of the records.
        outcomes: number of records by outcome, the control runs left out.
        environments: id to fingerprint.
        stopped: why they are not of all cells, one sentence; empty if they are.
    """

    found: tuple[Ranking, ...]
    outcomes: Mapping[str, int]
    environments: Mapping[str, Mapping[str, Any]]
    stopped: str = ""

    def places(self) -> dict[str, list[Ranking]]:
        """The rankings of each environment, in the order of the records."""
        apart: dict[str, list[Ranking]] = {}
        for ranking in self.found:
            apart.setdefault(ranking.first.environment_id, []).append(ranking)
        return apart


def results_of(records: Sequence[Record], environments: Mapping[str, Mapping[str, Any]]) -> Results:
    """Return the results of records that are in memory already."""
    machines = {key: device_name(found) for key, found in environments.items()}
    return Results(tuple(rankings(records, machines)), tally(records), environments)


def read_results(
    directories: Sequence[Path],
    keep: Callable[[Record], bool] = keep_every_cell,
    interruption: Interruption | None = None,
    damage: Damage | None = None,
) -> Results:
    """Read the results of runs, cell by cell.

    Args:
        directories: of runs.
        keep: whether a cell is wanted, by any of its records.
        interruption: by which the user may end it; what was read until then is kept.
        damage: is told of what cannot be read, which is then left out; without it, the first such thing is an error.

    Raises:
        StoreError: if a directory holds no record, or no line or environment can be read.
    """
    archive = Archive(directories, keep, damage)
    outcomes: Counter[str] = Counter()
    found: list[Ranking] = []

    def stop() -> bool:
        return interruption is not None and interruption.asked

    for ranked, counted in ranked_archive(archive, stop):
        found += ranked
        outcomes.update(counted)
    stopped = f"interrupted: {len(found)} cells were read, the others were left" if stop() else ""
    return Results(tuple(found), dict(outcomes), archive.environments, stopped)
