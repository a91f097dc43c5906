"""Every mode reaches every implementation: vmapped, compiled, cast, uncompiled and sharded, against the oracle.

So do the checks without a tolerance, on the shapes that are compiled here anyway. The default modes are judged in
`test_parity`, `test_exact` and `test_metamorphic`; what needs several devices or processes in
`test_sharded_modes`.
"""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from parity_tests.judge.exact import check_isolation, check_lattice
from parity_tests.judge.inputs import FULL, Case, draw_inputs
from parity_tests.judge.run import count_cells, judge, run_cells
from parity_tests.judge.subjects import (
    COUNTERPARTS,
    DEFAULT_MODES,
    FRAMEWORKS,
    MODES,
    SHARDS,
    covered,
    framework_available,
    load_subjects,
    members_of,
    modes_of,
    shards_of,
    split_members,
)
from parity_tests.judge.tolerance import reference
from parity_tests.tests.metamorphic import RANDOM_CHECKS

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = [framework for framework in FRAMEWORKS if framework_available(framework)]
# Four partitions are two members of two: an ensemble whose members have several partitions.
CASE = Case("modes", (2, 3), 4, 8, 16)
IN_PROCESS = {
    f"{framework}-{mode}-{subject.implementation}": subject
    for framework in INSTALLED
    for mode in modes_of(framework)
    if mode not in (DEFAULT_MODES[framework], "sharded")
    for subject in load_subjects(framework, "cpu", [mode])
}
COMPILED = {name: subject for name, subject in IN_PROCESS.items() if subject.mode == "compile"}
EAGER = {name: subject for name, subject in IN_PROCESS.items() if subject.mode != "compile"}
# Uncompiled JAX compiles each operation by itself: in bf16 only for what "auto" means.
CELLS = [
    (name, dtype)
    for name, subject in EAGER.items()
    for dtype in ("float32", "bfloat16")
    if dtype in MODES[subject.mode].dtypes
    and (dtype == "float32" or (subject.framework, subject.mode) != ("jax", "eager") or name.endswith("-matmul"))
]
# What no mode can do, by framework, mode and implementation; everything else must be reached.
UNREACHED = {
    ("torch", "compile", "grouped_matmul"),  # traced in bfloat16 only
    ("jax", "vmap", "grouped_matmul"),  # ragged_dot cannot be mapped over its operands alone
}


def failures(subject, dtype):
    inputs = draw_inputs(CASE, dtype)
    judgement = judge(subject, inputs, reference(inputs))
    assert {result.tensor for result in judgement.results} == {"y", "dx", "dweight", "dbias"}
    return [result.reason for result in judgement.results if result.status != "ok"]


def exact_failures(subject, case, dtype, poisons=(np.nan, np.inf), relations=("permutation", "scaling")):
    """What needs no tolerance, on one shape: in most modes one compiled program serves all of it."""
    wrong = check_lattice(subject, case, dtype)
    inputs = draw_inputs(case, dtype)
    for poison in poisons:
        # Without gradients it would be a second program, which the test of the default mode has.
        found = check_isolation(subject, inputs, partition=1, poison=poison, plain_forward=False)
        if found.swallowed:
            wrong.append(f"{poison} was swallowed in {', '.join(found.swallowed)}")
        # One way only: what leaks may be kept apart by a mode, as between two shards.
        if subject.isolates_partitions and not found.isolated:
            wrong.append(f"{poison} reached another partition")
    for name in relations:
        wrong += RANDOM_CHECKS[name](subject, inputs)
    return wrong


def reachable(subject, dtype):
    reason = subject.unsupported_reason(CASE, dtype)
    if reason is not None:
        assert reason.startswith(("mode ", "`implementation`")), reason
        if dtype == "float32":
            assert (subject.framework, subject.mode, subject.implementation) in UNREACHED
        pytest.skip(reason)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("subject_id", "dtype"), CELLS)
@pytest.mark.usefixtures("quick_compilation")
def test_mode_agrees_with_the_oracle_forward_and_backward(subject_id, dtype):
    subject = EAGER[subject_id]
    reachable(subject, dtype)
    assert failures(subject, dtype) == []


@pytest.mark.parametrize(
    ("subject_id", "dtype"),
    # Operation by operation, what an implementation keeps is what its operations keep.
    [
        pytest.param(*cell, marks=pytest.mark.every if re.fullmatch(r"jax-eager-(?!matmul).*", cell[0]) else ())
        for cell in CELLS
    ],
)
@pytest.mark.usefixtures("quick_compilation")
def test_mode_keeps_what_needs_no_tolerance(subject_id, dtype):
    subject = EAGER[subject_id]
    reachable(subject, dtype)
    assert exact_failures(subject, CASE, dtype) == []


