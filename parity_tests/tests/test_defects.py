"""The judge can fail: every planted defect is killed, in every framework, in fp32 and bf16; healthy code is not."""

import numpy as np
import pytest

from parity_tests.defects.layer import (
    DISTRIBUTIONS,
    DTYPES,
    INITIAL_DEFECTS,
    OFF_BLOCK_DEFECTS,
    flax_distribution,
    has_masked_layer,
    initialization_cause,
    initialization_faults,
    layers_of,
    observe_initial,
    observe_off_block,
    off_block_cause,
    torch_distribution,
)
from parity_tests.defects.subject import CASE, DEFECTS, observe
from parity_tests.defects.training import TRAINING_DEFECTS
from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.judge.records import environment, junit_document, summarize
from parity_tests.judge.run import judge, run_cells, too_dense
from parity_tests.judge.subjects import FRAMEWORKS, framework_available, load_subjects
from parity_tests.judge.tolerance import reference
from parity_tests.report.console import PlainConsole, print_report
from parity_tests.report.html import html_document

HEALTHY = {
    f"{framework}-{subject.implementation}": subject
    for framework in FRAMEWORKS
    if framework_available(framework)
    for subject in load_subjects(framework)
    if subject.implementation in ("matmul", "loop")
}
INSTALLED = [framework for framework in FRAMEWORKS if framework_available(framework)]
PLANTS = [(defect, dtype) for defect in DEFECTS for dtype in defect.dtypes]


