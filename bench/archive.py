"""Reading ``records.jsonl`` back, whole or cell by cell, without changing it."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.environments import StoreError, check_environments, read_environments
from bench.record_lines import parse_line
from bench.records import Record, RecordError

RECORDS = "records.jsonl"


@dataclass(frozen=True, slots=True)
class Line:
    """A whole line of ``records.jsonl``.

    Attributes:
        path: the file.
        number: from 1.
        start: offset of its first byte.
        data: the line, its end included.
    """

    path: Path
    number: int
    start: int
    data: bytes

    def record(self) -> Record:
        """What the line holds.

        Raises:
            StoreError: if it is damaged.
        """
        try:
            return parse_line(self.data)
        except RecordError as error:
            raise StoreError(f"{self.path}, line {self.number}: {error}; repair or remove the file.") from error


def scan(path: Path) -> Iterator[Line]:
    """Reads a file line by line, so that no size of it fills the memory; a torn last line is left out.

    Raises:
        StoreError: if the file cannot be read.
    """
    start = 0
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                # Only the last line can be torn by a killed run; anything before it has an end.
                if not data.endswith(b"\n"):
                    return
                yield Line(path, number, start, data)
                start += len(data)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); check the file.") from error


class Place(NamedTuple):
    """What tells a record from others, and its cell from other cells."""

    key: str
    cell: str
    cell_size: int
    process_replicate: int
    environment_id: str


# How records are written. A quotation mark inside a text would be escaped, so that only a field's name matches.
_WRITTEN = re.compile(
    rb'{"schema_version": \d+, "key": "([\w.-]+)", "cell": "([\w.-]+)", "cell_size": (\d+), .*, '
    rb'"process_replicate": (\d+), .*, "environment_id": "([\w.-]+)"[,}]'
)


def place_of(line: Line) -> Place:
    """The place of a record, without the cost of reading all of it: that is done when its cell is reported.

    Raises:
        StoreError: if the line was not written as records are, and is damaged.
    """
    match = _WRITTEN.match(line.data)
    if match is not None:
        key, cell, size, replicate, environment_id = (part.decode() for part in match.groups())
        return Place(key, cell, int(size), int(replicate), environment_id)
    record = line.record()
    return Place(record.key, record.cell, record.cell_size, record.process_replicate, record.environment_id)


def read_records(directory: Path) -> list[Record]:
    """Reads the records of a run, without changing it; a torn last line is left out.

    Raises:
        StoreError: if there are none, or if the file is damaged.
    """
    path, keys, records = records_file(directory), set(), []
    for line in scan(path):
        records.append(line.record())
        _check_new(records[-1].key, keys, str(path))
    return records


def _check_new(key: str, keys: set[str], where: str) -> None:
    if key in keys:
        raise StoreError(f"{where}: two lines share the key {key}; repair or remove the file.")
    keys.add(key)


def records_file(directory: Path) -> Path:
    """The file of a run's records.

    Raises:
        StoreError: if the directory holds none.
    """
    path = directory / RECORDS
    if not path.is_file():
        raise StoreError(f"{directory}: holds no {RECORDS}; give the --out directory of a `bench run`.")
    return path


class CellPlaces(NamedTuple):
    """Where the records of one cell and environment are: file, line from 1, offset.

    Attributes:
        where: the environment and the cell.
        places: of its records, in the order in which they were written.
    """

    where: tuple[str, str]
    places: tuple[tuple[Path, int, int], ...]


def read_cells(cells: Iterable[CellPlaces]) -> Iterator[list[Record]]:
    """The records of one cell and environment at a time.

    Raises:
        StoreError: if a line is damaged.
    """
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for where, places in cells:
            group = []
            for path, number, start in places:
                if path not in files:
                    files[path] = stack.enter_context(path.open("rb"))
                files[path].seek(start)
                record = Line(path, number, start, files[path].readline()).record()
                if (record.environment_id, record.cell) != where:
                    raise StoreError(f"{path}, line {number}: names two cells; repair or remove the file.")
                group.append(record)
            yield group


def keep_every_cell(record: Record) -> bool:
    """Keeps whatever the record says."""
    return True


class Archive:
    """The records of one run or several, read cell by cell: a sweep may hold more samples than memory.

    Args:
        directories: of runs.
        keep: whether a cell is wanted, by any of its records.

    Attributes:
        environments: id to fingerprint, of all directories.
        keep: as given.

    Raises:
        StoreError: if a directory holds no record, a file is damaged, an environment is unknown, or two records share a
            key.
    """

    def __init__(self, directories: Sequence[Path], keep: Callable[[Record], bool] = keep_every_cell):
        self.keep = keep
        self.environments: dict[str, dict[str, Any]] = {}
        self._places: dict[tuple[str, str], list[tuple[Path, int, int]]] = {}
        self._processes: dict[tuple[str, str], set[int]] = {}
        keys: set[str] = set()
        for k, directory in enumerate(directories):
            used: set[str] = set()
            path = records_file(directory)
            if any(path.samefile(records_file(earlier)) for earlier in directories[:k]):
                raise StoreError(f"{directory}: is named twice; give each directory once.")
            for line in scan(path):
                place = place_of(line)
                _check_new(place.key, keys, str(path))
                used.add(place.environment_id)
                where = (place.environment_id, place.cell)
                self._places.setdefault(where, []).append((path, line.number, line.start))
                self._processes.setdefault(where, set()).add(place.process_replicate)
            found = read_environments(directory)
            check_environments(used, found, str(directory))
            self.environments.update(found)
        if not keys:
            raise StoreError(f"{', '.join(map(str, directories))}: no complete record; run the benchmark first.")

    def places(self) -> list[CellPlaces]:
        """Where every cell is, wanted or not, in the order in which the cells were recorded."""
        return [CellPlaces(where, tuple(places)) for where, places in self._places.items()]

    def processes(self, where: tuple[str, str]) -> int:
        """Return how many process replicates recorded a cell, which is given as in ``CellPlaces``."""
        return len(self._processes[where])

    def cells(self) -> Iterator[list[Record]]:
        """The records of one wanted cell and environment at a time, in the order in which the cells were recorded.

        Raises:
            StoreError: if a line is damaged.
        """
        return (group for group in read_cells(self.places()) if self.keep(group[0]))
