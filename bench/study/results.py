"""Rank the cells of runs, in several processes where there are many, for everything that a report shows."""

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.records import Record
from bench.store import Archive, CellPlaces, Damage, keep_every_cell, read_cells
from bench.study.process_spread import ProcessSpread, seen_spreads
from bench.study.ranking import Ranking, rank_cells, tally
from parity_tests.report.console import Interruption

# Below this, starting processes takes longer than they save.
_MANY_CELLS = 1000
# Enough work for the way between processes not to matter, and little enough for all of them to end together.
_CELLS_A_TASK = 100
# Each holds some sixty megabytes of libraries.
_MOST_PROCESSES = 4
# For a task; a hundred cells take a second.
_TASK_S = 600.0


@dataclass(frozen=True)
class Results:
    """Everything that a report shows."""

    found: tuple[Ranking, ...]  # one ranking for each cell, in the order of the records
    outcomes: Mapping[str, int]  # number of records by outcome, the control runs left out
    environments: Mapping[str, Mapping[str, Any]]  # id to fingerprint
    stopped: str = ""  # why they are not of all cells, one sentence; empty if they are

    def places(self) -> dict[str, list[Ranking]]:
        """Return the rankings of each environment, in the order of the records."""
        apart: dict[str, list[Ranking]] = {}
        for ranking in self.found:
            apart.setdefault(ranking.first.environment_id, []).append(ranking)
        return apart


def read_results(
    directories: Sequence[Path],
    keep: Callable[[Record], bool] = keep_every_cell,
    interruption: Interruption | None = None,
    damage: Damage | None = None,
) -> Results:
    """Read the results of runs, cell by cell.

    Args:
        directories: of runs.
        keep: tells from any of its records if a cell is wanted; picklable, since many cells are ranked in other
            processes.
        interruption: by which the user may end it; cells that were ranked until then are kept.
        damage: is told of what cannot be read, which is then left out; without it, the first such thing is an error.

    Raises:
        StoreError: if a directory holds no record, or no line or environment can be read.
    """
    archive = Archive(directories, keep, damage)
    outcomes: Counter[str] = Counter()
    found: list[Ranking] = []

    def stop() -> bool:
        return interruption is not None and interruption.asked

    for ranked, counted in _in_parts(archive.places(), partial(_ranked, keep, seen_spreads(archive)), stop):
        found += ranked
        outcomes.update(counted)
    stopped = f"interrupted: {len(found)} cells were read, the others were left" if stop() else ""
    return Results(tuple(found), dict(outcomes), archive.environments, stopped)


_Ranked = tuple[list[Ranking], Counter[str]]


def _ranked(
    keep: Callable[[Record], bool],
    seen: Mapping[str, ProcessSpread],
    cells: Sequence[CellPlaces],
    stop: Callable[[], bool] = lambda: False,
) -> _Ranked:
    outcomes: Counter[str] = Counter()

    def counted() -> Iterator[list[Record]]:
        for group in read_cells(cells):
            if stop():
                return
            if keep(group[0]):
                outcomes.update(tally(group))
                yield group

    return rank_cells(counted(), seen), outcomes


def _in_parts(cells: Sequence[CellPlaces], rank: Callable[..., _Ranked], stop: Callable[[], bool]) -> Iterator[_Ranked]:
    """Rank cells, some at a time, in their order; `stop` is asked again and again, and True leaves the others out."""
    processes = min(os.cpu_count() or 1, _MOST_PROCESSES)
    if len(cells) < _MANY_CELLS or processes < 2:
        yield rank(cells, stop)
        return
    tasks = [cells[start : start + _CELLS_A_TASK] for start in range(0, len(cells), _CELLS_A_TASK)]
    done, before = 0, set(multiprocessing.active_children())
    # Not forked: this process may have threads, of a progress bar or of a linear algebra library.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_ignore_interruptions)
    try:
        try:
            for ranked in [pool.submit(rank, task) for task in tasks]:
                yield ranked.result(timeout=_TASK_S)
                done += 1
                if stop():
                    return
        finally:
            # Whatever is not done yet is not wanted any more, or hangs.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
    except (BrokenProcessPool, TimeoutError):
        # Ended by the system for want of memory, too slow, or not startable from the calling script: the same work,
        # done here.
        for task in tasks[done:]:
            yield rank(task, stop)


def _ignore_interruptions() -> None:
    """Leave Ctrl-C, which every process of a terminal gets, to the one that hands out the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
