"""Partitions of unequal sizes in the JAX tree: the function, both layers and their way of the parameters."""

import os
import re

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jax_impl import PartitionedLinear, UnsupportedImplementationError, implementation_names, linen, partitioned_linear
from jax_impl.packing import packing_of
from jax_impl.registry import UNEQUAL_IMPLEMENTATIONS
from jax_impl.unequal import partition_biases, partition_weights
from parity_tests.tests.rearranged import unequal_fault

NAMES = implementation_names(unequal=True)
DTYPES = ("float32", "bfloat16", "float16")
# Two neighbours of one size, two that are apart, and sizes of one.
SIZES = ((1, 4, 4, 9, 1), (3, 5, 5, 1, 3))
PACKING = packing_of(*SIZES)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def found(function, arguments, cotangent):
    y, pullback = jax.vjp(function, *(jnp.asarray(array) for array in arguments if array is not None))
    arrays = (y, *pullback(jnp.asarray(cotangent)))
    return {name: np.array(value) for name, value in zip(("y", "dx", "dweight", "dbias"), arrays, strict=False)}


def gradients(x, weight, bias, cotangent, options):
    def function(x, kernel, bias=None):
        return partitioned_linear(x, kernel, bias, precision="highest", **options)

    return found(jax.jit(function), (x, weight, bias), cotangent)


def nnx_gradients(x, weight, bias, cotangent, options):
    sizes = options["in_features"], options["out_features"]
    layer = PartitionedLinear(
        len(sizes[0]),
        *sizes,
        use_bias=bias is not None,
        param_dtype=weight.dtype,
        precision="highest",
        rngs=nnx.Rngs(0),
    )
    assert layer.kernel.shape == weight.shape

    def function(x, kernel, bias=None):
        graph, _ = nnx.split(layer)
        own = nnx.State({"kernel": nnx.Param(kernel)} | ({} if bias is None else {"bias": nnx.Param(bias)}))
        return nnx.merge(graph, own)(x)

    return found(jax.jit(function), (x, weight, bias), cotangent)


def linen_gradients(x, weight, bias, cotangent, options):
    layer = linen.PartitionedLinear(
        options["out_features"],
        use_bias=bias is not None,
        param_dtype=weight.dtype,
        precision="highest",
        in_features=options["in_features"],
    )
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.asarray(x)))["params"]
    assert shapes["kernel"].shape == weight.shape

    def function(x, kernel, bias=None):
        return layer.apply({"params": {"kernel": kernel} | ({} if bias is None else {"bias": bias})}, x)

    return found(jax.jit(function), (x, weight, bias), cotangent)


def layer_of(ins=SIZES[0], outs=SIZES[1], **options):
    count = len(ins if isinstance(ins, tuple) else outs)
    return PartitionedLinear(count, ins, outs, **({"rngs": nnx.Rngs(0), "init": "torch"} | options))


def matrices(layer):
    """Of each partition, in NumPy: JAX compiles a slice for each size."""
    return partition_weights(np.array(layer.kernel[...]), layer.packing)


def vectors(layer):
    return partition_biases(np.array(layer.bias[...]), layer.packing)


def drawn(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["auto", *NAMES])
def test_every_formulation_is_what_the_oracle_has_for_each_partition(name):
    # A single size, and one partition, go other ways. Each case with some of the formulations.
    first = ("auto", *NAMES).index(name)
    for number, packing in enumerate((PACKING, packing_of((4, 4), (3, 3)), packing_of((5,), (1,)))):
        if number == 0 or number == first % 3:
            dtype = DTYPES[(first + number) % 3]
            assert unequal_fault(gradients, packing, dtype, bias=number != 1, implementation=name) == "", dtype


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
def test_any_number_of_leading_axes(leading):
    assert unequal_fault(gradients, packing_of((2, 1, 2), (1, 3, 1)), "float32", leading=leading) == ""


@pytest.mark.parametrize("layer", [nnx_gradients, linen_gradients], ids=["nnx", "linen"])
def test_layers_are_the_function(layer):
    assert unequal_fault(layer, PACKING, "float32") == ""


