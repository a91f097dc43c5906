"""Pairs that people port: recurrent layers, forecasters, and models of physics and chemistry."""

from typing import Any

from parity_tests.defects.ported import Bug, Ported, bug, dense, norm

_ROOM = "pairs_sequence"


def _gates(torch: str, suffix: str = "") -> list[tuple[Any, ...]]:
    """Return the rules of torch's recurrent layers and cells against two linear layers with a bias each."""
    return [
        rule
        for a, b in (("ih", "input"), ("hh", "state"))
        for rule in (
            (f"{torch}.weight_{a}{suffix}", f"{b}.kernel", "o i -> i o"),
            (f"{torch}.bias_{a}{suffix}", f"{b}.bias"),
        )
    ]


def _recurrent(suffix: str, flax: str, order: tuple[int, ...] = (0, 1, 2, 3)) -> list[tuple[Any, ...]]:
    """Return the rules of torch's LSTM against nnx's, which has one bias; `order` is where each gate goes."""
    rules: list[tuple[Any, ...]] = [(f"lstm.bias_ih_{suffix}", None, "0")]
    for k, n in enumerate(order):
        rows, columns = f"[{5 * k}:{5 * k + 5}]", f"[:, {5 * n}:{5 * n + 5}]"
        rules += [
            (f"lstm.weight_ih_{suffix}{rows}", f"{flax}.cell.dense_i.kernel{columns}", "o i -> i o"),
            (f"lstm.weight_hh_{suffix}{rows}", f"{flax}.cell.dense_h.kernel{columns}", "o i -> i o"),
            (f"lstm.bias_hh_{suffix}{rows}", f"{flax}.cell.dense_h.bias[{5 * n}:{5 * n + 5}]"),
        ]
    return rules


_LAYERS = [*norm("norm"), *dense("head"), *_recurrent("l0", "first")]
_SAME = ("log_a", "log_step", "b", "c", "d")

PAIRS = (
    Ported(
        "lstm_cell",
        _ROOM,
        _gates("cell"),
        ((3, 4), (3, 5), (3, 5)),
        (
            bug("gate_order", r"order \d|gates|exchanged", order="igfo"),
            bug("forget_bias", "forget|adds 1 before sigmoid|1 more", forget=1.0),
            bug("missing_last_activation", "activation|tanh", last="none"),
        ),
    ),
    Ported(
        "lstm_layers",
        _ROOM,
        [*_LAYERS, *_recurrent("l1", "second")],
        ((2, 5, 4),),
        (
            Bug(
                "gate_order",
                r"order \d|gates|exchanged",
                pair={"params": [*_LAYERS, *_recurrent("l1", "second", (0, 2, 1, 3))]},
            ),
            bug("epsilon", "epsilon.*1e-0?6", "norm", epsilon=1e-6),
            bug("time_reversed", r"revers|flip|\btime\b", "second", reverse=True),
            bug("hard_gates", "hard|sigmoid", "second", gate="hard_sigmoid"),
            bug("first_state", "state|carry", "second", carry=1.0),
        ),
    ),
    Ported(
        "bidirectional_lstm",
        _ROOM,
        [*_recurrent("l0", "forward"), *_recurrent("l0_reverse", "backward")],
        ((2, 4, 4),),
        (
            bug("left_reversed", r"revers|flip|\btime\b", keep_order=False),
            bug("directions_exchanged", "exchanged|order", exchanged=True),
            bug("both_forward", r"revers|flip|\btime\b|direction", reverse=False),
        ),
    ),
    Ported(
        "gru",
        _ROOM,
        _gates("gru", "_l0"),
        ((2, 5, 4),),
        (
            bug("reset_first", "reset", reset_first=True),
            bug("gate_order", r"order \d|gates|exchanged", order="zrn"),
            bug("update_inverted", "update|1 - z|invert", keep=False),
        ),
    ),
    Ported(
        "diagonal_ssm",
        _ROOM,
        [(name, name) for name in _SAME],
        ((2, 6, 3),),
        (
            bug("euler", None, method="euler"),
            bug("bilinear", None, method="bilinear"),
            bug("missing_skip", "d has no effect|term of this sum", skip=0.0),
            bug("gelu_form", "tanh approximation", activation="gelu_tanh"),
        ),
    ),
    Ported(
        "rg_lru",
        _ROOM,
        [("decay", "decay"), *dense("recurrence"), *dense("gate")],
        ((2, 6, 4),),
        (
            bug("factor", r"0\.5 times", factor=4.0),
            bug("missing_root", "root|square", root=False),
            bug("missing_gate", r"gate(\.weight|\.bias| ).*no effect|gate|lacks this multiplication", gated=False),
        ),
    ),
    Ported(
        "fourier_layer",
        _ROOM,
        [("weight", "weight"), *dense("skip")],
        ((2, 9, 4),),
        (
            bug("one_mode_less", r"weight.* has no effect|mode", modes=2),
            bug("conjugate", "conjugate", conjugate=True),
            bug("normalisation", r"normalis|scale|0\.333333 times", norm="ortho"),
            bug("missing_skip", r"skip|residual|no effect", skip=0.0),
        ),
    ),
    Ported(
        "dlinear",
        _ROOM,
        [*dense("seasonal"), *dense("trend")],
        ((2, 8, 3),),
        (
            bug("zeros_at_the_ends", "padding", ends="constant"),
            bug("window", "window|kernel", window=3),
            bug("parts_exchanged", "exchanged", exchanged=True),
        ),
    ),
    Ported(
        "nlinear",
        _ROOM,
        dense("fc"),
        ((2, 8, 4),),
        (
            bug("not_added_back", "residual|skip|added", added=False),
            bug("around_the_first", "first|index|flip|revers", first=True),
            bug("around_the_mean", None, mean=True),
        ),
    ),
    Ported(
        "nbeats_block",
        _ROOM,
        [*dense("fc1"), *dense("fc2"), *dense("backcast", bias=False), *dense("forecast", bias=False)],
        ((3, 8),),
        (
            bug("backcast_added", "sign|-1 times", sign=1.0),
            bug("times_end_at_one", r"1\.14286 times", last=1),
            bug("missing_activation", "activation|relu", activation="none"),
        ),
    ),
    Ported(
        "pendulum",
        _ROOM,
        [("stiffness", "stiffness"), ("damping", "damping")],
        ((4, 2),),
        (
            bug("weights", None, weights=(1, 1, 1, 1)),
            bug("whole_step", r"\b2 times", half_step=0.1),
            bug("small_angle", r"\bsine?\b", sine=False),
        ),
    ),
    Ported(
        "gaussian_process",
        _ROOM,
        [("log_length", "log_length"), ("log_noise", "log_noise")],
        ((5, 2), (5,), (3, 2)),
        (
            bug("length_not_squared", "square|power|log_length takes effect twice", squared=False),
            bug("noise", r"0\.0[19]\b", noise=0.01),
            bug("missing_half", r"scale|half|2 times", factor=-1.0),
        ),
    ),
    Ported(
        "radial_filter",
        _ROOM,
        [*dense("hidden"), *dense("out")],
        ((4, 3), (4, 3)),
        (
            bug("softplus_not_shifted", r"shift|term of this sum|lacks the 0\.693147", shift=0.0),
            bug("missing_cut_off", "mask|cut|lacks this multiplication", cut=False),
            bug("width", r"2 times|division of 2", width=1.0),
        ),
    ),
)
