"""What a loss of a torch run may have been meant to do: other weights, reductions, targets that count, other losses.

They are hypotheses as `alternatives` has them, and come through its `offers`.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from parity_tests.frameworks.torch.norm_alternatives import Offer, again, put

_REDUCTIONS = ("none", "mean", "sum")
_MOST_CLASSES = 12


def loss_offers(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    """Yield the hypotheses about a loss, for `alternatives.offers`."""
    yield from _like(name, args, result)
    yield from _weighted(name, args, result)
    yield from _reduced(name, args, kwargs, result)
    yield from _alignment(name, args)


def _alignment(name: str, args: tuple) -> Iterator[Offer]:
    """Take another class as the blank of a CTC loss, or all of what is padded."""
    if name != "_ctc_loss":
        return
    log_probabilities, targets, inputs, labels, *rest = args
    blank, classes = rest[0] if rest else 0, log_probabilities.shape[-1]
    given = [log_probabilities, targets, inputs, labels, blank, *rest[1:]]
    others = (other for other in (classes - 1, *range(classes - 1)) if other != blank)
    for other in itertools.islice(others, _MOST_CLASSES):
        sentence = f"blank: the torch side's CTC loss has class {blank} as the blank, the flax side's class {other}"
        yield f"blank {other}", sentence, lambda other=other: again(name, put(given, 4, other))[0]
    for position, longest, what in ((2, len(log_probabilities), "steps"), (3, targets.shape[-1], "labels")):
        own = given[position].tolist() if isinstance(given[position], torch.Tensor) else list(given[position])
        if targets.ndim == 2 and any(length != longest for length in own):
            whole = [longest] * len(own)
            whole = given[position].new_tensor(whole) if isinstance(given[position], torch.Tensor) else whole
            sentence = f"lengths: the flax side's CTC loss counts all {what} (the padding too), the torch side's {own}"
            yield f"all {what}", sentence, lambda p=position, whole=whole: again(name, put(given, p, whole))[0]


def _like(name: str, args: tuple, result: Any) -> Iterator[Offer]:
    """Take a loss of the same kind."""
    if name in ("huber_loss", "smooth_l1_loss") and len(args) > 3:
        own, factor = args[3], args[3] if name == "smooth_l1_loss" else 1 / args[3]
        other = "huber" if name == "smooth_l1_loss" else "smooth L1"
        if own != 1:
            sentence = f"loss: the torch side has {name}, the flax side the {other} loss, {factor:g} times as large"
            yield f"{other} loss", sentence, lambda: result * factor
    if name in ("mse_loss", "huber_loss", "smooth_l1_loss") and len(args) > 2:
        for other in ("mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss"):
            if other != name:
                reduction = _REDUCTIONS[args[2]]
                sentence = f"loss: the torch side has {name}, the flax side behaves like {other}"
                function = getattr(F, other)
                yield other, sentence, lambda f=function, r=reduction: f(args[0], args[1], reduction=r)


def _weighted(name: str, args: tuple, result: Any) -> Iterator[Offer]:
    """Take a loss of classes with other weights, other targets that count, another divisor."""
    defaults = (None, 1) if name == "binary_cross_entropy" else (None, None, 1)
    given = [*args, *defaults[len(args) - 2 :]] if name.startswith("binary_cross_entropy") else [*args]
    if name == "binary_cross_entropy_with_logits":
        for position, word in ((2, "weight"), (3, "pos_weight")):
            if given[position] is not None:
                sentence = f"weight: the flax side lacks the {word} of this loss"
                yield f"without {word}", sentence, lambda p=position: again(name, put(given, p, None))
        if given[3] is not None and given[2] is None:
            sentence = "weight: the flax side weighs both classes by the pos_weight, the torch side positive ones alone"
            both = put(put(given, 3, None), 2, given[3])
            yield "both weighed", sentence, lambda: again(name, both)
    if name in ("binary_cross_entropy_with_logits", "binary_cross_entropy"):
        for other in (1, 2) if given[-1] else ():
            if other != given[-1]:
                sentence = f"reduction: the torch side takes a {_REDUCTIONS[given[-1]]}, the flax side a "
                sentence += _REDUCTIONS[other]
                yield "other reduction", sentence, lambda other=other: again(name, [*given[:-1], other])
    if name == "nll_loss_forward":
        x, target, weight, reduction, ignored = args
        if weight is not None:
            sentence = "weight: the flax side lacks the weights of the classes in this loss"
            yield "no weights", sentence, lambda: again(name, put(args, 2, None))[0]
        count = target.numel()
        if reduction == 1 and float(result[1]) not in (0.0, float(count)):
            what = "weights" if weight is not None else "targets that are not ignored"
            sentence = f"reduction: the torch side divides by the sum of {what}, the flax side by the number of all"
            yield "all count", sentence, lambda: result[0] * result[1] / count
        if bool((target == ignored).any()):
            for row in (0, x.shape[-1] - 1):
                counted = put(args, 1, target.masked_fill(target == ignored, row))
                sentence = f"ignore_index: the flax side counts targets of {ignored} as class {row}, the torch side not"
                yield f"counted as {row}", sentence, lambda counted=counted: again(name, counted)[0]


def _reduced(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    position = {"nll_loss_forward": 3, "mse_loss": 2, "smooth_l1_loss": 2, "huber_loss": 2}.get(name)
    if position is None:
        return
    used = args[position] if len(args) > position else kwargs.get("reduction", 1)
    for other in (1, 2) if used else ():
        if other != used:
            sentence = f"reduction: the torch side takes a {_REDUCTIONS[used]}, the flax side a {_REDUCTIONS[other]}"
            other_args = put(args, position, other) if len(args) > position else [*args, other]
            yield "other reduction", sentence, lambda other_args=other_args: again(name, other_args)
    if name == "nll_loss_forward":
        for smoothing in (0.1, 0.2, 0.05, 0.01, 0.15, 0.3):
            smooth = -args[0].mean(-1)
            smooth = smooth.mean() if used == 1 else smooth.sum() if used == 2 else smooth
            sentence = f"label smoothing: the torch side has none, the flax side behaves like {smoothing:g}"
            mixed = (1 - smoothing) * result[0] + smoothing * smooth
            yield f"smoothing {smoothing}", sentence, lambda mixed=mixed: mixed
