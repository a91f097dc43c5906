"""Number formats in the judge: no cast drops anything unnoticed; what is not finite or not real is compared whole."""

import ast
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("scipy", reason="scipy is not installed here")

import parity_tests.pair as package
from parity_tests.judge.comparison import UNDECIDED, same_bits, within
from parity_tests.judge.dtypes import as_stored, exactly, from_parts, looks_rounded, parts, widened
from parity_tests.pair.calibration import (
    MEMBERS,
    SEMANTIC_SCALE,
    calibrated_bound,
    collect_ensemble,
    constants_bound,
    moved_constant,
)
from parity_tests.pair.draws import draw_like, draw_parameters, stored_apart
from parity_tests.pair.mapping import ParameterMapping
from parity_tests.pair.side import ParameterSpec

INF, NAN = np.inf, np.nan


def test_only_one_file_of_the_judge_casts():
    """Elsewhere a cast is a call of `dtypes`, which keeps every value, raises, or rounds because that is meant."""
    folder = Path(package.__file__).parent
    offenders = [
        f"{path.name}:{node.lineno}"
        for path in sorted(folder.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "astype"
    ]
    assert offenders == []


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_drawn_numbers_of_a_narrow_format_are_not_equal(dtype):
    """A maximum of equal numbers has no gradient that both libraries agree on."""
    numbers = np.random.default_rng(0).standard_normal((3, 5, 100))
    rounded, apart = as_stored(numbers, np.dtype(dtype)), stored_apart(numbers, np.dtype(dtype))
    assert len(np.unique(rounded[0])) < rounded[0].size
    assert all(len(np.unique(each)) == each.size for each in apart)
    np.testing.assert_array_equal(np.signbit(apart), np.signbit(numbers))
    np.testing.assert_allclose(apart, numbers, rtol=0.2, atol=0.01)
    single = np.float32([1.0, 1.0])
    np.testing.assert_array_equal(stored_apart(single, single.dtype), single)


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.asarray([1 + 2j]), np.float64),
        (np.asarray([1 + 2j]), np.int64),
        (np.asarray([0.1]), np.float32),
        (np.asarray([0.1]), ml_dtypes.bfloat16),
        (np.asarray([1e300]), np.float32),
        (np.asarray([0.5]), np.int32),
        (np.asarray([2**40]), np.int32),
        (np.asarray([-1]), np.uint32),
        (np.asarray([2**53 + 1]), np.float64),
        (np.asarray([2]), np.bool_),
    ],
)
def test_a_cast_that_would_change_a_value_is_refused(array, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="the array: expected values that"):
            exactly(array, np.dtype(dtype), "the array")


def test_a_cast_that_changes_nothing_is_made():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exactly(np.asarray([1 + 0j]), np.dtype(np.float32), "a").dtype == np.float32
        assert exactly(np.asarray([0.5, INF, NAN]), np.dtype(ml_dtypes.bfloat16), "a").dtype == ml_dtypes.bfloat16
        assert exactly(np.asarray([7], np.int64), np.dtype(np.int32), "a").tolist() == [7]
        assert exactly(np.asarray([0.1]), np.dtype(np.complex128), "a").tolist() == [0.1 + 0j]
    halves = np.asarray([0.5, 3.0], ml_dtypes.bfloat16)
    assert widened(halves).tolist() == [0.5, 3.0]
    assert widened(np.asarray([1j], np.complex64)).dtype == np.complex128
    assert widened(np.arange(3)).dtype == np.int64
    # Complex numbers have no parts of 16 bits.
    assert as_stored(np.asarray([0.1j]), np.dtype(ml_dtypes.bfloat16)).dtype == np.complex64
    assert as_stored(np.asarray([0.1j]), np.dtype(np.float64)).dtype == np.complex128
    odd = np.asarray([[complex(INF, 1), complex(0, NAN)], [1, -1j]])
    assert parts(odd).shape == (2, 2, 2)
    np.testing.assert_array_equal(from_parts(parts(odd), odd), odd)
    assert parts(np.asarray(2 + 3j)).tolist() == [2.0, 3.0]


