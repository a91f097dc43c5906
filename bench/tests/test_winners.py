"""The statistics of many competitors and of stopping early, on synthetic clocks: the instrument's own sanity."""

import math
import os

import numpy as np
import pytest

from bench.study.statistics import (
    FASTER,
    SAME,
    SLOWER,
    UNRESOLVED,
    confidence,
    is_look,
    look_confidence,
    looks,
    ratio_intervals,
    resolution,
    student_t_two_sided,
    verdict,
)
from bench.study.stopping import stop_reason
from bench.study.verdicts import holm, leaders
from bench.tests.in_memory import ratio_interval, trimmed_mean

NOISE, COMPETITORS, CAP = 0.01, 6, 40


def simulated(rng, factors, *, cap=CAP, drift=0.0, noise=NOISE):
    """Mean log latency of each round, for the baseline, its control and the competitors with these speed-ups.

    A round is timed in shuffled order and then in reverse; `drift` is the slowdown over the whole run, growing with
    the square of time, so that only pairing and the changing order protect against it.
    """
    speeds = np.log([1.0, 1.0, *factors])
    count = len(speeds)
    ranks = np.argsort(rng.random((cap, count)), axis=1)
    places = np.stack([ranks, 2 * count - 1 - ranks], axis=-1) + 2 * count * np.arange(cap)[:, None, None]
    blocks = -speeds[None, :, None] + drift * (places / (2 * count * cap)) ** 2
    return (blocks + noise * rng.standard_normal(blocks.shape)).mean(2).T


def run(rng, factors, **options):
    """A cell that stops by the rule: the rounds that were run, why, and everybody's mean log latencies."""
    logs = simulated(rng, factors, **options)
    for rounds in looks():
        if rounds > logs.shape[1]:
            return logs, "rounds"
        ratios = {str(k): logs[0, :rounds] - logs[k, :rounds] for k in range(2, len(logs))}
        why = stop_reason(ratios, logs[0, :rounds] - logs[1, :rounds], measured_blocks=50)
        if why is not None:
            return logs[:, :rounds], why
    raise AssertionError


def judged(logs, why, *, floor=None):
    """What the report says of a finished cell: level, floor, intervals against the baseline, and who leads."""
    level = confidence(logs.shape[1], why)
    control, *others = ratio_intervals(logs[0] - logs[1:], (logs.shape[1],), confidence=level)
    floor = resolution(control) if floor is None else floor
    ranked = sorted((k for k in range(len(logs)) if k != 1), key=lambda k: trimmed_mean(logs[k] - logs[0]))
    competitors = {str(k): {0: logs[k]} for k in ranked}
    return level, floor, others, leaders(competitors, floor, confidence=level)


@pytest.fixture(scope="module", params=[NOISE, 0.06], ids=["quiet", "noisy"])
def equals(request):
    """1,000 cells of equals, run by the rule: quiet ones stop early, noisy ones reach the cap."""
    rng = np.random.default_rng(0)
    # A look takes the longer the more rounds there are, and a noisy cell takes them all.
    cap = CAP if request.param == NOISE else 20
    return request.param, [run(rng, [1.0] * COMPETITORS, noise=request.param, cap=cap) for _ in range(1000)]


@pytest.fixture(scope="module")
def outcomes(equals):
    """Noise, and what the report says of each of these cells."""
    return equals[0], [(why, *judged(logs, why)[1:]) for logs, why in equals[1]]


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (2, 4.30265), (9, 2.26216), (100, 1.98397)])
def test_both_tails_beyond_a_quantile_of_the_tables(degrees, quantile):
    assert student_t_two_sided(np.array([quantile, -quantile, 0.0]), degrees) == pytest.approx(
        [0.05, 0.05, 1], rel=1e-4
    )


def test_t_tail_of_what_is_infinite_or_undefined():
    assert student_t_two_sided(np.array([np.inf, -np.inf, np.nan]), 5).tolist() == [0.0, 0.0, 1.0]


def test_holm_steps_down_and_stops_at_the_first_that_stands():
    # 0.001 <= 0.05/3 falls, 0.02 <= 0.05/2 falls, 0.03 <= 0.05 falls.
    assert holm(np.array([0.03, 0.001, 0.02]), 0.05).tolist() == [True, True, True]
    # 0.026 > 0.05/2 stands, and with it 0.03, although 0.03 <= 0.05.
    assert holm(np.array([0.03, 0.001, 0.026]), 0.05).tolist() == [False, True, False]
    assert holm(np.array([]), 0.05).tolist() == []


