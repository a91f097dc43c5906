"""Faults of workers and disks, each really brought about: kill -9, no memory, no end, wrong answers, full disks."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.measure import environment, workers
from bench.measure.environment import diagnose
from bench.measure.machine import free_bytes
from bench.measure.request import Request, SweepNotes
from bench.measure.sweep import run_sweep
from bench.measure.workers import RequestError, WorkerProcess, worker_environment
from bench.plan.presets import PRESETS
from bench.store import Store, read_records
from bench.study import results as study_results
from bench.tests.conftest import file_size_limit
from bench.tests.fake_worker import GOOD
from bench.tests.fake_worker import start as fake
from bench.tests.killed_runs import whole_cells

LIMITS = replace(PRESETS["smoke"].limits, unrolled_products=1000, prepare_s=2.0, request_s=2.0)
PRESET = replace(
    Request(workload=("article-base", "article-n8"), direction=("forward",), rounds=3).plan,
    limits=LIMITS,
    compiled={},
)


def script(folder, text):
    """Writes a program that can be named as an interpreter; `$@` are its arguments."""
    path = folder / "python"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def limited(folder, virtual_kib):
    """An interpreter under a limit of its memory."""
    return script(folder, f'ulimit -v {virtual_kib}; exec {sys.executable} "$@"\n')


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs a sweep over two workloads and returns the records of each by competitor, the control as `again`."""

    def run(start, *names, frameworks=("torch",), preset=PRESET):
        monkeypatch.setattr("bench.measure.sweep.starter", lambda *args, **kwargs: start)
        monkeypatch.setattr("bench.measure.request.PRESETS", {"smoke": preset})
        request = Request(device="cpu", framework=frameworks, implementation=(*GOOD, *names))
        run_sweep(request, Store(tmp_path / "run", resume=False), SweepNotes())
        found = {name: {} for name in preset.workloads}
        for record in read_records(tmp_path / "run"):
            name = f"{record.implementation} again" if record.control else record.implementation
            found[record.workload][record.framework, name] = record
        return list(found.values())

    return run


# --- a worker ---


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("hang-in-block", "timeout", "no answer within 2 s"),
        ("wrong", "mismatch", "before timing: y is wrong"),
        ("wrong-later", "mismatch", "after timing: y is wrong"),
    ],
)
def test_a_worker_that_sleeps_for_ever_or_answers_wrongly_ends_its_competitor_and_the_sweep_goes_on(
    measured, name, status, reason
):
    for found in measured(fake, name):
        assert found["torch", name].status == status
        assert reason in found["torch", name].reason
        assert {found["torch", good].status for good in GOOD} == {"ok"}


def test_a_worker_that_allocates_without_end_under_a_limit_ends_its_competitor_as_oom(measured, tmp_path):
    # Filling a gigabyte takes a busy machine longer than any of the other limits here.
    patient = replace(PRESET, limits=replace(LIMITS, prepare_s=60.0, request_s=60.0))
    for found in measured(partial(fake, python=limited(tmp_path, 2**20)), "allocate-without-end", preset=patient):
        greedy = found["torch", "allocate-without-end"]
        assert greedy.status == "oom"
        assert "MemoryError" in greedy.reason
        assert {found["torch", good].status for good in GOOD} == {"ok"}


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_killed_from_outside_while_it_times_ends_one_competitor_as_crash(measured, seed):
    blocks = iter(range(1000))
    moment = random.Random(seed).randrange(12)

    class Victim(WorkerProcess):
        def send(self, message):
            if message["operation"] == "block" and next(blocks) == moment:
                os.kill(self.pid, signal.SIGKILL)
            super().send(message)

    first, second = measured(lambda framework: fake(framework, Victim))
    ended = {name: record for (_, name), record in first.items() if record.status != "ok"}
    # The control is the baseline's own call, timed again: it cannot outlive it.
    assert len(ended) == 1 or set(ended) == {"matmul", "matmul again"}
    assert {record.status for record in ended.values()} == {"crash"}
    assert any("signal SIGKILL" in record.reason for record in ended.values())
    assert {record.status for record in second.values()} == {"ok"}


