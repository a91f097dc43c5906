"""The judge on partitions of unequal sizes: its oracle, its bounds, its checks and what it says about a mistake."""

import dataclasses
import importlib
import os

import numpy as np
import pytest

from parity_tests.causes.layer import explain
from parity_tests.defects.subject import observe
from parity_tests.defects.unequal import UNEQUAL_DEFECTS
from parity_tests.judge.comparison import compare, compare_pair, pair_limits
from parity_tests.judge.dtypes import STORAGE_DTYPES
from parity_tests.judge.exact import check_isolation, check_lattice, check_wide_lattice
from parity_tests.judge.inputs import DEFAULT, UNEQUAL_DEFAULT, UNEQUAL_FULL, Case, Sizes, draw_inputs
from parity_tests.judge.run import count_cells, judge, run_cells
from parity_tests.judge.subjects import FRAMEWORKS, UNEQUAL, framework_available, load_subjects
from parity_tests.judge.tolerance import bounds, declared_arithmetic, reference
from parity_tests.tests.numpy_subject import NumpySubject

INTERLEAVED = next(case for case in UNEQUAL_DEFAULT if case.name == "unequal-interleaved")


class UnequalSubject(NumpySubject):
    """Partition by partition, each by the right code for n = 1."""

    sizes, isolates_partitions = UNEQUAL, True

    def vjp(self, inputs):
        """Every tensor in the packed form."""
        parts = [super(UnequalSubject, self).vjp(inputs.alone(k)) for k in range(inputs.num_partitions)]
        found = {}
        for name in parts[0]:
            order = range(inputs.num_partitions)
            leading = inputs.leading if name in ("y", "dx") else ()
            if name == "dweight":
                # The order of the packed form by its description: partitions of the size of the first, then others.
                size = list(zip(inputs.sizes.in_features, inputs.sizes.out_features, strict=True))
                order = sorted(order, key=lambda k: (size.index(size[k]), k))
            found[name] = np.concatenate([parts[k][name].reshape(*leading, -1) for k in order], axis=-1)
        return found


def test_the_packed_weight_holds_partitions_of_one_size_beside_each_other():
    sizes = Sizes((1, 4, 1, 2), (3, 5, 3, 2))
    assert list(sizes.buckets.values()) == [[0, 2], [1], [3]]
    assert sizes.places("weight") == [slice(0, 3), slice(6, 26), slice(3, 6), slice(26, 30)]
    assert sizes.places("dx") == [slice(0, 1), slice(1, 5), slice(5, 6), slice(6, 8)]
    assert sizes.labels("dbias").tolist() == [0] * 3 + [1] * 5 + [2] * 3 + [3] * 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_size_given_as_sequences_has_the_truth_and_the_bounds_of_equal_partitions(dtype):
    unequal = draw_inputs(Case("one-size", (5,), 3, (8, 8, 8), (4, 4, 4)), dtype)
    shapes = {"x": (5, 3, 8), "weight": (3, 8, 4), "bias": (3, 4), "cotangent": (5, 3, 4)}
    arrays = {name: getattr(unequal, name).reshape(shape) for name, shape in shapes.items()}
    truth, flat = reference(dataclasses.replace(unequal, **arrays, sizes=None)), reference(unequal)
    arithmetic = declared_arithmetic("fp64" if dtype == "float64" else "ieee_fp32")
    for name, tensor in truth.items():
        # One product a partition instead of one batched one: sums may be in another order.
        assert np.allclose(flat[name].value, tensor.value.reshape(flat[name].value.shape), rtol=1e-12, atol=1e-14)
        for tier, limit in bounds(tensor, arithmetic, ("T1", "T2", "T3")).items():
            packed = bounds(flat[name], arithmetic, (tier,))[tier]
            assert np.allclose(packed, limit.reshape(packed.shape), rtol=1e-9, atol=0), (name, tier)


def test_a_sum_is_bounded_by_its_own_number_of_terms():
    truth = reference(draw_inputs(Case("terms", (4,), 2, (2, 729), (3, 3), bias=False), "float32"))["y"]
    limit = bounds(truth, declared_arithmetic("ieee_fp32"), ("T1",))["T1"]
    share = limit / truth.magnitude
    assert share[:, :3].max() < 4 * 2.0**-24 < 700 * 2.0**-24 < share[:, 3:].min()


@pytest.mark.parametrize("case", UNEQUAL_FULL[:-1], ids=lambda case: case.name)
def test_right_code_is_accepted_and_runs_every_check(case):
    rows = list(run_cells([UnequalSubject()], ["float32"], [case], exact=True))
    assert {row.status for row in rows} == {"ok"}, [row.reason for row in rows]
    tensors = {row.tensor for row in rows}
    assert tensors >= {"y", "dx", "dweight", "lattice", "isolation"}
    assert ("dbias" in tensors) == case.bias
    (fractions,) = {len(row.partition_fractions) for row in rows if row.tensor == "dweight"}
    assert fractions == case.num_partitions


