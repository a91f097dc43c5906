"""Cells handed to a real dask cluster of two worker processes, each of which owns one (invented) device."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.measure import sweep
from bench.measure.request import EngineError
from bench.store import read_environments, read_records
from bench.tests.fake_worker import start

distributed = pytest.importorskip("distributed", reason="the dask engine needs distributed; install the extra `dask`")
WORKLOADS = ("article-base", "article-n8", "article-in256", "article-out256")


def _give_device(log, dask_worker):
    """Runs in each dask worker: its framework processes are fakes that name a device after it and log their cells."""
    sweep.starter = lambda *args, **kwargs: start
    os.environ["FAKE_DEVICE"] = f"device of {dask_worker.name}"
    os.environ["FAKE_LOG"] = str(log)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Address of a scheduler with two owners of a device, and the log of the cells that they open."""
    log = tmp_path_factory.mktemp("cluster") / "log"
    options = {"processes": True, "threads_per_worker": 2, "dashboard_address": ":0"}
    with (
        distributed.LocalCluster(n_workers=2, resources={"DEVICE": 1}, **options) as found,
        distributed.Client(found, set_as_default=False) as client,
    ):
        client.run(_give_device, log)
        yield found.scheduler_address, log


def run(address, out, *more, workloads=WORKLOADS):
    arguments = ["run", "--preset", "smoke", "--rounds", "2", "--engine", "dask", "--scheduler", address]
    arguments += ["--implementation", "matmul", "--implementation", "fast", "--out", str(out), *more]
    for name in workloads:
        arguments += ["--workload", name]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    address, log = cluster
    out = tmp_path_factory.mktemp("engine") / "run"
    first = run(address, out, "--replicates", "2", workloads=WORKLOADS[:3])
    assert first.exit_code == 0, first.output + first.stderr
    before = (out / "records.jsonl").read_bytes()
    opened = log.read_text().splitlines()
    again = run(address, out, "--replicates", "2", "--resume")
    assert again.exit_code == 0, again.output + again.stderr
    return out, before, opened, log.read_text().splitlines()


def test_every_cell_is_measured_once_in_every_replicate(finished):
    records = read_records(finished[0])
    cells = Counter((r.workload, r.direction, r.process_replicate) for r in records if r.baseline and not r.control)
    assert len(cells) == len(WORKLOADS) * 2 * 2
    assert set(cells.values()) == {1}
    assert {record.status for record in records} == {"ok"}
    assert len({record.key for record in records}) == len(records)
    # Both replicates of a cell belong to one comparison, on one device.
    assert len({record.cell for record in records}) == len(WORKLOADS) * 2
    # What is no speed is measured in the first.
    assert {(r.process_replicate, r.peak_memory_bytes is None) for r in records} == {(0, False), (1, True)}


def test_both_devices_worked_and_their_records_stay_apart(finished):
    out = finished[0]
    environments = read_environments(out)
    devices = {
        identity: found["frameworks"]["torch"]["versions"]["device_name"] for identity, found in environments.items()
    }
    assert len(devices) == len(set(devices.values())) == 2
    for cell in {record.cell for record in read_records(out)}:
        assert len({record.environment_id for record in read_records(out) if record.cell == cell}) == 1
    assert {record.environment_id for record in read_records(out)} == set(devices)
    # Machines of one kind are told apart by their names.
    assert all(found["machine"] for found in environments.values())


def test_a_resumed_run_repeats_nothing_and_adds_what_is_missing(finished):
    out, before, opened, opened_after = finished
    assert (out / "records.jsonl").read_bytes().startswith(before)
    added = opened_after[len(opened) :]
    assert {line.split()[0] for line in added} == {WORKLOADS[3]}
    assert len(added) == 2 * 2 * 2  # directions, replicates, frameworks


