"""The coordinator stopped at random moments, by SIGKILL, Ctrl-C and SIGTERM: nothing recorded is lost."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest

from bench.measure.workers import CHECKOUT
from bench.records import parse_line
from bench.tests.killed_runs import WORKLOADS, whole_cells

KILLS, STOPS = (50, 8) if "EVERY_TEST" in os.environ else (4, 2)


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """What runs opened and recorded that got these signals one after another, and a last one that got none."""

    def send(*numbers):
        folder = tmp_path_factory.mktemp("killed")
        arguments = [folder / "out", folder / "log", "0", ",".join(str(int(number)) for number in numbers)]
        command = [sys.executable, "-m", "bench.tests.killed_runs", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=CHECKOUT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return send


@pytest.fixture(scope="module")
def killed(sent):
    return sent(*[signal.SIGKILL] * KILLS)


def assert_nothing_repeated(runs):
    """Each run goes on where the one before it ended: it loses the cell in flight at most, and repeats no other."""
    before, recorded_before = [], set()
    for run in runs:
        lines, recorded = whole_cells(run["records"])
        assert lines[: len(before)] == before, "what was recorded has changed"
        assert not recorded_before & set(run["opened"]), "a recorded cell was measured again"
        assert len(set(run["opened"]) - recorded) <= 1, "more than the cell in flight was lost"
        before, recorded_before = lines, recorded


@pytest.mark.every
def test_runs_killed_at_random_moments_repeat_nothing_and_lose_the_cell_in_flight_at_most(killed):
    *kills, last = killed
    assert [run["signal"] for run in kills] == [signal.SIGKILL] * KILLS
    assert last["exit"] == 0
    # Not a test of starting up: most of them were measuring.
    assert sum(bool(run["opened"]) for run in kills) > KILLS / 2
    assert_nothing_repeated(killed)


def test_interrupted_and_terminated_runs_end_in_order_and_go_on(sent):
    *stopped, last = runs = sent(*[signal.SIGINT, signal.SIGTERM] * (STOPS // 2))
    assert [(run["signal"], run["exit"]) for run in stopped] == [(None, 130)] * STOPS
    assert last["exit"] == 0
    assert_nothing_repeated(runs)
    assert whole_cells(last["records"])[0] == last["records"]


def test_after_all_kills_the_records_are_complete_and_no_key_is_there_twice(killed):
    lines, recorded = whole_cells(killed[-1]["records"])
    assert lines == killed[-1]["records"]
    assert recorded == {f"{name} {direction}" for name in WORKLOADS for direction in ("forward", "forward_backward")}
    keys = Counter(parse_line(line).key for line in lines)
    assert set(keys.values()) == {1}
