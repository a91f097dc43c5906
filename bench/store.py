"""Append-only storage of records: `records.jsonl` and, beside it, `environment.json`.

The records of one cell are appended in one write and synced, so that a killed run leaves at most one cell torn. Opening
a store sets that tail aside in `torn.jsonl`, never deletes it, and the cell is measured again.
"""

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.archive import place_of, read_records
from bench.environments import ENVIRONMENTS, StoreError, read_environments
from bench.record_files import COMPRESSED, RECORDS, scan
from bench.records import Record
from parity_tests.report.files import OutputError, write_text

if sys.platform != "win32":
    import fcntl

TORN = "torn.jsonl"


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Keeps every other run out of a results directory, which is created if missing.

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
        raise StoreError(f"{directory}: cannot be written ({error.strerror}); choose another --out.") from error
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


class Store:
    """A results directory, open for appending.

    Args:
        directory: created if missing.
        resume: whether records that are there already are continued.

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
                    self._append(directory / TORN, file.read())
                os.truncate(path, size)
            # Found out now and not after the first cell: the file can be opened, and this disk takes another byte.
            self._append(path, b"")
            probe = directory / f".{RECORDS}.probe"
            self._append(probe, b"\n")
            probe.unlink()
        except OSError as error:
            raise StoreError(f"{directory}: cannot be written ({error.strerror}); choose another --out.") from error

    def _load(self, path: Path) -> int:
        """Notes what is there, and returns how many bytes whole cells take: a torn cell at the end is left out.

        Only keys are kept: a sweep may hold more samples than memory.
        """
        sizes: dict[tuple[str, int], int] = defaultdict(int)
        last, start, end, expected, keys = None, 0, 0, 0, []
        place = ""
        for line in scan(path):
            record = place_of(line)
            cell = (record.cell, record.process_replicate)
            if cell != last:
                self._keys.update(keys)
                self.environment_ids |= {place} if keys else set()
                last, start, keys = cell, line.position.start, []
            if record.key in self._keys or record.key in keys:
                raise StoreError(f"{path}: two lines share the key {record.key}; repair or remove the file.")
            sizes[cell] += 1
            keys.append(record.key)
            expected, end, place = record.cell_size, line.position.start + len(line.data), record.environment_id
        if last is not None and sizes[last] < expected:
            sizes.pop(last)
            end = start
        else:
            self._keys.update(keys)
            self.environment_ids |= {place} if keys else set()
        self._cells.update(sizes)
        return end

    @property
    def records(self) -> list[Record]:
        """All records, read back from the file."""
        return read_records(self.directory)

    @staticmethod
    def _append(path: Path, data: bytes) -> None:
        with path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def holds(self, cell: str, process_replicate: int) -> bool:
        """Whether a cell was recorded, completely, for a process replicate."""
        return (cell, process_replicate) in self._cells

    def append(self, records: Iterable[Record]) -> None:
        """Appends the records of one whole cell, durably.

        Raises:
            StoreError: if a key is there already, or the disk takes no more.
        """
        batch = list(records)
        keys = [record.key for record in batch]
        repeated = [key for key, count in Counter(keys).items() if count > 1 or key in self._keys]
        if repeated:
            raise StoreError(f"{self.directory / RECORDS}: the key {repeated[0]} is recorded already.")
        try:
            self._append(self.directory / RECORDS, b"".join(record.to_line() for record in batch))
        except OSError as error:
            raise self._full(error) from error
        self._keys.update(keys)
        self.environment_ids.update(record.environment_id for record in batch)
        self._cells.update((record.cell, record.process_replicate) for record in batch)

    def add_environment(self, environment_id: str, fingerprint: Mapping[str, Any]) -> None:
        """Adds a fingerprint to `environment.json`, replacing the file in one step."""
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
