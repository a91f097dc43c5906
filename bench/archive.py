"""Reading the records of runs back, whole or cell by cell, without changing them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.environments import StoreError, read_environments, unusable
from bench.record_files import Line, LineReader, Position, records_file, scan
from bench.records import Record


class Place(NamedTuple):
    """What tells a record from others, and its cell from other cells."""

    key: str
    cell: str
    cell_size: int
    process_replicate: int
    environment_id: str


# How records are written: the first fields, and then one field somewhere. None of these looks at a byte twice. A
# quotation mark inside a text would be escaped, so that only a field's name matches.
_FIRST = re.compile(rb'{"schema_version": \d{1,9}, "key": "([\w.-]+)", "cell": "([\w.-]+)", "cell_size": (\d{1,9}), ')
_REPLICATE, _ENVIRONMENT = b', "process_replicate": ', b', "environment_id": "'
_NUMBER, _TEXT = re.compile(rb"(\d{1,9}), "), re.compile(rb'([\w.-]+)"[,}]')


def place_of(line: Line) -> Place:
    """Find the place of a record, without the cost of reading all of it: that is done when its cell is reported.

    Raises:
        StoreError: if the line was not written as records are, and is damaged.
    """
    data = line.data
    first = _FIRST.match(data)
    # A name that occurs twice may be that of a field within a field.
    if first is not None and data.count(_REPLICATE) == 1 and data.count(_ENVIRONMENT) == 1:
        replicate = _NUMBER.match(data, data.find(_REPLICATE) + len(_REPLICATE))
        environment = _TEXT.match(data, data.find(_ENVIRONMENT) + len(_ENVIRONMENT))
        if replicate is not None and environment is not None:
            key, cell, size = (part.decode() for part in first.groups())
            return Place(key, cell, int(size), int(replicate[1]), environment[1].decode())
    record = line.record()
    return Place(record.key, record.cell, record.cell_size, record.process_replicate, record.environment_id)


def read_records(directory: Path) -> list[Record]:
    """Read the records of a run, without changing it; a torn last line is left out.

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


@dataclass
class Damage:
    """What cannot be read of records, so that the rest of them can be shown.

    Attributes:
        sentences: one for each damaged line or environment.
    """

    sentences: list[str] = field(default_factory=list)

    def add(self, error: StoreError) -> None:
        """Keep what is wrong, once."""
        if str(error) not in self.sentences:
            self.sentences.append(str(error))

    def error(self) -> StoreError:
        """Take back the last sentence, as the error of a command that has nothing left to show."""
        return StoreError(self.sentences.pop())


class CellPlaces(NamedTuple):
    """Where the records of one cell and environment are.

    Attributes:
        where: the environment and the cell.
        positions: of its records, in the order in which they were written.
    """

    where: tuple[str, str]
    positions: tuple[Position, ...]


def read_cells(cells: Iterable[CellPlaces], damage: Damage | None = None) -> Iterator[list[Record]]:
    """Read the records of one cell and environment at a time.

    Args:
        cells: where they are.
        damage: is told of damaged lines, whose cells are left out; without it, the first one is an error.

    Raises:
        StoreError: if a line is damaged, and `damage` is None.
    """
    with LineReader() as reader:
        for where, positions in cells:
            try:
                yield [_in_its_cell(reader.line(position), where) for position in positions]
            except StoreError as error:
                if damage is None:
                    raise
                damage.add(error)


def _in_its_cell(line: Line, where: tuple[str, str]) -> Record:
    record = line.record()
    if (record.environment_id, record.cell) != where:
        raise StoreError(f"{line.where}: names two cells; repair or remove the file.")
    return record


def keep_every_cell(record: Record) -> bool:
    """Keep whatever the record says."""
    return True


