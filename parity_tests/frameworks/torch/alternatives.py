"""What a single operation of a torch run may have been meant to do, as the other side does it: hypotheses by operation.

Each is a name, a sentence that is true if the other side behaves so, and a function that returns other results. In a
sentence `{weight}` stands for the parameter's name.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from parity_tests.frameworks.torch.loss_alternatives import loss_offers
from parity_tests.frameworks.torch.norm_alternatives import EPSILONS, Offer, again, norm_offers, put
from parity_tests.frameworks.torch.operations import names
from parity_tests.frameworks.torch.reduction_alternatives import reduction_offers
from parity_tests.frameworks.torch.window_alternatives import window_offers

_LARGEST_EPSILON = 1e-2  # a constant that is added and is at most this can be meant as an epsilon
_GELU_NAME = {"none": "the exact gelu (erf)", "tanh": "the tanh approximation of gelu"}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu with tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "hard_sigmoid": F.hardsigmoid,
    "relu6": F.relu6,
}
# Rarer ones, in the place of another activation alone.
_RARE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": F.mish,
    "selu": F.selu,
    "softsign": F.softsign,
    "log_sigmoid": F.logsigmoid,
    "squared relu": lambda x: torch.relu(x).square(),
}
_UNARY = names("""
relu gelu silu tanh sigmoid softplus elu leaky_relu hardtanh hardswish hardsigmoid mish celu selu exp log log1p sqrt
abs square clamp clamp_min clamp_max erf sin cos softshrink hardshrink threshold log_sigmoid_forward
""")
# Functions that no activation is: what they are, for a sentence.
_FUNCTIONS = {"exp": "exp", "sqrt": "the square root", "rsqrt": "one over the square root", "abs": "abs", "sin": "sin"}
_FUNCTIONS |= {"square": "the square", "cos": "cos", "erf": "erf", "log": "log", "log1p": "log1p"}
_BASES = (10000.0, 1000.0, 100.0, 500000.0, 1000000.0, 100000.0, 2.0, 10.0, math.e)
_EXPONENTS = (1.0, 2.0, 0.5, 3.0, 1.5, 4.0, -0.5, -1.0, -2.0)
_OTHER_ACTIVATIONS = names("hardtanh hardsigmoid mish celu selu log_sigmoid_forward")
# By operation: where its number stands, what it is called, and the numbers that are usual.
_SETTINGS = {
    "leaky_relu": (1, "slope", (0.01, 0.2, 0.1, 0.3, 0.05, 0.02, 0.25, 0.0)),
    "elu": (1, "alpha", (1.0, 0.5, 0.1, 2.0)),
    "celu": (1, "alpha", (1.0, 0.5, 0.1, 2.0)),
    "softplus": (1, "beta", (1.0, 2.0, 0.5, 5.0, 10.0, 100.0)),
    "softshrink": (1, "lambda", (0.5, 1.0, 0.1)),
    "hardshrink": (1, "lambda", (0.5, 1.0, 0.1)),
    "huber_loss": (3, "delta", (1.0, 0.5, 0.1, 1.5, 2.0, 1.345)),
    "smooth_l1_loss": (3, "beta", (1.0, 0.5, 0.1, 1.5, 2.0, 1 / 9)),
}
_ROUNDINGS = ("round", "floor", "ceil", "trunc")
_LOGARITHMS = {"log": torch.log, "log2": torch.log2, "log10": torch.log10, "log1p": torch.log1p}
_LINEAR = {"addmm": 1, "mm": 0, "bmm": 0, "baddbmm": 1, "convolution": 0, "mv": 1, "addmv": 2, "embedding": None}
_MOST_ROWS = 12


def offers(operation: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    """Yield the hypotheses about one operation, the specific ones first.

    Args:
        operation: bare name, in place or not.
        args: as they were before.
        kwargs: likewise.
        result: of the operation as it is.
    """
    name = operation.removesuffix("_")
    for kind in (
        norm_offers,
        _added,
        _power,
        _constant,
        _gelu,
        _setting,
        window_offers,
        _mask,
        reduction_offers,
        _logarithm,
        _rounding,
        loss_offers,
        _embedding,
        _ranked,
        _softmax,
        _joined,
    ):
        yield from kind(name, args, kwargs, result)
    yield from _activation(name, args, kwargs, result)
    yield from _sum_of_two(name, args, kwargs, result)
    yield from _scaled(name, args, kwargs, result)


def _power(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    """Take another base, or another exponent, of a power that has a number for one of them."""
    if name != "pow" or not isinstance(result, torch.Tensor):
        return
    base, exponent = args[0], args[1]
    if isinstance(base, int | float):
        for other in _BASES:
            if other != base:
                sentence = f"base: the torch side takes powers of {base:g}, the flax side of {other:g}"
                yield f"base {other}", sentence, lambda other=other: other**exponent
    if isinstance(exponent, int | float):
        for other in _EXPONENTS:
            if other != exponent:
                own = "the square" if exponent == 2 else f"the power {exponent:g}"
                sentence = f"power: the torch side takes {own}, the flax side the power {other:g}"
                yield f"exponent {other}", sentence, lambda other=other: base**other


def _added(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    if name == "add" and len(args) > 1 and isinstance(args[1], float) and 0 < args[1] <= _LARGEST_EPSILON:
        for value in EPSILONS:
            if value != args[1]:
                sentence = f"epsilon: the torch side uses {args[1]:g}, the flax side behaves like {value:g}"
                yield f"epsilon={value!r}", sentence, lambda value=value: args[0] + value


def _constant(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    """Leave an added number out, or add one to a factor."""
    if name in ("add", "sub") and len(args) > 1 and isinstance(args[1], int | float):
        sentence = f"constant: the flax side lacks the {args[1]:g} that the torch side {name}s here"
        yield "without constant", sentence, lambda: args[0].clone()
    if name in ("add", "sub", "rsub") and len(args) > 1 and isinstance(args[1], int | float) and args[1]:
        words = {"add": ("{} + x", "{} - x"), "sub": ("x - {}", "-x - {}"), "rsub": ("{} - x", "{} + x")}[name]
        before, after = (word.format(f"{args[1]:g}") for word in words)
        sentence = f"sign: the torch side has {before} here, the flax side {after}"
        yield "other sign", sentence, lambda: again(name, put(args, 0, -args[0]), kwargs)
    if name == "mul" and len(args) > 1 and isinstance(args[1], torch.Tensor) and args[1].ndim:
        for position, which in enumerate(("first", "second")):
            sentence = f"constant: the flax side multiplies by 1 + the {which} factor, the torch side by the factor"
            yield f"1 + {which}", sentence, lambda position=position: args[0] * args[1] + args[1 - position]


def _gelu(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    if name == "gelu":
        form = kwargs.get("approximate", "none")
        other = "tanh" if form == "none" else "none"
        sentence = f"gelu: the torch side uses {_GELU_NAME[form]}, the flax side behaves like {_GELU_NAME[other]}"
        yield "other gelu", sentence, lambda: F.gelu(args[0], approximate=other)


def _setting(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    """Take another number of an activation or a loss, or the loss that is like it but for a factor."""
    position, word, usual = _SETTINGS.get(name, (0, "", ()))
    for value in usual if len(args) > position else ():
        if value != args[position]:
            sentence = f"{word}: the torch side's {name} has {args[position]:g}, the flax side's {value:g}"
            yield f"{word} {value}", sentence, lambda value=value: again(name, put(args, position, value), kwargs)


def _shifted(mask: torch.Tensor, axis: int, by: int) -> torch.Tensor:
    """Move a mask along an axis; what comes in is what stood at the border."""
    size = mask.shape[axis]
    index = (torch.arange(size, device=mask.device) - by).clamp(0, size - 1)
    return mask.index_select(axis, index)


def _mask(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    places = {"masked_fill": 1, "where": 0, "add": 1}
    if name not in places or len(args) <= places[name] or not isinstance(args[places[name]], torch.Tensor):
        return
    where, mask = places[name], args[places[name]]
    if mask.is_complex():
        return
    if (name == "add" and not bool(torch.isinf(mask).any() | (mask <= -1e4).any())) or (
        name != "add" and mask.dtype != torch.bool
    ):
        return
    for axis, by in itertools.product((-1, -2), (1, -1)):
        if mask.ndim >= -axis and mask.shape[axis] > 1:
            sentence = (
                "mask: the flax side behaves like the torch side with its mask moved by one position (off by one)"
            )
            moved = _shifted(mask, axis, by)
            yield (
                f"mask moved {axis} {by}",
                sentence,
                lambda moved=moved: again(name, put(args, where, moved), kwargs),
            )
    if name != "add":
        sentence = "mask: the flax side behaves like the torch side with the opposite mask"
        yield "opposite mask", sentence, lambda: again(name, put(args, where, ~mask), kwargs)
    if name == "where" and isinstance(args[1], torch.Tensor) and args[1].shape == result.shape:
        sentence = "mask: the flax side takes everywhere what the torch side takes where its mask is true alone"
        yield "true everywhere", sentence, lambda: args[1].clone()
    sentence = "mask: the flax side behaves like the torch side without its mask"
    unmasked = args[0] if name != "where" else args[2]
    yield "no mask", sentence, lambda: unmasked.broadcast_to(result.shape).clone()


def _rounding(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    for other in _ROUNDINGS if name in _ROUNDINGS else ():
        if other != name:
            sentence = f"rounding: the torch side takes {name}, the flax side {other}"
            yield other, sentence, lambda other=other: again(other, args[:1])


def _logarithm(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    for other, function in _LOGARITHMS.items() if name in _LOGARITHMS else ():
        if other != name:
            yield other, f"logarithm: the torch side takes {name}, the flax side {other}", lambda f=function: f(args[0])


def _embedding(name: str, args: Any, kwargs: dict, result: Any) -> Iterator[Offer]:
    if name == "embedding_dense_backward" and args[3] >= 0:
        sentence = f"padding_idx: the torch side leaves row {args[3]} out of the gradient, the flax side does not"
        yield "no padding_idx", sentence, lambda: again(name, put(args, 3, -1))
        for row in range(min(args[2], _MOST_ROWS)):
            sentence = f"padding_idx: the torch side leaves row {args[3]} out of the gradient, the flax side row {row}"
            if row != args[3]:
                yield f"padding_idx {row}", sentence, lambda row=row: again(name, put(args, 3, row))
    if name in ("_embedding_bag", "_embedding_bag_forward_only"):
        own = args[4] if len(args) > 4 else 0
        words = ("sums", "means", "maxima")
        for other in (k for k in range(3) if k != own and len(args) > 4):
            sentence = (
                f"reduction: the torch side takes {words[own]} of the rows of a bag, the flax side {words[other]}"
            )
            yield words[other], sentence, lambda other=other: again(name, put(args, 4, other))[0]
    if name == "embedding":
        count = int(args[0].shape[0])
        for row in dict.fromkeys((0, count - 1, 1)):
            sentence = f"padding_idx: the flax side returns zeros for index {row}, the torch side does not"
            yield f"zeros for {row}", sentence, lambda row=row: result * (args[1] != row)[..., None]


def _ranked(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    """Sort the other way."""
    if name == "sort":
        axis = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        words = ("ascending", "descending")[:: -1 if kwargs.get("descending", len(args) > 2 and args[2]) else 1]
        sentence = f"order: the torch side sorts in {words[0]} order, the flax side in {words[1]}"
        yield words[1], sentence, lambda: tuple(each.flip(axis) for each in result)


def _joined(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    """Join zeros in the place of the first and the last part."""
    parts = list(args[0]) if name == "cat" else []
    for ends, which in (((0, -1), "first and last parts"), ((0,), "first part"), ((-1,), "last part")):
        if len(parts) > len(ends):
            sentence = f"padding: the flax side has zeros for the {which} of what the torch side joins (cat)"
            without = f"padding: a softmax on the flax side leaves out the {which} of what the torch side joins (cat)"
            for value, words in ((0.0, sentence), (-math.inf, without)):
                joined = [*parts]
                for k in ends:
                    joined[k] = torch.full_like(parts[k], value)
                yield f"{value} {ends}", words, lambda joined=joined: again(name, put(args, 0, joined), kwargs)


def _softmax(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    if name in ("_softmax", "_log_softmax", "_safe_softmax"):
        word, log = name.lstrip("_"), name == "_log_softmax"
        yield "no softmax", f"function: the {word} is missing on the flax side", lambda: args[0].clone()
        others = {"softmax": torch.softmax} if log else {"log_softmax": torch.log_softmax}
        others |= {"log_sigmoid" if log else "sigmoid": lambda x, _: (F.logsigmoid if log else torch.sigmoid)(x)}
        for other, function in others.items():
            sentence = f"function: the torch side has {word}, the flax side {other}"
            yield other, sentence, lambda function=function: function(args[0], args[1])
        own, size = args[1] % args[0].ndim, args[0].shape[-1]
        if own == args[0].ndim - 1 > 0 and size == args[0].shape[-2] > 1:
            later = torch.ones(size, size, dtype=torch.bool, device=args[0].device).triu(1)
            sentence = "mask: the flax side masks the positions that come later (causal), the torch side does not"
            causal = put(args, 0, args[0].masked_fill(later, -math.inf))
            yield "causal", sentence, lambda: again(name, causal, kwargs)
        for axis in range(args[0].ndim):
            if axis != own:
                sentence = f"softmax: the torch side takes it over axis {own}, the flax side over axis {axis}"
                yield f"axis {axis}", sentence, lambda axis=axis: again(name, put(args, 1, axis), kwargs)


def _activation(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    if name in _UNARY and isinstance(result, torch.Tensor):
        kind = f"function: {_FUNCTIONS[name]}" if name in _FUNCTIONS else f"activation: {name}"
        yield "missing", f"{kind} is missing on the flax side", lambda: args[0].clone()
        for other, function in (ACTIVATIONS | _RARE).items():
            if other != name and (name in ACTIVATIONS or name in _OTHER_ACTIVATIONS):
                sentence = f"activation: the torch side has {name}, the flax side {other}"
                yield f"activation {other}", sentence, lambda f=function: f(args[0])
        sentence = f"sign: the flax side takes {name} of the negative"
        yield "negated before", sentence, lambda: again(name, put(args, 0, -args[0]), kwargs)
        for axis in range(args[0].ndim) if name == "sigmoid" else ():
            sentence = f"activation: the torch side has sigmoid, the flax side softmax over axis {axis}"
            yield f"softmax {axis}", sentence, lambda axis=axis: args[0].softmax(axis)
        if name == "sigmoid":
            sentence = "complement: the flax side has 1 - sigmoid (an inverted gate) where the torch side has sigmoid"
            yield "complement", sentence, lambda: 1 - result
        for shift in (1.0, -1.0):
            sentence = f"constant: the flax side adds {shift:g} before {name}, the torch side does not"
            yield f"{shift:g} before", sentence, lambda shift=shift: again(name, put(args, 0, args[0] + shift), kwargs)
    position = _LINEAR.get(name)
    if position is not None:
        for other, function in ACTIVATIONS.items():
            sentence = (
                f"activation: the flax side has {other} before this operation, which is missing on the torch side"
            )
            yield (
                f"{other} before",
                sentence,
                lambda f=function: again(name, put(args, position, f(args[position])), kwargs),
            )


def _sum_of_two(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    if name == "sub" and len(args) > 1 and isinstance(args[1], torch.Tensor) and args[0].shape == result.shape:
        shape = tuple(args[1].shape)
        sentence = f"difference: the flax side lacks what is subtracted here (a mean, a shift), values of shape {shape}"
        yield "nothing subtracted", sentence, lambda: args[0].clone()
    if name != "add" or len(args) < 2 or not isinstance(args[1], torch.Tensor):
        return
    for position, which in enumerate(("first", "second")):
        if args[1 - position].shape == result.shape:
            sentence = f"residual: the flax side lacks the {which} term of this sum (a skipped connection, a bias)"
            yield f"without {which}", sentence, lambda position=position: args[1 - position].clone()


def _scaled(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    if name in ("mul", "div") and len(args) > 1 and isinstance(result, torch.Tensor):
        other = args[1]
        if not isinstance(other, torch.Tensor) or other.numel() == 1:
            value = torch.as_tensor(other).detach().item()
            sentence = f"scale: the flax side lacks this {'factor' if name == 'mul' else 'division'} of {value:.6g}"
            yield "no factor", sentence, lambda: args[0].broadcast_to(result.shape).clone()
            return
        # A product has no first factor: either may be the one that is missing.
        for position in (0, 1) if name == "mul" and isinstance(args[0], torch.Tensor) else (0,):
            if args[position].shape == result.shape:
                what = (
                    "multiplication (a weight, a normalisation)" if name == "mul" else "division (not normalised there)"
                )
                sentence = (
                    f"factor: the flax side lacks this {what}, by values of shape {tuple(args[1 - position].shape)}"
                )
                yield f"only {position}", sentence, lambda position=position: args[position].clone()