def test_a_fault_is_noticed():
    def off_by_one(x, weight, bias, cotangent, options):
        return gradients(np.roll(x, 1, -1), weight, bias, cotangent, options)

    def buckets_swapped(x, weight, bias, cotangent, options):
        return gradients(x, np.roll(weight, 6), bias, cotangent, options)

    packing = packing_of((2, 3), (3, 2))
    assert "partition 0: y" in unequal_fault(off_by_one, packing, "float32")
    assert "partition 0: y" in unequal_fault(buckets_swapped, packing, "float32")


def call(layer, x, kernel, name="auto", **options):
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    return partitioned_linear(x, kernel, layer.bias[...], implementation=name, **sizes, **options)


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_where_it_is_declared_to(name):
    x, layer = drawn(6, 19), layer_of()

    @jax.jit
    def step(x, kernel):
        y, pullback = jax.vjp(lambda x, kernel: call(layer, x, kernel, name), x, kernel)
        return (y, *pullback(jnp.ones_like(y)))

    kernel = layer.kernel[...]
    whole = step(x, kernel)
    spoilt = step(x.at[:, 9].set(jnp.nan), kernel.at[PACKING.weight_offsets[3]].set(jnp.inf))
    assert not jnp.isfinite(spoilt[0][:, 13:14]).any()
    # All but the outputs, inputs and weights of partition 3.
    weights = np.setdiff1d(np.arange(55), np.arange(9) + PACKING.weight_offsets[3])
    others = (np.s_[:, np.r_[0:13, 14:17]], np.s_[:, np.r_[0:9, 18:19]], weights)
    same = all(np.array_equal(a[kept], b[kept]) for a, b, kept in zip(whole, spoilt, others, strict=True))
    assert same == UNEQUAL_IMPLEMENTATIONS[name].isolates_partitions


@pytest.mark.parametrize("whole", [True, False], ids=["whole x", "x of the chosen"])
def test_a_subset_is_computed_and_trained_alone(whole):
    layer, x = layer_of(), drawn(6, 19)
    parts = np.split(np.array(x), PACKING.in_offsets[1:-1], -1)
    outputs = np.split(np.array(layer(x)), PACKING.out_offsets[1:-1], -1)
    for chosen in ([3, 0], jnp.array([4, 4, 1])) if whole else (np.array([2, 1]),):
        numbers = list(map(int, chosen))
        given = np.array(x) if whole else np.concatenate([parts[k] for k in numbers], -1)

        @jax.jit
        def step(kernel, bias, chosen=chosen, given=given):
            def loss(kernel, bias):
                y = partitioned_linear(given, kernel, bias, in_features=SIZES[0], out_features=SIZES[1], **options)
                return (y**2).sum(), y

            options = {"partitions": chosen}
            return jax.grad(loss, (0, 1), has_aux=True)(kernel, bias)

        grads, y = step(layer.kernel[...], layer.bias[...])
        np.testing.assert_allclose(y, np.concatenate([outputs[k] for k in numbers], -1), rtol=1e-5, atol=1e-6)
        for grad, views in zip(grads, (partition_weights, partition_biases), strict=True):
            assert [bool(part.any()) for part in views(np.array(grad), PACKING)] == [k in numbers for k in range(5)]
    np.testing.assert_array_equal(layer(given, partitions=chosen), y)


def test_indices_that_are_traced_are_refused():
    layer = layer_of()
    with pytest.raises(TypeError, match=r"`partitions`: expected known indices .* which the shape of y depends on"):
        nnx.jit(lambda layer, x, chosen: layer(x, partitions=chosen))(layer, drawn(2, 19), jnp.array([1]))


def test_features_on_another_axis():
    layer, x = layer_of(), drawn(2, 3, 19)
    # What the layer cuts out is what the tests cut out in NumPy.
    for cut, own in ((layer.partition_weights(), matrices(layer)), (layer.partition_biases(), vectors(layer))):
        assert all(map(np.array_equal, cut, own))
    other = layer_of(in_axis=1)
    np.testing.assert_array_equal(other(x.swapaxes(1, 2)).swapaxes(1, 2), layer(x))
    np.testing.assert_array_equal(layer_of(partition_axis=-1)(x), layer(x))


