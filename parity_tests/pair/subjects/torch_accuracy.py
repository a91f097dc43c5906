"""How far torch's elementary functions are from correct rounding on the device at hand, measured, in units of u."""

from typing import Any

import torch

from parity_tests.harness.dtypes import FORMATS
from parity_tests.pair.subjects.operations import TORCH_FUNCTIONS

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_POINTS = 4099  # a vectorised body and a tail
_cache: dict[tuple, float] = {}


def _grid(dtype: torch.dtype, device: torch.device, positive: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    size = torch.exp(torch.empty(_POINTS, dtype=torch.float64).uniform_(-9, 4, generator=generator))
    sign = 1.0 if positive else torch.randint(0, 2, (_POINTS,), generator=generator) * 2 - 1
    return (size * sign).to(device=device, dtype=dtype)


def function_error(func: Any, args: tuple, kwargs: dict, dtype: str) -> float:
    """Largest error of an elementary function in units of u, at least 1; 1 for correctly rounded operations.

    Args:
        func: the operation.
        args: its arguments; tensors are replaced by test points, numbers are kept.
        kwargs: its keyword arguments.
        dtype: format to measure in, against float64.
    """
    name = func._schema.name.removeprefix("aten::")
    if name not in TORCH_FUNCTIONS or dtype == "float64":
        return 1.0
    device = next(leaf.device for leaf in args if isinstance(leaf, torch.Tensor))
    shown = tuple("tensor" if isinstance(leaf, torch.Tensor) else leaf for leaf in args)
    key = (func, shown, tuple(kwargs.items()), dtype, device)
    if key not in _cache:
        fmt, worst = FORMATS[dtype], 1.0
        for positive in (False, True):
            points = [_grid(_DTYPES[dtype], device, positive).roll(k) for k in range(len(args))]

            def run(exact: bool, points: list[torch.Tensor] = points) -> torch.Tensor:
                filled = [
                    point.to(torch.float64 if exact else point.dtype, copy=True)
                    if shown_leaf == "tensor"
                    else shown_leaf
                    for point, shown_leaf in zip(points, shown, strict=True)
                ]
                return func(*filled, **kwargs).to(torch.float64)

            exact, rounded = run(True), run(False)
            usable = torch.isfinite(exact) & (exact.abs() < 2.0**15) & (exact.abs() > 2.0**10 * fmt.smallest_normal)
            error = ((rounded - exact).abs() / exact.abs())[usable & torch.isfinite(rounded)]
            worst = max(worst, float(error.max()) / fmt.roundoff if error.numel() else 1.0)
        _cache[key] = worst
    return _cache[key]
