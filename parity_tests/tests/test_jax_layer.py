"""The nnx layer: Flax's dtype rules, its transformations, its metadata, training with optax."""

from itertools import product

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_impl import PartitionedLinear, UnsupportedImplementationError, partitioned_linear
from jax_impl import linen as linen_impl
from jax_impl.validation import are_promoted

pytestmark = pytest.mark.usefixtures("quick_compilation")

N, IN, OUT = 3, 4, 5
LOW = (jnp.float32, jnp.bfloat16, jnp.float16)


def layer(**options):
    return PartitionedLinear(N, IN, OUT, **({"rngs": nnx.Rngs(0), "init": "torch"} | options))


def inputs(*rows, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=(*rows, N, IN)), dtype)


def plain(model, x):
    return partitioned_linear(x, model.kernel[...], model.bias[...])


def test_parameters_and_repr():
    model = layer()
    assert isinstance(model.kernel, nnx.Param)
    assert isinstance(model.bias, nnx.Param)
    assert model.kernel.shape == (N, IN, OUT)
    assert model.bias.shape == (N, OUT)
    assert "num_partitions=3" in repr(model)
    bare = layer(use_bias=False)
    assert bare.bias is None
    x = inputs(2)
    assert np.array_equal(bare(x), partitioned_linear(x, bare.kernel[...]))
    assert list(nnx.state(bare, nnx.Param)) == ["kernel"]


