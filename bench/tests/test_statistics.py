import math

import numpy as np
import pytest
from scipy import stats

from bench.study.statistics import (
    EQUIVALENCE,
    FASTER,
    SAME,
    SLOWER,
    UNRESOLVED,
    Interval,
    middle_rounds,
    pseudo_values,
    resolution,
    round_log_latency,
    student_t_quantile,
    tukey_outliers,
    verdict,
)
from bench.tests.in_memory import ratio_interval, trimmed_mean

ROUNDS, NOISE = 13, 0.01


def simulated_blocks(rng, latencies_s, drift):
    """Blocks of several competitors as the coordinator times them: shuffled, then reversed, on one drifting clock.

    `drift` is the relative slowdown over the whole run, growing with the square of time: not linear, so only pairing
    within a round and the changing order protect against it.
    """
    blocks = [[] for _ in latencies_s]
    total = 2 * ROUNDS * len(latencies_s)
    now = 0
    for _ in range(ROUNDS):
        order = rng.permutation(len(latencies_s))
        for k in (*order, *order[::-1]):
            noise = NOISE * rng.standard_normal() + drift * (now / total) ** 2
            blocks[k].append(latencies_s[k] * np.exp(noise))
            now += 1
    return [round_log_latency(times, 10) for times in blocks]


def judged(rng, factor, *, drift=0.0):
    """The verdict on a competitor whose calls take 1/factor of the baseline's time."""
    base, control, other = simulated_blocks(rng, (0.02, 0.02, 0.02 / factor), drift)
    floor = resolution(ratio_interval([base - control]))
    return verdict(ratio_interval([base - other]), floor)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (2, 4.30265), (9, 2.26216), (100, 1.98397)])
def test_t_quantiles_are_those_of_the_tables(degrees, quantile):
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, rel=1e-5)
    assert student_t_quantile(0.5, degrees) == pytest.approx(0, abs=1e-9)


def test_t_quantile_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="degrees >= 1"):
        student_t_quantile(0.975, 0)
    with pytest.raises(ValueError, match="probability < 1"):
        student_t_quantile(1.0, 3)


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.03, FASTER), (1.10, FASTER), (1 / 1.03, SLOWER), (1 / 1.10, SLOWER)]
)
def test_planted_differences_are_found(factor, expected):
    rng = np.random.default_rng(1)
    found = [judged(rng, factor) for _ in range(100)]
    opposite = {FASTER: SLOWER, SLOWER: FASTER}[expected]
    assert opposite not in found
    # The standard error of a ratio is NOISE / sqrt(ROUNDS) = 0.3%: 3% lies about ten of them away, 90% is far below.
    assert found.count(expected) >= 90


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_no_difference_is_claimed_between_equals_even_under_drift(drift):
    rng = np.random.default_rng(2)
    found = [judged(rng, 1.0, drift=drift) for _ in range(1000)]
    assert found.count(FASTER) + found.count(SLOWER) <= 50
    assert SAME in found


@pytest.mark.parametrize(("processes", "rounds"), [(1, 5), (1, 10), (1, 25), (3, 10)])
def test_intervals_cover_at_the_stated_rate(processes, rounds):
    rng = np.random.default_rng(3)
    truth, trials, covered = 0.05, 600, 0
    for _ in range(trials):
        log_ratios = [
            truth + 0.02 * rng.standard_normal() * (processes > 1) + 0.02 * rng.standard_normal(rounds)
            for _ in range(processes)
        ]
        interval = ratio_interval(log_ratios)
        covered += interval.low <= math.exp(truth) <= interval.high
    # Three standard errors of a rate of 0.95 over 600 trials are 0.027.
    assert covered / trials >= 0.95 - 0.027


@pytest.mark.parametrize("rounds", [10, 25, 60])
@pytest.mark.parametrize("disturbed", [False, True])
def test_intervals_cover_where_a_host_disturbs_some_rounds_and_stay_narrow(rounds, disturbed):
    rng = np.random.default_rng(5)
    truth, trials, widths = 0.05, 600, []
    covered = 0
    for _ in range(trials):
        # One round in ten is slowed down or sped up against the other by tens of percent.
        scale = np.where(rng.random(rounds) < 0.1, 20.0, 1.0) if disturbed else 1.0
        interval = ratio_interval([truth + 0.02 * scale * rng.standard_normal(rounds)])
        covered += interval.low <= math.exp(truth) <= interval.high
        widths.append(0.5 * math.log(interval.high / interval.low))
    assert covered / trials >= 0.95 - 0.027
    if rounds >= 25:
        # The mean of undisturbed rounds is known to 1.96 * 0.02 / sqrt(rounds); of disturbed ones to six times that.
        assert np.median(widths) < (1.6 if disturbed else 1.25) * 1.96 * 0.02 / math.sqrt(rounds)


