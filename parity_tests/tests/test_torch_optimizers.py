"""Optimisers and utilities that read shapes, on the torch layer: K steps are those of n separate `nn.Linear`."""

import copy
import pickle

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from torch_impl import MaskedPartitionedLinear, PartitionedLinear
from torch_impl.optimizers import named_partition_parameters, weight_decay_groups
from torch_impl.partitions import for_each_partition_

N, IN, OUT, ROWS, STEPS = 4, 6, 5, 16, 4
LAYERS = pytest.mark.parametrize("kind", [PartitionedLinear, MaskedPartitionedLinear])
# In fp64 the two differ by rounding, which a few steps do not bring up to the precision of fp32.
SAME = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def linears():
    return nn.ModuleList(nn.Linear(IN, OUT, dtype=torch.float64) for _ in range(N))


def loop(heads):
    return lambda x: torch.stack([linear(x[:, k]) for k, linear in enumerate(heads)], 1)


def train(function, optimizer, steps=STEPS):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, target = (torch.randn(ROWS, N, size, generator=generator, dtype=torch.float64) for size in (IN, OUT))
        optimizer.zero_grad()
        (function(x) - target).square().sum().backward()
        optimizer.step()


def matrices(parameters):
    return [parameter for parameter in parameters if parameter.ndim == 2]


