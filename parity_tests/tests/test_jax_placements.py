"""Operands on several devices, however they are divided: every JAX implementation is right, in all derivatives.

XLA divides a program by itself and has been wrong about it without an error, so values are compared with a float64
oracle wherever the operands may lie. One process with eight virtual devices computes all cells.
"""

import json
import math
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from itertools import cycle, islice, product
from pathlib import Path

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_impl import partitioned_linear
from jax_impl.registry import IMPLEMENTATIONS

ROOT = Path(__file__).resolve().parents[2]
SIZE = 8  # of every axis, so that eight devices divide any of them
AXES = {"x": "bni", "kernel": "nio", "bias": "no"}
MESHES = ((2,), (4,), (8,), (2, 2), (2, 4), (4, 2))
KINDS = ("Auto", "Explicit")
# Where kernel, input, rows or features are divided, and two at once: the placements that people choose on purpose.
CHOSEN = ({"x": "n", "kernel": "n", "bias": "n"}, {"x": "b"}, {"kernel": "n"}, {"kernel": "o", "bias": "o"}, {"x": "n"})
CHOSEN_ON_TWO_AXES = (
    {"x": "bn", "kernel": "-n", "bias": "-n"},
    {"x": "b-", "kernel": "-o"},
    {"x": "ni", "kernel": "ni"},
)


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in shapes]


SHAPES = [(SIZE,) * len(axes) for axes in AXES.values()]
OPERANDS, DIRECTIONS = drawn(*SHAPES, *SHAPES)[:3], drawn(*SHAPES, *SHAPES)[3:]
(COTANGENT,) = drawn((SIZE,) * 3)


def oracle(operands, directions, cotangent):
    """What every way computes, in float64; of absolute values, the sums of the magnitudes of all terms."""
    (x, kernel, bias), (dx, dkernel, dbias) = operands, directions
    y = np.einsum("bni,nio->bno", x, kernel) + bias
    dy = np.einsum("bni,nio->bno", dx, kernel) + np.einsum("bni,nio->bno", x, dkernel) + dbias

    def pulled(x, kernel, y):
        return [np.einsum("bno,nio->bni", y, kernel), np.einsum("bno,bni->nio", y, x), y.sum(0)]

    # The second derivative of |y|^2 / 2, contracted with the directions.
    curvature = [left + right for left, right in zip(pulled(x, kernel, dy), pulled(dx, dkernel, y), strict=True)]
    curvature[2] = dy.sum(0)
    return {"y": [y], "first": [y, dy, *pulled(x, kernel, cotangent)], "second": curvature}


def first(call, operands, directions, cotangent):
    """y, its tangent, and the gradients of the operands."""
    y, pull = jax.vjp(call, *operands)
    return [y, jax.jvp(call, tuple(operands), tuple(directions))[1], *pull(cotangent)]


def curvature(call, operands, directions, cotangent, *, reverse=False):
    """The second derivative of |y|^2 / 2, contracted with the directions."""
    gradient = jax.grad(lambda *arrays: jnp.sum(call(*arrays) ** 2) / 2, (0, 1, 2))
    if not reverse:
        return list(jax.jvp(gradient, tuple(operands), tuple(directions))[1])

    def contracted(*arrays):
        return sum(jnp.sum(a * d) for a, d in zip(gradient(*arrays), directions, strict=True))

    return list(jax.grad(contracted, (0, 1, 2))(*operands))


def twice_reversed(*arguments):
    return curvature(*arguments, reverse=True)


def mapped(call, operands, mesh):
    """Every leading row by itself, as `jax.vmap` maps it."""
    return [jax.jit(jax.vmap(call, (0, None, None)))(*operands)]


def scanned(call, operands, mesh):
    x, kernel, bias = operands
    return [jax.jit(lambda *a: jax.lax.scan(lambda c, _: (call(c, *a[1:]), None), a[0], length=1)[0])(x, kernel, bias)]