def test_equal_and_unequal_cases_are_for_different_subjects():
    subjects, cases = [UnequalSubject(), NumpySubject()], [DEFAULT[0], INTERLEAVED]
    assert count_cells(subjects, ["float32"], cases) == 2
    assert {row.case for row in run_cells([NumpySubject()], ["float32"], cases)} == {DEFAULT[0].name}


def test_checks_without_tolerance_see_a_wrong_bit_and_a_leak():
    def spoil(inputs, outputs):
        return outputs | {"y": outputs["y"] + np.float32(1)}

    case, right, wrong = INTERLEAVED, UnequalSubject(), UnequalSubject(spoil=spoil)
    assert check_lattice(right, case, "float32") == []
    assert any(said.startswith("y[0, 0, 0] is") for said in check_lattice(wrong, case, "float32"))
    wide = Case("wide", (3,), 2, (300, 4), (8, 2))
    assert check_wide_lattice(right, wide, "bfloat16") == []
    inputs = draw_inputs(case, "float32")
    assert check_isolation(right, inputs, 3, np.nan) == check_isolation(right, inputs, 0, np.inf)
    assert check_isolation(right, inputs, 3, np.nan).isolated

    class Leaking(UnequalSubject):
        def vjp(self, inputs):
            return {name: array + np.sum(inputs.x) * 0 for name, array in super().vjp(inputs).items()}

    assert not check_isolation(Leaking(), inputs, 3, np.nan).isolated
    swallowing = UnequalSubject(spoil=lambda inputs, outputs: outputs | {"dx": np.nan_to_num(outputs["dx"])})
    assert check_isolation(swallowing, inputs, 3, np.nan).swallowed == ("dx",)


def test_a_wrong_element_is_placed_in_its_partition():
    inputs = draw_inputs(INTERLEAVED, "float32")
    truth, outputs = reference(inputs), UnequalSubject().vjp(inputs)
    outputs["dweight"][inputs.sizes.places("dweight")[4].start] += 1
    (result,) = [r for r in compare(outputs, truth, declared_arithmetic("ieee_fp32")) if r.status != "ok"]
    assert (result.tensor, result.partition) == ("dweight", 4)
    assert [k for k, fraction in enumerate(result.partition_fractions) if fraction > 1] == [4]
    arithmetics = (declared_arithmetic("ieee_fp32"),) * 2
    pair = compare_pair(outputs, UnequalSubject().vjp(inputs), truth, pair_limits(truth, arithmetics))
    assert [(r.tensor, r.partition) for r in pair if r.status != "ok"] == [("dweight", 4)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("defect", UNEQUAL_DEFECTS, ids=lambda defect: defect.name)
def test_every_planted_defect_is_found_and_named(defect, dtype):
    seen = observe(defect, UnequalSubject(), dtype)
    assert seen.killed, seen.cause
    assert defect.cause in seen.cause


INSTALLED = [framework for framework in FRAMEWORKS if framework_available(framework)]
EVERY = os.environ.get("EVERY_TEST") == "1"


@pytest.mark.sample(2)
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("dtype", STORAGE_DTYPES if EVERY else ["bfloat16"])
@pytest.mark.parametrize("framework", INSTALLED)
def test_every_implementation_and_layer_holds_forward_gradients_and_isolation(framework, dtype):
    subjects = load_subjects(framework, "cpu", sizes=UNEQUAL)
    names = importlib.import_module(f"{framework}_impl.registry").implementation_names(unequal=True)
    assert {subject.implementation for subject in subjects} - {"layer", "linen"} == set(names)
    rows = list(run_cells(subjects, [dtype], UNEQUAL_DEFAULT if EVERY else [INTERLEAVED], exact=True))
    assert [row.reason for row in rows if row.status != "ok"] == []
    seen = {(row.implementation, row.tensor) for row in rows}
    for subject in subjects:
        assert {(subject.implementation, name) for name in ("y", "dx", "dweight", "dbias", "isolation")} <= seen
    # A dense product is declared to let NaN through: the check that finds it is the one that holds the others.
    (dense,) = [subject for subject in subjects if not subject.isolates_partitions]
    assert dense.implementation == "masked"


@pytest.mark.parametrize("framework", INSTALLED)
def test_modes_that_divide_partitions_say_why_unequal_ones_do_not_run(framework):
    subjects = load_subjects(framework, "cpu", ["vmap", "sharded"], sizes=UNEQUAL)
    reasons = [subject.unsupported_reason(INTERLEAVED, "float32") or "" for subject in subjects]
    assert len(reasons) > 4
    assert all("expected partitions of one size" in reason for reason in reasons)


def test_a_healthy_subject_has_no_cause():
    inputs = draw_inputs(UNEQUAL_DEFECTS[0].case, "float32")
    judged = judge(UnequalSubject(), inputs, reference(inputs))
    assert explain(judged.results, judged.outputs, inputs) == ""
