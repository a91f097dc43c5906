"""What a cause may be: formulas, orders and other operations say what they do, and do it."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("scipy", reason="scipy is not installed here")

import scipy.special
import torch
from torch.nn import functional as F

from parity_tests.causes.formulas import along_axes, formulas, order_of, same_numbers
from parity_tests.causes.search import borrowed, exchanges
from parity_tests.frameworks.torch.alternatives import offers

X = np.random.default_rng(0).uniform(0.1, 2.0, (3, 4))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (-2.5 * X, "-2.5 times as large"),
        (X + 0.25, "0.25 more"),
        (1.0 - X, "1 minus it"),
        (X**1.5, "to the power 1.5"),
        (1 / X, "to the power -1"),
        (np.tanh(X), "tanh of it"),
        (3 * X - 0.5, "3 times it and 0.5 less"),
    ],
)
def test_a_formula_is_found_in_any_arrangement_and_gives_the_numbers(other, words):
    found = dict(formulas(X, other.T[::-1]))
    (said,) = [said for said in found if words in said]
    np.testing.assert_allclose(found[said], other, rtol=1e-12)


@pytest.mark.parametrize("function", [scipy.special.softmax, scipy.special.log_softmax])
def test_a_function_over_an_axis_is_found(function):
    for axis in (0, 1):
        ((words, value),) = along_axes(X, function(X, axis=axis))
        assert f"{function.__name__} over axis {axis}" in words
        np.testing.assert_allclose(value, function(X, axis=axis), rtol=1e-12)
    assert not list(along_axes(X, X))


def test_another_slope_is_a_formula():
    own = X - 1.0
    other = np.where(own < 0, 0.2 * own, own)
    assert np.allclose(dict(formulas(own, other.T))["0.2 times as large where it is negative (another slope)"], other)


def test_complex_numbers_have_factors_and_conjugates():
    z = X + 1j * X[::-1, ::-1]
    for other, words in ((z.conj(), "conjugate"), (z / 3, "0.333333 times")):
        ((said, value),) = formulas(z, other.T)
        assert words in said
        np.testing.assert_allclose(value, other, rtol=1e-12)


def test_no_formula_is_found_where_there_is_none_or_where_chance_would_do():
    assert not dict(formulas(X, np.sin(7 * X)))
    assert not dict(formulas(X, X))
    # Any two numbers are some factor and offset apart.
    assert not dict(formulas(np.array([0.3, 0.8]), np.array([1.234567, 7.654321])))
    assert not dict(formulas(np.array([0.3]), np.array([0.4123456])))
    assert "0.5 times" in next(iter(formulas(np.array([0.71]), np.array([0.355]))))[0]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (X[:, ::-1], "reversed (flipped) along axis 1"),
        (np.roll(X, 1, 0), "rolled by 1 along axis 0"),
        (X.reshape(3, 2, 2).swapaxes(1, 2).reshape(3, 4), "2 groups interleaved"),
        (np.concatenate([X[:, :1], X[::-1, 1:]], 1), "reversed (flipped) along axis 0, in 1:4 of axis 1 alone"),
        (np.random.default_rng(1).permuted(X.ravel()).reshape(X.shape), ""),
    ],
)
def test_an_order_is_named(other, words):
    assert same_numbers(X, other)
    assert words in order_of(X, other * (1 + 1e-13))
    assert bool(order_of(X, other)) == bool(words)
    assert not same_numbers(X, other + 1e-3)
    square = X[:, :3]
    assert "axes 0 and 1 exchanged (transposed)" in order_of(square, square.T)


def test_whole_submodules_are_exchanged_before_their_parameters():
    names = ("a.norm.w", "a.fc.w", "b.norm.w", "b.fc.w")
    arrays = {name: np.full(2, float(k)) for k, name in enumerate(names)}
    first, second, swapped = next(iter(exchanges(arrays)))
    assert (first, second) == ("a", "b")
    assert {name: int(array[0]) for name, array in swapped.items()} == dict(zip(names, (2, 3, 0, 1), strict=True))


def test_a_module_borrows_the_parameters_of_its_like():
    arrays = {name: np.full(shape, 1.0) for name, shape in {"a.w": 2, "b.w": 2, "c.w": 3}.items()} | {"d.w": np.ones(2)}
    near = {"b.w", "c.w"}
    assert [(own, other, *taken) for own, other, taken in borrowed(arrays, near)] == [
        ("b", "a", "b.w"),
        ("b", "d", "b.w"),
    ]


T = 4 * torch.as_tensor(np.random.default_rng(2).standard_normal((2, 3, 6, 5)))
K = torch.as_tensor(np.random.default_rng(3).standard_normal((3, 2, 3, 3)))
GROUPED = torch.cat([T, -T[:, :1]], 1)
BINARY = (T, (T.roll(1, 3) > 0).double(), None, T[0, 0, 0].exp(), 1)
LABELS = torch.tensor([2, -100, 0, 4])
CLASSES = (T[0, 0, :4], LABELS, T[0, 0, 0].exp(), 1, -100)
INTO, INDEX, SOURCE = torch.zeros(4, 5, dtype=T.dtype), torch.tensor([0, 2, 0, 3, 2, 2]), T[0, 0]
SPOKEN = (T[0].transpose(0, 1).log_softmax(-1), torch.tensor([[1, 2, 3], [2, 1, 3], [3, 2, 1]]))
_CROPPED = (T, K, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1)


@pytest.mark.parametrize(
    ("operation", "args", "words", "expected"),
    [
        ("pow", (10000.0, -T), "powers of 10000, the flax side of 1000.", 1000.0**-T),
        ("pow", (T, 2), "takes the square, the flax side the power 3.", T**3),
        ("cumsum", (T, 1), "the flax side the whole sum", T.sum(1, keepdim=True).expand(T.shape)),
        ("cumsum", (T, 1), "leaves the element itself out", T.cumsum(1) - T),
        ("cumsum", (T, 1), "starts at the other end", T.flip(1).cumsum(1).flip(1)),
        (
            *("cumprod", (T, 1), "leaves the element itself out"),
            torch.cat([torch.ones_like(T[:, :1]), T[:, :-1]], 1).cumprod(1),
        ),
        ("linalg_vector_norm", (T, 2, [2, 3], True), "the flax side over (1,) (", T.norm(dim=1, keepdim=True)),
        ("linalg_vector_norm", (T, 2, [1], True), "the flax side the sum of", T.abs().sum(1, keepdim=True)),
        ("mean", (T[:, :2], [0]), "over axes (0,), the flax side over (1,)", T[:, :2].mean(1)),
        (
            *("index_add", (INTO, 0, INDEX, SOURCE), "(index_add), the flax side the mean"),
            torch.stack([SOURCE[k == INDEX].mean(0).nan_to_num() for k in range(4)]),
        ),
        ("sub", (T, T[:, :1]), "lacks what is subtracted", T),
        ("linalg_vector_norm", (T, 2, [1]), "over (0, 1, 2, 3)", T.norm().expand(2, 6, 5)),
        ("sum", (T, [2, 3]), "over (0, 2, 3)", T.sum((0, 2, 3)).expand(2, 3)),
        ("where", (T > 0, T, 2 * T), "takes everywhere", T),
        ("sigmoid", (T,), "softmax over axis 1.", T.softmax(1)),
        ("argmax", (T, 1), "the flax side by argmin", T.argmin(1)),
        ("round", (T,), "the flax side floor.", T.floor()),
        ("rsub", (T, 2.0), "has 2 - x here, the flax side 2 + x", 2 + T),
        ("_log_softmax", (T, 1, False), "the log_softmax is missing", T),
        ("_softmax", (T, 1, False), "has softmax, the flax side sigmoid.", T.sigmoid()),
        ("topk", (T, 3), "the 3 largest (topk), the flax side 2.", tuple(T.topk(2))),
        ("topk", (T, 3), "largest (topk), the flax side the smallest", tuple(T.topk(3, largest=False))),
        (
            *("_ctc_loss", (*SPOKEN, [6] * 3, [2, 1, 3]), "class 0 as the blank, the flax side's class 4"),
            torch.ops.aten._ctc_loss(*SPOKEN, [6] * 3, [2, 1, 3], 4)[0],
        ),
        (
            *("_ctc_loss", (*SPOKEN, [6] * 3, [2, 1, 3]), "counts all labels"),
            torch.ops.aten._ctc_loss(*SPOKEN, [6] * 3, [3] * 3)[0],
        ),
        ("max_pool2d_with_indices", (T, [3, 3], [2, 2], [1, 1]), "the flax side averages", F.avg_pool2d(T, 3, 2, 1)),
        (
            *("_softmax", (T[..., :5, :], -1, False), "that come later (causal)"),
            T[..., :5, :].masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf).softmax(-1),
        ),
        ("sort", (T, 2, True), "in descending order, the flax side in ascending.", T.sort(2)),
        ("cat", ([T, T, T], 2), "zeros for the first and last parts", torch.cat([0 * T, T, 0 * T], 2)),
        (
            *("max_pool2d_with_indices", (T, [3, 3], [2, 2], [1, 1]), "pads with zeros before"),
            F.max_pool2d(F.pad(T, (1, 1, 1, 1)), 3, 2),
        ),
        ("avg_pool2d", (T, [3, 3], [2, 2], [1, 1]), "the flax side maxima", F.max_pool2d(T, 3, 2, 1)),
        ("sum", (T, [1]), "a sum, the flax side a maximum", T.amax(1)),
        ("amax", (T, [1], True), "a maximum, the flax side a mean", T.mean(1, keepdim=True)),
        ("convolution", _CROPPED, "the flax side [0, 2]", F.conv_transpose2d(T, K, stride=2)[:, :, 0:11, 2:11]),
        ("constant_pad_nd", (T, [2, 0], 0.0), "the flax side 1 before and 1 after", F.pad(T, (1, 1))),
        ("upsample_nearest2d", (T, [12, 10]), "by bilinear with align_corners=True", "resized"),
        (
            *(
                "reflection_pad2d",
                (T, [2, 1, 2, 1]),
                "(reflect), the flax side with the values at the border (replicate).",
            ),
            F.pad(T, (2, 1, 2, 1), mode="replicate"),
        ),
        (
            *(
                "constant_pad_nd",
                (T, [2, 1]),
                "zeros, the flax side with reflections with the border itself (symmetric).",
            ),
            torch.as_tensor(np.pad(T, [(0, 0)] * 3 + [(2, 1)], mode="symmetric")),
        ),
        (
            *("convolution", (T[:, :2], K, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
            "the flax side with reflections (reflect).",
            F.conv2d(F.pad(T[:, :2], (1, 1, 1, 1), mode="reflect"), K),
        ),
        (
            "convolution",
            (F.pad(T[:, :2], (1, 1, 1, 1), mode="circular"), K, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
            "other end (circular), the flax side with zeros.",
            F.conv2d(T[:, :2], K, padding=1),
        ),
        (
            *("convolution", (GROUPED, K[[0, 1, 2, 0]], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2)),
            "neighbours as inputs of a group",
            F.conv2d(GROUPED[:, [0, 2, 1, 3]], K[[0, 1, 2, 0]], groups=2),
        ),
        (
            *("convolution", (GROUPED, K[[0, 1, 2, 0]], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2)),
            "neighbours as outputs of a group",
            F.conv2d(GROUPED, K[[0, 1, 2, 0]], groups=2)[:, [0, 2, 1, 3]],
        ),
        ("_adaptive_avg_pool2d", (T, [4, 2]), "averages, the flax side maxima", F.adaptive_max_pool2d(T, (4, 2))),
        (
            *("adaptive_max_pool2d", (T, [4, 2]), "windows of equal length that do not overlap"),
            F.max_pool2d(T[:, :, :4, :4], (1, 2)),
        ),
        (
            *("upsample_linear1d", (T[0], [9], False), "by nearest."),
            F.interpolate(T[0], size=9, mode="nearest"),
        ),
        (
            *("upsample_bilinear2d", (T, [3, 2], False), "bilinear with antialias"),
            F.interpolate(T, size=(3, 2), mode="bilinear", antialias=True),
        ),
        ("leaky_relu", (T, 0.2), "slope: the torch side's leaky_relu has 0.2, the flax side's 0.01.", F.leaky_relu(T)),
        ("relu", (T,), "the flax side quick gelu.", T * (1.702 * T).sigmoid()),
        ("huber_loss", (T, -T, 1, 1.5), "1.5, the flax side's 0.5.", F.huber_loss(T, -T, delta=0.5)),
        ("huber_loss", (T, -T, 1, 1.5), "the flax side the smooth L1", F.smooth_l1_loss(T, -T, beta=1.5)),
        ("smooth_l1_loss", (T, -T, 1, 0.5), "behaves like mse_loss", F.mse_loss(T, -T)),
        (
            "binary_cross_entropy_with_logits",
            BINARY,
            "lacks the pos_weight",
            F.binary_cross_entropy_with_logits(*BINARY[:2]),
        ),
        (
            *("binary_cross_entropy_with_logits", BINARY, "weighs both classes"),
            F.binary_cross_entropy_with_logits(*BINARY[:2], weight=BINARY[3]),
        ),
        (
            *("binary_cross_entropy_with_logits", BINARY, "a mean, the flax side a sum"),
            F.binary_cross_entropy_with_logits(*BINARY[:2], pos_weight=BINARY[3], reduction="sum"),
        ),
        ("nll_loss_forward", CLASSES, "lacks the weights", F.nll_loss(*CLASSES[:2])),
        (
            *("nll_loss_forward", CLASSES, "by the number of all"),
            F.nll_loss(*CLASSES[:3], reduction="sum") / 4,
        ),
        ("nll_loss_forward", CLASSES, "-100 as class 0", F.nll_loss(CLASSES[0], LABELS.clamp(min=0), CLASSES[2])),
        (
            "_weight_norm_interface",
            (K, K[:, :1, :1, :1], 0),
            "over (2, 3).",
            K / K.norm(dim=(2, 3), keepdim=True) * K[:, :1, :1, :1],
        ),
        ("hardtanh", (T, 0.0, 6.0), "has hardtanh, the flax side relu.", T.relu()),
        ("mul", (T[:, :1], T), "lacks this multiplication", T),
        ("div", (T, T[:, :1].exp()), "lacks this division", T),
        ("sigmoid", (T,), "1 - sigmoid", 1 - T.sigmoid()),
        ("exp", (T,), "exp of the negative", (-T).exp()),
        ("_weight_norm_interface", (T, T[:, :1, :1, :1], 0), "does not divide by the length", T * T[:, :1, :1, :1]),
        (
            "_weight_norm_interface",
            (K, K[:, :1, :1, :1], 0),
            "the gain",
            K / K.flatten(1).norm(dim=1)[:, None, None, None],
        ),
    ],
)
def test_an_offer_does_what_its_sentence_says(operation, args, words, expected):
    result = getattr(torch.ops.aten, operation)(*args)
    (run,) = [run for _, sentence, run in offers(operation, args, {}, result) if words in f"{sentence}."]
    if isinstance(expected, str):
        expected = F.interpolate(T, size=(12, 10), mode="bilinear", align_corners=True)
    torch.testing.assert_close(run(), expected)
    first, own = (found[0] if isinstance(found, tuple) else found for found in (run(), result))
    assert not torch.equal(first, own)
