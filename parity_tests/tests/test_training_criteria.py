"""Each criterion of training parity rejects what it is there for, and passes on nothing; the sides are plain NumPy."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest

from parity_tests.training.criteria import (
    moments_agree,
    not_vacuous,
    off_block,
    replayed,
    resynchronised,
    steps_counted,
    training_parity,
)
from parity_tests.training.tasks import OPTIMIZERS, LayerTap, MaskedRun, StepGradients, TrainingTask, Trajectory

STEPS, NUM_PARTITIONS = 60, 3
MOMENTUM = OPTIMIZERS["momentum"]


def _task():
    rng = np.random.default_rng(0)
    shapes = {"head.weight": (NUM_PARTITIONS, 6, 4), "head.bias": (NUM_PARTITIONS, 4)}

    def drawn(shape):
        return rng.standard_normal(shape).astype(np.float32).astype(np.float64)

    parameters = {name: drawn(shape) for name, shape in shapes.items()}
    return TrainingTask("linear", "mlp", parameters, drawn((4, 8, NUM_PARTITIONS, 6)), drawn((4, 8, NUM_PARTITIONS, 4)))


TASK = _task()


@dataclass(frozen=True)
class Side:
    """Correct code: SGD with momentum on one partitioned linear layer and a mean square loss."""

    framework: str

    def gradients(self, task, parameters, step, dtype):
        batch = step % len(task.inputs)
        x, target = task.inputs[batch].astype(dtype), task.targets[batch].astype(dtype)
        weight, bias = (parameters[f"head.{kind}"].astype(dtype) for kind in ("weight", "bias"))
        y = np.einsum("bni,nio->bno", x, weight) + bias
        cotangent = (2 / y.size * (y - target)).astype(dtype)
        found = {"head.weight": np.einsum("bni,bno->nio", x, cotangent), "head.bias": cotangent.sum(0)}
        tap = LayerTap(x, y, cotangent, np.einsum("bno,nio->bni", cotangent, weight))
        return StepGradients(float(np.mean((y - target) ** 2)), found, {"head": tap})

    def _follow(self, parameters, spec, dtype, steps, gradient_at, rng=None):
        state = {name: np.asarray(array, dtype) for name, array in parameters.items()}
        trace = {name: np.zeros_like(array) for name, array in state.items()}
        losses, states, history = [], [], []
        for step in range(steps):
            loss, gradients = gradient_at(step, state)
            for name in state:
                trace[name] = gradients[name].astype(dtype) + np.asarray(spec.momentum, dtype) * trace[name]
                state[name] = state[name] - np.asarray(spec.learning_rate, dtype) * trace[name]
                if rng is not None:
                    noise = rng.uniform(-1, 1, state[name].shape) * np.finfo(dtype).eps / 2
                    state[name] = state[name] + (state[name] * noise).astype(dtype)
            losses.append(loss)
            states.append(dict(state))
            history.append({f"{name}/first": array for name, array in trace.items()})
        return Trajectory(np.array(losses), states, history[-1], set(), history)

    def train(self, task, spec, dtype, steps, members=0, seed=0):
        def gradient_at(step, state):
            found = self.gradients(task, state, step, dtype)
            return found.loss, found.gradients

        return [
            self._follow(
                task.parameters, spec, dtype, steps, gradient_at, np.random.default_rng([seed, k]) if members else None
            )
            for k in range(max(members, 1))
        ]

    def replay(self, parameters, spec, gradients, dtype):
        return self._follow(parameters, spec, dtype, len(gradients), lambda step, state: (0.0, gradients[step]))

    def train_masked(self, task, spec, dtype, steps):
        return MaskedRun(self.train(task, spec, dtype, steps)[0].states, np.zeros(steps))


TORCH, JAX = Side("torch"), Side("jax")
RECORDED = [TORCH.gradients(TASK, TASK.parameters, step, "float64").gradients for step in range(STEPS)]
DOUBLE = {side.framework: side.train(TASK, MOMENTUM, "float64", STEPS)[0] for side in (TORCH, JAX)}
SINGLE = {side.framework: side.train(TASK, MOMENTUM, "float32", STEPS)[0] for side in (TORCH, JAX)}


def failing(side):
    report = training_parity([TORCH, side], TASK, MOMENTUM, "momentum", STEPS, members=4)
    return {criterion.name for criterion in report.criteria if not criterion.ok}


def test_equal_sides_meet_every_criterion():
    assert failing(JAX) == set()


@dataclass(frozen=True)
class SpoiledReplay(Side):
    """Its optimiser differs at one step of a replay."""

    what: str = "states"
    step: int = STEPS - 3

    def replay(self, parameters, spec, gradients, dtype):
        run = super().replay(parameters, spec, gradients, dtype)
        values = getattr(run, self.what)[self.step]
        values |= {name: array * (1 + 1e-10) for name, array in values.items()}
        return run


@pytest.mark.parametrize(("what", "named"), [("states", "update"), ("moment_history", "first moment")])
def test_one_late_step_of_a_replay_is_found(what, named):
    side = SpoiledReplay("jax", what)
    assert failing(side) == {"replay (torch)", "replay (jax)"}
    for criterion in replayed([TORCH, side], TASK, MOMENTUM, RECORDED):
        assert f"{named} at step {side.step} of {STEPS}" in criterion.detail


@dataclass(frozen=True)
class WithoutMoments(Side):
    """Shows no moments."""

    def replay(self, parameters, spec, gradients, dtype):
        run = super().replay(parameters, spec, gradients, dtype)
        return dataclasses.replace(run, moments={}, moment_history=[{} for _ in gradients])

    def train(self, task, spec, dtype, steps, members=0, seed=0):
        return [dataclasses.replace(run, moments={}) for run in super().train(task, spec, dtype, steps, members, seed)]


def test_missing_moments_fail_on_one_side_and_on_both():
    assert failing(WithoutMoments("jax")) == {"replay (torch)", "replay (jax)", "moments"}
    both = [WithoutMoments("torch"), WithoutMoments("jax")]
    assert [criterion.ok for criterion in replayed(both, TASK, MOMENTUM, RECORDED)] == [False, False]
    bare = {name: dataclasses.replace(run, moments={}) for name, run in DOUBLE.items()}
    assert not moments_agree(bare, bare, MOMENTUM).ok
    assert moments_agree(bare, bare, OPTIMIZERS["sgd"]).ok
    assert not moments_agree(DOUBLE, SINGLE, OPTIMIZERS["sgd"]).ok


def test_a_replay_of_nothing_fails():
    assert [criterion.fraction for criterion in replayed([TORCH, JAX], TASK, MOMENTUM, [])] == [np.inf, np.inf]


@dataclass(frozen=True)
class SpoiledTap(Side):
    """One tensor of one partition is off by 1e-4 at one state, in fp32 alone."""

    tensor: str = "dx"
    step: int = 57

    def gradients(self, task, parameters, step, dtype):
        found = super().gradients(task, parameters, step, dtype)
        if dtype == "float32" and step == self.step:
            array = getattr(found.taps["head"], self.tensor, None)
            array = found.gradients[f"head.{self.tensor[1:]}"] if array is None else array
            partition = array[:, 1] if self.tensor in ("y", "dx") else array[1]
            partition *= np.float32(1.0001)
        return found


@pytest.mark.parametrize("tensor", ["y", "dx", "dweight", "dbias"])
def test_one_wrong_tensor_at_one_state_is_found(tensor):
    criterion = resynchronised(SpoiledTap("jax", tensor), TASK, DOUBLE["jax"].states, range(STEPS))
    assert not criterion.ok
    assert criterion.detail.startswith(f"largest at step 57, layer head, {tensor}:")
    # At every other state the same side is correct.
    assert resynchronised(SpoiledTap("jax", tensor), TASK, DOUBLE["jax"].states, range(STEPS - 5)).ok


@dataclass(frozen=True)
class WithoutTaps(Side):
    """Shows nothing of its layers."""

    def gradients(self, task, parameters, step, dtype):
        return dataclasses.replace(super().gradients(task, parameters, step, dtype), taps={})


def test_nothing_resynchronised_fails():
    assert failing(WithoutTaps("jax")) == {"resynchronised (jax)"}
    assert not resynchronised(JAX, TASK, DOUBLE["jax"].states, ()).ok


@dataclass(frozen=True)
class ConstantLoss(Side):
    """Its loss stands still while its parameters move."""

    def train(self, task, spec, dtype, steps, members=0, seed=0):
        runs = super().train(task, spec, dtype, steps, members, seed)
        return [dataclasses.replace(run, losses=np.ones(steps)) for run in runs]


@dataclass(frozen=True)
class WithoutBiasGradient(Side):
    """Never updates its bias."""

    zero: bool = True

    def gradients(self, task, parameters, step, dtype):
        found = super().gradients(task, parameters, step, dtype)
        bias = found.gradients.pop("head.bias")
        return dataclasses.replace(found, gradients=found.gradients | ({"head.bias": 0 * bias} if self.zero else {}))


def test_a_run_in_which_nothing_happened_is_vacuous():
    sides = [ConstantLoss("torch"), ConstantLoss("jax")]
    runs = {side.framework: side.train(TASK, MOMENTUM, "float64", STEPS)[0] for side in sides}
    assert [criterion.ok for criterion in not_vacuous(TASK, runs, sides)] == [False, False]
    assert [criterion.ok for criterion in not_vacuous(TASK, DOUBLE, [TORCH, JAX])] == [True, True]
    still = {name: dataclasses.replace(run, states=[TASK.parameters]) for name, run in DOUBLE.items()}
    assert [criterion.ok for criterion in not_vacuous(TASK, still, [TORCH, JAX])] == [False, False]


@pytest.mark.parametrize("zero", [True, False], ids=["zero", "missing"])
def test_a_parameter_without_gradient_is_named(zero):
    (criterion,) = not_vacuous(TASK, DOUBLE, [WithoutBiasGradient("jax", zero)])
    assert not criterion.ok
    assert criterion.detail.endswith("without gradient: head.bias")


@pytest.mark.parametrize(
    ("optimizer", "counts", "holds"),
    [
        ("adam", ({STEPS}, {STEPS}), True),
        ("adam", (set(), {STEPS}), False),
        ("adam", (set(), set()), False),
        ("adam", ({STEPS}, {STEPS - 1}), False),
        ("adam", ({STEPS}, {STEPS, STEPS - 1}), False),
        ("sgd", (set(), {STEPS}), True),
        ("sgd", (set(), {STEPS - 1}), False),
        ("sgd", (set(), set()), True),
    ],
)
def test_step_counts_are_expected_where_the_update_needs_them(optimizer, counts, holds):
    runs = {
        name: dataclasses.replace(run, step_counts=kept)
        for (name, run), kept in zip(DOUBLE.items(), counts, strict=True)
    }
    criterion = steps_counted(runs, OPTIMIZERS[optimizer], STEPS)
    assert criterion.ok == holds
    assert ("none" in criterion.detail) == (set() in counts)


@pytest.mark.parametrize("leak", [1e-300, np.nan], ids=["tiny", "nan"])
def test_a_leak_at_one_step_is_found(leak):
    zeros = np.zeros(STEPS)
    states = DOUBLE["torch"].states
    assert off_block("torch", MaskedRun(states, zeros), DOUBLE["torch"], SINGLE["torch"]).ok
    criterion = off_block(
        "torch", MaskedRun(states, np.where(np.arange(STEPS) == 9, leak, zeros)), DOUBLE["torch"], SINGLE["torch"]
    )
    assert not criterion.ok
    assert criterion.detail.endswith(f"after 1 of {STEPS} steps, the first is step 9")


def test_blocks_that_train_otherwise_are_found():
    other = TORCH.train(TASK, dataclasses.replace(MOMENTUM, learning_rate=0.0200001), "float64", STEPS)[0]
    assert not off_block("torch", MaskedRun(other.states, np.zeros(STEPS)), DOUBLE["torch"], SINGLE["torch"]).ok
    assert not off_block("torch", MaskedRun([], np.zeros(0)), DOUBLE["torch"], SINGLE["torch"]).ok


@dataclass(frozen=True)
class Unmasked(Side):
    """Has no masked layer, as JAX."""

    def train_masked(self, task, spec, dtype, steps):
        return None


def test_one_masked_layer_is_enough_and_none_is_not():
    assert failing(Unmasked("jax")) == set()
    report = training_parity([Unmasked("torch"), Unmasked("jax")], TASK, MOMENTUM, "momentum", STEPS, members=4)
    assert [criterion.name for criterion in report.criteria if not criterion.ok] == ["off-block"]
