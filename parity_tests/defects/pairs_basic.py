"""Pairs that people port: linear layers, norms, embeddings, losses, and what is built of them."""

from typing import Any

import numpy as np

from parity_tests.defects.ported import Bug, Ported, bug, dense, images, norm

_ROOM = "pairs_basic"


def _tokens(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw tokens; each row has a padding, 0, and a 3."""
    tokens = rng.integers(1, 11, (3, 7))
    tokens[:, -2:], tokens[:, 0] = 0, 3
    return (tokens,)


def _labelled(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    labels = rng.integers(0, 5, 8)
    labels[2] = -100
    return rng.standard_normal((8, 6)), labels


def _targets(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    return rng.standard_normal((8, 6)), np.asarray(rng.permuted(np.arange(24) % 2), np.float64).reshape(8, 3)


def _graph(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    edges = np.asarray([[0, 1, 2, 3, 4, 5, 0, 2, 1], [1, 2, 3, 4, 5, 0, 3, 5, 4]])
    return rng.standard_normal((6, 5)), edges


def _experts() -> list[tuple[Any, ...]]:
    return [
        rule for k in range(4) for rule in (*dense(f"experts.{k}.0", f"up.{k}"), *dense(f"experts.{k}.2", f"down.{k}"))
    ]


_PARTITIONS = [
    rule
    for k in range(3)
    for rule in (
        (f"layers.{k}.weight", f"layers.kernel[{k}:{k + 1}]", "o i -> 1 i o"),
        (f"layers.{k}.bias", f"layers.bias[{k}:{k + 1}]", "o -> 1 o"),
    )
]
_WEIGHT_NORM = [
    ("fc.parametrizations.weight.original0", "gain"),
    ("fc.parametrizations.weight.original1", "direction"),
    ("fc.bias", "bias"),
]

PAIRS = (
    Ported(
        "linear",
        _ROOM,
        dense(),
        ((5, 3, 7),),
        (
            Bug("transposed_kernel", "transpos", pair={"params": [("weight", "kernel"), ("bias", "bias")]}),
            bug("missing_bias", "bias has no effect|missing bias", bias=0.0),
            bug("bias_twice", "bias takes effect twice|bias.* 2 times", bias=2.0),
            bug("narrow_product", "less precision|narrower format", dtype="bfloat16"),
        ),
    ),
    Ported(
        "mlp",
        _ROOM,
        [*dense("0", "hidden"), *dense("2", "out")],
        ((4, 6),),
        (
            bug("gelu_form", "tanh approximation", activation="gelu_tanh"),
            bug("missing_activation", "activation|gelu is (missing|left out)|without gelu", activation="none"),
            bug("relu_for_gelu", "relu", activation="relu"),
            bug("missing_hidden_bias", r"(0\.bias|hidden\.bias) has no effect", bias=False),
        ),
    ),
    Ported(
        "residual_mlp",
        _ROOM,
        [*norm("norm"), *dense("up"), *dense("down")],
        ((4, 3, 6),),
        (
            bug("missing_residual", "residual|skip", residual=0.0),
            bug("residual_halved", r"0\.5 times", residual=0.5),
            bug("post_norm", "post-norm|after the norm|norm.*after|pre-norm", after=True),
            bug("epsilon", "epsilon.*1e-0?6", "norm", epsilon=1e-6),
            bug("gelu_for_silu", "gelu", activation="gelu"),
        ),
    ),
    Ported(
        "swiglu",
        _ROOM,
        [*dense("gate_up", bias=False), *dense("down", bias=False)],
        ((4, 6),),
        (
            bug("gate_exchanged", r"order 1, 0|exchanged|gate", exchanged=True),
            bug("gelu_for_silu", "gelu", activation="gelu"),
            bug("sigmoid_for_silu", "sigmoid", activation="sigmoid"),
        ),
    ),
    Ported(
        "layer_norm",
        _ROOM,
        norm(),
        ((6, 10),),
        (
            bug("epsilon", "epsilon.*1e-0?6", epsilon=1e-6),
            bug("epsilon_outside", "epsilon.*(outside|after|added to|adds it to) the (square )?root", outside=True),
            bug("sample_variance", "n - 1", ddof=1),
            bug("not_centred", "mean|centred", centred=False),
        ),
    ),
    Ported(
        "rms_norm",
        _ROOM,
        norm(bias=False),
        ((6, 10),),
        (
            bug("epsilon", "epsilon.*1e-0?5", epsilon=1e-5),
            bug("one_plus_scale", "1 \\+|plus (1|one)|one more", shift=1.0),
            bug("centred", "mean|centred", centred=True),
        ),
    ),
    Ported(
        "group_norm",
        _ROOM,
        norm("", "norm"),
        ((2, 12, 5, 3),),
        (
            bug("epsilon", "epsilon.*1e-0?6", epsilon=1e-6),
            bug("groups", "group", groups=4),
            bug("interleaved", "group|order of the channels|interleav", interleaved=True),
        ),
        images(),
    ),
    Ported(
        "instance_norm",
        _ROOM,
        norm(),
        ((2, 5, 4, 3),),
        (
            bug("epsilon", "epsilon.*1e-0?6", epsilon=1e-6),
            bug("sample_variance", "n - 1", ddof=1),
            bug("over_channels", "ax[ie]s|group|channel", axes=(1, 2, 3)),
        ),
        images(),
    ),
    Ported(
        "batch_norm_train",
        _ROOM,
        norm(state=True),
        ((7, 6),),
        (
            bug("momentum", "momentum", momentum=0.9),
            bug("variance_by_n", "n - 1", ddof=0),
            bug("evaluation", "train|eval|running", stock=True),
            bug("epsilon", r"epsilon.*(1e-0?3|0\.001)", epsilon=1e-3),
        ),
        {"not_compared": ("num_batches_tracked",)},
    ),
    Ported(
        "batch_norm_eval",
        _ROOM,
        [*dense("fc"), *norm("bn", state=True)],
        ((8, 5),),
        (
            bug("training", "train|eval|running|statistics of the batch", train=True),
            bug("epsilon", r"epsilon.*(1e-0?3|0\.001)", "bn", epsilon=1e-3),
            bug("missing_activation", "activation|relu", activation="none"),
        ),
        {"not_compared": ("bn.num_batches_tracked",)},
    ),
    Ported(
        "weight_norm",
        _ROOM,
        _WEIGHT_NORM,
        ((4, 6),),
        (
            bug("other_axis", "ax[ie]s", axis=0),
            bug("missing_gain", "original0 has no effect|scale|factor", gain=False),
            bug("epsilon", "epsilon", epsilon=1e-3),
        ),
    ),
    Ported(
        "film",
        _ROOM,
        [*dense("film"), *norm("norm")],
        ((3, 4, 7), (3, 5)),
        (
            bug("halves_exchanged", "order 1, 0|exchanged", exchanged=True),
            bug("without_one", "1 \\+|plus (1|one)|term of this sum|lacks the 1", shift=0.0),
            bug("missing_activation", "activation|relu", activation="none"),
        ),
    ),
    Ported(
        "hypernetwork",
        _ROOM,
        [*dense("inner"), *dense("weights"), *dense("bias")],
        ((2, 3, 4), (2, 3)),
        (
            bug("made_weight_transposed", "transpos", spelling="bio,bti->bto"),
            bug("missing_scale", r"scale|2 times|division of 2", scale=1.0),
            bug("missing_activation", "activation|tanh", activation="none"),
        ),
    ),
    Ported(
        "partitioned",
        _ROOM,
        _PARTITIONS,
        ((4, 3, 5),),
        (
            bug("rolled", "order|roll|exchanged", roll=1),
            bug("one_bias_missing", r"(layers\.1\.bias|layers\.bias\[1).* has no effect", bias=False),
            Bug(
                "transposed_kernels",
                "transpos",
                pair={"params": [(*rule[:2], "o i -> 1 o i") if "weight" in rule[0] else rule for rule in _PARTITIONS]},
            ),
            bug("missing_activation", "activation|relu", activation="none"),
        ),
    ),
    Ported(
        "mixture_of_experts",
        _ROOM,
        [*dense("router", bias=False), *_experts()],
        ((5, 6),),
        (
            bug("softmax_over_all", "softmax|normalis", normalised=False),
            bug("one_expert", r"\btop|number of", count=1),
            bug("experts_rolled", "order|roll|exchanged", shift=1),
            bug("gelu_for_relu", "gelu", activation="gelu"),
        ),
    ),
    Ported(
        "remat",
        _ROOM,
        [*dense("first"), *dense("second")],
        ((4, 6),),
        (
            bug("missing_residual", "residual|skip", residual=0.0),
            bug("stopped_gradient", r"gradient of first\.(weight|bias).* is stopped", stopped=True),
            bug("gelu_for_tanh", "gelu", activation="gelu"),
        ),
    ),
    Ported(
        "embedding_padding",
        _ROOM,
        [("embed.weight", "embed.embedding"), *dense("head")],
        _tokens,
        (
            bug("padding_trained", "padding_idx|padding|row 0", stopped=False),
            bug("other_row", "padding_idx|padding|row", index=3),
            bug("padding_counted", r"padding|mask|0\.714286 times", counted=True),
        ),
    ),
    Ported(
        "tied_embedding",
        _ROOM,
        [("embed.weight", "embed.embedding"), *dense("fc")],
        _tokens,
        (
            bug("missing_scale", "scale|times", scale=1.0),
            bug("scale_inverted", "scale|times", scale=6**-0.5),
            bug("head_stopped", "stop", stopped=True),
            bug("missing_activation", "activation|tanh", activation="none"),
        ),
    ),
    Ported(
        "time_embedding",
        _ROOM,
        [*dense("hidden"), *dense("out")],
        lambda rng: (rng.uniform(0, 50, 5),),
        (
            bug("sine_first", "order 1, 0|exchanged|order", sine_first=True),
            bug("exponent", r"exponent|1\.33333 times", last=3),
            bug("base", "base|log", base=1000.0),
            bug("relu_for_silu", "relu", activation="relu"),
        ),
    ),
    Ported(
        "cross_entropy",
        _ROOM,
        dense("head"),
        _labelled,
        (
            bug("smoothing", "smoothing", smoothing=0.2),
            bug("smoothing_over_others", "smoothing", others=True),
            bug("sum_for_mean", "sum|7 times", mean=False),
            bug("ignored_counted", r"ignore_index|0\.875 times", left_out=False),
        ),
    ),
    Ported(
        "focal_loss",
        _ROOM,
        dense("head"),
        _targets,
        (
            bug("gamma", "gamma|power", gamma=1.0),
            bug("alpha_exchanged", r"alpha|class weight|0\.[27]5|1 minus", alpha=0.75),
            bug("sum_for_mean", "sum|24 times", reduction="sum"),
        ),
    ),
    Ported(
        "contrastive",
        _ROOM,
        [*dense("left"), *dense("right"), ("log_scale", "log_scale")],
        ((4, 6), (4, 5)),
        (
            bug("temperature_inverted", "scale|temperature|inver|sign", sign=-1.0),
            bug("not_normalised", "normalis", normalised=False),
            bug("one_direction", None, both=False),
        ),
    ),
    Ported(
        "vae",
        _ROOM,
        [*dense("encoder"), *dense("decoder")],
        ((6, 7), (6, 3)),
        (
            bug("variance_for_deviation", r"half|0\.5|scale|square", power=1.0),
            bug("missing_half", "2 times", factor=-1.0),
            bug("mean_for_sum", r"mean|sum|0\.333333 times", summed=False),
        ),
    ),
    Ported(
        "vector_quantiser",
        _ROOM,
        [*dense("encoder"), ("codes", "codes")],
        ((9, 6),),
        (
            bug("not_straight_through", "straight|stop", straight=False),
            bug("beta", r"factor of 0\.25", beta=1.0),
            bug("losses_exchanged", r"stop|4 times.*0\.25 times", exchanged=True),
        ),
    ),
    Ported(
        "deep_sets",
        _ROOM,
        [*dense("phi"), *dense("rho")],
        ((3, 6, 5),),
        (
            bug("mean_for_sum", "mean|sum", pool="mean"),
            bug("max_for_sum", "max", pool="max"),
            bug("missing_activation", "activation|relu", activation="none"),
        ),
    ),
    Ported(
        "graph_convolution",
        _ROOM,
        [*dense("fc", bias=False), ("bias", "bias")],
        _graph,
        (
            bug("edges_reversed", "order 1, 0|exchanged|direction|transpos", reversed_edges=True),
            bug("without_loops", "loop|residual", loops=False),
            bug("not_normalised", "normalis|degree|scale", power=0.0),
        ),
    ),
)