def test_infinities_and_nan_have_to_be_equal_in_place_and_sign():
    expected = np.asarray([1.0, -INF, INF, NAN])
    assert within("y", expected.copy(), expected, 0.0).status == "ok"
    for index, wrong in ((1, INF), (1, -1e300), (2, NAN), (3, 0.0), (0, NAN), (0, -INF)):
        value = expected.copy()
        value[index] = wrong
        result = within("y", value, expected, np.asarray([1e-6, 0, 0, 0]))
        assert result.status == "mismatch"
        assert result.worst_index == (index,)
        assert result.reason.startswith(f"y[{index}] is {float(wrong)!r}, expected {float(expected[index])!r}: ")
        assert result.reason.endswith("what is not finite has to be equal on both sides")


@pytest.mark.parametrize("limit", [INF, NAN])
def test_a_bound_that_is_not_finite_decides_nothing(limit):
    expected = np.asarray([1.0, 2.0, -INF])
    limits = np.asarray([1e-6, limit, 0.0])
    for second in (2.0, 3.0):
        result = within("y", np.asarray([1.0, second, -INF]), expected, limits)
        assert result.status == UNDECIDED
        assert result.reason.startswith("y[1] cannot be judged: rounding alone decides whether a value behind it is")
    # What is certainly wrong stays so.
    assert within("y", np.asarray([1.1, 2.0, -INF]), expected, limits).status == "mismatch"
    assert within("y", np.asarray([1.0, INF, -INF]), expected, limits).status == "mismatch"


def test_an_ensemble_with_infinities_has_bounds_where_its_members_agree():
    def run(members):
        for number, amplitude in members:
            noise = amplitude * 1e-7 * (-1) ** number
            # The last number is one whose finiteness the noise decides.
            yield {"y": np.asarray([1 + noise, -INF, NAN, INF if number == 3 else 2 + noise])}

    found = collect_ensemble(run)
    assert np.isfinite(found.spread["y"][:3]).all()
    limit = calibrated_bound(found.centre["y"], found.spread["y"], found.kinks["y"], MEMBERS, "float32")
    assert 0 < limit[0] < 1e-4
    assert limit[1] == limit[2] == 0
    assert limit[3] == INF
    semantic = calibrated_bound(
        found.centre["y"], found.spread["y"], found.kinks["y"], MEMBERS, "float32", SEMANTIC_SCALE
    )
    assert semantic[0] < 1e-12
    assert semantic[3] == INF


def test_complex_numbers_are_judged_by_both_parts():
    expected = np.asarray([[1 + 2j, -3j]])
    limit = np.full((1, 2), 1e-6 + 1e-3j)
    assert within("y", expected + 1e-4j, expected, limit).status == "ok"
    assert within("y", expected + 1e-4, expected, limit).status == "mismatch"
    result = within("y", expected.conj(), expected, limit)
    assert (result.worst_index, result.subject_value, result.expected_value) == ((0, 1), 3.0, -3.0)
    assert result.reason.startswith("the imaginary part of y[0, 1] is 3.0, expected -3.0: 6e+03 times")
    assert within("y", expected.real, expected, limit).reason == "y has dtype float64, expected complex128"
    assert same_bits("w", expected.conj(), expected).status == "mismatch"
    assert "real part" in within("y", np.asarray([complex(NAN, 0)]), np.asarray([0j]), 0.0).reason
    # The bound of either part comes from its own spread.
    spread = np.full(100, 1e-7 + 0j)
    bound = calibrated_bound(np.full(100, 1 + 1j), spread, spread, MEMBERS, "float32")
    assert (bound.real > 0).all()
    assert (bound.imag == 0).all()


def test_integers_are_equal_as_integers():
    large = np.asarray([2**53, 2**62], np.int64)
    assert within("n", large, large.copy(), 0.0).status == "ok"
    result = within("n", large + np.asarray([1, 0]), large, 0.0)
    assert result.status == "mismatch"
    assert result.reason == f"n[0] is {2**53 + 1}, expected {2**53}"
    assert within("n", large.astype(np.uint64), large, 0.0).status == "ok"
    assert within("n", np.asarray([True]), np.asarray([0]), 0.0).status == "mismatch"