def shard_mapped(call, operands, mesh):
    """The partitions divided by hand over the mesh's last axis; where there is another one, it remains XLA's."""
    last = mesh.axis_names[-1]
    specs = PartitionSpec(None, last), PartitionSpec(last), PartitionSpec(last)
    by_hand = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=specs[0], axis_names={last})
    return [jax.jit(by_hand)(*operands)]


def constrained(call, operands, mesh):
    """The result, and the input within the program, are asked for in a division of their own."""
    wanted = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))
    move = jax.reshard if mesh.explicit_axes else jax.lax.with_sharding_constraint
    return [jax.jit(lambda x, *others: call(move(x, wanted), *others), out_shardings=wanted)(*operands)]


def exported(call, operands, mesh):
    return [jax.jit(jax.export.export(jax.jit(call))(*operands).call)(*operands)]


WAYS = {
    "eager": ("y", lambda call, operands, mesh: [call(*operands)]),
    "disable_jit": ("y", lambda call, operands, mesh: [call(*operands)]),
    "jit": ("y", lambda call, operands, mesh: [jax.jit(call)(*operands)]),
    "vmap": ("y", mapped),
    "scan": ("y", scanned),
    "shard_map": ("y", shard_mapped),
    "out_shardings": ("y", constrained),
    "export": ("y", exported),
    "in_shardings": ("first", first),
    "uncommitted": ("first", first),
    "mesh in context": ("first", first),
    "first": ("first", first),
    "eager derivatives": ("first", first),
    "forward over reverse": ("second", curvature),
    "reverse over reverse": ("second", twice_reversed),
}
WANTED = oracle(OPERANDS, DIRECTIONS, COTANGENT)
REACH = oracle(*([np.abs(array) for array in arrays] for arrays in (OPERANDS, DIRECTIONS)), np.abs(COTANGENT))


def excess(got, kept):
    """The largest error, in units of what correct code can be off by in any order of its sums."""
    unit = 2 * (4 * SIZE + 8) * 2.0**-53
    compared = zip(got, WANTED[kept], REACH[kept], strict=True)
    return max(float((np.abs(np.asarray(value) - want) / (unit * reach)).max()) for value, want, reach in compared)


def possible(name, way):
    """Whether the table lets a cell be."""
    if way == "reverse over reverse":
        return IMPLEMENTATIONS[name].double_backward
    return way != "vmap" or IMPLEMENTATIONS[name].maps


def divisions(shape):
    """Every way to divide each operand over a mesh: for every mesh axis an array axis, or "-"."""
    choices = [["".join(pick) for pick in product("-" + axes, repeat=len(shape))] for axes in AXES.values()]
    return [dict(zip(AXES, picks, strict=True)) for picks in product(*choices)]


def cells(thorough):
    """Yield cells, drawn with a seed; the quick draw has every way of `grouped_conv`, and some of all others."""
    rng = random.Random(0)
    turns = cycle(WAYS)
    for name, kind in product(IMPLEMENTATIONS, KINDS):
        every = thorough or name == "grouped_conv"
        some = islice((way for way in turns if possible(name, way)), 3 if thorough else 1)
        for way, _ in product(WAYS if every else some, range(6 if thorough else 1)):
            shape = rng.choice(MESHES)
            chosen = CHOSEN if len(shape) == 1 else CHOSEN_ON_TWO_AXES
            division = rng.choice([*chosen, rng.choice(divisions(shape))])
            # Over explicit axes a division is part of a type: a scan must keep it, the specs of shard_map must repeat
            # it, and vmap refuses to map over an axis that divides another operand too.
            if kind == "Explicit" and way in ("scan", "shard_map", "vmap"):
                division = rng.choice(chosen) if way == "vmap" else chosen[0]
            if possible(name, way):
                yield name, kind, shape, division, way