@pytest.mark.parametrize("rounds", [10, 11, 25, 100])
def test_trimmed_means_and_their_scatter_are_those_of_scipy(rounds):
    values = np.random.default_rng(6).standard_t(2, rounds)
    pseudo = pseudo_values(values, (rounds,))
    assert trimmed_mean(values) == pytest.approx(stats.trim_mean(values, 0.2))
    assert pseudo.mean() == pytest.approx(stats.trim_mean(values, 0.2))
    error = stats.mstats.trimmed_stde(values, limits=(0.2, 0.2))
    assert pseudo.std(ddof=1) / math.sqrt(rounds) == pytest.approx(float(error), rel=0.1)
    assert middle_rounds(rounds) == rounds - 2 * (rounds // 5)


def test_few_rounds_are_all_averaged():
    values = np.random.default_rng(7).standard_normal((3, 9))
    assert np.array_equal(pseudo_values(values, (9,)), values)
    assert trimmed_mean(values) == pytest.approx(values.mean(1))
    assert middle_rounds(9) == 9


def test_a_single_round_resolves_nothing():
    interval = ratio_interval([np.array([0.5])])
    assert (interval.low, interval.high) == (0.0, math.inf)
    assert verdict(interval, 0.01) == UNRESOLVED
    assert resolution(interval) == math.inf


def test_report_is_reproducible():
    rounds = np.random.default_rng(4).standard_normal(10)
    assert ratio_interval([rounds]) == ratio_interval([rounds])


@pytest.mark.parametrize(
    ("low", "ratio", "high", "floor", "expected"),
    [
        (1.05, 1.10, 1.15, 0.01, FASTER),
        (0.85, 0.90, 0.95, 0.01, SLOWER),
        (0.99, 1.00, 1.01, 0.01, SAME),
        (0.95, 1.02, 1.08, 0.01, UNRESOLVED),
        (1.05, 1.10, 1.15, 0.20, UNRESOLVED),
        (1.05, 1.10, 1.15, None, UNRESOLVED),
        (1.005, 1.01, 1.015, 0.001, SAME),
        # A floor above 15% is not known well enough for an estimate to pass it: the end of the interval must.
        (1.10, 1.40, 1.80, math.log(1.14), FASTER),
        (1.10, 1.40, 1.80, math.log(1.20), UNRESOLVED),
        (1.25, 1.40, 1.60, math.log(1.20), FASTER),
        (1 / 1.80, 1 / 1.40, 1 / 1.10, math.log(1.14), SLOWER),
        (1 / 1.80, 1 / 1.40, 1 / 1.10, math.log(1.20), UNRESOLVED),
        (1 / 1.60, 1 / 1.40, 1 / 1.25, math.log(1.20), SLOWER),
        # A control of [1/11, 11] is no control.
        (900.0, 1000.0, 1100.0, math.log(9), FASTER),
        (900.0, 1000.0, 1100.0, math.log(11), UNRESOLVED),
        (0.999, 1.0, 1.001, math.log(11), UNRESOLVED),
    ],
)
def test_verdicts(low, ratio, high, floor, expected):
    assert verdict(Interval(ratio, low, high, 10), floor) == expected


def test_a_single_process_counts_with_the_spread_of_processes():
    spread = math.log(1.1)
    one, several = (Interval(1.12, 1.10, 1.14, 10, processes) for processes in (1, 5))
    assert (verdict(one, 0.01, spread), verdict(several, 0.01, spread)) == (FASTER, FASTER)
    near = Interval(1.08, 1.06, 1.10, 10, 1)
    assert (verdict(near, 0.01, spread), verdict(near, 0.01)) == (UNRESOLVED, FASTER)
    same = Interval(1.0, 0.99, 1.01, 10, 1)
    assert (verdict(same, 0.01, spread), verdict(same, 0.01)) == (UNRESOLVED, SAME)
    wide = near.across_processes(spread)
    # In quadrature, since rounds and processes scatter independently.
    assert math.log(wide.ratio / wide.low) == pytest.approx(math.hypot(math.log(1.08 / 1.06), spread))
    assert several.across_processes(spread) == several


def test_the_equivalence_margin_is_two_percent():
    assert math.exp(EQUIVALENCE) == pytest.approx(1.02)


def test_rounds_average_the_two_blocks_so_that_a_linear_drift_cancels():
    # Order a, b, then b, a, each block 10% slower than the last: both see the same mean.
    drift = [0.1 * k for k in range(4)]
    a, b = np.exp([drift[0], drift[3]]), np.exp([drift[1], drift[2]])
    assert round_log_latency(a, 1)[0] == pytest.approx(round_log_latency(b, 1)[0])


def test_an_odd_number_of_blocks_is_refused():
    with pytest.raises(ValueError, match="two blocks a round"):
        round_log_latency([0.1, 0.1, 0.1], 1)


def test_outliers_are_counted():
    assert tukey_outliers([1.0] * 20 + [1.1, 0.9, 9.0]) == 3
    assert tukey_outliers([]) == 0
