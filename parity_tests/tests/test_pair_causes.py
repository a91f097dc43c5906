"""Porting mistakes planted one by one, each named at its place: in a transformer, a convolutional net and an LSTM.

A sample runs always, all of them with `--pair-families`.
"""

import re

import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from parity_tests.pair import check_pair

WIDTH, HEADS, DEPTH = 8, 2, 6
HEAD = WIDTH // HEADS


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.mix = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.wide, self.out, self.act = torch.nn.Linear(WIDTH, 12), torch.nn.Linear(12, WIDTH), torch.nn.GELU()

    def attend(self, x):
        q, k, v = (part.view(*x.shape[:2], HEADS, HEAD).transpose(1, 2) for part in self.qkv(x).split(WIDTH, dim=-1))
        scores = q @ k.transpose(-1, -2) / HEAD**0.5
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        return self.mix((weights @ v).transpose(1, 2).reshape(x.shape))

    def forward(self, x):
        x = x + self.attend(self.first(x))
        return x + self.out(self.act(self.wide(self.second(x))))


class Transformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(DEPTH))
        self.last, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last(x)).log_softmax(-1).mean(1)


class NnxLayer(nnx.Module):
    def __init__(self, rngs, bug=""):
        eps = 1e-6 if bug == "epsilon" else 1e-5
        self.first, self.second = (nnx.LayerNorm(WIDTH, epsilon=e, rngs=rngs) for e in (1e-5, eps))
        self.qkv, self.mix = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.wide, self.out = nnx.Linear(WIDTH, 12, rngs=rngs), nnx.Linear(12, WIDTH, rngs=rngs)
        self.bug = bug

    def heads(self, x):
        if self.bug == "head order":
            return x.reshape(*x.shape[:2], HEAD, HEADS).transpose(0, 3, 1, 2)
        return x.reshape(*x.shape[:2], HEADS, HEAD).transpose(0, 2, 1, 3)

    def attend(self, x):
        q, k, v = map(self.heads, jnp.split(self.qkv(x), 3, axis=-1))
        if self.bug == "key and value exchanged":
            k, v = v, k
        scores = q @ k.swapaxes(-1, -2)
        scores = scores if self.bug == "no attention scale" else scores / HEAD**0.5
        scores = scores / WIDTH**0.5 * HEAD**0.5 if self.bug == "attention scale of the width" else scores
        n = x.shape[1]
        mask = jnp.tri(n, n, {"mask off by one": 1, "mask off by one below": -1}.get(self.bug, 0), dtype=bool)
        scores = (
            scores
            if self.bug == "no mask"
            else jnp.where(mask, scores, -jnp.inf if self.bug != "mask off by one below" else -1e9)
        )
        weights = jax.nn.softmax(scores, axis=-2 if self.bug == "softmax axis" else -1)
        mixed = weights @ v
        merged = (
            mixed.reshape(x.shape)
            if self.bug == "heads merged without transpose"
            else mixed.transpose(0, 2, 1, 3).reshape(x.shape)
        )
        return self.mix(merged)

    def __call__(self, x):
        if self.bug == "post-norm":
            x = self.first(x + self.attend(x))
        elif self.bug == "missing residual":
            x = self.attend(self.first(x))
        else:
            x = x + self.attend(self.first(x))
        h = self.wide(self.second(x))
        if self.bug == "gelu form":
            h = jax.nn.gelu(h, approximate=True)
        elif self.bug == "relu":
            h = jax.nn.relu(h)
        elif self.bug != "missing activation":
            h = jax.nn.gelu(h, approximate=False)
        return x + self.out(h)


class NnxTransformer(nnx.Module):
    def __init__(self, bug=""):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([NnxLayer(rngs, bug if k == 3 else "") for k in range(DEPTH)])
        self.last, self.head, self.bug = (
            nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs),
            nnx.Linear(WIDTH, 5, rngs=rngs),
            bug,
        )

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        y = jax.nn.log_softmax(self.head(self.last(x)), axis=-1)
        y = y / jnp.log(2.0) if self.bug == "log base" else y
        return y.sum(1) if self.bug == "sum" else y.mean(1)


def linear(torch_name, flax_name):
    return [(f"{torch_name}.weight", f"{flax_name}.kernel", "o i -> i o"), (f"{torch_name}.bias", f"{flax_name}.bias")]


def norm(name, flax=None):
    return [(f"{name}.weight", f"{flax or name}.scale"), (f"{name}.bias", f"{flax or name}.bias")]


