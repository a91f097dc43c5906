"""JAX's `matmul` for few rows of a large weight, and "auto", which runs `in_turn`: programs, limits."""

import os
import re
from functools import partial

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl import functional, partitioned_linear
from jax_impl.registry import IMPLEMENTATIONS
from parity_tests.tests.forked import run_python
from parity_tests.tests.test_jax_vector_products import equations

pytestmark = pytest.mark.usefixtures("quick_compilation", "fresh_programs")

MATMUL, SELECTION = "jax_impl.implementations.matmul", "jax_impl.selection"
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def drawn(dtype, *shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def loops(function, *arrays):
    """How many loops a function's program is written with, those in branches for other platforms included."""
    # A function of its own in each call: JAX remembers what it traced.
    program = jax.make_jaxpr(lambda *operands: function(*operands))(*arrays)
    names = [equation.primitive.name for equation in equations(program.jaxpr)]
    return names.count("scan") + names.count("while")


def operands(dtype="float32", rows=(6,), n=3, i=4, o=5):
    return drawn(dtype, (*rows, n, i), (n, i, o), (n, o))


@pytest.fixture
def in_turn(monkeypatch):
    """Small operands count as large partitions, which "auto" takes one after the other."""
    for name, limit in {"_MANY_WEIGHTS": 1, "_LARGE_PARTITION": 1, "_FEWEST_ROWS": 1, "_WEIGHTS_A_FEATURE": 0}.items():
        monkeypatch.setattr(f"{SELECTION}.{name}", limit)
    monkeypatch.setattr(f"{SELECTION}._PROCESSORS", 1)
    if jax.device_count() > 1:
        pytest.skip("with several devices no partition is taken apart from the others")


def of_moving(moving):
    """A function of the operands that are differentiated, 0 for x and 1 for the kernel, and these, in fp64."""
    x, kernel, bias = operands("float64")

    def outputs(name, *arrays):
        given = dict(zip(moving, arrays, strict=True))
        return jnp.tanh(partitioned_linear(given.get(0, x), given.get(1, kernel), bias, implementation=name))

    return outputs, [(x, kernel)[place] for place in moving]


def rules_of_few_rows(monkeypatch, *, on):
    """Let small operands count as large maps, for both gradients of few rows, or none."""
    for name, limit in {"_LARGE_MAP": 1 if on else 2**60, "_MOST_OUTER_PRODUCTS": 4 if on else 0}.items():
        monkeypatch.setattr(f"{MATMUL}.{name}", limit)


@pytest.fixture(params=["x only", "kernel only", "both"])
def few_rows(request, monkeypatch):
    """A function of the arrays that are differentiated, for small operands that count as few rows of large maps."""
    rules_of_few_rows(monkeypatch, on=True)
    with jax.enable_x64(True):
        x, kernel, bias = operands("float64", rows=(2,), i=9)

        def outputs(name, *arrays):
            replaced = {"x only": (*arrays, kernel), "kernel only": (x, *arrays), "both": arrays}[request.param]
            return jnp.tanh(partitioned_linear(*replaced, bias, implementation=name))

        yield outputs, {"x only": (x,), "kernel only": (kernel,), "both": (x, kernel)}[request.param]


def taken(name, outputs, arrays):
    """Everything that is derived from a function: values, both modes, both orders, mapped, with and without a jit."""
    directions = drawn("float64", *(array.shape for array in arrays), seed=1)

    def loss(*arguments):
        return jnp.sum(outputs(name, *arguments) ** 2)

    places = tuple(range(len(arrays)))

    def slope(*arguments):
        return jax.jvp(loss, arguments, tuple(directions))[1]

    stacked = [jnp.stack([array, 2 * array]) for array in arrays]
    return (
        outputs(name, *arrays),
        jax.grad(loss, places)(*arrays),
        jax.jit(jax.grad(slope, places))(*arrays),
        jax.jvp(jax.grad(loss, places), tuple(arrays), tuple(directions))[1],
        jax.vmap(jax.grad(loss, places))(*stacked),
        jax.grad(jax.checkpoint(loss), places)(*arrays),
    )


def assert_derivatives_of_the_loop(name, outputs, arrays):
    found, expected = (jax.tree.leaves(taken(one, outputs, arrays)) for one in (name, "loop"))
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-13)


