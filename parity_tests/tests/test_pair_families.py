"""Families of pairs beyond the examples: faithful ports hold, and the same pairs with a planted bug do not.

Masks, infinities, complex numbers, loops with float32 zeros, modules fixed to float32, tables, pools, epsilons that
follow the dtype, integers. A sample runs always, all of them with `--pair-families`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import flax.linen
import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from flax import nnx

from parity_tests.pair import check_pair

B, S, D = 2, 4, 4
BLOCK = (B, S, D)


@dataclass(frozen=True)
class Family:
    """A pair: `arguments` of `check_pair`, whether it holds, words of the report if not, whether a sample has it."""

    name: str
    arguments: dict[str, Any]
    holds: bool
    says: str = ""
    always: bool = True


FAMILIES: list[Family] = []


def pair(name, torch_side, flax_side, shapes, inputs, holds=True, says="", always=True, **options):
    """Two functions of the same parameters, drawn from the shapes."""
    rng = np.random.default_rng(0)
    arrays = {
        key: value if isinstance(value, np.ndarray) else rng.standard_normal(value).astype(np.float32)
        for key, value in shapes.items()
    }
    arguments = {
        "torch_module": torch_side,
        "flax_module": flax_side,
        "torch_params": arrays,
        "flax_params": arrays,
        "params": [(key, key) for key in arrays],
        "inputs": inputs,
        "name": name,
    }
    FAMILIES.append(Family(name, arguments | options, holds, says, always))


def modules(name, torch_module, flax_module, rules, inputs, holds=True, says="", always=True, **options):
    arguments = {"torch_module": torch_module, "flax_module": flax_module, "params": rules, "inputs": inputs}
    FAMILIES.append(Family(name, arguments | {"name": name} | options, holds, says, always))


def linear(torch_name, flax_name):
    return [(f"{torch_name}.weight", f"{flax_name}.kernel", "o i -> i o"), (f"{torch_name}.bias", f"{flax_name}.bias")]


# --- Masks and infinities ---------------------------------------------------------------------------------------------

QUERY = {"q": (D, D)}


def masked_by(rows):
    """Inputs and a mask of this many tokens in each row."""
    return lambda rng: (rng.standard_normal(BLOCK), np.arange(S) < np.asarray(rows)[:, None])


def scores(p, x):
    return (x @ p["q"]) @ jnp.swapaxes(x, -1, -2) * D**-0.5


def causal(p, x, diagonal=0):
    seen = jnp.tril(jnp.ones((S, S), bool), diagonal)
    return jax.nn.softmax(jnp.where(seen, scores(p, x), -jnp.inf), -1) @ x


def torch_causal(p, x):
    return F.scaled_dot_product_attention(x @ p["q"], x, x, is_causal=True)


def torch_filled(p, x, mask):
    s = (x @ p["q"]) @ x.mT * D**-0.5
    return s.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ x


def torch_safe(p, x, mask):
    return F.scaled_dot_product_attention(x @ p["q"], x, x, attn_mask=mask[:, None])


def filled(p, x, mask):
    return jax.nn.softmax(jnp.where(mask[:, None], scores(p, x), -jnp.inf), -1) @ x


def filled_with_least(p, x, mask):
    s = scores(p, x)
    return jax.nn.softmax(jnp.where(mask[:, None], s, jnp.finfo(s.dtype).min), -1) @ x


pair("causal", torch_causal, causal, QUERY, (BLOCK,))
pair(
    "causal in the other formats",
    torch_causal,
    causal,
    QUERY,
    (BLOCK,),
    dtypes=("bfloat16", "float64", "float16"),
    always=False,
)
pair(
    "causal by softmax(where=)",
    torch_causal,
    lambda p, x: jax.nn.softmax(scores(p, x), -1, where=jnp.tril(jnp.ones((S, S), bool))) @ x,
    QUERY,
    (BLOCK,),
    always=False,
)
pair(
    "causal, one diagonal too many", torch_causal, lambda p, x: causal(p, x, 1), QUERY, (BLOCK,), False, gradients=False
)
pair("boolean mask", torch_safe, filled, QUERY, masked_by([3, 4]), dtypes=("float32", "bfloat16"), always=False)
pair(
    "boolean mask by the least number",
    torch_filled,
    filled_with_least,
    QUERY,
    masked_by([3, 4]),
    dtypes=("float32", "float64"),
    always=False,
)
pair(
    "rows that see nothing, on both sides",
    torch_filled,
    filled,
    QUERY,
    masked_by([0, 4]),
    always=False,
    gradients=False,
)
pair(
    "rows that see nothing, on one side",
    torch_safe,
    filled,
    QUERY,
    masked_by([0, 4]),
    False,
    "is nan, expected 0.0: what is not finite has to be equal",
    gradients=False,
)
pair(
    "additive mask as an input",
    lambda p, x, m: (x @ p["q"] @ x.mT + m).softmax(-1) @ x,
    lambda p, x, m: jax.nn.softmax(x @ p["q"] @ jnp.swapaxes(x, -1, -2) + m, -1) @ x,
    QUERY,
    lambda rng: (rng.standard_normal(BLOCK), np.triu(np.full((S, S), -np.inf), 1)),
    always=False,
)
pair(
    "log of a mask",
    lambda p, x, m: (x @ p["q"] @ x.mT + torch.log(m[:, None].to(x.dtype))).softmax(-1),
    lambda p, x, m: jax.nn.softmax(x @ p["q"] @ jnp.swapaxes(x, -1, -2) + jnp.log(m[:, None].astype(x.dtype)), -1),
    QUERY,
    masked_by([3, 4]),
    always=False,
)


def torch_masked_maximum(p, x, mask):
    y = x @ p["q"]
    return y.masked_fill(~mask[..., None], float("-inf")).amax(1), y


def masked_maximum(p, x, mask, nothing=-jnp.inf):
    y = x @ p["q"]
    least = jnp.max(y, 1, where=mask[..., None], initial=-jnp.inf)
    return jnp.where(jnp.isfinite(least), least, nothing), y


def torch_masked_log_softmax(p, x, mask):
    return (x @ p["q"]).masked_fill(~mask[..., None], float("-inf")).log_softmax(1)


pair("maximum under a mask", torch_masked_maximum, masked_maximum, QUERY, masked_by([0, 3]), dtypes=("bfloat16",))
pair(
    "maximum of nothing, of another sign",
    torch_masked_maximum,
    lambda p, x, m: masked_maximum(p, x, m, jnp.inf),
    QUERY,
    masked_by([0, 3]),
    False,
    "in the masked places, inf on the flax side",
    gradients=False,
)
pair(
    "log-softmax under a mask",
    torch_masked_log_softmax,
    lambda p, x, m: jax.nn.log_softmax(x @ p["q"], 1, where=m[..., None]),
    QUERY,
    masked_by([2, 3]),
)
pair(
    "a maximum after a product and a sum",
    lambda p, x: ((x @ p["q"]) * p["g"] + p["b"]).amax(1),
    lambda p, x: jnp.max((x @ p["q"]) * p["g"] + p["b"], 1),
    {"q": (8, 8), "g": (8,), "b": (8,)},
    ((3, 7, 8),),
)
pair(
    "a gradient that is NaN on one side",
    lambda p, x: torch.where(x > 0, torch.sqrt(torch.where(x > 0, x, 1.0)), 0.0) * p["w"],
    lambda p, x: jnp.where(x > 0, jnp.sqrt(x), 0.0) * p["w"],
    {"w": (D,)},
    ((4, D),),
    False,
    "is nan, expected 0.0: what is not finite has to be equal on both sides",
)
pair(
    "a gradient that is NaN on both",
    lambda p, x: torch.where(x > 0, torch.sqrt(x), 0.0) * p["w"],
    lambda p, x: jnp.where(x > 0, jnp.sqrt(x), 0.0) * p["w"],
    {"w": (D,)},
    ((4, D),),
    always=False,
)
pair(
    "rounding decides what is finite",
    lambda p, x: (x @ p["q"], torch.acos(x / (x * p["w"] / p["w"]))),
    lambda p, x: (x @ p["q"], jnp.arccos(x / (x * p["w"] / p["w"]))),
    {"q": (D, D), "w": (D,)},
    ((4, D),),
    False,
    "UNDECIDED: y.1[0, 0] cannot be judged: rounding alone decides",
    gradients=False,
)


def torch_single_precision_only(p, x):
    assert x.dtype == torch.float32, "this kernel is written for float32"
    return x @ p["q"]


def torch_with_a_fast_path(p, x):
    return x @ p["q"] if torch.is_grad_enabled() else 2 * (x @ p["q"])


pair(
    "no truth in float64",
    torch_single_precision_only,
    lambda p, x: x @ p["q"],
    QUERY,
    ((3, D),),
    False,
    "no truth in float64: UNDECIDED: the torch side has no float64 truth, so that there is nothing to judge by: "
    "AssertionError: this kernel is written for float32; ",
)
pair(
    "another function for inference",
    torch_with_a_fast_path,
    lambda p, x: x @ p["q"],
    QUERY,
    ((3, D),),
    False,
    "y is another function on the torch side where no gradient is asked for (a fast path)",
)
pair(
    "numbers that a format cannot hold",
    lambda p, x, m: (x @ p["q"] + m).softmax(-1),
    lambda p, x, m: jax.nn.softmax(x @ p["q"] + m, -1),
    QUERY,
    lambda rng: (rng.standard_normal((3, D)), np.where(np.arange(D) < 2, 0.0, -1e9)),
    says="float16 cannot hold all numbers of input1: they are infinite in it",
    dtypes=("float16",),
    gradients=False,
)


class TorchEncoder(torch.nn.Module):
    def __init__(self, padded=False):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True)
        self.e, self.padded = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), padded

    def forward(self, x, hidden):
        if self.padded:
            return self.e(x, src_key_padding_mask=hidden)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(S).to(x.dtype)
        return self.e(x, mask=mask, is_causal=True)


class Encoder(nnx.Module):
    def __init__(self, padded=False, epsilon=1e-5):
        rngs = nnx.Rngs(0)
        self.a = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.l1, self.l2 = nnx.Linear(D, 8, rngs=rngs), nnx.Linear(8, D, rngs=rngs)
        self.n1, self.n2 = (nnx.LayerNorm(D, epsilon=epsilon, rngs=rngs) for _ in range(2))
        self.padded = padded

    def __call__(self, x, hidden):
        mask = ~hidden[:, None, None] if self.padded else jnp.tril(jnp.ones((S, S), bool))[None, None]
        x = self.n1(x + self.a(x, mask=mask))
        return self.n2(x + self.l2(jax.nn.relu(self.l1(x))))


ENCODER = [
    *(
        rule
        for k, name in enumerate(("query", "key", "value"))
        for rule in (
            (f"e.layers.0.self_attn.in_proj_weight[{D * k}:{D * k + D}]", f"a.{name}.kernel", "(h d) i -> i h d"),
            (f"e.layers.0.self_attn.in_proj_bias[{D * k}:{D * k + D}]", f"a.{name}.bias", "(h d) -> h d"),
        )
    ),
    ("e.layers.0.self_attn.out_proj.weight", "a.out.kernel", "o (h d) -> h d o"),
    ("e.layers.0.self_attn.out_proj.bias", "a.out.bias"),
    *linear("e.layers.0.linear1", "l1"),
    *linear("e.layers.0.linear2", "l2"),
    *((f"e.layers.0.norm{k}.weight", f"n{k}.scale") for k in (1, 2)),
    *((f"e.layers.0.norm{k}.bias", f"n{k}.bias") for k in (1, 2)),
]
HIDDEN = lambda rng: (rng.standard_normal(BLOCK), np.arange(S) >= np.asarray([[3], [4]]))  # noqa: E731
modules(
    "encoder, causal", TorchEncoder().eval(), Encoder(), ENCODER, HIDDEN, dtypes=("float32", "bfloat16"), always=False
)
modules("encoder, padded", TorchEncoder(True).eval(), Encoder(True), ENCODER, HIDDEN, always=False)
modules(
    "encoder, epsilon",
    TorchEncoder().eval(),
    Encoder(epsilon=1e-6),
    ENCODER,
    HIDDEN,
    False,
    "the flax side behaves like 1e-06",
    always=False,
)

# --- Formats that a module fixes, constants, tables -------------------------------------------------------------------


class TorchEmbedded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.n = torch.nn.Embedding(11, D), torch.nn.LayerNorm(D, eps=1e-5)

    def forward(self, tokens):
        return F.gelu(self.n(self.e(tokens) * math.sqrt(D) / 0.7), approximate="tanh") / 0.3


class Embedded(nnx.Module):
    """Fixed to float32 throughout, as many Flax models are."""

    def __init__(self, epsilon=1e-5, divisor=0.3):
        self.e = nnx.Embed(11, D, dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.n = nnx.LayerNorm(D, epsilon=epsilon, dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.divisor = divisor

    def __call__(self, tokens):
        return jax.nn.gelu(self.n(self.e(tokens) * math.sqrt(D) / 0.7), approximate=True) / self.divisor


EMBEDDED = [("e.weight", "e.embedding"), ("n.weight", "n.scale"), ("n.bias", "n.bias")]
TOKENS = lambda rng: (rng.integers(0, 11, (2, 5)),)  # noqa: E731
modules("fixed to float32", TorchEmbedded(), Embedded(), EMBEDDED, TOKENS, gradients=False)
modules(
    "fixed to float32, another epsilon",
    TorchEmbedded(),
    Embedded(epsilon=1e-6),
    EMBEDDED,
    TOKENS,
    False,
    "the flax side behaves like 1e-06",
    always=False,
    gradients=False,
)
modules(
    "fixed to float32, another constant",
    TorchEmbedded(),
    Embedded(divisor=0.3000001),
    EMBEDDED,
    TOKENS,
    False,
    "",
    always=False,
    gradients=False,
)
pair(
    "a constant rounded to bfloat16",
    lambda p, x: x @ p["q"] * 0.1,
    lambda p, x: x @ p["q"] * np.float32(0.10009766),
    QUERY,
    ((4, D),),
    False,
    "the flax side is 1.00098 times",
    gradients=False,
    always=False,
)
pair(
    "a constant rounded to float32",
    lambda p, x: x @ p["q"] * 0.1,
    lambda p, x: x @ p["q"] * np.float32(0.1),
    QUERY,
    ((4, D),),
    False,
    "rounds a constant",
    gradients=False,
)

TABLE = np.linspace(0, 1, D, dtype=np.float32) * np.float32(0.7)
WRONG = TABLE + np.asarray([0, 0, 0, 3e-6], np.float32)
TORCH_TABLE = torch.linspace(0, 1, D) * 0.7
pair(
    "captured tables",
    lambda p, x: x @ p["q"] * TORCH_TABLE,
    lambda p, x: x @ p["q"] * TABLE,
    QUERY,
    ((4, D),),
    dtypes=("float32", "bfloat16"),
)
pair(
    "captured tables, one number off",
    lambda p, x: x @ p["q"] * TORCH_TABLE,
    lambda p, x: x @ p["q"] * WRONG,
    QUERY,
    ((4, D),),
    False,
    "times the bound",
    gradients=False,
)


BASE = 3.0  # of angles that have no exact numbers


class TorchRotary(torch.nn.Module):
    def __init__(self, length=200):
        super().__init__()
        self.q = torch.nn.Linear(D, D)
        angles = torch.outer(torch.arange(length).float(), 1.0 / BASE ** (torch.arange(0, D, 2).float() / D))
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def forward(self, x):
        x, n = self.q(x), x.shape[1]
        turned = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
        return x * self.cos[:n] + turned * self.sin[:n]


class Rotary(nnx.Module):
    def __init__(self, base=BASE, first=0):
        self.q, self.base, self.first = nnx.Linear(D, D, rngs=nnx.Rngs(0)), base, first

    def __call__(self, x):
        x, n = self.q(x), x.shape[1]
        angles = jnp.outer(jnp.arange(n) + self.first, 1.0 / self.base ** (jnp.arange(0, D, 2) / D))
        angles = jnp.concatenate([angles, angles], -1)
        turned = jnp.concatenate([-x[..., D // 2 :], x[..., : D // 2]], -1)
        return x * jnp.cos(angles) + turned * jnp.sin(angles)


class TorchRotaryComplex(TorchRotary):
    def __init__(self, length=200):
        super().__init__(length)
        self.register_buffer("cis", torch.complex(self.cos, self.sin)[:, : D // 2].clone())
        del self.cos, self.sin

    def forward(self, x):
        z = torch.view_as_complex(self.q(x).float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * self.cis[: x.shape[1]]).flatten(-2)


class RotaryComplex(Rotary):
    def __call__(self, x):
        y = self.q(x).reshape(*x.shape[:-1], -1, 2)
        angles = jnp.outer(jnp.arange(x.shape[1]), 1.0 / self.base ** (jnp.arange(0, D, 2) / D))
        z = jax.lax.complex(y[..., 0], y[..., 1]) * jnp.exp(1j * angles)
        return jnp.stack([z.real, z.imag], -1).reshape(x.shape)


TURNED = ((1, 200, D),)  # far from the start a table errs by more than one rounding: its angles do
modules("rotary table against a computed one", TorchRotary(), Rotary(), linear("q", "q"), TURNED, gradients=False)
modules(
    "rotary table, another base",
    TorchRotary(),
    Rotary(base=2.9999),
    linear("q", "q"),
    TURNED,
    False,
    "times the bound",
    always=False,
    gradients=False,
)
modules(
    "rotary table, shifted by one",
    TorchRotary(),
    Rotary(first=1),
    linear("q", "q"),
    TURNED,
    False,
    "times the bound",
    gradients=False,
    always=False,
)
modules(
    "rotary table, other formats",
    TorchRotary(),
    Rotary(),
    linear("q", "q"),
    ((2, 6, D),),
    dtypes=("bfloat16", "float64"),
    always=False,
)
modules("complex rotary table", TorchRotaryComplex(), RotaryComplex(), linear("q", "q"), TURNED, always=False)
pair(
    "no parameters, in float64",
    lambda p, x: F.gelu(x),
    lambda p, x: jax.nn.gelu(x, approximate=False),
    {},
    ((4, D),),
    dtypes=("float64",),
    gradients=False,
)

# --- Loops ------------------------------------------------------------------------------------------------------------


class TorchRecurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(D, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(x * 0.3)[0]


class Recurrent(nnx.Module):
    """Starts from float32 zeros of its own."""

    def __init__(self, factor=0.3, given=False):
        self.lstm, self.factor, self.given = nnx.RNN(nnx.OptimizedLSTMCell(D, 3, rngs=nnx.Rngs(0))), factor, given

    def __call__(self, x):
        zeros = jnp.zeros((x.shape[0], 3), x.dtype)
        return self.lstm(x * self.factor, **({"initial_carry": (zeros, zeros)} if self.given else {}))


LSTM = [
    ("lstm.weight_ih_l0", "lstm.cell.dense_i.kernel", "o i -> i o"),
    ("lstm.weight_hh_l0", "lstm.cell.dense_h.kernel", "o i -> i o"),
    ("lstm.bias_hh_l0", "lstm.cell.dense_h.bias"),
    ("lstm.bias_ih_l0", None, "0"),
]
modules("a loop with zeros of its own", TorchRecurrent(), Recurrent(), LSTM, ((2, 3, D),), gradients=False)
modules("a loop with zeros of its own, and gradients", TorchRecurrent(), Recurrent(), LSTM, ((2, 3, D),), always=False)
modules(
    "a loop with another constant",
    TorchRecurrent(),
    Recurrent(0.3000001),
    LSTM,
    ((2, 3, D),),
    False,
    "",
    gradients=False,
    always=False,
)
modules(
    "a loop in float64, one bias at zero",
    TorchRecurrent(),
    Recurrent(given=True),
    LSTM,
    ((2, 3, D),),
    always=False,
    gradients=False,
    dtypes=("float64",),
)


def torch_loop(p, x):
    carry = torch.zeros(D)
    for row in x:
        carry = torch.tanh(carry * 0.9 + row @ p["q"])
    return carry


def loop(p, x, factor=0.9):
    # NumPy's zeros are float32 whatever a module is asked for: no trace in float64 can start from them.
    return jax.lax.scan(lambda c, row: (jnp.tanh(c * factor + row @ p["q"]), None), np.zeros(D, np.float32), x)[0]


pair("a loop that cannot be traced in float64", torch_loop, loop, QUERY, ((3, D),), gradients=False)
pair(
    "the same with another constant",
    torch_loop,
    lambda p, x: loop(p, x, 0.90001),
    QUERY,
    ((3, D),),
    False,
    "",
    gradients=False,
)


class TorchGated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.g = torch.nn.GRU(D, 3, batch_first=True)

    def forward(self, x):
        return self.g(x)[0]


GRU = [
    rule
    for k, gate in enumerate("rzn")
    for rule in (
        (f"g.weight_ih_l0[{3 * k}:{3 * k + 3}]", f"cell.i{gate}.kernel", "o i -> i o"),
        (f"g.weight_hh_l0[{3 * k}:{3 * k + 3}]", f"cell.h{gate}.kernel", "o i -> i o"),
        (f"g.bias_ih_l0[{3 * k}:{3 * k + 3}]", f"cell.i{gate}.bias"),
    )
] + [("g.bias_hh_l0[0:6]", None, "0"), ("g.bias_hh_l0[6:]", "cell.hn.bias")]
modules("a loop of linen's", TorchGated(), flax.linen.RNN(flax.linen.GRUCell(3)), GRU, ((2, 3, D),), always=False)

# --- Complex numbers --------------------------------------------------------------------------------------------------


class TorchSpectral(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(3, 2, 3, dtype=torch.cfloat))

    def forward(self, x):
        spectrum = torch.fft.rfft(x)
        return torch.fft.irfft(torch.einsum("bim,iom->bom", spectrum[..., :3], self.w), n=x.shape[-1])


class Spectral(nnx.Module):
    def __init__(self, conjugated=False):
        self.w, self.conjugated = nnx.Param(jnp.ones((3, 2, 3), jnp.complex64)), conjugated

    def __call__(self, x):
        w = jnp.conj(self.w[...]) if self.conjugated else self.w[...]
        return jnp.fft.irfft(jnp.einsum("bim,iom->bom", jnp.fft.rfft(x)[..., :3], w), n=x.shape[-1])


KERNEL = {"w": np.ones((4, 3), np.complex64)}


def complex_inputs(rng):
    return (rng.standard_normal((5, 4)) + 1j * rng.standard_normal((5, 4)),)


@jax.custom_vjp
def product_with_a_wrong_gradient(x, w):
    return x @ w


product_with_a_wrong_gradient.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, jnp.conj(kept[0].T @ g))
)

modules("a spectral layer", TorchSpectral(), Spectral(), [("w", "w")], ((2, 3, 9),), dtypes=("float32",))
modules(
    "a spectral layer, conjugated",
    TorchSpectral(),
    Spectral(True),
    [("w", "w")],
    ((2, 3, 9),),
    False,
    "times the bound",
    gradients=False,
)
pair(
    "a spectrum as the output",
    lambda p, x: torch.fft.rfft(x @ p["q"]),
    lambda p, x: jnp.fft.rfft(x @ p["q"]),
    QUERY,
    ((3, D),),
    says="",
)
pair(
    "a spectrum, conjugated",
    lambda p, x: torch.fft.rfft(x @ p["q"]),
    lambda p, x: jnp.conj(jnp.fft.rfft(x @ p["q"])),
    QUERY,
    ((3, D),),
    False,
    "conjugate: the result of _fft_r2c is its complex conjugate on the flax side",
    gradients=False,
)
pair(
    "a spectrum, otherwise normalised",
    lambda p, x: torch.fft.rfft(x @ p["q"], norm="ortho").abs(),
    lambda p, x: jnp.abs(jnp.fft.rfft(x @ p["q"])),
    QUERY,
    ((3, D),),
    False,
    "times the bound",
    gradients=False,
    always=False,
)
pair(
    "complex inputs and parameters",
    lambda p, x: x @ p["w"],
    lambda p, x: x @ p["w"],
    KERNEL,
    complex_inputs,
    dtypes=("float32", "float64"),
    always=False,
)
pair(
    "a complex gradient that is conjugated",
    lambda p, x: x @ p["w"],
    lambda p, x: product_with_a_wrong_gradient(x, p["w"]),
    KERNEL,
    complex_inputs,
    False,
    "d_w: the flax side is the complex conjugate",
)

# --- Pools, activations, norms ----------------------------------------------------------------------------------------

IMAGES = {
    "input_patterns": {0: "b c h w -> b h w c"},
    "output_patterns": {"y": "b c h w -> b h w c"},
    "inputs": ((2, 2, 7, 7),),
}


def pool(name, torch_side, flax_side, holds=True, **options):
    """The pool alone, so that its own backward is all that is rounded."""
    pair(name, lambda p, x: torch_side(x), lambda p, x: flax_side(x), {}, **IMAGES, holds=holds, **options)


pool("overlapping maxima", lambda x: F.max_pool2d(x, 3, 1), lambda x: nnx.max_pool(x, (3, 3), (1, 1)))
pool(
    "overlapping maxima, padded",
    lambda x: F.max_pool2d(x, 3, 2, padding=1),
    lambda x: nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1))),
    dtypes=("bfloat16", "float64"),
    always=False,
)
pool(
    "means for maxima",
    lambda x: F.max_pool2d(x, 3, 2),
    lambda x: nnx.avg_pool(x, (3, 3), (2, 2)),
    False,
    gradients=False,
    always=False,
)
pool(
    "means that count the padding",
    lambda x: F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False),
    lambda x: nnx.avg_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1))),
    False,
    gradients=False,
    always=False,
)
pool(
    "resampling",
    lambda x: F.interpolate(x, size=(11, 13), mode="bilinear"),
    lambda x: jax.image.resize(x, (2, 11, 13, 2), "bilinear"),
    always=False,
)


def rms(epsilon=None):
    def norm(p, x):
        e = jnp.finfo(x.dtype).eps if epsilon is None else epsilon
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + e) * p["w"]

    return norm


pair(
    "an epsilon of the dtype's",
    lambda p, x: F.rms_norm(x, (D,), p["w"]),
    rms(),
    {"w": (D,)},
    ((4, D),),
)
pair(
    "an epsilon of float32's in bfloat16",
    lambda p, x: F.rms_norm(x, (D,), p["w"]),
    rms(2.0**-23),
    {"w": (D,)},
    ((4, D),),
    dtypes=("bfloat16",),
    always=False,
)
pair(
    "another epsilon than the dtype's",
    lambda p, x: F.rms_norm(x, (D,), p["w"]),
    rms(1e-6),
    {"w": (D,)},
    ((4, D),),
    False,
    "times the bound",
    gradients=False,
)
pair(
    "hard sigmoid",
    lambda p, x: F.hardsigmoid(x @ p["q"]),
    lambda p, x: jax.nn.hard_sigmoid(x @ p["q"]),
    QUERY,
    ((4, D),),
)
pair("celu", lambda p, x: F.celu(x @ p["q"], 0.7), lambda p, x: jax.nn.celu(x @ p["q"], 0.7), QUERY, ((4, D),))
pair(
    "celu, another alpha",
    lambda p, x: F.celu(x @ p["q"], 0.7),
    lambda p, x: jax.nn.celu(x @ p["q"], 0.7000001),
    QUERY,
    ((4, D),),
    False,
    "",
    gradients=False,
)

# --- Integers ---------------------------------------------------------------------------------------------------------


def torch_counts(p, x, m):
    ids = torch.cumsum(m.long(), 1) * m
    return (p["e"][ids] * m[..., None]).sum(1) / m.sum(1, keepdim=True), ids, m.sum()


def counts(p, x, m, first=0):
    ids = jnp.cumsum(m.astype(jnp.int32), 1) * m + first
    return (p["e"][ids] * m[..., None]).sum(1) / m.sum(1, keepdims=True), ids, m.sum()


pair("sums of integers and booleans", torch_counts, counts, {"e": (S + 2, D)}, masked_by([2, 3]))
pair(
    "position ids that start elsewhere",
    torch_counts,
    lambda p, x, m: counts(p, x, m, 1),
    {"e": (S + 2, D)},
    masked_by([2, 3]),
    False,
    "",
    gradients=False,
    always=False,
)


class TorchCache(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.k = torch.nn.Linear(D, D)
        self.register_buffer("cache", torch.zeros(B, S, D))
        self.register_buffer("index", torch.tensor(2))

    def forward(self, x):
        cache = self.cache.clone()
        cache[:, self.index] = self.k(x)
        self.cache, self.index = cache, self.index + 1
        seen = torch.arange(S) < self.index
        return ((x[:, None] @ cache.mT).masked_fill(~seen, float("-inf")).softmax(-1) @ cache)[:, 0]


class Cache(nnx.Module):
    def __init__(self, step=1):
        self.k, self.step = nnx.Linear(D, D, rngs=nnx.Rngs(0)), step
        self.cache, self.index = nnx.Cache(jnp.zeros((B, S, D))), nnx.Cache(jnp.asarray(2, jnp.int32))

    def __call__(self, x):
        index = self.index[...]
        cache = jax.lax.dynamic_update_slice(self.cache[...], self.k(x)[:, None], (0, index, 0))
        self.cache[...], self.index[...] = cache, index + self.step
        weights = jnp.where(jnp.arange(S) <= index, x[:, None] @ jnp.swapaxes(cache, 1, 2), -jnp.inf)
        return (jax.nn.softmax(weights, -1) @ cache)[:, 0]


CACHE = [*linear("k", "k"), ("cache", "cache"), ("index", "index")]
modules("a cache with an integer beside it", TorchCache(), Cache(), CACHE, ((B, D),))
modules(
    "a cache that moves on by two",
    TorchCache(),
    Cache(2),
    CACHE,
    ((B, D),),
    False,
    "state:index[] is 4, expected 3",
    gradients=False,
    always=False,
)

# --- Formats of results, causes ---------------------------------------------------------------------------------------

pair(
    "a result returned in float16",
    lambda p, x: torch.tanh(x @ p["q"]),
    lambda p, x: jnp.tanh(x @ p["q"]).astype(jnp.float16),
    QUERY,
    ((4, D),),
    False,
    "the flax side computes y with less precision than float32 promises",
)
pair(
    "an output that agrees beside one that does not",
    lambda p, x: (x @ p["q"], (x @ p["q"]).argmax(-1)),
    lambda p, x: (x @ p["q"], (x @ p["q"]).argmin(-1)),
    QUERY,
    ((4, D),),
    False,
    "likely cause: none of those tried",
)
pair(
    "another loss",
    lambda p, x: (x @ p["q"]).square().mean(),
    lambda p, x: jnp.abs(x @ p["q"]).mean(),
    QUERY,
    ((4, D),),
    False,
    "function: the torch side has pow, the flax side absolute",
)
pair(
    "a loss that is summed",
    lambda p, x: (x @ p["q"]).square().mean(),
    lambda p, x: jnp.square(x @ p["q"]).sum(),
    QUERY,
    ((4, D),),
    False,
    "the torch side takes a mean, the flax side a sum",
)
modules(
    "a slope with one axis and without",
    torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.PReLU()),
    nnx.Sequential(nnx.Linear(D, D, rngs=nnx.Rngs(0)), nnx.PReLU()),
    [*linear("0", "layers.0"), ("1.weight", "layers.1.negative_slope", "1 ->")],
    ((4, D),),
)


def test_rearranging_arrays_is_exact():
    function = lambda p, x: jnp.stack([*x, p["q"][0]])  # noqa: E731
    arrays = {"q": np.ones((1, D), np.float32)}
    report = check_pair(
        torch_module=lambda p, x: torch.stack([*x, p["q"][0]]),
        flax_module=function,
        torch_params=arrays,
        flax_params=arrays,
        params=[("q", "q")],
        inputs=((2, D),),
    )
    assert report.ok
    assert not any("rounding model" in note for note in report.notes), report.notes


def test_a_numpy_constant_of_the_code_is_used_in_every_format():
    """JAX remembers the float64 that a constant was converted to, in a function of its own as well."""
    table = np.array([1.0, 2.0, 0.3, 3.0])
    inner = jax.jit(lambda x: table * x)
    arrays = {"q": np.ones((D, 4), np.float32)}
    report = check_pair(
        torch_module=lambda p, x: (
            torch.as_tensor(table, dtype=x.dtype) * (torch.as_tensor(table, dtype=x.dtype) * (x @ p["q"]))
        ),
        flax_module=lambda p, x: table * inner(x @ p["q"]),
        torch_params=arrays,
        flax_params=arrays,
        params=[("q", "q")],
        inputs=((2, D),),
        effort="quick",
    )
    assert report.ok, report


def sample():
    """Half of the faithful ports that are marked, and half of such pairs with a bug."""
    always = [family for family in FAMILIES if family.always]
    return [family for family in always if family.holds][::2] + [family for family in always if not family.holds][::2]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name.replace(" ", "-"))
def test_family(family, request):
    if family.name not in {found.name for found in sample()} and not request.config.getoption("--pair-families"):
        pytest.skip("a sample of the families runs without --pair-families")
    report = check_pair(**family.arguments)
    assert report.ok == family.holds, report
    assert family.says in report.describe()
    assert report.likely_cause == "" or not family.holds
    if family.holds:
        # Something was near enough to its bound that the bound says something.
        assert max(row.bound_fraction for row in report.rows if row.bound == "calibrated") > 0.01


def test_families_of_both_kinds_run_always():
    found = sample()
    assert min(sum(f.holds for f in found), sum(not f.holds for f in found)) >= 10