def test_a_shared_input_is_one_dense_product():
    layer = layer_of(4, (2, 5, 2), partition_axis=None)
    x = drawn(6, 4)
    dense, vector = np.concatenate(matrices(layer), 1), np.concatenate(vectors(layer))
    np.testing.assert_allclose(layer(x), x @ dense + vector, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(x, partitions=[1]), np.array(layer(x))[:, 2:7], rtol=1e-5, atol=1e-6)
    text = jax.jit(layer).lower(x).as_text()
    assert text.count("dot_general") == 1
    with pytest.raises(UnsupportedImplementationError, match="shared input, 'bucketed_matmul', got 'loop'"):
        layer_of(4, (2, 5), partition_axis=None, implementation="loop")(x)


def test_one_product_for_each_size_and_no_copy_of_a_weight():
    def lowered(sizes, name):
        packing = packing_of(*sizes)
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, sum(sizes[0])), (packing.weight_size,))]
        options = {"in_features": sizes[0], "out_features": sizes[1], "implementation": name}
        return jax.jit(lambda x, k: partitioned_linear(x, k, **options)).lower(*arguments)

    for name, products in (("loop", 5), ("masked", 1), ("bucketed_matmul", 3), ("padded_matmul", 1)):
        assert lowered(SIZES, name).as_text().count("dot_general") == products, name
    # Of two sizes in two runs, outputs are put beside each other once; a packed weight is read where it is.
    program = lowered(((8,) * 20 + (16,) * 10, (4,) * 20 + (32,) * 10), "bucketed_matmul")
    assert program.as_text().count("stablehlo.concatenate") == 1
    compiled = program.compile().as_text()
    assert "pad(" not in compiled
    assert not re.findall(r"\[(?:20,8,4|10,16,32)\]\S* copy\(", compiled)
    assert lowered(((8,) * 20, (4,) * 20), "bucketed_matmul").as_text().count("stablehlo.concatenate") == 0


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", NAMES)
def test_transformations(name):
    if name != "bucketed_matmul" and "EVERY_TEST" not in os.environ:
        pytest.skip("some seconds each: run with EVERY_TEST=1")
    layer = layer_of((1, 3, 2, 3), (2, 1, 3, 1))
    x, kernel, direction = drawn(5, 9), layer.kernel[...], drawn(*layer.kernel.shape, seed=3)

    def apply(x, kernel):
        return call(layer, x, kernel, name)

    def energy(kernel):
        return (apply(x, kernel) ** 3).sum()

    @jax.jit
    def all_ways(x, kernel):
        return {
            "mapped": jax.vmap(apply, (0, None))(x, kernel),
            "of two kernels": jax.vmap(apply, (None, 0))(x, jnp.stack([3 * kernel, kernel]))[1],
            "scanned": jax.lax.scan(lambda carry, row: (carry, apply(row, kernel)), 0, x)[1],
        }, (
            jax.jvp(jax.grad(energy), (kernel,), (direction,))[1],
            jax.grad(lambda kernel: jax.grad(energy)(kernel) @ direction)(kernel),
        )

    outputs, (forward, backward) = all_ways(x, kernel)
    for way, y in outputs.items():
        np.testing.assert_allclose(y, call(layer, x, kernel), rtol=1e-5, atol=1e-6, err_msg=way)
    assert jax.eval_shape(apply, x, kernel).shape == (5, 7)
    np.testing.assert_allclose(backward, forward, rtol=1e-4, atol=1e-4)
    assert jnp.abs(forward).max() > 1


def test_initial_values_have_the_fan_in_of_each_partition():
    ins, outs = (4, 100, 4, 1), (500, 300, 500, 700)
    for init, spread in (("torch", 3**-0.5), ("flax", 1.0)):
        layer = nnx.jit(lambda init=init: layer_of(ins, outs, init=init))()
        for size, weight, bias in zip(ins, matrices(layer), vectors(layer), strict=True):
            assert weight.std() == pytest.approx(spread * size**-0.5, rel=0.1)
            assert bias.std() == pytest.approx(0 if init == "flax" else spread * size**-0.5, rel=0.1)
        first, third = matrices(layer)[0], matrices(layer)[2]
        assert not np.array_equal(first, third)
    # Sizes that happen to be alike are packed too.
    assert layer_of((4, 4, 4), 5).kernel.shape == (60,)