class Archive:
    """The records of one run or several, read cell by cell: a sweep may hold more samples than memory.

    Args:
        directories: of runs.
        keep: whether a cell is wanted, by any of its records.
        damage: is told of damaged lines and environments, whose cells are left out; without it, the first is an error.

    Attributes:
        environments: id to fingerprint, of all directories.
        keep: as given.
        damage: as given.

    Raises:
        StoreError: if a directory holds no record, a file cannot be read, two records share a key, or nothing is left.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        keep: Callable[[Record], bool] = keep_every_cell,
        damage: Damage | None = None,
    ):
        self.keep, self.damage = keep, damage
        self.environments: dict[str, dict[str, Any]] = {}
        self._positions: dict[tuple[str, str], list[Position]] = {}
        self._processes: dict[tuple[str, str], set[int]] = {}
        keys: set[str] = set()
        for k, directory in enumerate(directories):
            path = records_file(directory)
            if any(path.samefile(records_file(earlier)) for earlier in directories[:k]):
                raise StoreError(f"{directory}: is named twice; give each directory once.")
            found = self._index(path, keys)
            environments = self._known(directory, {environment for environment, _ in found})
            self.environments.update(environments)
            for where, positions in found.items():
                if where[0] in environments:
                    self._positions.setdefault(where, []).extend(positions)
        if not self._positions:
            if damage is not None and damage.sentences:
                raise damage.error()
            raise StoreError(f"{', '.join(map(str, directories))}: no complete record; run the benchmark first.")

    def _index(self, path: Path, keys: set[str]) -> dict[tuple[str, str], list[Position]]:
        """Find the cells of a file; cells that lack a record are left out where a line could not be placed."""
        found: dict[tuple[str, str], list[Position]] = {}
        lacking: Counter[tuple[tuple[str, str], int]] = Counter()
        lost: StoreError | None = None
        for line in scan(path):
            try:
                place = place_of(line)
            except StoreError as error:
                if lost is not None or self.damage is None:
                    self._tell(lost or error)
                lost = error
                continue
            _check_new(place.key, keys, str(path))
            where = (place.environment_id, place.cell)
            replicate = (where, place.process_replicate)
            self._processes.setdefault(where, set()).add(place.process_replicate)
            if replicate not in lacking:
                lacking[replicate] = place.cell_size
            lacking[replicate] -= 1
            found.setdefault(where, []).append(line.position)
        if lost is not None:
            incomplete = {where for (where, _), count in lacking.items() if count} & found.keys()
            for where in incomplete:
                del found[where]
            out = f" (cells that lack a record, and are left out: {len(incomplete)})." if incomplete else "."
            self._tell(StoreError(str(lost).removesuffix(".") + out))
        return found

    def _known(self, directory: Path, used: set[str]) -> dict[str, dict[str, Any]]:
        """Read the environments of a directory that are whole, and refuse or leave out what names the others."""
        try:
            environments = read_environments(directory)
            wrong = unusable(used | environments.keys(), environments, str(directory))
            for name in sorted(used & wrong.keys()):
                self._tell(StoreError(wrong[name]))
        except StoreError as error:
            self._tell(error)
            return {}
        return {name: found for name, found in environments.items() if name not in wrong}

    def _tell(self, error: StoreError) -> None:
        if self.damage is None:
            raise error
        self.damage.add(error)

    def places(self) -> list[CellPlaces]:
        """Tell where every cell is, wanted or not, in the order in which the cells were recorded."""
        return [CellPlaces(where, tuple(positions)) for where, positions in self._positions.items()]

    def processes(self, where: tuple[str, str]) -> int:
        """Return how many process replicates recorded a cell, which is given as in `CellPlaces`."""
        return len(self._processes[where])

    def cells(self) -> Iterator[list[Record]]:
        """Read the records of one wanted cell and environment at a time, in the order in which they were recorded.

        Raises:
            StoreError: if a line is damaged, and `damage` is None.
        """
        return (group for group in read_cells(self.places(), self.damage) if self.keep(group[0]))
