"""Planted defects in user pairs are killed in fp32 and bf16, their cause named; correct pairs are never rejected."""

import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

from parity_tests.pair.check import judge_pair
from parity_tests.pair.defects import score
from parity_tests.pair.examples import EXAMPLES
from parity_tests.pair.legs import Pair
from parity_tests.pair.side import make_side
from parity_tests.pair.subjects.jax_defects import DEFECTS

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
)


def test_the_list_is_complete_and_has_causes():
    assert set(REQUIRED) <= {defect.name for defect in DEFECTS}
    for dtype in ("float32", "bfloat16"):
        assert sum(dtype in defect.dtypes for defect in DEFECTS) >= 10
    assert sum(bool(defect.cause) for defect in DEFECTS) >= 10


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "-"))
def test_defect_is_killed_in_every_dtype_in_which_it_matters(defect):
    results = list(score(name=defect.name))
    assert [result.dtype for result in results] == list(defect.dtypes)
    for result in results:
        assert result.killed, result
        assert result.cause_named, f"expected {defect.cause!r} in {result.likely_cause!r}"


# 200 seeds over the five pairs, the cheap ones more often; each in float64, float32 and bfloat16.
SEEDS = {"linear": 80, "layer_norm": 60, "conv": 35, "gru_cell": 15, "attention": 10}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_a_correct_pair_is_never_rejected(name):
    assert sum(SEEDS.values()) == 200
    arguments = EXAMPLES[name]("torch") | EXAMPLES[name]("jax") | EXAMPLES[name]("pair")
    # One pair for all seeds: what is compiled once need not be compiled again.
    pair = Pair(
        name=name,
        sides={framework: make_side(framework, arguments, "cpu") for framework in ("torch", "jax")},
        rules=arguments["params"],
        source=arguments["inputs"],
        input_patterns=arguments.get("input_patterns", {}),
        output_patterns=arguments.get("output_patterns", {}),
    )
    rejected = []
    for seed in range(1, SEEDS[name] + 1):
        report = judge_pair(pair, seed, ("float32", "bfloat16"))
        if not report.ok:
            rejected.append(f"seed {seed}: {report.describe()}")
    assert rejected == []
