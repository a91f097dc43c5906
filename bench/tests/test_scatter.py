"""What several processes say about their scatter, and what follows for a comparison of two runs."""

from statistics import NormalDist

import numpy as np
import pytest
from scipy import special

from bench.study import comparison, process_spread
from bench.study.cells import Identity, Spread
from bench.study.comparison import LEAST_OTHERS, Difference, overall, robust_scale
from bench.study.process_spread import apart_from_others, pooled, usual
from parity_tests.judge.variances import Prior, inverse_trigamma

LABELS = [f"torch {k}" for k in range(12)]


@pytest.mark.parametrize("x", [0.01, 0.3, 1.0, 2.5, 9.99, 70.0])
def test_the_inverse_of_trigamma_is_one(x):
    assert inverse_trigamma(special.polygamma(1, x)) == pytest.approx(x, rel=1e-9)


def test_two_runs_tell_of_one_scatter():
    found = pooled([1.0, 3.0], [10.0, 14.0, 12.0])
    # About each run's own mean: 1 + 1 and 4 + 4 + 0, of 5 - 2 degrees of freedom.
    assert (found.variance, found.degrees, found.inverse_processes) == (pytest.approx(10 / 3), 3, 1 / 2 + 1 / 3)


def _variances(rng, degrees, competitors):
    """As many true variances, around 1e-4."""
    return 1e-4 * degrees / rng.chisquare(degrees, competitors)


def _runs(rng, variances, processes):
    return (rng.normal(size=(len(variances), processes)) * np.sqrt(variances)[:, None] for _ in "ab")


def test_what_is_usual_is_found():
    rng = np.random.default_rng(0)
    a, b = _runs(rng, _variances(rng, 4, 3000), 5)
    prior = usual([pooled(*pair) for pair in zip(a, b, strict=True)])
    assert prior.variance == pytest.approx(1e-4, rel=0.1)
    assert 3 < prior.degrees < 4.2
    # All alike: everybody's scatter is the same one, and known well.
    a, b = _runs(rng, np.full(3000, 1e-4), 5)
    alike = usual([pooled(*pair) for pair in zip(a, b, strict=True)])
    assert alike.variance == pytest.approx(1e-4, rel=0.05)
    assert alike.degrees > 50
    # A variance of 0 does not make the others mean nothing.
    assert usual([pooled((0.0, 0.0), (0.0, 0.0))] * 30).degrees == process_spread.MOST_DEGREES


def test_few_competitors_are_not_asked_what_is_usual():
    found = pooled((0.0, 1.0), (0.0, 2.0))
    prior = usual([found] * (process_spread.LEAST_COMPETITORS - 1))
    assert prior == Prior(0.0, 0.0)
    assert found.towards(prior) == found


@pytest.mark.sample(2)
@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("degrees", [1.5, 20])
def test_equal_runs_fail_in_one_of_twenty_and_reach_less_far(processes, degrees):
    """150 pairs of equal runs of 200 competitors, whose variances differ much or little."""
    rng = np.random.default_rng(processes)
    failed, narrower = 0, []
    for _ in range(150):
        a, b = _runs(rng, _variances(rng, degrees, 200), processes)
        scatters = [pooled(*pair) for pair in zip(a, b, strict=True)]
        prior = usual(scatters)
        reaches = np.array([one.towards(prior).reach(1 - 0.05 / 200) for one in scatters])
        failed += bool((np.abs(a.mean(1) - b.mean(1)) > reaches).any())
        narrower.append(np.median(reaches) / np.median([one.reach(1 - 0.05 / 200) for one in scatters]))
    # Of 150 with a chance of 5%, 14 or more occur in 2.5% of all trials.
    assert failed <= 13
    assert np.median(narrower) < {2: 0.3, 3: 0.75, 5: 0.97}[processes]


def test_what_all_others_share_is_taken_out_of_a_process():
    shared = {0: 0.3, 1: -0.1, 2: -0.2}
    spreads = {label: Spread(0.0, 0.0, 3, 2, dict(shared)) for label in LABELS}
    own = {0: 0.3 + 0.02, 1: -0.1 - 0.02, 2: -0.2}
    spreads["torch 0"] = Spread(0.0, 0.0, 3, 2, own)
    spreads["one process"] = Spread(0.0, 0.0, 30, 29)
    apart = apart_from_others(spreads)
    assert "one process" not in apart
    assert apart["torch 0"] == pytest.approx({0: 0.02, 1: -0.02, 2: 0.0})
    assert apart["torch 1"] == pytest.approx({0: 0.0, 1: 0.0, 2: 0.0})
    # Alone, nothing can be said to be shared.
    assert apart_from_others({"torch 0": spreads["torch 0"]})["torch 0"] == pytest.approx(own)


