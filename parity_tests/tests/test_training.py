"""Training parity over 500 steps, the ladder, and the defects and causes that both must find."""

import dataclasses
import os

import numpy as np
import pytest

from parity_tests.judge.inputs import Case, draw_inputs
from parity_tests.judge.subjects import framework_available

if not (framework_available("torch") and framework_available("jax")):
    pytest.skip("training parity needs both frameworks", allow_module_level=True)

import torch

from parity_tests.defects.training import TRAINING_DEFECTS, plant, spec_of
from parity_tests.frameworks.jax import subjects as jax_subjects
from parity_tests.frameworks.jax.training import JaxTraining
from parity_tests.frameworks.torch import subjects as torch_subjects
from parity_tests.frameworks.torch.training import TorchTraining
from parity_tests.training import ladder
from parity_tests.training.criteria import free_running, off_block, training_parity
from parity_tests.training.ladder import RUNGS, LadderSide, climb, load_side
from parity_tests.training.tasks import OPTIMIZERS, OptimizerSpec, nlinear_series, partitioned_mlp
from torch_impl import MaskedPartitionedLinear

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 500
CASE = Case("ladder", (64,), 3, 16, 16)


def sides():
    return [TorchTraining(), JaxTraining()]


def ladder_sides():
    return [
        LadderSide(_matmul(torch_subjects), TorchTraining(), torch_subjects.round_trip),
        LadderSide(_matmul(jax_subjects), JaxTraining(), jax_subjects.round_trip),
    ]


def _matmul(module):
    return next(subject for subject in module.subjects("cpu") if subject.implementation == "matmul")


SAMPLE = {"adamw-clip-warmup-cosine"}  # of the optimisers; all are tried with EVERY_TEST=1


def failures(report):
    return [f"{criterion.name}: {criterion.detail}" for criterion in report.criteria if not criterion.ok]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_mlp_trains_alike(optimizer):
    if optimizer not in SAMPLE and "EVERY_TEST" not in os.environ:
        pytest.skip("ten seconds each: run with EVERY_TEST=1")
    report = training_parity(sides(), partitioned_mlp(), OPTIMIZERS[optimizer], optimizer, STEPS, members=6)
    assert failures(report) == []
    assert {criterion.name.split(" (")[0] for criterion in report.criteria} >= {
        "semantic",
        "replay",
        "resynchronised",
        "free-running",
        "not vacuous",
        "moments",
        "step counts",
        "off-block",
    }


@pytest.mark.every
@pytest.mark.parametrize("optimizer", ["momentum", "adamw-clip-warmup-cosine"])
def test_forecaster_trains_alike(optimizer):
    if optimizer != "momentum" and "EVERY_TEST" not in os.environ:
        pytest.skip("ten seconds: run with EVERY_TEST=1")
    report = training_parity(sides(), nlinear_series(), OPTIMIZERS[optimizer], optimizer, STEPS, members=6)
    assert failures(report) == []


@pytest.mark.parametrize("defect", TRAINING_DEFECTS, ids=lambda defect: defect.name)
def test_training_defect_is_killed_and_named(defect):
    trusted, healthy = ladder_sides()
    spoiled = dataclasses.replace(healthy, training=plant(defect, healthy.training))
    report = climb(
        [trusted, spoiled], draw_inputs(CASE, "float32"), partitioned_mlp(), spec_of(defect), defect.optimizer, 60, 2
    )
    assert not report.ok
    assert report.first_failure.name in RUNGS[3:]
    assert defect.cause in report.first_failure.cause


def test_the_ladder_reaches_the_top():
    spec = OPTIMIZERS["adamw"]
    report = climb(ladder_sides(), draw_inputs(CASE, "float32"), nlinear_series(), spec, "adamw", 60, 4)
    assert report.ok, report.first_failure
    assert [rung.name for rung in report.rungs] == list(RUNGS)


def test_the_ladder_stops_at_a_broken_conversion():
    trusted, other = ladder_sides()

    def transposing(arrays):
        return other.round_trip(arrays | {"weight": np.ascontiguousarray(arrays["weight"].swapaxes(1, 2))})

    broken = dataclasses.replace(other, round_trip=transposing)
    report = climb([trusted, broken], draw_inputs(CASE, "float32"), partitioned_mlp(), OPTIMIZERS["sgd"], "sgd", 5, 2)
    assert (report.first_failure.name, report.first_failure.cause) == (RUNGS[0], "the kernel is transposed")
    assert len(report.rungs) == 1


class UnmaskedAfter(MaskedPartitionedLinear):
    """A layer that forgets its mask after some calls."""

    masked_calls = 0

    def forward(self, x):
        self.masked_calls -= 1
        return super().forward(x) if self.masked_calls >= 0 else self._dense(x)

    def _dense(self, x):
        y = torch.nn.functional.linear(x.flatten(-2), self.weight, self.bias)
        return y.unflatten(-1, (self.num_partitions, self.out_features))


class UnmaskedAfterOneStep(UnmaskedAfter):
    """A layer whose mask covers the first step only."""

    masked_calls = 1


@pytest.mark.parametrize("layer", [UnmaskedAfter, UnmaskedAfterOneStep])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_outside_the_blocks_are_noticed(layer, optimizer):
    task, spec, steps = partitioned_mlp(), OPTIMIZERS[optimizer], 4
    double, single = (TorchTraining().train(task, spec, dtype, steps)[0] for dtype in ("float64", "float32"))
    healthy = TorchTraining().train_masked(task, spec, "float64", steps)
    assert off_block("torch", healthy, double, single).ok
    spoiled = TorchTraining(masked_layer=layer).train_masked(task, spec, "float64", steps)
    criterion = off_block("torch", spoiled, double, single)
    assert not criterion.ok
    assert criterion.detail.endswith(f"the first is step {layer.masked_calls}")


def test_a_failing_training_says_how_to_repeat_it(monkeypatch):
    defect = TRAINING_DEFECTS[0]

    def side(framework):
        healthy = load_side(framework)
        return dataclasses.replace(healthy, training=plant(defect, healthy.training)) if framework == "jax" else healthy

    monkeypatch.setattr(ladder, "load_side", side)
    rows = ladder.training_rows("partitioned-mlp", defect.optimizer, steps=5, members=2).rows
    assert {row.status for row in rows} == {"ok", "mismatch", "skipped"}
    assert {row.command for row in rows} == {"python -m parity_tests run --train partitioned-mlp:adam"}


def test_a_run_far_outside_the_ensemble_is_rejected():
    rng = np.random.default_rng(0)
    ensemble = np.exp(rng.normal(-15, 0.2, (12, 50)))
    assert free_running("torch", np.exp(np.full(50, -15.0)), ensemble).ok
    assert not free_running("torch", np.exp(np.full(50, -9.0)), ensemble).ok


def test_schedule_table_has_its_origin_and_shape():
    spec = OptimizerSpec("sgd", 1.0, warmup_steps=4, cosine_steps=10)
    rates = spec.rates(20)
    assert rates[:4].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.5)
    assert rates[14:].max() == 0.0
    assert dataclasses.replace(spec, first_step=1).rates(3).tolist() == [0.5, 0.75, 1.0]
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        spec.rates(0)


def test_decay_leaves_the_two_dimensional_bias_alone():
    spec = OPTIMIZERS["adamw"]
    assert spec.decays("hidden.weight")
    assert not spec.decays("hidden.bias")