def test_own_initialisers_see_one_partition_and_boxes_describe_the_packed_array():
    def draw(key, shape, dtype):
        return jnp.full(shape, shape[0], dtype)

    layer = layer_of(kernel_init=draw, bias_init=draw)
    assert [float(weight.max()) for weight in matrices(layer)] == list(SIZES[0])
    assert [float(bias.min()) for bias in vectors(layer)] == list(SIZES[1])
    boxed = linen.PartitionedLinear(SIZES[1], in_features=SIZES[0], kernel_init=nn.with_partitioning(draw, ("all",)))
    kernel = boxed.init(jax.random.key(0), drawn(2, 19))["params"]["kernel"]
    assert kernel.names == ("all",)
    assert kernel.value.shape == (55,)


REFUSED = {
    "no sizes in a sequence": ({"in_features": 4, "out_features": 5}, TypeError, "`in_features`: expected a sequence"),
    "wrong number": ({"in_features": (4, 5)}, ValueError, "`out_features`: expected one int, or n = 2 .* got 3"),
    "zero": ({"in_features": (4, 0, 5)}, ValueError, "`in_features`: expected positive sizes, got 0"),
    "bool": ({"in_features": (4, True, 5)}, TypeError, "`in_features`: .* got True, a bool"),
    "float": ({"out_features": (2, 1.0, 5)}, TypeError, r"`out_features`: .* got 1\.0, a float"),
    "for equal sizes": ({"implementation": "vmap"}, UnsupportedImplementationError, "sequences of sizes, 'loop', "),
    "unknown": ({"implementation": "fast"}, ValueError, "expected one of 'auto', 'loop', 'masked', 'bucketed_matmul'"),
    "shared": ({"partition_axis": None}, ValueError, "`partition_axis`: .* 3 input sizes, got None"),
    "partition axis": ({"partition_axis": -3}, ValueError, "`partition_axis`: expected its default or in_axis=-1"),
    "no axis": ({"in_axis": 3}, ValueError, r"`x`: expected an axis 3 with features, got shape \(6, 8\)"),
    "total": ({"in_features": (1, 4, 4)}, ValueError, r"`kernel`: expected packed shape .* \(30,\), got \(26,\)"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(options, error, message):
    sizes = {"in_features": (1, 4, 3), "out_features": (2, 3, 4)}
    x, kernel = jnp.ones((6, 8)), jnp.ones(26)
    assert partitioned_linear(x, kernel, **sizes).shape == (6, 9)
    with pytest.raises(error, match=message):
        partitioned_linear(x, kernel, **(sizes | options))


def test_operands_that_do_not_fit_are_refused_with_advice():
    layer = layer_of((4, 2, 4), 5)
    for x, advice in (
        (jnp.ones((6, 10, 3)), "for features on another axis pass in_axis=1"),
        (jnp.ones((6, 3, 4)), "without padding: they have no axis of their own"),
        (jnp.ones((6, 11)), r"in_0 \+ in_1 \+ ... = 10 features along axis -1, got \(6, 11\)"),
    ):
        with pytest.raises(ValueError, match=advice):
            layer(x)
    with pytest.raises(ValueError, match=r"`bias`: expected packed shape .* = \(15,\), got \(3, 5\)"):
        partitioned_linear(jnp.ones((6, 10)), layer.kernel, jnp.ones((3, 5)), in_features=(4, 2, 4), out_features=5)
    with pytest.raises(UnsupportedImplementationError, match="got 'padded_matmul'; choose one of these"):
        PartitionedLinear(3, 4, 5, implementation="padded_matmul", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`features`: expected an int where in_features is not given"):
        linen.PartitionedLinear((2, 3)).init(jax.random.key(0), jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="`features`: expected one int, or n = 2 of them, got 3"):
        linen.PartitionedLinear((2, 3, 1), in_features=(2, 3)).init(jax.random.key(0), jnp.ones((2, 5)))