def test_framework_processes_stay_for_the_next_cell_and_another_effort_is_measured_anew(cluster, tmp_path):
    address, log = cluster
    out = tmp_path / "run"
    lines = [len(log.read_text().splitlines()) if log.exists() else 0]

    def opened(*more):
        """How many times a framework process opened a cell for one more run."""
        assert run(address, out, *more).exit_code == 0
        lines.append(len(log.read_text().splitlines()))
        return lines[-1] - lines[-2]

    every = len(WORKLOADS) * 2 * 2
    assert opened() == every
    records = read_records(out)
    assert len({record.cell for record in records}) == len(WORKLOADS) * 2
    processes = {(record.framework, record.switches["pid"]) for record in records}
    # One process of each framework for each worker that got a cell.
    assert len(processes) == 2 * len({record.environment_id for record in records})
    assert opened("--resume") == 0
    assert opened("--resume", "--rounds", "3") == every
    assert len({record.cell for record in read_records(out)}) == 2 * len(WORKLOADS) * 2


def test_a_budget_hands_out_what_it_reaches_for_and_says_what_it_leaves(cluster, tmp_path):
    address, _ = cluster
    out = tmp_path / "run"
    short = run(address, out, "--replicates", "2", "--budget-s", "4", workloads=WORKLOADS[:2])
    assert short.exit_code == 1
    assert "the budget ended before a worker had measured a cell" in short.stderr
    assert f"Left out, forward, fp32, matched, process 0, 1: {', '.join(WORKLOADS[:2])}." in short.stdout
    long = run(address, out, "--replicates", "2", "--budget-s", "600", "--resume", workloads=WORKLOADS[:2])
    assert long.exit_code == 0, long.output + long.stderr
    assert "Left out" not in long.output
    records = read_records(out)
    # Each process is a job of its own, the first of every cell before the second of any.
    assert Counter(r.process_replicate for r in records if r.baseline and not r.control) == {0: 4, 1: 4}
    assert len({record.key for record in records}) == len(records)


def test_wrong_usage_is_one_sentence(cluster, tmp_path, monkeypatch):
    address, _ = cluster
    monkeypatch.setattr("bench.measure.cluster._CONNECT_S", 1)
    wrong = run(address, tmp_path / "a", "--implementation", "nothing", workloads=WORKLOADS[:1])
    assert wrong.exit_code == 2
    assert "implementation: nothing is called nothing" in wrong.stderr
    nobody = run("tcp://127.0.0.1:9", tmp_path / "b")
    assert nobody.exit_code == 2
    assert "scheduler: nothing answers at 'tcp://127.0.0.1:9'" in nobody.stderr
    for arguments in (["--engine", "dask"], ["--scheduler", address]):
        alone = CliRunner().invoke(app, ["run", "--out", str(tmp_path / "c"), *arguments])
        assert alone.exit_code == 2
        assert "--scheduler: expected with --engine dask, and only there" in alone.stderr
    other = CliRunner().invoke(app, ["run", "--out", str(tmp_path / "d"), "--engine", "spark"])
    assert other.exit_code == 2
    assert "--engine: expected one of local, dask, got 'spark'" in other.stderr


def test_a_cluster_without_devices_is_refused_with_what_to_start(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.measure.cluster.RESOURCE", "TELESCOPE")
    refused = run(cluster[0], tmp_path / "run")
    assert refused.exit_code == 2
    assert "none of the 2 workers" in refused.stderr
    assert "--nthreads 1 --resources TELESCOPE=1" in refused.stderr


@pytest.mark.parametrize(
    ("owners", "limit", "sentence"),
    [
        ([], "_WITHOUT_OWNER_S", "1 cells are left, and no worker has offered a device for"),
        ([{"resources": {"DEVICE": 1}}], "_SILENCE_S", "1 cells are left, and none has arrived for"),
    ],
)
def test_cells_that_nobody_brings_are_not_waited_for_for_ever(monkeypatch, owners, limit, sentence):
    from bench.measure import cluster as dask

    class Silent:
        def scheduler_info(self, n_workers):
            return {"workers": dict(enumerate(owners))}

    def nothing(futures, timeout, return_when):
        raise TimeoutError

    monkeypatch.setattr(dask, "wait_for", nothing)
    monkeypatch.setattr(dask, limit, 0.0)
    with pytest.raises(EngineError, match=sentence):
        list(dask._arrivals(Silent(), [object()]))


def test_without_its_package_the_engine_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['distributed'] = None; from bench.__main__ import app; app()"
    command = [sys.executable, "-c", code, "run", "--out", tmp_path / "run", "--engine", "dask", "--scheduler", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--engine: dask needs the package distributed; install the extra `dask`." in done.stderr
