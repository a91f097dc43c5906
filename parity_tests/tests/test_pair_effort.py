"""Time and memory of a check: members of an ensemble run together, a quick look, lines of progress."""

import os

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import jax
import jax.numpy as jnp
import torch
from flax import linen

import parity_tests.frameworks.jax.ensemble as jax_ensemble
import parity_tests.frameworks.torch.ensemble as torch_ensemble
from parity_tests.frameworks.jax.operations import compile_options, evaluated, inner_programs
from parity_tests.frameworks.jax.pair import JaxSide
from parity_tests.frameworks.torch.pair import TorchSide
from parity_tests.pair import check_pair
from parity_tests.pair.check import DEFAULT_ARGUMENTS, judge_pair, prepared
from parity_tests.tests.forked import run_python

WIDTH = 3
ARRAYS = {
    "w": np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32),
    "b": np.full(WIDTH, 0.1, np.float32),
}
X = np.random.default_rng(1).standard_normal((4, WIDTH)).astype(np.float32)


def torch_layers(p, x, count=4):
    for _ in range(count):
        x = torch.nn.functional.gelu(x @ p["w"] + p["b"])
        x = torch.nn.functional.layer_norm(x, (WIDTH,))
    return x


def layers(p, x, count=4):
    for _ in range(count):
        x = jax.nn.gelu(x @ p["w"] + p["b"], approximate=False)
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return x


def pair_of(torch_side=torch_layers, flax_side=layers, **options):
    return {
        "torch_module": torch_side,
        "flax_module": flax_side,
        "torch_params": ARRAYS,
        "flax_params": ARRAYS,
        "params": [("w", "w"), ("b", "b")],
        "inputs": ((4, WIDTH),),
    } | options


def writes_in_place(p, x):
    y = torch.zeros_like(x)
    y[1:] = x[:-1] @ p["w"]
    y += p["b"]
    return y.tanh_()


def asks_for_a_number(p, x):
    return x @ p["w"] if float(x.detach().sum()) > 1e30 else (x @ p["w"]).relu()


def takes_cumulative_maxima(p, x):
    return torch.cummax(x @ p["w"], 0).values.logcumsumexp(0) * p["b"]


def torch_ensemble_of(function, dtype):
    side = TorchSide(function, initial=ARRAYS)
    return side.ensemble(ARRAYS, (X,), {"y": X}, dtype, 0)


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", [torch_layers, writes_in_place, asks_for_a_number, takes_cumulative_maxima])
def test_members_that_run_together_are_those_that_run_alone(function, dtype, monkeypatch):
    together = torch_ensemble_of(function, dtype)

    def alone(*_):
        raise torch_ensemble.Unmapped

    monkeypatch.setattr(torch_ensemble.Record, "replayed", alone)
    found = torch_ensemble_of(function, dtype)
    assert set(together.spread) == set(found.spread) == {"y", "d_w", "d_b", "d_input0"}
    for name, spread in found.spread.items():
        # Mapped products may add up in another order, in float64, which draws other noise.
        assert np.sqrt(np.mean(together.spread[name] ** 2)) == pytest.approx(np.sqrt(np.mean(spread**2)), rel=0.5)
        np.testing.assert_allclose(together.centre[name], found.centre[name], rtol=1e-12)
    assert found.spread["y"].max() > 0


@pytest.mark.parametrize(
    ("function", "mapped"),
    [(torch_layers, True), (writes_in_place, True), (takes_cumulative_maxima, True), (asks_for_a_number, False)],
)
def test_a_torch_module_runs_few_members_itself_unless_it_asks_for_a_number(function, mapped):
    calls = []

    def counted(p, x):
        calls.append(1)
        return function(p, x)

    torch_ensemble_of(counted, "float32")
    assert len(calls) == (2 if mapped else 33)


def test_a_tensor_given_is_written_to_by_no_other_member():
    def updates(p, x):
        p["b"].data.mul_(2.0)
        return (x + p["b"]) @ p["w"]

    ensemble = torch_ensemble_of(updates, "float32")
    # A member that found the buffer doubled by others would be far away.
    assert ensemble.spread["y"].max() < 1e-5


