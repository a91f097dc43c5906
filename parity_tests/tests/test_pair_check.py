"""check_pair: equal pairs pass, every kind of module is taken, and the first failing rung names a likely cause."""

from typing import NamedTuple

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

from parity_tests.frameworks.torch.pair import TorchSide
from parity_tests.pair import check_pair, propose_mapping, run_pair
from parity_tests.pair.examples import EXAMPLES

LINEAR = [("weight", "kernel", "o i -> i o"), ("bias", "bias", "")]


def linear_pair(i=12, o=7, **changes):
    return {
        "torch_module": torch.nn.Linear(i, o),
        "flax_module": nnx.Linear(i, o, rngs=nnx.Rngs(0)),
        "params": LINEAR,
        "inputs": ((3, i),),
    } | changes


def test_the_remaining_dtypes_and_the_report_of_a_linear_layer():
    # float32 and bfloat16: test_pair_defects.
    report = check_pair(**linear_pair(), dtypes=("float64", "float16"))
    report.assert_ok()
    assert {row.dtype for row in report.rows} == {"float64", "float16"}
    tensors = {row.tensor for row in report.rows if row.rung != "weights"}
    assert tensors == {"y", "d_weight", "d_bias", "d_input0"}
    assert "calibrated" in report.describe() == str(report)


def test_layout_is_a_likely_cause():
    factory = EXAMPLES["conv"]
    pair = factory("pair") | {"output_patterns": {}}
    report = check_pair(**factory("torch"), **factory("jax"), **pair)
    assert report.likely_cause.startswith("layout: y has shape (2, 8, 7, 6) on the torch side and (2, 7, 6, 8)")


def test_transposed_kernel_is_a_likely_cause():
    rules = [("weight", "kernel", ""), ("bias", "bias", "")]
    report = check_pair(**linear_pair(9, 9, params=rules), gradients=False)
    assert report.likely_cause.startswith("the kernel weight is transposed")


def test_gelu_is_a_likely_cause():
    report = check_pair(
        **linear_pair(
            torch_module=torch.nn.Sequential(torch.nn.Linear(12, 7), torch.nn.GELU()),
            flax_module=lambda params, x: jax.nn.gelu(x @ params["kernel"] + params["bias"]),
            flax_params={"kernel": np.ones((12, 7), np.float32), "bias": np.zeros(7, np.float32)},
            params=[("0.weight", "kernel", "o i -> i o"), ("0.bias", "bias", "")],
        ),
        gradients=False,
    )
    assert report.likely_cause == (
        "gelu: the torch side uses the exact gelu (erf), the flax side behaves like the tanh approximation of gelu"
    )


class Block(nn.Module):
    """Linen, nested, with a buffer collection, an integer input and two outputs."""

    @nn.compact
    def __call__(self, tokens, scale, mask):
        x = nn.Embed(11, 8, name="embed")(tokens) * scale[..., None]
        x = nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="norm")(x)
        x = jax.nn.relu(nn.Dense(5, name="out")(x))
        x = jnp.where(mask[..., None], x, 0)
        return {"hidden": x, "best": jnp.argmax(x, -1)}


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.out = torch.nn.Embedding(11, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 5)

    def forward(self, tokens, scale, mask):
        x = self.embed(tokens) * scale[..., None]
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = torch.relu(self.out(x)).masked_fill(~mask[..., None], 0)
        return {"hidden": x, "best": x.argmax(-1)}


BLOCK = [
    ("embed.weight", "embed.embedding", ""),
    ("norm.weight", "norm.scale", ""),
    ("norm.bias", "norm.bias", ""),
    ("out.weight", "out.kernel", "o i -> i o"),
    ("out.bias", "out.bias", ""),
]
BUFFERS = [("norm.running_mean", "batch_stats.norm.mean", ""), ("norm.running_var", "batch_stats.norm.var", "")]


def tokens_scales_and_mask(rng):
    return rng.integers(0, 11, (2, 6)), rng.standard_normal((2, 6)), rng.random((2, 6)) < 0.8


def test_linen_with_integer_inputs_masks_buffers_and_two_outputs():
    arguments = {"torch_module": TorchBlock().eval(), "flax_module": Block(), "inputs": tokens_scales_and_mask}
    report = check_pair(**arguments, params=[*BLOCK, *BUFFERS])
    report.assert_ok()
    tensors = {row.tensor for row in report.rows if row.rung != "weights"}
    assert {"y.hidden", "y.best", "d_embed.weight", "d_input1"} <= tensors
    assert "d_input0" not in tensors
    assert "d_norm.running_mean" not in tensors
    assert report.not_compared == ("torch buffer norm.num_batches_tracked",)
    # Buffers left out keep their own values and are said not to be compared.
    report = check_pair(
        **arguments, params=BLOCK, gradients=False, not_compared=("*.running_*", "batch_stats.norm.mean", "*.var")
    )
    assert "torch buffer norm.running_var, left out by not_compared=" in report.not_compared
    assert "flax buffer batch_stats.norm.mean, left out by not_compared=" in report.not_compared


