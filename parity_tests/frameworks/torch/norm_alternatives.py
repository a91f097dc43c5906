"""What a norm of a torch run may have been meant to do: other epsilons, moments, groups, weights."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Offer = tuple[str, str, Callable[[], Any]]
EPSILONS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0)
# Where the epsilon stands, and weight and bias, among the arguments of a norm.
NORMS = {
    "native_layer_norm": (4, 2, 3),
    "_fused_rms_norm": (3, 2, None),
    "native_group_norm": (7, 1, 2),
    "native_batch_norm": (7, 1, 2),
    "_native_batch_norm_legit": (7, 1, 2),
    "_native_batch_norm_legit_no_training": (6, 1, 2),
}


def again(name: str, args: Sequence[Any], kwargs: dict | None = None) -> Any:
    """Run an operation of torch by its bare name."""
    return getattr(torch.ops.aten, name)(*args, **(kwargs or {}))


def put(args: Sequence[Any], position: int, value: Any) -> list[Any]:
    """Return arguments with another one at a position."""
    return [value if k == position else arg for k, arg in enumerate(args)]


def norm_offers(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    """Yield the hypotheses about a norm, for `alternatives.offers`."""
    if name == "_weight_norm_interface":
        yield from _weight_norm(*args)
    if name not in NORMS:
        return
    position, weight, bias = NORMS[name]
    # Running statistics are updated in place: a second run must not do that again.
    args = tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
    used = args[position]
    for value in EPSILONS:
        if value != used:
            sentence = f"epsilon: the torch side uses {used:g}, the flax side behaves like {value:g}"
            yield f"epsilon={value!r}", sentence, lambda value=value: again(name, put(args, position, value))
    if "batch_norm" in name and args[3] is not None:
        if name.endswith("no_training") or not args[5]:
            before, after = "running statistics (eval mode)", "statistics of the batch (train mode)"
            training = True
        else:
            before, after, training = "statistics of the batch (train mode)", "running statistics (eval mode)", False
        statistics = (*args[:5], training, args[position - 1], used)
        sentence = f"mode: the torch side normalises by {before}, the flax side by {after}"
        yield "other mode", sentence, lambda: again("native_batch_norm", statistics)
    for what, where in (("weight", weight), ("bias", bias)):
        if where is not None and args[where] is not None:
            sentence = f"the {what} of this norm has no effect on the flax side"
            yield f"without {what}", sentence, lambda where=where: again(name, put(args, where, None))
    yield from _other_moments(name, args, used)
    yield "no norm", "this norm is missing on the flax side", lambda: args[0]


def _weight_norm(v: torch.Tensor, gain: torch.Tensor, axis: int = 0) -> Iterator[Offer]:
    own = tuple(k for k in range(v.ndim) if k != axis)

    def divided(axes: Sequence[int] = own, epsilon: float = 0.0) -> torch.Tensor:
        return v / (v.square().sum(tuple(axes), keepdim=True) + epsilon).sqrt()

    several = (axes for count in range(v.ndim, 0, -1) for axes in itertools.combinations(range(v.ndim), count))
    for axes in several:
        if axes != own:
            sentence = f"axes: the torch side takes lengths over axes {own} of the weight, the flax side over {axes}"
            yield f"lengths over {axes}", sentence, lambda axes=axes: divided(axes) * gain
    sentence = "norm: the flax side divides by the sum of magnitudes (L1), the torch side by the length (L2)"
    yield "magnitudes", sentence, lambda: v / v.abs().sum(own, keepdim=True) * gain
    yield "no gain", "factor: the gain of this weight norm has no effect on the flax side", lambda: divided()
    yield "no length", "factor: the flax side does not divide by the length of the weight", lambda: v * gain
    for value in EPSILONS[:-1]:
        sentence = f"epsilon: the torch side has none in this weight norm, the flax side behaves like {value:g}"
        yield f"epsilon={value!r}", sentence, lambda value=value: divided(own, value) * gain


@dataclass(frozen=True)
class _Moments:
    """How a norm computes.

    Attributes:
        axes: that moments are taken over, of the array in `shape`.
        shape: in which the groups have an axis of their own.
        epsilon: beside the variance.
        centred: whether the mean is subtracted.
        correction: subtracted from the number of elements of the variance.
        outside: whether the epsilon is added to the root of the variance.
        added: to the weight.
        order: of the axes of `shape` that give the channels back; None for the same.
    """

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    epsilon: float
    centred: bool = True
    correction: int = 0
    outside: bool = False
    added: float = 0.0
    order: tuple[int, ...] | None = None

    def applied(self, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        """Return the norm of an array, with weight and bias that fit its shape."""
        v = x.reshape(self.shape)
        v = v.transpose(*self.order) if self.order else v
        count = math.prod(v.shape[axis] for axis in self.axes)
        middle = v - v.mean(self.axes, keepdim=True) if self.centred else v
        variance = (middle**2).sum(self.axes, keepdim=True) / max(count - self.correction, 1)
        root = variance.sqrt() + self.epsilon if self.outside else (variance + self.epsilon).sqrt()
        result = middle / root
        result = (result.transpose(*self.order) if self.order else result).reshape(x.shape)
        result = result * (weight + self.added) if weight is not None else result
        return result + bias if bias is not None else result


def _other_moments(name: str, args: tuple, epsilon: float | None) -> Iterator[Offer]:
    """Yield norms that differ in one respect."""
    x = args[0]
    if epsilon is None or (name.endswith("batch_norm") and not args[5]) or name.endswith(("no_training", "legit")):
        return
    position = NORMS[name]
    weight, bias = (None if k is None else args[k] for k in position[1:])
    groups = 0
    if name in ("native_layer_norm", "_fused_rms_norm"):
        own = _Moments(tuple(range(x.ndim - len(args[1]), x.ndim)), tuple(x.shape), epsilon, name != "_fused_rms_norm")
    elif name == "native_group_norm":
        groups = args[6]
        own = _Moments((2,), (x.shape[0], groups, -1), epsilon)
    else:
        own = _Moments((0, *range(2, x.ndim)), tuple(x.shape), epsilon)
        # An instance norm is a batch norm of one image that has the channels of all.
        groups = x.shape[1] if len(x) == 1 else 0
    if name not in ("native_layer_norm", "_fused_rms_norm"):
        by_channel = (-1, *[1] * (x.ndim - 2))
        weight, bias = (None if array is None else array.reshape(by_channel) for array in (weight, bias))

    def other(**changed: Any) -> Callable[[], torch.Tensor]:
        return lambda: dataclasses.replace(own, **changed).applied(x, weight, bias)

    yield (
        "sample variance",
        "variance: the torch side divides by n, the flax side by n - 1 in this norm",
        other(correction=1),
    )
    yield (
        "epsilon outside",
        "epsilon: the flax side adds it to the root of the variance in this norm",
        other(outside=True),
    )
    words = ("does not subtract", "subtracts")
    sentence = f"mean: the flax side {words[not own.centred]} it in this norm, the torch side {words[own.centred]} it"
    yield "other centre", sentence, other(centred=not own.centred)
    if weight is not None:
        for added in (1.0, -1.0):
            sentence = f"the flax side multiplies by {'1 + ' if added > 0 else '-1 + '}the weight in this norm"
            yield f"added {added}", sentence, other(added=added)
    channels = x.shape[1] if x.ndim > 1 else 1
    for count in (n for n in range(1, channels + 1) if groups and channels % n == 0 and n != groups):
        sentence = f"groups: the torch side normalises {groups} groups, the flax side behaves like {count}"
        yield f"groups {count}", sentence, other(shape=(x.shape[0], count, -1), axes=(2,))
    if groups > 1 and channels // groups > 1:
        shape = (x.shape[0], channels // groups, groups, *x.shape[2:])
        axes = (2, *range(3, len(shape)))
        sentence = "groups: the flax side takes every other channel (interleaved) where the torch side takes neighbours"
        yield "interleaved", sentence, other(shape=shape, axes=axes, order=(1, 2))
    for axes, what in (
        ((tuple(range(1, x.ndim))), "all but the batch"),
        (tuple(range(2, x.ndim)), "space"),
        ((1,), "channels"),
    ):
        if axes and axes != own.axes and x.ndim > 2 and name != "native_layer_norm":
            sentence = f"axes: the flax side takes the moments of this norm over {what}"
            yield f"over {what}", sentence, other(shape=tuple(x.shape), axes=axes)


def norms_of(norms: Mapping[int, tuple[str, tuple]], name: str, result: Any) -> Iterator[Offer]:
    """Yield, for a sum, the norms of earlier operations by their numbers, to be taken of it."""
    for number, (norm, args) in norms.items() if name.removesuffix("_") == "add" else ():
        if isinstance(result, torch.Tensor) and result.shape == args[0].shape:
            yield f"norm {number}", "", lambda norm=norm, args=args: again(norm, put(args, 0, result))[0]