@pytest.mark.sample(3)
def test_few_rows_of_a_large_weight_have_the_same_derivatives(few_rows, monkeypatch):
    outputs, arrays = few_rows
    programs = []
    for on in (True, False):
        rules_of_few_rows(monkeypatch, on=on)
        programs.append(str(jax.make_jaxpr(lambda *a: outputs("matmul", *a))(*arrays)))
        assert_derivatives_of_the_loop("matmul", outputs, arrays)
    assert ["custom_jvp" in program for program in programs] == [jax.default_backend() == "cpu", False]


@pytest.mark.parametrize("rows", [(), (3,), (2, 3)], ids=["one row", "three rows", "six rows"])
@pytest.mark.parametrize("sizes", [(4, 5), (7, 2), (4, 9)], ids=["4 to 5", "7 to 2", "4 to 9"])
def test_few_rows_of_tiny_maps_have_the_same_derivatives(rows, sizes):
    with jax.enable_x64(True):
        x, kernel, bias = operands("float64", rows=rows, i=sizes[0], o=sizes[1])
        arrays = (x, kernel)

        def outputs(name, *arrays):
            return jnp.tanh(partitioned_linear(*arrays, bias, implementation=name))

        assert_derivatives_of_the_loop("matmul", outputs, arrays)


def spellings(i, o, rows, n=3, dtype="float32", **options):
    """What `matmul` computes y by where somebody differentiates, and the gradients of x and of the kernel."""
    run = partial(partitioned_linear, implementation="matmul", **options)
    x, kernel = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((*rows, n, i), (n, i, o)))
    y = jax.eval_shape(run, x, kernel)
    found = []
    for results in (
        lambda dy, x, kernel: jax.vjp(run, x, kernel)[0],
        lambda dy, x, kernel: jax.vjp(lambda x: run(x, kernel), x)[1](dy),
        lambda dy, x, kernel: jax.vjp(lambda kernel: run(x, kernel), kernel)[1](dy),
    ):
        program = jax.make_jaxpr(results)(y, x, kernel).jaxpr
        needed, _ = dce_jaxpr(program, [True] * len(program.outvars))
        names = {equation.primitive.name for equation in equations(needed)}
        columns = "columns" if "optimization_barrier" in names else "rows"
        found.append(columns if "dot_general" in names else "elements")
    return tuple(found)


on_one_cpu_device = pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.device_count() > 1, reason="only so on one CPU device"
)


@on_one_cpu_device
def test_gradients_of_few_rows_are_spelled_otherwise_only_where_it_was_measured_to_pay(monkeypatch):
    large, plain = ("rows", "columns", "rows"), ("rows",) * 3
    assert spellings(256, 256, (16,)) == large
    assert spellings(32, 64, (2, 16), n=8) == spellings(128, 65, (32,)) == spellings(256, 65, (64,)) == large
    assert spellings(128, 65, (33,)) == spellings(256, 65, (65,)) == spellings(23, 89, (32,)) == plain
    assert spellings(256, 256, (16,), n=1) == spellings(256, 256, (16,), dtype="bfloat16") == plain
    # One row of anything.
    for sizes in ((256, 256), (1, 4), (8, 1), (2048, 2048)):
        for n in (1, 3):
            assert (
                spellings(*sizes, rows=(), n=n) == spellings(*sizes, rows=(1, 1), n=n) == ("rows", "rows", "elements")
            )
    # 2**15 weights, 16 features, less than 2**20 weights in a map unless it is the only one.
    assert spellings(32, 32, (4,), n=32) == spellings(16, 16, (2, 2)) == ("rows", "rows", "elements")
    assert spellings(1024, 1023, (2,)) == ("rows", "columns", "elements")
    assert spellings(1024, 1024, (2,), n=1) == ("rows", "rows", "elements")
    assert spellings(1024, 1024, (2,)) == large
    assert spellings(32, 32, (5,), n=65) == ("rows", "rows", "columns")
    assert spellings(32, 32, (3,), n=31) == spellings(17, 17, (3,)) == plain
    assert spellings(17, 17, (0,), n=1000) == spellings(32, 32, (1,), dtype="bfloat16") == plain
    with jax.enable_x64(True):
        assert spellings(32, 32, (1,), dtype="float64") == ("rows", "rows", "elements")
        assert spellings(32, 32, (1,), preferred_element_type="float64") == plain
    assert spellings(256, 256, (1,), precision="F32_F32_F32") == plain
    assert spellings(256, 256, (2,), precision="highest") == ("rows", "columns", "elements")
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert spellings(32, 32, (1,)) == plain
    assert spellings(256, 256, (16,)) == large


