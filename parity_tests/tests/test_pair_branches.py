"""What no draw exercised is a note on the row: branches, signs of parameters, formats wider than the one judged in."""

import json

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import jax
import jax.numpy as jnp
import ml_dtypes
import torch
from flax import nnx

from parity_tests.frameworks.jax.pair import JaxSide
from parity_tests.frameworks.torch.pair import TorchSide
from parity_tests.pair import check_pair

X = np.linspace(-2.0, 2.0, 24, dtype=np.float32).reshape(4, 6)


def torch_sentences(function, *inputs):
    side = TorchSide(function, initial={"w": np.ones(6, np.float32)})
    return side.unexercised({"w": np.ones(6, np.float32)}, inputs, None)


def flax_sentences(function, *inputs):
    side = JaxSide(function, initial={"w": np.ones(6, np.float32)})
    side.parameters(inputs)
    return side.unexercised({"w": np.ones(6, np.float32)}, inputs, None)


def met(sentences):
    """`operation: what it never met`, without places and numbers."""
    return {
        f"{sentence.split(' in ')[0]}: {sentence.split('never met ')[1].split(' (its')[0].split(';')[0]}"
        for sentence in sentences
    }


def test_torch_branches_that_no_value_takes_are_named():
    functional = torch.nn.functional

    def unexercised(p, x, i):
        y = functional.relu6(x.clamp(-30, 20)) + functional.huber_loss(x, 0 * x, delta=9.0)
        y = torch.where(y > 50, 0.0, y) + torch.round(x) + torch.fmod(i, 4) + (x**2).abs() + (x > 7).double()
        return y / torch.maximum(x.norm(), torch.tensor(1e-6)) + x.masked_fill(x > 99, 0.0)

    found = torch_sentences(unexercised, X, np.arange(6))
    assert met(found) == {
        "clamp(min=-30, max=20): a value below -30",
        "clamp(min=-30, max=20): a value above 20",
        "hardtanh(min=0, max=6): a value above 6",
        "huber_loss(delta=9): a value above 9",
        "where: a condition that is true",
        "round: a tie (a number and a half)",
        "fmod: operands of different signs",
        "abs: a negative value",
        "comparison > 7: one that is true",
        "maximum(x, 1e-06): a value below 1e-06",
        "masked_fill: a condition that is true",
    }
    (clamped,) = [sentence for sentence in found if "above 20" in sentence]
    assert "in test_pair_branches.py:" in clamped
    assert clamped.endswith("(its values went from -2 to 2); draws 20 times as large may reach it (scale=)")

    def exercised(p, x, i):
        # Causal masks take both branches, a softmax has none; a constant no draw could change.
        scores = x[:, :4].masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
        y = functional.layer_norm(functional.relu(x) + x.clamp(-1, 1) + functional.gelu(x), (6,), p["w"])
        return scores @ y + torch.where(torch.ones(6) > 2, y, x) + torch.round(x * 2) + (i - 3) % 2

    assert torch_sentences(exercised, np.r_[X, X][:4] + 0.25, np.arange(6)) == ()


def test_flax_branches_that_no_value_takes_are_named_inside_loops_too():
    def unexercised(p, x, i):
        y = jax.nn.relu6(jnp.clip(x, -30, 20)) + jnp.minimum(jnp.abs(x - p["w"]), 9.0)
        y = jnp.where(y > 50, 0.0, y) + jnp.round(x) + jnp.fmod(i, 4) + jnp.abs(x**2) + (x > 7).astype(x.dtype)
        y = jax.lax.cond(x.sum() > 99, lambda v: v, lambda v: -v, y)
        return y / jnp.maximum(jnp.linalg.norm(x), 1e-6) + jax.vmap(lambda row: jnp.maximum(row, -8.0))(x)

    found = flax_sentences(unexercised, X, np.arange(6, dtype=np.int32))
    assert met(found) == {
        "max(x, -30) of clip: a value below -30",
        "min(x, 20) of clip: a value above 20",
        "min(x, 6) of relu6: a value above 6",
        "min(x, 9): a value above 9",
        "where: a condition that is true",
        "round: a tie (a number and a half)",
        "rem of fmod: operands of different signs",
        "abs: a negative value",
        "comparison >: one that is true",
        "cond: a condition that is true",
        "max(x, 1e-06): a value below 1e-06",
        "max(x, -8): a value below -8",
    }
    assert all("in test_pair_branches.py:" in sentence for sentence in found)

    def exercised(p, x, i):
        # An index that is normalised, a softmax and a norm that guard themselves, and constants concern nobody.
        scores = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((4, 4), bool)), x[:, :4], -jnp.inf), -1)
        y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["w"]
        y = jax.nn.relu(x) + jnp.clip(x, -1, 1) + jax.nn.gelu(y) + jax.nn.logsumexp(x) + jax.nn.softplus(x)
        return scores @ y + jnp.where(jnp.ones(6) > 2, y, x) + y[:, i] + jnp.take(y, i, axis=1) + (i - 3) % 2

    assert flax_sentences(exercised, X, np.arange(6, dtype=np.int32)) == ()
    # The positive control of the last function: the very same operations, on values of one sign.
    assert "max(x, 0) of relu: a value below 0" in met(flax_sentences(exercised, X + 9, np.arange(6, dtype=np.int32)))


