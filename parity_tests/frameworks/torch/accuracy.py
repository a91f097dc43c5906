"""How far torch's kernels are from correct rounding on the device at hand, measured."""

from typing import Any

import torch

from parity_tests.judge.dtypes import FORMATS
from parity_tests.pair.operations import TORCH_COMPLEX_FUNCTIONS, TORCH_FUNCTIONS

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KINDS = ("tensor", "complex")
_POINTS = 4099  # a vectorised body and a tail
_cache: dict[tuple, float] = {}


def _grid(dtype: torch.dtype, device: torch.device, positive: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    size = torch.exp(torch.empty(_POINTS, dtype=torch.float64).uniform_(-9, 4, generator=generator))
    sign = 1.0 if positive else torch.randint(0, 2, (_POINTS,), generator=generator) * 2 - 1
    return (size * sign).to(device=device, dtype=dtype)


def function_error(func: Any, args: tuple, kwargs: dict, dtype: str) -> float:
    """Largest error of an elementary function in units of u, at least 1; 1 for correctly rounded operations.

    Of a complex result the modulus of the error counts, in units of sqrt(2) u of the modulus.

    Args:
        func: the operation.
        args: its arguments; tensors are replaced by test points, numbers are kept.
        kwargs: its keyword arguments.
        dtype: format to measure in, against float64; complex numbers are measured in float32's parts.
    """
    name = func._schema.name.removeprefix("aten::")
    in_plane = name == "polar" or any(isinstance(leaf, torch.Tensor) and leaf.is_complex() for leaf in args)
    if name not in (TORCH_COMPLEX_FUNCTIONS if in_plane else TORCH_FUNCTIONS) or dtype == "float64":
        return 1.0
    dtype = "float32" if in_plane else dtype
    device = next(leaf.device for leaf in args if isinstance(leaf, torch.Tensor))
    shown = tuple(_kind(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in args)
    key = (func, shown, tuple(kwargs.items()), dtype, device)
    if key not in _cache:
        fmt, worst = FORMATS[dtype], 1.0
        for positive in (False, True):
            points = [_grid(_DTYPES[dtype], device, positive).roll(k) for k in range(len(args))]

            def run(exact: bool, points: list[torch.Tensor] = points) -> torch.Tensor:
                filled = []
                for point, leaf in zip(points, shown, strict=True):
                    # A quarter turn of the points is a grid of its own for the imaginary part.
                    value = torch.complex(point, point.roll(_POINTS // 4)) if leaf == "complex" else point
                    wide = torch.complex128 if value.is_complex() else torch.float64
                    filled.append(value.to(wide if exact else value.dtype, copy=True) if leaf in _KINDS else leaf)
                result = func(*filled, **kwargs)
                return result.to(torch.complex128 if result.is_complex() else torch.float64)

            exact, rounded = run(True), run(False)
            modulus = exact.abs()
            usable = torch.isfinite(exact) & (modulus < 2.0**15) & (modulus > 2.0**10 * fmt.smallest_normal)
            error = ((rounded - exact).abs() / modulus)[usable & torch.isfinite(rounded)]
            unit = fmt.roundoff * (2**0.5 if exact.is_complex() else 1.0)
            worst = max(worst, float(error.max()) / unit if error.numel() else 1.0)
        _cache[key] = worst
    return _cache[key]


def kernel_errors(func: Any, args: tuple, kwargs: dict, dtype: str) -> list[float]:
    """Largest absolute errors of a kernel's results, on its arguments as they are in the format.

    Args:
        func: the operation.
        args: float64 arguments.
        kwargs: keyword arguments.
        dtype: format to measure in; where it has no such kernel its 32-bit one counts.
    """

    def results(to: torch.dtype | None, narrow: torch.dtype) -> list[torch.Tensor]:
        def cast(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
                return leaf
            return leaf.to(narrow).to(to or narrow)

        found = func(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})
        leaves = found if isinstance(found, tuple | list) else (found,)
        return [leaf.double() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]

    narrow = _DTYPES[dtype]
    try:
        rounded = results(None, narrow)
    except (NotImplementedError, RuntimeError):
        narrow = torch.float32
        rounded = results(None, narrow)
    exact = results(torch.float64, narrow)
    return [
        float((r - e).abs().nan_to_num(0.0).max()) if r.numel() else 0.0 for r, e in zip(rounded, exact, strict=True)
    ]


def _kind(tensor: torch.Tensor) -> str:
    return "complex" if tensor.is_complex() else "tensor"