@on_one_cpu_device
@pytest.mark.parametrize("name", ["auto", "matmul"])
def test_the_rows_of_many_examples_are_not_few(name):
    def products(axes, rows, i, o):
        run = jax.vmap(partial(partitioned_linear, implementation=name), axes)
        x, kernel = (jax.ShapeDtypeStruct((2, *shape), "float32") for shape in ((rows, 3, i), (3, i, o)))
        if axes[1] is None:
            kernel = jax.ShapeDtypeStruct(kernel.shape[1:], "float32")
        gradient = jax.grad(lambda x, kernel: (run(x, kernel) ** 2).sum(), (0, 1))
        program = equations(jax.make_jaxpr(gradient)(x, kernel).jaxpr)
        return [equation.primitive.name for equation in program].count("dot_general")

    for sizes in ((5, 5, 5), (2, 16, 16)):
        assert products((0, None), *sizes) == 3
        assert products((0, 0), *sizes) < 3  # models of their own, each with few rows
    assert products((0, None), 1, 16, 16) == 2  # which XLA makes a product of all examples again
    assert products((0, None), 2**14, 4, 4) == 2  # y by elements, as many rows of tiny maps are without examples


@on_one_cpu_device
def test_products_that_are_slow_are_those_of_elements():
    """Fewer than eight rows, terms and columns, at least four terms, and four rows or columns: each has its own."""
    every = ("elements",) * 3
    assert spellings(4, 4, (4,)) == spellings(7, 7, (7,)) == spellings(5, 6, (2, 3)) == every
    assert spellings(4, 4, (2,)) == every  # its kernel's gradient as one of few rows
    assert spellings(3, 4, (4,)) == spellings(3, 4, (5,)) == ("rows", "elements", "elements")
    assert spellings(4, 3, (5,)) == ("elements", "rows", "elements")
    assert spellings(4, 3, (3,)) == ("rows", "rows", "elements")
    assert spellings(3, 3, (7,)) == ("rows", "rows", "columns")
    assert spellings(4, 8, (5,)) == spellings(8, 4, (7,)) == spellings(4, 4, (8,)) == ("rows", "rows", "columns")
    assert spellings(4, 4, (5,), n=1) == spellings(4, 4, (5,), dtype="bfloat16") == ("rows",) * 3
    assert spellings(4, 4, (5,), precision="F32_F32_F32") == ("rows", "rows", "columns")


@pytest.mark.sample(3)
@pytest.mark.parametrize("moving", [(0,), (1,), (0, 1)], ids=["x only", "kernel only", "both"])
def test_small_maps_have_the_same_derivatives(moving, monkeypatch):
    programs = []
    with jax.enable_x64(True):
        outputs, arrays = of_moving(moving)
        # By elements and columns, by one of them, and by neither.
        monkeypatch.setattr(f"{MATMUL}._FEWEST_ENTRIES", 1)
        monkeypatch.setattr(f"{MATMUL}._FAST_FROM", 0)
        for most, tiny in ((64, 8), (64, 0), (0, 8), (0, 0)):
            monkeypatch.setattr(f"{MATMUL}._SMALL", most)
            monkeypatch.setattr(f"{MATMUL}._TINY", tiny)
            programs.append(str(jax.make_jaxpr(lambda *arrays: outputs("matmul", *arrays))(*arrays)))
            assert_derivatives_of_the_loop("matmul", outputs, arrays)
    assert ["custom_jvp" in program for program in programs] == [*[jax.default_backend() == "cpu"] * 3, False]


