import resource
import subprocess
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.plan.cells import Cell
from bench.plan.costs import compulsory_bytes, useful_flops
from bench.plan.workloads import Workload
from bench.records import SCHEMA_VERSION, Record
from bench.tests.fake_worker import start


def pytest_addoption(parser):
    parser.addoption(
        "--whole-sweep",
        action="store_true",
        help="plan, store, resume and report a sweep of 10,000 cells too (some 30 seconds of processor)",
    )
    parser.addoption(
        "--simulated-cells",
        type=int,
        default=0,
        metavar="N",
        help="simulate N cells for each kind of noise, of rounds and of processes, and compare their verdicts with "
        "the tables of bench/tests/simulated_cells.md, which are of 1000 (five minutes of processor)",
    )
    parser.addoption(
        "--busy-runs",
        type=int,
        default=0,
        metavar="N",
        help="time a real cell N times beside one process that computes without end, and N times beside one for each "
        "processor (a minute for each; wants a machine that is otherwise idle)",
    )


def example_record(**changes):
    """Builds a valid record; keyword arguments replace fields."""
    values = {
        "schema_version": SCHEMA_VERSION,
        "key": "k0",
        "cell": "c0",
        "cell_size": 1,
        "workload": "article-base",
        "num_partitions": 32,
        "in_features": 32,
        "out_features": 32,
        "batch": 128,
        "dtype": "float32",
        "device": "cpu",
        "framework": "torch",
        "implementation": "matmul",
        "kind": "implementation",
        "mode": "eager",
        "direction": "forward",
        "division": "matched",
        "precision": "ieee_fp32",
        "observed_precision": "ieee_fp32",
        "layout": "contiguous",
        "cache": "warm",
        "status": "ok",
        "reason": "",
        "skipped": False,
        "block_latency_s": (0.02, 0.021, 0.0202, 0.0209),
        "calls_per_block": 10,
        "latency_s": 0.00205,
        "rejected_block_latency_s": (),
        "warm_up_block_latency_s": (0.03,),
        "compile_s": None,
        "peak_memory_bytes": 4096,
        "memory_method": "resident_high_water",
        "static_memory_bytes": None,
        "bound_fraction": 0.2,
        "parity": {"y": {"status": "ok", "bound_fraction": 0.2, "max_abs_error": 1e-7}},
        "waste_factor": 1,
        "process_replicate": 0,
        "control": False,
        "baseline": False,
        "seed": 0,
        "inputs_digest": "d",
        "switches": {},
        "started_at": "2026-01-01T00:00:00+00:00",
        "environment_id": "1",
    }
    values |= changes
    if {"useful_flops", "compulsory_bytes"} <= changes.keys():
        return Record(**values)
    sizes = (values[name] for name in ("batch", "num_partitions", "in_features", "out_features"))
    conditions = (values[name] for name in ("direction", "precision", "division", "device"))
    cell = Cell(Workload(values["workload"], *sizes, source=""), *conditions)
    return Record(**({"useful_flops": useful_flops(cell), "compulsory_bytes": compulsory_bytes(cell)} | values))


@pytest.fixture
def make_record():
    return example_record


@pytest.fixture
def fake_starter():
    """Starts workers that need no framework; see `fake_worker.py`."""

    return start


@pytest.fixture
def fake_pool(monkeypatch, fake_starter):
    """Lets the commands talk to workers that need no framework."""
    monkeypatch.setattr("bench.measure.sweep.starter", lambda *args, **kwargs: fake_starter)
    monkeypatch.setattr("bench.commands.inspect.starter", lambda *args, **kwargs: fake_starter)


@pytest.fixture
def call():
    """Runs a command of the benchmark in this process."""

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

    return invoke


@contextmanager
def file_size_limit(size):
    """No file of this process and its children grows beyond `size`, as on a disk that is full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of a few pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command here; a limit of the file size stands in for a full disk")
    if done.returncode:
        pytest.skip("no right to mount a file system here; a limit of the file size stands in for a full disk")
    yield disk
    subprocess.run(["umount", disk], check=True)
