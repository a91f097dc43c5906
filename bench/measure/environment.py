"""The fingerprint of the place of a measurement, and the warnings of `bench doctor` about it."""

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from bench.measure.machine import allowed_cpus, cpu_features, cpu_model, governor, monitor_for
from bench.measure.switches import sentences, unset_for
from bench.measure.workers import CHECKOUT
from bench.plan.cells import DIVISIONS
from bench.records import HARNESS_VERSION

_MEASURED = (
    "torch_impl",
    "jax_impl",
    "parity_tests/judge",
    "parity_tests/training",
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
_BUSY_LOAD_PER_CPU = 0.5


def _output(*command: str) -> tuple[str | None, str]:
    """Run a command that describes this place.

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
    """Return the commit, and `dirty` if tracked files differ from it; `unknown` says why git gave no answer."""
    commit, late = _output("git", "rev-parse", "HEAD")
    changes, later = (None, "") if late else _output("git", "status", "--porcelain", "--untracked-files=no")
    state = {"commit": commit, "dirty": None if commit is None or changes is None else bool(changes)}
    return state | ({"unknown": late or later} if late or later else {})


def _gpus() -> list[str] | None:
    """Return a line for each GPU of the driver, or one that says why there is none; None without nvidia-smi."""
    found, late = _output("nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader")
    return [late] if late else None if found is None else found.splitlines()


def source_digest() -> str:
    """Hash the source that is measured and that measures: a change of either makes new records."""
    state = hashlib.blake2b(digest_size=8)
    for folder in _MEASURED:
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            state.update(str(path.relative_to(CHECKOUT)).encode())
            state.update(path.read_bytes())
    return state.hexdigest()


def fingerprint(
    workers: Mapping[str, Mapping[str, Any]], *, device: str, division: str, cpus: Sequence[int]
) -> dict[str, Any]:
    """Collect the facts that a measurement depends on, and nothing that changes from minute to minute.

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
        "frameworks": {name: _framework(hello) for name, hello in workers.items()},
    }


def _framework(hello: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "versions": hello["environment"],
        "python": hello["python"],
        "default_switches": hello["default_switches"],
        "variables": hello["variables"],
        "large_pages": hello["large_pages"],
    }


def warnings_for(hello: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str]) -> list[str]:
    """Return one sentence for each thing that a user should mend or know."""
    said = [f"{framework} cannot take part: {reason}." for framework, reason in missing.items()]
    for framework, reply in hello.items():
        packages: Mapping[str, list[str]] = reply["cuda_packages"]
        if len(packages) > 1:
            shown = "; ".join(f"CUDA {major}: {', '.join(names[:3])}" for major, names in packages.items())
            said.append(
                f"Packages of several CUDA majors are installed for {framework}'s interpreter and overwrite each "
                f"other's files ({shown}); use a fresh environment with the extra cuda12 or cuda13."
            )
    with_gpu = [framework for framework, reply in hello.items() if "cuda" in reply["devices"]]
    if with_gpu and len(with_gpu) < len(hello):
        said.append(f"Only {with_gpu[0]} sees a GPU: the frameworks can be compared on the CPU only.")
    cpus = len(allowed_cpus()) or os.cpu_count() or 1
    said += sentences(tuple(hello), len(allowed_cpus()))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > _BUSY_LOAD_PER_CPU * cpus:
        said.append(f"The machine is busy: load {load:.1f} on {cpus} processors; intervals will be wide.")
    return said


def gpu_warnings(conditions: Mapping[str, Any], own: int) -> list[str]:
    """Return one sentence for each thing about a GPU that would spoil a measurement; `own` workers may use it."""
    said = []
    others = conditions.get("processes", 0) - own
    if others > 0:
        said.append(f"{others} other processes use the GPU: their work is measured too; wait until they have ended.")
    for kind, advice in (("thermal", "let it cool down"), ("power_capped", "expect rows that are labelled so")):
        if conditions.get(kind):
            said.append(f"The GPU holds its clocks down ({', '.join(conditions[kind])}); {advice}.")
    return said


def diagnose(hello: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that `bench doctor` shows, as a JSON object."""
    environments = [reply["environment"] for reply in hello.values()]
    with_gpu = sum("cuda" in reply["devices"] for reply in hello.values())
    uuid = next((found["device_uuid"] for found in environments if "device_uuid" in found), None)
    gpu = dict(monitor_for("cuda" if with_gpu else "cpu", uuid).read())
    git = git_state()
    late = [f"{git['unknown']}: records of this place would not say what was measured."] if "unknown" in git else []
    return {
        "cpu_model": cpu_model(),
        "cpu_features": list(cpu_features()),
        "cpu_count": os.cpu_count(),
        "affinity": list(allowed_cpus()),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "git": git,
        "source_digest": source_digest(),
        "divisions": list(DIVISIONS),
        "cuda_packages": {name: reply["cuda_packages"] for name, reply in hello.items()},
        "frameworks": {name: {"devices": list(reply["devices"]), **_framework(reply)} for name, reply in hello.items()},
        "missing": dict(missing),
        "gpu": gpu,
        "warnings": [*late, *warnings_for(hello, missing), *gpu_warnings(gpu, with_gpu)],
    }