@on_one_cpu_device
def test_tiny_maps_are_sums_of_elements_beside_their_gradients_only_where_it_was_measured_to_pay(monkeypatch):
    def by_elements(i, o, rows=(2**14,), n=3, **options):
        # Where nobody differentiates, `matmul` is a product.
        shapes = ((*rows, n, i), (n, i, o))
        program = jax.make_jaxpr(partial(partitioned_linear, implementation="matmul"))(*map(jnp.zeros, shapes))
        assert "dot_general" in str(program)
        y, of_x, _ = spellings(i, o, rows, n, **options)
        assert of_x == "rows"
        return {"elements": True, "rows": False}[y]

    sizes = ((2, 2), (4, 4), (5, 5), (2, 8), (8, 2), (7, 8), (8, 7))
    assert all(by_elements(*size, rows=rows) for size in sizes for rows in ((2**14,), (2, 2**13)))
    # Entries of y: 32 * 256 * 4.
    assert by_elements(4, 4, rows=(256,), n=32)
    assert not by_elements(4, 4, rows=(255,), n=32)
    assert not by_elements(8, 3, rows=(256,), n=32)
    assert by_elements(8, 4, rows=(2**10,), n=2**8)
    assert not any(by_elements(*size, rows=(2**10 + 1,), n=2**8) for size in ((4, 4), (8, 4)))
    assert not by_elements(4, 8, rows=(2**9 + 1,), n=2**8)
    assert by_elements(5, 4, rows=(2**12,), n=2**8)
    assert by_elements(4, 4, precision="highest")
    with jax.enable_x64(True):
        assert by_elements(4, 4, dtype="float64")
        assert not by_elements(4, 4, preferred_element_type="float64")
    assert not any(by_elements(*size) for size in ((8, 8), (1, 4), (4, 1), (9, 2), (2, 9)))
    assert by_elements(8, 4, rows=(4,), n=2**11)
    assert by_elements(3, 3, rows=(2,), n=2**13)
    assert not by_elements(4, 4, rows=(1,), n=2**13)
    assert not by_elements(4, 4, rows=(2**16,), n=1)
    assert not by_elements(4, 4, dtype="bfloat16")
    assert not by_elements(4, 4, precision="F32_F32_F32")
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not by_elements(4, 4)


@on_one_cpu_device
def test_the_gradient_of_small_maps_adds_up_columns_only_where_it_was_measured_to_pay():
    def by_columns(i, o, rows=(9,), n=3, **options):
        return {"columns": True, "rows": False}[spellings(i, o, rows, n, **options)[2]]

    assert all(by_columns(*sizes, rows=rows) for sizes in ((2, 8), (8, 2), (5, 4)) for rows in ((8,), (700,), (2, 9)))
    assert by_columns(32, 2, rows=(32,))
    assert by_columns(16, 64, rows=(4, 4))
    assert by_columns(64, 64, rows=(4,))
    with jax.enable_x64(True):
        assert by_columns(4, 4, dtype="float64")
    assert not any(by_columns(*sizes) for sizes in ((1, 4), (4, 1), (65, 8), (8, 65)))
    assert not any(by_columns(17, 17, rows=rows) for rows in ((2,), (3,)))
    assert not by_columns(64, 64, rows=(17,))
    assert not by_columns(9, 9, rows=(33,))
    # Of many entries only where sizes do not fill the vectors of the product.
    assert [by_columns(8, 4, rows=(2**10,), n=n) for n in (2**8, 2**8 + 1)] == [True, False]
    assert by_columns(8, 5, rows=(2**12,), n=2**8)
    assert not by_columns(4, 4, n=1)
    assert not by_columns(4, 4, dtype="bfloat16")


