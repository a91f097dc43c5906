import ml_dtypes
import numpy as np
import pytest

from bench.measure import verification
from bench.measure.machine import free_bytes, resident_growth
from bench.measure.verification import Oracle, Verifier, inputs_digest, results_digest
from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.judge.tolerance import reference

CASE = Case("verification", (6,), 7, 8, 5)


def right(inputs, names=("y", "dx", "dweight", "dbias")):
    """Correctly rounded results."""
    truth = reference(inputs)
    return {name: truth[name].value.astype(inputs.x.dtype) for name in names}


@pytest.fixture(params=[10**9, 1], ids=["whole", "partition-by-partition"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(verification, "_ELEMENTS_AT_A_TIME", request.param)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "ieee_fp32"), ("bfloat16", "bf16"), ("float64", "fp64")])
def test_right_results_pass_with_their_precision(dtype, precision):
    inputs = draw_inputs(CASE, dtype)
    judgement = Verifier(Oracle(inputs), "forward_backward").judge(right(inputs), precision)
    assert (judgement.status, judgement.observed_precision) == ("ok", precision)
    assert set(judgement.tensors) == {"y", "dx", "dweight", "dbias"}
    assert 0 <= judgement.bound_fraction <= 1


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("tensor", ["y", "dx", "dweight", "dbias"])
def test_one_wrong_element_anywhere_is_found(tensor):
    inputs = draw_inputs(CASE, "float32")
    outputs = right(inputs)
    outputs[tensor][(-1,) * outputs[tensor].ndim] *= 1.01
    judgement = Verifier(Oracle(inputs), "forward_backward").judge(outputs, "ieee_fp32")
    assert judgement.status == "mismatch"
    assert tensor in judgement.reason
    assert judgement.tensors[tensor]["status"] == "mismatch"


def test_the_reason_is_that_of_the_worst_partitions(monkeypatch):
    monkeypatch.setattr(verification, "_ELEMENTS_AT_A_TIME", 1)
    inputs = draw_inputs(CASE, "float32")
    for worst in (1, 4):
        outputs = right(inputs)
        for partition in (1, 4):
            outputs["dbias"][partition] *= 1.5 if partition == worst else 1.01
        judgement = Verifier(Oracle(inputs), "forward_backward").judge(outputs, "ieee_fp32")
        assert judgement.reason.startswith(f"partitions {worst} to {worst}: ")


def test_lower_precision_is_named():
    inputs = draw_inputs(CASE, "float32")
    rounded = draw_inputs(CASE, "float32")
    coarse = right(type(rounded)(**{**vars(rounded), "x": rounded.x.astype(ml_dtypes.bfloat16).astype(np.float32)}))
    judgement = Verifier(Oracle(inputs), "forward_backward").judge(coarse, "ieee_fp32")
    assert (judgement.status, judgement.observed_precision) == ("mismatch", "bf16")


def test_missing_and_misshaped_results_are_a_mismatch():
    inputs = draw_inputs(CASE, "float32")
    verifier = Verifier(Oracle(inputs), "forward_backward")
    assert "expected ['dbias', 'dweight', 'dx', 'y']" in verifier.judge(right(inputs, ("y",)), "ieee_fp32").reason
    outputs = right(inputs) | {"dx": np.zeros((1, 2))}
    assert "dx has shape (1, 2)" in verifier.judge(outputs, "ieee_fp32").reason


def test_nan_is_a_mismatch_that_json_can_hold():
    inputs = draw_inputs(CASE, "float32")
    outputs = right(inputs, ("y",))
    outputs["y"][0, 0, 0] = np.nan
    judgement = Verifier(Oracle(inputs), "forward").judge(outputs, "ieee_fp32")
    assert judgement.status == "mismatch"
    assert judgement.bound_fraction is None


def test_digests_see_every_bit():
    inputs = draw_inputs(CASE, "bfloat16")
    assert inputs_digest(inputs) == inputs_digest(draw_inputs(CASE, "bfloat16"))
    assert inputs_digest(inputs) != inputs_digest(draw_inputs(CASE, "bfloat16", seed=1))
    a, b = {"y": np.array([0.0, 1.0])}, {"y": np.array([-0.0, 1.0])}
    assert results_digest(a) != results_digest(b)


def test_a_planted_allocation_shows_in_the_peak():
    size = 64 * 2**20
    growth, method = resident_growth(lambda: np.ones(size, np.uint8))
    assert method in ("resident_high_water", "lifetime_resident_peak")
    if method == "resident_high_water":
        assert size * 0.9 <= growth <= size * 1.5


def test_free_memory_is_known():
    assert free_bytes() > 0