def test_constants_move_by_the_roundoff_of_the_format_that_rounded_them():
    table = widened(np.asarray([0.1, 0.5, 3.0, -INF, 0.1, 1 / 3], np.float32))
    assert looks_rounded(table, "float32").tolist() == [True, False, False, False, True, True]
    np.testing.assert_array_equal(moved_constant(table, 0, "float32"), table)
    np.testing.assert_array_equal(moved_constant(table, 3, "float64"), table)
    runs = np.stack([moved_constant(table, member, "float32") for member in range(1, MEMBERS + 1)])
    with np.errstate(invalid="ignore"):
        steps = (runs - table) / table / 2.0**-24
    assert (np.abs(steps[:, [0, 4, 5]]).round(6) == 1).all()
    assert len(set(steps[:, 0].round())) == 2
    np.testing.assert_array_equal(runs[:, 0], runs[:, 4])
    np.testing.assert_array_equal(runs[:, [1, 2, 3]], np.broadcast_to(table[[1, 2, 3]], (MEMBERS, 3)))
    whole = moved_constant(table[:1] + 1j * table[:1], 1, "float32")
    assert np.abs(whole - table[:1] * (1 + 1j)).item() > 0
    # A constant that is off by its roundoff is granted, one that is off by ten of them is not.
    spread = np.full(64, 2.0**-24 * 0.1)
    assert 0.1 * 2.0**-24 < constants_bound(spread, MEMBERS)[0] < 10 * 0.1 * 2.0**-24


def test_draws_keep_kinds_and_infinities():
    rng = np.random.default_rng(0)
    mask = np.triu(np.full((4, 4), -INF), 1)
    drawn = draw_like(mask, rng)
    np.testing.assert_array_equal(drawn == -INF, mask == -INF)
    assert np.isfinite(drawn[mask == 0]).all()
    assert drawn[mask == 0].all()
    kernel = draw_like(np.full(2000, 3 - 4j, np.complex64), rng)
    assert 4.7 < np.sqrt(np.mean(np.abs(kernel) ** 2)) < 5.3
    assert 0.9 < np.std(kernel.real) / np.std(kernel.imag) < 1.1
    real = {"w": ParameterSpec(np.zeros(3, np.float32), True)}
    with pytest.raises(ValueError, match=r"draws\['w'\]: expected values that float64 holds, got others in complex128"):
        draw_parameters(real, 0, {"w": lambda rng, shape: np.full(shape, 1j)})


def test_a_mapping_carries_every_format_whole():
    def specs(**arrays):
        return {name: ParameterSpec(array, array.dtype.kind == "f") for name, array in arrays.items()}

    torch = specs(w=np.zeros(4, np.float32), held=np.zeros(2, np.float32), n=np.zeros((), np.int64))
    flax = specs(k=np.zeros(4, np.float32), n=np.zeros((), np.int32), spare=np.zeros(3, np.float32))
    rules = [("w", "k"), ("held", None, "0"), (None, "spare", "0"), ("n", "n")]
    mapping = ParameterMapping(rules, torch, flax)
    for dtype in (np.float64, np.float32, ml_dtypes.bfloat16):
        arrays = {"w": np.full(4, 0.5, dtype), "held": np.zeros(2, dtype), "n": np.asarray(5, np.int64)}
        there = mapping.to_flax(arrays)
        assert {name: array.dtype for name, array in there.items()} == {"k": dtype, "spare": dtype, "n": np.int32}
        back = mapping.to_torch(there)
        assert {name: array.dtype for name, array in back.items()} == {"w": dtype, "held": dtype, "n": np.int64}
        assert back["n"] == 5
    with pytest.raises(ValueError, match=r"\('n', 'n', ''\): expected values that int32 holds"):
        mapping.to_flax({**arrays, "n": np.asarray(2**40)})
    # An ensemble has no integers: what is missing there is no error here.
    assert mapping.to_torch({"k": np.ones(4)}, ["w", "n"])["w"].tolist() == [1.0] * 4
