"""Causes of what one side selects otherwise: masks, rows of tables, layers left out, numbers used more than once."""

import math
import os

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import jax
import jax.numpy as jnp
import torch
from torch.nn import functional as F

from parity_tests.pair import check_pair

HEAVY = pytest.mark.skipif(not os.environ.get("EVERY_TEST"), reason="seconds of compilation; set EVERY_TEST=1")
S, D = 5, 4
APART = np.arange(S)[:, None] - np.arange(S)
WINDOW, WIDER = (APART >= 0) & (APART < 2), (APART >= 0) & (APART < 3)
LENGTHS = np.array([0, 2, 5], np.int32)
BUCKETS = np.clip(APART, -2, 1) + 2
OTHER_BUCKETS = np.clip(APART, -1, 2) + 1


def masked(p, x):
    keys = torch.arange(S)[None] < torch.as_tensor(LENGTHS)[:, None]
    scores = (x @ x.transpose(1, 2)).masked_fill(~keys[:, None], -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ (x * p["w"])


def masked_by_one_more(p, x):
    keys = (jnp.arange(S)[None] < LENGTHS[:, None] + 1)[:, None]
    return jax.nn.softmax(jnp.where(keys, x @ x.swapaxes(1, 2), -jnp.inf)) @ (x * p["w"])


def windowed(p, x):
    return F.scaled_dot_product_attention(x * p["w"], x, x, attn_mask=torch.as_tensor(WINDOW))


def windowed_wider(p, x):
    q, k = ((x * p["w"])[:, :, None], x[:, :, None])
    return jax.nn.dot_product_attention(q, k, k, mask=jnp.asarray(WIDER)[None, None])[:, :, 0]


def biased(p, x):
    return (x @ x.transpose(1, 2) + p["w"][torch.as_tensor(BUCKETS)]).softmax(-1) @ x


def biased_by(buckets):
    return lambda p, x: jax.nn.softmax(x @ x.swapaxes(1, 2) + p["w"][buckets]) @ x


def capped(p, x):
    return (5 * torch.tanh((x * p["w"]) @ x.transpose(1, 2) / 5)).softmax(-1) @ x


def capped_by_three(p, x):
    return jax.nn.softmax(3 * jnp.tanh((x * p["w"]) @ x.swapaxes(1, 2) / 3)) @ x


def sunk(p, x):
    sink = p["w"][:1].expand(3, S, 1)
    return torch.cat([x @ x.transpose(1, 2), sink], -1).softmax(-1)[..., :-1] @ (x * p["w"])


def without_sink(p, x):
    return jax.nn.softmax(x @ x.swapaxes(1, 2)) @ (x * p["w"])


def stepped(p, x):
    return F.softplus(x * p["w"]).cumsum(1)


def stepped_by_exp(p, x):
    return jnp.cumsum(jnp.exp(x * p["w"]), 1)


def looped(p, x):
    h, made = torch.zeros_like(x[:, 0]), []
    for t in range(S):
        h = torch.tanh(0.5 * h + x[:, t] * p["w"])
        made.append(h)
    return torch.stack(made, 1)


def looped_back(p, x):
    def turn(h, x):
        h = jnp.tanh(0.5 * h + x * p["w"])
        return h, h

    return jax.lax.scan(turn, jnp.zeros((3, D)), x.swapaxes(0, 1), reverse=True)[1].swapaxes(0, 1)


def rotated(p, x):
    turn = torch.polar(torch.ones_like(x), x)
    return (turn + turn * turn).real * p["w"]


def rotated_back(p, x):
    turn = jnp.exp(1j * x)
    return (turn - turn * turn).real * p["w"]


def iterated(turns):
    def run(p, x):
        z = x
        for _ in range(turns):
            z = 0.5 * z * (z + p["w"])
        return z

    return run


def highest(p, x):
    rows = x[0] * p["w"]
    return rows[rows.sum(-1).topk(3).indices].mean(0)


def highest_two(p, x):
    rows = x[0] * p["w"]
    return rows[jax.lax.top_k(rows.sum(-1), 2)[1]].mean(0)


def gated(p, x):
    y = (x * p["w"]).sin()
    return y.cos() * y


def gated_by_input(p, x):
    return jnp.cos(jnp.sin(x * p["w"])) * x


def gated_once_more(p, x):
    y = jnp.sin(x * p["w"])
    y = jnp.cos(y) * y
    return y * y[:, :, ::-1]


class Squash(torch.nn.Module):
    def forward(self, x):
        return x.sigmoid() * x / (1 + x.abs())


class Squashed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.squash, self.down, self.out = Squash(), *(torch.nn.Linear(D, D, bias=False) for _ in range(2))

    def forward(self, x):
        return self.out(self.squash(self.down(x)))


def not_squashed(p, x):
    return (x @ p["down"].T) @ p["out"].T


def judged(torch_side, flax_side, **named):
    w = np.linspace(0.5, 1.5, D).astype(np.float32)
    return check_pair(
        torch_module=torch_side,
        flax_module=flax_side,
        **{"params": [("w", "w")], "torch_params": {"w": torch.as_tensor(w)}, "flax_params": {"w": jnp.asarray(w)}}
        | named,
        inputs=((3, S, D),),
        gradients=False,
    )


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("torch_side", "flax_side", "words"),
    [
        (masked, masked_by_one_more, ("mask", "keeps 10 of 75 positions", "[0, 0, 0]")),
        pytest.param(windowed, windowed_wider, ("mask", "keeps 9 of 75 positions"), marks=HEAVY),
        (biased, biased_by(BUCKETS.T), ("order", "exchanged (transposed)")),
        (biased, biased_by(OTHER_BUCKETS), ("index", "other rows of w", "row 1 for row 2")),
        (capped, capped_by_three, ("constant", "by 5, the flax side by 3")),
        (sunk, without_sink, ("leaves out the last part",)),
        (looped, looped_back, ("loop over axis 1 of input 0", "reversed in time")),
        (iterated(3), iterated(2), ("turns", "some turns earlier")),
        (highest, highest_two, ("the 3 largest (topk), the flax side 2",)),
        (gated, gated_by_input, ("mul in test_pair_selections.py", "reads input 0", "not the result of sin")),
        (gated, gated_once_more, ("extra", "has the torch side's y too", "goes on with mul")),
        (stepped, stepped_by_exp, ("softplus, the flax side exp",)),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else None,
)
def test_what_one_side_selects_otherwise_is_named(torch_side, flax_side, words):
    report = judged(torch_side, flax_side)
    assert not report.ok
    for word in words:
        assert word in report.likely_cause


def test_a_sum_of_complex_numbers_has_a_place():
    # What could be meant by it, a mask for one, is asked of complex numbers too.
    assert "operations there: add / sub" in judged(rotated, rotated_back).place


def test_a_layer_that_is_left_out_is_named():
    original = Squashed()
    tree = {name: jnp.asarray(getattr(original, name).weight.detach().numpy()) for name in ("down", "out")}
    params = [("down.weight", "down"), ("out.weight", "out")]
    report = judged(original, not_squashed, params=params, torch_params=None, flax_params=tree)
    assert "out reads what squash reads" in report.likely_cause


def test_an_index_of_int64_that_a_program_captures_is_no_obstacle():
    # JAX keeps the format that it first gave to a captured array; float64 and float32 runs have different ones.
    for dtypes in (("float32", "float64"), ("float64", "float32")):
        judged(biased, biased_by(BUCKETS.copy()), dtypes=dtypes).assert_ok()


@HEAVY
def test_no_mask_is_named_where_values_differ_too():
    def otherwise(p, x):
        return masked_by_one_more(p, x * math.pi)

    assert "mask" not in judged(masked, otherwise).likely_cause
