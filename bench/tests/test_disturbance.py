"""A busy machine: what is measured of it, what a cell does about it, and what verdict it leaves."""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.measure import disturbance
from bench.measure.disturbance import BusyError, Gate, Usage, Watch, _Process, stretch, usage
from bench.measure.machine import allowed_cpus
from bench.study.cells import DISTURBED, disturbed_window, is_disturbed
from bench.study.statistics import FASTER, SAME, SLOWER
from bench.tests.in_memory import rankings, report, results_of, summary
from bench.tests.synthetic import FINGERPRINT

needs_accounts = pytest.mark.skipif(
    usage({}, allowed_cpus()) is None, reason="this system has no /proc with accounts of its processors"
)


@pytest.fixture
def hog():
    """A process that computes without end."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process
    process.kill()
    process.wait()


def spent(pid, before, after):
    return after.own[pid].ran_s - before.own[pid].ran_s


@needs_accounts
def test_what_a_process_takes_counts_as_that_of_others_unless_it_is_ours(hog):
    cpus = allowed_cpus()
    before = usage({"hog": hog.pid}, cpus)
    deadline = time.monotonic() + 60
    while spent("hog", before, after := usage({"hog": hog.pid}, cpus)) < 0.3 and time.monotonic() < deadline:
        time.sleep(0.05)
    took = spent("hog", before, after)
    assert took >= 0.3
    ours = disturbance._between(before, after)
    without = {name: process for name, process in before.own.items() if name != "hog"}
    foreign = disturbance._between(
        Usage(before.at_s, before.busy_s, before.steal_s, without),
        Usage(after.at_s, after.busy_s, after.steal_s, {name: after.own[name] for name in without}),
    )
    difference = foreign["other_cpus"] - ours["other_cpus"]
    # Ticks of ten milliseconds on each processor, against an exact account of the process.
    assert difference * ours["seconds"] == pytest.approx(took, abs=0.02 * (1 + len(cpus)))
    assert set(ours["waiting"]) == {"hog"}


@needs_accounts
def test_a_process_that_has_ended_has_no_account():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert usage({"gone": done.pid}, allowed_cpus()).own["gone"] == _Process(0.0, 0.0, 0)


def test_the_loop_leaves_the_processors_as_they_were():
    cpus = allowed_cpus()
    if not cpus:
        pytest.skip("this system does not say which processors a process may use")
    assert stretch(cpus) >= 1.0
    assert allowed_cpus() == cpus
    assert stretch(()) is None


QUIET = {"other_cpus": 0.03, "steal_cpus": 0.0, "stretch": 1.3}


@pytest.mark.parametrize(
    ("changes", "cpus", "disturbed"),
    [
        ({}, 2, False),
        ({"stretch": None}, 2, False),
        ({"other_cpus": 0.5}, 2, True),
        # Idle processors of a large machine run daemons.
        ({"other_cpus": 0.5}, 64, False),
        ({"other_cpus": 4.0}, 64, True),
        ({"steal_cpus": 0.2}, 2, True),
        ({"stretch": 3.0}, 2, True),
    ],
)
def test_a_window_is_disturbed_by_others_by_the_hypervisor_and_by_stretched_time(changes, cpus, disturbed):
    assert disturbed_window(QUIET | changes, cpus) is disturbed


@pytest.fixture
def accounts(monkeypatch):
    """Replaces the system's accounts by given numbers of processors that others take, one a window, and the clock."""

    def install(*others):
        now, busy = [0.0], [0.0]
        rest = iter(others)
        state = {"taken": next(rest)}

        def sleep(seconds):
            now[0] += seconds
            busy[0] += state["taken"] * seconds

        def read(pids, cpus):
            return Usage(now[0], busy[0], 0.0, {name: _Process(0.0, 0.0, 0) for name in (*pids, "")})

        def next_window(*args):
            found = original(*args)
            state["taken"] = next(rest, state["taken"])
            return found

        original = disturbance._between
        monkeypatch.setattr(disturbance, "usage", read)
        monkeypatch.setattr(disturbance, "_between", next_window)
        monkeypatch.setattr(disturbance.time, "sleep", sleep)
        monkeypatch.setattr(disturbance.time, "monotonic", lambda: now[0])
        return now

    return install


def test_waiting_ends_when_the_machine_is_quiet_or_after_a_minute(accounts):
    said = []
    now = accounts(1.0, 1.0, 0.0)
    Gate("wait", (0, 1)).pass_when_quiet(dict, said.append)
    assert now[0] == 1.5
    assert "other processes take 1.00 of 2 processors" in said[0]
    now = accounts(1.0)
    gate = Gate("wait", (0, 1))
    gate.pass_when_quiet(dict, said.append)
    assert 60 <= gate.waited_s <= 61
    now = accounts(1.0)
    Gate("warn", (0, 1)).pass_when_quiet(dict, said.append)
    assert now[0] == 0


