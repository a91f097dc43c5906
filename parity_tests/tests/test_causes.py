"""Likely causes beyond the planted defects' own: what must not be named, what a run and the ladder say."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from parity_tests.causes.layer import UNEXPLAINED, explain
from parity_tests.defects.subject import DEFECTS, plant
from parity_tests.defects.training import TRAINING_DEFECTS, observe_training
from parity_tests.judge.comparison import compare, missing_tensors
from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.judge.subjects import FRAMEWORKS, framework_available
from parity_tests.judge.tolerance import PRECISION_OF_DTYPE, declared_arithmetic, reference
from parity_tests.training.ladder import RUNGS, LadderSide, climb, load_side
from parity_tests.training.tasks import OPTIMIZERS, partitioned_mlp

CASE = Case("causes", (24,), 3, 16, 16)
BY_NAME = {defect.name: defect for defect in DEFECTS}
NUMBERS = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def right(inputs):
    """What correct code returns: the truth, rounded once."""
    return {name: tensor.value.astype(NUMBERS[inputs.dtype]) for name, tensor in reference(inputs).items()}


def cause(inputs, changed):
    outputs = right(inputs)
    for name, change in changed.items():
        wide = change(outputs[name].astype(np.float64))
        outputs[name] = wide.astype(NUMBERS[inputs.dtype])
    truth = reference(inputs)
    arithmetic = declared_arithmetic(PRECISION_OF_DTYPE[inputs.dtype])
    return explain([*compare(outputs, truth, arithmetic), *missing_tensors(outputs, truth)], outputs, inputs)


def one_off(array):
    array = array.copy()
    array[5, 1, 7] += 1
    return array


def one_partition(array):
    array = array.copy()
    array[:, 2] = np.random.default_rng(0).standard_normal(array[:, 2].shape)
    return array


def poisoned(array):
    array = array.copy()
    array[0, 1, 0] = np.nan
    return array


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, ""),
        ({"y": one_off}, "only y[5, 1, 7] of 1152 elements differs"),
        ({"y": one_partition}, "only partition 2 of 3 differ"),
        ({"y": poisoned}, "y contains NaN in partition 1 of 3"),
        ({"y": lambda y: np.roll(y, -1, axis=1)}, "y is rolled back by one partition"),
        ({"dx": lambda dx: -dx}, "dx is scaled by -1"),
        ({"dweight": lambda dw: dw.swapaxes(1, 2)}, "dweight is transposed"),
        ({"dweight": lambda dw: dw / 24}, "dweight is scaled by 1/rows (a mean, not a sum)"),
        ({"dx": lambda dx: np.abs(dx) ** 1.5}, UNEXPLAINED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_named_in_every_dtype(dtype, changed, expected):
    assert cause(draw_inputs(CASE, dtype), changed) == expected


@pytest.mark.parametrize(
    ("dtype", "operands", "named"),
    [("float64", np.float32, "float32"), ("float32", ml_dtypes.bfloat16, "bfloat16")],
    ids=["float64", "float32"],
)
def test_operands_that_lost_bits_are_named(dtype, operands, named):
    inputs = draw_inputs(CASE, dtype)
    lost = dataclasses.replace(
        inputs,
        x=inputs.x.astype(operands).astype(inputs.x.dtype),
        weight=inputs.weight.astype(operands).astype(inputs.x.dtype),
    )
    assert cause(inputs, {"y": lambda y: right(lost)["y"]}) == f"operands are rounded to {named}"


@pytest.mark.parametrize("number", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_a_result_that_was_rounded_short_is_named(number):
    said = cause(draw_inputs(CASE, "float32"), {"y": lambda y: y.astype(number).astype(np.float64)})
    assert said.startswith("y is rounded to ")
    assert np.dtype(number).name in said


INSTALLED = [framework for framework in FRAMEWORKS if framework_available(framework)]
both = pytest.mark.skipif(len(INSTALLED) < 2, reason="the ladder compares both frameworks")


@both
@pytest.mark.parametrize(
    ("name", "rung"),
    [
        ("kernel transposed", 1),
        ("bias missing on one partition", 1),
        ("TF32 in place of fp32", 1),
        ("dW all zero", 2),
        ("no gradient of the bias", 2),
        ("dx of the wrong partition", 2),
    ],
)
def test_the_ladder_stops_at_the_computation_and_says_why(name, rung):
    trusted, healthy = (load_side(framework) for framework in FRAMEWORKS)
    broken: LadderSide = dataclasses.replace(healthy, subject=plant(BY_NAME[name], healthy.subject))
    report = climb([trusted, broken], draw_inputs(CASE, "float32"), partitioned_mlp(), OPTIMIZERS["sgd"], "sgd", 5, 2)
    assert report.first_failure.name == RUNGS[rung]
    assert len(report.rungs) == rung + 1
    assert report.first_failure.detail.startswith("jax matmul: ")
    assert BY_NAME[name].cause in report.first_failure.cause


@both
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("defect", TRAINING_DEFECTS[:4], ids=lambda defect: defect.name)
def test_training_defect_is_killed_and_named_on_16_bit_gradients(defect):
    seen = observe_training(defect, "bfloat16", steps=12)
    assert seen.killed
    assert defect.cause in seen.cause
