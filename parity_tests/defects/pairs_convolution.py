"""Pairs that people port: convolutions, pools, and blocks of image models, channels first against channels last."""

from parity_tests.defects.ported import TO_LAST, Bug, Ported, bug, conv, dense, images, norm

_ROOM = "pairs_convolution"
_TRANSPOSED = "i o kh kw -> kh kw o i"
_COUNTERS = {"not_compared": ("*.num_batches_tracked",)}
_BATCH_NORMS = [rule for k in (1, 2, 3) for rule in norm(f"bn{k}", state=True)]

PAIRS = (
    Ported(
        "strided_conv",
        _ROOM,
        conv("", ""),
        ((2, 3, 8, 6),),
        (
            bug("same_padding", "padding", padding="SAME"),
            bug("flipped_kernel", "flip", flipped=True),
            bug("missing_bias", "bias has no effect", bias=0.0),
            bug("valid_padding", "padding", padding="VALID"),
        ),
        images(),
    ),
    Ported(
        "temporal_conv",
        _ROOM,
        [*conv("first", axes=1), *conv("second", axes=1)],
        ((2, 4, 9),),
        (
            bug("centred_padding", "padding|causal", left=(1, 2)),
            bug("missing_dilation", "dilation", "second", left=(2, 2), dilation=1),
            bug("time_reversed", "flip|revers", reverse=True),
            bug("missing_activation", "activation|relu", activation="none"),
        ),
        images(1),
    ),
    Ported(
        "conv3d",
        _ROOM,
        conv("", "conv", axes=3),
        ((2, 2, 4, 6, 5),),
        (
            bug("same_padding", "padding", padding="SAME"),
            bug("missing_bias", "bias has no effect", bias=False),
            Bug(
                "window_axes_exchanged",
                "ax[ie]s|transpos|window|order",
                pair={"params": [("weight", "conv.kernel", "o i kd kh kw -> kh kd kw i o"), ("bias", "conv.bias")]},
            ),
        ),
        images(3),
    ),
    Ported(
        "separable_conv",
        _ROOM,
        [*conv("depth"), *conv("point")],
        ((2, 3, 5, 4),),
        (
            bug("filters_tiled", "order|channel|group|exchanged", tiled=True),
            bug("dilated", "dilation", "depth", dilation=2),
            bug("gelu_for_silu", "gelu", activation="gelu"),
        ),
        images(),
    ),
    Ported(
        "shuffle_block",
        _ROOM,
        [*conv("first"), *conv("second")],
        ((2, 4, 5, 3),),
        (
            bug("other_groups", "order|shuffle|group", groups=3),
            bug("not_shuffled", "order|shuffle|group", shuffled=False),
            bug("missing_activation", "activation|relu", activation="none"),
        ),
        images(),
    ),
    Ported(
        "conv_transpose",
        _ROOM,
        [("up.weight", "up.kernel", _TRANSPOSED), ("up.bias", "up.bias")],
        ((2, 3, 4, 5),),
        (
            Bug(
                "flipped_kernel",
                "flip",
                flax={"kernel": False},
                pair={"params": [("up.weight", "up.kernel", "i o kh kw -> kh kw i o"), ("up.bias", "up.bias")]},
            ),
            bug("cropped_at_the_end", "padding|crop|shift", start=0),
            bug("missing_activation", "activation|tanh", activation="none"),
        ),
        images(),
    ),
    Ported(
        "max_pool",
        _ROOM,
        conv("conv"),
        ((2, 3, 6, 8),),
        (
            bug("average", "average|mean|pool", average=True),
            bug("same_padding", "padding", padding="SAME"),
            bug("zeros_for_padding", "padding", zero=True),
        ),
        images(),
    ),
    Ported(
        "average_pool",
        _ROOM,
        conv("conv"),
        ((2, 3, 6, 8),),
        (
            bug("padding_not_counted", "count_include_pad", include=False),
            bug("maximum", "max|pool", maximum=True),
            bug("same_padding", "padding", padding="SAME"),
        ),
        images(),
    ),
    Ported(
        "resnet_block",
        _ROOM,
        [*(rule for name in ("conv1", "conv2", "project") for rule in conv(name, bias=False)), *_BATCH_NORMS],
        ((2, 3, 6, 8),),
        (
            bug("same_padding", "padding", "conv1", padding="SAME"),
            bug("epsilon_of_one", r"epsilon.*(1e-0?3|0\.001)", "bn2", epsilon=1e-3),
            bug("missing_residual", "residual|skip|has no effect", residual=0.0),
            bug("missing_last_activation", "activation|relu", last="none"),
        ),
        {**images(), **_COUNTERS},
    ),
    Ported(
        "convnext_block",
        _ROOM,
        [*conv("depth"), *norm("norm"), *dense("up"), *dense("down"), ("gamma", "gamma")],
        ((2, 4, 5, 3),),
        (
            bug("epsilon", "epsilon.*1e-0?5", "norm", epsilon=1e-5),
            bug("gelu_form", "tanh approximation", activation="gelu_tanh"),
            bug("missing_layer_scale", "gamma has no effect|scale|factor", scaled=False),
            bug("missing_residual", "residual|skip", residual=0.0),
        ),
        images(),
    ),
    Ported(
        "inverted_residual",
        _ROOM,
        [*(rule for name in ("expand", "depth", "project") for rule in conv(name, bias=False)), *_BATCH_NORMS],
        ((2, 3, 5, 4),),
        (
            bug("unclipped", "relu|clip|clamp", activation="relu"),
            bug("last_activation", "activation|relu", last="relu6"),
            bug("missing_residual", "residual|skip", residual=0.0),
            bug("epsilon_of_one", r"epsilon.*(1e-0?3|0\.001)", "bn1", epsilon=1e-3),
        ),
        {**images(), **_COUNTERS, "scale": {0: 12.0}},
    ),
    Ported(
        "squeeze_excite",
        _ROOM,
        [*conv("reduce"), *conv("expand")],
        ((2, 6, 4, 3),),
        (
            bug("hard_sigmoid", "hard", gate="hard_sigmoid"),
            bug("sum_for_mean", "mean|sum", pool="sum"),
            bug("silu_for_relu", "silu", activation="silu"),
        ),
        images(),
    ),
    Ported(
        "unet_level",
        _ROOM,
        [*conv("enter"), *conv("below"), *conv("leave")],
        ((2, 3, 4, 6),),
        (
            bug("skip_exchanged", "order|exchanged|concat", "leave", exchanged=True),
            bug("linear_for_nearest", "nearest|linear|interpol|resiz|upsampl", method="linear"),
            bug("average_for_max", "average|mean|pool", average=True),
            bug("missing_activation", "activation|relu", activation="none"),
        ),
        images(),
    ),
    Ported(
        "patch_embedding",
        _ROOM,
        [*conv("patches"), ("token", "token"), ("positions", "positions")],
        ((2, 3, 4, 6),),
        (
            bug("by_column", "order|transpos|flatten|layout", by_column=True),
            bug("token_last", "order|token|roll|concat", token_last=True),
            bug("token_without_position", None, positions="patches"),
        ),
        {"input_patterns": {0: TO_LAST[3]}},
    ),
    Ported(
        "flatten_head",
        _ROOM,
        [*conv("conv"), *dense("fc")],
        ((2, 2, 4, 5),),
        (
            bug("flattened_as_it_lies", "flatten|NHWC|channels (first|last)|layout", channels_first=False),
            bug("missing_activation", "activation|relu", activation="none"),
            bug("shifted_padding", "padding", padding=((2, 0), (2, 0))),
        ),
        {"input_patterns": {0: TO_LAST[3]}},
    ),
    Ported(
        "pixel_shuffle",
        _ROOM,
        conv("conv"),
        ((2, 3, 4, 3),),
        (
            bug("depth_to_space", "order|channel|layout", channels_last=True),
            bug("axes_exchanged", "order|transpos|ax[ie]s|exchanged", exchanged=True),
            bug("missing_activation", "activation|tanh", activation="none"),
        ),
        images(),
    ),
    Ported(
        "mixer_block",
        _ROOM,
        [
            *norm("norm1"),
            *norm("norm2"),
            *(r for n in ("tokens1", "tokens2", "channels1", "channels2") for r in dense(n)),
        ],
        ((2, 5, 6),),
        (
            bug("epsilon_of_one", "epsilon.*1e-0?6", "norm2", epsilon=1e-6),
            bug("gelu_form", "tanh approximation", "channels", activation="gelu_tanh"),
            bug("missing_residual", "residual|skip", residual=0.0),
            bug("norm_shared", "norm2 is not used.*norm1 in its place", shared=True),
        ),
    ),
)
