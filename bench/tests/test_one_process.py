"""What one process cannot know: how much processes differ."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bench.report.text import baseline_line
from bench.study.ranking import rankings
from bench.study.statistics import SAME, UNRESOLVED
from bench.study.stopping import look_confidence


@pytest.fixture
def cell(make_record):
    """Records of one process: einsum is 1.5% faster than the baseline, the loop 5%; the control is known to 0.2%."""
    rng = np.random.default_rng(0)

    def timed(key, seconds, replicate, **changes):
        blocks = tuple((10 * seconds * np.exp(0.002 * rng.standard_normal(40))).tolist())
        found = {"block_latency_s": blocks, "latency_s": float(np.median(blocks)) / 10}
        return make_record(key=f"{key}{replicate}", process_replicate=replicate, **found | changes)

    def make(replicate, **baseline):
        return [
            timed("a", 1e-3, replicate, baseline=True, **baseline),
            timed("b", 1e-3, replicate, baseline=True, control=True, **baseline),
            timed("c", 1e-3 / 1.015, replicate, implementation="einsum"),
            timed("d", 1e-3 / 1.05, replicate, implementation="loop"),
        ]

    return make


def verdicts(records):
    (ranking,) = rankings(records)
    return ranking, {row.record.implementation: row.verdict for row in ranking.rows}


def test_one_process_names_nobody_by_less_than_what_counts_as_the_same(cell):
    ranking, found = verdicts(cell(0))
    assert ranking.resolution == pytest.approx(math.log(1.02))
    assert found["einsum"] in (SAME, UNRESOLVED)
    assert found["loop"] == "FASTER"
    assert baseline_line(ranking).endswith("nobody is called faster by less than 2.0% (one process).")


def test_processes_that_agree_know_better(cell):
    ranking, found = verdicts([record for replicate in range(4) for record in cell(replicate)])
    assert ranking.resolution < math.log(1.01)
    assert found["einsum"] in ("FASTER", SAME)
    assert found["loop"] == "FASTER"
    assert "one process" not in baseline_line(ranking)


def test_a_process_in_which_the_baseline_failed_does_not_count(cell):
    gone = {"status": "crash", "reason": "gone", "latency_s": None, "block_latency_s": (), "bound_fraction": None}
    ranking, found = verdicts([*cell(0), *cell(1, **gone)])
    assert ranking.resolution == pytest.approx(math.log(1.02))
    assert found["einsum"] in (SAME, UNRESOLVED)


def test_the_price_of_looks_is_paid_by_one_process_alone(cell):
    looked = {"stopped": "resolved"}
    ranking, _ = verdicts([replace(record, **looked) for record in cell(0)])
    assert ranking.confidence == look_confidence(20) > 0.99
    ranking, _ = verdicts([replace(record, **looked) for replicate in (0, 1) for record in cell(replicate)])
    assert ranking.confidence == 0.95
