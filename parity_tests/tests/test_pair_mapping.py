"""Parameter mappings of a pair: axis patterns, slices, and every way in which rules can fail to be a bijection."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("einops", reason="einops is not installed here")

from parity_tests.pair import MappingError
from parity_tests.pair.mapping import ParameterMapping
from parity_tests.pair.patterns import AxisPattern
from parity_tests.pair.side import ParameterSpec


def specs(**shapes):
    return {name.replace("__", "."): ParameterSpec(np.zeros(shape, np.float32), True) for name, shape in shapes.items()}


def drawn(arrays, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(spec.value.shape).astype(np.float32) for name, spec in arrays.items()}


@pytest.mark.parametrize(
    ("pattern", "source", "target"),
    [
        ("o i -> i o", (3, 5), (5, 3)),
        ("(h d) i -> i h d", (12, 5), (5, 3, 4)),
        ("o (h d) -> h d o", (5, 12), (3, 4, 5)),
        ("o i kh kw -> kh kw i o", (2, 3, 4, 5), (4, 5, 3, 2)),
        ("o -> 1 o", (4,), (1, 4)),
        ("", (4, 2), (4, 2)),
    ],
)
def test_pattern_goes_there_and_back(pattern, source, target):
    axes = AxisPattern(pattern, source, target)
    array = np.arange(np.prod(source)).reshape(source)
    assert axes.forward(array).shape == target
    np.testing.assert_array_equal(axes.backward(axes.forward(array)), array)


def test_lengths_that_shapes_leave_open_can_be_given():
    axes = AxisPattern("(g h) -> (h g)", (12,), (12,), {"g": 3})
    np.testing.assert_array_equal(axes.forward(np.arange(12)), np.arange(12).reshape(3, 4).T.ravel())


@pytest.mark.parametrize(
    ("pattern", "source", "target", "message"),
    [
        ("o i", (3, 5), (5, 3), "expected one '->'"),
        ("o i -> i o", (3, 5), (3, 5), r"expected shape \(5, 3\) for 'i o', got \(3, 5\)"),
        ("o i -> i o", (3, 5, 2), (5, 3), r"expected 2 axes in 'o i', got shape \(3, 5, 2\)"),
        ("(h d) i -> i h d", (13, 5), (5, 3, 4), r"expected shape \(12, 5\)"),
        ("(g h) -> (h g)", (12,), (12,), "give them as a fourth entry"),
        ("... i -> i ...", (3, 5), (5, 3), "write every axis out"),
        ("o i -> i i", (3, 3), (3, 3), "expected a permutation"),
        ("o i -> o", (3, 1), (3,), "expected a permutation"),
        ("", (3, 5), (5, 3), "expected equal shapes without an axis pattern"),
    ],
)
def test_wrong_patterns_are_refused_in_one_sentence(pattern, source, target, message):
    with pytest.raises(MappingError, match=message):
        AxisPattern(pattern, source, target)


TORCH = specs(weight=(6, 4), bias=(6,))
FLAX = specs(kernel=(4, 6), bias=(6,))
LINEAR = [("weight", "kernel", "o i -> i o"), ("bias", "bias", "")]


def test_bijection_is_exact_in_both_directions():
    mapping = ParameterMapping(LINEAR, TORCH, FLAX)
    arrays = drawn(TORCH)
    there = mapping.to_flax(arrays)
    np.testing.assert_array_equal(there["kernel"], arrays["weight"].T)
    for name, array in mapping.to_torch(there).items():
        assert array.tobytes() == arrays[name].tobytes()


def test_slices_feed_several_arrays_and_cover_each_element_once():
    torch = specs(in_proj_weight=(12, 4))
    flax = specs(query__kernel=(4, 2, 2), key__kernel=(4, 2, 2), value__kernel=(4, 2, 2))
    rules = [
        (f"in_proj_weight[{4 * k}:{4 * k + 4}]", f"{name}/kernel", "(h d) i -> i h d")
        for k, name in enumerate(("query", "key", "value"))
    ]
    mapping = ParameterMapping(rules, torch, flax)
    arrays = drawn(torch)
    there = mapping.to_flax(arrays)
    np.testing.assert_array_equal(there["key.kernel"].reshape(4, 4), arrays["in_proj_weight"][4:8].T)
    np.testing.assert_array_equal(mapping.to_torch(there)["in_proj_weight"], arrays["in_proj_weight"])
    with pytest.raises(
        MappingError, match=r"every parameter to be mapped; left on the torch side: in_proj_weight\[8:12"
    ):
        ParameterMapping(rules[:2], torch, {name: flax[name] for name in ("query.kernel", "key.kernel")})
    with pytest.raises(MappingError, match=r"every element once, got torch in_proj_weight\[0:4, 0:4\] twice"):
        ParameterMapping([*rules, ("in_proj_weight[:4]", "query.kernel", "(h d) i -> i h d")], torch, flax)


def test_block_without_counterpart_is_held_at_zero_and_not_compared():
    mapping = ParameterMapping(
        [*LINEAR[:1], ("bias[0:2]", None, "0"), ("bias[2:6]", "bias", "")], TORCH, specs(kernel=(4, 6), bias=(4,))
    )
    arrays = mapping.without_held(drawn(TORCH))
    assert not arrays["bias"][:2].any()
    assert arrays["bias"][2:].all()
    np.testing.assert_array_equal(mapping.to_torch(mapping.to_flax(arrays))["bias"], arrays["bias"])
    assert mapping.held_at_zero == ("('bias[0:2]', None, '0')",)


def test_buffers_may_be_left_out_but_not_in_part():
    torch = TORCH | {"mean": ParameterSpec(np.zeros(6, np.float32), False)}
    assert ParameterMapping(LINEAR, torch, FLAX).unmapped == {"torch": ("mean",), "flax": ()}
    flax = FLAX | {"batch_stats.mean": ParameterSpec(np.zeros(3, np.float32), False)}
    with pytest.raises(MappingError, match=r"left on the torch side: mean\[3:6\]"):
        ParameterMapping([*LINEAR, ("mean[0:3]", "batch_stats.mean")], torch, flax)


def test_names_are_taken_as_a_framework_spells_them():
    flax = {
        name: ParameterSpec(np.zeros(shape, np.float32), True)
        for name, shape in {"mlp/~/linear_0.w": (4, 6), "heads[0]": (6,), "heads[1]": (6,)}.items()
    }
    torch = specs(weight=(6, 4), a=(6,), b=(6,))
    for kernel in ("mlp/~/linear_0.w", "mlp.~.linear_0.w", "mlp/~/linear_0.w[:, 0:6]"):
        rules = [("weight", kernel, "o i -> i o"), ("a", "heads[0]"), ("b[0:2]", "heads[1][0:2]")]
        mapping = ParameterMapping([*rules, ("b[2:6]", "heads[1][2:6]")], torch, flax)
        assert mapping.flax_names == tuple(flax)
    alike = {name: ParameterSpec(np.zeros(3, np.float32), True) for name in ("x/y", "x.y")}
    assert ParameterMapping([("a", "x/y"), ("b", "x.y")], specs(a=(3,), b=(3,)), alike).flax_names == ("x/y", "x.y")
    many = specs(**{f"p{k}": (3,) for k in range(50)})
    with pytest.raises(MappingError, match=r"expected a flax parameter among p7, .*\(50 in all\), got 'p77'"):
        ParameterMapping([("a", "p77")], specs(a=(3,)), many)


def test_what_is_kept_keeps_its_own_values_on_either_side():
    own = {"torch": {"a": np.arange(6.0), "b": np.ones(3)}, "jax": {"x": -np.arange(6.0), "c": np.full(2, 7.0)}}
    kinds = {
        side: {name: ParameterSpec(array, False) for name, array in arrays.items()} for side, arrays in own.items()
    }
    rules = [("a[0:4]", "x[0:4]"), ("a[4:6]", "x[4:6]", "", "keep"), ("b", None, "keep"), (None, "c", "keep")]
    mapping = ParameterMapping(rules, kinds["torch"], kinds["jax"])
    assert mapping.drawn == ("a",)
    assert (mapping.kept_by_both, mapping.held_at_zero) == ({"a"}, ())
    assert (mapping.constants("torch"), mapping.constants("jax")) == (("b",), ("c",))
    both = mapping.both({"a": np.full(6, 9.0)}, own)
    np.testing.assert_array_equal(both["torch"]["a"], [9, 9, 9, 9, 4, 5])
    np.testing.assert_array_equal(both["jax"]["x"], [9, 9, 9, 9, -4, -5])
    np.testing.assert_array_equal(both["torch"]["b"], own["torch"]["b"])
    np.testing.assert_array_equal(both["jax"]["c"], own["jax"]["c"])
    assert own["torch"]["a"][0] == 0


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("weight", "kernel", 7), LINEAR[1]], r"expected an axis pattern such as .* got 7"),
        ([("weight", "kernel", "o i -> i o", 4)], "with an optional dict of lengths, and 'keep'"),
        ([("bias", None, "a -> b", "keep")], "'keep' for one that stays as it is"),
        (LINEAR[:1], r"left on the torch side: bias \(6,\); on the flax side: bias \(6,\)"),
        ([*LINEAR, LINEAR[1]], "every element once, got torch bias twice"),
        (
            [("weight", "kernel", ""), LINEAR[1]],
            r"expected equal shapes without an axis pattern, got \(6, 4\) and \(4, 6\)",
        ),
        (
            [("weigth", "kernel", "o i -> i o"), LINEAR[1]],
            "expected a torch parameter among weight, bias, got 'weigth'",
        ),
        (
            [("weight", "kernels", "o i -> i o"), LINEAR[1]],
            "expected a flax parameter among kernel, bias, got 'kernels'",
        ),
        ([("weight[0:9]", "kernel", "o i -> i o")], "expected a range inside 0:6 on axis 0 of weight"),
        ([("weight[0, x]", "kernel", "o i -> i o")], "write start:stop"),
        ([("bias[0:1, 0:1]", "bias", "")], "expected at most 1 ranges for bias"),
        ([("weight",)], "expected \\(torch name, flax path, axis pattern\\)"),
        ([("bias", None, "")], "or None and '0' for a block that is held at zero"),
        ([(None, None, "0")], "or None and '0' for a block that is held at zero"),
        ([(7, "kernel", "")], "expected a torch name such as"),
    ],
)
def test_wrong_rules_are_refused_in_one_sentence(rules, message):
    with pytest.raises(MappingError, match=message) as caught:
        ParameterMapping(rules, TORCH, FLAX)
    assert "\n" not in str(caught.value)


def test_mistyped_entries_are_refused():
    half = {"kernel": ParameterSpec(np.zeros((4, 6), np.float16), True), "bias": FLAX["bias"]}
    with pytest.raises(MappingError, match=r"expected one dtype on both sides of .* got float32 and float16"):
        ParameterMapping(LINEAR, TORCH, half)
    buffer = {"kernel": ParameterSpec(np.zeros((4, 6), np.float32), False), "bias": FLAX["bias"]}
    with pytest.raises(MappingError, match="got a parameter and a buffer"):
        ParameterMapping(LINEAR, TORCH, buffer)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms(use_true_random=False), st.integers(0, 3))
def test_any_permutation_with_grouping_round_trips(sizes, random, grouped):
    axes = [f"a{k}" for k in range(len(sizes))]
    order = list(range(len(sizes)))
    random.shuffle(order)
    length = dict(zip(axes, sizes, strict=True))
    left = " ".join(axes)
    right = [axes[k] for k in order]
    if grouped and len(right) > 1:
        pattern = f"{left} -> ({right[0]} {right[1]}) {' '.join(right[2:])}"
        target = (length[right[0]] * length[right[1]], *(length[axis] for axis in right[2:]))
    else:
        pattern, target = f"{left} -> {' '.join(right)}", tuple(length[axis] for axis in right)
    mapping = ParameterMapping([("t", "f", pattern)], specs(t=tuple(sizes)), specs(f=target))
    arrays = drawn(specs(t=tuple(sizes)))
    assert mapping.to_torch(mapping.to_flax(arrays))["t"].tobytes() == arrays["t"].tobytes()