def test_refusing_says_why_and_looks_twice(accounts):
    accounts(1.0, 1.0)
    with pytest.raises(BusyError, match=r"--when-busy refuse: other processes take 1\.00 of 2 processors; wait until"):
        Gate("refuse", (0, 1)).pass_when_quiet(dict, print)
    accounts(1.0, 0.0)
    Gate("refuse", (0, 1)).pass_when_quiet(dict, print)


def test_a_cell_is_watched_in_windows(accounts, monkeypatch):
    accounts(0.0, 1.0, 0.0)
    monkeypatch.setattr(disturbance, "stretch", lambda cpus, turn=0: 1.1)
    watch = Watch(lambda: {"torch": 1, "jax": 2}, (0, 1))
    assert (watch.summary(), watch.windows()) == ({}, ())
    for number in range(7):
        watch.round_begins()
        disturbance.time.sleep(0.2)
        watch.round_turns()
        watch.round_ends(last=number == 6)
    found = watch.summary()
    assert (found["cpus"], found["windows"], found["disturbed_windows"]) == (2, 2, 1)
    assert (found["other_cpus_most"], found["stretch"]) == (1.0, 1.1)
    assert set(found["waiting"]) == {"torch", "jax"}
    assert [window["rounds"] for window in watch.windows()] == [3, 3]


@pytest.mark.usefixtures("fake_pool")
def test_the_option_is_checked_and_a_busy_machine_is_refused(tmp_path, call, monkeypatch):
    from bench.tests.test_commands import TINY

    refused = call("run", *TINY, "--out", tmp_path / "a", "--when-busy", "sometimes")
    assert refused.exit_code == 2
    assert "--when-busy: expected" in refused.stderr
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(Gate, "_busy", lambda *args: "other processes take 1.00 of 2 processors")
    refused = call("run", *TINY, "--out", tmp_path / "b", "--when-busy", "refuse")
    assert refused.exit_code == 1
    assert "--when-busy refuse: other processes take 1.00" in refused.stderr
    assert refused.stderr.rstrip().endswith("Nothing was measured.")
    assert list(tmp_path.iterdir()) == []
    # What was there before stays.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes").write_text("mine")
    call("run", *TINY, "--out", tmp_path / "c", "--when-busy", "refuse")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["notes"]
    call("run", *TINY, "--out", tmp_path / "d" / "e", "--when-busy", "refuse")
    assert not (tmp_path / "d").exists()


@pytest.mark.usefixtures("fake_pool")
def test_what_was_measured_before_a_refusal_is_in_the_files_that_were_asked_for(tmp_path, call, monkeypatch):
    from bench.tests.test_commands import TINY

    looks = iter([None])  # the first cell is let through
    monkeypatch.setattr(Gate, "_busy", lambda *args: next(looks, "other processes take 1.00 of 2 processors"))
    files = ("--json", tmp_path / "run.json", "--csv", tmp_path / "run.csv")
    wanted = ("--implementation", "matmul", "--when-busy", "refuse", *files)
    refused = call("run", *TINY, *wanted, "--out", tmp_path / "run")
    assert refused.exit_code == 1
    assert "--when-busy refuse: other processes take 1.00" in refused.stderr
    assert "add --resume to continue" in refused.stderr
    summary = json.loads((tmp_path / "run.json").read_text())
    assert len(summary["cells"]) == 1
    assert "--when-busy refuse" in summary["stopped"]
    assert (tmp_path / "run.csv").read_text().count("\n") > 1
    assert "--when-busy refuse" in (tmp_path / "run" / "report.md").read_text()


def disturbed_records(make_record, *, hit, of=5, replicates=1):
    """A cell in which JAX is four times as fast, with so many disturbed windows in each process."""
    found = {"cpus": 2, "load": 1.0, "windows": of, "disturbed_windows": hit, "other_cpus": 0.9, "other_cpus_most": 1.0}
    found |= {"steal_cpus": 0.0, "steal_cpus_most": 0.0, "put_off_per_s": 7.0, "stretch": 1.1}
    found |= {"waiting": {"torch": 0.4, "jax": 0.01}}
    rng, records = np.random.default_rng(0), []
    rows = [("base", 1.0, {"baseline": True}), ("again", 1.0, {"baseline": True, "control": True})]
    rows += [("jax", 4.0, {"framework": "jax", "mode": "jit"})]
    for replicate in range(replicates):
        for name, speed, changes in rows:
            blocks = tuple((0.02 / speed * np.exp(0.003 * rng.standard_normal(40))).tolist())
            shared = {"key": f"{replicate}{name}", "cell_size": 3, "process_replicate": replicate}
            shared |= {"block_latency_s": blocks, "latency_s": float(np.median(blocks)) / 10, "calls_per_block": 10}
            records.append(make_record(**shared, disturbance=found, **changes))
    return records


