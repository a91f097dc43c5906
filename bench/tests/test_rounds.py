"""Rounds with invented durations: who leaves when, why they end, and what a hot device costs."""

import os
from dataclasses import replace

import numpy as np
import pytest

from bench.measure.machine import Monitor, NvmlMonitor, thermally_throttled
from bench.measure.rounds import Entry, Rounds, hopeless
from bench.plan.competitors import Competitor
from bench.plan.presets import PRESETS
from bench.study.cells import intervals
from bench.study.statistics import confidence, round_log_latency, verdict
from bench.study.stopping import far_behind
from bench.study.verdicts import leaders
from bench.tests.fake_nvml import FakeNvml
from bench.tests.in_memory import ratio_interval

PRESET = replace(PRESETS["seed"], rounds=40, least_rounds=5, cell_s=float("inf"), most_cell_s=0.0)


def entries(*names):
    found = [Entry(Competitor("torch", name, "eager"), name, calls_per_block=10) for name in names]
    found[0].baseline = True
    found.append(Entry(found[0].competitor, names[0], control=True, baseline=True, calls_per_block=10))
    return found


def run(found, durations, *, noise=0.002, preset=PRESET, monitor=None, seed=0, fails=None, clock=None, left=None):
    """Runs rounds in which a block takes its competitor's duration with lognormal noise.

    `fails` is an entry that crashes in its third block; `clock` is moved on by each block.
    """
    rng = np.random.default_rng(seed)
    verified = []

    def block(entry, verify):
        if entry is fails and len(entry.blocks) == 2:
            entry.fail("crash", "planted")
            return None
        if verify:
            verified.append((entry.label, len(entry.blocks) + 1))
        duration = durations[entry.handle] * float(np.exp(noise * rng.standard_normal()))
        if clock is not None:
            clock[0] += duration
        return {"block_latency_s": duration}

    rounds = Rounds(
        found,
        preset,
        seed=seed,
        block=block,
        monitor=monitor or Monitor(),
        report=lambda text: None,
        block_s=min(durations.values()),
        left=left,
    )
    return rounds.run(), verified


def test_who_is_far_behind_leaves_early_and_its_last_block_is_judged():
    found = entries("matmul", "near", "far")
    stopped, verified = run(found, {"matmul": 0.05, "near": 0.06, "far": 0.5})
    matmul, near, far, control = found
    assert stopped in ("resolved", "precise")
    assert len(far.blocks) == 2 * 5
    assert len(near.blocks) == len(matmul.blocks) == len(control.blocks) > len(far.blocks)
    # The last block of everybody, in its own last round.
    assert sorted(verified) == sorted((entry.label, len(entry.blocks)) for entry in found)


def test_a_fast_baseline_is_never_alone_without_its_control():
    found = entries("matmul", "far")
    stopped, _ = run(found, {"matmul": 0.05, "far": 0.5})
    assert len(found[0].blocks) == len(found[2].blocks)
    assert stopped in ("resolved", "precise")


def test_noise_without_end_stops_at_the_cap_and_time_at_its_own():
    found = entries("matmul", "like")
    assert run(found, {"matmul": 0.05, "like": 0.05}, noise=0.3)[0] == "rounds"
    assert len(found[0].blocks) == 2 * PRESET.rounds
    found = entries("matmul", "like")
    assert run(found, {"matmul": 0.05, "like": 0.05}, noise=0.3, preset=replace(PRESET, cell_s=0.0))[0] == "time"
    assert len(found[0].blocks) == 2 * PRESET.least_rounds


@pytest.fixture
def clock(monkeypatch):
    """Seconds, in place of the monotonic clock of the rounds."""
    now = [0.0]
    monkeypatch.setattr("bench.measure.rounds.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 1), (0.8, 2), (1.1, 3), (3.3, 10)])
def test_a_budget_ends_a_cell_after_any_round_and_in_time(clock, seconds, rounds):
    """A round takes 0.3 s. Without a budget there are five at least, and noise goes on for longer than any of these."""
    found = entries("matmul", "like")
    stopped, verified = run(
        found, {"matmul": 0.05, "like": 0.05}, noise=0.05, clock=clock, left=lambda: seconds - clock[0]
    )
    assert (stopped, {len(entry.blocks) for entry in found}) == ("time", {2 * rounds})
    assert len(verified) == len(found)
    assert clock[0] <= max(seconds, 0.35)


ALIKE = {"matmul": 0.003, "like": 0.003 * 1.012}
PATIENT = replace(PRESET, rounds=10**6, cell_s=2.0, most_cell_s=5.0)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("noise", "least_s", "most_s"),
    [
        # Known after some sixty rounds: time ends a cell that stays unresolved as soon as its own time is over.
        (0.1, 1.9, 2.1),
        # Not known after 2 s, which are some hundred rounds, and known before 5 s.
        (0.18, 2.2, 4.9),
        (1.0, 4.9, 5.1),
    ],
)
def test_time_goes_where_the_noise_is_up_to_a_limit(clock, noise, least_s, most_s):
    # Neither SAME nor within reach of FASTER or SLOWER: never resolved, so that only time ends the run.
    for seed in range(3 if "EVERY_TEST" in os.environ else 2):
        found, clock[0] = entries("matmul", "like"), 0.0
        assert run(found, ALIKE, noise=noise, preset=PATIENT, clock=clock, seed=seed)[0] == "time"
        assert least_s <= clock[0] <= most_s
        logs = [np.log(entry.blocks).reshape(-1, 2).mean(1) for entry in (found[0], found[-1])]
        interval = ratio_interval([logs[0] - logs[1]], confidence=0.96)
        assert (0.5 * np.log(interval.high / interval.low) < np.log(1.032)) == (noise < 1)


