"""Records of commits in which JAX's `matmul` ran as a loop are read under the name of that loop, and no others are."""

from collections import Counter
from pathlib import Path

import pytest

from bench.records import implementation_that_ran
from bench.store import read_records

RESULTS = Path(__file__).resolve().parents[1] / "results"
LOOPED = {
    "framework": "jax",
    "implementation": "matmul",
    "device": "cpu",
    "direction": "forward",
    "dtype": "float32",
    "batch": 16,
    "num_partitions": 128,
    "in_features": 128,
    "out_features": 128,
    "started_at": "2026-11-26T00:00:00+00:00",
}
PUBLISHED = {
    "cpu-epyc-2core": {"electricity-336-96": 16},
    "cpu-epyc-2core-catalogue": {
        "weather-336-336": 3,
        "weather-336-720": 3,
        "electricity-336-96-time-series": 3,
        "electricity-336-192": 3,
        "electricity-336-336": 3,
        "electricity-336-720": 3,
        "traffic-336-96": 3,
        "traffic-336-192": 3,
        "traffic-336-336": 3,
        "traffic-336-720": 3,
    },
    "cpu-xeon-2core": {"electricity-336-96": 15},
    "cpu-xeon-amx-2core": {"electricity-336-96": 3},
}


def test_the_rule_is_that_of_the_commits_that_measured():
    """One step beyond any of its limits, `matmul` was the batched product."""
    assert implementation_that_ran(LOOPED) == "in_turn"
    others = {
        "framework": "torch",
        "implementation": "einsum",
        "device": "cuda",
        "direction": "forward_backward",
        "dtype": "bfloat16",
        "batch": 17,
        "num_partitions": 127,
        "started_at": "2026-11-24T18:00:00+00:00",
    }
    for name, value in {**others, "in_features": 127, "out_features": 127}.items():
        record = LOOPED | {name: value}
        assert implementation_that_ran(record) == record["implementation"], name
    for change in ({"batch": 3}, {"started_at": "2026-12-01T00:00:00+00:00"}, {"direction": "train_step"}):
        assert implementation_that_ran(LOOPED | change) == "matmul", change
    assert (
        implementation_that_ran(LOOPED | {"num_partitions": 1, "in_features": 2048, "out_features": 1024}) == "matmul"
    )


@pytest.mark.parametrize("run", PUBLISHED)
def test_published_rows_say_what_ran(run):
    records = [record for record in read_records(RESULTS / run) if record.framework == "jax"]
    looped = [record for record in records if record.implementation == "in_turn"]
    assert Counter(record.workload for record in looped) == PUBLISHED[run]
    # The first process of each cell noted what ran: a loop, and in no row of `matmul`.
    assert {"while" in record.kernels for record in looped if record.kernels} <= {True}
    assert not any("while" in record.kernels for record in records if record.implementation == "matmul")
