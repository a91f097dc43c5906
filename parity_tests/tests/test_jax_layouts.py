"""The JAX tree on inputs of other layouts, of some partitions, and shared by all, in nnx, linen and the function."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.numpy as jnp
from flax import nnx

from jax_impl import (
    PartitionedLinear,
    UnsupportedImplementationError,
    implementation_names,
    import_parameters,
    linen,
    partitioned_linear,
)
from parity_tests.tests.rearranged import CASES, LAYOUTS, layout_fault, shared_fault, subset_fault

NAMES = ("auto", *implementation_names())
SHARED = ("auto", "einsum", "matmul")
DTYPES = ("float32", "bfloat16", "float16")
pytestmark = pytest.mark.usefixtures("quick_compilation")


def found(function, arguments, cotangent):
    y, pullback = jax.vjp(function, *(jnp.asarray(array) for array in arguments if array is not None))
    gradients = pullback(jnp.asarray(cotangent))
    return {
        name: np.array(value) for name, value in zip(("y", "dx", "dweight", "dbias"), (y, *gradients), strict=False)
    }


def gradients(x, weight, bias, cotangent, options):
    def function(x, kernel, bias=None):
        return partitioned_linear(x, kernel, bias, precision="highest", **options)

    return found(jax.jit(function), (x, weight, bias), cotangent)


def nnx_gradients(x, weight, bias, cotangent, options):
    options = dict(options)
    chosen = {"partitions": options.pop("partitions")} if "partitions" in options else {}
    layer = PartitionedLinear(
        *weight.shape,
        use_bias=bias is not None,
        param_dtype=weight.dtype,
        rngs=nnx.Rngs(0),
        precision="highest",
        **options,
    )
    import_parameters(layer, {"weight": weight} | ({} if bias is None else {"bias": bias}))

    def function(x, kernel, bias=None):
        graph, _ = nnx.split(layer)
        own = nnx.State({"kernel": nnx.Param(kernel)} | ({} if bias is None else {"bias": nnx.Param(bias)}))
        return nnx.merge(graph, own)(x, **chosen)

    return found(jax.jit(function), (x, weight, bias), cotangent)


def linen_gradients(x, weight, bias, cotangent, options):
    options = dict(options)
    chosen = {"partitions": options.pop("partitions")} if "partitions" in options else {}
    layer = linen.PartitionedLinear(
        weight.shape[2],
        use_bias=bias is not None,
        param_dtype=weight.dtype,
        precision="highest",
        num_partitions=weight.shape[0],
        **options,
    )
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.asarray(x), **chosen))["params"]
    assert shapes["kernel"].shape == weight.shape

    def function(x, kernel, bias=None):
        params = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
        return layer.apply({"params": params}, x, **chosen)

    return found(jax.jit(function), (x, weight, bias), cotangent)


LAYERS = pytest.mark.parametrize(
    "layer", [nnx_gradients, linen_gradients], ids=lambda layer: layer.__name__.removesuffix("_gradients")
)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_takes_every_layout(name):
    # One case each, since JAX compiles for each; every case and dtype with some.
    faults = {}
    for number, layout in enumerate(list(LAYOUTS)[NAMES.index(name) % 3 :: 3], NAMES.index(name)):
        case, dtype = CASES[number % len(CASES)], DTYPES[number % len(DTYPES)]
        fault = layout_fault(gradients, case, dtype, LAYOUTS[layout], implementation=name)
        faults |= {(layout, case.name, dtype): fault} if fault else {}
    assert faults == {}


@LAYERS
@pytest.mark.parametrize("layout", ["flat", "partition-major", "features before partitions"])
def test_layers_take_every_layout(layer, layout):
    assert layout_fault(layer, CASES[0], "float32", LAYOUTS[layout]) == ""


def test_a_fault_of_a_layout_is_noticed():
    def mirrored(x, weight, bias, cotangent, options):
        return gradients(x, weight[::-1].copy(), bias, cotangent, options)

    assert "y" in layout_fault(mirrored, CASES[0], "float32", LAYOUTS["flat"])
    assert "y" in subset_fault(mirrored, CASES[0], "float32", [2, 0], whole=False)
    assert "y" in shared_fault(mirrored, CASES[0], "float32")


@pytest.mark.sample(2)
@pytest.mark.parametrize("whole", [True, False], ids=["whole x", "x of the chosen"])
@pytest.mark.parametrize("function", [gradients, nnx_gradients, linen_gradients], ids=["function", "nnx", "linen"])
def test_a_subset_is_computed_and_trained_alone(function, whole):
    for dtype, given, chosen in zip(DTYPES, (list, np.array, jnp.array), ([2, 0], [1], [3, 0]), strict=True):
        assert subset_fault(function, CASES[0], dtype, chosen, whole=whole, given=given(chosen)) == ""


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_takes_a_traced_subset(name):
    whole = NAMES.index(name) % 2 == 0

    @jax.jit
    def function(x, kernel, bias, chosen):
        return partitioned_linear(x, kernel, bias, partitions=chosen, implementation=name, precision="highest")

    def traced(x, weight, bias, cotangent, options):
        return found(lambda *arrays: function(*arrays, options["partitions"]), (x, weight, bias), cotangent)

    for chosen in ([2, 0], [1, 3]):  # one program for both
        assert subset_fault(traced, CASES[0], "float32", chosen, whole=whole, given=jnp.array(chosen)) == ""


def test_traced_indices_out_of_range_give_nan_and_no_gradients():
    kernel, x = jnp.ones((3, 4, 5)), jnp.ones((6, 2, 4))

    def function(kernel, chosen):
        return partitioned_linear(x, kernel, partitions=chosen)

    for bad in (3, -1):
        y = jax.jit(function)(kernel, jnp.array([1, bad]))
        assert jnp.isnan(y[:, 1]).all()
        assert (y[:, 0] == 4).all()
        grad = jax.jit(jax.grad(lambda kernel, chosen: function(kernel, chosen)[:, 0].sum()))(
            kernel, jnp.array([1, bad])
        )
        assert not grad[jnp.array([0, 2])].any()


def test_random_critics_with_one_input_are_chained_and_mapped():
    first = PartitionedLinear(5, 4, 8, partition_axis=None, rngs=nnx.Rngs(0))
    second = PartitionedLinear(5, 8, 1, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(2), (6, 4))

    def critics(x, chosen):
        return second(nnx.relu(first(x, partitions=chosen)), partitions=chosen)

    chosen = jnp.array([[3, 0], [1, 4]])
    y = jax.jit(jax.vmap(critics, (None, 0)))(x, chosen)
    whole = second(nnx.relu(first(x)))
    np.testing.assert_allclose(y, jnp.stack([whole[:, row] for row in chosen]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_input_is_one_dense_product(name):
    # "auto" is `matmul`; each case and dtype with one of the two.
    first = SHARED.index(name)
    for number, case in enumerate(CASES if first else CASES[:1]):
        for dtype in DTYPES[(first + number) % 2 :: 2]:
            assert shared_fault(gradients, case, dtype, implementation=name) == "", (case.name, dtype)


@LAYERS
def test_layers_take_a_shared_input(layer):
    assert shared_fault(layer, CASES[0], "float32") == ""


def test_a_shared_input_is_not_copied():
    x, kernel, bias = jnp.ones((64, 4)), jnp.ones((50, 4, 3)), jnp.ones((50, 3))
    program = jax.jit(lambda *arrays: partitioned_linear(*arrays, partition_axis=None)).lower(x, kernel, bias)
    text = program.compile().as_text()
    assert text.count(" dot(") + text.count("custom-call") + text.count("onednn") == 1
    # Neither in memory nor in a fusion is there an array of n inputs.
    assert not any(shape in text for shape in ("[64,50,4]", "[50,64,4]", "[50,4,64]"))
    copies = jax.jit(
        lambda x, *rest: partitioned_linear(jnp.broadcast_to(x[:, None], (64, 50, 4)), *rest, implementation="matmul")
    )
    assert "[50,64,4]" in copies.lower(x, kernel, bias).compile().as_text()


def test_the_others_say_that_they_have_no_shared_product():
    for name in set(NAMES) - set(SHARED):
        with pytest.raises(UnsupportedImplementationError, match=f"shared input, 'einsum', 'matmul', got '{name}'"):
            partitioned_linear(jnp.ones((6, 4)), jnp.ones((3, 4, 5)), partition_axis=None, implementation=name)


DIVIDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_impl import partitioned_linear

kernel = jax.random.normal(jax.random.key(0), (4, 3, 5))
x = jax.random.normal(jax.random.key(1), (6, 4, 3))
calls = [(x.swapaxes(0, 1), {"partition_axis": 0}), (x.reshape(6, 12), {"partition_axis": -1})]
calls += [(x[:, 0], {"partition_axis": None}), (x, {"partitions": [1, 3]})]
expected = [partitioned_linear(value, kernel, **options) for value, options in calls]
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("n",), axis_types=(kind,))
    divided = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("n")))
    with jax.set_mesh(mesh):
        for (value, options), right in zip(calls, expected):
            y = jax.jit(lambda x, k, options=options: partitioned_linear(x, k, **options))(value, divided)
            np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5)
print("done")
"""