def _cells(rng, *, planted, processes=(3, 3), cells=10, in_set=0.0, between=0.0):
    """Differences of two runs in which a process differs by 3% from another, and the first competitor by a factor.

    Args:
        rng: where chance comes from.
        planted: log ratio of speeds of the first competitor.
        processes: of A and of B.
        cells: how many.
        in_set: standard deviation of what a competitor has in common in all cells of a set of processes.
        between: standard deviation of what it has in common in a whole run.
    """
    of_runs = rng.normal(0, between, (2, len(LABELS), 1))
    of_sets = [rng.normal(0, in_set, (len(LABELS), count)) for count in processes]
    found = []
    for k in range(cells):
        where = Identity(f"w{k}", 1, 1, 1, 1, "float32", "cpu", "forward", "matched", "ieee_fp32", "x", "warm", None)
        runs = []
        for run, count in enumerate(processes):
            values = of_runs[run] + of_sets[run] + rng.normal(0, 0.03, (len(LABELS), count))
            values[0] -= planted * run
            rows = {label: dict(enumerate(row.tolist())) for label, row in zip(LABELS, values, strict=True)}
            runs.append(
                {n: Spread(float(np.mean(list(r.values()))), 0.0, count, count - 1, r) for n, r in rows.items()}
            )
        apart = [apart_from_others(run) for run in runs]
        estimates = {label: runs[0][label].mean - runs[1][label].mean for label in LABELS}
        for label in LABELS:
            shift = float(np.median([value for name, value in estimates.items() if name != label]))
            pairs = (runs[0][label], runs[1][label]), (apart[0][label], apart[1][label])
            both = pooled(list(pairs[1][0].values()), list(pairs[1][1].values()))
            found.append(
                Difference(where, label, "torch", True, pairs[0], estimates[label], shift, pairs[1], both, (0, 0))
            )
    return found


@pytest.mark.parametrize("size", [10, 11, 24, 25])
def test_a_scale_is_right_and_heeds_no_outliers(size):
    rng = np.random.default_rng(size)
    scales = [robust_scale(rng.normal(5, 0.1, size).tolist()) for _ in range(2000)]
    assert np.mean(scales) == pytest.approx(0.1, rel=0.05)
    values = rng.normal(0, 0.1, size)
    values[:2] += 50
    assert robust_scale(values.tolist()) < 0.25


def test_the_constant_of_the_scale_is_that_of_normal_values():
    """A quarter of the distances of pairs is shorter than its inverse."""
    assert NormalDist(0, 2**0.5).cdf(1 / comparison._QN) == pytest.approx(5 / 8, rel=1e-9)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("in_set", "between"), [(0.0, 0.0), (0.03, 0.0), (0.0, 0.02), (0.01, 0.05)])
def test_no_change_over_all_cells_is_claimed_between_equals(in_set, between):
    """200 pairs of equal runs of 12 competitors.

    What the cells of a set share must not look like many cells, and what those of a run share not like a change.
    """
    rng = np.random.default_rng(1)
    assert len(LABELS) > LEAST_OTHERS
    named = 0
    for _ in range(200):
        found = overall(_cells(rng, planted=0.0, in_set=in_set, between=between), 0.05)
        named += any(one.verdict in ("FASTER", "SLOWER") for one in found)
    # Of 200 with a chance of 5%, 17 or more occur in 2.5% of all trials.
    assert named <= 16


def test_a_change_over_all_cells_is_found_that_no_cell_shows():
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(40):
        cells = _cells(rng, planted=-0.1, cells=20)
        (first, *others) = overall(cells, 0.025)
        assert (first.label, first.cells) == (LABELS[0], 20)
        found += first.verdict == "SLOWER" and first.interval.low < np.exp(-0.1) < first.interval.high
        assert len(others) == len(LABELS) - 1
        single = [one.interval({"torch": Prior(0.0, 0.0)}, 1 - 0.025 / 240) for one in cells if one.label == LABELS[0]]
        assert sum(interval.high < 1 for interval in single) <= 10
    assert found >= 38


def test_cells_of_one_process_and_single_cells_are_not_put_together():
    rng = np.random.default_rng(3)
    assert overall(_cells(rng, planted=0.0, cells=1), 0.05) == ()
    (few, many) = (_cells(rng, planted=0.0, processes=(count, 5), cells=4) for count in (2, 5))
    # A cell with fewer processes than others enters with those that it has.
    found = overall([*few, *many], 0.05)
    assert {(one.cells, one.interval.rounds) for one in found} == {(8, 5)}