def test_integer_outputs_are_compared_exactly():
    pair = linear_pair(
        torch_module=lambda p, x: ((x @ p["w"]).sum(-1), (x @ p["w"]).argmax(-1)),
        flax_module=lambda p, x: ((x @ p["w"]).sum(-1), jnp.argmin(x @ p["w"], -1)),
        torch_params={"w": np.ones((12, 7), np.float32)},
        flax_params={"w": np.ones((12, 7), np.float32)},
        params=[("w", "w")],
    )
    report = check_pair(**pair)
    failed = {row.tensor for row in report.rows if row.status == "mismatch"}
    assert failed == {"y.1"}


def test_explicit_single_precision_inside_a_module_does_not_hide_the_float64_truth():
    class Upcast(torch.nn.Linear):
        def forward(self, x):
            return torch.softmax(super().forward(x).float(), -1).to(x.dtype)

    def upcast(p, x):
        logits = x @ p["kernel"] + p["bias"]
        return jax.nn.softmax(logits.astype(jnp.float32), -1).astype(x.dtype)

    shapes = {"kernel": np.ones((12, 7), np.float32), "bias": np.zeros(7, np.float32)}
    pair = linear_pair(torch_module=Upcast(12, 7), flax_module=upcast, flax_params=shapes)
    check_pair(**pair, dtypes=("bfloat16",)).assert_ok()


def test_a_recurrent_loop_that_is_fixed_to_float32_still_has_a_truth():
    hidden, features = 4, 3
    lstm = torch.nn.LSTM(features, hidden, batch_first=True)
    rules = []
    for k, gate in enumerate("ifgo"):
        rows = f"[{hidden * k}:{hidden * (k + 1)}]"
        rules += [
            (f"weight_ih_l0{rows}", f"cell.i{gate}.kernel", "o i -> i o"),
            (f"weight_hh_l0{rows}", f"cell.h{gate}.kernel", "o i -> i o"),
            (f"bias_hh_l0{rows}", f"cell.h{gate}.bias", ""),
        ]
    report = check_pair(
        torch_module=lambda p, x: torch.func.functional_call(lstm, p, (x,))[0],
        torch_params={name: p.detach().numpy() for name, p in lstm.named_parameters()},
        flax_module=nn.RNN(nn.LSTMCell(hidden)),
        params=[*rules, ("bias_ih_l0", None, "0")],
        inputs=((2, 3, features),),
        gradients=False,
    )
    report.assert_ok()
    assert any("held at zero" in what for what in report.not_compared)


def test_a_kernel_that_rounds_differently_from_call_to_call_draws_nothing():
    calls = []

    def unsteady(p, x):
        calls.append(1)
        y = x @ p["w"]
        return y * (1 + len(calls) * torch.finfo(y.dtype).eps)

    def drawing(p, x):
        return x @ p["w"] + 1e-6 * torch.from_numpy(np.random.standard_normal(3))  # noqa: NPY002

    p = {"w": np.ones((4, 3), np.float32)}
    x = (np.ones((2, 4), np.float32),)
    assert not TorchSide(unsteady, initial=p).is_random(p, x)
    assert len(calls) == 4
    assert TorchSide(drawing, initial=p).is_random(p, x)


def test_dropout_that_is_active_is_named_on_either_side():
    noisy = torch.nn.Sequential(torch.nn.Linear(12, 7), torch.nn.Dropout(0.5))
    rules = [("0.weight", "kernel", "o i -> i o"), ("0.bias", "bias", "")]
    report = check_pair(**linear_pair(torch_module=noisy, params=rules))
    assert report.likely_cause.startswith("the torch side draws random numbers: dropout is active")
    check_pair(**linear_pair(torch_module=noisy.eval(), params=rules), gradients=False).assert_ok()

    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            return nn.Dropout(0.5)(nn.Dense(7, name="dense")(x), deterministic=deterministic)

    rules = [("weight", "dense.kernel", "o i -> i o"), ("bias", "dense.bias", "")]
    for deterministic in (False, True):
        kwargs = {"rngs": {"dropout": jax.random.key(1)}, "deterministic": deterministic}
        report = check_pair(**linear_pair(flax_module=Dropped(), params=rules, flax_kwargs=kwargs), gradients=False)
        assert report.ok == deterministic
        assert deterministic or report.likely_cause.startswith("the flax side draws random numbers")


