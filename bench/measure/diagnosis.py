"""What `bench doctor` finds: the things that spoil a measurement or a set-up without an error."""

import os
from collections.abc import Mapping
from typing import Any

from bench.measure.conditions import monitor_for
from bench.measure.environment import git_state, source_digest
from bench.measure.processors import allowed_cpus, cpu_features, cpu_model
from bench.measure.switches import sentences
from bench.plan.cells import DIVISIONS

_BUSY_LOAD_PER_CPU = 0.5


def warnings_for(hello: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str]) -> list[str]:
    """One sentence for each thing that a user should mend or know.

    Args:
        hello: per framework, its worker's reply.
        missing: per framework that is not installed, why.
    """
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
    """One sentence for each thing about a GPU that would spoil a measurement.

    Args:
        conditions: what its monitor reads, before anything runs on it.
        own: workers that may have touched the GPU already; whatever is beyond these is somebody else's.
    """
    said = []
    others = conditions.get("processes", 0) - own
    if others > 0:
        said.append(f"{others} other processes use the GPU: their work is measured too; wait until they have ended.")
    for kind, advice in (("thermal", "let it cool down"), ("power_capped", "expect rows that are labelled so")):
        if conditions.get(kind):
            said.append(f"The GPU holds its clocks down ({', '.join(conditions[kind])}); {advice}.")
    return said


def diagnose(hello: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str]) -> dict[str, Any]:
    """Everything that `bench doctor` shows, as a JSON object.

    Args:
        hello: per framework, its worker's reply.
        missing: per framework that is not installed, why.
    """
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
        "frameworks": {
            name: {
                "python": reply["python"],
                "devices": list(reply["devices"]),
                "versions": reply["environment"],
                "default_switches": reply["default_switches"],
                "variables": reply["variables"],
            }
            for name, reply in hello.items()
        },
        "missing": dict(missing),
        "gpu": gpu,
        "warnings": [*late, *warnings_for(hello, missing), *gpu_warnings(gpu, with_gpu)],
    }