@pytest.mark.parametrize("x_dtype", [*LOW, jnp.int32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("param_dtype", LOW, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("dtype", [None, *LOW], ids=lambda dtype: "none" if dtype is None else dtype.__name__)
def test_dtype_rules_are_those_of_nnx_linear(dtype, param_dtype, x_dtype):
    options = {"dtype": dtype, "param_dtype": param_dtype}
    x = jnp.ones((2, IN), x_dtype)
    # Abstractly: only dtypes are asked for, and 48 compilations would take a while.
    ours = nnx.eval_shape(lambda: PartitionedLinear(1, IN, OUT, **options, rngs=nnx.Rngs(0))(x[:, None]))
    theirs = nnx.eval_shape(lambda: nnx.Linear(IN, OUT, **options, rngs=nnx.Rngs(0))(x))
    assert ours.dtype == theirs.dtype


def test_preferred_element_type_is_the_output_dtype():
    model = layer(dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    assert model(inputs(2)).dtype == jnp.float32


def test_a_custom_promotion_is_used():
    def to_bfloat16(arrays, dtype):
        return tuple(array.astype(jnp.bfloat16) for array in arrays)

    assert layer(promote_dtype=to_bfloat16)(inputs(2)).dtype == jnp.bfloat16


def test_numpy_inputs_are_accepted():
    model, x = layer(), inputs(2)
    assert np.array_equal(model(np.asarray(x)), model(x))


def test_jit_grad_and_remat():
    model, x = layer(), inputs(6)

    def loss(model, x):
        return jnp.sum(model(x) ** 2)

    value, gradients = nnx.jit(nnx.value_and_grad(loss))(model, x)
    rematerialised = nnx.jit(nnx.grad(lambda model, x: jnp.sum(nnx.remat(lambda m, x: m(x))(model, x) ** 2)))(model, x)
    want = jax.jit(jax.grad(lambda w, b: jnp.sum(partitioned_linear(x, w, b) ** 2), argnums=(0, 1)))(
        model.kernel[...], model.bias[...]
    )
    assert value > 0
    for got in (gradients, rematerialised):
        # The very same sums: 2 y is exact, and both gradients are one product each; only the order may differ.
        for name, exact, count in (("kernel", want[0], 6), ("bias", want[1], 6)):
            reach = np.abs(np.asarray(got[name][...])).max() * count + np.abs(exact).max()
            assert np.all(np.abs(got[name][...] - exact) <= 4 * (count + IN + 2) * 2.0**-24 * reach)
            assert np.any(exact != 0)


def test_split_merge_and_eval_shape():
    model, x = layer(), inputs(2)
    graph, state = nnx.split(model)
    assert np.array_equal(nnx.merge(graph, state)(x), model(x))
    abstract = nnx.eval_shape(lambda: layer())
    assert abstract.kernel.shape == (N, IN, OUT)
    graph, _ = nnx.split(abstract)
    assert np.array_equal(nnx.merge(graph, state)(x), model(x))


def test_vmap_makes_an_ensemble_and_scan_a_stack():
    members, depth = 3, 4

    @nnx.split_rngs(splits=members)
    @nnx.vmap(in_axes=0, out_axes=0)
    def ensemble(rngs):
        return layer(rngs=rngs)

    model, x = ensemble(nnx.Rngs(0)), inputs(2)
    assert model.kernel.shape == (members, N, IN, OUT)
    y = nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(model, x)
    assert y.shape == (members, 2, N, OUT)
    assert not np.array_equal(y[0], y[1])

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return PartitionedLinear(N, IN, IN, rngs=rngs)

    deep = stack(nnx.Rngs(0))
    result = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, deep)
    want = x
    for kernel, bias in zip(deep.kernel[...], deep.bias[...], strict=True):
        want = jax.jit(partitioned_linear)(want, kernel, bias)
    reach = x
    for kernel in deep.kernel[...]:
        reach = partitioned_linear(jnp.abs(reach), jnp.abs(kernel))
    assert np.all(np.abs(result - want) <= 2 * depth * (IN + 2) * 2.0**-24 * reach)


def test_tabulate():
    table = nnx.tabulate(layer(), inputs(2))
    for text in ("PartitionedLinear", "kernel", "bias", f"[{N},{IN},{OUT}]", f"[{N},{OUT}]"):
        assert text in table
    assert str(N * IN * OUT + N * OUT) in table


def test_forward_mode_and_hessian():
    model, x = layer(), inputs()
    graph, state = nnx.split(model)

    @jax.jit
    def derivatives(state, x):
        def loss(state):
            return jnp.sum(nnx.merge(graph, state)(x) ** 2)

        return jax.jvp(loss, (state,), (state,))[1], jax.hessian(lambda x: jnp.sum(nnx.merge(graph, state)(x) ** 2))(x)

    directional, hessian = derivatives(state, x)
    # y is linear in (kernel, bias): along them the derivative of |y|^2 is 2 |y|^2, and it is positive.
    y = np.asarray(model(x), np.float64)
    reach = 2 * np.sum((np.einsum("ni,nio->no", np.abs(x), np.abs(model.kernel[...])) + np.abs(model.bias[...])) ** 2)
    assert abs(float(directional) - 2 * np.sum(y**2)) <= 4 * (IN + N * OUT + 4) * 2.0**-24 * reach
    assert hessian.shape == (N, IN, N, IN)
    off_block = [np.asarray(hessian)[n, :, m] for n in range(N) for m in range(N) if n != m]
    assert not np.any(off_block)


def test_training_with_optax_lowers_the_loss():
    model, x = layer(), inputs(32)
    target = plain(layer(rngs=nnx.Rngs(7)), x)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - target) ** 2))(model)
        optimizer.update(model, gradients)
        return value

    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    losses = [float(step(model, optimizer)) for _ in range(50)]
    after = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert losses[-1] < losses[0] / 2
    assert all(np.any(old != new) for old, new in zip(before, after, strict=True))


@pytest.fixture
def mesh():
    shape, names = (1, 1, 1), ("partitions", "in", "out")
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def test_partitioning_metadata_describes_the_stacked_arrays(mesh):
    names = ("partitions", "in", "out")
    spec, bias_spec = jax.sharding.PartitionSpec(*names), jax.sharding.PartitionSpec("partitions", "out")
    uniform = nnx.initializers.uniform(1.0)
    by_initializer = {
        "kernel_init": nnx.with_partitioning(uniform, names),
        "bias_init": nnx.with_partitioning(uniform, ("partitions", "out")),
    }
    by_metadata = {
        "kernel_metadata": {"out_sharding": names},
        "bias_metadata": {"out_sharding": ("partitions", "out")},
    }
    with jax.set_mesh(mesh):
        for options in (by_initializer, by_metadata):
            model = layer(**options)
            found = nnx.get_partition_spec(nnx.state(model, nnx.Param))
            assert found["kernel"].get_value() == spec
            assert found["bias"].get_value() == bias_spec
            assert model.kernel[...].sharding.spec == spec
            assert model(inputs(2)).shape == (2, N, OUT)


