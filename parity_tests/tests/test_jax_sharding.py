"""Partitions divided over 8 devices: the same values, and no device talks to another, forward or backward."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
from flax import nnx

from jax_impl import PartitionedLinear
from jax_impl.registry import IMPLEMENTATIONS
from jax_impl.sharding import partition_sharding, shard_partitions

pytestmark = pytest.mark.usefixtures("quick_compilation")

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import jax_impl
from jax_impl.sharding import partition_sharding, shard_partitions

assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("partitions",), axis_types=(jax.sharding.AxisType.Auto,))

def layer():
    return jax_impl.PartitionedLinear(16, 4, 5, init="torch", rngs=nnx.Rngs(0))

plain, model = layer(), shard_partitions(layer(), mesh)
x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 16, 4)), "float32")
divided = jax.device_put(x, partition_sharding(mesh, leading_axes=1))
for parameter in (model.kernel[...], model.bias[...]):
    assert len(parameter.sharding.device_set) == 8
    assert all(shard.data.shape[0] == 2 for shard in parameter.addressable_shards)

def run(kernel, bias, x):
    y = jax_impl.partitioned_linear(x, kernel, bias)
    _, pullback = jax.vjp(jax_impl.partitioned_linear, x, kernel, bias)
    return y, *pullback(2 * y)

arguments = (model.kernel[...], model.bias[...], divided)
compiled = jax.jit(run).lower(*arguments).compile()
print(compiled.as_text())
print("=== control ===")
whole, by_rows = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("partitions",)))
for talking, out in (
    (lambda *a: jnp.sum(run(*a)[0]), None),
    (lambda *a: run(*a)[0], whole),
    (lambda *a: jnp.roll(run(*a)[0], 2, 1), partition_sharding(mesh, leading_axes=1)),
    (lambda *a: jnp.tile(run(*a)[0], (4, 1, 1)), by_rows),
):
    print(jax.jit(talking, out_shardings=out).lower(*arguments).compile().as_text())
for ours, want in zip(compiled(*arguments), jax.jit(run)(plain.kernel[...], plain.bias[...], x), strict=True):
    assert len(ours.sharding.device_set) == 8
    reach = 4 * (6 + 4 + 5) * 2.0**-24 * 6 * 4 * 5 * np.abs(want).max()
    assert np.all(np.abs(np.asarray(ours) - np.asarray(want)) <= reach)

arrays = jax_impl.export_parameters(model)
assert np.array_equal(arrays["weight"], np.asarray(plain.kernel[...]))
jax_impl.import_parameters(model, {name: array + 1 for name, array in arrays.items()})
assert len(model.kernel[...].sharding.device_set) == 8, "an import must keep the placement"

try:
    shard_partitions(jax_impl.PartitionedLinear(12, 4, 5, rngs=nnx.Rngs(0)), mesh)
except ValueError as error:
    assert str(error) == (
        "`mesh`: expected a size of axis 'partitions' that divides n = 12, got 8; use fewer devices."
    ), error
else:
    raise AssertionError("12 partitions were divided over 8 devices")
# As many devices, but others; and fewer. Only what is the same set can compute together.
kernel, bias = (np.asarray(array) for array in arguments[:2])
first, second = (jax.make_mesh((4,), ("n",), devices=jax.devices()[k : k + 4]) for k in (0, 4))
replicated = jax.sharding.PartitionSpec()
ways = [*jax.devices()[:2], *(jax.sharding.NamedSharding(mesh, replicated) for mesh in (first, second, mesh))]
for a in ways:
    for b in ways:
        for operands, argument in (
            ((jax.device_put(x, a), jax.device_put(kernel, b)), "x"),
            ((x, jax.device_put(kernel, b), jax.device_put(bias, a)), "bias"),
        ):
            try:
                y = jax_impl.partitioned_linear(*operands)
            except ValueError as error:
                assert a is not b, error
                assert str(error).startswith(f"`{argument}`: expected the devices of `kernel`, "), error
                assert str(error).endswith("; move one of them."), error
            else:
                assert a is b, "operands on different devices were accepted"

import jax_impl.linen as linen

divided_dict = {"kernel": model.kernel[...], "bias": model.bias[...]}
renewed = linen.import_parameters(divided_dict, arrays)
for name, value in renewed.items():
    assert value.sharding == divided_dict[name].sharding, "an import must keep the placement"

# Rows by partitions: forward nobody talks, and of the gradients each device sums its own partitions' over rows alone.
import re
both = jax.make_mesh((2, 4), ("rows", "partitions"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
whole = jax.tree.map(
    lambda value: jnp.asarray(rng.integers(-3, 4, value.shape), "float32"),
    linen.PartitionedLinear(5).init(jax.random.key(0), x),
)
state = jax.device_put(whole, partition_sharding(both))
numbers = jnp.asarray(rng.integers(-3, 4, x.shape), "float32")
rows = jax.device_put(numbers, jax.sharding.NamedSharding(both, jax.sharding.PartitionSpec("rows", "partitions")))
graph, nnx_state = nnx.split(shard_partitions(layer(), both))
names = ("auto", "einsum", "vmap")
calls = {name: (state, linen.PartitionedLinear(5, implementation=name).apply) for name in names}
calls["nnx"] = nnx_state, lambda state, x: nnx.merge(graph, state)(x)
for name, (parameters, call) in calls.items():
    gradient = jax.jit(jax.grad(lambda state, x: jnp.sum(call(state, x) ** 2)))
    compiled = gradient.lower(parameters, rows).compile()
    print("=== forward ===")
    print(jax.jit(call).lower(parameters, rows).compile().as_text())
    print("=== gradient ===")
    print(compiled.as_text())
    reduced = re.findall(r"= ([^=]*?) all-reduce(?:-start)?\\(", compiled.as_text())
    shapes = re.findall(r"f32\\[([^]]+)\\]", " ".join(reduced))
    sizes = [np.prod([int(size) for size in shape.split(",")]) for shape in shapes]
    assert sorted(sizes) == [4 * 5, 4 * 4 * 5], (name, reduced)
    if name != "nnx":
        for ours, want in zip(*map(jax.tree.leaves, (compiled(state, rows), gradient(whole, numbers))), strict=True):
            assert np.array_equal(ours, want), name
print("done")
"""


