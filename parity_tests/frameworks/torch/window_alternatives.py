"""What a convolution, a pool or a resize of a torch run may have been meant to do: other windows, paddings, parts.

They are hypotheses as `alternatives` has them, and come through its `offers`.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from parity_tests.frameworks.torch.norm_alternatives import Offer, again, put

_MOST_DILATION = 4
# What stands beyond the border, by NumPy's names.
_BORDERS = {
    "constant": "zeros",
    "reflect": "reflections (reflect)",
    "symmetric": "reflections with the border itself (symmetric)",
    "edge": "the values at the border (replicate)",
    "wrap": "the values of the other end (circular)",
}


def window_offers(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    """Yield the hypotheses about an operation that slides a window, for `alternatives.offers`."""
    yield from _window(name, args, kwargs, result)
    yield from _pad(name, *args)
    yield from _borders(name, args)
    yield from _regrouped(name, args, result)
    yield from _adaptive(name, args, result)
    yield from _pool(name, args, kwargs, result)
    yield from _resized(name, args, kwargs, result)


def _pad(name: str, *args: Any) -> Iterator[Offer]:
    """Divide what is padded otherwise among both ends of an axis."""
    if name != "constant_pad_nd":
        return
    x, pads = args[0], list(args[1])
    value = args[2] if len(args) > 2 else 0.0
    for k in range(0, len(pads), 2):
        for low in (n for n in range(sum(pads[k : k + 2]) + 1) if n != pads[k]):
            own, other = pads[k : k + 2], [low, sum(pads[k : k + 2]) - low]
            words = [f"{before} before and {after} after" for before, after in (own, other)]
            sentence = f"padding: the torch side pads {words[0]}, the flax side {words[1]}"
            moved = [*pads[:k], *other, *pads[k + 2 :]]
            yield f"share {low / sum(own):g} of axis {k}", sentence, lambda moved=moved: F.pad(x, moved, value=value)


def _bordered(x: torch.Tensor, pads: Sequence[tuple[int, int]], mode: Any) -> torch.Tensor:
    """Pad the last axes of an array with what a mode of NumPy puts there."""
    if mode == "constant":
        return _padded(x, pads)
    for axis, pad in zip(range(x.ndim - len(pads), x.ndim), pads, strict=True):
        x = x.index_select(axis, torch.as_tensor(np.pad(np.arange(x.shape[axis]), pad, mode=mode), device=x.device))
    return x


def _borders(name: str, args: Sequence[Any]) -> Iterator[Offer]:
    """Put other numbers beyond the border, on both ends or on the first alone, as a causal convolution has them."""
    padding = name.removesuffix("d").rstrip("123") in ("reflection_pad", "replication_pad", "constant_pad_n")
    if padding and (name != "constant_pad_nd" or not (args[2] if len(args) > 2 else 0)):
        flat = list(args[1])
        own = [(low, high) for low, high in zip(flat[::2], flat[1::2], strict=True)][::-1]
        mode = {"refl": "reflect", "repl": "edge"}.get(name[:4], "constant")
        yield from _other_borders(args[0], own, mode, lambda x: x)
    if name != "convolution" or args[6]:
        return
    x, w, count = args[0], args[1], args[1].ndim - 2

    def convolved(x: torch.Tensor) -> torch.Tensor:
        return again(name, (x, w, args[2], args[3], [0] * count, *args[5:]))

    pads = _each(args[4], count)
    if any(pads):
        yield from _other_borders(x, [(pad, pad) for pad in pads], "constant", convolved)
        return
    # Torch copies a circular border part by part.
    spreads = [(size - 1) * step for size, step in zip(w.shape[2:], _each(args[5], count), strict=True)]
    for own in ([(n // 2, n - n // 2) for n in spreads], [(n, 0) for n in spreads]):
        sizes = [size - sum(pad) for size, pad in zip(_spatial(x, count), own, strict=True)]
        inner = x[(..., *(slice(low, low + size) for (low, _), size in zip(own, sizes, strict=True)))]
        if any(spreads) and all(size > 0 for size in sizes) and torch.equal(_bordered(inner, own, "wrap"), x):
            yield from _other_borders(inner, own, "wrap", convolved)
            return


def _other_borders(
    x: torch.Tensor, own: Sequence[tuple[int, int]], mode: str, run: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[Offer]:
    """Yield an array with its border filled by other modes, for an operation that follows."""
    if any(pad < 0 for pads in own for pad in pads):
        return
    for pads in (own, [(sum(pad), 0) for pad in own]):
        for other, words in _BORDERS.items():
            if (mode, list(own)) != (other, list(pads)) and (mode != "constant" or other != "constant"):
                sentence = f"padding: the torch side pads with {_BORDERS[mode]}, the flax side with {words}"
                sentence += ", all of them before (causal)" * (list(own) != list(pads))
                yield f"border {other} {pads}", sentence, lambda p=pads, other=other: run(_bordered(x, p, other))


def _regrouped(name: str, args: tuple, result: torch.Tensor) -> Iterator[Offer]:
    """Divide the channels of a grouped convolution otherwise among its groups."""
    groups = args[8] if name == "convolution" else 1
    if groups == 1:
        return

    def dealt(x: torch.Tensor, parts: int) -> torch.Tensor:
        return x.unflatten(1, (parts, -1)).transpose(1, 2).flatten(1, 2)

    words = "the flax side takes every other channel (interleaved) where the torch side takes neighbours"
    if args[0].shape[1] > groups:
        # Group g then has the channels g, g + groups, ...
        read = put(args, 0, dealt(args[0], args[0].shape[1] // groups))
        yield "inputs interleaved", f"groups: {words} as inputs of a group", lambda: again(name, read)
        if result.shape[1] > groups:
            sentence = f"groups: {words} as inputs and outputs of a group"
            yield "both interleaved", sentence, lambda: dealt(again(name, read), groups)
    if result.shape[1] > groups:
        yield "outputs interleaved", f"groups: {words} as outputs of a group", lambda: dealt(result, groups)


def _adaptive(name: str, args: tuple, result: Any) -> Iterator[Offer]:
    """Take maxima for averages of an adaptive pool, or the other way round, or windows that do not overlap."""
    found = re.fullmatch(r"_?adaptive_(avg|max)_pool([23])d", name)
    if found is None:
        return
    count = int(found[2])
    x, sizes = args[0], _spatial(_first(result), count)
    average = found[1] == "avg"
    pools = [getattr(F, f"adaptive_{kind}_pool{count}d") for kind in ("avg", "max")]
    words = ("averages", "maxima")
    sentence = f"pool: the torch side takes {words[not average]}, the flax side {words[average]}"
    yield "other pool", sentence, lambda: pools[average](x, sizes)
    whole = [size // kept for size, kept in zip(_spatial(x, count), sizes, strict=True)]
    strides = [math.ceil(size / kept) for size, kept in zip(_spatial(x, count), sizes, strict=True)]
    kept = x[(..., *(slice(size * window) for size, window in zip(sizes, whole, strict=True)))]
    uneven = "has windows of equal length that do not overlap (a reshape, and the rest is cut off)"
    sentence = f"pool: the torch side has windows that reach all inputs (adaptive), the flax side {uneven}"
    if whole != strides:
        yield "equal windows", sentence, lambda: pools[not average](kept, sizes)


def _spatial(x: torch.Tensor, count: int) -> tuple[int, ...]:
    return tuple(x.shape[x.ndim - count :])


def _same(size: int, window: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Return what padding="SAME" adds before and after."""
    total = max((math.ceil(size / stride) - 1) * stride + (window - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _padded(x: torch.Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> torch.Tensor:
    flat = [amount for pad in reversed(pads) for amount in pad]
    return F.pad(x, flat, value=value)


def _window(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    if name != "convolution":
        return
    x, w, bias, stride, padding, dilation, transposed, output_padding, groups = args
    axes = tuple(range(2, w.ndim))
    if any(w.shape[axis] > 1 for axis in axes):
        listed = ", ".join(map(str, axes))
        sentence = (
            f"the kernel {{weight}} is flipped: reversing its window (axes {listed} on the torch side) makes both agree"
            + " (Flax's ConvTranspose flips it unless transpose_kernel=True)" * transposed
        )
        yield "flipped", sentence, lambda: again(name, put(args, 1, w.flip(axes)))
    if transposed:
        yield from _cropped(args, result)
        return
    sizes, windows = _spatial(x, len(axes)), w.shape[2:]
    stride, padding, dilation = (_each(value, len(axes)) for value in (stride, padding, dilation))

    def convolved(pads: Sequence[tuple[int, int]], dilations: Sequence[int]) -> Any:
        return again(
            name, (_padded(x, pads), w, bias, stride, [0] * len(axes), dilations, False, output_padding, groups)
        )

    def length(size: int, window: int, step: int, pad: tuple[int, int], spread: int) -> int:
        return (size + sum(pad) - (window - 1) * spread - 1) // step + 1

    own = [(pad, pad) for pad in padding]
    for spread in range(1, _MOST_DILATION + 1):
        spreads = [spread] * len(axes)
        same = [_same(*one) for one in zip(sizes, windows, stride, spreads, strict=True)]
        shifted = [(low + 1, high - 1) for low, high in own if high]
        lower = [(low - 1, high + 1) for low, high in own if low]
        reversed_same = [(high, low) for low, high in same]
        wider = [(spread - own_spread) * (n - 1) for n, own_spread in zip(windows, dilation, strict=True)]
        before = [(low + more, high) for (low, high), more in zip(own, wider, strict=True)]
        after = [(low, high + more) for (low, high), more in zip(own, wider, strict=True)]
        several = [("own", own), ("SAME", same), ("SAME, the other way round", reversed_same)]
        # What is padded by an operation of its own goes with the dilation.
        for title, pads in [*several, ("before", before), ("after", after)]:
            yield from _convolution(title, pads, spread, dilation, own, args, result, length, convolved, sizes, windows)
        for pads in (shifted, lower):
            if len(pads) == len(axes) and spread == dilation[0]:
                title = f"{pads[0][0]} before and {pads[0][1]} after"
                yield from _convolution(
                    title, pads, spread, dilation, own, args, result, length, convolved, sizes, windows
                )


def _cropped(args: tuple, result: torch.Tensor) -> Iterator[Offer]:
    """Take another part of a transposed convolution, of which `padding` crops both ends."""
    count = result.ndim - 2
    own, zero = _each(args[4], count), [0] * count
    whole = again("convolution", (*args[:4], zero, args[5], True, zero, args[8]))
    spare = [size - kept for size, kept in zip(_spatial(whole, count), _spatial(result, count), strict=True)]
    for starts in itertools.product(*(range(one + 1) for one in spare)):
        if list(starts) != own:
            part = tuple(
                slice(start, start + size) for start, size in zip(starts, _spatial(result, count), strict=True)
            )
            sentence = f"padding: the torch side crops {own} before, the flax side {list(starts)} (a shift)"
            yield f"cropped {starts}", sentence, lambda part=part: whole[(..., *part)].clone()


def _convolution(
    title: str,
    pads: Sequence[tuple[int, int]],
    spread: int,
    dilation: Sequence[int],
    own: Sequence[tuple[int, int]],
    args: tuple,
    result: torch.Tensor,
    length: Callable[..., int],
    convolved: Callable[..., Any],
    sizes: Sequence[int],
    windows: Sequence[int],
) -> Iterator[Offer]:
    """Yield one convolution with other padding or dilation, if its result has the same shape."""
    spreads, stride = [spread] * len(sizes), _each(args[3], len(sizes))
    lengths = [length(*one) for one in zip(sizes, windows, stride, pads, spreads, strict=True)]
    if (list(pads) == list(own) and spreads == list(dilation)) or lengths != list(_spatial(result, len(sizes))):
        return
    if spreads != list(dilation):
        sentence = f"dilation: the torch side uses {dilation[0]}, the flax side behaves like {spread}"
    else:
        sentence = (
            f"padding: the torch side pads {_pads(own)}, the flax side behaves like {_pads(pads)}"
            f"{' (SAME)' if title.startswith('SAME') else ''}"
        )
    yield f"convolution {spread} {pads}", sentence, lambda: convolved(pads, spreads)


def _pads(pads: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{low} before and {high} after" for low, high in dict.fromkeys(pads))


def _pool(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    average = name.startswith("avg_pool") and name.endswith("d")
    if not average and not (name.startswith("max_pool") and name.endswith("with_indices")):
        return
    defaults = ([], 0, False, True, None) if average else ([], 0)
    given, dims = [*args, *defaults[len(args) - 2 :]], 3 if "3d" in name else 2
    kernel, stride, padding = (_each(value, dims) for value in (given[1], given[2] or given[1], given[3]))
    if average:
        words = ("leaves the padding out of", "counts the padding in")
        own, other = words[given[5]], words[not given[5]]
        sentence = f"count_include_pad: the torch side {own} its averages, the flax side {other} them"
        yield "other count", sentence, lambda: again(name, put(given, 5, not given[5]))
    if average:
        maximum = args[0], kernel, stride, padding
        sentence = "pool: the torch side takes averages, the flax side maxima"
        yield "maxima", sentence, lambda: again(f"max_pool{dims}d_with_indices", maximum)[0]
    else:
        sentence = "pool: the torch side takes maxima, the flax side averages"
        yield "averages", sentence, lambda: again(f"avg_pool{dims}d", (args[0], kernel, stride, padding))
        with_zeros = _padded(args[0], [(pad, pad) for pad in padding]), kernel, stride
        sentence = "padding: the flax side pads with zeros before it takes maxima, the torch side with nothing (-inf)"
        yield "zeros", sentence, lambda: _first(again(name, with_zeros))
    same = [_same(*one) for one in zip(_spatial(args[0], dims), kernel, stride, strict=True)]
    own_pads = [(pad, pad) for pad in padding]
    if same != own_pads:
        padded = _padded(args[0], same, 0.0 if average else -math.inf), kernel, stride, [0] * dims
        sentence = f"padding: the torch side pads {_pads(own_pads)}, the flax side {_pads(same)} (SAME)"
        yield "SAME", sentence, lambda: _first(again(name, padded))


def _resized(name: str, args: tuple, kwargs: dict, result: Any) -> Iterator[Offer]:
    found = re.fullmatch(r"_?upsample_(nearest_exact|nearest|linear|bilinear|bicubic|trilinear)([123])d(_aa)?", name)
    if found is None:
        return
    own = found[1].replace("_", "-") + " with antialias" * bool(found[3])
    smooth = {"1": ("linear",), "2": ("bilinear", "bicubic"), "3": ("trilinear",)}[found[2]]
    ways = [("nearest", None, False), ("nearest-exact", None, False)]
    ways += [(mode, corners, False) for mode in smooth for corners in (False, True)]
    ways += [(mode, False, True) for mode in smooth if found[2] == "2"]
    for mode, corners, antialias in ways:
        sentence = f"interpolation: the torch side resizes by {own}, the flax side by {mode}"
        sentence += f" with align_corners={corners}" * (not mode.startswith("nearest") and not antialias)
        sentence += " with antialias" * antialias
        # The cubic that `jax.image.resize` has is torch's with antialias, which changes nothing else in an enlargement.
        sentence += " (a cubic of -0.5, normalised at the border)" * (antialias and mode == "bicubic")
        size, options = tuple(result.shape[2:]), {"align_corners": corners, "antialias": antialias}
        yield (
            f"resized {mode} {corners} {antialias}",
            sentence,
            functools.partial(F.interpolate, args[0], size, mode=mode, **options),
        )


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def _each(value: Any, dims: int) -> list[int]:
    """Return one number for each axis."""
    several = [*value] if isinstance(value, list | tuple) else [value]
    return several * dims if len(several) == 1 else several