def test_any_metadata_reaches_the_parameters():
    model = layer(
        kernel_init=nnx.with_metadata(nnx.initializers.lecun_normal(), role="matrix"), bias_metadata={"role": "vector"}
    )
    assert model.kernel.role == "matrix"
    assert model.bias.role == "vector"
    assert len({values.tobytes() for values in np.asarray(model.kernel[...])}) == N


@pytest.mark.parametrize(
    "options", [{}, {"partition_axis": None}, {"partition_axis": -1}, {"implementation": "matmul"}]
)
def test_the_product_is_computed_by_a_given_dot_general(options):
    calls = []

    def halves(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
        calls.append((dimension_numbers, precision))
        return jax.lax.dot_general(
            lhs, rhs / 2, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type
        )

    shape = {None: (5, 4), -1: (5, 12)}.get(options.get("partition_axis", 0), (5, 3, 4))
    x = jax.random.normal(jax.random.key(1), shape)
    own = PartitionedLinear(3, 4, 2, dot_general=halves, precision="highest", **options, rngs=nnx.Rngs(0))
    # The same product: "auto" may add its terms in another order.
    batched = options | {"implementation": "matmul"}
    plain = PartitionedLinear(3, 4, 2, precision="highest", **batched, rngs=nnx.Rngs(0))
    plain.kernel[...] = plain.kernel[...] / 2
    np.testing.assert_allclose(own(x), plain(x), rtol=1e-6)
    assert [precision for _, precision in calls] == ["highest"]
    linen_layer = linen_impl.PartitionedLinear(2, dot_general=halves, num_partitions=3, precision="highest", **options)
    params = {"kernel": own.kernel[...], "bias": own.bias[...]}
    np.testing.assert_allclose(linen_layer.apply({"params": params}, x), own(x), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dot_general": 3}, TypeError, "`dot_general`: expected a function"),
        ({"dot_general": jax.lax.dot_general, "implementation": "einsum"}, UnsupportedImplementationError, "'einsum'"),
        ({"dot_general": jax.lax.dot_general, "in_features": (1, 2, 3)}, UnsupportedImplementationError, "sizes"),
    ],
)
def test_a_dot_general_that_cannot_be_used_is_refused(options, error, message):
    sizes = {"num_partitions": 3, "in_features": 4, "out_features": 2}
    with pytest.raises(error, match=message):
        PartitionedLinear(**sizes | options, rngs=nnx.Rngs(0))


def test_operands_are_left_alone_only_where_flax_would_return_them():
    """`promote_dtype` takes longer than a small product, so it is not called for what it would not change."""
    arrays = [
        jnp.full((2, 3, 4)[:axes], 0.5, dtype)
        for axes, dtype in ((3, "float32"), (2, "float32"), (3, "bfloat16"), (2, "bfloat16"), (3, "int32"))
    ]
    arrays += [jnp.full((3,), 0.5), np.ones((3,), np.float32), None]  # a weak type, one of NumPy's, no bias
    left_alone = 0
    for dtype, *operands in product((None, "float32", jnp.bfloat16, "float16"), arrays[:-1], arrays[:-1], arrays):
        if not are_promoted(dtype, *operands):
            continue
        left_alone += 1
        for operand, flax in zip(operands, nnx.nn.dtypes.promote_dtype(tuple(operands), dtype=dtype), strict=True):
            assert operand is None or (operand.dtype == flax.dtype and not flax.weak_type and operand is flax)
    # Two arrays of each of two dtypes, in the places of x and a kernel, and those or none in that of a bias; for each
    # dtype without a wish and with that for it.
    assert left_alone == 2 * 2 * (2 * 2 * 3)
    with jax.enable_x64(True):
        wide = jnp.ones((2, 3, 4), "float64")
    assert not are_promoted(None, wide, wide, None)
