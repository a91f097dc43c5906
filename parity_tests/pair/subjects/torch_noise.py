"""A dispatch mode that evaluates torch code in float64 and, if asked, lets every operation err as it may in a format.

Noise model: see ``pair.calibration``. Fused operations (softmax, norms, gelu, ...) are taken apart: torch evaluates
their insides in float32 at least and rounds the result once, so the parts err at ``u_acc``, the result at ``u``.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from parity_tests.harness.dtypes import FORMATS
from parity_tests.pair.subjects.operations import (
    TORCH_EXACT,
    TORCH_FUNCTIONS,
    TORCH_FUSED,
    TORCH_SUMS,
    TORCH_SUMS_WITH_ADDEND,
)
from parity_tests.pair.subjects.torch_accuracy import function_error
from parity_tests.pair.subjects.torch_fingerprint import accumulator

_aten = torch.ops.aten
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

_POOL_BITS = 16
_ACCUMULATOR = {"float64": "float64", "float32": "float32", "bfloat16": "float32", "float16": "float32"}


@functools.cache
def _pool(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0xD1CE)
    pool = torch.randn(1 << _POOL_BITS, dtype=torch.float64, generator=generator)
    return ((pool - pool.mean()) / pool.std()).to(device)


class _Noise:
    """Standard normal numbers, looked up by the bits of the value that is rounded."""

    def __init__(self, device: torch.device, member: int, amplitude: float) -> None:
        self._pool = _pool(device)
        self._state = (2 * member + 1) * 0x9E3779B97F4A7C15
        self._amplitude = amplitude

    def perturb(self, value: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        # Multiplicative hashing: the highest bits of value * odd number depend on all bits of the value. A new odd
        # number for each operation; |value|, because rounding to nearest is odd.
        self._state = (self._state * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & ((1 << 64) - 1)
        odd = self._state | 1
        bits = value.abs().contiguous().view(torch.int64) * (odd - (1 << 64) if odd >= 1 << 63 else odd)
        xi = self._pool[(bits >> (64 - _POOL_BITS)) & ((1 << _POOL_BITS) - 1)]
        return value + self._amplitude * deviation * xi


class DoublePrecision(TorchDispatchMode):
    """Evaluates in float64: casts to narrower formats are left out, and constants created as such are float64.

    Args:
        dtype: format that every operation errs as in; the insides of sums and fused operations err as their
            accumulator does, see ``torch_fingerprint``.
        member: number of the ensemble's run.
        amplitude: of the noise; 0 for the truth.
        device: of the tensors.
        rewrite: changes an operation's arguments before it runs, to try a hypothesis.
        measure: False takes float32 accumulators for granted; else those of 16-bit kernels are measured.
    """

    def __init__(
        self,
        dtype: str = "float64",
        member: int = 0,
        amplitude: float = 0.0,
        device: torch.device | None = None,
        rewrite: Callable[[str, tuple, dict], tuple[tuple, dict]] | None = None,
        measure: bool = True,
    ) -> None:
        super().__init__()
        self._format, self._accumulator = FORMATS[dtype], FORMATS[_ACCUMULATOR[dtype]]
        self._device = device or torch.device("cpu")
        self._noise = _Noise(self._device, member, amplitude) if amplitude else None
        self._rewrite, self._measure = rewrite, measure
        self.notes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs one operation."""
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _FLOATS:
            kwargs["dtype"] = torch.float64
        name = func._schema.name.partition("::")[2]
        if self._rewrite is not None:
            args, kwargs = self._rewrite(name, args, kwargs)
        if self._noise is None or name in TORCH_EXACT or _is_view(func):
            return func(*args, **kwargs)
        if name in TORCH_SUMS_WITH_ADDEND:
            with self:
                return decomposition_table[func](*args, **kwargs)
        if name == "convolution" and args[2] is not None:
            with self:
                product = func(*args[:2], None, *args[3:], **kwargs)
                return product + args[2].reshape(1, -1, *[1] * (product.ndim - 2))
        if name in TORCH_SUMS:
            with self._accumulating(func, args, kwargs):
                return self._sum(name, func, args, kwargs)
        if name in ("mean", "var") or (name in TORCH_FUSED and func in decomposition_table):
            with self._accumulating(func, args, kwargs):
                if name in ("mean", "var"):
                    return self._rounded(name, self._parts(_moment, (name, args, kwargs), {}))
                return self._rounded(name, self._parts(decomposition_table[func], args, kwargs))
        if func._can_decompose() and torch.Tag.pointwise not in func.tags and name not in TORCH_FUNCTIONS:
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        # The pieces of decomposed operations ("prims::div") do not carry the tag.
        if torch.Tag.pointwise not in func.tags and func.namespace != "prims" and _floats(result):
            self.notes.add(f"torch {name} has no rounding model of its own")
        return self._rounded(name, result, function_error(func, args, kwargs, self._format.name))

    @contextlib.contextmanager
    def _accumulating(self, func: Any, args: tuple, kwargs: dict) -> Iterator[None]:
        """Sets the accumulator of one operation; the parts of a fused one have the same."""
        before = self._accumulator, self._measure
        if self._measure:
            name = self._format.name

            def noisy(member: int, args: tuple, kwargs: dict) -> Any:
                with DoublePrecision(name, member, 1.0, self._device, measure=False):
                    return func(*args, **kwargs)

            self._accumulator = FORMATS[accumulator(func, args, kwargs, name, noisy)]
            self._measure = False
            if self._accumulator.roundoff > FORMATS["float32"].roundoff:
                operation = func._schema.name.partition("::")[2]
                self.notes.add(f"torch {operation} accumulates in {self._accumulator.name} here, as measured")
        try:
            yield
        finally:
            self._accumulator, self._measure = before

    def _parts(self, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Runs a fused operation's parts under this mode, in the accumulator's format."""
        outer, self._format = self._format, self._accumulator
        try:
            with self:
                return run(*args, **kwargs)
        finally:
            self._format = outer

    def _sum(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """Adds the error of recursive summation: of K terms, squares adding up to Q, in a random order."""

        def mapped(change: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
            def each(leaf: Any) -> Any:
                return change(leaf) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 else leaf

            return _floats(func(*tree_map(each, args), **kwargs))

        # The operation itself, on squares and on ones, gives Q and K: padding, strides and masks included.
        squares, terms = mapped(torch.square), mapped(torch.ones_like)
        result = func(*args, **kwargs)
        deviations = []
        for value, square, count in zip(_floats(result), squares, terms, strict=True):
            summation = self._accumulator.roundoff**2 * (count * value**2 / 3 + count * square / 6 + square)
            variance = summation + (self._format.roundoff * value) ** 2
            deviations.append(variance.clamp_min(0).sqrt() + self._format.smallest_normal * (square != 0))
        return self._perturbed(name, result, deviations)

    def _rounded(self, name: str, result: Any, factor: float = 1.0) -> Any:
        """Rounds the floating-point results to the format."""
        u, eta = factor * self._format.roundoff, self._format.smallest_normal
        return self._perturbed(name, result, [u * value.abs() + eta * (value != 0) for value in _floats(result)])

    def _perturbed(self, name: str, result: Any, deviations: list[torch.Tensor]) -> Any:
        assert self._noise is not None
        left = iter(deviations)
        in_place = name.endswith("_")

        def each(leaf: Any) -> Any:
            if not (isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64):
                return leaf
            assert self._noise is not None
            noisy = self._noise.perturb(leaf, next(left))
            return leaf.copy_(noisy) if in_place else noisy

        return tree_map(each, result)


def _moment(name: str, args: tuple, kwargs: dict) -> torch.Tensor:
    """Mean or variance in terms of sums."""
    x = args[0]
    dims = args[1] if len(args) > 1 and args[1] is not None else kwargs.get("dim")
    dims = list(range(x.ndim)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    # Third comes keepdim; in prims.var the correction, without keepdim.
    third = args[2] if len(args) > 2 else None
    keep = bool(third) if isinstance(third, bool) else bool(kwargs.get("keepdim", False))
    count = math.prod(x.shape[dim] for dim in dims)
    if name == "mean":
        return torch.sum(x, dims, keepdim=keep) / count
    correction = kwargs.get("correction", None if isinstance(third, bool) else third)
    centred = x - torch.sum(x, dims, keepdim=True) / count
    return torch.sum(torch.square(centred), dims, keepdim=keep) / (count - (1 if correction is None else correction))


def _floats(result: Any) -> list[torch.Tensor]:
    leaves = result if isinstance(result, tuple | list) else (result,)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64]


def _is_view(func: Any) -> bool:
    return any(ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns)
