"""A results directory: records appended cell by cell, and read back cell by cell without changing them.

The records of one cell are appended to `records.jsonl` in one write and synced, so that a killed run leaves at most one
cell torn. Opening a store sets that tail aside in `torn.jsonl`, never deletes it, and the cell is measured again.
A sweep may hold more samples than memory: an archive keeps only the places of the lines.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.environments import ENVIRONMENTS, StoreError, read_environments, unusable
from bench.record_files import COMPRESSED, RECORDS, LineReader, Position, records_file, scan
from bench.records import Record
from parity_tests.report.files import OutputError, write_text

if sys.platform != "win32":
    import fcntl

TORN = "torn.jsonl"


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Keep every other run out of a results directory, which is created if missing.

    Two runs would take each other's cell for torn, record keys twice, and time against each other. The lock is the
    kernel's and ends with the process, however that ends; where there is none (Windows, some network file systems)
    nothing is kept out.

    A run that ends before its first record leaves nothing behind: what it made is removed again.

    Raises:
        StoreError: if another run writes there, or the directory cannot be made.
    """
    if sys.platform == "win32":
        yield
        return
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    known = {name for name in (RECORDS, ENVIRONMENTS) if (directory / name).exists()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(directory, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{directory}: another run writes there; wait until it ends, or choose another --out."
            ) from error
        except OSError:
            pass
        try:
            yield
        finally:
            _leave_nothing_empty(directory, known, missing)
    finally:
        os.close(handle)


def records_there(directory: Path) -> bool:
    """Whether a directory holds a record, or at least part of one."""
    records = directory / RECORDS
    return (directory / COMPRESSED).exists() or (records.exists() and records.stat().st_size > 0)


def _leave_nothing_empty(directory: Path, known: Container[str], missing: Iterable[Path]) -> None:
    """Remove the files and directories that were not there before, if no record has been written."""
    with suppress(OSError):
        if records_there(directory):
            return
        for name in (RECORDS, ENVIRONMENTS):
            if name not in known:
                (directory / name).unlink(missing_ok=True)
        for place in missing:
            place.rmdir()


def _unwritable(directory: Path, error: OSError) -> StoreError:
    return StoreError(f"{directory}: cannot be written ({error.strerror}); choose another --out.")


def _repeated(where: Path, key: str) -> StoreError:
    return StoreError(f"{where}: two lines share the key {key}; repair or remove the file.")


class Store:
    """A results directory, open for appending.

    Args:
        directory: created if missing.
        resume: True continues records that are there already.

    Attributes:
        environment_ids: of all records that it holds.
        set_aside_bytes: of a torn cell that was found at the end.

    Raises:
        StoreError: if the directory cannot be written, holds records although `resume` is false, or is damaged.
    """

    def __init__(self, directory: Path, *, resume: bool):
        self.directory = directory
        self._keys: set[str] = set()
        self._cells: set[tuple[str, int]] = set()
        self.environment_ids: set[str] = set()
        path = directory / RECORDS
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                # To open a pipe would wait for whoever reads it.
                raise StoreError(f"{path}: expected a regular file, got none; remove it or choose another --out.")
            if (directory / COMPRESSED).exists():
                unpack = f"unpack them first (`xz -d {directory / COMPRESSED}`), or " if resume else ""
                raise StoreError(f"{directory}: holds compressed records; {unpack}choose another --out.")
            existing = path.stat().st_size if path.exists() else 0
            if existing and not resume:
                raise StoreError(f"{directory}: already holds records; add --resume or choose another --out.")
            size = self._load(path) if existing else 0
            self.set_aside_bytes = existing - size
            if self.set_aside_bytes:
                with path.open("rb") as file:
                    file.seek(size)
                    _append(directory / TORN, file.read())
                os.truncate(path, size)
            # Found out now and not after the first cell: the file can be opened, and this disk takes another byte.
            _append(path, b"")
            probe = directory / f".{RECORDS}.probe"
            _append(probe, b"\n")
            probe.unlink()
        except OSError as error:
            raise _unwritable(directory, error) from error

    def _load(self, path: Path) -> int:
        """Note what is there, and return how many bytes whole cells take: a torn cell at the end is left out."""
        counts: Counter[tuple[str, int]] = Counter()
        start, end, group = 0, 0, []
        for line in scan(path):
            record = line.record().without_samples()
            if group and _cell(record) != _cell(group[0]):
                self._note(group)
                start, group = line.position.start, []
            if record.key in self._keys or any(record.key == other.key for other in group):
                raise _repeated(path, record.key)
            group.append(record)
            counts[_cell(record)] += 1
            end = line.position.start + len(line.data)
        if group and counts[_cell(group[0])] < group[-1].cell_size:
            return start
        self._note(group)
        return end

    def _note(self, group: Iterable[Record]) -> None:
        for record in group:
            self._keys.add(record.key)
            self._cells.add(_cell(record))
            self.environment_ids.add(record.environment_id)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._keys)

    @property
    def records(self) -> list[Record]:
        """Read all records back from the file."""
        return read_records(self.directory)

    def holds(self, cell: str, process_replicate: int) -> bool:
        """Return True if a cell was recorded, completely, for a process replicate."""
        return (cell, process_replicate) in self._cells

    def append(self, records: Iterable[Record]) -> None:
        """Append the records of one whole cell, durably.

        Raises:
            StoreError: if a key is there already, or the disk takes no more.
        """
        group = list(records)
        counts = Counter(record.key for record in group)
        repeated = [key for key, count in counts.items() if count > 1 or key in self._keys]
        if repeated:
            raise StoreError(f"{self.directory / RECORDS}: the key {repeated[0]} is recorded already.")
        try:
            _append(self.directory / RECORDS, b"".join(record.to_line() for record in group))
        except OSError as error:
            raise self._full(error) from error
        self._note(group)

    def add_environment(self, environment_id: str, fingerprint: Mapping[str, Any]) -> None:
        """Add a fingerprint to `environment.json`, replacing the file in one step."""
        environments = read_environments(self.directory)
        if environments.get(environment_id) == fingerprint:
            return
        environments[environment_id] = dict(fingerprint)
        text = json.dumps(environments, indent=1, sort_keys=True) + "\n"
        try:
            write_text("--out", self.directory / ENVIRONMENTS, text)
        except OutputError as error:
            raise self._full(error.__cause__ or error) from error

    def _full(self, error: BaseException) -> StoreError:
        why = getattr(error, "strerror", None) or error
        return StoreError(
            f"{self.directory}: cannot be written any more ({why}); whole cells that were recorded are "
            "kept: make room and add --resume."
        )


