"""Partitions of unequal sizes in PyTorch: every formulation against a list of `nn.Linear`, in every way of calling."""

import itertools

import pytest
import torch
from torch import nn

from torch_impl import PartitionedLinear, implementation_names, partitioned_linear
from torch_impl.packing import check_packing

NAMES = implementation_names(unequal=True)
# Distinct sizes; neighbours and others of one size; one size for all; one partition.
SIZES = [
    ((1, 4, 9, 2), (3, 5, 1, 2)),
    ((2, 3, 3, 2, 3), (3, 1, 1, 3, 4)),
    ((2, 2, 2), (3, 3, 3)),
    ((5,), (7,)),
]


def linears_of(ins, outs, *, bias=True, dtype=torch.float64):
    return [nn.Linear(i, o, bias, dtype=dtype) for i, o in zip(ins, outs, strict=True)]


def layer_like(linears, **options):
    """A layer with the values of the linears, put there by views of its partitions."""
    sizes = [[linear.in_features for linear in linears], [linear.out_features for linear in linears]]
    first = linears[0]
    layer = PartitionedLinear(len(linears), *sizes, first.bias is not None, dtype=first.weight.dtype, **options)
    with torch.no_grad():
        for linear, weight in zip(linears, layer.partition_weights(), strict=True):
            weight.copy_(linear.weight.mT)
        for linear, bias in zip(linears, layer.partition_biases() or [], strict=first.bias is not None):
            bias.copy_(linear.bias)
    return layer


def expected(linears, x):
    offsets = list(itertools.accumulate((linear.in_features for linear in linears), initial=0))
    parts = [linear(x[..., a:b]) for linear, (a, b) in zip(linears, itertools.pairwise(offsets), strict=True)]
    return torch.cat(parts, -1)


@pytest.mark.parametrize("name", ["auto", *NAMES])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_formulation_computes_what_the_linears_do(name, sizes):
    for bias, shape in itertools.product((True, False), ((), (0,), (6,), (2, 1, 3))):
        linears = linears_of(*sizes, bias=bias)
        layer = layer_like(linears, implementation=name)
        x = torch.randn(*shape, sum(sizes[0]), dtype=torch.float64)
        y = layer(x)
        assert y.shape == (*shape, sum(sizes[1]))
        torch.testing.assert_close(y, expected(linears, x))
        options = {"in_features": list(sizes[0]), "out_features": sizes[1], "implementation": name}
        assert torch.equal(y, partitioned_linear(x, layer.weight, layer.bias, **options))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_their_derivatives_are_right(name):
    ins, outs = (2, 3, 1, 2), (1, 2, 1, 1)
    packing = check_packing(4, ins, outs, 2**60)
    operands = [torch.randn(*shape, dtype=torch.float64) for shape in ((3, 8), (packing.weight_size,), (5,))]
    operands = [operand.requires_grad_() for operand in operands]

    def call(x, weight, bias):
        return partitioned_linear(x, weight, bias, in_features=ins, out_features=outs, implementation=name)

    assert torch.autograd.gradcheck(call, operands, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, operands)
    many = torch.stack([operands[0], 2 * operands[0]])
    torch.testing.assert_close(torch.vmap(call, (0, None, None))(many, *operands[1:]), call(many, *operands[1:]))
