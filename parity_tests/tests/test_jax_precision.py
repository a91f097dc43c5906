"""The precision that is asked for reaches every product: forward, in all derivatives, on every path and in every layer.

The programs are read rather than run: a CPU computes fp32 products in fp32 whatever is asked for.
"""

from functools import partial

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import DotAlgorithmPreset, Precision

from jax_impl import PartitionedLinear, linen, partitioned_linear
from jax_impl.registry import IMPLEMENTATIONS, get_implementation
from parity_tests.tests.test_jax_vector_products import PRODUCTS, equations

MATMUL, SELECTION = "jax_impl.implementations.matmul", "jax_impl.selection"
N, IN, OUT = 3, 4, 5
# What is asked for, and what a product then carries. Convolutions take no algorithm.
ASKED = {
    "none": (None, {None}),
    "name": ("highest", {(Precision.HIGHEST, Precision.HIGHEST)}),
    "value": (Precision.HIGH, {(Precision.HIGH, Precision.HIGH)}),
    "algorithm": (DotAlgorithmPreset.F32_F32_F32, {DotAlgorithmPreset.F32_F32_F32}),
}


def shapes(rows, dtype="float32"):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, N, IN), (N, IN, OUT), (N, OUT))]


def nnx_layer(name, precision):
    def call(x, kernel, bias):
        settings = {"implementation": name, "precision": precision, "param_dtype": kernel.dtype}
        layer = PartitionedLinear(N, IN, OUT, **settings, rngs=nnx.Rngs(0))
        layer.kernel[...], layer.bias[...] = kernel, bias
        return layer(x)

    return call


def linen_layer(name, precision):
    layer = linen.PartitionedLinear(OUT, implementation=name, precision=precision)
    return lambda x, kernel, bias: layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)


def function(name, precision):
    return partial(partitioned_linear, implementation=name, precision=precision)


def orders(call, make, twice):
    """The call, its derivatives in both modes and its second derivatives; of a layer, which hands it on, fewer."""

    def loss(*operands):
        return jnp.sum(call(*operands) ** 2)

    def slope(*operands):
        return jax.jvp(loss, operands, operands)[1]

    gradient = jax.grad(loss, (0, 1, 2))
    yield "y", call
    yield "vjp", gradient
    if make is not function:
        return
    yield "jvp", slope
    yield "forward over reverse", lambda *operands: jax.jvp(gradient, operands, operands)[1]
    if twice:
        yield "reverse over reverse", jax.grad(lambda *o: sum(map(jnp.sum, gradient(*o))), (0, 1, 2))


def precisions(call, *operands):
    """The precisions that the products of a program carry."""
    program = equations(jax.make_jaxpr(call)(*operands).jaxpr)
    return [equation.params["precision"] for equation in program if equation.primitive.name in PRODUCTS]


# 16-bit operands are laid out in another way.
@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("make", "dtype"),
    [(function, "float32"), (function, "bfloat16"), (nnx_layer, "float32"), (linen_layer, "float32")],
    ids=["function", "function-16-bit", "nnx", "linen"],
)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_product_carries_the_precision_that_is_asked_for(name, make, dtype):
    twice = get_implementation(name).double_backward
    for kind, (precision, carried) in ASKED.items():
        if kind == "algorithm" and not get_implementation(name).dot_algorithms:
            continue
        for order, call in orders(make(name, precision), make, twice):
            found = precisions(call, *shapes(8, dtype))  # fewer rows of so tiny maps are added up as elements
            if name == "by_feature":  # no product at all, which could be less precise than was asked for
                assert found == []
                continue
            assert set(found) == carried, (kind, order)
            assert set(precisions(call, *shapes(2, dtype))) <= carried, (kind, order)
            assert len(found) >= (1 if order == "y" else 3)


@pytest.mark.parametrize("path", ["in turn", "few rows"])
@pytest.mark.parametrize("make", [function, nnx_layer, linen_layer], ids=["function", "nnx", "linen"])
def test_so_does_each_on_the_paths_of_auto(monkeypatch, make, path):
    limits = {f"{MATMUL}._LARGE_MAP": 1, f"{SELECTION}._MOST_FEATURES": 0}
    if path == "in turn":
        if jax.device_count() > 1:
            pytest.skip("with several devices no partition is taken apart from the others")
        limits |= {f"{SELECTION}.{name}": 1 for name in ("_MANY_WEIGHTS", "_LARGE_PARTITION", "_FEWEST_ROWS")}
        limits[f"{SELECTION}._WEIGHTS_A_FEATURE"] = 0
        monkeypatch.setattr(f"{SELECTION}._PROCESSORS", 1)
    for limit, value in limits.items():
        monkeypatch.setattr(limit, value)
    for kind, (precision, carried) in ASKED.items():
        for order, call in orders(make("auto", precision), make, twice=True):
            program = str(jax.make_jaxpr(call)(*shapes(8)))
            if order == "y":
                assert ("_forward_on_a_cpu" in program, "scan" in program) == ((path == "in turn",) * 2)
                assert "custom_jvp_call" in program
            assert set(precisions(call, *shapes(8))) == carried, (kind, order)
            assert set(precisions(call, *shapes(1))) <= carried, (kind, order)


def test_a_product_without_the_precision_would_be_seen():
    """The walk finds products in loops, branches and functions with derivatives of their own."""

    def hidden(x, y):
        branch = jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: jnp.matmul(x, y, precision="highest"))
        looped = jax.lax.fori_loop(0, 2, lambda _, z: jnp.matmul(z, y, precision="high"), x)
        return jax.jit(ruled)(branch, looped)

    @jax.custom_jvp
    def ruled(x, y):
        return jnp.matmul(x, y, precision="default")

    ruled.defjvps(lambda tangent, *_: tangent, None)

    found = precisions(hidden, *[np.ones((2, 2), np.float32)] * 2)
    named = [Precision.HIGHEST, Precision.HIGH, Precision.DEFAULT]
    assert set(found) == {None, *((value, value) for value in named)}
