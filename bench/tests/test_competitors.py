"""Every competitor computes the map with the given arrays: values and all three gradients against the oracle."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from bench.measure import switches
from bench.measure.jax import functions as jax_functions
from bench.measure.timer import Task
from bench.measure.torch import functions as torch_functions
from bench.measure.torch.programs import counted_flops
from bench.measure.verification import Oracle, Verifier
from bench.measure.workers import CHECKOUT
from parity_tests.judge.inputs import Case, Sizes, draw_inputs

CASE = Case("competitors", (5,), 3, 4, 6)
ORACLE = Oracle(draw_inputs(CASE, "float32"))
VERIFIER = Verifier(ORACLE, "forward_backward")
NAMES = ("y", "dx", "dweight", "dbias")
HIGHEST = jax.lax.Precision.HIGHEST


def arrays():
    given = ORACLE.inputs
    return given.x, given.weight, given.bias, given.cotangent


def torch_results(function):
    x, weight, bias, cotangent = map(torch.from_numpy, arrays())
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = function(*leaves)
    return [tensor.detach().numpy() for tensor in (y, *torch.autograd.grad(y, leaves, cotangent))]


def jax_results(function):
    def both(x, kernel, bias, cotangent):
        y, vjp = jax.vjp(function, x, kernel, bias)
        return (y, *vjp(cotangent))

    return [np.asarray(value) for value in jax.jit(both)(*arrays())]


def check(results):
    judged = VERIFIER.judge(dict(zip(NAMES, results, strict=True)), "ieee_fp32")
    assert (judged.status, judged.observed_precision) == ("ok", "ieee_fp32"), judged.reason


def check_jax(name):
    """Right, and the traced program draws nothing, holds one product and has nothing but its three arguments."""
    function = jax_functions.resolve(Task(name, "jit", "forward"), HIGHEST)
    check(jax_results(function))
    program = jax.make_jaxpr(function)(*arrays()[:3])
    text = str(program)
    assert "random" not in text
    assert text.count("dot_general") == 1
    assert "Precision.HIGHEST" in text
    assert program.consts == []


def test_a_program_that_draws_or_holds_an_array_of_its_own_would_be_seen():
    kept = jax.numpy.arange(24.0)
    program = jax.make_jaxpr(lambda x: x + kept + jax.random.normal(jax.random.key(0), x.shape))(kept)
    assert "random" in str(program)
    assert len(program.consts) == 1


@pytest.mark.parametrize("name", torch_functions.STOCK)
def test_a_torch_competitor_is_right_in_values_and_gradients(name):
    function = torch_functions.resolve(Task(name, "eager", "forward"))
    for _ in range(2):  # the second call meets what the first one has kept
        check(torch_results(function))
    # Three products and no more, under torch's own counter, as a worker counts them.
    products = 3 * 2 * CASE.rows * CASE.num_partitions * CASE.in_features * CASE.out_features
    assert counted_flops(lambda: torch_results(function)) == products


@pytest.mark.parametrize("name", [name for name in jax_functions.STOCK if "keras" not in name])
def test_a_jax_competitor_is_right_in_values_and_gradients(name):
    check_jax(name)


def test_keras_on_jax_is_right_in_a_process_of_its_own():
    """Keras fixes its backend when it is imported, and here that is torch already."""
    pytest.importorskip("keras", reason="needs keras")
    code = "from bench.tests.test_competitors import check_jax; check_jax('stock:keras.EinsumDense')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr


def test_all_that_users_pick_instead_is_there():
    torch_names = {"bmm+bias", "baddbmm", "einsum", "torch.func", "einops.EinMix", "keras.EinsumDense"}
    jax_names = {"nnx.Einsum", "nnx.LinearGeneral", "linen.DenseGeneral", "einops.EinMix", "keras.EinsumDense"}
    jax_names |= {"equinox.filter_vmap"}
    for functions, names in ((torch_functions, torch_names), (jax_functions, jax_names)):
        assert {*functions.STOCK, *functions.MISSING} == {f"stock:{name}" for name in names}
        assert not set(functions.STOCK) & set(functions.MISSING)


def test_a_competitor_without_its_package_is_missing_with_the_reason(monkeypatch):
    monkeypatch.setattr(switches, "find_spec", lambda package: None if package == "keras" else object())
    found = switches.missing_competitors(["stock:keras.EinsumDense", "stock:einops.EinMix", "stock:einsum"])
    assert found == {"stock:keras.EinsumDense": "keras is not installed; install the extra `competitors`"}


def test_an_unknown_name_lists_the_choices():
    unequal, names = Sizes((1, 2), (3, 3)), "loop, .*padded_matmul, .*Linear, dense"
    for sizes, choices in ((None, "loop, .*dense"), (unequal, names)):
        task = Task("nothing", "eager", "forward", sizes=sizes)
        for resolve in (torch_functions.resolve, lambda task: jax_functions.resolve(task, None)):
            with pytest.raises(ValueError, match=rf"implementation: expected one of {choices}, got 'nothing'"):
                resolve(task)
