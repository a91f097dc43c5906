"""JAX's "auto" where it adds up one term for each input feature, as a program of its own: programs, limits."""

from functools import partial

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.export
import jax.numpy as jnp

from jax_impl import partitioned_linear
from parity_tests.tests.test_jax_matmul import SELECTION, compiled, of_moving, operands, taken
from parity_tests.tests.test_jax_vector_products import equations

pytestmark = [
    pytest.mark.usefixtures("quick_compilation", "fresh_programs"),
    pytest.mark.skipif(jax.device_count() > 1, reason="with several devices the product is batched"),
]
on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="auto adds up features on a CPU alone")


def adds_up(i, o, n=3, rows=(6,), dtype="float32", **options):
    """Whether "auto" adds up one term for each feature: its program has a barrier after the sum."""
    arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((*rows, n, i), (n, i, o), (n, o)))
    program = jax.make_jaxpr(partial(partitioned_linear, **options))(*arrays)
    return "optimization_barrier" in [equation.primitive.name for equation in equations(program.jaxpr)]


@pytest.mark.parametrize("processors", [1, 2])
def test_few_features_are_added_up_one_by_one_only_where_it_was_measured_to_pay(monkeypatch, processors):
    monkeypatch.setattr(f"{SELECTION}._PROCESSORS", processors)
    assert all(adds_up(*sizes) for sizes in ((4, 4), (2, 8), (8, 2), (5, 5), (8, 7), (7, 8), (2, 2)))
    assert not any(adds_up(*sizes) for sizes in ((4, 8), (8, 4), (8, 8), (1, 4), (4, 1), (9, 2), (2, 9)))
    # More features out, of a large result: 32 * 128 * 16 entries, in any number of leading axes.
    assert all(adds_up(*sizes, n=32, rows=(128,)) for sizes in ((8, 16), (2, 16), (8, 100)))
    assert adds_up(3, 64, n=8, rows=(32, 4))
    assert not any(adds_up(*sizes, n=32, rows=(128,)) for sizes in ((8, 15), (1, 32), (8, 8), (33, 32), (16, 1)))
    assert not adds_up(8, 16, n=32, rows=(127,))
    assert not adds_up(8, 16, n=32, rows=(128,), dtype="bfloat16")
    with jax.enable_x64(True):
        assert adds_up(4, 4, precision="highest", dtype="float64")
        assert adds_up(8, 16, n=32, rows=(128,), dtype="float64")
    assert not adds_up(4, 4, dtype="bfloat16")
    assert not adds_up(4, 4, dtype="bfloat16", preferred_element_type="float32")
    assert not adds_up(4, 4, n=1)
    for algorithm in ("F32_F32_F32", jax.lax.DotAlgorithmPreset.F32_F32_F32):
        assert not adds_up(4, 4, precision=algorithm)
    assert not adds_up(4, 4, implementation="matmul")
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not adds_up(4, 4)


@pytest.mark.parametrize("processors", [1, 2])
def test_with_several_processors_so_are_up_to_32(monkeypatch, processors):
    """The limits themselves: one step beyond any of them the products are batched."""
    monkeypatch.setattr(f"{SELECTION}._PROCESSORS", processors)
    # 128 rows, 4 output features, 2**17 features of x and y, 16 products for each of these.
    within = [(32, 32, 32, 128), (16, 500, 32, 128), (9, 4, 79, 128), (32, 4, 2, 1821)]
    beyond = [
        (33, 4, 32, 128),
        (32, 3, 64, 128),
        (32, 33, 64, 128),
        (32, 32, 32, 127),
        (9, 4, 78, 128),
        (32, 4, 2, 1820),
    ]
    several = processors > 1
    assert [adds_up(i, o, n=n, rows=(rows,)) for i, o, n, rows in within] == [several] * len(within)
    assert not any(adds_up(i, o, n=n, rows=(rows,)) for i, o, n, rows in beyond)
    with jax.enable_x64(True):
        assert adds_up(32, 32, n=32, rows=(64, 2), dtype="float64") == several
    assert not adds_up(32, 32, n=32, rows=(128,), dtype="bfloat16")


