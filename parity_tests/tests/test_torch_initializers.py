"""Initial values in torch: the distribution of n real linears, per partition, and custom functions."""

import math

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch
from scipy import stats
from torch import nn

from torch_impl import MaskedPartitionedLinear, PartitionedLinear
from torch_impl.initializers import TRUNCATED_STD
from torch_impl.registry import DTYPE_NAMES

LAYERS = [PartitionedLinear, MaskedPartitionedLinear]
NUM, IN, OUT = 8, 50, 60
# Six standard errors: a correct initialiser strays further about twice in a billion draws, and the seed is fixed.
STANDARD_ERRORS = 6.0
DISTRIBUTIONS = {
    "torch": stats.uniform(-1 / math.sqrt(IN), 2 / math.sqrt(IN)),
    "flax": stats.truncnorm(-2, 2, scale=1 / math.sqrt(IN) / stats.truncnorm(-2, 2).std()),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parts(layer):
    return {name: view.detach().double() for name, view in layer.partition_views().items()}


def assert_drawn_from(values, distribution):
    """Judge mean and variance by their own standard errors, and the shape by Kolmogorov and Smirnov."""
    count = values.numel()
    variance = distribution.var()
    fourth = distribution.expect(lambda v: v**4, epsabs=0)
    assert abs(values.mean().item()) <= STANDARD_ERRORS * math.sqrt(variance / count)
    spread = STANDARD_ERRORS * math.sqrt((fourth - variance**2) / count)
    assert abs(values.square().mean().item() - variance) <= spread
    assert stats.kstest(values.numpy(), distribution.cdf).pvalue > 2 * stats.norm.sf(STANDARD_ERRORS)


@pytest.mark.parametrize("init", DISTRIBUTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_partition_follows_the_distribution_of_its_own_fan_in(kind, init):
    weight = parts(kind(NUM, IN, OUT, init=init))["weight"]
    for partition in weight:
        assert_drawn_from(partition.flatten(), DISTRIBUTIONS[init])
    assert_drawn_from(weight.flatten(), DISTRIBUTIONS[init])


@pytest.mark.parametrize("init", DISTRIBUTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_partitions_differ(kind, init):
    weight = parts(kind(NUM, IN, OUT, init=init))["weight"]
    for first in range(NUM):
        for second in range(first):
            assert not torch.equal(weight[first], weight[second])
            correlation = (weight[first] * weight[second]).sum() / (weight[first].norm() * weight[second].norm())
            assert abs(correlation) <= STANDARD_ERRORS / math.sqrt(IN * OUT)


def test_flax_std_is_one_over_sqrt_fan_in():
    assert DISTRIBUTIONS["flax"].std() == pytest.approx(1 / math.sqrt(IN))


@pytest.mark.parametrize("kind", LAYERS)
def test_biases(kind):
    bias = parts(kind(200, IN, OUT, init="torch"))["bias"]
    assert_drawn_from(bias.flatten(), DISTRIBUTIONS["torch"])
    assert len({tuple(row.tolist()) for row in bias}) == 200
    assert (parts(kind(3, IN, OUT, init="flax"))["bias"] == 0).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_torch_init_matches_n_real_linears(kind):
    linears = [nn.Linear(IN, OUT) for _ in range(NUM)]
    layer = parts(kind(NUM, IN, OUT))
    real = {
        "weight": torch.stack([linear.weight.detach().double() for linear in linears]),
        "bias": torch.stack([linear.bias.detach().double() for linear in linears]),
    }
    for name, values in real.items():
        test = stats.ks_2samp(layer[name].flatten().numpy(), values.flatten().numpy())
        assert test.pvalue > 2 * stats.norm.sf(STANDARD_ERRORS)
        assert_drawn_from(values.flatten(), DISTRIBUTIONS["torch"])
        bound = 1 / math.sqrt(IN)
        assert layer[name].abs().max() <= bound
        # The largest of m uniform draws falls short of the bound by a factor 1 - t with probability (1 - t)**m.
        shortfall = -math.log(2 * stats.norm.sf(STANDARD_ERRORS)) / values.numel()
        assert min(layer[name].abs().max(), values.abs().max()) >= bound * (1 - shortfall)


@pytest.mark.parametrize("wrong", [1 / math.sqrt(NUM), math.sqrt(NUM)], ids=["fan-in-counts-n", "fan-in-over-n"])
@pytest.mark.parametrize("init", DISTRIBUTIONS)
def test_a_wrong_fan_in_would_be_caught(init, wrong):
    weight = parts(PartitionedLinear(NUM, IN, OUT, init=init))["weight"]
    with pytest.raises(AssertionError):
        assert_drawn_from(wrong * weight.flatten(), DISTRIBUTIONS[init])


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
@pytest.mark.parametrize("init", DISTRIBUTIONS)
def test_bounds_hold_in_every_dtype(init, dtype):
    weight = parts(PartitionedLinear(NUM, IN, OUT, init=init, dtype=dtype))["weight"]
    bound = torch.tensor(DISTRIBUTIONS[init].support()[1], dtype=torch.float64)
    # A draw next to the bound may be rounded up to the nearest value of the dtype, never beyond it.
    assert weight.abs().max() <= max(bound.to(dtype).double(), bound)
    assert weight.unique().numel() > 100


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_16_bit_draw_of_a_truncated_normal_is_the_rounded_fp32_draw(kind, low):
    draws = []
    for dtype in (torch.float32, low):
        torch.manual_seed(2)
        draws.append(kind(NUM, IN, OUT, init="flax", dtype=dtype).partition_views()["weight"].detach())
    assert torch.equal(draws[0].to(low), draws[1])
    # Drawn in 16 bits the same seed gives other values.
    torch.manual_seed(2)
    assert not torch.equal(nn.init.trunc_normal_(torch.empty(NUM, IN, OUT, dtype=low), std=draws[1].std()), draws[1])


def test_the_std_of_a_truncated_normal_is_exact():
    assert stats.truncnorm(-2, 2).std() == pytest.approx(TRUNCATED_STD, rel=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_same_seed_same_values(kind):
    torch.manual_seed(1)
    first = parts(kind(3, 4, 5))
    torch.manual_seed(1)
    second = parts(kind(3, 4, 5))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", LAYERS)
def test_custom_weight_initialiser_sees_one_partition_as_a_linear_holds_it(kind):
    seen = []

    def weight_init(view):
        seen.append((tuple(view.shape), nn.init._calculate_fan_in_and_fan_out(view)))
        view.fill_(len(seen))

    layer = parts(kind(3, 4, 5, init=weight_init))
    assert seen == [((5, 4), (4, 5))] * 3
    assert torch.equal(layer["weight"], torch.tensor([1.0, 2.0, 3.0]).double().view(3, 1, 1).expand(3, 4, 5))
    assert layer["bias"].abs().max() <= 0.5
    assert layer["bias"].unique().numel() == 15


@pytest.mark.parametrize("kind", LAYERS)
def test_pair_of_custom_initialisers(kind):
    layer = kind(3, 4, 4, init=(nn.init.eye_, nn.init.ones_))
    assert torch.equal(parts(layer)["weight"], torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    assert (parts(layer)["bias"] == 1).all()
    x = torch.randint(-3, 4, (6, 3, 4)).float()
    assert torch.equal(layer(x), x + 1)
    with torch.no_grad():
        layer.weight.zero_()
    layer.reset_parameters()
    assert torch.equal(layer(x), x + 1)


@pytest.mark.parametrize("kind", LAYERS)
def test_custom_initialiser_orientation_is_that_of_a_linear(kind):
    def weight_init(view):
        view.copy_(torch.arange(20.0).view(5, 4))

    linear = kind(2, 4, 5, init=weight_init).to_linears()[1]
    assert torch.equal(linear.weight, torch.arange(20.0).view(5, 4))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_failing_initialiser_leaves_the_layer_as_it_was(kind):
    layer = kind(3, 4, 5)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    calls = []

    def fail_at_the_last(view):
        calls.append(view.fill_(7.0))
        if len(calls) == 3:
            raise RuntimeError("no more values")

    layer.init = (nn.init.zeros_, fail_at_the_last)
    with pytest.raises(ValueError, match=r"^`bias_init`: .*, got an error from it \(no more values\); pass a function"):
        layer.reset_parameters()
    assert len(calls) == 3
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("pair", [(0.1, 0.2), (nn.init.ones_, 0.2), (0.1, nn.init.ones_), (nn.init.ones_, None)])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_pair_that_holds_no_two_functions_is_refused(kind, pair):
    with pytest.raises(
        TypeError, match=r"^`init`: expected a name, a function or a pair \(weight_init, bias_init\), got"
    ):
        kind(3, 4, 5, init=pair)


def test_custom_initialiser_without_bias():
    layer = PartitionedLinear(3, 4, 5, bias=False, init=(nn.init.ones_, nn.init.ones_))
    assert (layer.weight == 1).all()
