"""Reading ``environment.json`` back: what the environments are that records name."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ENVIRONMENTS = "environment.json"


class StoreError(ValueError):
    """A results directory that cannot be used as asked."""


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


def device_name(fingerprint: Mapping[str, Any]) -> str:
    """What measured, in words: only figures with the same name are ever put beside one another."""
    gpus = [str(gpu).split(",")[0].strip() for gpu in fingerprint.get("gpus") or ()]
    on = f"{fingerprint['device']}: {' + '.join(gpus)}" if gpus else str(fingerprint["device"])
    return f"{on} with {fingerprint['cpu_model']}, {len(fingerprint['affinity'])} processors"


def releases(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Framework to its Python and versions: what is the same in all divisions of a run."""
    return {name: [part.get("python"), part["versions"]] for name, part in fingerprint["frameworks"].items()}


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
