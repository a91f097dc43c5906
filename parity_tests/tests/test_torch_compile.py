"""The torch layers under torch.compile and torch.export, with a batch size that changes from call to call."""

import os

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch

from torch_impl import MaskedPartitionedLinear, PartitionedLinear, implementation_names, partitioned_linear

pytestmark = [
    pytest.mark.compile,
    # torch's own compiler uses what torch deprecates: scripting, and instances of autograd functions.
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

TRACEABLE = ["loop", "masked", "einsum", "vmap", "matmul", "grouped_conv"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def lattice(*shape, dtype=torch.float32):
    """Integers in +-3: every sum below is exact, so results are compared bit for bit."""
    return torch.randint(-3, 4, shape).to(dtype)


def on_lattice(layer):
    with torch.no_grad():
        for view in layer.partition_views().values():
            view.copy_(lattice(*view.shape))
    return layer


def results(function, layer, x):
    y = function(x)
    return [y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))]


def compare(layer, backend, dtype=torch.float32):
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    # The second size makes the batch dynamic; a later one that compiled anew would exceed the limit.
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for batch in (5, 7, 12, 31):
            x = lattice(batch, 3, 8, dtype=dtype).requires_grad_()
            for found, expected in zip(results(compiled, layer, x), results(layer, layer, x), strict=True):
                assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["matmul", "einsum", "loop"])
def test_inductor_computes_the_same_forward_and_backward(name):
    compare(on_lattice(PartitionedLinear(3, 8, 16, implementation=name)), "inductor")


@pytest.mark.parametrize("name", [*TRACEABLE, "auto"])
def test_a_dynamic_batch_is_not_compiled_anew(name):
    compare(on_lattice(PartitionedLinear(3, 8, 16, implementation=name)), "aot_eager")


def test_grouped_matmul_is_traced_in_bfloat16():
    compare(
        on_lattice(PartitionedLinear(3, 8, 16, implementation="grouped_matmul").bfloat16()), "aot_eager", torch.bfloat16
    )


def test_grouped_matmul_says_that_it_is_not_traced_in_float32():
    layer = torch.compile(PartitionedLinear(3, 8, 16, implementation="grouped_matmul"), backend="aot_eager")
    with pytest.raises(Exception, match="can be traced without data"):
        layer(lattice(5, 3, 8))


def test_masked_layer_compiles():
    compare(on_lattice(MaskedPartitionedLinear(3, 8, 16)), "aot_eager")


def test_autocast_inside_a_compiled_layer():
    layer = on_lattice(PartitionedLinear(3, 8, 16))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = lattice(5, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))
        assert compiled(x).dtype == torch.bfloat16


# Of what torch.vmap wraps.
@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:A model attribute")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["matmul", "auto", "vmap", "the masked layer"])
def test_export_with_a_dynamic_batch(name, strict):
    if name == "vmap" and not strict:
        pytest.skip("what torch.vmap wraps is a constant to a trace that is not strict")
    whole = name == "the masked layer"
    layer = on_lattice(MaskedPartitionedLinear(3, 8, 16) if whole else PartitionedLinear(3, 8, 16, implementation=name))
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(layer, (lattice(4, 3, 8),), dynamic_shapes=shapes, strict=strict)
    for batch in (2, 4, 33):
        x = lattice(batch, 3, 8)
        assert torch.equal(program.module()(x), layer(x))


ARGUMENTS = {
    "flat": ({"partition_axis": -1}, (24,), None),
    "features before partitions": ({"in_axis": -2, "partition_axis": -1}, (8, 3), None),
    "shared": ({"partition_axis": None}, (8,), None),
    "partitions": ({}, (3, 8), [2, 0]),
    "partitions of a tensor": ({}, (2, 8), torch.tensor([2, 0])),
    "shared, partitions of a tensor": ({"partition_axis": None}, (8,), torch.tensor([2, 0])),
}


@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize(("options", "shape", "partitions"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_layouts_and_subsets_are_compiled_and_exported(options, shape, partitions, how):
    layer = on_lattice(PartitionedLinear(3, 8, 16, **options))
    arguments = () if partitions is None else (partitions,)
    if how == "compile":
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    else:
        shapes = ({0: torch.export.Dim("batch")}, *([None] * 2 if type(given) is list else None for given in arguments))
        program = torch.export.export(layer, (lattice(4, *shape), *arguments), dynamic_shapes=shapes)
        compiled = program.module()
    for batch in (5, 12):
        x = lattice(batch, *shape)
        assert torch.equal(compiled(x, *arguments), layer(x, *arguments))


@pytest.mark.parametrize("name", implementation_names(unequal=True))
def test_unequal_sizes_are_compiled_and_exported(name):
    if name != "bucketed_matmul" and "EVERY_TEST" not in os.environ:
        pytest.skip("ten seconds each: run with EVERY_TEST=1")
    sizes = {"in_features": (1, 4, 4), "out_features": [3, 5, 5], "implementation": name}
    layer = on_lattice(PartitionedLinear(3, **sizes))

    def call(x):
        y = partitioned_linear(x, layer.weight, layer.bias, **sizes, partitions=[2, 0])
        return torch.cat([layer(x), y], -1)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(layer, (lattice(4, 9),), dynamic_shapes=shapes).module()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for batch in (5, 12):
            x = lattice(batch, 9).requires_grad_()
            for found, expected in zip(results(compiled, layer, x), results(call, layer, x), strict=True):
                assert torch.equal(found, expected)
            assert torch.equal(program(x), layer(x))
