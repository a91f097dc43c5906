"""Append-only storage of records: ``records.jsonl`` and, beside it, ``environment.json``.

The records of one cell are appended in one write and synced, so that a killed run leaves at most one cell torn. Opening
a store sets that tail aside in ``torn.jsonl``, never deletes it, and the cell is measured again.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.records import Record, RecordError, parse_line

RECORDS, ENVIRONMENTS, TORN = "records.jsonl", "environment.json", "torn.jsonl"


class StoreError(ValueError):
    """A results directory that cannot be used as asked."""


def _complete_lines(data: bytes) -> list[bytes]:
    """The lines with their newlines; a last line without one is kept as it is."""
    return data.splitlines(keepends=True)


def _parse(path: Path, data: bytes) -> tuple[list[Record], int]:
    """Returns the records, and how many bytes of the file they take; the rest is a torn last line."""
    records: list[Record] = []
    size = 0
    lines = _complete_lines(data)
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise RecordError("the line has no end")
            records.append(parse_line(line))
        except RecordError as error:
            # Only the last line can be torn by a killed run; anything before it is damage that nobody may overlook.
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise StoreError(f"{path}, line {number}: {error}; repair or remove the file.") from error
        size += len(line)
    repeated = [key for key, count in Counter(record.key for record in records).items() if count > 1]
    if repeated:
        raise StoreError(f"{path}: two lines share the key {repeated[0]}; repair or remove the file.")
    return records, size


def _whole(records: list[Record], lines: list[bytes]) -> tuple[list[Record], int]:
    """Drops a cell at the end that has fewer records than it announced; returns the rest and their bytes."""
    if not records:
        return records, 0
    last = (records[-1].cell, records[-1].process_replicate)
    start = next(k for k, record in enumerate(records) if (record.cell, record.process_replicate) == last)
    if len(records) - start < records[-1].cell_size:
        records = records[:start]
    return records, sum(len(line) for line in lines[: len(records)])


def read_records(directory: Path) -> list[Record]:
    """Reads the records of a run, without changing it; a torn last line is left out.

    Raises:
        StoreError: if there are none, or if the file is damaged.
    """
    path = directory / RECORDS
    if not path.is_file():
        raise StoreError(f"{directory}: holds no {RECORDS}; give the --out directory of a `bench run`.")
    records, _ = _parse(path, path.read_bytes())
    return records


def read_environments(directory: Path) -> dict[str, dict[str, Any]]:
    """Reads ``environment.json``: id to fingerprint; empty if there is none yet."""
    path = directory / ENVIRONMENTS
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise StoreError(f"{path}: not JSON ({error}); repair or remove the file.") from error


class Store:
    """A results directory, open for appending.

    Args:
        directory: created if missing.
        resume: whether records that are there already are continued.

    Raises:
        StoreError: if the directory cannot be written, holds records although ``resume`` is false, or is damaged.
    """

    def __init__(self, directory: Path, *, resume: bool):
        self.directory = directory
        path = directory / RECORDS
        try:
            directory.mkdir(parents=True, exist_ok=True)
            existing = path.read_bytes() if path.exists() else b""
            if existing and not resume:
                raise StoreError(f"{directory}: already holds records; add --resume or choose another --out.")
            records, size = _parse(path, existing)
            self.records, size = _whole(records, _complete_lines(existing[:size]))
            self.set_aside_bytes = len(existing) - size
            if self.set_aside_bytes:
                self._append(directory / TORN, existing[size:])
                os.truncate(path, size)
            # Found out now and not after the first cell: the file can be opened, and this disk takes another byte.
            self._append(path, b"")
            probe = directory / f".{RECORDS}.probe"
            self._append(probe, b"\n")
            probe.unlink()
        except OSError as error:
            raise StoreError(f"{directory}: cannot be written ({error.strerror}); choose another --out.") from error
        self._keys = {record.key for record in self.records}
        self._cells = {(record.cell, record.process_replicate) for record in self.records}

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
            StoreError: if a key is there already.
        """
        batch = list(records)
        keys = [record.key for record in batch]
        repeated = [key for key, count in Counter(keys).items() if count > 1 or key in self._keys]
        if repeated:
            raise StoreError(f"{self.directory / RECORDS}: the key {repeated[0]} is recorded already.")
        self._append(self.directory / RECORDS, b"".join(record.to_line() for record in batch))
        self.records.extend(batch)
        self._keys.update(keys)
        self._cells.update((record.cell, record.process_replicate) for record in batch)

    def add_environment(self, environment_id: str, fingerprint: Mapping[str, Any]) -> None:
        """Adds a fingerprint to ``environment.json``, replacing the file in one step."""
        environments = read_environments(self.directory)
        environments[environment_id] = dict(fingerprint)
        path = self.directory / ENVIRONMENTS
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(environments, indent=1, sort_keys=True) + "\n")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