def test_layouts_subsets_and_shared_inputs_of_divided_kernels():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", DIVIDED],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("done\n")


REFUSED = {
    "out of range": ({"partitions": [0, 3]}, ValueError, "indices from 0 to n - 1 = 2, got 3"),
    "negative": ({"partitions": jnp.array([-1])}, ValueError, "indices from 0 to n - 1 = 2, got -1"),
    "none": ({"partitions": []}, ValueError, "got none"),
    "one index": ({"partitions": 1}, TypeError, "got an int; pass a list"),
    "mask": ({"partitions": np.array([True, False, True])}, TypeError, r"got bool .* jnp\.flatnonzero"),
    "no axis": ({"in_axis": None}, TypeError, "`in_axis`: expected an int, got None"),
    "axis out of range": ({"partition_axis": 3}, ValueError, r"axes -1 and 3 .* got shape \(6, 3, 4\)"),
    "other axes": ({"partition_axis": 0}, ValueError, "n = 3 along partition_axis=0 .* keep the defaults"),
    "not flat": ({"partition_axis": -1}, ValueError, r"n\*in = 3 \* 4 = 12 along axis -1"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        partitioned_linear(jnp.ones((6, 3, 4)), jnp.ones((3, 4, 5)), **options)


def test_linen_is_told_what_its_input_does_not_say():
    flat = linen.PartitionedLinear(5, partition_axis=-1, num_partitions=3)
    variables = flat.init(jax.random.key(0), jnp.ones((2, 12)))
    assert variables["params"]["kernel"].shape == (3, 4, 5)
    with pytest.raises(ValueError, match="`num_partitions`: expected an int, for an input of shape"):
        linen.PartitionedLinear(5, partition_axis=None).init(jax.random.key(0), jnp.ones((2, 12)))
    with pytest.raises(ValueError, match=r"a multiple of n = 3 along axis -1, got \(2, 13\)"):
        flat.init(jax.random.key(0), jnp.ones((2, 13)))
