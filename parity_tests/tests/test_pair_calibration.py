"""The calibrated bound: its statistics, and the rounding models it rests on, against what the formats really do."""

import math
import weakref

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("scipy", reason="scipy is not installed here")

from parity_tests.judge.dtypes import FORMATS, numpy_dtype
from parity_tests.judge.subjects import framework_available
from parity_tests.judge.tolerance import FALSE_ALARM_RATE
from parity_tests.pair.calibration import (
    KINK_AMPLITUDE,
    MEMBERS,
    SEMANTIC_SCALE,
    calibrated_bound,
    collect_ensemble,
    confidence,
    moderated_spread,
)
from parity_tests.pair.draws import draw_inputs, draw_like, draw_parameters
from parity_tests.pair.loading import make_side
from parity_tests.pair.side import ParameterSpec


def estimated(deviation, members, rng):
    return np.sqrt(np.mean((deviation * rng.standard_normal((members, deviation.size))) ** 2, axis=0))


def test_moderation_recovers_a_common_spread_and_leaves_different_ones_alone():
    rng = np.random.default_rng(0)
    alike, freedom = moderated_spread(estimated(np.full(500, 0.3), MEMBERS, rng), MEMBERS)
    np.testing.assert_allclose(alike, 0.3, rtol=0.15)
    assert freedom > 5 * MEMBERS
    scales = np.exp(rng.uniform(-9, 0, 500))
    raw = estimated(scales, MEMBERS, rng)
    different, freedom = moderated_spread(raw, MEMBERS)
    np.testing.assert_allclose(different[raw > 0.01], raw[raw > 0.01], rtol=0.1)
    assert (different > 0.9 * raw).all()
    assert freedom < 1.2 * MEMBERS


def test_exact_elements_stay_exact_and_few_elements_are_not_moderated():
    spread = np.r_[np.zeros(10), np.full(40, 0.1)]
    moderated, _ = moderated_spread(spread, MEMBERS)
    assert not moderated[:10].any()
    few = np.full(MEMBERS - 1, 0.1)
    assert moderated_spread(few, MEMBERS) == (pytest.approx(few), MEMBERS)
    limit = calibrated_bound(np.ones(50), spread, np.zeros(50), MEMBERS, "float32")
    assert not limit[:10].any()
    assert limit[10:].all()


def test_confidence_keeps_the_declared_false_alarm_rate():
    assert FALSE_ALARM_RATE == 1e-6
    # One degree of freedom more or less for the normal limit: sqrt(2 ln(2 N / delta)) bounds the normal quantile.
    for elements in (1, 100, 10_000):
        normal = math.sqrt(2 * math.log(2 * elements / FALSE_ALARM_RATE))
        assert 0.85 * normal < confidence(elements, 1e6) < normal
        assert confidence(elements, MEMBERS) > normal
    # At a rate that can be counted: Gaussian errors exceed t times an estimated spread as often as declared.
    rng = np.random.default_rng(1)
    scales = np.exp(rng.uniform(-2, 2, 200_000))
    spread = estimated(scales, MEMBERS, rng)
    from scipy import stats

    quantile = stats.t.isf(1e-3 / 2, MEMBERS)
    observed = np.mean(np.abs(scales * rng.standard_normal(scales.size)) > quantile * spread)
    assert 0.7e-3 < observed < 1.3e-3


def test_kinks_widen_the_bound_and_the_semantic_scale_narrows_it():
    truth, spread = np.ones(64), np.full(64, 1e-7)
    plain = calibrated_bound(truth, spread, 8e-7 * np.ones(64), MEMBERS, "float32")
    kinked = calibrated_bound(truth, spread, np.r_[0.5, 8e-7 * np.ones(63)], MEMBERS, "float32")
    assert kinked[0] > 0.5
    np.testing.assert_array_equal(kinked[1:], plain[1:])
    semantic = calibrated_bound(truth, spread, np.full(64, 0.5), MEMBERS, "float32", SEMANTIC_SCALE)
    assert (semantic < 2 * SEMANTIC_SCALE * plain).all()
    assert KINK_AMPLITUDE == 8


FRAMEWORKS = [name for name in ("torch", "jax") if framework_available(name)]


