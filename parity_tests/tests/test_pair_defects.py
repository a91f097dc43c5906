"""Planted defects in user pairs are killed in fp32 and bf16, their cause named; correct pairs are never rejected."""

import os

import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

from parity_tests.frameworks.jax.defects import DEFECTS, healthy, score
from parity_tests.pair.check import judge_pair
from parity_tests.pair.examples import EXAMPLES

REQUIRED = (
    "transposed kernel",
    "missing bias",
    "epsilon 1e-5 for 1e-6",
    "wrong gate order",
    "kernel of one head times 1.01",
    "softmax without scale",
    "output of one element off by 1 percent",
    "gradient stopped for one parameter",
    "dropout active",
    "bf16 compute for fp32",
    "bf16 accumulation",
    "bias rolled",
    "output rolled by one",
    "output scaled by 1/n",
    "output truncated",
    "gradient all zero",
    "gradient of one parameter times 1.01",
    "bias gradient summed in bf16",
    "TF32 operands for fp32",
)


def test_the_list_is_complete_and_has_causes():
    assert set(REQUIRED) <= {defect.name for defect in DEFECTS}
    for dtype in ("float32", "bfloat16"):
        assert sum(dtype in defect.dtypes for defect in DEFECTS) >= 10
    assert sum(bool(defect.cause) for defect in DEFECTS) >= 10


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "-"))
def test_defect_is_killed_in_every_dtype_in_which_it_matters(defect):
    if defect not in DEFECTS[::8] and "EVERY_TEST" not in os.environ:
        pytest.skip("a sample runs without EVERY_TEST=1; `python -m parity_tests defects` plants all")
    # Those that spoil the program itself compile it anew in each dtype: `python -m parity_tests defects` has the time.
    shared = defect.module is None and defect.function is None and "EVERY_TEST" in os.environ
    dtypes = defect.dtypes if shared else defect.dtypes[:1]
    results = list(score(dtypes, name=defect.name))
    assert [result.dtype for result in results] == list(dtypes)
    for result in results:
        assert result.killed, result
        assert result.cause_named, f"expected {defect.cause!r} in {result.likely_cause!r}"


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_correct_pair_is_accepted_in_every_seed(name, request):
    """In 200 seeds with `--pair-seeds 200`; what runs always is a sample."""
    pair = healthy(name)
    seeds = range(request.config.getoption("--pair-seeds"))
    assert len(seeds) > 0
    for seed in seeds:
        report = judge_pair(pair, seed, ("float32", "bfloat16"))
        report.assert_ok()
        assert report.summary.skipped == 0
        assert report.first_failing_rung is None
        assert not any(row.note for row in report.rows)
        assert {row.rung for row in report.rows} == {"weights", "forward", "gradients"}
        assert {row.bound for row in report.rows} == {"exact", "calibrated"}
        assert {row.dtype for row in report.rows} == {"float64", "float32", "bfloat16"}
        # Inside the bound with room, but not by so much that the bound would say nothing.
        assert 0.02 < max(row.bound_fraction for row in report.rows if row.dtype != "float64") < 0.7
