"""The bound itself: never violated by correct NumPy arithmetic, and tight enough to see one rounding too many."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from parity_tests.judge.comparison import compare, compare_pair, pair_limits
from parity_tests.judge.dtypes import FORMATS, STORAGE_DTYPES, numpy_dtype
from parity_tests.judge.inputs import DEFAULT, Case, draw_inputs, draw_lattice
from parity_tests.judge.subjects import arithmetic_of, as_cast
from parity_tests.judge.tolerance import PRECISION_OF_DTYPE, TIERS, Arithmetic, bound, declared_arithmetic, reference


def sequential(inputs, accumulator):
    """y, dx, dW, db by the worst legitimate order: one product after the other in the accumulator's dtype."""
    target = numpy_dtype(inputs.dtype)

    def dot(a, b):  # (n, p, k) x (n, k, q)
        total = np.zeros((*a.shape[:2], b.shape[2]), accumulator)
        for k in range(a.shape[2]):
            total = total + a[:, :, k, None].astype(accumulator) * b[:, None, k].astype(accumulator)
        return total

    x = np.moveaxis(inputs.x.reshape(-1, *inputs.x.shape[-2:]), 1, 0)
    dy = np.moveaxis(inputs.cotangent.reshape(-1, *inputs.cotangent.shape[-2:]), 1, 0)

    def back(a):
        return np.moveaxis(a, 0, 1).reshape(*inputs.x.shape[:-1], a.shape[2])

    y = back(dot(x, inputs.weight).astype(target))
    out = {
        "dx": back(dot(dy, inputs.weight.swapaxes(1, 2)).astype(target)),
        "dweight": dot(x.swapaxes(1, 2), dy).astype(target),
    }
    if inputs.bias is not None:
        y = (y.astype(accumulator) + inputs.bias.astype(accumulator)).astype(target)
        total = np.zeros(inputs.bias.shape, accumulator)
        for row in np.moveaxis(dy, 1, 0):
            total = total + row.astype(accumulator)
        out["dbias"] = total.astype(target)
    return {"y": y, **out}


