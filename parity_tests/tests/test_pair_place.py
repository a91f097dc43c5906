"""Where two models part: the place in both models' names, proven by healing, whatever kind of model it is."""

import json
import os
import re

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import flax.linen
import jax
import jax.numpy as jnp
import torch
from flax import nnx

from parity_tests.pair import check_pair
from parity_tests.pair.localisation import first_operation
from parity_tests.pair.trace import Step, Trace

WIDTH = 6
DEPTH = 20 if "EVERY_TEST" in os.environ else 8


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.wide, self.act, self.out = torch.nn.Linear(WIDTH, 10), torch.nn.GELU(), torch.nn.Linear(10, WIDTH)

    def forward(self, x):
        return x + self.out(self.act(self.wide(self.norm(x))))


class Deep(torch.nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers, self.head = torch.nn.ModuleList(Block() for _ in range(depth)), torch.nn.Linear(WIDTH, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs, epsilon=1e-5, act=lambda x: jax.nn.gelu(x, approximate=False)):
        self.norm = nnx.LayerNorm(WIDTH, epsilon=epsilon, rngs=rngs)
        self.wide, self.out, self.act = nnx.Linear(WIDTH, 10, rngs=rngs), nnx.Linear(10, WIDTH, rngs=rngs), act

    def __call__(self, x):
        return x + self.out(self.act(self.wide(self.norm(x))))


class NnxDeep(nnx.Module):
    def __init__(self, depth, wrong=None):
        rngs, wrong = nnx.Rngs(0), wrong or {}
        self.layers = nnx.List([NnxBlock(rngs, **wrong.get(k, {})) for k in range(depth)])
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class LinenBlock(flax.linen.Module):
    epsilon: float = 1e-5

    @flax.linen.compact
    def __call__(self, x):
        h = flax.linen.LayerNorm(epsilon=self.epsilon, name="norm")(x)
        h = jax.nn.gelu(flax.linen.Dense(10, name="wide")(h), approximate=False)
        return x + flax.linen.Dense(WIDTH, name="out")(h)


class LinenDeep(flax.linen.Module):
    depth: int
    wrong: int

    @flax.linen.compact
    def __call__(self, x):
        for k in range(self.depth):
            x = LinenBlock(1e-6 if k == self.wrong else 1e-5, name=f"layers_{k}")(x)
        return flax.linen.Dense(3, name="head")(x)


class Stacked(nnx.Module):
    """Layers stacked into one, which a scan applies."""

    def __init__(self, depth):
        self.layers = nnx.vmap(NnxBlock, in_axes=0)(nnx.Rngs(0).split(depth))
        self.head = nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        forward = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(forward(x, self.layers))


def rules(depth, flax="layers.{k}."):
    found = [("head.weight", "head.kernel", "o i -> i o"), ("head.bias", "head.bias")]
    for k in range(depth):
        there = flax.format(k=k)
        found += [(f"layers.{k}.norm.weight", f"{there}norm.scale"), (f"layers.{k}.norm.bias", f"{there}norm.bias")]
        for name in ("wide", "out"):
            found += [
                (f"layers.{k}.{name}.weight", f"{there}{name}.kernel", "o i -> i o"),
                (f"layers.{k}.{name}.bias", f"{there}{name}.bias"),
            ]
    return found


def judged(depth, flax_module, params=None, **named):
    torch.manual_seed(0)
    original = named.pop("torch_module", None) or Deep(depth)
    report = check_pair(
        torch_module=original,
        flax_module=flax_module,
        params=params or rules(depth),
        inputs=named.pop("inputs", ((5, WIDTH),)),
        gradients=named.pop("gradients", False),
        **named,
    )
    assert not report.ok
    return report


def test_one_wrong_epsilon_among_many_layers_is_found_in_both_names(tmp_path):
    k = 2 * DEPTH // 3
    report = judged(DEPTH, NnxDeep(DEPTH, {k: {"epsilon": 1e-6}}))
    (place,) = report.places
    assert (place.torch, place.flax) == (f"layers.{k}.norm", f"layers[{k}].norm")
    assert place.healed == "all"
    assert place.after == (f"layers.{k - 1}", f"layers[{k - 1}]")
    assert place.torch_operations == ("native_layer_norm",)
    assert "rsqrt" in place.flax_operations
    assert report.likely_cause == "epsilon: the torch side uses 1e-05, the flax side behaves like 1e-06"
    text = report.describe()
    assert f"`layers.{k}.norm`" in text
    assert f"`layers[{k}].norm`" in text
    assert report.place in text
    report.to_json(tmp_path / "r.json")
    written = json.loads((tmp_path / "r.json").read_text())["pair"]
    assert written["place"] == report.place
    assert written["places"][0]["torch"] == f"layers.{k}.norm"
    states = {name: state for name, _, state in map(tuple, written["ladder"])}
    assert [states[f"layers.{k + d}.norm"] for d in (-1, 0, 1)] == ["agrees", "place", "differs"]
    report.to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    boxes = re.findall(r"<g><title>(\w+)</title>.*?>([^<>]+)</text>.*?>([^<>]+)</text></g>", page)
    assert ("place", f"layers.{k}.norm", f"layers[{k}].norm") in boxes
    assert [state for state, *_ in boxes].count("place") == 1


def test_two_faults_are_two_places_each_with_its_cause():
    report = judged(5, NnxDeep(5, {1: {"act": lambda x: x}, 3: {"epsilon": 1e-3}}))
    first, second = report.places
    assert (first.torch, first.healed) == ("layers.1.act", "here")
    assert first.cause.startswith("activation: gelu is missing on the flax side")
    assert (second.torch, second.flax, second.healed) == ("layers.3.norm", "layers[3].norm", "all")
    assert second.cause.startswith("epsilon:")
    # What differs only because of what came before has its counterpart once that is healed.
    assert report.unmatched == ("torch layers.1.act",)


@pytest.mark.every
def test_the_same_change_throughout_is_one_cause():
    report = judged(4, NnxDeep(4, {k: {"epsilon": 1e-6} for k in range(4)}))
    assert report.likely_cause == "epsilon: the torch side uses 1e-05, the flax side behaves like 1e-06"
    assert report.places[0].torch == "layers.0.norm"


def test_linen():
    report = judged(4, LinenDeep(4, 2), rules(4, "layers_{k}."))
    (place,) = report.places
    assert (place.torch, place.flax) == ("layers.2.norm", "layers_2.norm")
    assert report.likely_cause.startswith("epsilon:")


STACKED = {
    "norm.weight": ("norm.scale", "w -> 1 w"),
    "norm.bias": ("norm.bias", "w -> 1 w"),
    **{f"{name}.weight": (f"{name}.kernel", "o i -> 1 i o") for name in ("wide", "out")},
    **{f"{name}.bias": (f"{name}.bias", "w -> 1 w") for name in ("wide", "out")},
}


@pytest.mark.every
def test_layers_stacked_for_a_scan_are_told_apart():
    depth, odd = 3, Deep(3)
    odd.layers[1].norm.eps = 1e-3
    params = [("head.weight", "head.kernel", "o i -> i o"), ("head.bias", "head.bias")]
    for k in range(depth):
        params += [(f"layers.{k}.{a}", f"layers.{b}[{k}:{k + 1}]", axes) for a, (b, axes) in STACKED.items()]
    report = judged(depth, Stacked(depth), params, torch_module=odd)
    (place,) = report.places
    assert (place.torch, place.flax, place.healed) == ("layers.1.norm", "layers[1].norm", "all")
    assert report.likely_cause == "epsilon: the torch side uses 0.001, the flax side behaves like 1e-05"


@jax.custom_vjp
def halved(x):
    return jax.nn.gelu(x, approximate=False)


halved.defvjp(
    lambda x: (halved(x), x),
    lambda x, g: (0.5 * jax.vjp(lambda x: jax.nn.gelu(x, approximate=False), x)[1](g)[0],),
)


def test_the_backward_pass_has_places_too():
    report = judged(3, NnxDeep(3, {1: {"act": halved}}), gradients=True)
    assert report.first_failing_rung == "gradients"
    place = report.places[0]
    assert place.backward
    # Behind the derivative of gelu, where the other half is lost.
    assert place.torch == "layers.1.wide"
    assert place.flax == "layers[1].wide"
    assert place.after[0] == "layers.1.act"
    assert "in the backward pass" in report.place


def ported(parameters, x, wrong):
    h = jnp.tanh(x @ parameters["first"])
    h = jnp.tanh(h @ parameters["second"]) * (1.5 if wrong else 1.0)
    return h @ parameters["third"]


def original(parameters, x):
    h = torch.tanh(x @ parameters["first"])
    h = torch.tanh(h @ parameters["second"])
    return h @ parameters["third"]


def test_plain_functions_are_named_by_lines_and_parameters():
    arrays = {
        name: np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
        for name in ("first", "second", "third")
    }
    pair = {"torch_module": original, "params": [(name, name) for name in arrays], "inputs": ((4, WIDTH),)}
    report = judged(
        0, lambda p, x: ported(p, x, True), torch_params=arrays, flax_params=dict(arrays), gradients=False, **pair
    )
    (place,) = report.places
    assert place.healed == "all"
    assert place.torch_line.startswith("test_pair_place.py:")
    assert place.flax_line.startswith("test_pair_place.py:")
    assert "1.5 times" in report.likely_cause


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.attn, self.last = (
            torch.nn.Linear(8, 8),
            torch.nn.MultiheadAttention(8, 2, batch_first=True),
            torch.nn.Linear(8, 8),
        )

    def forward(self, x):
        x = self.first(x)
        return self.last(self.attn(x, x, x, need_weights=False)[0])


class SplitAttention(nnx.Module):
    def __init__(self, scale=None):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.attn, self.scale = nnx.Dict({name: nnx.Linear(8, 8, rngs=rngs) for name in ("q", "k", "v", "o")}), scale

    def __call__(self, x):
        x = self.first(x)
        q, k, v = (self.attn[name](x).reshape(*x.shape[:2], 2, 4) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (4**-0.5 if self.scale is None else self.scale)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)
        return self.last(self.attn["o"](mixed))


ATTENTION = [
    *((f"{name}.weight", f"{name}.kernel", "o i -> i o") for name in ("first", "last")),
    *((f"{name}.bias", f"{name}.bias") for name in ("first", "last")),
    *((f"attn.in_proj_weight[{8 * k}:{8 * k + 8}]", f"attn.{n}.kernel", "o i -> i o") for k, n in enumerate("qkv")),
    *((f"attn.in_proj_bias[{8 * k}:{8 * k + 8}]", f"attn.{n}.bias") for k, n in enumerate("qkv")),
    ("attn.out_proj.weight", "attn.o.kernel", "o i -> i o"),
    ("attn.out_proj.bias", "attn.o.bias"),
]


@pytest.mark.every
def test_fused_projections_against_split_ones():
    correct = {"torch_module": Attention(), "params": ATTENTION, "inputs": ((2, 5, 8),), "gradients": False}
    check_pair(flax_module=SplitAttention(), **correct).assert_ok()
    report = judged(0, SplitAttention(scale=1.0), **correct)
    (place,) = report.places
    assert place.torch == "attn"
    assert place.healed == "all"
    assert report.likely_cause.startswith("attention scale: the scores are 2 times as large")


@pytest.mark.usefixtures("quick_compilation")
def test_results_of_other_shapes_have_a_place_and_so_has_what_comes_before_a_branch_and_in_a_loop():
    torch_module = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    rules = [rule for k, name in enumerate("abc") for rule in ((f"{k}.weight", f"{name}w"), (f"{k}.bias", f"{name}b"))]
    arrays = {name: np.zeros((6, 6) if name.endswith("w") else 6, np.float32) for _, name in rules}

    def ported(p, x, kept=6, factor=1.0):
        x = x @ p["aw"].T + p["ab"]
        x = jax.lax.cond(x.shape[0] > jnp.sum(x * 0), lambda x: x[:, :kept] @ p["bw"][:, :kept].T, jnp.zeros_like, x)
        x = x[:, :kept] + factor * p["bb"][:kept]

        def turn(state):
            return state[0] + 1, state[1] @ p["cw"][:kept, :kept].T + p["cb"][:kept]

        return jax.lax.while_loop(lambda state: state[0] < 1, turn, (0, x))[1]

    def report(**wrong):
        pair = {"torch_module": torch_module, "flax_params": arrays, "params": rules, "inputs": ((3, 6),)}
        return check_pair(flax_module=lambda p, x: ported(p, x, **wrong), gradients=False, **pair)

    report().assert_ok()
    (place,) = report(factor=2.0).places
    assert place.torch == "1"
    assert place.healed == "all"
    shorter = report(kept=5)
    assert "(3, 6) on the torch side and (3, 5)" in shorter.likely_cause
    assert shorter.places[0].torch == "1"
    assert shorter.places[0].healed == ""


@pytest.mark.usefixtures("quick_compilation")
def test_a_table_with_other_numbers_is_a_cause_of_its_own():
    class Shifted(torch.nn.Module):
        def __init__(self, table):
            super().__init__()
            self.register_buffer("table", torch.as_tensor(table))

        def forward(self, x):
            return torch.tanh(x + self.table)

    table = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    other = table + np.float32(0.5) * (np.arange(12).reshape(3, 4) == 6)
    pair = {"torch_module": Shifted(table), "params": [], "inputs": ((2, 3, 4),), "not_compared": ("table",)}
    report = check_pair(flax_module=lambda p, x: jnp.tanh(x + other), flax_params={}, gradients=False, **pair)
    assert "table (3, 4)" in report.likely_cause
    assert f"{other[1, 2]:.6g} for {table[1, 2]:.6g} at [1, 2]" in report.likely_cause


def test_zeros_that_one_side_starts_from_are_no_place():
    steps = (Step("new_zeros", "", "", (), (0,)), Step("select", "", "", (1,), (2,)), Step("mul", "", "", (0, 2), (3,)))
    trace = Trace(steps, {}, {}, np.zeros((4, 5)), np.zeros((4, 5)), ((1,),) * 4)
    assert first_operation(trace, {0, 1, 2}) == 2
    assert first_operation(trace, {0}) == 0
