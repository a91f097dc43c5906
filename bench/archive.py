"""Reading ``records.jsonl`` and ``environment.json`` back, without changing either."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record_lines import parse_line
from bench.records import Record, RecordError

RECORDS, ENVIRONMENTS = "records.jsonl", "environment.json"


class StoreError(ValueError):
    """A results directory that cannot be used as asked."""


@dataclass(frozen=True)
class Line:
    """A line of ``records.jsonl``.

    Attributes:
        start: offset of its first byte.
        size: its bytes, the newline included.
        record: what it holds.
    """

    start: int
    size: int
    record: Record


def scan(path: Path) -> Iterator[Line]:
    """Reads the records of a file one by one, so that no size of a file fills the memory; a torn last line is left out.

    Raises:
        StoreError: if the file cannot be read, is damaged, or repeats a key.
    """
    start, keys = 0, set()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                # Only the last line can be torn by a killed run; anything before it is damage that nobody may overlook.
                if not line.endswith(b"\n"):
                    return
                try:
                    record = parse_line(line)
                except RecordError as error:
                    raise StoreError(f"{path}, line {number}: {error}; repair or remove the file.") from error
                if record.key in keys:
                    raise StoreError(f"{path}: two lines share the key {record.key}; repair or remove the file.")
                keys.add(record.key)
                yield Line(start, len(line), record)
                start += len(line)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); check the file.") from error


def read_records(directory: Path) -> list[Record]:
    """Reads the records of a run, without changing it; a torn last line is left out.

    Raises:
        StoreError: if there are none, or if the file is damaged.
    """
    return [line.record for line in scan(records_file(directory))]


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

    Attributes:
        environments: id to fingerprint, of all directories.

    Raises:
        StoreError: if a directory holds no record, a file is damaged, an environment is unknown, or two records share a
            key.
    """

    def __init__(self, directories: Sequence[Path]):
        self.environments: dict[str, dict[str, Any]] = {}
        self._places: dict[tuple[str, str], list[tuple[Path, int]]] = {}
        keys: set[str] = set()
        for directory in directories:
            used: set[str] = set()
            path = records_file(directory)
            for line in scan(path):
                record = line.record
                if record.key in keys:
                    raise StoreError(f"two of the records share the key {record.key}; give each directory once.")
                keys.add(record.key)
                used.add(record.environment_id)
                self._places.setdefault((record.environment_id, record.cell), []).append((path, line.start))
            found = read_environments(directory)
            check_environments(used, found, str(directory))
            self.environments.update(found)
        if not keys:
            raise StoreError(f"{', '.join(map(str, directories))}: no complete record; run the benchmark first.")

    def cells(self) -> Iterator[list[Record]]:
        """The records of one cell and environment at a time, in the order in which the cells were recorded."""
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for places in self._places.values():
                group = []
                for path, start in places:
                    if path not in files:
                        files[path] = stack.enter_context(path.open("rb"))
                    files[path].seek(start)
                    group.append(parse_line(files[path].readline()))
                yield group
