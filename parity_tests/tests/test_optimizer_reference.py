"""Both sides that the neutral specification builds, and its formulas in NumPy, take the same steps in float64."""

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available
from parity_tests.tests.optimizer_reference import ReferenceState, reference_step
from parity_tests.training.tasks import OPTIMIZERS, optimizer

STEPS = 3
SHAPES = {"weight": (2, 3, 4), "bias": (2, 4)}


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    parameters = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return parameters, [{name: rng.standard_normal(shape) * 3 for name, shape in SHAPES.items()} for _ in range(STEPS)]


def replayed(framework, spec, parameters, gradients):
    if framework == "torch":
        from parity_tests.frameworks.torch.training import TorchTraining as Training
    else:
        from parity_tests.frameworks.jax.training import JaxTraining as Training
    return Training().replay(parameters, spec, gradients, "float64").states


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_built_optimiser_takes_the_reference_steps(name, framework):
    if not framework_available(framework):
        pytest.skip(f"{framework} is not installed here")
    spec = optimizer(name)
    parameters, gradients = drawn()
    expected = ReferenceState(parameters)
    for found, step in zip(replayed(framework, spec, parameters, gradients), gradients, strict=True):
        before, expected = expected, reference_step(spec, expected, step)
        for key, value in expected.parameters.items():
            movement = np.abs(value - before.parameters[key]).max()
            assert movement > 0
            # A few roundings of a float64 parameter and of its movement.
            assert np.abs(found[key] - value).max() <= 1e-13 * np.abs(value).max() + 1e-12 * movement, (name, key)


def test_the_first_steps_by_hand():
    parameters, gradient = {"weight": np.array([2.0]), "bias": np.array([3.0])}, {"weight": [4.0], "bias": [-0.5]}
    sgd = reference_step(OPTIMIZERS["sgd"], ReferenceState(parameters), gradient)
    assert sgd.parameters == {"weight": 2.0 - 0.05 * 4.0, "bias": 3.0 + 0.05 * 0.5}
    # Adam's first step is the rate, against the gradient's sign; only the weight decays.
    adamw = reference_step(OPTIMIZERS["adamw"], ReferenceState(parameters), gradient)
    np.testing.assert_allclose(adamw.parameters["weight"], 2.0 * (1 - 3e-3 * 1e-2) - 3e-3, rtol=1e-9)
    np.testing.assert_allclose(adamw.parameters["bias"], 3.0 + 3e-3, rtol=1e-9)
    assert (adamw.steps, parameters["weight"][0]) == (1, 2.0)


def test_an_unknown_optimiser_lists_the_choices():
    with pytest.raises(ValueError, match=r"optimizer: expected one of sgd, .*, got 'lion'; choose one of these"):
        optimizer("lion")