ACCUMULATOR = {"float64": np.float64, "float32": np.float32, "bfloat16": np.float32, "float16": np.float32}


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("case", [case for case in DEFAULT if case.rows], ids=lambda case: case.name)
def test_correct_arithmetic_holds_every_tier(case, dtype):
    inputs = draw_inputs(case, dtype)
    outputs = sequential(inputs, ACCUMULATOR[dtype])
    results = compare(outputs, reference(inputs), declared_arithmetic(PRECISION_OF_DTYPE[dtype]))
    assert [r.reason for r in results if r.status != "ok"] == []
    assert all(r.bound_fraction_t2 is not None and r.bound_fraction_t3 is not None for r in results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_correct_arithmetic_is_never_rejected_over_seeds(dtype):
    case = Case("seeds", (12,), 3, 40, 24)
    for seed in range(200):
        inputs = draw_inputs(case, dtype, seed)
        results = compare(
            sequential(inputs, np.float32), reference(inputs), declared_arithmetic(PRECISION_OF_DTYPE[dtype])
        )
        assert [r.reason for r in results if r.status != "ok"] == [], seed


def test_tiers_are_ordered_for_long_sums():
    truth = reference(draw_inputs(Case("long", (4,), 2, 2048, 8), "float32"))["y"]
    t1, t2, t3 = (bound(truth, declared_arithmetic("ieee_fp32"), tier) for tier in TIERS)
    assert np.all(t3 < t2)
    assert np.all(t2 < t1)


def test_low_precision_accumulator_breaks_the_bound():
    inputs = draw_inputs(Case("low", (8,), 3, 256, 16), "bfloat16")
    rounded = np.zeros((8, 3, 16), ml_dtypes.bfloat16)
    for k in range(256):
        product = inputs.x[..., k, None].astype(np.float32) * inputs.weight[:, k].astype(np.float32)
        rounded = (rounded.astype(np.float32) + product).astype(ml_dtypes.bfloat16)
    y = (rounded.astype(np.float32) + inputs.bias.astype(np.float32)).astype(ml_dtypes.bfloat16)
    (result,) = compare({"y": y}, reference(inputs), declared_arithmetic("bf16"))
    assert result.status == "mismatch"
    assert result.bound_fraction > 1


def test_tf32_operands_break_the_ieee_bound_and_keep_their_own():
    inputs = draw_inputs(Case("tf32", (16,), 3, 64, 16), "float32")

    def tf32(array):
        mantissa, exponent = np.frexp(array.astype(np.float64))
        return np.ldexp(np.rint(mantissa * 2.0**11) / 2.0**11, exponent)

    truth = reference(inputs)
    y = (np.einsum("bni,nio->bno", tf32(inputs.x), tf32(inputs.weight)) + inputs.bias).astype(np.float32)
    (ieee,) = compare({"y": y}, truth, declared_arithmetic("ieee_fp32"))
    (tf32_result,) = compare({"y": y}, truth, declared_arithmetic("tf32"))
    assert (ieee.status, tf32_result.status) == ("mismatch", "ok")
    assert tf32_result.bound_fraction_t2 is None, "a truncating accumulator admits T1 only"


def test_zero_sum_has_zero_bound_up_to_underflow():
    inputs = draw_inputs(Case("zero", (4,), 2, 8, 8, bias=False), "float32")
    inputs.weight[1] = 0
    truth = reference(inputs)["y"]
    limit = bound(truth, declared_arithmetic("ieee_fp32"))
    assert np.all(limit[:, 1] <= 10 * FORMATS["float32"].smallest_normal)
    leaked = truth.value.astype(np.float32)
    leaked[0, 1, 0] = 1e-30
    (result,) = compare({"y": leaked}, reference(inputs), declared_arithmetic("ieee_fp32"))
    assert result.status == "mismatch"
    assert (result.worst_index, result.partition) == ((0, 1, 0), 1)


def test_fused_bias_bound_is_tighter():
    truth = reference(draw_inputs(Case("fused", (4,), 2, 32, 8), "bfloat16"))["y"]
    unfused = bound(truth, Arithmetic("bfloat16", "bfloat16", "float32", fused_bias=False))
    fused = bound(truth, Arithmetic("bfloat16", "bfloat16", "float32", fused_bias=True))
    assert np.all(fused < unfused)


def test_nan_where_the_oracle_is_finite_is_a_mismatch():
    inputs = draw_inputs(Case("nan", (4,), 2, 8, 8), "float32")
    truth = reference(inputs)
    y = truth["y"].value.astype(np.float32)
    y[1, 0, 3] = np.nan
    (result,) = compare({"y": y}, truth, declared_arithmetic("ieee_fp32"))
    assert result.status == "mismatch"
    assert result.worst_index == (1, 0, 3)


def test_wrong_shape_is_a_mismatch_even_if_it_would_broadcast():
    inputs = draw_inputs(Case("shape", (1,), 2, 8, 8), "float32")
    truth = reference(inputs)
    (result,) = compare({"y": truth["y"].value.astype(np.float32)[0]}, truth, declared_arithmetic("ieee_fp32"))
    assert result.status == "mismatch"
    assert "shape" in result.reason


def test_comparing_nothing_or_the_unknown_is_an_error():
    inputs = draw_inputs(Case("none", (1,), 2, 8, 8, bias=False), "float32")
    truth = reference(inputs)
    with pytest.raises(ValueError, match="nothing would be compared"):
        compare({}, truth, declared_arithmetic("ieee_fp32"))
    with pytest.raises(ValueError, match="has no dbias"):
        compare({"dbias": np.zeros((2, 8))}, truth, declared_arithmetic("ieee_fp32"))
    arithmetic = declared_arithmetic("ieee_fp32")
    with pytest.raises(ValueError, match="expected the same tensors"):
        compare_pair({"y": np.zeros(1)}, {"dx": np.zeros(1)}, truth, pair_limits(truth, (arithmetic, arithmetic)))


def test_pair_bound_is_the_sum_of_both():
    inputs = draw_inputs(Case("pair", (4,), 2, 8, 8), "float32")
    truth = reference(inputs)
    arithmetic = declared_arithmetic("ieee_fp32")
    limit = bound(truth["y"], arithmetic)
    low, high = truth["y"].value - 0.9 * limit, truth["y"].value + 0.9 * limit
    limits = pair_limits(truth, (arithmetic, arithmetic))
    (inside,) = compare_pair({"y": low}, {"y": high}, truth, limits)
    assert inside.status == "ok"
    assert inside.bound_fraction == pytest.approx(0.9)
    (outside,) = compare_pair({"y": low}, {"y": high + 0.3 * limit}, truth, limits)
    assert outside.status == "mismatch"


def test_pair_bound_of_two_arithmetics_is_the_sum_of_theirs():
    truth = reference(draw_inputs(Case("pair", (4,), 2, 8, 8), "float32"))
    plain, cast = arithmetic_of("eager", "float32"), arithmetic_of("autocast", "float32")
    expected = bound(truth["y"], plain) + bound(truth["y"], cast)
    assert np.array_equal(pair_limits(truth, (plain, cast))["y"], expected)
    assert np.array_equal(pair_limits(truth, (plain, plain))["y"], 2 * bound(truth["y"], plain))


def cast_outputs(inputs, accumulator):
    """What autocast computes: everything rounded to bf16 first, gradients handed out in fp32."""
    half = ml_dtypes.bfloat16
    arrays = {name: getattr(inputs, name).astype(half) for name in ("x", "weight", "bias", "cotangent")}
    outputs = sequential(dataclasses.replace(inputs, dtype="bfloat16", **arrays), accumulator)
    return {name: value if name == "y" else value.astype(np.float32) for name, value in outputs.items()}


@pytest.mark.parametrize("seed", range(2))
def test_a_casting_mode_is_judged_by_what_it_computes_in(seed):
    inputs = draw_inputs(Case("cast", (512,), 2, 16, 8), "float32", seed)
    truth, arithmetic = reference(inputs), arithmetic_of("autocast", "float32")
    right = compare(cast_outputs(inputs, np.float32), truth, arithmetic)
    assert [result.reason for result in right if result.status != "ok"] == []
    assert max(result.bound_fraction for result in right) > 0.2, "a bound that is never approached sees nothing"
    exact, strict = as_cast("autocast", inputs), arithmetic_of("autocast", "float32", representable=True)
    truth = reference(exact)
    right = compare(cast_outputs(exact, np.float32), truth, strict)
    assert [result.reason for result in right if result.status != "ok"] == []
    wrong = compare(cast_outputs(exact, ml_dtypes.bfloat16), truth, strict)
    assert {result.tensor for result in wrong if result.status != "ok"} == {"y", "dx", "dweight", "dbias"}
    unrounded = compare(sequential(inputs, np.float32), truth, arithmetic)
    assert [result.reason for result in unrounded if result.tensor == "y"] == ["y has dtype float32, expected bfloat16"]


def test_inputs_are_the_same_numbers_in_every_dtype_and_run():
    case = Case("draw", (3,), 2, 5, 4)
    first, again = draw_inputs(case, "float64"), draw_inputs(case, "float64")
    assert first.x.tobytes() == again.x.tobytes()
    half = draw_inputs(case, "bfloat16")
    assert np.array_equal(half.x, first.x.astype(ml_dtypes.bfloat16))
    assert draw_inputs(case, "float64", seed=1).x.tobytes() != first.x.tobytes()
    scales = [float(np.std(a)) for a in (first.x, first.weight, first.bias, first.cotangent)]
    assert len({round(scale, 2) for scale in scales}) == 4
    lattice = draw_lattice(case, "bfloat16")
    assert set(np.unique(lattice.x.astype(np.float64))) <= set(range(-3, 4))


def test_longdouble_judges_float64_where_it_is_longer():
    truth = reference(draw_inputs(Case("f64", (2,), 2, 4, 4), "float64"))["y"]
    assert truth.value.dtype == np.longdouble


def test_a_sum_that_starts_at_a_large_bias_is_within_the_bound():
    """Every partial sum is rounded at the bias's magnitude, which a product rounded apart from it never sees."""
    rng = np.random.default_rng(0)
    case = Case("large-bias", (64,), 2, 64, 32)
    inputs = draw_inputs(case, "float32")
    inputs = dataclasses.replace(
        inputs, x=inputs.x * np.float32(1e-3), bias=(100 + rng.random(inputs.bias.shape)).astype(np.float32)
    )
    y = np.broadcast_to(inputs.bias, inputs.cotangent.shape).astype(np.float32)
    for i in range(case.in_features):
        y = (y + inputs.x[..., i, None] * inputs.weight[:, i]).astype(np.float32)
    (result,) = compare({"y": y}, reference(inputs), declared_arithmetic("ieee_fp32"))
    assert result.status == "ok", result.reason
    unfused = reference(inputs)["y"]
    apart = 2 * 2.0**-24 * np.abs(unfused.value) + 65 * 2.0**-24 * unfused.magnitude
    assert np.max(np.abs(y - unfused.value) / apart) > 1, "the case would prove nothing"