LINEAR = [("l.weight", "l.kernel", "o i -> i o"), ("l.bias", "l.bias")]


class Torch(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.l, self.function = torch.nn.Linear(6, 5), function

    def forward(self, x):
        return self.function(self.l(x))


class Flax(nnx.Module):
    def __init__(self, function, dtype=None):
        self.l, self.function = nnx.Linear(6, 5, dtype=dtype, rngs=nnx.Rngs(0)), function

    def __call__(self, x):
        return self.function(self.l(x))


def judged(torch_function, flax_function, dtype=None, **options):
    pair = {"torch_module": Torch(torch_function), "flax_module": Flax(flax_function, dtype), "params": LINEAR}
    return check_pair(**pair, inputs=((4, 6),), gradients=False, **options)


def test_a_lost_clamp_is_a_note_on_its_rows_until_wider_draws_reach_it(tmp_path):
    report = judged(lambda y: y.clamp(-30, 20), lambda y: y)
    report.assert_ok()
    notes = {(row.framework, row.mode): row.note for row in report.rows if row.rung == "forward"}
    assert "never met a value above 20" in notes["torch", ""]
    assert notes["jax", ""] == ""
    assert "torch: clamp(min=-30, max=20)" in notes["torch+jax", "truth"]
    assert "note: torch: clamp(min=-30, max=20)" in report.describe()
    report.to_json(tmp_path / "r.json")
    assert "above 20" in json.loads((tmp_path / "r.json").read_text())["rows"][-1]["note"]
    report.to_html(tmp_path / "r.html")
    assert "note: torch: clamp" in (tmp_path / "r.html").read_text()
    assert not judged(lambda y: y.clamp(-30, 20), lambda y: y, scale={0: 60.0}).ok
    report = judged(lambda y: y.clamp(-30, 20), lambda y: jnp.clip(y, -30, 20), scale=60.0)
    report.assert_ok()
    assert report.notes == ()


def test_parameters_of_one_sign_are_drawn_with_both_where_the_function_is_defined():
    def scaled(torch_function, flax_function, value):
        class Scaled(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = torch.nn.Parameter(torch.from_numpy(value.copy()))

            def forward(self, x):
                return x * torch_function(self.scale)

        pair = {"flax_module": lambda p, x: x * flax_function(p["scale"]), "flax_params": {"scale": value}}
        rules, inputs = [("scale", "scale")], ((4, 6),)
        return check_pair(torch_module=Scaled(), **pair, params=rules, inputs=inputs, gradients=False)

    several, single = np.ones(6, np.float32), np.full((), 0.5, np.float32)
    report = scaled(lambda scale: 1 * scale, lambda scale: scale, several)
    report.assert_ok()
    assert report.notes == ()
    assert not scaled(torch.abs, lambda scale: scale, several).ok
    assert not scaled(lambda scale: 1 * scale, lambda scale: jnp.clip(scale, 0.0), single).ok
    report = scaled(torch.log, jnp.log, several)
    report.assert_ok()
    assert "scale is drawn with the sign of its initial values: no side is finite with the other one" in report.notes
    # Behind a relu, the other sign of a single number would take everything away.
    report = scaled(torch.relu, jax.nn.relu, single)
    report.assert_ok()
    assert any("nothing depends on it with the other one" in note for note in report.notes)


@pytest.mark.parametrize(
    ("torch_function", "flax_function", "dtype", "note"),
    [
        (lambda y: y, lambda y: y.astype(jnp.float32), None, "flax returns y in float32 where bfloat16 is judged"),
        (lambda y: y.float(), lambda y: y, None, "torch returns y in float32 where bfloat16 is judged"),
        (lambda y: y, lambda y: y.astype(jnp.bfloat16), jnp.float32, "is judged: dot_general in float32"),
        (
            lambda y: y.float().tanh().to(y.dtype),
            jnp.tanh,
            None,
            "torch computes in another format than the bfloat16 that is judged",
        ),
    ],
)
def test_formats_wider_than_the_one_judged_in_are_notes(torch_function, flax_function, dtype, note):
    report = judged(torch_function, flax_function, dtype, dtypes=("bfloat16",))
    report.assert_ok()
    assert any(note in row.note for row in report.rows if row.dtype == "bfloat16" and row.tensor == "y")
    assert not any(note in row.note for row in report.rows if row.rung == "weights")
    assert any(note in found for found in report.notes)


def test_statistics_that_are_wider_inside_a_norm_are_none():
    x = X.astype(ml_dtypes.bfloat16)
    sides = TorchSide(torch.nn.LayerNorm(6)), JaxSide(nnx.LayerNorm(6, rngs=nnx.Rngs(0)))
    for side in sides:
        stored = {name: spec.value.astype(x.dtype) for name, spec in side.parameters((x,)).items()}
        assert side.wider_operations(stored, (x,), "bfloat16") == ()

    def norm(p, x):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt((wide**2).mean()) * p["w"]).astype(x.dtype)

    side = JaxSide(norm, initial={"w": np.ones(6, np.float32)})
    side.parameters((x,))
    found = side.wider_operations({"w": np.ones(6, x.dtype)}, (x,), "bfloat16")
    assert any(text.startswith("mul in float32 (test_pair_branches.py:") for text in found)


def test_the_other_format_of_16_bits_is_told():
    p, x = {"w": np.ones((6, 6), np.float16)}, X.astype(np.float16)
    functions = (
        lambda p, x: (x.bfloat16() @ p["w"].bfloat16()).half(),
        lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float16),
    )
    for make, function in zip((TorchSide, JaxSide), functions, strict=True):
        side = make(function, initial=p)
        side.parameters((x,))
        (found,) = side.wider_operations(p, (x,), "float16")
        assert "in bfloat16" in found
        same = make(lambda p, x: x @ p["w"], initial=p)
        same.parameters((x,))
        assert same.wider_operations(p, (x,), "float16") == ()


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 3.0)


