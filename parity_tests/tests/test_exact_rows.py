"""The checks of a run that need no tolerance: what they find, where they are left out, and that a row says so."""

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from parity_tests.judge.exact import left_out
from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.judge.records import summarize
from parity_tests.judge.run import run_cells
from parity_tests.judge.subjects import FRAMEWORKS, framework_available, load_subjects
from parity_tests.report.console import print_report
from parity_tests.tests.numpy_subject import NumpySubject

INSTALLED = [framework for framework in FRAMEWORKS if framework_available(framework)]
CASE = Case("square", (8,), 4, 16, 16)


def broken_sums(inputs, outputs):
    """A running sum in bf16, right for small sums only."""
    total = np.zeros(outputs["y"].shape, ml_dtypes.bfloat16)
    for i in range(inputs.weight.shape[1]):
        product = inputs.x[..., i, None].astype(np.float32) * inputs.weight[:, i].astype(np.float32)
        total = (total.astype(np.float32) + product).astype(ml_dtypes.bfloat16)
    return outputs | {"y": total}


def swallowed(inputs, outputs):
    return outputs | {"y": np.nan_to_num(outputs["y"].astype(np.float32)).astype(outputs["y"].dtype)}


def spread(inputs, outputs):
    bad = not np.isfinite(outputs["y"].astype(np.float32)).all()
    return outputs | {"y": np.full_like(outputs["y"], np.nan)} if bad else outputs


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda inputs, outputs: outputs, set()),
        (
            lambda inputs, outputs: outputs | {"dx": (outputs["dx"].astype(np.float32) * 1.01).astype("bfloat16")},
            {"lattice"},
        ),
        (broken_sums, {"wide lattice"}),
        (swallowed, {"isolation"}),
        (spread, {"isolation"}),
    ],
    ids=["healthy", "wrong by a percent", "narrow sums", "swallows", "spreads"],
)
def test_a_run_makes_the_checks_that_need_no_tolerance(spoil, expected, capsys):
    case = Case("exact", (4,), 3, 160, 8, bias=False)
    rows = list(run_cells([NumpySubject(spoil=spoil)], ["bfloat16"], [case], exact=True))
    exact = [row for row in rows if row.kind == "exact"]
    assert [row.tensor for row in exact] == ["lattice", "wide lattice", "isolation"]
    assert {row.tensor for row in exact if row.status == "mismatch"} >= expected
    assert (expected == set()) == all(row.status == "ok" for row in exact)
    assert all(row.command and (row.reason or row.status == "ok") for row in exact)
    print_report(Console(width=200), rows, summarize(rows))
    shown = capsys.readouterr().out
    assert f"{sum(row.status == 'ok' for row in exact)}/3" in shown
    assert "false-alarm rate of 1e-06" in shown


def test_isolation_is_demanded_only_where_it_is_declared():
    class Undeclared(NumpySubject):
        isolates_partitions = False

    for spoil in (lambda inputs, outputs: outputs, spread):
        rows = run_cells([Undeclared(spoil=spoil)], ["float32"], [CASE], exact=True)
        assert [row.status for row in rows if row.tensor == "isolation"] == ["ok"]


def test_checks_that_a_case_does_not_admit_are_left_out_and_a_cell_without_any_says_why():
    cases = [
        Case("empty", (0,), 3, 8, 8),
        Case("large", (2**10,), 4, 256, 8),
        Case("one", (4,), 1, 8, 8),
        Case("rows", (512,), 2, 8, 8),
    ]
    rows = list(run_cells([NumpySubject()], ["bfloat16"], cases, exact=True))
    assert [(row.case, row.tensor, row.status) for row in rows if row.kind == "exact"] == [
        ("empty", "", "skipped"),
        ("large", "", "skipped"),
        ("one", "lattice", "ok"),
        ("rows", "isolation", "ok"),
    ]
    assert [row.reason for row in rows if row.status == "skipped"] == [
        "an empty batch has no sums to compare without tolerance.",
        "integers and NaN say nothing new on more than 1048576 elements; smaller cases have these checks.",
    ]


@pytest.mark.parametrize("framework", INSTALLED)
@pytest.mark.usefixtures("quick_compilation")
def test_a_mode_that_casts_has_the_checks_without_tolerance_in_what_it_computes_in(framework):
    mode = {"torch": "autocast", "jax": "policy"}[framework]
    (subject,) = [s for s in load_subjects(framework, "cpu", modes=[mode]) if s.implementation == "matmul"]
    # 160 terms: float32 would allow integers up to 3, bfloat16 only +-1; for the wide lattice they are enough.
    case = Case("exact", (4,), 3, 160, 8, bias=False)
    rows = [row for row in run_cells([subject], ["float32"], [case], exact=True) if row.kind == "exact"]
    assert [(row.tensor, row.status) for row in rows] == [
        (check, "ok") for check in ("lattice", "wide lattice", "isolation")
    ]
    # More terms than bfloat16 has exact integers: the lattice would be wrong, and is left out.
    rows = [
        row
        for row in run_cells([subject], ["float32"], [Case("long", (300,), 1, 8, 8)], exact=True)
        if row.kind == "exact"
    ]
    assert rows == []


@pytest.mark.skipif("torch" not in INSTALLED, reason="needs torch")
def test_a_mode_that_compiles_each_call_says_why_it_has_no_checks_without_tolerance():
    (subject,) = [s for s in load_subjects("torch", "cpu", modes=["compile"]) if s.implementation == "matmul"]
    inputs = draw_inputs(CASE, "float32")
    assert left_out(subject, CASE, inputs) == (
        "each of these calls would be a compilation; the other modes have the checks without tolerance."
    )