@pytest.mark.parametrize("whole", [True, False])
def test_operations_one_by_one_err_as_one_program_does(whole, monkeypatch):
    monkeypatch.setattr(jax_ensemble, "repeats", lambda jaxpr: not whole)

    def looped(p, x):
        start = jnp.zeros(WIDTH), x @ p["w"]
        return jax.lax.fori_loop(0, 3, lambda k, c: (c[0] + k, jnp.tanh(c[1] @ p["w"] + p["b"])), start)[1]

    side = JaxSide(looped, initial=ARRAYS)
    side.parameters((X,))
    found = side.ensemble(ARRAYS, (X,), {"y": X}, "float32", 0)
    values = np.sqrt(np.mean(found.spread["y"] ** 2))
    assert 2**-25 < values < 2**-22


def test_repeated_layers_are_known_as_such():
    def program(count):
        return jax.make_jaxpr(lambda p, x: layers(p, x, count))(ARRAYS, X).jaxpr

    assert not jax_ensemble.repeats(program(1))
    assert jax_ensemble.repeats(program(8))


@pytest.mark.skipif("EVERY_TEST" not in os.environ, reason="ten seconds: run with EVERY_TEST=1")
def test_batches_that_fit_into_memory_give_the_same_members(monkeypatch):
    found = []
    for limit in (1 << 28, 1 << 12):
        monkeypatch.setattr(jax_ensemble, "BATCH_BYTES", limit)
        side = JaxSide(layers, initial=ARRAYS)
        side.parameters((X,))
        found.append(side.ensemble(ARRAYS, (X,), {"y": X}, "float32", 0))
    together, in_batches = found
    for name, spread in together.spread.items():
        assert spread.max() > 0
        np.testing.assert_allclose(in_batches.spread[name], spread, rtol=1e-6)


def test_a_quick_look_compares_the_same_and_says_what_it_leaves_out():
    arguments = pair_of(lambda p, x: (x @ p["w"]).relu(), lambda p, x: jax.nn.relu(x @ p["w"]), scale=1e-3)
    arguments |= {"torch_params": {"w": ARRAYS["w"]}, "flax_params": {"w": ARRAYS["w"]}, "params": [("w", "w")]}
    full, quick = (check_pair(**arguments, effort=effort) for effort in ("full", "quick"))
    assert full.ok
    assert quick.ok
    shown = ("framework", "dtype", "mode", "rung", "tensor", "status", "max_abs_error", "median_abs_error")
    found = [[[getattr(row, name) for name in shown] for row in report.rows] for report in (quick, full)]
    assert found[0] == found[1]
    assert any("quick look" in note for note in quick.notes)
    assert not any("quick look" in note for note in full.notes)


def test_a_quick_look_finds_another_function_and_is_reproduced_as_one():
    report = check_pair(**pair_of(flax_side=lambda p, x: layers(p, x) * (1 + 1e-9)), effort="quick", gradients=False)
    assert not report.ok
    assert report.first_failing_rung == "forward"
    assert "effort='quick'" in next(row.command for row in report.rows if row.status == "mismatch")


@pytest.mark.parametrize(("offset", "own"), [(0.0, False), (1e3, True)])
def test_a_quick_look_measures_the_noise_of_the_flax_side_where_the_torch_side_has_less(offset, own, monkeypatch):
    measured, ensemble = [], JaxSide.ensemble
    monkeypatch.setattr(JaxSide, "ensemble", lambda *arguments: measured.append(1) or ensemble(*arguments))
    arguments = pair_of(lambda p, x: x @ p["w"], lambda p, x: (x @ p["w"] + offset * x) - offset * x, gradients=False)
    arguments |= {"torch_params": {"w": ARRAYS["w"]}, "flax_params": {"w": ARRAYS["w"]}, "params": [("w", "w")]}
    report = check_pair(**arguments, effort="quick")
    report.assert_ok()
    assert bool(measured) == own
    # No rung is shown twice.
    keys = [(row.framework, row.dtype, row.mode, row.rung, row.tensor) for row in report.rows]
    assert len(set(keys)) == len(keys)
    assert {row.framework for row in report.rows if row.rung == "forward"} == {"torch", "jax", "torch+jax"}


