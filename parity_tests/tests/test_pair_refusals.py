"""check_pair: what cannot be compared, or would show nothing, is refused, skipped or failed, with one sentence."""

import functools

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import flax.linen as nn
import jax
import jax.numpy as jnp
import torch
from flax import nnx

from parity_tests.pair import MappingError, check_pair

LINEAR = [("weight", "kernel", "o i -> i o"), ("bias", "bias", "")]


def linear_pair(i=12, o=7, **changes):
    return {
        "torch_module": torch.nn.Linear(i, o),
        "flax_module": nnx.Linear(i, o, rngs=nnx.Rngs(0)),
        "params": LINEAR,
        "inputs": ((3, i),),
    } | changes


def test_a_pair_that_shows_nothing_does_not_hold():
    always_off = torch.nn.Sequential(torch.nn.Linear(12, 7), torch.nn.ReLU())

    def off(params, x):
        return 0 * jax.nn.relu(3 * (x @ params["kernel"]) + params["bias"])

    def not_finite(params, x):
        return jnp.sqrt(-jnp.exp(x @ params["kernel"] + params["bias"]))

    class NotFinite(torch.nn.Linear):
        def forward(self, x):
            return torch.sqrt(-torch.exp(7 * super().forward(x)))

    flax_params = {"kernel": np.ones((12, 7), np.float32), "bias": np.zeros(7, np.float32)}
    given = {"flax_params": flax_params, "dtypes": ("float32",)}
    sentence = "every output is empty, zero or not finite on both sides"
    draws = {"0.bias": lambda rng, shape: np.full(shape, -1e6, np.float32)}
    rules = [("0.weight", "kernel", "o i -> i o"), ("0.bias", "bias", "")]
    for changes in (
        {"torch_module": always_off, "flax_module": off, "params": rules, "draws": draws},
        {"torch_module": NotFinite(12, 7), "flax_module": not_finite},
    ):
        report = check_pair(**linear_pair(**given, **changes))
        assert not report.ok
        assert sentence in report.describe()
    report = check_pair(**linear_pair(inputs=((0, 12),)), dtypes=("float32",))
    assert not report.ok
    assert sentence in report.describe()


def test_what_is_silent_beside_what_is_not_is_a_note():
    class Two(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y, 0 * y

    def two(params, x):
        y = x @ params["kernel"] + params["bias"]
        return y, jnp.zeros_like(y)

    flax_params = {"kernel": np.ones((12, 7), np.float32), "bias": np.zeros(7, np.float32)}
    report = check_pair(
        **linear_pair(torch_module=Two(12, 7), flax_module=two, flax_params=flax_params), dtypes=("float32",)
    )
    report.assert_ok()
    assert "so that nothing is shown: y.1" in report.describe()


def test_a_dtype_that_only_one_side_runs_is_not_what_was_asked_for():
    class NoSinglePrecisionGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, cotangent):
            if cotangent.dtype == torch.float32:
                raise NotImplementedError
            return cotangent

    class Half(torch.nn.Linear):
        def forward(self, x):
            return NoSinglePrecisionGradient.apply(super().forward(x))

    report = check_pair(**linear_pair(torch_module=Half(12, 7)), dtypes=("float32",))
    assert not report.ok
    assert "no dtype that was asked for (float32) could be compared on both sides: torch gradients" in report.describe()
    assert "NotImplementedError: no reason given" in report.describe()
    # What it does run is judged, and another dtype that both run is enough.
    assert {row.tensor for row in report.rows if row.framework == "torch" and row.rung == "forward"} == {"y"}
    check_pair(**linear_pair(torch_module=Half(12, 7)), dtypes=("float32", "bfloat16")).assert_ok()


def test_a_pattern_for_an_output_that_is_not_there_is_refused():
    with pytest.raises(MappingError, match=r"output_patterns: expected names among y, got z"):
        check_pair(**linear_pair(output_patterns={"z": "b o -> o b"}))