def test_the_looks_and_what_they_cost():
    schedule = looks()
    assert [next(schedule) for _ in range(7)] == [10, 14, 20, 28, 40, 56, 80]
    assert [is_look(k) for k in (9, 10, 12, 14, 28, 30)] == [False, True, False, True, True, False]
    errors = [1 - look_confidence(k) for k in (10, 14, 20, 28, 40, 56, 80)]
    assert errors[:3] == pytest.approx([0.005, 0.01 / 6, 0.01 / 12])
    # Nobody looks before a cap of ten rounds; a later cap has what the looks leave of the 5%.
    assert confidence(10, "") == confidence(10, "rounds") == confidence(3, "time") == 0.95
    assert confidence(10, "resolved") == look_confidence(10)
    assert confidence(25, "rounds") == confidence(300, "time") == pytest.approx(0.96)
    assert sum(errors) + (1 - confidence(25, "rounds")) < 0.05


def test_stopping_waits_for_rounds_time_and_a_look():
    rng = np.random.default_rng(1)
    control = 0.001 * rng.standard_normal(30)
    clear = {"a": 0.5 + control, "b": -0.5 + control}
    assert stop_reason({k: v[:9] for k, v in clear.items()}, control[:9], measured_blocks=400) is None
    assert stop_reason({k: v[:10] for k, v in clear.items()}, control[:10], measured_blocks=24) is None
    assert stop_reason({k: v[:11] for k, v in clear.items()}, control[:11], measured_blocks=400) is None
    assert stop_reason({k: v[:10] for k, v in clear.items()}, control[:10], measured_blocks=30) == "resolved"
    # At 2.2% neither SAME nor beyond a control that is itself 2.2% off, yet known to less than 1%.
    odd = {"a": 0.022 + 0.1 * control[:10]}
    assert stop_reason(odd, 0.022 + 0.1 * control[:10], measured_blocks=50) == "precise"
    noisy = {"a": 0.022 + np.resize([0.1, -0.1], 10)}
    assert stop_reason(noisy, control[:10], measured_blocks=50) is None
    # Everybody is clearly ahead or behind, but what the cell can resolve is known to 5% only.
    assert stop_reason({k: v[:10] for k, v in clear.items()}, 100 * control[:10], measured_blocks=50) is None


@pytest.mark.parametrize(("factor", "expected"), [(1.03, FASTER), (1.1, FASTER), (1 / 1.03, SLOWER), (1 / 1.1, SLOWER)])
def test_planted_differences_are_found_and_win(factor, expected):
    rng = np.random.default_rng(2)
    found, first = [], []
    for _ in range(100):
        _, floor, others, lead = judged(*run(rng, [factor, *[1.0] * (COMPETITORS - 1)]))
        found.append(verdict(others[0], floor))
        first.append(lead)
    opposite = {FASTER: SLOWER, SLOWER: FASTER}[expected]
    assert found.count(expected) >= 90
    assert opposite not in found
    # "2" is the planted one, the first after the baseline and its control.
    if expected == FASTER:
        assert first.count(("2",)) >= 90
    else:
        assert sum("2" in lead for lead in first) <= 10


@pytest.mark.sample(2)
def test_no_winner_is_claimed_among_equals(outcomes):
    assert sum(len(lead) == 1 for *_, lead in outcomes[1]) <= 50


def test_the_correction_alone_keeps_equals_apart_from_winners(equals):
    """Without the A/A control's floor, and where the noise is too large for SAME, only Holm's correction is left."""
    claimed = [len(judged(logs, why, floor=0.0)[3]) == 1 for logs, why in equals[1]]
    assert sum(claimed) <= 50


def test_no_verdict_is_claimed_between_equals_although_the_run_stops_early(outcomes):
    noise, cells = outcomes
    said = [verdict(interval, floor) for _, floor, others, _ in cells for interval in others]
    assert said.count(FASTER) + said.count(SLOWER) <= 0.05 * len(said)
    if noise == NOISE:
        assert sum(why != "rounds" for why, *_ in cells) > 500
        assert said.count(SAME) > 0.5 * len(said)