@pytest.mark.parametrize(("i", "o"), [(4, 4), (4, 16), (32, 32), (520, 2)])
@pytest.mark.parametrize("scope", ["r, 32", "128, p", "r, p"])
def test_a_program_may_be_exported_for_any_number_of_rows_and_partitions(scope, i, o):
    """No rule of "auto" or `matmul` compares what is not known yet."""
    rows, n = jax.export.symbolic_shape(scope)
    for take in (
        partitioned_linear,
        lambda *arrays: jax.grad(lambda *a: partitioned_linear(*a).sum(), (0, 1))(*arrays),
    ):
        shapes = ((rows, n, i), (n, i, o), (n, o))
        arrays = operands(rows=(128,), n=32, i=i, o=o)
        written = jax.export.export(jax.jit(take))(*(jax.ShapeDtypeStruct(s, "float32") for s in shapes))
        for found, want in zip(*(jax.tree.leaves(run(*arrays)) for run in (written.call, take)), strict=True):
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)


@on_a_cpu
def test_a_sum_over_the_features_is_for_forward_passes_on_a_cpu():
    arrays = x, kernel, bias = operands()
    for run in (partitioned_linear, jax.vmap(partitioned_linear, (0, None, None))):
        loop = partial(partitioned_linear, implementation="loop")
        np.testing.assert_allclose(run(x, kernel, bias), loop(x, kernel, bias), rtol=1e-5, atol=1e-6)
    # Nothing spreads: neither what a partition holds, nor what one row does.
    y = partitioned_linear(x.at[1, 1, 2].set(jnp.nan), kernel, bias)
    assert np.array_equal(np.argwhere(np.isnan(y).any(-1)), [[1, 1]])
    # A function of its own: JAX remembers what it traced under the limits of another test.
    own = jax.jit(lambda *operands: partitioned_linear(*operands))
    written = {platform: jax.export.export(own, platforms=[platform])(*arrays) for platform in ("cpu", "cuda")}
    batched = {platform: "stablehlo.dot_general" in found.mlir_module() for platform, found in written.items()}
    assert batched == {"cpu": False, "cuda": True}
    apart = {platform: "inlineable" in found.mlir_module() for platform, found in written.items()}
    assert apart == {"cpu": True, "cuda": False}
    run = {name: partial(partitioned_linear, implementation=name) for name in ("auto", "by_feature", "matmul")}
    backward = {name: lambda dy, *a, own=own: jax.vjp(own, *a)[1](dy) for name, own in run.items()}
    y = run["auto"](*arrays)
    programs = {name: compiled(backward[name], y, *arrays) for name in run}
    assert programs["auto"] == programs["matmul"] != programs["by_feature"]
    # Forward, that of `by_feature` and its call.
    forward = {
        name: [line for line in compiled(own, *arrays) if " parameter(" not in line] for name, own in run.items()
    }
    (call,) = [line for line in forward["auto"] if " call(" in line]
    assert 'inlineable="false"' in call
    assert "dot(" not in "".join(forward["auto"])
    assert sorted(arithmetic(forward["auto"])) == sorted(arithmetic(forward["by_feature"]))
    assert arithmetic(forward["auto"]) != arithmetic(forward["matmul"])


def arithmetic(lines):
    return [kind for line in lines for kind in (" add(", " multiply(", " dot(") if kind in line]


@on_a_cpu
@pytest.mark.parametrize("scanned", [False, True])
def test_nothing_that_follows_is_made_one_program_with_the_sum(scanned):
    """What reads y twice, or adds it up, would compute it anew for each; `by_feature` shows that it would."""
    arrays = operands(o=4)

    def followed(x, kernel, bias, name):
        def step(h, _):
            y = partitioned_linear(h, kernel, bias, implementation=name)
            return (y - y.mean(-1, keepdims=True)) / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1), None

        return (jax.lax.scan(step, x, length=3) if scanned else step(x, None))[0]

    found = {}
    for name in ("auto", "by_feature", "loop"):
        run = jax.jit(partial(followed, name=name))
        text = run.lower(*arrays).compile().as_text()
        found[name] = run(*arrays), text.count(" call(")
    assert found["by_feature"][1] == 0
    assert found["auto"][1] == 1
    np.testing.assert_allclose(found["auto"][0], found["loop"][0], rtol=1e-5, atol=1e-6)


@pytest.mark.sample(3)
@pytest.mark.parametrize("moving", [(0,), (1,), (0, 1)], ids=["x only", "kernel only", "both"])
def test_auto_has_the_same_derivatives_where_it_adds_up_features(moving):
    with jax.enable_x64(True):
        outputs, arrays = of_moving(moving)
        assert "optimization_barrier" in str(jax.make_jaxpr(lambda *a: outputs("auto", *a))(*arrays))
        for left, right in zip(*(jax.tree.leaves(taken(n, outputs, arrays)) for n in ("auto", "loop")), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-13)
