"""Which accumulator torch's 16-bit kernels have on the device at hand, measured operation by operation.

Most kernels sum 16-bit numbers in float32 and round once; some (convolution gradients that go through columns, some
norm gradients) round to the 16-bit format on the way. Neither is documented, and both are correct torch: the noise
model must know which. float32 is not measured: it promises float32 sums, so that TF32 counts as a mismatch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from parity_tests.judge.dtypes import FORMATS

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_MEMBERS = 16
_cache: dict[tuple, str] = {}

Noisy = Callable[[int, tuple, dict], Any]


def accumulator(func: Any, args: tuple, kwargs: dict, dtype: str, noisy: Noisy) -> str:
    """Returns `float32` where the kernel errs as a float32 accumulator explains, else `dtype`.

    The model's spread is an upper bound on the root mean square of the errors it describes (roundings are uniform, the
    model takes their largest size), so that errors above it come from a coarser accumulator.

    Args:
        func: the operation.
        args: float64 arguments, as they occur.
        kwargs: keyword arguments.
        dtype: storage format; 16 bits, or there is nothing to measure.
        noisy: runs the operation with the noise of a float32 accumulator, for a member's number and its arguments.
    """
    if dtype not in _DTYPES:
        return dtype
    key = (func, dtype, *(_outline(leaf) for leaf in tree_leaves((args, kwargs))))
    if key not in _cache:
        _cache[key] = "float32" if _explained(func, args, kwargs, dtype, noisy) else dtype
    return _cache[key]


def _outline(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else str(leaf)


def _explained(func: Any, args: tuple, kwargs: dict, dtype: str, noisy: Noisy) -> bool:
    def cast(leaf: Any, to: torch.dtype) -> Any:
        return leaf.to(to) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    stored = tree_map(lambda leaf: cast(leaf, _DTYPES[dtype]), (args, kwargs))
    wide = tree_map(lambda leaf: cast(leaf, torch.float64), stored)
    try:
        received = _floats(func(*stored[0], **stored[1]))
    except RuntimeError:
        return False  # the kernel wants mixed formats (statistics in float32): the coarser model covers it
    exact = _floats(func(*wide[0], **wide[1]))
    squares = [torch.zeros_like(value) for value in exact]
    # Some operations update an argument (running statistics): what is measured must leave the caller's alone.
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
    middle = _floats(func(*args, **kwargs))
    for member in range(_MEMBERS):
        for total, value, centre in zip(squares, _floats(noisy(member, args, kwargs)), middle, strict=True):
            total += (value - centre) ** 2 / _MEMBERS
    worst = 0.0
    for value, centre, variance in zip(received, exact, squares, strict=True):
        usable = torch.isfinite(value) & (variance > 0) & (centre.abs() > FORMATS[dtype].smallest_normal)
        ratio = ((value - centre) ** 2 / variance)[usable]
        worst = max(worst, math.sqrt(float(ratio.mean())) if ratio.numel() else 0.0)
    return worst <= 1.0


def _floats(result: Any) -> list[torch.Tensor]:
    leaves = result if isinstance(result, tuple | list) else (result,)
    return [leaf.double() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