def test_intervals_cover_although_the_run_stops_early(outcomes):
    covered = [interval.low <= 1 <= interval.high for _, _, others, _ in outcomes[1] for interval in others]
    # Within a cell the six share the baseline, so the standard error is that of 1,000 cells and not of 6,000 intervals.
    assert np.mean(covered) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / len(outcomes[1]))


def test_drift_that_grows_over_the_run_becomes_no_winner():
    rng = np.random.default_rng(3)
    cells = [run(rng, [1.0] * COMPETITORS, drift=0.5) for _ in range(300)]
    assert sum(len(judged(*cell)[3]) == 1 for cell in cells) <= 15


def test_noise_keeps_a_run_going_to_its_cap():
    rng = np.random.default_rng(4)
    stopped = [run(rng, [1.05] * 2, noise=0.2) for _ in range(20)]
    assert [why for _, why in stopped].count("rounds") >= 18
    assert all(logs.shape[1] == CAP for logs, why in stopped if why == "rounds")


def test_who_ties_is_named_fastest_first():
    rng = np.random.default_rng(5)
    rounds = {
        name: {0: base + 0.002 * rng.standard_normal(20)}
        for name, base in {"a": 0.0, "b": 0.001, "slow": 0.5, "slower": 0.9}.items()
    }
    first = leaders(rounds, 0.003)
    assert set(first) == {"a", "b"}
    assert leaders({name: rounds[name] for name in ("a", "slow", "slower")}, 0.003) == ("a",)
    # Without a control, or with one that differs from itself by more than the difference, nobody is beaten.
    assert len(leaders(rounds, None)) == len(leaders(rounds, 2.0)) == 4
    assert leaders({}, 0.1) == ()


def test_a_single_round_beats_nobody():
    assert set(leaders({"a": {0: np.array([0.0])}, "b": {0: np.array([5.0])}}, 0.01)) == {"a", "b"}


def test_processes_are_the_units_where_there_are_several():
    rng = np.random.default_rng(6)
    # Every process compiles differently: b is ahead in one by far, behind in another; 300 rounds change nothing.
    a = {k: 0.001 * rng.standard_normal(100) for k in range(3)}
    b = {k: shift + 0.001 * rng.standard_normal(100) for k, shift in enumerate((-0.2, 0.02, 0.1))}
    assert len(leaders({"a": a, "b": b}, 0.001)) == 2
    assert leaders({"b": {0: b[0]}, "a": {0: a[0]}}, 0.001) == ("b",)


def test_a_single_interval_is_that_of_the_batch():
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((3, 25))
    batch = ratio_intervals(rows, (10, 15))
    assert batch[1] == ratio_interval([rows[1, :10], rows[1, 10:]])
    assert verdict(ratio_interval([np.zeros(1)]), 0.1) == UNRESOLVED


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("processes", "speed"), [(2, 1.0), (5, 1.03)] + [(2, 1.03), (5, 1.0)] * ("EVERY_TEST" in os.environ)
)
def test_processes_that_stop_by_themselves_need_no_higher_confidence(speed, processes):
    # Each process has speeds of its own, and stops by what it alone has seen; the control shares the baseline's.
    rng = np.random.default_rng(3)
    cells, inside, won, wrong = 300, [], 0, 0
    for _ in range(cells):
        own = np.exp(0.01 * rng.standard_normal((processes, 2)))
        runs = [run(rng, [speed * a, b])[0] for a, b in own]
        lengths = tuple(logs.shape[1] for logs in runs)
        ratios = np.concatenate([logs[0] - logs[1:] for logs in runs], axis=1)
        control, *others = ratio_intervals(ratios, lengths)
        inside += [found.low <= truth <= found.high for found, truth in zip(others, (speed, 1.0), strict=True)]
        means = [0.0, *(-math.log(found.ratio) for found in others)]
        order = sorted(zip(means, (0, 2, 3), strict=True))
        competitors = {str(k): {p: logs[k] for p, logs in enumerate(runs)} for _, k in order}
        first = leaders(competitors, resolution(control))
        # Where one is faster, its winning is right.
        won += len(first) == 1 and (speed == 1 or first != ("2",))
        wrong += verdict(others[1], resolution(control)) in (FASTER, SLOWER)
    # 0.925 lies three standard errors of 600 intervals below 0.95.
    assert np.mean(inside) >= 0.925
    assert wrong <= 0.05 * cells
    assert won <= 0.05 * cells
