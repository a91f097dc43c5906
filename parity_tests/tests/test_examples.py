"""The example models of both trees: each twin computes the same, as it does with the loop that its layers replace."""

import os

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")
pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("scipy", reason="scipy is not installed here")

import jax
import jax.numpy as jnp
import optax
import torch
from flax import nnx

import jax_impl.examples.critic_ensemble
import jax_impl.examples.forecasters
import jax_impl.examples.gated_recurrence
import jax_impl.examples.grouped_projection
import jax_impl.examples.numerical_embeddings
import torch_impl.examples.critic_ensemble
import torch_impl.examples.forecasters
import torch_impl.examples.gated_recurrence
import torch_impl.examples.grouped_projection
import torch_impl.examples.numerical_embeddings
from parity_tests.pair import check_pair, convert
from parity_tests.training.criteria import semantic
from parity_tests.training.tasks import Trajectory


def layer(name, bias=True):
    return [(f"{name}.weight", f"{name}.kernel"), *([(f"{name}.bias", f"{name}.bias")] if bias else [])]


def linear(name, bias=True):
    return [(f"{name}.weight", f"{name}.kernel", "o i -> i o"), *([(f"{name}.bias", f"{name}.bias")] if bias else [])]


# By name: the room, sizes, rules, inputs. Sizes are small and all different.
MODELS = {
    "NLinear": ("forecasters", (4, 7, 3), layer("linear"), ((2, 7, 4),)),
    "DLinear": ("forecasters", (4, 27, 3), layer("seasonal") + layer("trend"), ((2, 27, 4),)),
    "PeriodicEmbeddings": (
        "numerical_embeddings",
        (4, 5, 3),
        [("frequencies", "frequencies"), *layer("linear")],
        ((6, 4),),
    ),
    "Critics": ("critic_ensemble", (5, 2, 4, 6), layer("first") + layer("second") + layer("third"), ((3, 5), (3, 2))),
    "RecurrentBlock": (
        "gated_recurrence",
        (5, 6, 2),
        [
            *(rule for name in ("input", "gate", "output") for rule in linear(name)),
            ("convolution.weight", "convolution.kernel", "o i w -> w i o"),
            ("convolution.bias", "convolution.bias"),
            ("recurrence.decay", "recurrence.decay"),
            *layer("recurrence.input_gate"),
            *layer("recurrence.recurrence_gate"),
        ],
        ((2, 7, 5),),
    ),
    "GroupedOutputProjection": (
        "grouped_projection",
        (6, 4, 3, 5, 7),
        layer("down", bias=False) + linear("up", bias=False),
        ((2, 6, 4),),
    ),
}


def torch_model(name, **options):
    room, sizes, *_ = MODELS[name]
    torch.manual_seed(0)
    return getattr(getattr(torch_impl.examples, room), name)(*sizes, **options)


def flax_model(name, **options):
    room, sizes, *_ = MODELS[name]
    return getattr(getattr(jax_impl.examples, room), name)(*sizes, **options, rngs=nnx.Rngs(0))


STEPS = 4


def drawn(name, dtype, seed=0):
    """Return the model's inputs and a target in a dtype; every value is one that float32 holds."""
    rng = np.random.default_rng(seed)
    inputs = [rng.standard_normal(shape).astype(np.float32).astype(dtype) for shape in MODELS[name][3]]
    shape = torch_model(name).to(torch.float64)(*map(torch.tensor, inputs_as(inputs, "float64"))).shape
    return inputs, rng.standard_normal(shape).astype(np.float32).astype(dtype)


def inputs_as(inputs, dtype):
    return [array.astype(dtype) for array in inputs]


def some(names, few=2):
    """Return all of them with EVERY_TEST=1, else a few."""
    return list(dict.fromkeys(names if os.environ.get("EVERY_TEST") else names[:few]))


@pytest.mark.parametrize("name", some(["NLinear", "Critics", *MODELS]))
def test_both_twins_compute_the_same(name):
    *_, rules, inputs = MODELS[name]
    check_pair(
        torch_module=torch_model(name), flax_module=flax_model(name), params=rules, inputs=inputs, effort="quick"
    ).assert_ok()


@pytest.mark.parametrize("name", some(["Critics", "DLinear", *MODELS]))
def test_the_loop_that_it_replaces_computes_the_same(name):
    inputs, _ = drawn(name, np.float32)
    model, loop = torch_model(name), torch_model(name, implementation="loop")
    loop.load_state_dict(model.state_dict())
    assert any(getattr(part, "implementation", "") == "loop" for part in loop.modules())
    torch.testing.assert_close(loop(*map(torch.tensor, inputs)), model(*map(torch.tensor, inputs)))
    np.testing.assert_allclose(
        flax_model(name, implementation="loop")(*inputs), flax_model(name)(*inputs), rtol=1e-4, atol=1e-5
    )