def placed(array, axes, division, mesh):
    spec = []
    for axis in axes:
        names = [name for name, divided in zip(mesh.axis_names, division, strict=False) if divided == axis]
        spec.append(tuple(names) or None)
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def run(name, kind, shape, division, way):
    """Compute a cell: the largest error in units of its bound."""
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, ("p", "q")[: len(shape)], axis_types=(getattr(AxisType, kind),) * len(shape))

    def call(*arrays):
        return partitioned_linear(*arrays, implementation=name)

    def place(arrays):
        return [
            placed(a, axes, division.get(key, ""), mesh) for a, (key, axes) in zip(arrays, AXES.items(), strict=True)
        ]

    operands, directions = place(OPERANDS), place(DIRECTIONS)
    kept, compute = WAYS[way]
    cotangent, shardings = COTANGENT, None
    if way == "in_shardings":
        shardings = [[array.sharding for array in arrays] for arrays in (operands, directions)]
        operands, directions, shardings = OPERANDS, DIRECTIONS, (*shardings, None)
    if way == "uncommitted":
        operands[1:], directions[1:] = map(jnp.asarray, OPERANDS[1:]), map(jnp.asarray, DIRECTIONS[1:])
    if kept == "first" and kind == "Explicit" and way != "in_shardings":  # of the type of y
        cotangent = jax.device_put(COTANGENT, NamedSharding(mesh, jax.eval_shape(call, *operands).sharding.spec))
    with jax.set_mesh(mesh) if way == "mesh in context" else nullcontext():
        if kept == "y":
            with jax.disable_jit(way == "disable_jit"):
                got = compute(call, operands, mesh)
        elif way == "eager derivatives":
            got = compute(call, operands, directions, cotangent)
        else:
            program = jax.jit(lambda *arrays: compute(call, *arrays), in_shardings=shardings)
            got = program(operands, directions, cotangent)
    return excess(got, kept)


def report(thorough):
    """Print one JSON object a cell."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    for cell in cells(thorough):
        try:
            outcome = {"bound_fraction": run(*cell)}
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"cell": cell, **outcome}), flush=True)


@pytest.fixture(scope="module")
def rows():
    thorough = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", f"from parity_tests.tests.test_jax_placements import report; report({thorough})"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        timeout=3600 if thorough else 300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_is_right_wherever_its_operands_lie(rows, name):
    own = [row for row in rows if row["cell"][0] == name]
    assert {row["cell"][1] for row in own} == set(KINDS)
    # Not above: a NaN is as wrong as an error.
    assert [row for row in own if not row.get("bound_fraction", np.inf) <= 1] == []


def test_every_way_to_divide_a_call_was_taken(rows):
    assert {row["cell"][4] for row in rows} == set(WAYS)
    assert {tuple(row["cell"][2]) for row in rows} == set(MESHES)


def test_the_oracle_is_far_from_what_a_wrong_division_returns():
    """The bound is one that a group too many or a row counted twice exceeds, or the tests above could not fail."""
    x, kernel, bias = OPERANDS
    for wrong in (
        oracle((np.roll(x, 1, 1), kernel, bias), DIRECTIONS, COTANGENT),
        oracle(OPERANDS, DIRECTIONS, 2 * COTANGENT),
    ):
        assert excess(wrong["first"], "first") > 1


@pytest.mark.parametrize("devices", [1, 4])
def test_a_convolution_is_bound_to_be_whole_in_programs_for_several_devices_only(devices):
    mesh = AbstractMesh((devices,), ("p",), axis_types=(AxisType.Auto,))
    arrays = [
        jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, PartitionSpec("p"))) for shape in SHAPES
    ]
    program = jax.jit(lambda *a: jax.vjp(lambda *b: partitioned_linear(*b, implementation="grouped_conv"), *a)[1](a[0]))
    text = program.trace(*arrays).lower(lowering_platforms=("cpu",)).as_text()
    # The two operands of each of the two convolutions of the gradients (the result of the forward one is not needed),
    # the cotangent, and the two gradients.
    assert text.count("stablehlo.convolution") == 2
    assert text.count("sdy.sharding_constraint") == (0 if devices == 1 else 5)