TRANSFORMER = [*norm("last"), *linear("head", "head")]
for number in range(DEPTH):
    for kind in ("first", "second"):
        TRANSFORMER += norm(f"layers.{number}.{kind}")
    for kind in ("qkv", "mix", "wide", "out"):
        TRANSFORMER += linear(f"layers.{number}.{kind}", f"layers.{number}.{kind}")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.second = torch.nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.pool = torch.nn.AvgPool2d(3, 2, padding=1)
        self.head = torch.nn.Linear(6 * 2 * 3, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = self.pool(torch.relu(self.second(x)))
        return self.head(x.flatten(1))


class NnxNet(nnx.Module):
    def __init__(self, bug="", train=False):
        rngs = nnx.Rngs(0)
        first = "SAME" if bug == "SAME with a stride" else ((1, 1), (1, 1))
        self.first = nnx.Conv(3, 4, (3, 3), 2, padding=first, rngs=rngs)
        training = (bug == "train for eval") != train
        self.norm = nnx.BatchNorm(
            4,
            use_running_average=not training,
            momentum=0.1 if bug == "momentum" else 0.9,
            epsilon=1e-3 if bug == "batch epsilon" else 1e-5,
            rngs=rngs,
        )
        dilation = 2 if bug == "dilation" else 1
        self.second = nnx.Conv(
            4, 6, (3, 3), padding=((dilation, dilation),) * 2, kernel_dilation=dilation, use_bias=False, rngs=rngs
        )
        self.head, self.bug = nnx.Linear(36, 5, rngs=rngs), bug

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.first(x)))
        if self.bug == "flipped kernel":
            flipped = self.second.kernel[...][::-1, ::-1]
            x = jax.lax.conv_general_dilated(
                x, flipped, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        else:
            x = self.second(x)
        x = x if self.bug == "missing relu" else jax.nn.relu(x)
        counted = self.bug != "count_include_pad"
        x = nnx.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=counted)
        x = x if self.bug == "channels-last flatten" else x.transpose(0, 3, 1, 2)
        return self.head(x.reshape(x.shape[0], -1))


CONVOLUTION = [
    ("first.weight", "first.kernel", "o i h w -> h w i o"),
    ("first.bias", "first.bias"),
    ("second.weight", "second.kernel", "o i h w -> h w i o"),
    *norm("norm"),
    ("norm.running_mean", "norm.mean"),
    ("norm.running_var", "norm.var"),
    *linear("head", "head"),
]


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = torch.nn.LSTM(4, 3, 2, batch_first=True), torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def recurrent(p, x, bug=""):
    for layer in range(2):
        w, u, b = p[f"w{layer}"], p[f"u{layer}"], p[f"b{layer}"]
        h = c = jnp.zeros((x.shape[0], 3), x.dtype)
        rows = []
        for t in range(x.shape[1]):
            gates = x[:, t] @ w + b + h @ u
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            if layer == 1 and bug == "gate order":
                f, g = g, f
            forget = jax.nn.sigmoid(f + 1.0) if layer == 1 and bug == "forget bias" else jax.nn.sigmoid(f)
            candidate = g if layer == 1 and bug == "missing tanh" else jnp.tanh(g)
            c = forget * c + jax.nn.sigmoid(i) * candidate
            h = jax.nn.sigmoid(o) * (c if layer == 1 and bug == "missing tanh of the cell" else jnp.tanh(c))
            rows.append(h)
        x = jnp.stack(rows, 1)
    return x @ p["head"] + p["last"]