def train_in_torch(name, dtype, steps, start=None):
    """Train by gradient descent, from a state of NumPy arrays if any; return the model, all losses and states."""
    model = torch_model(name).to(getattr(torch, dtype))
    if start is not None:
        model.load_state_dict({key: torch.tensor(value) for key, value in start.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, target = drawn(name, dtype)
    losses, states = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(*map(torch.tensor, inputs)) - torch.tensor(target)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        states.append({key: value.detach().numpy().copy() for key, value in model.state_dict().items()})
    return model, losses, states


def continue_in_jax(name, dtype, trained, steps):
    """Go on by gradient descent from a torch model; return losses, and states under torch's names."""
    with jax.enable_x64(dtype == "float64"):
        inputs, target = drawn(name, dtype)
        rules = MODELS[name][2]
        model = flax_model(name)
        nnx.update(model, jax.tree.map(jnp.asarray, convert(trained, rules, like=model)))
        graph, state = nnx.split(model)
        optimizer = optax.sgd(0.1)

        @jax.jit
        def step(state, moments):
            def loss_of(state):
                return jnp.square(nnx.merge(graph, state)(*inputs) - target).mean()

            loss, gradients = jax.value_and_grad(loss_of)(state)
            updates, moments = optimizer.update(gradients, moments)
            return optax.apply_updates(state, updates), moments, loss

        moments, losses, states = optimizer.init(state), [], []
        for _ in range(steps):
            state, moments, loss = step(state, moments)
            losses.append(float(loss))
            states.append(
                {key: value.numpy() for key, value in convert(nnx.merge(graph, state), rules, to="torch").items()}
            )
        return losses, states


def joined(name, dtype, to):
    """Train in one framework and go on in the other: the losses and states after the change, and those without one."""
    if to == "jax":
        _, losses, states = train_in_torch(name, dtype, 2 * STEPS)
        half, _, _ = train_in_torch(name, dtype, STEPS)
        went_on = continue_in_jax(name, dtype, half, STEPS)
    else:
        losses, states = continue_in_jax(name, dtype, torch_model(name).to(getattr(torch, dtype)), 2 * STEPS)
        went_on = train_in_torch(name, dtype, STEPS, start=states[STEPS - 1])[1:]
    stayed = losses[STEPS:], states[STEPS:]
    return {"torch": stayed, "jax": went_on} if to == "jax" else {"torch": went_on, "jax": stayed}


@pytest.mark.parametrize("to", ["jax", "torch"])
@pytest.mark.parametrize("name", some(["NLinear", "Critics", *MODELS]))
def test_trained_in_one_framework_and_continued_in_the_other_it_joins(name, to):
    runs = {dtype: joined(name, dtype, to) for dtype in ("float64", "float32")}
    for pick in (lambda run: run[1], lambda run: [{"losses": np.array(run[0])}]):
        double, single = (
            {side: Trajectory(np.array(run[0]), pick(run), {}, set()) for side, run in runs[dtype].items()}
            for dtype in runs
        )
        assert all(found.ok for found in semantic(double, single)), semantic(double, single)
    for losses, _ in runs["float64"].values():
        assert losses[-1] < losses[0]


def test_a_continuation_from_the_wrong_state_does_not_join():
    """The criterion is one that the state of one step too few exceeds, or the test above could not fail."""
    runs = {dtype: joined("NLinear", dtype, "torch") for dtype in ("float64", "float32")}
    for dtype, run in runs.items():
        _, states = continue_in_jax("NLinear", dtype, torch_model("NLinear").to(getattr(torch, dtype)), STEPS)
        run["torch"] = train_in_torch("NLinear", dtype, STEPS, start=states[STEPS - 2])[1:]
    double, single = (
        {side: Trajectory(np.array(run[0]), run[1], {}, set()) for side, run in runs[dtype].items()} for dtype in runs
    )
    assert not all(found.ok for found in semantic(double, single))


def test_chosen_critics_are_those_of_all():
    critics, twin = torch_model("Critics"), flax_model("Critics")
    inputs, _ = drawn("Critics", np.float32)
    torch.testing.assert_close(
        torch_impl.examples.critic_ensemble.least_value(critics, *map(torch.tensor, inputs), torch.tensor([2, 0])),
        critics(*map(torch.tensor, inputs))[:, [2, 0]].amin(-1),
    )
    least = nnx.jit(jax_impl.examples.critic_ensemble.least_value)(twin, *inputs, jnp.array([2, 0]))
    np.testing.assert_allclose(least, np.asarray(twin(*inputs))[:, [2, 0]].min(-1), rtol=1e-5, atol=1e-6)