def test_no_collectives_on_eight_devices():
    root = Path(__file__).resolve().parents[2]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("done\n")
    one_axis, *parts = re.split("=== (?:forward|gradient) ===", result.stdout)
    program, control = one_axis.split("=== control ===")
    assert [name for name in COLLECTIVES if name in program] == []
    # A sum over all partitions must talk, a gathered or a shifted result, and rows in the place of partitions: the
    # search above would find it.
    assert {name for name in COLLECTIVES if name in control} >= {
        "all-reduce",
        "all-gather",
        "collective-permute",
        "all-to-all",
    }
    assert len(parts) == 2 * 4
    for forward, gradient in zip(parts[::2], parts[1::2], strict=True):
        assert [name for name in COLLECTIVES if name in forward] == []
        assert [name for name in COLLECTIVES if name in gradient] == ["all-reduce"]


@pytest.fixture
def mesh():
    return jax.make_mesh((1,), ("partitions",), axis_types=(jax.sharding.AxisType.Auto,))


def test_the_sharding_divides_only_the_partition_axis(mesh):
    assert partition_sharding(mesh).spec == jax.sharding.PartitionSpec("partitions")
    assert partition_sharding(mesh, leading_axes=2).spec == jax.sharding.PartitionSpec(None, None, "partitions")


def test_bad_meshes_are_refused(mesh):
    layer = PartitionedLinear(3, 4, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`axis_name`: expected one of 'partitions', got 'data';"):
        shard_partitions(layer, mesh, "data")
    with pytest.raises(ValueError, match="`leading_axes`: expected at least 0, got -1;"):
        partition_sharding(mesh, leading_axes=-1)
    with pytest.raises(TypeError, match="`mesh`: expected a Mesh, got a str;"):
        shard_partitions(layer, "partitions")
    with pytest.raises(TypeError, match="`layer`: expected a PartitionedLinear, got a Linear;"):
        shard_partitions(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), mesh)
    # No second device is needed to ask for two.
    abstract = jax.sharding.AbstractMesh((2,), ("partitions",))
    with pytest.raises(TypeError, match="`mesh`: expected a Mesh, got an AbstractMesh;"):
        shard_partitions(layer, abstract)


def test_every_implementation_can_be_divided(mesh):
    for name in IMPLEMENTATIONS:
        layer = PartitionedLinear(3, 4, 5, implementation=name, rngs=nnx.Rngs(0))
        before = layer.kernel, layer.bias
        assert shard_partitions(layer, mesh) is layer
        # The same variables, metadata and all, hold the divided values.
        assert all(old is new for old, new in zip(before, (layer.kernel, layer.bias), strict=True))
