"""Triton kernels of our own, forward and backward, as two operators that `torch.library` knows."""

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_impl.array_types import Bias, Inputs, Outputs, Weight

LARGEST_FEATURES = 511
"""Most features of a partition, in and out: larger products are cuBLAS's."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""True where Triton's interpreter runs the kernels, on a CPU too, slowly: the tests do so."""


def _missing() -> str | None:
    with contextlib.suppress(ImportError, ValueError):  # what hides or replaces the package may raise these
        if importlib.util.find_spec("triton") is not None:
            return None
    return "triton, which is not installed; run `pip install triton`"


MISSING = _missing()
"""What is lacking here to run it at all; None when nothing. PyTorch for CUDA brings Triton."""


def partitioned_linear_fused(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] by one kernel, which writes y once.

    The bias is added in fp32 before the sum is rounded; y and all gradients are contiguous, x and the cotangent may lie
    in memory as they like, if the leading axes of x are one axis in memory: others are copied. Gradients
    that are to be derived themselves are ordinary products, and so is y in a transform of torch.func that is compiled.
    `torch_impl/fused_kernels.py` holds the kernels.
    """
    single_batch_axis = x.ndim == 3
    rows = x if single_batch_axis else x.reshape(-1, *x.shape[-2:])
    if not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        y = fused_linear(rows, weight, bias)
    # The operator has no derivatives under the transforms of torch.func, nor in forward mode.
    elif not torch.compiler.is_compiling():
        y = _Fused.apply(rows, weight, bias)
    else:  # where PyTorch would trace that function without its forward mode, and say nothing
        y = torch.einsum("bni,nio->bno", rows, weight)
        y = y if bias is None else y + bias
    return y if single_batch_axis else y.reshape(*x.shape[:-1], weight.shape[-1])


@functools.cache
def _kernels() -> Any:
    # Here, since Triton need not be installed, and takes a second to import.
    import torch_impl.fused_kernels as kernels

    return kernels


_FORWARD, _BACKWARD = "partitioned_linear::fused_linear", "partitioned_linear::fused_linear_backward"
_DEVICES = ("cpu", "cuda")  # the registry says when the CPU takes it
# `torch.library.custom_op` would wrap each call once more, which takes 3 us beside 9.
torch.library.define(_FORWARD, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.define(_BACKWARD, "(Tensor dy, Tensor? x, Tensor? weight, bool bias) -> (Tensor, Tensor, Tensor)")
fused_linear = torch.ops.partitioned_linear.fused_linear.default
fused_linear_backward = torch.ops.partitioned_linear.fused_linear_backward.default


@torch.library.register_fake(_FORWARD)
def _empty_outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[-1])


@torch.library.register_fake(_BACKWARD)
def _empty_gradients(dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, n, o = dy.shape
    dx = dy.new_empty(0) if weight is None else dy.new_empty(rows, n, weight.shape[1])
    dw = dy.new_empty(0) if x is None else dy.new_empty(n, x.shape[-1], o)
    return dx, dw, dy.new_empty(n, o) if bias else dy.new_empty(0)


@torch.library.impl(_FORWARD, _DEVICES)
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute y (b, n, o) from x (b, n, i), weight (n, i, o) and bias (n, o) or None."""
    y = _empty_outputs(x, weight, bias)
    _kernels().forward(x, weight, bias, y)
    return y


@torch.library.impl(_BACKWARD, _DEVICES)
def _backward(dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dx where the weight is given, dW where x is given, and db where asked for; others have no elements."""
    dx, dw, db = (
        dy.new_empty(0) if gradient is None else gradient for gradient in _kernels().backward(dy, x, weight, bias)
    )
    return dx, dw, db


class _Fused(torch.autograd.Function):
    """The operator with its derivatives of reverse and forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return fused_linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """Keep what the derivatives that are asked for need."""
        x, weight, _ = inputs
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # Derivatives of these gradients are asked for, which ordinary products have in every order and mode.
            dx = None if weight is None else torch.einsum("bno,nio->bni", dy, weight)
            dw = None if x is None else torch.einsum("bni,bno->nio", x, dy)
            return dx, dw, dy.sum(0) if needed[2] else None
        found = fused_linear_backward(dy, x, weight, needed[2])
        return tuple(gradient if asked else None for gradient, asked in zip(found, needed, strict=True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        (x, weight), (dx, dw, db) = ctx.saved_tensors, tangents
        terms = (
            None if dx is None else _Fused.apply(dx, weight, db),
            None if dw is None else _Fused.apply(x, dw, db if dx is None else None),
            db.expand(*x.shape[:-1], -1) if db is not None and dx is None and dw is None else None,
        )
        return functools.reduce(torch.add, [term for term in terms if term is not None])


# The same derivatives of reverse mode, for all other calls and for captured programs.
torch.library.register_autograd(_FORWARD, _Fused.backward, setup_context=_Fused.setup_context)


def _mapped_forward(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
    """Make the mapped axis one of rows if x alone has it, else one of partitions."""
    if in_dims[1:] == (None, None):
        x = operands[0].movedim(in_dims[0], 0)
        return fused_linear(x.flatten(0, 1), *operands[1:]).unflatten(0, x.shape[:2]), 0
    y = fused_linear(*_side_by_side(info, in_dims, operands, (1, 0, 0)))
    return y.unflatten(1, (info.batch_size, -1)), 1


def _mapped_gradients(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Any, tuple[int, ...]]:
    found = fused_linear_backward(*_side_by_side(info, in_dims[:3], operands[:3], (1, 1, 0)), operands[3])
    axes = (1, 0, 0)
    mapped = (
        gradient.unflatten(axis, (info.batch_size, -1)) if gradient.ndim > 1 else gradient.expand(info.batch_size, 0)
        for gradient, axis in zip(found, axes, strict=True)
    )
    return tuple(mapped), (axes[0] if found[0].ndim > 1 else 0, 0, 0)


def _side_by_side(
    info: Any, in_dims: tuple[int | None, ...], operands: tuple[Any, ...], axes: tuple[int, ...]
) -> tuple[Tensor | None, ...]:
    """Put the mapped axis of each operand before its partition axis, and make one axis of both."""
    found = []
    for operand, mapped, axis in zip(operands, in_dims, axes, strict=True):
        if operand is None:
            found.append(None)
            continue
        moved = operand.unsqueeze(axis).expand(*operand.shape[:axis], info.batch_size, *operand.shape[axis:])
        moved = moved if mapped is None else operand.movedim(mapped, axis)
        found.append(moved.flatten(axis, axis + 1))
    return tuple(found)


torch.library.register_vmap(_FORWARD, _mapped_forward)
torch.library.register_vmap(_BACKWARD, _mapped_gradients)
