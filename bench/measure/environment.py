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

_MEASURED = ("torch_impl", "jax_impl", "parity_tests/harness", "bench/measure", "bench/plan")
_GPU_FIELDS = "name,uuid,driver_version,power.limit,clocks.max.sm,clocks.max.mem,mig.mode.current,ecc.mode.current"

# Tells machines of one kind apart; set by the engine that uses several. A name of its own that a machine changes with
# every start, as containers do, would make a resumed run measure everything again.
MACHINE_VARIABLE = "PARTITIONED_LINEAR_BENCH_MACHINE"


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is not installed or refuses."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def git_state() -> dict[str, Any]:
    """Commit and whether tracked files differ from it; both None outside a git checkout."""
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if commit is None or changes is None else bool(changes)}


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
        workers: per framework, its reply to ``hello``.
        device: ``cpu`` or ``cuda``.
        division: ``stock`` or ``matched``.
        cpus: the processors that the workers may use.

    Returns:
        A JSON object; ``digest`` of it is the environment's id.
    """
    gpu = _output("nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader") if device == "cuda" else None
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
        "gpus": None if gpu is None else gpu.splitlines(),
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