def decayed(parameters):
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    return [{"params": matrices(parameters), "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


OPTIMIZERS = {
    "Muon": lambda parameters: torch.optim.Muon(matrices(parameters), lr=1e-2),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "AdamW that decays matrices": lambda parameters: torch.optim.AdamW(decayed(parameters), lr=1e-2),
    "AdamW in one kernel": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "SGD with momentum in one kernel": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9, fused=True),
    "SGD with momentum, clipped": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


def distance(layer, heads, before):
    """The largest difference from the linears' weights and biases, as a part of their largest change."""
    views = layer.partition_views()
    apart, changed = 0.0, 0.0
    for k, (linear, old) in enumerate(zip(heads, before, strict=True)):
        for own, other, start in (
            (views["weight"][k].mT, linear.weight, old.weight),
            (views["bias"][k], linear.bias, old.bias),
        ):
            apart = max(apart, float((own - other).abs().max().detach()))
            changed = max(changed, float((other - start).abs().max().detach()))
    return apart / changed


@LAYERS
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_are_those_of_separate_linears(make, kind):
    if not hasattr(torch.optim, "Muon") and make is OPTIMIZERS["Muon"]:
        pytest.skip("this PyTorch has no Muon")
    heads = linears()
    before, layer = copy.deepcopy(heads), kind.from_linears(heads)
    named = named_partition_parameters(layer)
    assert {name: parameter.shape for name, parameter in named.items()} == {
        name: parameter.shape for name, parameter in heads.named_parameters()
    }
    train(loop(heads), make(list(heads.parameters())))
    train(layer, make(list(named.values())))
    assert distance(layer, heads, before) < SAME


def test_the_stacked_parameters_make_other_steps():
    """The control of the test above: without the helper they differ by far more than by rounding, or are refused."""
    heads = linears()
    before, layer = copy.deepcopy(heads), PartitionedLinear.from_linears(heads)
    train(loop(heads), OPTIMIZERS["Adafactor"](list(heads.parameters())))
    train(layer, OPTIMIZERS["Adafactor"](list(layer.parameters())))
    assert distance(layer, heads, before) > 1000 * SAME


def test_weight_decay_groups_leave_stacked_biases_alone():
    model = nn.ModuleDict({"norm": nn.LayerNorm(IN), "body": nn.Linear(IN, IN), "heads": PartitionedLinear(N, IN, OUT)})
    decays, others = weight_decay_groups(model, 0.1)
    assert {id(parameter) for parameter in decays["params"]} == {id(model["body"].weight), id(model["heads"].weight)}
    assert len(others["params"]) == 4
    assert (decays["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    heads = linears()
    before, layer = copy.deepcopy(heads), PartitionedLinear.from_linears(heads)
    train(loop(heads), torch.optim.AdamW(decayed(list(heads.parameters())), lr=1e-2))
    train(layer, torch.optim.AdamW(weight_decay_groups(layer, 0.1), lr=1e-2))
    assert distance(layer, heads, before) < SAME


def test_gradients_are_the_layer_s():
    model = nn.ModuleDict({"body": nn.Linear(IN, IN), "heads": PartitionedLinear(N, IN, OUT)})
    named = named_partition_parameters(model)
    assert named["body.weight"] is model["body"].weight
    share = named["heads.2.weight"]
    assert share.grad is None
    model["heads"](model["body"](torch.ones(3, N, IN))).sum().backward()
    assert torch.equal(share.grad, model["heads"].weight.grad[2].mT)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert torch.equal(share.grad, model["heads"].weight.grad[2].mT)
    torch.optim.SGD(named.values(), lr=1.0).zero_grad()
    assert model["heads"].weight.grad is None
    share.grad = torch.ones(OUT, IN)
    assert model["heads"].weight.grad.sum() == OUT * IN


@pytest.mark.parametrize("fused", [False, True], ids=["loop", "fused"])
def test_the_state_of_an_optimiser_of_the_list_is_continued(fused):
    heads = linears()
    old = torch.optim.AdamW(heads.parameters(), lr=1e-2, fused=fused)
    train(loop(heads), old)
    before, layer = copy.deepcopy(heads), PartitionedLinear.from_linears(heads)
    named = named_partition_parameters(layer)
    assert list(named) == [name for name, _ in heads.named_parameters()]
    new = torch.optim.AdamW(named.values(), lr=1e-2, fused=fused)
    new.load_state_dict(copy.deepcopy(old.state_dict()))  # which holds the moments themselves
    train(loop(heads), old)
    train(layer, new)
    assert distance(layer, heads, before) < SAME


@LAYERS
def test_a_copy_of_layer_and_optimiser_trains_the_copied_layer(kind):
    layer = kind(N, IN, OUT)
    optimizer = torch.optim.SGD(named_partition_parameters(layer).values(), lr=1.0)
    before = copy.deepcopy(layer.state_dict())
    for other, own in (copy.deepcopy((layer, optimizer)), pickle.loads(pickle.dumps((layer, optimizer)))):
        other(torch.ones(2, N, IN)).sum().backward()
        own.step()
        assert (other.bias == before["bias"] - 2).all()
        assert torch.equal(layer.bias, before["bias"])


def test_a_parameter_that_two_layers_share_is_taken_apart_once():
    model = nn.ModuleDict({"a": PartitionedLinear(2, 3, 4), "b": PartitionedLinear(2, 3, 4)})
    model["b"].weight = model["a"].weight
    named = named_partition_parameters(model)
    assert list(named) == ["a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias", "b.0.bias", "b.1.bias"]
    assert named["a.1.weight"].shape == (4, 3)


PARAMETRISED = {
    "weight_norm": lambda linear: parametrizations.weight_norm(linear),
    "spectral_norm": lambda linear: parametrizations.spectral_norm(linear),
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "bias pruned": lambda linear: prune.l1_unstructured(linear, "bias", 0.4),
}


@pytest.mark.parametrize("optimizer", ["Adafactor", "AdamW that decays matrices"])
@pytest.mark.parametrize("utility", PARAMETRISED.values(), ids=PARAMETRISED)
def test_parametrised_and_pruned_layers_are_taken_apart(utility, optimizer):
    heads = linears()
    layer = PartitionedLinear.from_linears(heads)
    for own in (lambda: [utility(linear) for linear in heads], lambda: for_each_partition_(layer, utility)):
        torch.manual_seed(2)
        own()
    named = named_partition_parameters(layer)
    assert [(name, value.shape) for name, value in named.items()] == [
        (name, value.shape) for name, value in heads.named_parameters()
    ]
    train(loop(heads), OPTIMIZERS[optimizer](list(heads.parameters())))
    train(layer, OPTIMIZERS[optimizer](list(named.values())))
    x = torch.randn(ROWS, N, IN, dtype=torch.float64)
    for model in (heads, layer):
        model.eval()
    torch.testing.assert_close(layer(x), loop(heads)(x), rtol=SAME, atol=SAME)
    decays, others = weight_decay_groups(layer, 0.1)
    assert len(decays["params"]) + len(others["params"]) == len(list(layer.parameters()))
    assert {name for name, value in layer.named_parameters() if any(value is own for own in others["params"])} == {
        name for name, _ in layer.named_parameters() if "bias" in name
    }


def test_what_parametrises_the_stack_is_not_taken_apart():
    layer = parametrizations.weight_norm(PartitionedLinear(N, IN, OUT))
    with pytest.raises(ValueError, match=r"made for each partition, got its parameter 'parametrizations\.weight\.orig"):
        named_partition_parameters(layer)


def test_a_layer_that_was_moved_is_noticed():
    layer = PartitionedLinear(N, IN, OUT)
    optimizer = torch.optim.SGD(named_partition_parameters(layer).values(), lr=1.0)
    layer.double()
    with pytest.raises(ValueError, match="`params`: expected the parameters of partitions where they were made"):
        optimizer.step()


UTILITIES = {
    "spectral_norm": lambda linear: parametrizations.spectral_norm(linear),
    "weight_norm": lambda linear: parametrizations.weight_norm(linear),
    "orthogonal": lambda linear: parametrizations.orthogonal(linear),
    "spectral_norm of weight_norm": lambda linear: parametrizations.spectral_norm(parametrizations.weight_norm(linear)),
    "l1_unstructured": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "ln_structured": lambda linear: prune.ln_structured(linear, "weight", 0.4, n=2, dim=0),
    "bias pruned": lambda linear: prune.l1_unstructured(linear, "bias", 0.4),
    "xavier_uniform_": lambda linear: nn.init.xavier_uniform_(linear.weight),
    "orthogonal_": lambda linear: nn.init.orthogonal_(linear.weight),
    "both filled": lambda linear: [nn.init.ones_(linear.weight), nn.init.zeros_(linear.bias)],
}


@pytest.mark.parametrize("utility", UTILITIES.values(), ids=UTILITIES)
def test_utilities_see_one_partition(utility):
    heads = linears()
    layer = PartitionedLinear.from_linears(heads)
    torch.manual_seed(2)
    for linear in heads:
        utility(linear)
    torch.manual_seed(2)
    assert for_each_partition_(layer, utility) is layer
    for model, function in ((heads, loop(heads)), (layer, layer)):
        train(function, torch.optim.SGD(model.parameters(), lr=1e-3))
        model.eval()
    x = torch.randn(ROWS, N, IN, dtype=torch.float64)
    y, expected = layer(x).detach(), loop(heads)(x).detach()
    assert float((y - expected).abs().max()) < SAME * float(expected.abs().max())
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(layer(x), y)


def test_spectral_norms_are_one_each():
    layer = PartitionedLinear(N, IN, OUT)
    for_each_partition_(layer, lambda linear: parametrizations.spectral_norm(linear, n_power_iterations=100))
    layer.eval()
    largest = torch.linalg.matrix_norm(layer.weight, 2)
    torch.testing.assert_close(largest, torch.ones(N), rtol=1e-4, atol=0)
    stacked = parametrizations.spectral_norm(PartitionedLinear(N, IN, OUT), n_power_iterations=100).eval()
    assert float(torch.linalg.matrix_norm(stacked.weight, 2).max().detach()) < 0.9


def test_the_masked_layer_is_filled_by_its_own_init():
    with pytest.raises(TypeError, match="`layer`: expected a PartitionedLinear, got a MaskedPartitionedLinear"):
        for_each_partition_(MaskedPartitionedLinear(N, IN, OUT), lambda linear: None)


NUMBER = iter(range(1000))
REFUSED = {
    "raises": (lambda linear: 1 / 0, "got an error from it .division by zero"),
    "an old norm": (lambda linear: linear.register_forward_pre_hook(lambda *_: None), "each weight alike"),
    "another shape": (lambda linear: setattr(linear, "weight", nn.Parameter(torch.ones(2, 2))), "each weight alike"),
    "some alone": (
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5) if next(NUMBER) % 2 else None,
        "each weight alike",
    ),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_utility_changes_nothing(function, message):
    layer = PartitionedLinear(N, IN, OUT)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        for_each_partition_(layer, function)
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_bad_arguments_are_refused():
    for function in (named_partition_parameters, lambda module: weight_decay_groups(module, 0.1)):
        with pytest.raises(TypeError, match=r"`module`: expected an nn\.Module, got a list"):
            function([nn.Linear(2, 3)])
    for value, error in ((True, TypeError), ("0.1", TypeError), (-1, ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match="`weight_decay`: expected"):
            weight_decay_groups(PartitionedLinear(N, IN, OUT), value)
    with pytest.raises(ValueError, match="`layer`: expected values in `weight`, got the meta device"):
        named_partition_parameters(PartitionedLinear(N, IN, OUT, device="meta"))
    with pytest.raises(TypeError, match=r"`function`: expected a function of an nn\.Linear, got a str"):
        for_each_partition_(PartitionedLinear(N, IN, OUT), "ones_")