def test_a_dtype_that_a_framework_refuses_is_skipped_with_its_reason():
    def picky(params, x):
        if x.dtype == jnp.float16:
            raise NotImplementedError("no half precision here")
        return x @ params["kernel"] + params["bias"]

    shapes = {"kernel": np.ones((12, 7), np.float32), "bias": np.zeros(7, np.float32)}
    report = check_pair(
        **linear_pair(flax_module=picky, flax_params=shapes), dtypes=("float32", "float16"), gradients=False
    )
    report.assert_ok()
    (skipped,) = [row for row in report.rows if row.status == "skipped"]
    assert (skipped.framework, skipped.dtype) == ("jax", "float16")
    assert skipped.reason == "NotImplementedError: no half precision here"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"params": LINEAR[:1]}, MappingError, "left on the torch side: bias"),
        ({"params": None}, ValueError, "params: expected a value, got None"),
        ({"flax_module": None}, ValueError, "flax_module: expected a value, got None"),
        ({"flax_module": nnx.Linear}, TypeError, "flax_module: expected a linen or nnx module or a function"),
        ({"torch_module": torch.nn.Linear}, TypeError, "got the class Linear; create an instance"),
        ({"torch_params": {"weight": np.ones(3)}}, TypeError, "torch_params: expected None beside a module"),
        ({"flax_params": {"kernel": np.ones(3)}}, TypeError, "flax_params: expected None beside a module"),
        ({"torch_kwargs": 5}, ValueError, "torch_kwargs: expected a dict of keyword arguments, got 5"),
        (
            {"torch_kwargs": {"foo": 1}},
            ValueError,
            r"torch_module: expected a module that runs on its inputs \(float32 \(3, 12\)\), got TypeError: .*'foo'; "
            r"check inputs=, torch_kwargs=\.",
        ),
        (
            {"inputs": ((3, 11),)},
            ValueError,
            r"torch_module: expected .* \(float32 \(3, 11\)\), got RuntimeError: mat1",
        ),
        ({"inputs": ((3, -12),)}, ValueError, r"inputs\[0\]: expected sizes of at least 0, got \(3, -12\)"),
        (
            {"flax_module": lambda p, x: x @ p["w"], "flax_params": {"kernel": np.ones((12, 7), np.float32)}}
            | {"params": [("weight", "kernel", "o i -> i o"), ("bias", None, "0")]},
            ValueError,
            "flax_module: expected a module that runs on its inputs .* got KeyError: 'w'",
        ),
        (
            {"flax_module": lambda p, x: x, "flax_params": {"a.b": np.ones(3), "a": {"b": np.ones(3)}}},
            ValueError,
            "flax_params: expected a name of its own for every array, got two called a.b",
        ),
        ({"params": "weight"}, ValueError, "params: expected a sequence of rules or a proposal, got 'weight'"),
        ({"dtypes": "float32"}, ValueError, r"dtypes: .* got 'float32'; for one dtype pass \('float32',\)"),
        ({"seed": True}, ValueError, "seed: expected a non-negative integer, got True"),
        ({"dtypes": (np.float32,)}, ValueError, "dtypes: expected names such as 'bfloat16', got <class"),
        ({"gradients": "no"}, ValueError, "gradients: expected True or False, got 'no'"),
        ({"timeout_s": -1}, ValueError, "timeout_s: expected a number of seconds above 0, got -1"),
        ({"pair": 3}, ValueError, "pair: expected package.module:factory, got 3"),
        ({"not_compared": 3}, TypeError, "not_compared: expected a tuple of names or patterns, got 3"),
        ({"torch_kwargs": {1: 2}}, ValueError, "torch_kwargs: expected a dict of keyword arguments, got {1: 2}"),
        (
            {"flax_module": functools.partial(nnx.Linear, 12, 7)},
            TypeError,
            "flax_module: expected .*, got the class Linear; create an instance, with its sizes",
        ),
        ({"flax_module": torch.nn.ReLU()}, TypeError, "got the torch module ReLU; pass it as torch_module"),
        ({"torch_module": nn.Dense(7)}, TypeError, "got the flax module Dense; pass it as flax_module"),
        (
            {"torch_module": lambda p, x: x, "torch_params": {1: np.ones(3)}},
            TypeError,
            "torch_params: expected names as keys, got 1",
        ),
        (
            {"flax_module": lambda p, x: x, "flax_params": "a"},
            TypeError,
            "flax_params: expected arrays, in a dict .* 'a'",
        ),
        (
            {"flax_module": nn.Dense(7), "flax_params": "a"},
            TypeError,
            "flax_params: expected a dict of variables .* 'a'",
        ),
        (
            {"inputs": lambda rng: 1 // 0},
            ValueError,
            "inputs: expected a function .*, got one that raised ZeroDivisionError",
        ),
        ({"inputs": {(3, 12)}}, TypeError, "inputs: expected a tuple with one entry per argument, got {"),
        ({"draws": {"weight": lambda rng, shape: 1 // 0}}, ValueError, r"draws\['weight'\]: .*, got integer division"),
        *(
            (
                {"params": [("weight", "kernel", "(a b) i -> i (b a)", lengths), LINEAR[1]]},
                MappingError,
                f"expected positive integers for axes in it, got .* for '{axis}'",
            )
            for lengths, axis in (({"a": "5"}, "a"), ({"a": 7.0}, "a"), ({"a": 0}, "a"), ({"z": 7}, "z"))
        ),
        ({"seed": -1}, ValueError, "seed: expected a non-negative integer, got -1"),
        ({"device": "gpu"}, ValueError, "device: expected cpu, cuda or auto, got 'gpu'"),
        ({"draws": {"weight": 3}}, ValueError, r"draws\['weight'\]: expected a function \(rng, shape\) -> array"),
        ({"scale": 0}, ValueError, "scale: expected a positive number, got 0"),
        ({"scale": {1: 3.0}}, ValueError, r"scale: expected positions of inputs .* \(0\) or parameters .* got 1"),
        (
            {"scale": 3.0, "inputs": (np.ones((3, 12), np.float32),)},
            ValueError,
            "scale: expected inputs that are drawn",
        ),
        ({"not_compared": "bias"}, TypeError, "not_compared: expected a tuple of names or patterns, got 'bias'"),
        ({"not_compared": ("bias",)}, MappingError, r"that no rule maps \(none\), or of gradients .* got 'bias'"),
        ({"torch_module": 3}, TypeError, "torch_module: expected an nn.Module or a function, got int"),
        ({"torch_module": lambda p, x: x}, TypeError, "torch_params: expected a dict of initial arrays"),
        ({"flax_module": lambda p, x: x}, TypeError, "flax_params: expected a dict of initial arrays"),
        ({"inputs": (3, 12)}, TypeError, r"inputs\[0\]: expected a shape such as \(8, 64\) or a NumPy array, got 3"),
        ({"inputs": ("x",)}, ValueError, "inputs: expected at least one, got none"),
        (
            {"inputs": lambda rng: rng.standard_normal((3, 12))},
            TypeError,
            r"inputs: expected a tuple with one entry per argument from the function, got ndarray of float64 and shape "
            r"\(3, 12\); for one argument return \(array,\)\.",
        ),
        ({"inputs": lambda rng: {"x": 1}}, ValueError, "inputs: expected at least one, got none"),
        ({"inputs": lambda rng: None}, TypeError, "from the function, got None; for one argument return"),
        ({"inputs": np.ones((3, 12))}, TypeError, r"got ndarray of float64 and shape \(3, 12\); for one argument pass"),
        ({"inputs": 12}, TypeError, "inputs: expected a tuple with one entry per argument, got 12; for one"),
        (
            {"inputs": (torch.ones(3, 12),)},
            TypeError,
            r"inputs\[0\]: .* got Tensor of torch.float32 and shape \(3, 12\)",
        ),
        ({"inputs": ()}, ValueError, "inputs: expected at least one, got none"),
        ({"inputs": (np.full((3, 12), "a"),)}, TypeError, r"inputs\[0\]: expected numbers or booleans, got <U1"),
        ({"dtypes": ()}, ValueError, "dtypes: expected at least one"),
        ({"dtypes": ("float8",)}, ValueError, "dtype: expected one of float64"),
        ({"draws": {"wait": np.random.Generator.standard_normal}}, ValueError, "draws: expected names among weight"),
        ({"input_patterns": {1: "b i -> i b"}}, MappingError, "input_patterns: expected positions below 1, got 1"),
        ({"input_patterns": {"x": "b i -> i b"}}, MappingError, "input_patterns: expected positions below 1, got 'x'"),
        ({"input_patterns": {0: "b i -> b"}}, MappingError, "expected a permutation such as"),
        ({"torch_python": "python"}, ValueError, "expected pair='package.module:factory' beside an interpreter"),
    ],
)
def test_wrong_arguments_get_one_sentence(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        check_pair(**linear_pair(**changes))
    assert "\n" not in str(caught.value)


def test_outputs_that_do_not_correspond_are_refused():
    two = linear_pair(
        flax_module=lambda p, x: (x @ p["kernel"], p["bias"]),
        flax_params={"kernel": np.ones((12, 7), np.float32), "bias": np.zeros(7, np.float32)},
    )
    with pytest.raises(
        ValueError, match=r"expected the same names on both sides, got y from torch and y\.0, y\.1 from"
    ):
        check_pair(**two)
