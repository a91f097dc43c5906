"""Relations between results, driven by hypothesis over shapes, layouts, leading dims and dtypes, on every subject.

A larger search: `HYPOTHESIS_PROFILE=thorough python -m pytest parity_tests/tests/test_metamorphic.py`.
"""

import dataclasses
import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parity_tests.judge.dtypes import STORAGE_DTYPES
from parity_tests.judge.exact import lattice_limit
from parity_tests.judge.inputs import Case, draw_inputs, draw_lattice
from parity_tests.judge.run import judge
from parity_tests.judge.subjects import (
    FRAMEWORKS,
    framework_available,
    load_subjects,
    release_programs,
)
from parity_tests.judge.tolerance import reference
from parity_tests.tests.metamorphic import LATTICE_CHECKS, RANDOM_CHECKS, check_one_partition, check_permutation
from parity_tests.tests.plain_linear import load_plain_linear

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Of each relation, where the quick profile has its explicit examples besides.
QUICK = settings.get_profile("quick").max_examples
FEW = settings.default.max_examples
if FEW <= QUICK:
    FEW = 2 if "EVERY_TEST" in os.environ else 1
FEW = settings(max_examples=FEW)

INSTALLED = [framework for framework in FRAMEWORKS if framework_available(framework)]
SUBJECTS = {
    f"{subject.framework}-{subject.implementation}": subject
    for framework in INSTALLED
    for subject in load_subjects(framework)
}
PLAIN = {framework: load_plain_linear(framework) for framework in INSTALLED}
# Sizes are multiples of 8 half of the time: kernels treat aligned rows apart.
SIZES = st.one_of(st.sampled_from([8, 16, 24]), st.integers(1, 20))
SEEDS = st.integers(0, 1000)
# What every relation is tried on besides what is drawn; one shape, so that JAX compiles it once for all relations.
SQUARE = Case("square", (4,), 4, 16, 16)
ONE = Case("one", (6,), 1, 16, 24)


@pytest.fixture(autouse=True)
def few_programs():
    """Each program that XLA compiles takes four of the 65,530 memory maps that Linux grants a process by default.

    Without one, JAX ends the process in the middle of a compilation, and the larger search compiles more than that.
    """
    yield
    if settings.default.max_examples > QUICK:
        release_programs()


@st.composite
def cases(draw, fewest_rows=0, partitions=st.integers(1, 5)):  # noqa: B008 - a strategy is a constant
    leading = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if fewest_rows:
        leading = (draw(st.integers(fewest_rows, 6)), *(max(size, 1) for size in leading[:1]))
    return Case(
        "drawn",
        leading,
        draw(partitions),
        draw(SIZES),
        draw(SIZES),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "strided", "transposed"])),
    )


# With one partition a permutation is no permutation, and a confusion of partitions no confusion.
SEVERAL = cases(fewest_rows=2, partitions=st.integers(2, 5))


