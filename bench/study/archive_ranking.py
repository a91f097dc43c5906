"""Ranking the cells of a large sweep on several processors: no cell needs another one."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from bench.archive import Archive, CellPlaces, Damage, read_cells
from bench.environments import StoreError
from bench.records import Record
from bench.study.ranking import Ranking, rank_cells, tally

# Below this, starting processes takes longer than they save.
_MANY_CELLS = 1000
# Enough work for the way between processes not to matter, and little enough for all of them to end together.
_CELLS_A_TASK = 100
# Each holds some sixty megabytes of libraries.
_MOST_PROCESSES = 4

Ranked = tuple[list[Ranking], Counter[str]]


def _ranked(
    keep: Callable[[Record], bool], damage: Damage | None, cells: Sequence[CellPlaces]
) -> tuple[Ranked, Damage | None]:
    """Rank some cells; the damage comes back, since what another process adds to it is not seen here."""
    outcomes: Counter[str] = Counter()

    def counted() -> Iterator[list[Record]]:
        for group in read_cells(cells, damage):
            if keep(group[0]):
                outcomes.update(tally(group))
                yield group

    return (rank_cells(counted()), outcomes), damage


def ranked_archive(archive: Archive) -> Iterator[Ranked]:
    """Ranks the wanted cells of an archive, in the order in which they were recorded.

    Args:
        archive: of few cells, which are ranked in this process, or of many, whose ``keep`` must then be picklable.

    Returns:
        Some rankings at a time, with the number of their records by outcome.

    Raises:
        StoreError: if a line is damaged, and the archive is not told to leave damage out.
    """
    cells, damage = archive.places(), archive.damage
    for ranked, found in _in_parts(cells, partial(_ranked, archive.keep, None if damage is None else Damage())):
        if damage is not None and found is not None:
            for sentence in found.sentences:
                damage.add(StoreError(sentence))
        yield ranked


_Rank = Callable[[Sequence[CellPlaces]], tuple[Ranked, Damage | None]]


def _in_parts(cells: Sequence[CellPlaces], rank: _Rank) -> Iterator[tuple[Ranked, Damage | None]]:
    processes = min(os.cpu_count() or 1, _MOST_PROCESSES)
    if len(cells) < _MANY_CELLS or processes < 2:
        yield rank(cells)
        return
    tasks = [cells[start : start + _CELLS_A_TASK] for start in range(0, len(cells), _CELLS_A_TASK)]
    # Not forked: this process may have threads, of a progress bar or of a linear algebra library.
    done = 0
    try:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            for ranked in pool.map(rank, tasks):
                yield ranked
                done += 1
    except BrokenProcessPool:
        # Ended by the system for want of memory, or not startable from the calling script: the same work, done here.
        for task in tasks[done:]:
            yield rank(task)
