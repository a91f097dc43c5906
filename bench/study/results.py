"""What reports are made of: rankings, outcomes and environments of one run or several."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.archive import Archive, Damage, keep_every_cell
from bench.records import Record
from bench.study.archive_ranking import ranked_archive
from bench.study.ranking import Ranking, rankings, tally


@dataclass(frozen=True)
class Results:
    """Everything that a report shows.

    Attributes:
        found: one ranking for each cell, in the order of the records.
        outcomes: number of records by outcome, the control runs left out.
        environments: id to fingerprint.
    """

    found: tuple[Ranking, ...]
    outcomes: Mapping[str, int]
    environments: Mapping[str, Mapping[str, Any]]

    def places(self) -> dict[str, list[Ranking]]:
        """The rankings of each environment, in the order of the records."""
        apart: dict[str, list[Ranking]] = {}
        for ranking in self.found:
            apart.setdefault(ranking.first.environment_id, []).append(ranking)
        return apart


def results_of(records: Sequence[Record], environments: Mapping[str, Mapping[str, Any]]) -> Results:
    """The results of records that are in memory already."""
    return Results(tuple(rankings(records)), tally(records), environments)


def read_results(
    directories: Sequence[Path],
    keep: Callable[[Record], bool] = keep_every_cell,
    damage: Damage | None = None,
) -> Results:
    """Read the results of runs, cell by cell.

    Args:
        directories: of runs.
        keep: whether a cell is wanted, by any of its records.
        damage: is told of what cannot be read, which is then left out; without it, the first such thing is an error.

    Raises:
        StoreError: if a directory holds no record, or no line or environment can be read.
    """
    archive = Archive(directories, keep, damage)
    outcomes: Counter[str] = Counter()
    found: list[Ranking] = []
    for ranked, counted in ranked_archive(archive):
        found += ranked
        outcomes.update(counted)
    return Results(tuple(found), dict(outcomes), archive.environments)
