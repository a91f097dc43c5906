"""16-bit products with a vector in JAX are asked for in fp32: XLA on a GPU rounds their terms to the result's dtype.

The programs are read rather than run: no CPU makes the mistake.
"""

import math

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.export
import jax.numpy as jnp

from jax_impl import partitioned_linear
from jax_impl.registry import IMPLEMENTATIONS

# A sum of elements has no product: the tests of each implementation show that it adds its terms in fp32.
NAMES = tuple(name for name in IMPLEMENTATIONS if name != "by_feature")
VECTORS = {"one row": (1, 3, 4, 5), "one input": (6, 3, 1, 5), "one output": (6, 3, 4, 1), "alone": (1, 1, 4, 5)}
PRODUCTS = ("dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated")


@pytest.fixture(params=["bfloat16", "float16"])
def dtype(request):
    return request.param


def equations(jaxpr):
    """All equations of a program, those of the programs inside it included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from equations(inner)


def products_of_a_step(name, dtype, rows, n, i, o):
    """The products of y, dx, dW and db."""

    def step(x, kernel, bias):
        y, pullback = jax.vjp(lambda *a: partitioned_linear(*a, implementation=name), x, kernel, bias)
        return y, *pullback(jnp.ones_like(y))

    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, n, i), (n, i, o), (n, o))]
    traced = jax.make_jaxpr(step)(*operands)
    assert {value.dtype for value in traced.out_avals} == {np.dtype(dtype)}
    return [equation for equation in equations(traced.jaxpr) if equation.primitive.name in PRODUCTS]


def sums_a_vector(equation):
    """Whether a matrix product adds several terms and one of its two operands has one row or column."""
    (contracted, batches) = equation.params["dimension_numbers"]
    free = [
        math.prod(size for axis, size in enumerate(operand.aval.shape) if axis not in (*summed, *batch))
        for operand, summed, batch in zip(equation.invars, contracted, batches, strict=True)
    ]
    terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted[0])
    return terms > 1 and 1 in free


@pytest.mark.parametrize("sizes", VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("name", NAMES)
def test_products_with_a_vector_are_asked_for_in_fp32(name, dtype, sizes):
    products = products_of_a_step(name, dtype, *sizes)
    assert len(products) >= 3
    plain = [product for product in products if product.primitive.name == "dot_general"]
    assert all(product.outvars[0].aval.dtype == jnp.float32 for product in plain if sums_a_vector(product))
    # The masked weight has the inputs and outputs of all partitions, so that one of each is a vector in no product.
    if name not in ("grouped_matmul", "grouped_conv") and (name != "masked" or sizes[0] == 1):
        assert any(map(sums_a_vector, plain))


@pytest.mark.parametrize("name", ["grouped_matmul", "grouped_conv"])
def test_so_are_those_that_xla_makes_plain_ones_of(name, dtype):
    products = products_of_a_step(name, dtype, *VECTORS["alone"])
    assert {product.outvars[0].aval.dtype for product in products} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", NAMES)
def test_no_other_product_costs_more_memory_than_its_result(name, dtype):
    products = products_of_a_step(name, dtype, 6, 3, 4, 5)
    assert len(products) >= 3
    assert {product.outvars[0].aval.dtype for product in products} == {np.dtype(dtype)}


def test_products_too_large_for_the_mistake_keep_their_dtype(dtype, monkeypatch):
    def dtypes(name):
        return {product.outvars[0].aval.dtype for product in products_of_a_step(name, dtype, 1, 3, 4, 5)}

    names = ("matmul", "einsum", "vmap", "loop", "masked", "grouped_matmul")
    assert [name for name in names if np.dtype(np.float32) not in dtypes(name)] == []
    monkeypatch.setattr("jax_impl.implementations._VECTOR_PRODUCT_ENTRIES", 3)
    # Once for all: every later test compiles its operations anew.
    jax.clear_caches()
    assert {name: found for name in names if (found := dtypes(name)) != {np.dtype(dtype)}} == {}


@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_wider_operands_keep_their_dtype(wide):
    with jax.enable_x64(wide == "float64"):
        products = products_of_a_step("matmul", wide, 1, 3, 4, 5)
    assert {product.outvars[0].aval.dtype for product in products} == {np.dtype(wide)}


def test_a_batch_that_is_not_known_yet_counts_as_many_rows(dtype):
    (batch,) = jax.export.symbolic_shape("batch")
    products = products_of_a_step("matmul", dtype, batch, 3, 4, 5)
    assert {product.outvars[0].aval.dtype for product in products} == {np.dtype(dtype)}