def fitted(subject, case, dtype):
    """What was drawn, moved to the nearest that the subject declares to support: nothing that is drawn runs empty."""
    if subject.unsupported_reason(case, dtype) is not None and dtype == "float64":
        dtype = "float32"
    if subject.unsupported_reason(case, dtype) is not None:
        aligned = {name: -(-getattr(case, name) // 8) * 8 for name in ("in_features", "out_features")}
        case = dataclasses.replace(case, **aligned)
    reason = subject.unsupported_reason(case, dtype)
    assert reason is None, reason
    return case, dtype


@pytest.mark.parametrize("subject_id", SUBJECTS)
@given(case=cases(), dtype=st.sampled_from(STORAGE_DTYPES), seed=SEEDS)
def test_any_shape_agrees_with_the_oracle(subject_id, case, dtype, seed):
    subject = SUBJECTS[subject_id]
    inputs = draw_inputs(*fitted(subject, case, dtype), seed)
    assert [r.reason for r in judge(subject, inputs, reference(inputs)).results if r.status != "ok"] == []


@pytest.mark.sample(3)
@pytest.mark.parametrize("relation", RANDOM_CHECKS)
@pytest.mark.parametrize("subject_id", SUBJECTS)
@given(case=SEVERAL, dtype=st.sampled_from(STORAGE_DTYPES), seed=SEEDS)
@example(case=SQUARE, dtype="float32", seed=0)
@example(case=SQUARE, dtype="bfloat16", seed=0)
@FEW
def test_relation_holds(subject_id, relation, case, dtype, seed):
    subject = SUBJECTS[subject_id]
    assert RANDOM_CHECKS[relation](subject, draw_inputs(*fitted(subject, case, dtype), seed)) == []


@pytest.mark.sample(3)
@pytest.mark.parametrize("relation", LATTICE_CHECKS)
@pytest.mark.parametrize("subject_id", SUBJECTS)
@given(case=SEVERAL, dtype=st.sampled_from(["float64", "float32"]), seed=SEEDS)
@example(case=SQUARE, dtype="float32", seed=0)
@FEW
def test_exact_relation_holds(subject_id, relation, case, dtype, seed):
    subject = SUBJECTS[subject_id]
    case, dtype = fitted(subject, case, dtype)
    inputs = draw_lattice(case, dtype, seed, lattice_limit(case, dtype))
    assert LATTICE_CHECKS[relation](subject, inputs) == []


@pytest.mark.sample(2)
@pytest.mark.parametrize("subject_id", SUBJECTS)
@given(case=cases(fewest_rows=2, partitions=st.just(1)), dtype=st.sampled_from(STORAGE_DTYPES), seed=SEEDS)
@example(case=ONE, dtype="float64", seed=0)
@example(case=ONE, dtype="float32", seed=0)
@example(case=ONE, dtype="bfloat16", seed=0)
@example(case=ONE, dtype="float16", seed=0)
@FEW
def test_one_partition_is_the_frameworks_own_linear(subject_id, case, dtype, seed):
    subject = SUBJECTS[subject_id]
    case, dtype = fitted(subject, case, dtype)
    for inputs in (draw_lattice(case, dtype, seed, lattice_limit(case, dtype)), draw_inputs(case, dtype, seed)):
        assert check_one_partition(subject, inputs, PLAIN[subject.framework]) == []


class Changed:
    """A subject whose tensors are changed on their way out."""

    def __init__(self, subject, change):
        self.subject, self.change = subject, change
        self.framework, self.implementation, self.mode = subject.framework, "changed", subject.mode

    def forward(self, inputs):
        return self.change(inputs, self.subject.vjp(inputs))["y"]

    def vjp(self, inputs):
        return self.change(inputs, self.subject.vjp(inputs))


def scaled(name, partition=slice(None), factor=1.5):
    def change(inputs, outputs):
        value = outputs[name].copy()
        place = (..., partition, slice(None)) if name in ("y", "dx", "dbias") else partition
        value[place] *= value.dtype.type(factor)
        return outputs | {name: value}

    return change


def shifted(inputs, outputs):
    return outputs | {"y": outputs["y"] + outputs["y"].dtype.type(0.25)}


# What each relation must notice; dW and db are told apart where the relation speaks of both.
NOTICED = [
    ("permutation", scaled("y", 2)),
    ("permutation", scaled("dweight", 0)),
    ("scaling", shifted),
    ("scaling", lambda inputs, outputs: outputs | {"dx": outputs["dx"] * np.abs(inputs.x).max()}),
    ("one-hot Jacobian", scaled("y", 1, 1.01)),
    ("batch concatenation", lambda inputs, outputs: outputs | {"dweight": outputs["dweight"] / len(inputs.x)}),
    ("batch concatenation", lambda inputs, outputs: outputs | {"dbias": outputs["dbias"] / len(inputs.x)}),
    ("adjoint", scaled("dx", 3)),
    ("adjoint", scaled("dweight", 3)),
    ("adjoint", scaled("dbias", 3)),
    ("affine differences", scaled("dbias")),
]


@pytest.mark.parametrize(("relation", "change"), NOTICED)
def test_relation_notices_a_defect(relation, change):
    broken = Changed(next(iter(SUBJECTS.values())), change)
    if relation in LATTICE_CHECKS:
        inputs, check = draw_lattice(SQUARE, "float32"), LATTICE_CHECKS[relation]
    else:
        inputs, check = draw_inputs(SQUARE, "float32"), RANDOM_CHECKS[relation]
    assert check(broken, inputs) != []


@pytest.mark.parametrize("tensor", ["y", "dx", "dweight", "dbias"])
@pytest.mark.parametrize("draw", [draw_inputs, draw_lattice])
@pytest.mark.parametrize("framework", INSTALLED)
def test_a_defect_shows_against_the_frameworks_own_linear(framework, draw, tensor):
    broken = Changed(SUBJECTS[f"{framework}-matmul"], scaled(tensor))
    assert check_one_partition(broken, draw(ONE, "float32"), PLAIN[framework]) != []


def test_checks_refuse_what_would_prove_nothing():
    subject = next(iter(SUBJECTS.values()))
    with pytest.raises(ValueError, match="inputs: expected at least two partitions to permute, got 1; use a larger"):
        check_permutation(subject, draw_inputs(ONE, "float32"))
    with pytest.raises(ValueError, match="inputs: expected one partition, as a Linear has, got 4; use n = 1"):
        check_one_partition(subject, draw_inputs(SQUARE, "float32"), PLAIN[subject.framework])