@pytest.mark.sample(3)
def test_auto_has_the_same_derivatives_where_it_is_in_turn(few_rows, in_turn, monkeypatch):
    outputs, arrays = few_rows
    for on in (True, False):
        rules_of_few_rows(monkeypatch, on=on)
        assert_derivatives_of_the_loop("auto", outputs, arrays)


def compiled(function, *arrays):
    """The instructions of a function's optimised program, sorted and without names; none is hidden in a branch."""
    text = jax.jit(function).lower(*arrays).compile().as_text()
    assert " conditional(" not in text
    lines = [re.sub(r", (metadata|stack_frame_id)=\{[^}]*\}|%[\w.-]+", "", line) for line in text.splitlines()]
    return sorted(line for line in lines if " = " in line)


def test_a_branch_would_be_seen_in_a_compiled_program():
    with pytest.raises(AssertionError):
        compiled(lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), jnp.ones(3))


@pytest.mark.sample(2)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on a CPU alone does auto take partitions in turn")
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [("float32", ()), pytest.param("float32", (2, 3), marks=pytest.mark.every)]
    + [pytest.param(dtype, (5,), marks=pytest.mark.every if dtype == "float16" else ()) for dtype in ROUNDOFF],
)
def test_auto_is_in_turn_forward_and_matmul_where_somebody_differentiates(in_turn, dtype, rows):
    """The very programs: whatever holds for the named implementations, in parity and in time, holds for "auto"."""
    with jax.enable_x64(dtype == "float64"):
        x, kernel, bias = operands(dtype, rows=rows)
        gains = dtype in ("float32", "float64")
        for arrays in ((x, kernel, bias), (x, kernel)):
            y, want = partitioned_linear(*arrays), partitioned_linear(*arrays, implementation="loop")
            assert y.dtype == want.dtype
            assert y.shape == want.shape
            assert bool(jnp.all(jnp.abs(y - want) <= 32 * ROUNDOFF[dtype] * (1 + jnp.abs(want))))
            stacked = jax.vmap(partitioned_linear)(*(jnp.stack([array, array]) for array in arrays))
            assert bool(jnp.all(jnp.abs(stacked - want) <= 32 * ROUNDOFF[dtype] * (1 + jnp.abs(want))))
        forward, backward = {}, {}
        for name in ("auto", "in_turn", "matmul"):
            run = partial(partitioned_linear, implementation=name)
            forward[name] = compiled(run, x, kernel, bias)
            backward[name] = compiled(lambda dy, *a, run=run: jax.vjp(run, *a)[1](dy), y, x, kernel, bias)
        for programs, chosen in ((forward, "in_turn" if gains else "matmul"), (backward, "matmul")):
            assert programs["auto"] == programs[chosen]
            assert programs["in_turn"] != programs["matmul"]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_named_implementation_is_itself_whatever_auto_gains(in_turn, name):
    shapes = ((16, 128, 32), (128, 32, 32), (128, 32))
    looped = loops(partial(partitioned_linear, implementation=name), *(jnp.zeros(shape) for shape in shapes))
    assert looped == (name == "in_turn")


def test_calls_without_jit_compile_partitions_in_turn_once(in_turn, caplog):
    x, kernel, bias = operands()
    stacked = jnp.stack([x, x])

    def call():
        for precision in (None, "highest"):
            run = partial(partitioned_linear, precision=precision)
            jax.block_until_ready((run(x, kernel, bias), jax.vmap(run, (0, None, None))(stacked, kernel, bias)))

    with jax.log_compiles():
        call()
        assert "Finished XLA compilation" in caplog.text
        caplog.clear()
        call()
    assert "Finished XLA compilation" not in caplog.text