@pytest.mark.parametrize("lost", [0, -1], ids=["baseline", "control"])
def test_a_cell_that_lost_its_control_gets_no_extra_time(clock, lost):
    found = entries("matmul", "like")
    assert run(found, ALIKE, noise=0.25, preset=PATIENT, clock=clock, fails=found[lost])[0] == "time"
    assert clock[0] == pytest.approx(2.0, abs=0.1)


def test_short_blocks_are_enough_for_a_clear_verdict(clock):
    found = entries("matmul", "near")
    stopped, _ = run(found, {"matmul": 0.003, "near": 0.0035}, preset=PATIENT, clock=clock)
    assert stopped == "resolved"
    assert len(found[0].blocks) // 2 <= 21


@pytest.mark.parametrize("seed", range(5))
def test_whoever_left_early_is_clearly_slower_in_the_report_too(seed):
    ratios = {"matmul": 1.0, "win": 0.88, **{f"far{k}": 1.5 + 0.13 * k for k in range(10)}}
    found = entries(*ratios)
    stopped, _ = run(found, {name: 0.003 * ratio for name, ratio in ratios.items()}, noise=0.07, seed=seed)
    logs = {entry.label: {0: round_log_latency(entry.blocks, 10)} for entry in found if not entry.control}
    level = confidence(max(len(entry.blocks) // 2 for entry in found), stopped)
    against = intervals(logs["torch matmul (eager)"], logs, level)
    left = [entry.label for entry in found if len(entry.blocks) < len(found[0].blocks)]
    assert len(left) >= 8
    floor = np.log(1.03)
    assert {verdict(against[label], floor) for label in left} == {"SLOWER"}
    first = leaders(dict(sorted(logs.items(), key=lambda item: -against[item[0]].ratio)), floor, confidence=level)
    assert not set(first) & set(left)


def test_a_competitor_that_fails_in_a_round_does_not_stop_the_others():
    found = entries("matmul", "fails")

    def block(entry, verify):
        if entry.handle == "fails" and len(entry.blocks) == 3:
            entry.fail("crash", "planted")
            return None
        return {"block_latency_s": 0.05}

    options = {"monitor": Monitor(), "report": lambda text: None, "block_s": 0.05}
    Rounds(found, PRESET, seed=0, block=block, **options).run()
    assert [len(entry.blocks) > 8 for entry in found] == [True, False, True]


def test_far_behind_needs_certainty_and_distance():
    rng = np.random.default_rng(0)
    base = np.log(0.01) + 0.01 * rng.standard_normal(6)
    assert far_behind({"a": base, "b": base + np.log(2)}, "a") == ["b"]
    assert far_behind({"a": base, "b": base + np.log(1.1)}, "a") == []
    assert far_behind({"a": base, "b": base + np.log(2) + rng.standard_normal(6)}, "a") == []
    # The baseline stays however slow it is, and so does whoever is near it.
    assert far_behind({"a": base, "b": base - np.log(3)}, "a") == []
    assert far_behind({"a": base, "c": base + np.log(1.05), "b": base - np.log(3)}, "a") == []
    assert far_behind({"a": base[:3], "b": base[:3] + 5}, "a") == []


def test_a_hot_device_has_its_block_measured_again_and_a_capped_one_is_labelled():
    found = entries("matmul", "like")
    monitor = NvmlMonitor(FakeNvml(hot=2), None)
    run(found, {"matmul": 0.05, "like": 0.05}, monitor=monitor, preset=replace(PRESET, rounds=2))
    assert sum(len(entry.rejected) for entry in found) == 2
    assert all(len(entry.blocks) == len(entry.conditions) == 4 for entry in found)
    seen = found[0].conditions[-1]
    assert seen["power_capped"] == ["software power cap"]
    assert (seen["sm_clock_mhz"], seen["power_w"], seen["temperature_c"], seen["processes"]) == (1980, 650.0, 70, 2)


def test_a_device_that_is_always_hot_still_ends():
    found = entries("matmul", "like")
    run(
        found,
        {"matmul": 0.05, "like": 0.05},
        monitor=NvmlMonitor(FakeNvml(hot=10**6), None),
        preset=replace(PRESET, rounds=2),
    )
    assert all(thermally_throttled(entry.conditions[-1]) for entry in found)
    assert all(len(entry.blocks) == 4 for entry in found)


def test_a_second_opinion_is_asked_for_only_where_there_is_time_for_one():
    names = ("matmul", "disturbed", "slow", "endless")
    found = [Entry(Competitor("torch", name, "eager"), name) for name in names]
    for entry, seconds in zip(found, (0.001, 0.5, 0.5, 30.0), strict=True):
        entry.call_s = seconds
    asked = []

    def size(entry):
        asked.append(entry.handle)
        entry.calls_per_block, entry.warm_up = 1, [0.002 if entry.handle == "disturbed" else 0.4]

    limits = replace(PRESETS["smoke"].limits, call_s=0.05, slowdown=6, request_s=60)
    gone = {entry.handle: cap for entry, cap in hopeless(found, limits, size)}
    assert gone == {"slow": 0.05, "endless": 0.05}
    # Four calls of half a minute would be a timeout, and end the worker of all others.
    assert asked == ["disturbed", "slow"]
    assert [entry.call_s for entry in found] == [0.001, 0.002, 0.4, 30.0]
