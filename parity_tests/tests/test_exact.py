"""Checks without a tolerance, on every subject: integer lattice, isolation of NaN and Inf, and the fingerprint."""

import os

import pytest

from parity_tests.judge.dtypes import STORAGE_DTYPES
from parity_tests.judge.exact import check_isolation, check_lattice, check_wide_lattice, lattice_limit
from parity_tests.judge.fingerprint import observed_precision, take_fingerprint
from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.judge.subjects import FRAMEWORKS, framework_available, load_subjects
from parity_tests.judge.tolerance import PRECISION_OF_DTYPE, declared_arithmetic, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

SUBJECTS = {
    f"{subject.framework}-{subject.implementation}": subject
    for framework in FRAMEWORKS
    if framework_available(framework)
    for subject in load_subjects(framework)
}
LATTICE_CASES = (
    Case("square", (7,), 4, 16, 16),
    Case("wide", (2, 3), 3, 8, 24),
    Case("no-bias", (16,), 2, 24, 8, bias=False),
    Case("odd", (5,), 3, 7, 11),
)
PROBE = Case("probe", (1,), 1, 16, 16)


def supported(subject_id, case, dtype):
    subject = SUBJECTS[subject_id]
    reason = subject.unsupported_reason(case, dtype)
    if reason is not None:
        pytest.skip(reason)
    return subject


def left_out(subject, case, dtype):
    """Whether another shape of the dtype, or the function that a layer calls, shows this: JAX compiles for each."""
    if "EVERY_TEST" in os.environ or subject.framework != "jax" or case is LATTICE_CASES[0]:
        return False
    return dtype in ("float64", "float16") or subject.implementation in ("layer", "linen")


@pytest.mark.sample(5)
@pytest.mark.parametrize("case", LATTICE_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("subject_id", SUBJECTS)
def test_integers_are_bitwise_exact(subject_id, dtype, case):
    subject = supported(subject_id, case, dtype)
    if left_out(subject, case, dtype):
        pytest.skip("the first shape is judged in every dtype: run with EVERY_TEST=1")
    assert check_lattice(subject, case, dtype) == []


def test_the_lattice_misses_no_tensor(monkeypatch):
    subject, case = next(iter(SUBJECTS.values())), LATTICE_CASES[0]
    found = subject.vjp(draw_inputs(case, "float32"))
    monkeypatch.setattr(type(subject), "vjp", lambda self, inputs: {"y": found["y"]})
    wrong = check_lattice(subject, case, "float32")
    assert [sentence for sentence in wrong if "missing" in sentence] == ["dx is missing", "dweight is missing"] + (
        ["dbias is missing"] if case.bias else []
    )
    assert len(wrong) == 3 + case.bias


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("subject_id", SUBJECTS)
def test_sums_beyond_the_output_format_are_rounded_once(subject_id, dtype):
    case = Case("beyond", (4,), 2, 2048 if dtype == "float16" else 512, 16, bias=False)
    assert check_wide_lattice(supported(subject_id, case, dtype), case, dtype) == []


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("subject_id", SUBJECTS)
def test_isolation_is_as_declared(subject_id, poison):
    case = Case("isolation", (6,), 4, 8, 8)
    subject = supported(subject_id, case, "float32")
    found = check_isolation(subject, draw_inputs(case, "float32"), partition=2, poison=poison)
    assert found.swallowed == ()
    assert found.isolated == subject.isolates_partitions


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("subject_id", SUBJECTS)
def test_fingerprint_honours_the_dtype(subject_id, dtype):
    fingerprint = take_fingerprint(supported(subject_id, PROBE, dtype), dtype)
    assert fingerprint.honours(declared_arithmetic(PRECISION_OF_DTYPE[dtype])), fingerprint


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("subject_id", SUBJECTS)
def test_observed_precision_is_the_requested_one(subject_id, dtype):
    case = Case("observed", (16,), 3, 64, 32)
    subject = supported(subject_id, case, dtype)
    inputs = draw_inputs(case, dtype)
    assert observed_precision(subject.vjp(inputs), reference(inputs), dtype) == PRECISION_OF_DTYPE[dtype]


def test_lattice_limit_shrinks_with_the_sum():
    assert lattice_limit(Case("short", (4,), 2, 16, 16), "bfloat16") == 3
    assert lattice_limit(Case("longer", (4,), 2, 60, 16), "bfloat16") == 2
    with pytest.raises(ValueError, match="expected at most"):
        lattice_limit(Case("too-long", (4,), 2, 500, 16), "bfloat16")


def test_wide_lattice_refuses_a_size_that_would_prove_nothing():
    case = Case("small", (4,), 2, 8, 16, bias=False)
    with pytest.raises(ValueError, match="choose in_features"):
        check_wide_lattice(next(iter(SUBJECTS.values())), case, "bfloat16")
