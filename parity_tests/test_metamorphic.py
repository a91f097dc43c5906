"""Relations between results, driven by hypothesis over shapes, layouts, leading dims and dtypes, on every subject.

A larger search: ``HYPOTHESIS_PROFILE=thorough python -m pytest parity_tests/test_metamorphic.py``.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity_tests.harness.cases import Case
from parity_tests.harness.dtypes import STORAGE_DTYPES
from parity_tests.harness.exact import lattice_limit
from parity_tests.harness.inputs import draw_inputs, draw_lattice
from parity_tests.harness.metamorphic import LATTICE_CHECKS, RANDOM_CHECKS
from parity_tests.harness.oracle import reference
from parity_tests.harness.run import judge
from parity_tests.harness.subjects.base import FRAMEWORKS, framework_available, load_subjects

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Deterministic by default, so that a failure seen once is seen again; compilation makes single examples slow.
_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    "database": None,
}
settings.register_profile("quick", max_examples=4, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=200, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

SUBJECTS = {
    f"{subject.framework}-{subject.implementation}": subject
    for framework in FRAMEWORKS
    if framework_available(framework)
    for subject in load_subjects(framework)
}
# Sizes are multiples of 8 half of the time: some implementations ask for aligned rows and would see nothing else.
SIZES = st.one_of(st.sampled_from([8, 16, 24]), st.integers(1, 20))


@st.composite
def cases(draw, fewest_rows=0):
    leading = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if fewest_rows:
        leading = (draw(st.integers(fewest_rows, 6)), *(max(size, 1) for size in leading[:1]))
    return Case(
        "drawn",
        leading,
        draw(st.integers(1, 5)),
        draw(SIZES),
        draw(SIZES),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "strided", "transposed"])),
    )


def skip_if_unsupported(subject, case, dtype):
    return subject.unsupported_reason(case, dtype) is not None


@pytest.mark.parametrize("subject_id", SUBJECTS)
@given(case=cases(), dtype=st.sampled_from(STORAGE_DTYPES), seed=st.integers(0, 1000))
def test_any_shape_agrees_with_the_oracle(subject_id, case, dtype, seed):
    subject = SUBJECTS[subject_id]
    if skip_if_unsupported(subject, case, dtype):
        return
    inputs = draw_inputs(case, dtype, seed)
    assert [r.reason for r in judge(subject, inputs, reference(inputs)).results if r.status != "ok"] == []


@pytest.mark.parametrize("relation", RANDOM_CHECKS)
@pytest.mark.parametrize("subject_id", SUBJECTS)
@given(case=cases(fewest_rows=2), dtype=st.sampled_from(STORAGE_DTYPES), seed=st.integers(0, 1000))
@settings(max_examples=2 if settings.default.max_examples < 10 else settings.default.max_examples)
def test_relation_holds(subject_id, relation, case, dtype, seed):
    subject = SUBJECTS[subject_id]
    if skip_if_unsupported(subject, case, dtype):
        return
    assert RANDOM_CHECKS[relation](subject, draw_inputs(case, dtype, seed)) == []


@pytest.mark.parametrize("relation", LATTICE_CHECKS)
@pytest.mark.parametrize("subject_id", SUBJECTS)
@given(case=cases(fewest_rows=2), dtype=st.sampled_from(["float64", "float32"]), seed=st.integers(0, 1000))
@settings(max_examples=2 if settings.default.max_examples < 10 else settings.default.max_examples)
def test_exact_relation_holds(subject_id, relation, case, dtype, seed):
    subject = SUBJECTS[subject_id]
    if skip_if_unsupported(subject, case, dtype):
        return
    inputs = draw_lattice(case, dtype, seed, lattice_limit(case, dtype))
    assert LATTICE_CHECKS[relation](subject, inputs) == []
