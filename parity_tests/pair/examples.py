"""Five pairs of the frameworks' own modules, made equal: factories for `--pair parity_tests.pair.examples:<name>`.

`<name>_defaults` is the same pair as a careless port leaves it: parameters carried over, every other setting at the
framework's own default.

A factory is called with `"torch"`, `"jax"` or `"pair"` and returns that part of `check_pair`'s arguments, so
that either side can be built in an interpreter that has only its own framework.
"""

import importlib
from collections.abc import Callable
from typing import Any

_FEATURES, _HEADS, _HIDDEN = 16, 4, 8


def _part(side: str, name: str, pair: dict[str, Any]) -> dict[str, Any]:
    if side == "pair":
        return {**pair, "name": name}
    module = importlib.import_module(f"parity_tests.frameworks.{side}.examples")
    # A side without a careless form is made equal by its defaults.
    return getattr(module, name, getattr(module, name.removesuffix("_defaults")))()


def linear(side: str) -> dict[str, Any]:
    """Make `nn.Linear(24, 16)` and `nnx.Linear`: torch stores the kernel transposed."""
    rules = [("weight", "kernel", "o i -> i o"), ("bias", "bias", "")]
    return _part(side, "linear", {"params": rules, "inputs": ((6, 5, 24),)})


def conv(side: str) -> dict[str, Any]:
    """Make `nn.Conv2d(3, 8, 3, padding=1)` and `nnx.Conv`: channels first against channels last, kernel likewise."""
    rules = [("weight", "kernel", "o i kh kw -> kh kw i o"), ("bias", "bias", "")]
    pair = {
        "params": rules,
        "inputs": ((2, 3, 7, 6),),
        "input_patterns": {0: "b c h w -> b h w c"},
        "output_patterns": {"y": "b c h w -> b h w c"},
    }
    return _part(side, "conv", pair)


def layer_norm(side: str) -> dict[str, Any]:
    """Make `nn.LayerNorm(16, eps=1e-6)` and `nnx.LayerNorm`: torch's own default of epsilon is 1e-5."""
    rules = [("weight", "scale", ""), ("bias", "bias", "")]
    return _part(side, "layer_norm", {"params": rules, "inputs": ((9, 16),)})


def attention(side: str) -> dict[str, Any]:
    """Make `nn.MultiheadAttention` and `nnx.MultiHeadAttention`: one fused input projection against three."""
    rules = []
    for k, name in enumerate(("query", "key", "value")):
        rows = f"[{_FEATURES * k}:{_FEATURES * (k + 1)}]"
        rules += [
            (f"in_proj_weight{rows}", f"{name}.kernel", "(h d) i -> i h d"),
            (f"in_proj_bias{rows}", f"{name}.bias", "(h d) -> h d"),
        ]
    rules += [("out_proj.weight", "out.kernel", "o (h d) -> h d o"), ("out_proj.bias", "out.bias", "")]
    inputs = ((2, 5, _FEATURES), (2, 7, _FEATURES), (2, 7, _FEATURES))
    return _part(side, "attention", {"params": rules, "inputs": inputs})


def gru_cell(side: str) -> dict[str, Any]:
    """Make `nn.GRUCell(4, 8)` and linen's `GRUCell`: fused gates in the order r, z, n; torch has biases that add up."""
    rules: list[tuple] = []
    for k, gate in enumerate("rzn"):
        rows = f"[{_HIDDEN * k}:{_HIDDEN * (k + 1)}]"
        rules += [
            (f"weight_ih{rows}", f"GRUCell_0.i{gate}.kernel", "o i -> i o"),
            (f"weight_hh{rows}", f"GRUCell_0.h{gate}.kernel", "o i -> i o"),
            (f"bias_ih{rows}", f"GRUCell_0.i{gate}.bias", ""),
        ]
    # torch adds two biases in the reset and update gates, Flax one: the second is redundant and stays at zero.
    rules += [(f"bias_hh[0:{2 * _HIDDEN}]", None, "0"), (f"bias_hh[{2 * _HIDDEN}:]", "GRUCell_0.hn.bias", "")]
    return _part(side, "gru_cell", {"params": rules, "inputs": ((3, 4), (3, _HIDDEN))})


def linear_defaults(side: str) -> dict[str, Any]:
    """Match nothing but the kernel's layout, by the rules."""
    return _part(side, "linear_defaults", linear("pair"))


def conv_defaults(side: str) -> dict[str, Any]:
    """Leave the padding: none against `SAME`."""
    return _part(side, "conv_defaults", conv("pair"))


def layer_norm_defaults(side: str) -> dict[str, Any]:
    """Leave the epsilon: 1e-5 against 1e-6."""
    return _part(side, "layer_norm_defaults", layer_norm("pair"))


def attention_defaults(side: str) -> dict[str, Any]:
    """Leave the batch axis: the second against the first. Equal lengths, as in self-attention, let both run."""
    return _part(side, "attention_defaults", attention("pair") | {"inputs": ((3, 5, _FEATURES),) * 3})


def gru_cell_defaults(side: str) -> dict[str, Any]:
    """Leave the order of the arguments: input, state against state, input. Equal sizes let both run."""
    return _part(side, "gru_cell_defaults", gru_cell("pair") | {"inputs": ((3, _HIDDEN), (3, _HIDDEN))})


EXAMPLES: dict[str, Callable[[str], dict[str, Any]]] = {
    factory.__name__: factory for factory in (linear, conv, layer_norm, attention, gru_cell)
}
