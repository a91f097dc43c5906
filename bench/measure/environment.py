"""The fingerprint of where a measurement was made."""

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from bench.measure.processors import cpu_features, cpu_model, governor
from bench.measure.switches import unset_for
from bench.measure.worker_process import CHECKOUT
from bench.records import HARNESS_VERSION, digest

_MEASURED = (
    "torch_impl",
    "jax_impl",
    "parity_tests/judge",
    "parity_tests/frameworks",
    "parity_tests/interpreters",
    "bench/measure",
    "bench/plan",
)
_GPU_FIELDS = "name,uuid,driver_version,power.limit,clocks.max.sm,clocks.max.mem,mig.mode.current,ecc.mode.current"

# Tells machines of one kind apart; set by the engine that uses several. A name of its own that a machine changes with
# every start, as containers do, would make a resumed run measure everything again.
MACHINE_VARIABLE = "PARTITIONED_LINEAR_BENCH_MACHINE"


_COMMAND_S = 30.0


def _output(*command: str) -> tuple[str | None, str]:
    """Runs a command that describes this place.

    Returns:
        What it prints, or None where it is not installed or refuses; and a sentence if it does not end.
    """
    if shutil.which(command[0]) is None:
        return None, ""
    try:
        done = subprocess.run(
            command,
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_COMMAND_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"{' '.join(command[:2])} gave no answer within {_COMMAND_S:g} s"
    except OSError as error:
        return None, f"{command[0]} cannot be run ({error.strerror})"
    return (done.stdout.strip() if done.returncode == 0 else None), ""


def git_state() -> dict[str, Any]:
    """Returns commit and whether tracked files differ from it: None outside a git checkout, or with `unknown`, why."""
    commit, late = _output("git", "rev-parse", "HEAD")
    changes, later = (None, "") if late else _output("git", "status", "--porcelain", "--untracked-files=no")
    state = {"commit": commit, "dirty": None if commit is None or changes is None else bool(changes)}
    return state | ({"unknown": late or later} if late or later else {})


def _gpus() -> list[str] | None:
    """Returns a line for each GPU of the driver, or one that says why there is none; None without nvidia-smi."""
    found, late = _output("nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader")
    return [late] if late else None if found is None else found.splitlines()


def source_digest() -> str:
    """Hashes the source that is measured and that measures: a change of either makes new records."""
    state = hashlib.blake2b(digest_size=8)
    for folder in _MEASURED:
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            state.update(str(path.relative_to(CHECKOUT)).encode())
            state.update(path.read_bytes())
    return state.hexdigest()


def fingerprint(
    workers: Mapping[str, Mapping[str, Any]], *, device: str, division: str, cpus: Sequence[int]
) -> dict[str, Any]:
    """Collects what a measurement depends on, and nothing that changes from minute to minute.

    Args:
        workers: per framework, its reply to `hello`.
        device: `cpu` or `cuda`.
        division: `stock` or `matched`.
        cpus: the processors that the workers may use.

    Returns:
        A JSON object; `digest` of it is the environment's id.
    """
    return {
        "harness_version": HARNESS_VERSION,
        "git": git_state(),
        "source_digest": source_digest(),
        "device": device,
        "division": division,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_model": cpu_model(),
        "cpu_features": list(cpu_features()),
        "cpu_count": os.cpu_count(),
        "machine": os.environ.get(MACHINE_VARIABLE),
        "cpu_governor": governor(),
        "affinity": list(cpus),
        "unset_variables": {name: value for worker in workers for name, value in unset_for(worker).items()},
        "gpus": _gpus() if device == "cuda" else None,
        "compile_cache": {
            "torchinductor": "directory given" if os.environ.get("TORCHINDUCTOR_CACHE_DIR") else "default, may be warm",
            "jax": "persistent" if os.environ.get("JAX_COMPILATION_CACHE_DIR") else "none",
        },
        "frameworks": {
            name: {
                "versions": hello["environment"],
                "python": hello["python"],
                "default_switches": hello["default_switches"],
                "variables": hello["variables"],
            }
            for name, hello in workers.items()
        },
    }


def environment_id(found: Mapping[str, Any]) -> str:
    """The id of a fingerprint."""
    return digest(found)