def test_a_kill_by_the_kernel_for_want_of_memory_is_told_from_another(tmp_path, monkeypatch):
    counters = tmp_path / "vmstat"
    counters.write_text("nr_free_pages 7\noom_kill 3\n")
    monkeypatch.setattr(workers, "_KERNEL_COUNTERS", counters)
    ends = []
    for kills in (3, 4):
        worker = fake("torch")
        counters.write_text(f"nr_free_pages 7\noom_kill {kills}\n")
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(RequestError) as error:
            worker.request({"operation": "hello"}, 5.0)
        ends.append((error.value.status, "sent by the kernel because memory ran out" in str(error.value)))
        worker.close()
    assert ends == [("crash", False), ("oom", True)]


def test_a_real_worker_without_memory_for_one_workload_measures_the_next(measured, monkeypatch, tmp_path):
    """Not invented: torch draws arrays that its process may not hold, says so, and goes on."""
    pytest.importorskip("torch", reason="needs torch")
    if free_bytes() < 17 * 2**30:
        pytest.skip("17 GiB of free memory are needed, so that nothing but the limit of the process is in the way")

    def start(framework):
        environment = worker_environment(framework, device="cpu", division="matched", cpus=())
        return WorkerProcess(framework, environment, python=limited(tmp_path, 8 * 2**20))

    monkeypatch.setattr(sys.modules[__name__], "GOOD", ("matmul",))
    # One billion weights: eight gigabytes while they are drawn.
    preset = replace(PRESET, workloads=("sweep-b1-n1-i32768-o32768", "article-batch-1"), rounds=1, probe_s=0.0)
    preset = replace(preset, limits=PRESETS["smoke"].limits)
    large, small = measured(start, preset=preset)
    assert large["torch", "matmul"].status == "oom"
    assert "MemoryError" in large["torch", "matmul"].reason
    assert small["torch", "matmul"].status == "ok"


_KILLED = """
import tempfile, time
from bench.tests.fake_worker import start as fake
worker = fake("torch")
assert worker.request({"operation": "hello"}, 60.0)["ok"]
print(worker._scratch.name, flush=True)
time.sleep(3600)
"""