# The method's list, by the names under which the command plants it.
METHOD = {
    "kernel transposed",
    "partitions off by one",
    "bias missing on one partition",
    "bias rolled",
    "bf16 accumulation",
    "truncated output",
    "output scaled by 1/n",
    "dW all zero",
    "dW of one partition times 1.01",
    "db accumulated in bf16",
    "off-block leak after a step",
    "NaN swallowed",
    "one element off by 1 percent",
    "TF32 in place of fp32",
    "identical partitions at init",
    "sqrt(n) too small init",
    "optimiser epsilon 1e-7 for 1e-8",
    "weight decay 1e-4 for 1e-2",
    "schedule off by one",
    "clipping off",
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.usefixtures("quick_compilation")
def test_correct_code_is_never_rejected_over_200_seeds(name, dtype):
    case, subject = Case("seeds", (12,), 3, 40, 24), HEALTHY[name]
    for seed in range(200):
        inputs = draw_inputs(case, dtype, seed)
        results = judge(subject, inputs, reference(inputs)).results
        assert [r.reason for r in results if r.status != "ok"] == [], seed


def test_the_methods_whole_list_is_planted_in_both_dtypes():
    in_every_dtype = {defect.name for defect in (*INITIAL_DEFECTS, *OFF_BLOCK_DEFECTS, *TRAINING_DEFECTS)}
    planted = {(name, dtype) for name in in_every_dtype for dtype in DTYPES}
    planted |= {(defect.name, dtype) for defect, dtype in PLANTS}
    missing = {(name, dtype) for name in METHOD for dtype in ("float32", "bfloat16")} - planted
    # A bfloat16 operand has fewer bits than TF32 keeps: there the defect changes nothing.
    assert missing == {("TF32 in place of fp32", "bfloat16")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("subject_id", HEALTHY)
def test_healthy_code_passes_where_defects_are_planted(subject_id, dtype):
    inputs = draw_inputs(CASE, dtype)
    assert [r.reason for r in judge(HEALTHY[subject_id], inputs, reference(inputs)).results if r.status != "ok"] == []


@pytest.mark.parametrize(("defect", "dtype"), PLANTS, ids=[f"{defect.name}-{dtype}" for defect, dtype in PLANTS])
@pytest.mark.parametrize("subject_id", HEALTHY)
def test_defect_is_killed_and_its_cause_named(subject_id, defect, dtype):
    seen = observe(defect, HEALTHY[subject_id], dtype)
    assert seen.killed
    assert defect.cause
    assert defect.cause in seen.cause


@pytest.mark.parametrize("defect", INITIAL_DEFECTS, ids=lambda defect: defect.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("framework", "layer"), [(framework, layer) for framework in INSTALLED for layer in layers_of(framework)]
)
def test_initial_defect_is_killed_and_its_cause_named(framework, layer, init, dtype, defect):
    seen = observe_initial(defect, framework, layer, init, dtype)
    assert seen.killed
    assert defect.cause in seen.cause


@pytest.mark.parametrize("defect", OFF_BLOCK_DEFECTS, ids=lambda defect: defect.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("framework", [framework for framework in INSTALLED if has_masked_layer(framework)])
def test_off_block_defect_is_killed_and_its_cause_named(framework, dtype, defect):
    seen = observe_off_block(defect, framework, dtype)
    assert seen.killed
    assert defect.cause in seen.cause


@pytest.mark.parametrize("where", ["before", "gradient", "after"])
@pytest.mark.parametrize("value", [1e-30, float("nan")])
def test_anything_but_an_exact_zero_outside_the_blocks_is_seen(where, value):
    blocks = np.kron(np.eye(3), np.ones((5, 4)))
    trace = {"before": blocks, "gradient": blocks, "after": blocks}
    assert off_block_cause(trace, 3) == ""
    leaking = blocks.copy()
    leaking[0, 4] = value
    assert off_block_cause(trace | {where: leaking}, 3)


def test_a_run_reports_the_defect_and_where_it_is():
    subject = next(iter(HEALTHY.values()))

    class Broken:
        framework, implementation, isolates_partitions, mode = subject.framework, "broken", True, subject.mode

        def unsupported_reason(self, case, dtype):
            return None

        def forward(self, inputs):
            y = subject.forward(inputs).copy()
            if y.shape == (4, 3, 8):  # the fingerprint's probes stay healthy
                y[1, 2, 3] += 0.25
            return y

        def vjp(self, inputs):
            outputs = subject.vjp(inputs)
            return outputs | ({"dweight": 0 * outputs["dweight"]} if inputs.x.shape == (4, 3, 8) else {})

    rows = list(run_cells([Broken()], ["float32"], [Case("broken", (4,), 3, 8, 8)]))
    row, other = [row for row in rows if row.status == "mismatch"]
    assert (row.tensor, row.worst_index, row.partition) == ("y", (1, 2, 3), 2)
    assert other.tensor == "dweight"
    assert other.reason.endswith("; likely cause: dweight is all zero")
    assert "likely cause: these numbers are right: another call (without gradients" in row.reason
    assert row.bound_fraction > 1
    assert "--implementation broken" in row.command


def test_a_subject_that_raises_fails_its_cell_and_the_others_go_on(capsys):
    subject = next(iter(HEALTHY.values()))

    class Raising:
        framework, implementation, isolates_partitions, mode = subject.framework, "raising", True, subject.mode

        def unsupported_reason(self, case, dtype):
            return None

        def forward(self, inputs):
            raise RuntimeError("no [/memory] left\nand a second line")

        vjp = forward

    rows = list(run_cells([Raising(), subject], ["float32"], [Case("square", (4,), 3, 8, 8)]))
    (failed,) = [row for row in rows if row.implementation == "raising"]
    assert (failed.status, failed.tensor) == ("mismatch", "")
    assert failed.reason == "the call raised RuntimeError: no [/memory] left"
    assert "--implementation raising" in failed.command
    others = [row for row in rows if row is not failed]
    assert {row.tensor for row in others} == {"y", "dx", "dweight", "dbias"}
    assert {row.status for row in others} == {"ok"}
    summary = summarize(rows)
    assert (summary.failed, summary.ok) == (1, False)
    # Every report can show a failure that has no tensor and no number.
    print_report(PlainConsole(width=200), rows, summary)
    assert "raising" in (shown := capsys.readouterr().out)
    assert failed.reason in shown
    assert "no [/memory] left" in junit_document(rows)
    assert "no [/memory] left" in html_document(rows, environment())


def test_a_dense_matrix_that_is_too_large_is_skipped_with_its_reason():
    subject = next(iter(HEALTHY.values()))

    class Dense:
        framework, implementation, isolates_partitions, mode = subject.framework, "masked", False, subject.mode
        unsupported_reason, forward, vjp = subject.unsupported_reason, subject.forward, subject.vjp

    large, small = Case("large", (1,), 4096, 2, 8), Case("small", (1,), 4, 2, 8)
    assert too_dense(Dense(), small) is None
    assert too_dense(subject, large) is None
    (row,) = run_cells([Dense()], ["float32"], [large])
    assert row.status == "skipped"
    assert "(32768, 8192)" in row.reason


def _draw(name, rng, n, i, o):
    if name == "torch":
        return rng.uniform(-1, 1, (n, i, o)) / np.sqrt(i)
    draws = rng.standard_normal((n, 4 * i * o))
    inside = np.stack([row[np.abs(row) < 2][: i * o] for row in draws]).reshape(n, i, o)
    return inside * flax_distribution(i).limit / 2


@pytest.mark.parametrize("name", ["torch", "flax"])
def test_initialiser_judge_accepts_the_right_and_kills_the_wrong(name):
    n, i, o = 16, 64, 32
    expected = {"torch": torch_distribution, "flax": flax_distribution}[name](i)
    for seed in range(50):
        assert initialization_faults(_draw(name, np.random.default_rng(seed), n, i, o), expected) == []
    right = _draw(name, np.random.default_rng(0), n, i, o)
    one_scaled = right.copy()
    one_scaled[3] *= 0.8
    planted = {
        "sqrt(n) too small": right / np.sqrt(n),
        "identical partitions": np.broadcast_to(right[:1], right.shape),
        "only positive": np.abs(right),
        "one partition scaled": one_scaled,
        "untruncated": np.random.default_rng(1).standard_normal((n, i, o)) * expected.std,
    }
    survivors = [what for what, draws in planted.items() if not initialization_faults(draws, expected)]
    assert survivors == []
    assert initialization_cause(right, expected) == ""
    assert "times the expected" in initialization_cause(one_scaled, expected)