def _cell(record: Record) -> tuple[str, int]:
    return record.cell, record.process_replicate


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_records(directory: Path) -> list[Record]:
    """Read the records of a run, without changing it; a torn last line is left out.

    Raises:
        StoreError: if there are none, or if the file is damaged.
    """
    path = records_file(directory)
    records = [line.record() for line in scan(path)]
    key, count = max(Counter(record.key for record in records).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise _repeated(path, key)
    return records


@dataclass
class Damage:
    """The parts of records that cannot be read, so that the rest of them can be shown."""

    sentences: list[str] = field(default_factory=list)  # one for each damaged line or environment

    def add(self, error: StoreError) -> None:
        """Keep what is wrong, once."""
        if str(error) not in self.sentences:
            self.sentences.append(str(error))

    def error(self) -> StoreError:
        """Take back the last sentence, as the error of a command that has nothing left to show."""
        return StoreError(self.sentences.pop())


class CellPlaces(NamedTuple):
    """The places of the records of one cell and environment, in the order in which they were written."""

    positions: tuple[Position, ...]  # of the lines
    processes: int  # number of process replicates


def read_cells(cells: Iterable[CellPlaces]) -> Iterator[list[Record]]:
    """Read the records of one cell and environment at a time.

    Raises:
        StoreError: if a line is damaged, which an archive has found it not to be.
    """
    with LineReader() as reader:
        for cell in cells:
            yield [reader.line(position).record() for position in cell.positions]


def keep_every_cell(record: Record) -> bool:
    """Keep whatever the record says."""
    return True


class Archive:
    """The records of one run or several, checked line by line and then read cell by cell.

    Args:
        directories: of runs.
        keep: tells from any of its records if a cell is wanted.
        damage: is told of damaged lines and environments, whose cells are left out; without it, the first is an error.

    Attributes:
        environments: id to fingerprint, of all directories.
        keep: as given.

    Raises:
        StoreError: if a directory holds no record, a file cannot be read, two records share a key, or nothing is left.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        keep: Callable[[Record], bool] = keep_every_cell,
        damage: Damage | None = None,
    ):
        self.keep, self._damage = keep, damage
        self.environments: dict[str, dict[str, Any]] = {}
        # Environment and cell to process replicate and position of each record.
        self._cells: dict[tuple[str, str], list[tuple[int, Position]]] = {}
        keys: set[str] = set()
        for k, directory in enumerate(directories):
            path = records_file(directory)
            if any(path.samefile(records_file(earlier)) for earlier in directories[:k]):
                raise StoreError(f"{directory}: is named twice; give each directory once.")
            found = self._index(path, keys)
            environments = self._known(directory, {environment for environment, _ in found})
            self.environments.update(environments)
            for where, places in found.items():
                if where[0] in environments:
                    self._cells.setdefault(where, []).extend(places)
        if not self._cells:
            if damage is not None and damage.sentences:
                raise damage.error()
            raise StoreError(f"{', '.join(map(str, directories))}: no complete record; run the benchmark first.")

    def _index(self, path: Path, keys: set[str]) -> dict[tuple[str, str], list[tuple[int, Position]]]:
        """Find the cells of a file; cells that lack a record are left out where a line is damaged."""
        found: dict[tuple[str, str], list[tuple[int, Position]]] = {}
        lacking: dict[tuple[tuple[str, str], int], int] = {}
        lost: StoreError | None = None
        for line in scan(path):
            try:
                record = line.record()
            except StoreError as error:
                if lost is not None or self._damage is None:
                    self._tell(lost or error)
                lost = error
                continue
            if record.key in keys:
                raise _repeated(path, record.key)
            keys.add(record.key)
            where = (record.environment_id, record.cell)
            replicate = (where, record.process_replicate)
            lacking[replicate] = lacking.get(replicate, record.cell_size) - 1
            found.setdefault(where, []).append((record.process_replicate, line.position))
        if lost is not None:
            incomplete = {where for (where, _), count in lacking.items() if count}
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
        if self._damage is None:
            raise error
        self._damage.add(error)

    def places(self) -> list[CellPlaces]:
        """Return the places of every cell, wanted or not, in the order in which the cells were recorded."""
        return [
            CellPlaces(tuple(position for _, position in cell), len({k for k, _ in cell}))
            for cell in self._cells.values()
        ]

    def cells(self) -> Iterator[list[Record]]:
        """Read the records of one wanted cell and environment at a time, in the order in which they were recorded."""
        return (group for group in read_cells(self.places()) if self.keep(group[0]))