LSTM = [
    *((f"lstm.weight_ih_l{k}", f"w{k}", "o i -> i o") for k in range(2)),
    *((f"lstm.weight_hh_l{k}", f"u{k}", "o i -> i o") for k in range(2)),
    *((f"lstm.bias_ih_l{k}", f"b{k}") for k in range(2)),
    *((f"lstm.bias_hh_l{k}", None, "0") for k in range(2)),
    ("head.weight", "head", "o i -> i o"),
    ("head.bias", "last"),
]
ARRAYS = {f"w{k}": (4 if k == 0 else 3, 12) for k in range(2)} | {f"u{k}": (3, 12) for k in range(2)}
ARRAYS |= {f"b{k}": (12,) for k in range(2)} | {"head": (3, 3), "last": (3,)}
# Model, mistake, words of the cause, and of the place on the torch side.
PLANTED = [
    (
        "transformer",
        "epsilon",
        "epsilon: the torch side uses 1e-05, the flax side behaves like 1e-06",
        "layers.3.second",
    ),
    ("transformer", "gelu form", "gelu:", "layers.3.act"),
    ("transformer", "relu", "activation: the torch side has gelu, the flax side relu", "layers.3.act"),
    ("transformer", "missing activation", "activation: gelu is missing", "layers.3.act"),
    ("transformer", "no attention scale", "scale: the flax side lacks this division of 2", "layers.3"),
    ("transformer", "attention scale of the width", "attention scale: the scores are 0.707", "layers.3"),
    ("transformer", "mask off by one", "mask: .*off by one", "layers.3"),
    ("transformer", "no mask", "without its mask", "layers.3"),
    ("transformer", "softmax axis", "softmax: .* axis 3, the flax side over axis 2", "layers.3"),
    ("transformer", "head order", "order|blocks", "layers.3"),
    ("transformer", "heads merged without transpose", "order", "layers.3"),
    ("transformer", "key and value exchanged", "blocks .* come in the order 0, 2, 1", "layers.3"),
    ("transformer", "post-norm", "post-norm", "layers.3.first"),
    ("transformer", "missing residual", "residual", "layers.3"),
    ("transformer", "log base", "logarithm|scale", ""),
    ("transformer", "sum", "reduction: the torch side takes a mean, the flax side a sum", ""),
    ("convolution", "SAME with a stride", "padding: .*SAME", "first"),
    ("convolution", "dilation", "dilation: the torch side uses 1, the flax side behaves like 2", "second"),
    ("convolution", "flipped kernel", "the kernel second.weight is flipped", "second"),
    ("convolution", "missing relu", "activation: relu is missing", ""),
    ("convolution", "count_include_pad", "count_include_pad", "pool"),
    ("convolution", "channels-last flatten", "order: head reads", "head"),
    ("convolution", "train for eval", "mode: .*train mode", "norm"),
    ("convolution", "batch epsilon", "epsilon", "norm"),
    ("convolution", "momentum", "momentum", None),
    ("lstm", "gate order", "blocks .*_l1", "lstm"),
    ("lstm", "forget bias", "constant|bias|flax side adds", "lstm"),
    ("lstm", "missing tanh", "activation: tanh is missing", "lstm"),
    ("lstm", "missing tanh of the cell", "activation: tanh is missing", "lstm"),
]
ALWAYS = {"SAME with a stride", "dilation", "count_include_pad", "channels-last flatten", "train for eval", "momentum"}
NAMED = 0.9  # of all


def judged(model, bug, flax_module=None):
    torch.manual_seed(0)
    given = {"gradients": False}
    if model == "transformer":
        given |= {"torch_module": Transformer(), "flax_module": NnxTransformer(bug), "params": TRANSFORMER}
        given |= {"inputs": ((3, 5, WIDTH),)}
    elif model == "convolution":
        train = bug == "momentum"
        given |= {
            "torch_module": Net().train(train),
            "flax_module": flax_module or NnxNet(bug, train),
            "params": CONVOLUTION,
        }
        given |= {"inputs": ((2, 3, 8, 10),), "input_patterns": {0: "b c h w -> b h w c"}}
        given |= {"not_compared": ("*num_batches_tracked",), "state": train}
    else:
        rng = np.random.default_rng(0)
        arrays = {name: rng.standard_normal(shape).astype(np.float32) / 2 for name, shape in ARRAYS.items()}
        given |= {"torch_module": Recurrent(), "params": LSTM, "flax_params": arrays}
        given |= {"flax_module": lambda p, x: recurrent(p, x, bug), "inputs": ((2, 2, 4),)}
    return check_pair(**given)


def is_named(report, words, place):
    found = report.places[0] if report.places else None
    return bool(re.search(words, report.likely_cause)) and (found is None or place is None or found.torch == place)


@pytest.mark.sample(2)
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("model", "bug", "words", "place"), [case for case in PLANTED if case[1] in ALWAYS], ids=lambda value: value or ""
)
def test_a_mistake_is_named_at_its_place(model, bug, words, place):
    report = judged(model, bug)
    assert not report.ok
    assert is_named(report, words, place), f"{report.likely_cause}; {report.place}"
    assert all(found.healed == "all" for found in report.places if report.first_failing_rung == "forward")


@pytest.mark.usefixtures("quick_compilation")
def test_nine_mistakes_of_ten_are_named(request):
    if not request.config.getoption("--pair-families"):
        pytest.skip("ten minutes: run with --pair-families")
    missed = []
    for model, bug, words, place in PLANTED:
        report = judged(model, bug)
        assert not report.ok
        if not is_named(report, words, place):
            missed.append((model, bug, report.likely_cause, report.place))
    assert len(missed) <= (1 - NAMED) * len(PLANTED), missed