def test_the_folder_of_a_worker_whose_coordinator_was_killed_goes_with_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = [sys.executable, "-c", _KILLED]
    environment = os.environ | {"PYTHONPATH": str(workers.CHECKOUT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        left = run.stdout.readline().strip()
        again = fake("torch")
        assert sorted(os.listdir(tmp_path)) == sorted(map(os.path.basename, (left, again._scratch.name)))
        run.kill()
    last = fake("torch")
    assert sorted(os.listdir(tmp_path)) == sorted(os.path.basename(worker._scratch.name) for worker in (again, last))
    again.close()
    last.close()
    assert os.listdir(tmp_path) == []


# --- the disk ---


@pytest.fixture
def command_line(monkeypatch):
    """Calls `bench run` with a fake worker; returns the result and how many workers were started."""

    def call(out, *more):
        started = []

        def start(framework):
            started.append(framework)
            return fake(framework)

        monkeypatch.setattr("bench.measure.sweep.starter", lambda *args, **kwargs: start)
        arguments = ["run", "--preset", "smoke", "--rounds", "2", "--framework", "torch", "--direction", "forward"]
        arguments += ["--implementation", "matmul", "--out", str(out), *more]
        return CliRunner().invoke(app, arguments, catch_exceptions=False), len(started)

    return call


def test_a_disk_that_takes_nothing_is_reported_before_measuring(tmp_path, command_line):
    with file_size_limit(0):
        result, workers = command_line(tmp_path / "run")
    assert (result.exit_code, workers) == (2, 0)
    assert f"cannot be written ({os.strerror(errno.EFBIG)}); choose another --out" in result.stderr


def test_a_full_disk_is_reported_before_measuring(tiny_disk, command_line):
    with pytest.raises(OSError, match="No space left"):
        (tiny_disk / "ballast").write_bytes(bytes(2**20))
    result, workers = command_line(tiny_disk / "run")
    assert (result.exit_code, workers) == (2, 0)
    assert "cannot be written (No space left on device); choose another --out" in result.stderr


def test_a_read_only_disk_is_reported_before_measuring(tiny_disk, command_line):
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    result, workers = command_line(tiny_disk / "run")
    assert (result.exit_code, workers) == (2, 0)
    assert "cannot be written (Read-only file system); choose another --out" in result.stderr


def test_a_disk_that_fills_while_measuring_keeps_whole_cells_and_the_run_resumes(tmp_path, command_line):
    out = tmp_path / "run"
    assert command_line(out, "--workload", "article-base")[0].exit_code == 0
    room = (out / "records.jsonl").stat().st_size
    three = [part for name in ("article-base", "article-n8", "article-batch-1") for part in ("--workload", name)]
    # Smaller cells follow, since nothing is compiled in them: one fits, the next one does not.
    with file_size_limit(2 * room):
        full, _ = command_line(out, *three, "--resume")
    assert full.exit_code == 2
    assert "cannot be written any more" in full.stderr
    # Part of a cell may be there: it is set aside when the run resumes.
    _, whole = whole_cells((out / "records.jsonl").read_text().splitlines(keepends=True))
    assert whole == {"article-base forward", "article-n8 forward"}
    resumed, _ = command_line(out, *three, "--resume")
    assert resumed.exit_code == 0, resumed.output
    records = read_records(out)
    assert {record.workload for record in records} == {"article-base", "article-n8", "article-batch-1"}
    assert {record.status for record in records} == {"ok"}
    assert len({record.key for record in records}) == len(records)


# --- processes that are waited for ---


def test_a_worker_that_floods_its_output_still_answers_and_its_children_end_with_it(tmp_path):
    (tmp_path / "flooding.py").write_text(
        "import os, subprocess, sys, time\n"
        "def main(channel, framework):\n"
        "    channel.receive()\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    os.write(2, b'x' * 2**22)\n"
        "    os.write(2, b'\\nthe last words \\x1b[2J')\n"
        "    channel.send({'ok': True, 'child': child.pid})\n"
        "    time.sleep(600)\n"
    )
    worker = WorkerProcess("torch", os.environ | {"PYTHONPATH": str(tmp_path)}, module="flooding")
    try:
        reply = worker.request({"operation": "hello"}, 60)
        os.kill(reply["child"], 0)
        with pytest.raises(RequestError, match=r"no answer within 0.2 s; it printed the last words \\x1b\[2J") as error:
            worker.request({"operation": "hello"}, 0.2)
        assert error.value.status == "timeout"
        assert not worker.alive
        status = Path(f"/proc/{reply['child']}/stat")
        for _ in range(200):
            if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.02)
        else:
            raise AssertionError("what the worker started is still there")
    finally:
        worker.close()


def test_a_worker_that_never_starts_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "START_S", 0.2)

    def start(framework):
        return WorkerProcess(framework, os.environ, python=script(tmp_path, "exec sleep 600\n"))

    with pytest.raises(RequestError, match=r"the torch worker: no answer within 0.2 s"):
        workers.WorkerPool(start, ("torch",))


@pytest.mark.parametrize("command", ["git", "nvidia-smi"])
def test_a_command_that_hangs_is_told_in_the_fingerprint(tmp_path, monkeypatch, command):
    program = tmp_path / command
    program.write_text("#!/bin/sh\nsleep 5 &\nwait\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(environment, "_COMMAND_S", 0.2)
    found = environment.fingerprint({}, device="cuda", division="matched", cpus=())
    if command == "git":
        assert found["git"]["commit"] is None
        assert found["git"]["unknown"] == "git rev-parse gave no answer within 0.2 s"
        assert diagnose({}, {})["warnings"][0].startswith("git rev-parse gave no answer within 0.2 s")
    else:
        assert found["gpus"][0].startswith("nvidia-smi --query-gpu=")
        assert found["gpus"][0].endswith("gave no answer within 0.2 s")


def hanging_elsewhere(own, cells, stop=None):
    if os.getpid() != own:
        time.sleep(600)
    return [*cells], Counter()


def test_processes_that_rank_for_too_long_are_ended_and_their_work_is_done_here(monkeypatch):
    for name, value in {"_TASK_S": 0.5, "_MANY_CELLS": 1, "_CELLS_A_TASK": 2}.items():
        monkeypatch.setattr(study_results, name, value)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    rank = partial(hanging_elsewhere, os.getpid())
    ranked = study_results._in_parts(range(3), rank, lambda: False)
    assert [cells for cells, _ in ranked] == [[0, 1], [2]]
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []
