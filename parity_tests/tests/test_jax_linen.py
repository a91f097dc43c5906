"""The linen twin: inferred sizes, the dtype rules of linen.Dense, its transformations and metadata boxes."""

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jax_impl
from jax_impl.linen import PartitionedLinear

pytestmark = pytest.mark.usefixtures("quick_compilation")

N, IN, OUT = 3, 4, 5
LOW = (jnp.float32, jnp.bfloat16, jnp.float16)
KEY = jax.random.key(0)


def inputs(*rows):
    return jnp.asarray(np.random.default_rng(1).normal(size=(*rows, N, IN)), "float32")


@pytest.mark.parametrize("rows", [(), (0,), (2,), (2, 3)], ids=str)
def test_sizes_are_inferred_and_the_function_is_that_of_the_nnx_layer(rows):
    model, x = PartitionedLinear(OUT, initializer="torch"), inputs(*rows)
    variables = model.init(KEY, x)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"kernel": (N, IN, OUT), "bias": (N, OUT)}}
    y = jax.jit(model.apply)(variables, x)
    twin = jax_impl.PartitionedLinear(N, IN, OUT, rngs=nnx.Rngs(0))
    twin.kernel[...], twin.bias[...] = variables["params"]["kernel"], variables["params"]["bias"]
    assert np.array_equal(y, nnx.jit(lambda twin, x: twin(x))(twin, x))
    bare = PartitionedLinear(OUT, use_bias=False)
    assert jax.tree.map(jnp.shape, bare.init(KEY, x)) == {"params": {"kernel": (N, IN, OUT)}}


@pytest.mark.parametrize("x_dtype", [*LOW, jnp.int32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("param_dtype", LOW, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("dtype", [None, *LOW], ids=lambda dtype: "none" if dtype is None else dtype.__name__)
def test_dtype_rules_are_those_of_linen_dense(dtype, param_dtype, x_dtype):
    options = {"dtype": dtype, "param_dtype": param_dtype}
    x = jnp.ones((2, IN), x_dtype)
    ours = jax.eval_shape(PartitionedLinear(OUT, **options).init_with_output, KEY, x[:, None])
    theirs = jax.eval_shape(nn.Dense(OUT, **options).init_with_output, KEY, x)
    assert ours[0].dtype == theirs[0].dtype
    assert ours[1]["params"]["kernel"].dtype == theirs[1]["params"]["kernel"].dtype


def test_preferred_element_type_is_the_output_dtype():
    model = PartitionedLinear(OUT, dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    assert jax.eval_shape(model.init_with_output, KEY, inputs(2))[0].dtype == jnp.float32


def test_gradients_and_remat():
    x = inputs(6)
    variables = PartitionedLinear(OUT).init(KEY, x)

    def gradient(model):
        return jax.jit(jax.grad(lambda variables: jnp.sum(model.apply(variables, x) ** 2)))(variables)["params"]

    plain, again = gradient(PartitionedLinear(OUT)), gradient(nn.remat(PartitionedLinear)(OUT))
    for name in ("kernel", "bias"):
        assert np.any(plain[name])
        # The same sums of 6 products of a value and a doubled output; recomputing may order them differently.
        assert np.all(np.abs(plain[name] - again[name]) <= 4 * (6 + IN) * 2.0**-24 * 6 * np.abs(plain[name]).max())


def test_vmap_makes_an_ensemble_and_scan_a_stack():
    members, x = 3, inputs(2)
    ensemble = nn.vmap(
        PartitionedLinear, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=members
    )(OUT)
    y, variables = jax.jit(ensemble.init_with_output)(KEY, x)
    assert y.shape == (members, 2, N, OUT)
    assert variables["params"]["kernel"].shape == (members, N, IN, OUT)
    assert not np.array_equal(y[0], y[1])

    depth = 4

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = PartitionedLinear(
                IN, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("partitions", "in", "out"))
            )
            scan = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                metadata_params={nn.PARTITION_NAME: "layers"},
                length=depth,
            )
            return scan(block, x, None)[0]

    y, variables = jax.jit(Stack().init_with_output)(KEY, x)
    assert y.shape == x.shape
    ((kernel, bias),) = [(layer["kernel"], layer["bias"]) for layer in variables["params"].values()]
    assert kernel.names == ("layers", "partitions", "in", "out")
    assert kernel.value.shape == (depth, N, IN, IN)
    want, reach = x, jnp.abs(x)
    for w, b in zip(kernel.value, bias, strict=True):
        want, reach = jax_impl.partitioned_linear(want, w, b), jax_impl.partitioned_linear(reach, jnp.abs(w))
    assert np.all(np.abs(y - want) <= 2 * depth * (IN + 2) * 2.0**-24 * reach)


def test_boxes_describe_the_stacked_arrays():
    names, uniform = ("partitions", "in", "out"), nn.initializers.uniform(1.0)
    model = PartitionedLinear(
        OUT,
        kernel_init=nn.with_partitioning(uniform, names),
        bias_init=nn.with_partitioning(uniform, ("partitions", "out")),
    )
    variables = model.init(KEY, inputs(2))
    spec = nn.get_partition_spec(variables)["params"]
    assert spec["kernel"] == jax.sharding.PartitionSpec(*names)
    assert spec["bias"] == jax.sharding.PartitionSpec("partitions", "out")
    assert variables["params"]["kernel"].value.shape == (N, IN, OUT)
    assert model.apply(variables, inputs(2)).shape == (2, N, OUT)
    assert np.array_equal(model.apply(variables, inputs(2)), model.apply(nn.meta.unbox(variables), inputs(2)))


def test_tabulate():
    table = PartitionedLinear(OUT).tabulate(KEY, inputs(2))
    for text in ("PartitionedLinear", "kernel", f"[{N},{IN},{OUT}]", f"[{N},{OUT}]"):
        assert text in table


def test_stored_parameters_are_read_without_a_trace_of_their_initialisers():
    drawn = []

    def init(key, shape, dtype):
        drawn.append(shape)
        return jnp.ones(shape, dtype)

    layer = PartitionedLinear(5, kernel_init=init, bias_init=init)
    params = layer.init(jax.random.key(0), jnp.ones((2, 3, 4)))
    assert drawn != []
    drawn.clear()
    assert layer.apply(params, jnp.ones((2, 3, 4))).tolist() == [[[5.0] * 5] * 3] * 2
    assert drawn == []


def test_parameters_of_other_sizes_than_the_layer_was_told_are_refused():
    variables = {"params": {"kernel": np.ones((N, IN, OUT), np.float32), "bias": np.ones((N, OUT), np.float32)}}
    for options, wanted in (
        ({"num_partitions": N + 1}, f"n = {N + 1}, out"),
        ({"in_features": IN + 1}, f"in = {IN + 1}"),
    ):
        with pytest.raises(ValueError, match=rf"`params\['kernel'\]`: expected shape .* with {wanted}"):
            PartitionedLinear(OUT, **options).apply(variables, inputs(2))
