"""Pairs that people port: attention in its variants, positions, and transformer layers."""

from typing import Any

import numpy as np

from parity_tests.defects.ported import Bug, Ported, bug, dense, norm

_ROOM = "pairs_attention"


def _padded(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return rng.standard_normal((3, 5, 6)), np.arange(5) < np.asarray([5, 3, 4])[:, None]


def _tokens(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return (rng.integers(0, 9, (2, 5)),)


def _linears(*names: str, bias: bool = True) -> list[tuple[Any, ...]]:
    return [rule for name in names for rule in dense(name, bias=bias)]


def _attention(torch: str, flax: str) -> list[tuple[Any, ...]]:
    """Return the rules of torch's fused projections against Flax's three, of width 6."""
    rules: list[tuple[Any, ...]] = []
    for k, name in enumerate(("query", "key", "value")):
        rows = f"[{6 * k}:{6 * k + 6}]"
        rules += [
            (f"{torch}.in_proj_weight{rows}", f"{flax}.{name}.kernel", "(h d) i -> i h d"),
            (f"{torch}.in_proj_bias{rows}", f"{flax}.{name}.bias", "(h d) -> h d"),
        ]
    out = [(f"{torch}.out_proj.weight", f"{flax}.out.kernel", "o (h d) -> h d o")]
    return [*rules, *out, (f"{torch}.out_proj.bias", f"{flax}.out.bias")]


_CROSS = _attention("attn", "attn")
_ENCODER = [*_attention("self_attn", "attn"), *_linears("linear1", "linear2"), *norm("norm1"), *norm("norm2")]
_STACK = [
    ("wte.weight", "wte.embedding"),
    ("wpe.weight", "wpe.embedding"),
    *(
        rule
        for k in range(3)
        for name in ("qkv", "proj", "fc1", "fc2", "ln_1", "ln_2")
        for rule in (norm if "ln" in name else dense)(f"blocks.{k}.{name}")
    ),
    *norm("ln_f"),
    *dense("head", bias=False),
]

PAIRS = (
    Ported(
        "causal_attention",
        _ROOM,
        _linears("qkv", "out"),
        ((2, 5, 6),),
        (
            bug("missing_scale", r"scale|1\.73205 times", power=0.0),
            bug("scale_of_width", "scale", power=-1.0),
            bug("mask_off_by_one", "mask|off by one|diagonal", causal=1),
            bug("not_causal", "mask|causal", causal=None),
            bug("heads_interleaved", "head", interleaved=True),
            bug("key_before_query", r"order 1, 0, 2|exchanged", order=(1, 0, 2)),
        ),
    ),
    Ported(
        "cross_attention",
        _ROOM,
        _CROSS,
        ((2, 5, 6), (2, 5, 6)),
        (
            bug("inputs_exchanged", "inputs 0 and 1 are exchanged|exchanged", exchanged=True),
            bug("scaled_twice", "scale", scale=3**-0.5),
            bug("missing_bias", "bias has no effect", bias=False),
            Bug(
                "head_order",
                "head",
                pair={
                    "params": [
                        (*rule[:2], rule[2].replace("(h d) i ->", "(d h) i ->")) if len(rule) > 2 else rule
                        for rule in _CROSS
                    ]
                },
            ),
        ),
    ),
    Ported(
        "grouped_query_attention",
        _ROOM,
        _linears("q", "k", "v", "o", bias=False),
        ((2, 5, 8),),
        (
            bug("heads_tiled", "head|order|repeat|exchanged", tiled=True),
            bug("scale_of_width", "scale", width=8),
            bug("not_causal", "mask|causal", causal=None),
        ),
    ),
    Ported(
        "rotary_attention",
        _ROOM,
        _linears("q", "k", "v", "o", bias=False),
        ((2, 5, 8),),
        (
            bug("neighbours_turned", "interleav|rotar|order|halves", interleaved=True),
            bug("base", "base|log", base=1000.0),
            bug("turned_back", "sign|-1 times", sign=-1.0),
            bug("keys_not_turned", None, keys=False),
        ),
    ),
    Ported(
        "alibi_attention",
        _ROOM,
        _linears("qkv", "out"),
        ((2, 5, 8),),
        (
            bug("sign", "sign", sign=-1.0),
            bug("slopes_from_zero", r"slope|scale.*[24]|[24] times|arange is 1 less", first=0),
            bug("not_causal", "mask|causal", causal=False),
        ),
    ),
    Ported(
        "window_attention",
        _ROOM,
        [*_linears("qkv", "out"), ("table", "table")],
        ((2, 4, 6, 6),),
        (
            bug("index_transposed", "transpos|flip|revers", transposed=True),
            bug("strided_windows", "order|layout|window", strided=True),
            bug("missing_bias", "table has no effect|term of this sum", biased=0.0),
        ),
    ),
    Ported(
        "linear_attention",
        _ROOM,
        _linears("q", "k", "v"),
        ((2, 4, 6),),
        (
            bug("missing_one", "term of this sum|lacks the 1", shift=0.0),
            bug("not_normalised", "normalis|division", normalised=False),
            bug("not_causal", "mask|causal|cumul", causal=False),
        ),
    ),
    Ported(
        "attention_pooling",
        _ROOM,
        [*_linears("key", "out"), *dense("score", bias=False)],
        _padded,
        (
            bug("padding_seen", "mask|padding", masked=False),
            bug("softmax_axis", "ax[ie]s", axis=0),
            bug("missing_activation", "activation|tanh", activation="none"),
        ),
    ),
    Ported(
        "sinusoidal_positions",
        _ROOM,
        [("embed.weight", "embed.embedding"), *dense("out")],
        _tokens,
        (
            bug("missing_scale", "scale|times", scale=1.0),
            bug("base", "base|log", base=1000.0),
            bug("from_one", r"off by one|shift|position|1 \+ the first factor", first=1),
            bug("sines_then_cosines", "order|interleav|in turn", in_turn=False),
        ),
    ),
    Ported(
        "encoder_post",
        _ROOM,
        _ENCODER,
        ((2, 4, 6),),
        (
            bug("pre_norm", "pre-norm|post-norm|norm.*(before|after)", pre=True),
            bug("gelu_for_relu", "gelu", activation="gelu"),
            bug("epsilon_of_one", "epsilon.*1e-0?6", "norm2", epsilon=1e-6),
            bug("missing_residual", "residual|skip", residual=0.0),
        ),
    ),
    Ported(
        "encoder_pre",
        _ROOM,
        _ENCODER,
        ((2, 4, 6),),
        (
            bug("post_norm", "pre-norm|post-norm|norm.*(before|after)", pre=False),
            bug("gelu_form", "tanh approximation", "linear", activation="gelu_tanh"),
            bug("epsilon_of_one", "epsilon.*1e-0?6", "norm2", epsilon=1e-6),
            bug("causal", "mask|causal", causal=0),
        ),
    ),
    Ported(
        "decoder_stack",
        _ROOM,
        _STACK,
        _tokens,
        (
            bug("epsilon_of_one", "epsilon.*1e-0?6", r"blocks\.1\.ln_2", epsilon=1e-6),
            bug("gelu_form", "gelu", r"blocks\.1", activation="gelu"),
            bug("missing_residual", "residual|skip", r"blocks\.1", residual=0.0),
            bug("missing_scale", "scale", r"blocks\.1", power=0.0),
            bug("mask_off_by_one", "mask|off by one|diagonal", r"blocks\.1", causal=1),
            bug("layers_exchanged", "exchanged|order", order=(1, 0, 2)),
        ),
    ),
)
