"""What an operation of a torch run that adds up, compares or selects numbers may have been meant to do.

Other axes, means for sums, other norms, more of the largest. They are hypotheses as `alternatives` has them, and come
through its `offers`.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from parity_tests.frameworks.torch.norm_alternatives import Offer, again, put

# Where the axes of a reduction stand among its arguments, and what it is called.
_AXES = {"mean": (1, "mean"), "sum": (1, "sum"), "amax": (1, "maximum"), "amin": (1, "minimum")}
_AXES |= {"linalg_vector_norm": (2, "norm"), "logsumexp": (1, "logsumexp")}
_AXES |= {"var": (1, "variance"), "std": (1, "standard deviation"), "var_mean": (1, "mean and variance")}
_NORMS = {1.0: "sum of magnitudes (L1)", 2.0: "length (L2)", math.inf: "largest magnitude"}
_GATHERED = {"sum": "sum", "mean": "mean", "amax": "maximum", "amin": "minimum"}
_MOST_NEIGHBOURS = 2  # more or fewer of the largest
_MOST_AXES = 4  # of an array whose sets of axes are all tried


def reduction_offers(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    """Yield the hypotheses about an operation that reduces or selects, for `alternatives.offers`."""
    yield from _cumulated(name, args)
    yield from _moment(name, args, kwargs, result)
    yield from _other_norm(name, args, kwargs)
    yield from _other_axes(name, args, kwargs, result)
    yield from _gathered(name, args, kwargs)
    yield from _largest(name, args, kwargs)


def _cumulated(name: str, args: tuple) -> Iterator[Offer]:
    """Take the whole, or leave the element itself out, or start at the other end, of a running sum or product."""
    if name not in ("cumsum", "cumprod"):
        return
    word, neutral = ("sum", 0.0) if name == "cumsum" else ("product", 1.0)
    x, axis = args[:2]
    run, whole = getattr(torch, name), getattr(torch, word if word == "sum" else "prod")
    sentence = f"causal: the torch side takes a running {word} ({name}), the flax side the whole {word}"
    yield f"whole {word}", sentence, lambda: whole(x, axis, keepdim=True).expand(x.shape).clone()
    sentence = f"off by one: the running {word} ({name}) leaves the element itself out on the flax side"
    first = torch.full_like(x.narrow(axis, 0, 1), neutral)
    before = x.narrow(axis, 0, x.shape[axis] - 1)
    yield "exclusive", sentence, lambda: run(torch.cat([first, before], axis), axis)
    sentence = f"order: the running {word} ({name}) starts at the other end (reversed) on the flax side"
    yield "reversed", sentence, lambda: run(x.flip(axis), axis).flip(axis)


def _moment(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    if name in ("mean", "sum"):
        count = args[0].numel() / max(result.numel(), 1)
        other, factor = ("a sum", count) if name == "mean" else ("a mean", 1 / max(count, 1))
        own = "mean" if name == "mean" else "sum"
        yield (
            "other reduction",
            f"reduction: the torch side takes a {own}, the flax side {other}",
            lambda: result * factor,
        )
    given = [*args, None, None][:3]
    axes = given[1] if isinstance(given[1], list | tuple) else ()
    if name in ("mean", "sum", "amax") and axes:
        keep = bool(kwargs.get("keepdim", given[2]))
        others = {"mean": torch.mean, "sum": torch.sum, "maximum": torch.amax}
        for other, function in others.items():
            if (other == "maximum") == (name == "amax"):
                continue
            sentence = (
                f"reduction: the torch side takes a {'maximum' if name == 'amax' else name}, the flax side a {other}"
            )
            yield f"a {other}", sentence, lambda function=function: function(args[0], tuple(axes), keepdim=keep)
    if name in ("var", "std", "var_mean", "std_mean"):
        first = result[0] if isinstance(result, tuple) else result
        count = args[0].numel() / max(first.numel(), 1)
        correction = kwargs.get("correction", given[2] if len(args) > 2 and not isinstance(given[2], bool) else 1)
        correction = 1 if correction is None else float(correction)
        other = 0.0 if correction else 1.0
        if count > 1:
            factor = (count - correction) / (count - other)
            factor = factor if name.startswith("var") else math.sqrt(factor)
            words = ("n", "n - 1")[:: 1 if other else -1]
            sentence = f"variance: the torch side divides by {words[0]}, the flax side by {words[1]}"
            yield "other correction", sentence, lambda: first * factor


def _other_norm(name: str, args: tuple, kwargs: dict) -> Iterator[Offer]:
    """Take another norm of a vector."""
    own = float(args[1]) if name == "linalg_vector_norm" and len(args) > 1 else 2.0
    for other, words in _NORMS.items() if name == "linalg_vector_norm" and own in _NORMS else ():
        if other != own:
            sentence = f"norm: the torch side takes the {_NORMS[own]}, the flax side the {words}"
            other_args = put(args, 1, other) if len(args) > 1 else [*args, other]
            yield f"norm {other}", sentence, lambda other_args=other_args: again(name, other_args, kwargs)


def _other_axes(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    """Reduce over other axes; where none are kept, only if the result has the same shape."""
    position, word = _AXES.get(name, (0, ""))
    if not word or len(args) <= position or not isinstance(args[position], list | tuple) or not args[position]:
        return
    x, own = args[0], tuple(axis % args[0].ndim for axis in args[position])
    shape = (result[0] if isinstance(result, tuple) else result).shape
    keep = len(shape) == x.ndim
    sets = (axes for count in range(1, x.ndim + 1) for axes in itertools.combinations(range(x.ndim), count))
    # The same number of axes first.
    for axes in sorted(sets, key=lambda axes: abs(len(axes) - len(own))) if x.ndim <= _MOST_AXES else ():
        kept = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
        if set(axes) != set(own) and (keep or kept == tuple(shape)):
            sentence = (
                f"axes: the torch side takes the {word} over axes {own}, the flax side over {axes} (of {{shape}})"
            )
            sentence = sentence.replace("{shape}", str(tuple(x.shape)))
            other_args = put(args, position, list(axes))
            yield f"{word} over {axes}", sentence, lambda other_args=other_args: again(name, other_args, kwargs)
    left = [axis for axis in range(x.ndim) if axis not in own] if not keep and x.ndim <= _MOST_AXES else []
    for more in (more for count in range(len(left), 0, -1) for more in itertools.combinations(left, count)):
        # What has fewer axes then is spread over the others where it is used.
        axes, kept = sorted({*own, *more}), [size if axis not in more else 1 for axis, size in enumerate(x.shape)]
        kept = [size for axis, size in enumerate(kept) if axis not in own]
        sentence = f"axes: the torch side takes the {word} over axes {own}, the flax side over {tuple(axes)} (of "
        wider = put(args, position, axes)

        def spread(wider: list[Any] = wider, kept: list[int] = kept) -> torch.Tensor:
            return again(name, wider, kwargs).reshape(kept).expand(shape).clone()

        if not name.startswith("var_mean"):
            yield f"{word} over {axes} and spread", f"{sentence}{tuple(x.shape)})", spread


def _gathered(name: str, args: tuple, kwargs: dict) -> Iterator[Offer]:
    """Take the mean or the largest of what has one index, in the place of the sum, or the other way round."""
    own = {"index_add": "sum", "scatter_add": "sum"}.get(name, "")
    if name == "scatter_reduce":
        own = args[4] if len(args) > 4 else kwargs.get("reduce", "")
    if own not in _GATHERED or kwargs.get("alpha", 1) != 1:
        return
    into, axis, index, source = (args[k] for k in range(4))
    where = index.reshape([-1 if k == axis % into.ndim else 1 for k in range(into.ndim)])
    where = index if index.shape == source.shape else where.expand_as(source)

    def reduced(kind: str) -> Callable[[], torch.Tensor]:
        return lambda: into.scatter_reduce(axis, where, source, kind, include_self=False)

    for kind, words in _GATHERED.items():
        if kind != own:
            sentence = (
                f"reduction: the torch side takes the {_GATHERED[own]} of what has one index ({name}), the flax side "
                f"the {words}"
            )
            yield f"gathered {kind}", sentence, reduced(kind)


def _largest(name: str, args: tuple, kwargs: dict) -> Iterator[Offer]:
    """Select more or fewer of the largest, or the smallest."""
    if name in ("argmax", "argmin"):
        other, words = ("argmin", "smallest") if name == "argmax" else ("argmax", "largest")
        sentence = f"order: the torch side finds the index by {name}, the flax side by {other} (of the {words})"
        yield other, sentence, lambda: again(other, args, kwargs)
    if name != "topk":
        return
    x, own = args[:2]
    axis, largest = [*args[2:], *(-1, True)[max(len(args) - 2, 0) :]][:2]
    words = ("smallest", "largest")
    for other in (own + by * sign for by in range(1, _MOST_NEIGHBOURS + 1) for sign in (-1, 1)):
        if 0 < other <= x.shape[axis]:
            sentence = f"k: the torch side selects the {own} {words[largest]} (topk), the flax side {other}"
            yield f"k {other}", sentence, lambda other=other: again(name, put(args, 1, other), kwargs)
    sentence = f"order: the torch side selects the {words[largest]} (topk), the flax side the {words[not largest]}"
    yield "other end", sentence, lambda: again(name, (x, own, axis, not largest), {})