def test_parameters_are_never_judged_at_their_initial_zeros():
    ignores_bias = linear_pair(
        flax_module=lambda p, x: x @ p["kernel"],
        flax_params={"kernel": np.ones((12, 7), np.float32), "bias": np.zeros(7, np.float32)},
    )
    report = check_pair(**ignores_bias, gradients=False)
    assert report.likely_cause.startswith("bias has no effect on the flax side")


class Layer(NamedTuple):
    w: np.ndarray
    b: np.ndarray


def test_any_pytree_of_parameters_has_names_and_the_proposal_goes_in_as_it_is():
    """Lists, tuples and dictionaries of layers, and callable trees such as Equinox modules."""
    original = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    layers = [Layer(np.ones(shape, np.float32), np.zeros(shape[1], np.float32)) for shape in ((4, 8), (8, 2))]

    def ported(params, x):
        x = jax.nn.relu(x)
        for layer in params["mlp/~/layers"]:
            x = x @ layer.w + layer.b
        return params["sign"] * x if params["name"] == "mlp" else None

    tree = {"mlp/~/layers": layers, "sign": 1, "name": "mlp"}
    pair = {"torch_module": original, "flax_module": ported, "flax_params": tree, "inputs": ((3, 4),)}
    proposal = propose_mapping(**pair)
    assert proposal.rules[2:] == (("2.weight", "mlp/~/layers.1.w", "b a -> a b"), ("2.bias", "mlp/~/layers.1.b", ""))
    # The torch side's first operation writes to its input.
    check_pair(**pair, params=proposal).assert_ok()

    @jax.tree_util.register_pytree_node_class
    class Tree:
        def __init__(self, layers):
            self.layers = layers

        def __call__(self, x):
            return ported(tree | {"mlp/~/layers": self.layers}, x)

        def tree_flatten(self):
            return (self.layers,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    rules = [(name, f"0{path.removeprefix('mlp/~/layers')}", *rest) for name, path, *rest in proposal.rules]
    check_pair(**pair | {"flax_module": Tree(layers), "flax_params": None}, params=rules, gradients=False).assert_ok()


def test_initial_variables_of_a_linen_module_and_odd_variables_of_an_nnx_one_are_taken():
    class Odd(nnx.Linear):
        def __init__(self):
            super().__init__(12, 7, rngs=nnx.Rngs(0))
            self.table, self.count, self.text = jnp.arange(7.0), nnx.Variable(0), nnx.Variable("text")

        def __call__(self, x):
            self.count.set_value(self.count.get_value() + 1)
            return super().__call__(x) + self.table

    class Torch(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.arange(7.0)

    report = check_pair(**linear_pair(flax_module=Odd(), torch_module=Torch(12, 7)), gradients=False)
    report.assert_ok()
    assert report.not_compared == ("flax buffer count, which a call updates",)
    dense = nn.WeightNorm(nn.Dense(7, name="dense"), name="norm", epsilon=0.0)
    variables = dense.init(jax.random.key(0), np.ones((1, 12)))
    rules = [
        ("parametrizations.weight.original0", "layer_instance/kernel/scale", "o 1 -> o"),
        ("parametrizations.weight.original1", "layer_instance.kernel", "o i -> i o"),
        ("bias", "layer_instance.bias"),
    ]
    torch_module = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(12, 7))
    pair = linear_pair(torch_module=torch_module, flax_module=dense, flax_params=variables, params=rules)
    check_pair(**pair, gradients=False).assert_ok()


def test_a_flipped_kernel_is_a_likely_cause():
    pair = {
        "torch_module": torch.nn.ConvTranspose1d(3, 5, 4, stride=2),
        "flax_module": nnx.ConvTranspose(3, 5, (4,), (2,), padding="VALID", rngs=nnx.Rngs(0)),
        "params": [("weight", "kernel", "i o w -> w i o"), ("bias", "bias")],
        "input_patterns": {0: "b c w -> b w c"},
        "output_patterns": {"y": "b c w -> b w c"},
    }
    report = check_pair(**pair, inputs=((2, 3, 6),), gradients=False)
    assert report.likely_cause.startswith("the kernel weight is flipped: reversing its window (axes 2 on the torch")


def test_named_pair_with_overrides(tmp_path):
    report = run_pair("parity_tests.pair.examples:linear", gradients=False, seed=3)
    report.assert_ok()
    assert report.name == "linear"
    assert {row.rung for row in report.rows} == {"weights", "forward"}
    assert {row.case for row in report.rows} == {"linear seed 3"}
    # Both frameworks in their own arithmetic, and the float64 truths of the two functions.
    assert {row.mode for row in report.rows} == {"", "truth"}