def product(framework):
    """x @ w through either framework, as a function of parameters."""
    prefix = {"torch": "torch", "jax": "flax"}[framework]
    return {f"{prefix}_module": lambda p, x: x @ p["w"], f"{prefix}_params": {"w": np.ones((64, 8), np.float32)}}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_product_errs_as_the_recursive_summation_model_says(framework):
    side = make_side(framework, product(framework), "cpu")
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((16, 64)).astype(np.float32), rng.standard_normal((64, 8)).astype(np.float32)
    ensemble = side.ensemble({"w": w}, (x,), None, "float32", 0)
    wide_x, wide_w = x.astype(float), w.astype(float)
    y, q, terms, u = wide_x @ wide_w, wide_x**2 @ wide_w**2, 64, FORMATS["float32"].roundoff
    expected = u * np.sqrt(terms * y**2 / 3 + terms * q / 6 + q + y**2)
    np.testing.assert_allclose(ensemble.centre["y"], y, rtol=1e-12)
    ratio = ensemble.spread["y"] / expected
    assert 0.95 < np.sqrt(np.mean(ratio**2)) < 1.05
    # Summing one by one, in float32, really errs that way: within the model, and by a good part of it.
    total = np.zeros_like(y, np.float32)
    for k in range(terms):
        total += x[:, k, None] * w[k]
    sequential = np.sqrt(np.mean(((total - y) / expected) ** 2))
    assert 0.2 < sequential < 1


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_equal_values_are_rounded_alike_and_zeros_stay(framework):
    function = {
        "torch": lambda p, x: (x / p["w"]).sum(0),
        "jax": lambda p, x: (x / p["w"]).sum(0),
    }[framework]
    prefix = {"torch": "torch", "jax": "flax"}[framework]
    w = np.full(6, 3.0, np.float32)
    side = make_side(framework, {f"{prefix}_module": function, f"{prefix}_params": {"w": w}}, "cpu")
    x = np.ones((1024, 6), np.float32)
    x[:, 5] = 0
    ensemble = side.ensemble({"w": w}, (x,), None, "float32", 0)
    # 1024 equal quotients share one rounding error: their sum errs 1024 times as much, not 32 times.
    u = FORMATS["float32"].roundoff
    assert (ensemble.spread["y"][:5] > 0.5 * u * 1024 / 3).all()
    assert ensemble.spread["y"][5] == 0


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_kinks_are_seen_by_the_amplified_members(framework):
    prefix = {"torch": "torch", "jax": "flax"}[framework]

    def steps(p, x):
        return (x * p["w"] > 1.0) * x

    side = make_side(framework, {f"{prefix}_module": steps, f"{prefix}_params": {"w": np.ones(1, np.float32)}}, "cpu")
    u = FORMATS["float32"].roundoff
    x = np.asarray([0.5, 1 + 4 * u, 2.0], np.float32)
    ensemble = side.ensemble({"w": np.ones(1, np.float32)}, (x,), None, "float32", 0)
    limit = calibrated_bound(ensemble.centre["y"], ensemble.spread["y"], ensemble.kinks["y"], MEMBERS, "float32")
    assert limit[1] > 1
    assert limit[2] < 1e-4


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured_functions_lie_inside_the_bound(framework, dtype):
    """tanh, exp and the rest are granted the error that this device shows, and err inside it."""
    prefix = {"torch": "torch", "jax": "flax"}[framework]
    if framework == "torch":
        import torch as library
    else:
        import jax.numpy as library

    def functions(p, x):
        y = library.tanh(x * p["w"])
        return library.exp(y) + library.log1p(y * y) * library.sin(x)

    w = np.full(1, 1.5).astype(numpy_dtype(dtype))
    side = make_side(framework, {f"{prefix}_module": functions, f"{prefix}_params": {"w": w}}, "cpu")
    x = np.random.default_rng(0).standard_normal(3000).astype(numpy_dtype(dtype))
    truth, value = side.truth({"w": w}, (x,))["y"], side.forward({"w": w}, (x,))["y"]
    ensemble = side.ensemble({"w": w}, (x,), None, dtype, 0)
    limit = calibrated_bound(truth, ensemble.spread["y"], ensemble.kinks["y"], MEMBERS, dtype)
    fraction = (np.abs(value.astype(float) - truth) / limit).max()
    assert 0.02 < fraction < 0.7


def test_draws_keep_scale_and_sign_and_leave_no_zero():
    rng = np.random.default_rng(0)
    assert draw_like(np.zeros(50), rng).all()
    positive = draw_like(np.ones(1000), rng)
    assert (positive > 0).all()
    assert 0.2 < np.log(positive).std() < 0.3
    normal = draw_like(0.02 * rng.standard_normal(4000), rng)
    assert 0.018 < normal.std() < 0.022
    specs = {"w": ParameterSpec(np.zeros((2, 3), np.float32), True), "n": ParameterSpec(np.arange(3), False)}
    drawn = draw_parameters(specs, 0, {"w": lambda rng, shape: np.full(shape, 7.0)})
    assert (drawn["w"] == 7).all()
    assert (drawn["n"] == np.arange(3)).all()
    again = draw_inputs(((4, 3), np.arange(4)), 5).arrays
    np.testing.assert_array_equal(again[0], draw_inputs(((4, 3), np.arange(4)), 5).arrays[0])
    assert again[1].dtype.kind == "i"


def test_a_member_is_dropped_before_the_next_one_runs():
    made = []

    def results():
        made.append(weakref.ref(array := np.ones(3)))
        return {"y": array}

    def run(members):
        for number, _ in enumerate(members):
            assert [ref() for ref in made] == [None] * number
            yield results()

    assert collect_ensemble(run).members == MEMBERS
    assert len(made) > MEMBERS
