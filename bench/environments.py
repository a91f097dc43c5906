"""Read `environment.json`, the environments that records name, and refuse what reports cannot print."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records import parse, plain, shown

ENVIRONMENTS = "environment.json"
# A thousand times as large as any that was written.
_MOST_BYTES = 2**26


class StoreError(ValueError):
    """A results directory that cannot be used as asked."""


def read_environments(directory: Path) -> dict[str, dict[str, Any]]:
    """Read `environment.json`: id to fingerprint; empty if there is none yet.

    Raises:
        StoreError: if it cannot be read, or is no object.
    """
    path = directory / ENVIRONMENTS
    if not os.path.lexists(path):
        return {}
    if not path.is_file():
        raise StoreError(f"{path}: expected a regular file, got none; restore the file.")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise StoreError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB; repair or restore the file.")
        found = parse(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); check the file.") from error
    except StoreError:
        raise
    except ValueError as error:
        raise StoreError(f"{path}: not JSON: {error}; repair or restore the file.") from error
    if not isinstance(found, dict):
        raise StoreError(f"{path}: expected an object of fingerprints by id; repair or restore the file.")
    return found


def device_name(fingerprint: Mapping[str, Any]) -> str:
    """Describe the device: only figures with the same description are ever put beside one another."""
    gpus = [str(gpu).split(",")[0].strip() for gpu in fingerprint.get("gpus") or ()]
    on = f"{fingerprint['device']}: {' + '.join(gpus)}" if gpus else str(fingerprint["device"])
    # Nothing is added for small pages, which are usual, nor for records from before this was asked.
    frameworks = fingerprint["frameworks"] if fingerprint["device"] == "cpu" else {}
    large = [name for name, part in frameworks.items() if part.get("large_pages")]
    alone = "" if len(large) == len(frameworks) else f" in {' and '.join(large)}"
    pages = f", large pages{alone}" if large else ""
    return f"{on} with {fingerprint['cpu_model']}, {len(fingerprint['affinity'])} processors{pages}"


def releases(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return framework to its Python and versions, which all divisions of a run share."""
    return {name: [part.get("python"), part["versions"]] for name, part in fingerprint["frameworks"].items()}


# What reports print; a slash leads into an object, and a star stands for each of its names or items. What may be absent
# has None among its kinds.
_FINGERPRINT: Mapping[str, tuple[type, ...]] = {
    "cpu_model": (str,),
    "affinity": (list,),
    "affinity/*": (int,),
    "system": (str,),
    "device": (str,),
    "division": (str,),
    "frameworks": (dict,),
    "frameworks/*": (dict,),
    "frameworks/*/versions": (dict,),
    "frameworks/*/default_switches": (dict,),
    "frameworks/*/python": (str, type(None)),
    "frameworks/*/large_pages": (bool, type(None)),
    "git": (dict, type(None)),
    "git/commit": (str, type(None)),
    "git/dirty": (bool, type(None)),
    "gpus": (list, type(None)),
    "gpus/*": (str,),
    "cpu_features": (list, type(None)),
    "cpu_features/*": (str,),
    "cpu_count": (int, type(None)),
}
# Whatever else there is goes into JSON as it is.
_LEVELS = 8


def _parts(value: Any, path: Sequence[str], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values under a path of a fingerprint, each with its place in words; None for what is absent."""
    if not path:
        yield place, value
    elif value is None:
        return
    elif path[0] == "*":
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _parts(item, path[1:], f"{place}, {str(name)[:80]}")
    else:
        yield from _parts(value.get(path[0]), path[1:], f"{place}, {path[0]}" if place else path[0])


def _wrong(fingerprint: object) -> str | None:
    """Name what is wrong with a fingerprint, or return None."""
    if not isinstance(fingerprint, dict):
        return f"expected an object of fingerprints by id, got {shown(fingerprint)} for this one"
    for path, kinds in _FINGERPRINT.items():
        # The order of the table: what is looked into has been found to be an object or a list.
        for place, value in _parts(fingerprint, path.split("/")):
            if value is None and path.startswith("frameworks/*/") and dict in kinds:
                return f"{place.replace(', ', ': ', 1).rpartition(', ')[0]} lacks its versions or default_switches"
            if type(value) not in kinds:
                return f"{place}: expected {kinds[0].__name__}, got {shown(value)}"
    if not plain(fingerprint, _LEVELS):
        return f"expected at most {_LEVELS} levels, and numbers up to 2^100 (integers to 2^63)"
    return None


def unusable(names: Iterable[str], environments: Mapping[str, Any], where: str) -> dict[str, str]:
    """Find environments that are missing, or that lack fields that every report prints.

    Args:
        names: ids that records name.
        environments: id to fingerprint.
        where: the directory, for messages.

    Returns:
        Id to one sentence, of those alone.
    """
    found = {}
    for name in sorted(names):
        if name not in environments:
            found[name] = (
                f"{where}: records name the environment {name}, which {ENVIRONMENTS} lacks; restore that file from the "
                "machine that measured, or measure again with another --out."
            )
        elif wrong := _wrong(environments[name]):
            found[name] = f"{where}/{ENVIRONMENTS}: fingerprint {name}: {wrong}; repair or restore the file."
    return found


def check_environments(used: Iterable[str], environments: Mapping[str, Any], where: str) -> None:
    """Refuse records of a missing environment: two machines could be compared as if they were one.

    Raises:
        StoreError: if an environment id has no fingerprint, or one that lacks what every report prints.
    """
    for sentence in unusable(set(used), environments, where).values():
        raise StoreError(sentence)