def test_a_branch_of_a_backward_pass_of_ones_own_is_told():
    @jax.custom_vjp
    def sign(x):
        return jnp.sign(x)

    sign.defvjp(lambda x: (jnp.sign(x), x), lambda x, gradient: (gradient,))
    pair = {"torch_params": {"w": torch.ones(3)}, "flax_params": {"w": jnp.ones(3)}, "params": [("w", "w")]}
    x = np.linspace(-0.5, 0.6, 6, dtype=np.float32).reshape(2, 3)

    def judged(x, torch_side):
        return check_pair(**pair, torch_module=torch_side, flax_module=lambda p, x: sign(x) * p["w"], inputs=(x,))

    near = judged(x, lambda p, x: Sign.apply(x) * p["w"])
    assert near.ok
    assert any("comparison <= 3" in note for note in near.notes)
    assert not judged(10 * x, lambda p, x: Sign.apply(x) * p["w"]).ok
    # What torch derives by itself has no branches of the user's.
    assert not any("comparison" in note for note in judged(x, lambda p, x: torch.sign(x) * p["w"]).notes)


def test_turns_of_a_loop_are_one_place():
    def looped(x, threshold):
        total = x * 0.0
        for k in range(4):
            total = total + torch.where(x[k] > threshold, x[k], 2.0 * x[k])
        return total

    # Some turns have one branch only; all of them together have both, or not.
    assert not [note for note in torch_sentences(lambda p, x: looped(x, 0.5), X) if "where" in note]
    assert [note for note in torch_sentences(lambda p, x: looped(x, 1e6), X) if "where" in note]


def test_a_product_that_is_zero_everywhere_is_told():
    def overlap(p, x):
        inside = x.clamp(min=0.0)
        return inside[:, 0] * inside[:, 1] + p["w"].sum()

    apart = np.array([[1.0, -1.0], [-2.0, 3.0]], np.float32)
    (told,) = [note for note in torch_sentences(overlap, apart) if "product" in note]
    assert told.startswith("mul in test_pair_branches.py:")
    assert "never met a product other than zero" in told
    assert not [note for note in torch_sentences(overlap, abs(apart)) if "product" in note]
    (told,) = [n for n in torch_sentences(lambda p, x: x.clamp(min=0.0).prod(-1), apart) if "product" in n]
    assert told.startswith("prod in ")
    # A state that starts from zeros, and a mask, are nobody's branch.
    assert not [n for n in torch_sentences(lambda p, x: torch.zeros(2) * x * (x > 9).float(), apart) if "product" in n]