def test_members_pass_a_convolution_one_by_one_and_its_program_is_optimised():
    x, kernel = np.ones((3, 1, 5, 2)), np.ones((3, 3, 2, 4))

    def convolve(x, kernel):
        return jax.jit(jax.lax.conv_general_dilated, static_argnums=(2, 3, 4, 5, 6))(
            x, kernel, (1,), "SAME", None, None, ("NHC", "HIO", "NHC")
        )

    outer = jax.make_jaxpr(convolve)(x[0], kernel[0]).jaxpr
    assert compile_options(outer.eqns)["xla_backend_optimization_level"] == 1
    assert compile_options(jax.make_jaxpr(jnp.tanh)(x).jaxpr.eqns)["xla_backend_optimization_level"] == 0
    (equation,) = inner_programs(outer.eqns[0])[0].eqns
    mapped = jax.make_jaxpr(jax.vmap(lambda *operands: evaluated(equation, operands)[0]))(x, kernel)
    assert "feature_group_count=1" in str(mapped)
    np.testing.assert_allclose(
        jax.core.eval_jaxpr(mapped.jaxpr, mapped.consts, x, kernel)[0], jax.vmap(convolve)(x, kernel)
    )


def test_a_linen_module_that_asks_for_a_number_has_its_parameters_too():
    class Asks(linen.Module):
        asks: bool

        @linen.compact
        def __call__(self, x):
            return linen.Dense(2 if not self.asks or float(x.sum()) > 0 else 3)(x)

    x = np.ones((4, WIDTH), np.float32)
    asked, traced = (JaxSide(Asks(asks)).parameters((x,)) for asks in (True, False))
    assert asked.keys() == traced.keys() == {"Dense_0.kernel", "Dense_0.bias"}
    assert asked["Dense_0.kernel"].value.std() > 0
    np.testing.assert_allclose(traced["Dense_0.kernel"].value, asked["Dense_0.kernel"].value, rtol=1e-5)


def test_an_unknown_effort_is_refused():
    with pytest.raises(ValueError, match="effort: expected one of full, quick, got 'fast'"):
        check_pair(**pair_of(), effort="fast")


def test_lines_of_progress_name_leg_and_format():
    lines = []
    with prepared(
        DEFAULT_ARGUMENTS | pair_of(lambda p, x: x @ p["w"] + p["b"], lambda p, x: x @ p["w"] + p["b"]),
        None,
        lines.append,
    ) as pair:
        judge_pair(pair, dtypes=("bfloat16",), gradients=False, tell=lines.append)
    texts = [line for line in lines if isinstance(line, str)]
    assert any("noise" in text and "torch" in text and "bfloat16 leg" in text for text in texts)
    assert any("jax" in text and "float64" in text for text in texts)
    numbers = [text.rpartition(", ")[2].rstrip(")").split(" of ") for text in texts if " of " in text and "leg" in text]
    assert numbers
    assert all(int(done) <= int(planned) for done, planned in numbers)


MODE = """
import sys
import torch
from parity_tests.frameworks.torch.modes import DispatchMode

class Seen(DispatchMode):
    names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))

with Seen():
    torch.ones(2) + 1
assert "torch._dynamo" not in sys.modules
assert "add.Tensor" in Seen.names
compiled = torch.compile(lambda x: x.sin() * 2, backend="eager")
with Seen():
    torch.testing.assert_close(compiled(torch.ones(2)), 2 * torch.ones(2).sin())
assert "sin.default" in Seen.names
from torch._dynamo.utils import counters
print(sum(counters["frames"].values()))
"""


def test_a_mode_imports_no_compiler_and_keeps_away_one_that_is_there():
    done = run_python("-c", MODE)
    assert done.returncode == 0, done.stderr
    # Of the user's function alone: both counts, total and ok, are of one frame at most.
    assert int(done.stdout) <= 2