@pytest.mark.usefixtures("quick_compilation")
def test_a_leak_that_is_not_declared_is_noticed_in_a_mode():
    masked = next(subject for subject in EAGER.values() if (subject.mode, subject.implementation) == ("vmap", "masked"))
    assert exact_failures(masked, CASE, "float32") == []
    (reason, *_) = exact_failures(dataclasses.replace(masked, isolates_partitions=True), CASE, "float32")
    assert reason == "nan reached another partition"


@pytest.mark.compile
@pytest.mark.slow
# torch's own compiler uses what torch deprecates.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.torch._prims_common.check. is deprecated:FutureWarning"
)
@pytest.mark.parametrize("subject_id", COMPILED)
def test_inductor_agrees_with_the_oracle_forward_and_backward(subject_id):
    subject = COMPILED[subject_id]
    dtype = "bfloat16" if subject.implementation == "grouped_matmul" else "float32"
    reachable(subject, dtype)
    assert failures(subject, dtype) == []
    # Every call is compiled anew, so here only what no other mode can stand for.
    assert exact_failures(subject, CASE, dtype, poisons=[np.nan], relations=[]) == []


def test_the_cells_of_a_run_are_those_that_were_counted():
    framework = INSTALLED[0]
    subjects = [
        subject
        for mode in modes_of(framework)[:1]
        for subject in load_subjects(framework, "cpu", [mode])
        if subject.implementation in ("loop", "matmul")
    ]
    announced = []

    def included(subject, case):
        return subject.implementation == "matmul" or case.bias

    cases = [Case("with", (2,), 2, 8, 8), Case("without", (2,), 2, 8, 8, bias=False)]
    rows = list(run_cells(subjects, ["float32"], cases, progress=announced.append, included=included))
    assert len(announced) == count_cells(subjects, ["float32"], cases, included) == 3
    assert {(row.implementation, row.case) for row in rows} == {
        ("loop", "with"),
        ("matmul", "with"),
        ("matmul", "without"),
    }


@pytest.mark.skipif(len(INSTALLED) < 2, reason="counterparts are pairs of both frameworks")
@pytest.mark.usefixtures("quick_compilation")
def test_counterparts_meet_each_other_and_their_defaults():
    subjects = [
        subject
        for framework in INSTALLED
        for subject in load_subjects(
            framework, "cpu", [DEFAULT_MODES[framework], {"torch": "autocast", "jax": "policy"}[framework]]
        )
        if subject.implementation == "matmul"
    ]
    rows = list(run_cells(subjects, ["float32"], [Case("square", (8,), 4, 16, 16)]))
    assert {(row.kind, row.framework, row.mode) for row in rows if row.kind != "oracle"} == {
        ("pair", "torch+jax", "eager+jit"),
        ("pair", "torch+jax", "autocast+policy"),
        ("mode", "torch", "autocast+eager"),
        ("mode", "jax", "policy+jit"),
    }
    assert [row.reason for row in rows if row.status != "ok"] == []
    assert all("--mode policy" in row.command for row in rows if "policy" in row.mode)


def test_the_table_names_every_mode_once_and_its_sets_exist():
    for framework, default in DEFAULT_MODES.items():
        assert default in modes_of(framework)
        for mode in modes_of(framework):
            for case in FULL:
                assert covered(framework, default, case)
                assert isinstance(covered(framework, mode, case), bool)
    assert {mode for mode in MODES if not any(mode in modes_of(framework) for framework in FRAMEWORKS)} == set()
    assert all(first in modes_of("torch") and second in modes_of("jax") for first, second in COUNTERPARTS)


def test_an_ensemble_and_its_shards_divide_the_partitions():
    assert [members_of(n) for n in (1, 2, 3, 4, 9, 321)] == [1, 2, 3, 2, 3, 3]
    assert [shards_of(n) for n in (1, 2, 4, 8, 32, 10, 321, 11)] == [1, 2, 4, SHARDS, SHARDS, 5, 3, 1]
    inputs = draw_inputs(CASE, "float32")
    members = split_members(inputs)
    assert len(members) == 2
    assert np.array_equal(np.concatenate([member.x for member in members], -2), inputs.x)
    assert np.array_equal(np.concatenate([member.weight for member in members]), inputs.weight)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the memory maps of a process")
@pytest.mark.skipif("jax" not in INSTALLED, reason="the JAX tree needs jax and flax")
def test_a_long_run_does_not_keep_what_it_compiled():
    """A process of thousands of programs would have as many memory maps as Linux allows, and crash."""
    chosen = [subject for subject in load_subjects("jax", "cpu") if subject.implementation == "loop"]
    maps = []
    for rows in range(4, 7):
        # An unrolled program, another one for each number of rows.
        cells = run_cells(chosen, ["float32"], [Case("unrolled", (rows,), 16, 4, 4)])
        assert {row.status for row in cells} == {"ok"}
        maps.append(len(Path("/proc/self/maps").read_text().splitlines()))
    # Each of them is a hundred maps and more.
    assert max(maps) - maps[0] < 100
