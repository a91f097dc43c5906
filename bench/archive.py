"""Reading ``records.jsonl`` and ``environment.json`` back, without changing either."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.record_lines import parse_line
from bench.records import Record, RecordError

RECORDS, ENVIRONMENTS = "records.jsonl", "environment.json"


class StoreError(ValueError):
    """A results directory that cannot be used as asked."""


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


class _Place(NamedTuple):
    """What tells a record from others, and its cell from other cells."""

    key: str
    cell: str
    environment_id: str


# How records are written. A quotation mark inside a text would be escaped, so that only a field's name matches.
_WRITTEN = re.compile(
    rb'{"schema_version": \d+, "key": "([\w.-]+)", "cell": "([\w.-]+)", .*, "environment_id": "([\w.-]+)"[,}]'
)


def _place(line: Line) -> _Place:
    """The place of a record, without the cost of reading all of it: that is done when its cell's turn comes."""
    match = _WRITTEN.match(line.data)
    if match is not None:
        return _Place(*(part.decode() for part in match.groups()))
    # Written by something else, or damaged; the record says it in words.
    record = line.record()
    return _Place(record.key, record.cell, record.environment_id)


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


def read_environments(directory: Path) -> dict[str, dict[str, Any]]:
    """Reads ``environment.json``: id to fingerprint; empty if there is none yet.

    Raises:
        StoreError: if it cannot be read, or is no object of fingerprints.
    """
    path = directory / ENVIRONMENTS
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); check the file.") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not JSON ({error}); repair or remove the file.") from error
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise StoreError(f"{path}: expected an object of fingerprints by id; repair or remove the file.")
    return found


_FINGERPRINT: Mapping[str, tuple[type, ...]] = {
    "cpu_model": (str,),
    "affinity": (list,),
    "system": (str,),
    "device": (str,),
    "division": (str,),
    "frameworks": (dict,),
    "git": (dict, type(None)),
    "gpus": (list, type(None)),
}


def _wrong(fingerprint: Mapping[str, Any]) -> str | None:
    """What a fingerprint lacks of that which every report prints, or None."""
    for name, kinds in _FINGERPRINT.items():
        if type(fingerprint.get(name)) not in kinds:
            return f"{name}: expected {kinds[0].__name__}, got {str(fingerprint.get(name))[:80]!r}"
    for name, framework in fingerprint["frameworks"].items():
        parts = ("versions", "default_switches")
        if not isinstance(framework, dict) or not all(isinstance(framework.get(part), dict) for part in parts):
            return f"frameworks: {name} lacks its versions or default_switches"
    return None


def check_environments(used: Iterable[str], environments: Mapping[str, Any], where: str) -> None:
    """Refuses records whose environment nobody knows: two machines could be compared as if they were one.

    Args:
        used: environment ids of records.
        environments: id to fingerprint.
        where: the directory, for the message.

    Raises:
        StoreError: if an environment id has no fingerprint, or one that lacks what every report prints.
    """
    used = set(used)
    lost = sorted(used - set(environments))
    if lost:
        raise StoreError(
            f"{where}: records name the environment {lost[0]}, which {ENVIRONMENTS} lacks; restore that file from the "
            "machine that measured, or measure again with another --out."
        )
    for identity in sorted(used):
        if wrong := _wrong(environments[identity]):
            raise StoreError(f"{where}/{ENVIRONMENTS}: fingerprint {identity}: {wrong}; repair or restore the file.")


class Archive:
    """The records of one run or several, read cell by cell: a sweep may hold more samples than memory.

    Args:
        directories: of runs.
        keep: whether a cell is wanted, by any of its records.

    Attributes:
        environments: id to fingerprint, of all directories.

    Raises:
        StoreError: if a directory holds no record, a file is damaged, an environment is unknown, or two records share a
            key.
    """

    def __init__(self, directories: Sequence[Path], keep: Callable[[Record], bool] = lambda record: True):
        self._keep = keep
        self.environments: dict[str, dict[str, Any]] = {}
        self._places: dict[tuple[str, str], list[tuple[Path, int, int]]] = {}
        keys: set[str] = set()
        for k, directory in enumerate(directories):
            used: set[str] = set()
            path = records_file(directory)
            if any(path.samefile(records_file(earlier)) for earlier in directories[:k]):
                raise StoreError(f"{directory}: is named twice; give each directory once.")
            for line in scan(path):
                place = _place(line)
                _check_new(place.key, keys, str(path))
                used.add(place.environment_id)
                where = (place.environment_id, place.cell)
                self._places.setdefault(where, []).append((path, line.number, line.start))
            found = read_environments(directory)
            check_environments(used, found, str(directory))
            self.environments.update(found)
        if not keys:
            raise StoreError(f"{', '.join(map(str, directories))}: no complete record; run the benchmark first.")

    def cells(self) -> Iterator[list[Record]]:
        """The records of one cell and environment at a time, in the order in which the cells were recorded.

        Raises:
            StoreError: if a line is damaged.
        """
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for where, places in self._places.items():
                group = []
                for path, number, start in places:
                    if path not in files:
                        files[path] = stack.enter_context(path.open("rb"))
                    files[path].seek(start)
                    record = Line(path, number, start, files[path].readline()).record()
                    if (record.environment_id, record.cell) != where:
                        raise StoreError(f"{path}, line {number}: names two cells; repair or remove the file.")
                    group.append(record)
                if self._keep(group[0]):
                    yield group