def test_no_partition_is_taken_apart_where_operands_may_be_divided(in_turn, monkeypatch):
    arrays = operands()
    run = jax.jit(partitioned_linear)
    # Written on this machine for a GPU, the same program holds no loop there.
    written = {p: jax.export.export(run, platforms=[p])(*arrays).mlir_module() for p in ("cpu", "cuda")}
    assert {platform: "stablehlo.while" in text for platform, text in written.items()} == {"cpu": True, "cuda": False}
    want = run(*arrays)
    for kind in (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto):
        mesh = jax.make_mesh((1,), ("n",), axis_types=(kind,))
        x, *others = [jax.device_put(array, NamedSharding(mesh, PartitionSpec())) for array in arrays]
        np.testing.assert_allclose(run(x, *others), want, rtol=1e-5, atol=1e-6)
    specs = (PartitionSpec(None, "n"), PartitionSpec("n"), PartitionSpec("n"))
    for name in ("auto", "in_turn"):
        own = partial(partitioned_linear, implementation=name)
        mapped = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=specs[0])
        np.testing.assert_allclose(mapped(*arrays), want, rtol=1e-5, atol=1e-6)
    assert loops(partitioned_linear, *arrays) == 1
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert loops(partitioned_linear, *arrays) == 0


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_no_partition_is_taken_apart_where_one_operand_lies_on_a_mesh(in_turn, kind):
    mesh = jax.make_mesh((1,), ("n",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    plain = operands()
    placed = [jax.device_put(array, NamedSharding(mesh, PartitionSpec())) for array in plain]
    for x, kernel in ((placed[0], plain[1]), (plain[0], placed[1]), placed[:2]):
        assert loops(partitioned_linear, x, kernel, None) == 0
    assert loops(partitioned_linear, *plain[:2], None) == 1


def test_partitions_are_taken_in_turn_only_where_it_was_measured_to_pay(monkeypatch):
    """The limits themselves: one step beyond any of them the products are batched."""
    if jax.device_count() > 1:
        pytest.skip("with several devices no partition is taken apart from the others")

    def taken_in_turn(rows, n, i, o, dtype="float32"):
        shapes = ((rows, n, i), (n, i, o), (n, o))
        return loops(partitioned_linear, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))

    monkeypatch.setattr(f"{SELECTION}._PROCESSORS", 1)
    # 2**21 weights, a partition of 3 * 2**14, four weights for each feature of x and y.
    assert taken_in_turn(4, 32, 256, 256) == 1
    assert taken_in_turn(4, 43, 192, 256) == 1
    assert taken_in_turn(32, 32, 256, 256) == 1
    limits = {
        "too few rows": (3, 32, 256, 256),
        "a single partition": (4, 1, 2048, 1024),
        "too few weights": (4, 31, 256, 256),
        "too small a partition": (4, 43, 191, 256),
        # Of the features that x alone has, or y alone, there would be few enough.
        "too many rows": (33, 32, 256, 256),
    }
    assert {name: taken_in_turn(*sizes) for name, sizes in limits.items()} == dict.fromkeys(limits, 0)
    assert taken_in_turn(4, 32, 256, 256, "bfloat16") == 0
    monkeypatch.setattr(f"{SELECTION}._PROCESSORS", 2)
    assert taken_in_turn(4, 32, 256, 256) == 0


COUNTED = """
import os
if PINNED:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from jax_impl import selection
print(selection._PROCESSORS)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(selection._PROCESSORS)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system keeps no set of processors for a process")
@pytest.mark.parametrize("one", [True, False])
def test_auto_counts_the_processors_that_the_process_may_use(one):
    """Those of its start: a thread that is pinned later computes with as many threads as before."""
    counted = run_python("-c", COUNTED.replace("PINNED", str(one)))
    assert counted.returncode == 0, counted.stderr
    assert counted.stdout.split() == [str(1 if one else len(os.sched_getaffinity(0)))] * 2


@pytest.mark.parametrize("path", ["in turn", "few rows", "plain"])
@pytest.mark.parametrize(("narrow", "wide"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float64")])
def test_a_wider_result_is_wide_on_every_path(monkeypatch, request, path, narrow, wide):
    if path == "in turn":
        request.getfixturevalue("in_turn")
    if path == "few rows":
        rules_of_few_rows(monkeypatch, on=True)
    with jax.enable_x64(True):
        arrays = operands(narrow, rows=(2,), i=61)
        y, pull = jax.vjp(jax.jit(partial(partitioned_linear, preferred_element_type=wide)), *arrays)
        assert y.dtype == wide
        assert {gradient.dtype for gradient in pull(y)} == {np.dtype(jnp.dtype(narrow))}
        x, kernel, bias = (np.asarray(array, np.float64) for array in arrays)
        reach = np.einsum("bni,nio->bno", abs(x), abs(kernel)) + abs(bias)
        assert np.all(np.abs(y - (np.einsum("bni,nio->bno", x, kernel) + bias)) <= 2 * 63 * ROUNDOFF[wide] * reach)


def test_a_product_with_what_stands_still_is_not_computed(few_rows, in_turn, monkeypatch):
    """One product forward and one for each operand that is differentiated: no tangent of zeros is multiplied."""
    outputs, arrays = few_rows
    monkeypatch.setattr(f"{MATMUL}._MOST_OUTER_PRODUCTS", 0)

    def gradient(*arrays):
        return jax.grad(lambda *a: jnp.sum(outputs("auto", *a)), tuple(range(len(arrays))))(*arrays)

    program = equations(jax.make_jaxpr(gradient)(*arrays).jaxpr)
    assert [equation.primitive.name for equation in program].count("dot_general") == 1 + len(arrays)


def test_a_call_without_jit_is_one_program_that_is_compiled_once(monkeypatch):
    x, kernel, bias = operands(rows=(7,), n=2, i=3, o=5)
    compiled = functional._compiled

    def added(call):
        before = compiled._cache_size()
        results = [call(), call()]
        assert np.array_equal(*results)
        return compiled._cache_size() - before, results[0]

    count, y = added(lambda: partitioned_linear(x, kernel, bias))
    assert count == 1
    assert np.array_equal(y, jax.jit(partitioned_linear)(x, kernel, bias))
    assert added(lambda: partitioned_linear(x, kernel, bias, implementation="matmul"))[0] == 1
    # What is no array of JAX becomes one first.
    with monkeypatch.context() as patch:
        patch.setattr(functional, "_run", None)  # what is not compiled would call it
        assert np.array_equal(partitioned_linear(np.asarray(x), nnx.Param(kernel), np.asarray(bias)), y)
    # Whoever transforms the call, or computes the product, sees its operations; others would be compiled for long.
    assert added(lambda: jax.jit(partitioned_linear)(x, kernel, bias))[0] == 0
    assert added(lambda: jax.grad(lambda x: partitioned_linear(x, kernel, bias).sum())(x))[0] == 0
    assert added(lambda: partitioned_linear(x, kernel, bias, dot_general=jax.lax.dot_general))[0] == 0
    assert added(lambda: partitioned_linear(x, kernel, bias, implementation="loop"))[0] == 0


MEMORY = {
    "few rows": ((16,), 8, 64, 64),
    "many rows": ((512,), 8, 32, 32),
    "tiny": ((4096,), 8, 4, 4),
    "one row": ((1,), 32, 64, 64),
    "three rows": ((3,), 64, 32, 48),
    "two axes of rows": ((8, 32), 8, 32, 32),
}


@on_one_cpu_device
@pytest.mark.parametrize("sizes", MEMORY.values(), ids=MEMORY)
def test_auto_keeps_its_results_and_copies_of_x_and_y_at_most(sizes):
    """XLA rearranges them for its products: forward once, and with all gradients at most twice."""
    x, kernel, bias = operands("float32", *sizes)
    y = partitioned_linear(x, kernel, bias)

    def kept(function, *arrays):
        return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    def gradients(dy, *arrays, name="auto"):
        y, pull = jax.vjp(partial(partitioned_linear, implementation=name), *arrays)
        return y, pull(dy)

    copies = x.nbytes + y.nbytes
    assert kept(partitioned_linear, x, kernel, bias) <= copies + 2**13
    assert kept(gradients, y, x, kernel, bias) <= 2 * copies + 2**13
    # The measure sees what a formulation copies: the dense one holds n weights.
    if len(kernel) * kernel.nbytes > 4 * copies:
        assert kept(partial(gradients, name="masked"), y, x, kernel, bias) > 2 * copies + 2**13
