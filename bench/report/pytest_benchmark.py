"""Records in the file format of pytest-benchmark, so that its `compare` command and tools built on it read them.

Every competitor of every cell becomes one benchmark; a block counts as one round of `calls_per_block` iterations.
A competitor without a right answer has no time and is left out, as pytest-benchmark leaves out a failed test.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.records import SCHEMA_VERSION, Record
from bench.report.export import SHARED
from bench.report.output import write_text
from bench.store import Archive
from bench.study.pairing import by_label
from bench.study.statistics import tukey_outliers
from parity_tests.report.text import json_text


def _stats(seconds: np.ndarray, iterations: int) -> dict[str, Any]:
    low, middle, high = (float(value) for value in np.quantile(seconds, [0.25, 0.5, 0.75]))
    deviation = float(seconds.std(ddof=1)) if len(seconds) > 1 else 0.0
    mean = float(seconds.mean())
    extreme = tukey_outliers(seconds.tolist())
    fences = (low - 1.5 * (high - low), high + 1.5 * (high - low))
    inside = seconds[(seconds >= fences[0]) & (seconds <= fences[1])]
    beyond = int((np.abs(seconds - mean) > deviation).sum())
    return {
        "min": float(seconds.min()),
        "max": float(seconds.max()),
        "mean": mean,
        "stddev": deviation,
        "rounds": len(seconds),
        "median": middle,
        "iqr": high - low,
        "q1": low,
        "q3": high,
        "iqr_outliers": extreme,
        "stddev_outliers": beyond,
        "outliers": f"{beyond};{extreme}",
        "ld15iqr": float(inside.min()),
        "hd15iqr": float(inside.max()),
        "ops": 1 / mean,
        "total": float(seconds.sum()),
        "data": seconds.tolist(),
        "iterations": iterations,
    }


def _benchmark(group: Sequence[Record]) -> dict[str, Any] | None:
    """One competitor in one cell, all process replicates together; None without a right answer."""
    if any(record.status != "ok" for record in group):
        return None
    first = group[0]
    conditions = (first.workload, first.direction, first.optimizer, first.precision, first.division, first.cache)
    cell = "-".join(part for part in (*conditions, first.device) if part not in (None, "warm"))
    seconds = np.concatenate([np.array(r.block_latency_s) / (r.calls_per_block or 1) for r in group])
    params = {name: getattr(first, name) for name in SHARED}
    params |= {name: getattr(first, name) for name in ("framework", "implementation", "mode")}
    return {
        "group": cell,
        "name": f"{cell}[{first.label}]",
        "fullname": f"bench/{first.environment_id}::{cell}[{first.label}]",
        "params": params,
        "param": first.label,
        "extra_info": {"observed_precision": first.observed_precision, "bound_fraction": first.bound_fraction},
        "options": {"disable_gc": True, "timer": "perf_counter", "min_rounds": 1, "warmup": True},
        "stats": _stats(seconds, first.calls_per_block or 1),
    }


def _machine(archive: Archive) -> dict[str, Any]:
    """The machine of the first environment; all fingerprints are beside it, since pytest-benchmark knows only one."""
    first = next(iter(archive.environments.values()))
    python = next((framework.get("python") for framework in first["frameworks"].values()), "")
    return {
        "node": "",
        "machine": str(first["system"]).rsplit(" ", 1)[-1],
        "system": str(first["system"]).split(" ", 1)[0],
        "release": "",
        "processor": "",
        "python_version": str(python),
        "python_implementation": "CPython",
        "cpu": {"brand_raw": first["cpu_model"], "count": first.get("cpu_count")},
        "environments": archive.environments,
    }


def _pieces(archive: Archive) -> Iterator[str]:
    first, started = None, ""
    commit: dict[str, Any] = {"id": None, "time": None, "dirty": None, "branch": None}
    for fingerprint in archive.environments.values():
        git = fingerprint.get("git") or {}
        commit |= {"id": git.get("commit"), "dirty": git.get("dirty")}
        break
    yield '{"machine_info": ' + json_text(_machine(archive))
    yield ', "commit_info": ' + json_text(commit) + ', "benchmarks": ['
    for group in archive.cells():
        for competitor in by_label(group).values():
            benchmark = _benchmark(competitor)
            started = max(started, competitor[0].started_at)
            if benchmark is not None and all(math.isfinite(value) for value in benchmark["stats"]["data"]):
                yield ("\n" if first is None else ",\n") + json_text(benchmark)
                first = benchmark
    yield f'\n], "datetime": {json_text(started)}, "version": "bench-{SCHEMA_VERSION}"}}\n'


def write_pytest_benchmark(path: Path, archive: Archive) -> None:
    """Writes the records as pytest-benchmark's JSON, one competitor at a time.

    Raises:
        OutputError: if it cannot be written.
    """
    write_text("--pytest-benchmark", path, _pieces(archive))