@pytest.mark.usefixtures("quick_compilation")
def test_a_function_after_the_last_operation_is_named():
    """Torch has no operation there: Flax's result is put in the place of torch's, behind its views."""
    report = check_pair(
        torch_module=lambda p, x: (x @ p["w"]).T,
        flax_module=lambda p, x: jax.nn.softmax(x @ p["w"], -1).T,
        torch_params={"w": np.ones((6, 4), np.float32)},
        flax_params={"w": jnp.ones((6, 4))},
        params=[("w", "w")],
        inputs=((5, 6),),
        gradients=False,
    )
    assert "softmax over axis" in report.likely_cause  # of the transposed result
    assert [place.healed for place in report.places] == ["all"]


@pytest.mark.usefixtures("quick_compilation")
def test_a_norm_tried_in_the_other_mode_has_a_backward_pass():
    # Torch's native backward would read the moments that a norm in eval mode does not return, and end the process.
    def ported(p, x):
        return (x - p["mean"]) / jnp.sqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]

    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    report = check_pair(
        torch_module=torch.nn.BatchNorm1d(3).train(),
        flax_module=ported,
        flax_params={name: jnp.ones(3) for name in names.values()},
        params=list(names.items()),
        inputs=((5, 3),),
        not_compared=("*num_batches_tracked",),
        state=False,
    )
    assert report.likely_cause.startswith("mode: the torch side normalises by statistics of the batch (train mode)")


@pytest.mark.usefixtures("quick_compilation")
def test_what_no_hypothesis_explains_has_a_place_and_no_cause():
    class Odd(NnxNet):
        def __call__(self, x):
            x = self.second(jax.nn.relu(self.norm(self.first(x))))
            x = jax.nn.relu(x + 0.1 * jnp.sin(3 * x))
            x = nnx.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))).transpose(0, 3, 1, 2)
            return self.head(x.reshape(x.shape[0], -1))

    report = judged("convolution", "", Odd())
    assert report.likely_cause == ""
    assert "none of those tried" in report.headline
    (place,) = report.places
    assert place.healed == "all"
    assert place.torch_operations == ("relu",)
    assert {"sin", "max"} <= set(place.flax_operations)
    assert place.after == ("second", "second")


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("what", ["divergence", "edges", "mean"])
def test_what_stands_in_the_place_of_the_other_is_named(what):
    """A divergence with its arguments reversed; messages from the targets of edges to their sources; means for sums."""
    logits = {"torch": lambda p, x: x @ p["w"] / 3, "flax": lambda p, x: x @ p["w"] / 3}

    def divergence(p, x, t):
        own, other = logits["torch"](p, x).log_softmax(-1), (t / 3).softmax(-1)
        return torch.nn.functional.kl_div(own, other, reduction="batchmean")

    def reversed_(p, x, t):
        own, other = jax.nn.log_softmax(logits["flax"](p, x)), jax.nn.log_softmax(t / 3)
        return (jnp.exp(own) * (own - other)).sum(-1).mean()

    def messages(p, x, edges):
        return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]) @ p["w"]

    def backwards(p, x, edges):
        return jax.ops.segment_sum(x[edges[1]], edges[0], x.shape[0]) @ p["w"]

    def means(p, x, edges):
        total = jax.ops.segment_sum(x[edges[0]], edges[1], x.shape[0])
        return total / jnp.maximum(jnp.bincount(edges[1], length=x.shape[0]), 1)[:, None] @ p["w"]

    flax = {"divergence": reversed_, "edges": backwards, "mean": means}
    edges = np.array([[0, 1, 2, 3, 4, 0, 2], [1, 2, 0, 1, 3, 4, 4]])
    words = {
        "divergence": "input 1 .*|.* input 1 are exchanged",
        "edges": "rows of input 1 .* exchanged",
        "mean": "the mean",
    }
    report = check_pair(
        torch_module=divergence if what == "divergence" else messages,
        flax_module=flax[what],
        torch_params={"w": np.ones((6, 4), np.float32)},
        flax_params={"w": jnp.ones((6, 4))},
        params=[("w", "w")],
        inputs=((5, 6), (5, 4)) if what == "divergence" else lambda rng: (rng.normal(size=(5, 6)), edges),
        gradients=False,
    )
    assert re.search(words[what], report.likely_cause), report.likely_cause
