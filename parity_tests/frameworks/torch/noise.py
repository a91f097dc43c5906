"""A dispatch mode that evaluates torch code in float64 and, if asked, lets every operation err as it may in a format.

Noise model: see `pair.calibration`. Fused operations (softmax, norms, gelu, ...) are taken apart: torch evaluates
their insides in float32 at least and rounds the result once, so the parts err at `u_acc`, the result at `u`.
A few kernels hold a constant of float32 in float64 too; the truth goes round them.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch._decomp import decomposition_table

from parity_tests.frameworks.torch.ensemble import INEXACT, Deviations, Noise, first_state, mapped, name_of, perform
from parity_tests.frameworks.torch.modes import DispatchMode
from parity_tests.frameworks.torch.operations import (
    BACKWARD_STABLE,
    EXACT,
    FUNCTIONS,
    FUSED,
    ITERATIVE,
    PRODUCTS,
    RESAMPLING,
    SUMS,
    SUMS_WITH_ADDEND,
    TRANSFORMS,
    accumulator,
    function_error,
    kernel_errors,
)
from parity_tests.judge.dtypes import FORMATS

_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_VIEW_AS_DTYPE = torch.ops.aten.view.dtype

_ACCUMULATOR = {"float64": "float64", "float32": "float32", "bfloat16": "float32", "float16": "float32"}


def _as_it_is(result: Any) -> Any:
    """Return what the parts of a fused operation have made."""
    return result


class DoublePrecision(DispatchMode):
    """Evaluate in float64: casts to narrower formats are left out, and constants created as such are float64.

    Args:
        dtype: format that every operation errs as in; the insides of sums and fused operations err as their
            accumulator does, see `operations.accumulator`.
        member: number of the ensemble's run.
        amplitude: of the noise; 0 for the truth.
        device: of the tensors.
        rewrite: changes an operation's arguments before it runs, to try a hypothesis.
        measure: False takes float32 accumulators for granted; else those of 16-bit kernels are measured.
        record: called with every operation that runs, its arguments, its deviations, and a function that runs it.
    """

    def __init__(
        self,
        dtype: str = "float64",
        member: int = 0,
        amplitude: float = 0.0,
        device: torch.device | None = None,
        rewrite: Callable[[str, tuple, dict], tuple[tuple, dict]] | None = None,
        measure: bool = True,
        record: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self._format, self._accumulator = FORMATS[dtype], FORMATS[_ACCUMULATOR[dtype]]
        self._device = device or torch.device("cpu")
        self._noise = Noise(self._device, first_state(member), amplitude) if amplitude else None
        self._rewrite, self._measure, self._record = rewrite, measure, record
        self.notes: set[str] = set()
        self.captured = False  # whether tensors of a narrow format came in from outside

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operation."""
        args, kwargs = self._wide(func, args, dict(kwargs or {}))
        name = name_of(func)
        if self._rewrite is not None:
            args, kwargs = self._rewrite(name, args, kwargs)
        return self._run(name, func, args, kwargs, self._noise is not None)

    def _wide(self, func: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Widen arguments to float64: formats asked for, and tensors that the code has captured."""
        if func is _VIEW_AS_DTYPE:
            raise NotImplementedError("the torch side reads the bits of a tensor as another format's (view(dtype))")
        declared = [argument.alias_info for argument in func._schema.arguments]
        written = {k for k, alias in enumerate(declared) if alias is not None and alias.is_write}

        def each(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return self._captured(leaf) if leaf.dtype in _WIDE else leaf
            if isinstance(leaf, tuple | list):
                return type(leaf)(map(each, leaf)) if any(isinstance(part, torch.Tensor) for part in leaf) else leaf
            return _WIDE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf

        # An argument that an operation writes to must stay the same tensor.
        args = tuple(arg if k in written else each(arg) for k, arg in enumerate(args))
        return args, {key: each(value) for key, value in kwargs.items()}

    def _captured(self, tensor: torch.Tensor) -> torch.Tensor:
        """Widen a tensor from outside: everything that is made under this mode is float64."""
        self.captured = True
        return tensor.to(_WIDE[tensor.dtype])

    def _perform(self, func: Any, args: tuple, kwargs: dict, deviations: Deviations | None = None) -> Any:
        def run() -> Any:
            return perform(func, args, kwargs, self._noise, deviations)

        return run() if self._record is None else self._record(func, args, kwargs, deviations, run)

    def _run(self, name: str, func: Any, args: tuple, kwargs: dict, noisy: bool) -> Any:
        """Run an operation whose arguments are float64, with noise or without."""
        if name == "elu_backward":
            args = _with_exact_scale(*args)
        if name == "hardsigmoid_backward" and not noisy:
            # Its kernel multiplies by a sixth of float32, in float64 too; the parts do not.
            with self:
                return decomposition_table[func](*args, **kwargs)
        if not noisy or _is_exact(name, args, kwargs) or _is_view(func):
            return self._perform(func, args, kwargs)
        if name in SUMS_WITH_ADDEND:
            with self:
                return decomposition_table[func](*args, **kwargs)
        if name == "convolution" and args[2] is not None:
            with self:
                product = func(*args[:2], None, *args[3:], **kwargs)
                return product + args[2].reshape(1, -1, *[1] * (product.ndim - 2))
        if name in TRANSFORMS:
            return self._perform(func, args, kwargs, self._transformed(name, args))
        if name in SUMS:
            with self._accumulating(func, args, kwargs):
                return self._perform(func, args, kwargs, self._summed(func))
        if name in ("mean", "var") or (name in FUSED and func in decomposition_table):
            with self._accumulating(func, args, kwargs):
                if name in ("mean", "var"):
                    result = self._parts(_moment, (name, args, kwargs), {})
                else:
                    result = self._parts(decomposition_table[func], args, kwargs)
                return self._perform(_as_it_is, (result,), {}, self._rounded())
        if func._can_decompose() and torch.Tag.pointwise not in func.tags and name not in FUNCTIONS:
            with self:
                return func.decompose(*args, **kwargs)
        if name in RESAMPLING:
            errors = kernel_errors(func, args, kwargs, self._format.name)

            def measured(args: tuple, kwargs: dict, result: Any) -> list[torch.Tensor]:
                return [torch.full_like(v, e) for v, e in zip(_inexact(result), errors, strict=True)]

            return self._perform(func, args, kwargs, measured)
        if name == "logcumsumexp":
            # The sum's relative error is an absolute one of its logarithm.
            return self._perform(func, args, kwargs, self._rounded(absolute=math.sqrt(args[0].shape[args[1]])))
        if name in BACKWARD_STABLE:
            wrong = [
                self._perform(_as_it_is, (leaf,), {}, self._off(name)) if _inexact(leaf) else leaf for leaf in args
            ]
            return self._perform(func, tuple(wrong), kwargs, self._rounded())
        if name in PRODUCTS:
            return self._perform(func, args, kwargs, self._rounded(math.sqrt(args[0].numel())))
        factor = function_error(func, args, kwargs, self._format.name)
        result = self._perform(func, args, kwargs, self._rounded(factor))
        # The pieces of decomposed operations ("prims::div") do not carry the tag.
        if torch.Tag.pointwise not in func.tags and func.namespace != "prims" and _inexact(result):
            self.notes.add(f"torch {name} has no rounding model of its own")
        return result

    @contextlib.contextmanager
    def _accumulating(self, func: Any, args: tuple, kwargs: dict) -> Iterator[None]:
        """Set the accumulator of one operation; the parts of a fused one have the same."""
        before = self._accumulator, self._measure
        if self._measure:
            name = self._format.name

            def noisy(member: int, args: tuple, kwargs: dict) -> Any:
                with DoublePrecision(name, member, 1.0, self._device, measure=False):
                    return func(*args, **kwargs)

            self._accumulator = FORMATS[accumulator(func, args, kwargs, name, noisy)]
            self._measure = False
            if self._accumulator.roundoff > FORMATS["float32"].roundoff:
                self.notes.add(f"torch {name_of(func)} accumulates in {self._accumulator.name} here, as measured")
        try:
            yield
        finally:
            self._accumulator, self._measure = before

    def _parts(self, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Run a fused operation's parts under this mode, in the accumulator's format."""
        outer, self._format = self._format, self._accumulator
        try:
            with self:
                return run(*args, **kwargs)
        finally:
            self._format = outer

    def _units(self) -> Callable[[torch.Tensor], tuple[float, float, float]]:
        """Return a function from a result to the roundoff of its format and its accumulator's, and the smallest normal.

        There are no complex numbers of 16-bit parts: they are computed in float32's.
        """
        kept, accumulator = self._format, self._accumulator

        def of(value: torch.Tensor) -> tuple[float, float, float]:
            if value.is_complex() and kept.roundoff > FORMATS["float32"].roundoff:
                return FORMATS["float32"].roundoff, FORMATS["float32"].roundoff, kept.smallest_normal
            return kept.roundoff, accumulator.roundoff, kept.smallest_normal

        return of

    def _summed(self, func: Any) -> Deviations:
        """Return the error of recursive summation: of K terms, squares adding up to Q, in a random order."""
        units = self._units()

        def of(args: tuple, kwargs: dict, result: Any) -> list[torch.Tensor]:
            def applied(change: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
                def each(leaf: Any) -> Any:
                    if isinstance(leaf, tuple | list):
                        return type(leaf)(map(each, leaf))
                    return change(leaf) if isinstance(leaf, torch.Tensor) and leaf.dtype in INEXACT else leaf

                found = mapped(func)(*map(each, args), **{key: each(value) for key, value in kwargs.items()})
                return [leaf.abs() for leaf in _inexact(found)]

            # The operation itself, on squares and on ones, gives Q and K: padding, strides and masks included.
            squares = applied(lambda leaf: torch.square(leaf.abs()))
            terms = applied(lambda leaf: torch.ones_like(leaf.abs()))
            return [
                _sum_deviation(value, square, count, units(value))
                for value, square, count in zip(_inexact(result), squares, terms, strict=True)
            ]

        return of

    def _transformed(self, name: str, args: tuple) -> Deviations:
        """Let a Fourier transform err as the plain sum that it stands for, whose terms all have modulus |x|."""
        units = self._units()
        x, axes, normalization = args[:3]
        lengths = [x.shape[axis] for axis in axes]
        half = name == "_fft_c2r"  # of the spectrum: the other half is implied
        if half:
            lengths[-1] = args[3]
        count = math.prod(lengths)
        scale = (1.0, count**-0.5, 1.0 / count)[int(normalization)]

        def of(args: tuple, kwargs: dict, result: Any) -> list[torch.Tensor]:
            square = (2.0 if half else 1.0) * scale**2 * args[0].abs().square().sum(axes, keepdim=True)
            return [_sum_deviation(result, square.expand_as(result.abs()), count, units(result))]

        return of

    def _off(self, name: str) -> Deviations:
        """Let a matrix of n columns be off, in total by u root(n) |A|, of Frobenius: that of sums over a row.

        Iterative algorithms pass through the matrix several times; of them the classic bound counts, u n |A|.
        """
        units = self._units()

        def of(args: tuple, kwargs: dict, matrix: torch.Tensor) -> list[torch.Tensor]:
            axes = (-2, -1)[-matrix.ndim :]
            norm = matrix.abs().square().sum(axes, keepdim=True).sqrt()
            root = 1.0 if name in ITERATIVE else math.sqrt(max(1, matrix.shape[-1]))
            return [(units(matrix)[0] / root * norm).expand(matrix.shape)]

        return of

    def _rounded(self, factor: float = 1.0, absolute: float = 0.0) -> Deviations:
        """Round real and complex results to the format."""
        units = self._units()

        def deviation(value: torch.Tensor) -> torch.Tensor:
            u, _, tiny = units(value)
            # A part of a complex product is a sum of two products, which may cancel: it errs as its modulus does.
            u *= math.sqrt(2.0) if value.is_complex() else 1.0
            return u * (factor * value.abs() + absolute) + tiny * (value != 0)

        return lambda args, kwargs, result: list(map(deviation, _inexact(result)))


def _sum_deviation(
    value: torch.Tensor, square: torch.Tensor, count: Any, units: tuple[float, float, float]
) -> torch.Tensor:
    u, u_acc, tiny = units
    modulus = value.abs()
    summation = u_acc**2 * (count * modulus**2 / 3 + count * square / 6 + square)
    return (summation + (u * modulus) ** 2).clamp_min(0).sqrt() + tiny * (square != 0)


def _moment(name: str, args: tuple, kwargs: dict) -> torch.Tensor:
    """Return a mean or variance in terms of sums."""
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


def _inexact(result: Any) -> list[torch.Tensor]:
    leaves = result if isinstance(result, tuple | list) else (result,)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dtype in INEXACT]


def _is_view(func: Any) -> bool:
    return any(ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns)


def _is_exact(name: str, args: tuple, kwargs: dict) -> bool:
    """Tell whether an operation rounds nothing; of complex numbers absolute value and sign are rounded."""
    if name in ("abs", "sgn", "sign"):
        return not args[0].is_complex()
    if name in ("scatter_reduce", "index_reduce"):
        return (args[4] if len(args) > 4 else kwargs.get("reduce")) in ("amax", "amin")
    return name in EXACT


def _with_exact_scale(grad: Any, alpha: Any, scale: Any, input_scale: Any, *rest: Any) -> tuple:
    """Correct the arguments of `elu_backward`: celu asks for 1 / alpha, which torch computes from a float32 alpha."""
    if scale == 1 and alpha and input_scale == 1.0 / float(np.float32(alpha)):
        input_scale = 1.0 / alpha
    return grad, alpha, scale, input_scale, *rest
