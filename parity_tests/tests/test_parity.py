"""Every implementation in both frameworks computes the same function: y, dx, dW and db, in all dtypes and cases."""

import functools
import os

import pytest

from parity_tests.judge.comparison import compare_pair, pair_limits
from parity_tests.judge.dtypes import STORAGE_DTYPES
from parity_tests.judge.inputs import DEFAULT, SMOKE, draw_inputs
from parity_tests.judge.run import judge
from parity_tests.judge.subjects import FRAMEWORKS, framework_available, load_subjects
from parity_tests.judge.tolerance import TENSORS, reference

INSTALLED = [framework for framework in FRAMEWORKS if framework_available(framework)]
SUBJECTS = {
    f"{subject.framework}-{subject.implementation}": subject
    for framework in INSTALLED
    for subject in load_subjects(framework)
}
CASES = {case.name: case for case in DEFAULT}
# A JAX layer calls the function with "auto": away from the smoke cases it compiles the very program of `matmul`, again.
CELLS = [
    (subject_id, case_name)
    for subject_id in SUBJECTS
    for case_name, case in CASES.items()
    if case in SMOKE or subject_id not in ("jax-layer", "jax-linen")
]


# Of JAX beside `matmul`, which is judged in every dtype; drawn shapes of all are those of test_metamorphic.py.
IN_EVERY_CASE = {("float32", "grouped_conv"), ("float32", "grouped_matmul")}


@pytest.fixture(autouse=True)
def _compile_the_smoke_cases_in_full(request):
    callspec = getattr(request.node, "callspec", None)
    chosen = {} if callspec is None else callspec.params
    # In other dtypes with EVERY_TEST=1, and by the command that `make compare` runs.
    in_full = "EVERY_TEST" in os.environ or chosen.get("dtype") == "float32"
    if "case_name" in chosen and not (CASES[chosen["case_name"]] in SMOKE and in_full):
        request.getfixturevalue("quick_compilation")


@functools.cache
def problem(case_name, dtype):
    inputs = draw_inputs(CASES[case_name], dtype)
    return inputs, reference(inputs)


def left_out(subject, case, dtype):
    """Whether a cell of JAX, which compiles for each, is of a kind that the smoke cases and other dtypes show."""
    if "EVERY_TEST" in os.environ or subject.framework != "jax":
        return False
    if case in SMOKE:
        return dtype in ("float64", "float16") and subject.implementation in ("masked", "vmap", "in_turn", "linen")
    return subject.implementation != "matmul" and (dtype, subject.implementation) not in IN_EVERY_CASE


# One evaluation serves the tests of all its tensors and all its pairs.
@functools.cache
def judgement(subject_id, dtype, case_name):
    subject = SUBJECTS[subject_id]
    reason = subject.unsupported_reason(CASES[case_name], dtype)
    if reason is not None:
        return reason
    if left_out(subject, CASES[case_name], dtype):
        return "another implementation or dtype of JAX is judged in this case: run with EVERY_TEST=1"
    # The program without gradients is compiled apart: the smoke cases judge it, in every dtype.
    return judge(subject, *problem(case_name, dtype), forward=CASES[case_name] in SMOKE)


def test_at_least_one_framework_is_installed():
    assert INSTALLED


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize(("subject_id", "case_name"), CELLS)
def test_subject_agrees_with_the_oracle(subject_id, dtype, case_name, tensor):
    if tensor == "dbias" and not CASES[case_name].bias:
        pytest.skip("the case has no bias")
    judged = judgement(subject_id, dtype, case_name)
    if isinstance(judged, str):
        pytest.skip(judged)
    (result,) = [result for result in judged.results if result.tensor == tensor]
    assert result.status == "ok", result.reason


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("subject_id", SUBJECTS)
def test_correct_code_is_accepted_whatever_is_drawn(subject_id, dtype):
    subject, case = SUBJECTS[subject_id], CASES["square"]
    if (reason := subject.unsupported_reason(case, dtype)) is not None:
        pytest.skip(reason)
    for seed in range(1, 6):
        inputs = draw_inputs(case, dtype, seed)
        rejected = [r.reason for r in judge(subject, inputs, reference(inputs)).results if r.status != "ok"]
        assert rejected == [], f"seed {seed}"


@pytest.mark.skipif(len(INSTALLED) < 2, reason=f"pairs need both frameworks, installed: {', '.join(INSTALLED)}")
@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_every_torch_jax_pair_agrees(dtype, case_name):
    _, truth = problem(case_name, dtype)
    limits = functools.cache(lambda *arithmetics: pair_limits(truth, arithmetics))
    sides = {
        framework: {
            name: judged
            for name, at in CELLS
            if at == case_name
            and name.startswith(framework)
            and not isinstance(judged := judgement(name, dtype, case_name), str)
        }
        for framework in FRAMEWORKS
    }
    assert all(sides.values()), "a pair needs a subject on either side"
    failures = [
        f"{first_name} against {second_name}: {result.reason}"
        for first_name, first in sides["torch"].items()
        for second_name, second in sides["jax"].items()
        for result in compare_pair(first.outputs, second.outputs, truth, limits(first.arithmetic, second.arithmetic))
        if result.status != "ok"
    ]
    assert failures == []