@pytest.mark.parametrize(("hit", "disturbed"), [(0, False), (1, False), (2, True), (5, True)])
def test_a_disturbed_cell_has_figures_and_no_verdict(make_record, hit, disturbed):
    records = disturbed_records(make_record, hit=hit)
    (ranking,) = rankings(records)
    assert ranking.disturbed is disturbed
    (row,) = [row for row in ranking.rows if row.record.framework == "jax"]
    assert row.interval.ratio == pytest.approx(4, rel=0.05)
    assert row.verdict == (DISTURBED if disturbed else FASTER)
    assert ranking.frameworks.verdict == (DISTURBED if disturbed else FASTER)
    assert (ranking.winner is None) is disturbed
    text = report(results_of(records, {"e0": FINGERPRINT}))
    assert "other processes take 0.90 of 2 processors (at most 1.00), load 1.00; seconds in which" in text
    assert "torch 0.40, jax 0.01; involuntary context switches in each second: 7; a fixed loop took 1.10 times" in text
    assert f"{hit} of 5 windows disturbed" in text
    assert ("In 1 of 1 cells others used the machine" in text) is disturbed
    assert ("no competitor is called faster than another" in text) is disturbed
    cell = json.loads(json.dumps(summary(results_of(records, {"e0": FINGERPRINT})), allow_nan=False))["cells"][0]
    assert (cell["disturbed"], cell["disturbance"]["other_cpus"]) == (disturbed, 0.9)
    assert (cell["resolution"] is None) is disturbed


def test_the_windows_of_all_processes_count_together(make_record):
    assert is_disturbed(disturbed_records(make_record, hit=2, replicates=2))
    quiet = disturbed_records(make_record, hit=0, replicates=3)
    assert not is_disturbed([*quiet[3:], *disturbed_records(make_record, hit=2)])


def test_records_that_do_not_tell_count_as_quiet(make_record):
    records = [replace(record, disturbance={}) for record in disturbed_records(make_record, hit=5)]
    (ranking,) = rankings(records)
    assert (ranking.disturbed, ranking.disturbance) == (False, None)


# Tried on an idle machine: what a quiet run says is the truth that a busy one must not contradict.
CELL = ("--preset", "smoke", "--workload", "article-base", "--direction", "forward", "--probe-s", "0", "--rounds", "12")


def measured(out, hogs, *options):
    """Times the cell beside processes that compute without end, each on a processor of its own; label to verdict."""
    started = []
    for cpu in allowed_cpus()[:hogs]:
        code = f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
        started.append(subprocess.Popen([sys.executable, "-c", code]))
    try:
        command = [sys.executable, "-m", "bench", "run", *CELL, *options, "--out", str(out), "--json", f"{out}.json"]
        subprocess.run(command, check=False, capture_output=True, timeout=500)
    finally:
        for process in started:
            process.kill()
            process.wait()
    (cell,) = json.loads(Path(f"{out}.json").read_text())["cells"]
    labels = {f"{row['framework']} {row['implementation']} ({row['mode']})": row["verdict"] for row in cell["rows"]}
    return labels | {"PyTorch against JAX": cell["frameworks"]["verdict"]}


@pytest.mark.timeout(3600)
def test_beside_busy_processes_no_verdict_contradicts_a_quiet_run(tmp_path, request):
    runs = request.config.getoption("--busy-runs")
    if not runs:
        pytest.skip("takes minutes and an idle machine: --busy-runs 10")
    quiet = measured(tmp_path / "quiet", 0, "--rounds", "40", "--cell-s", "60", "--most-cell-s", "60")
    assert DISTURBED not in quiet.values(), "the machine is not idle, so that nothing can be tried"
    assert {FASTER, SLOWER} & set(quiet.values())
    said, wrong = Counter(), []
    for hogs in (1, len(allowed_cpus())):
        for run in range(runs):
            found = measured(tmp_path / f"{hogs}-{run}", hogs)
            said.update((hogs, verdict) for verdict in found.values())
            opposite = {FASTER: (SLOWER, SAME), SLOWER: (FASTER, SAME)}
            wrong += [
                (hogs, run, label, verdict, quiet.get(label))
                for label, verdict in found.items()
                if quiet.get(label) in opposite.get(verdict, ())
            ]
    print("\n" + "\n".join(f"{hogs} busy, {verdict or 'no speed'}: {count}" for (hogs, verdict), count in said.items()))
    assert wrong == []
