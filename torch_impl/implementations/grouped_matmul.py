"""The grouped product of mixture-of-experts layers, with equally many rows for every partition."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_impl.array_types import Bias, Inputs, Outputs, Weight

ROW_ALIGNMENT_BYTES = 16


def partitioned_linear_grouped_matmul(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] with `torch.nn.functional.grouped_mm`.

    The kernel reads rows of 16-byte multiples only. Operands that already lie so are passed as views; others are
    copied, and the registry refuses sizes (i and o, times the item size) that no copy can mend. The bias is added after
    the product is rounded.
    """
    rows = x.reshape(-1, *x.shape[-2:])
    empty = rows.shape[0] == 0
    if empty:
        # The kernel refuses operands without rows; one row of zeros goes through it and is dropped again, which
        # keeps the gradients of x and weight defined (empty and zero).
        rows = F.pad(rows, (0, 0, 0, 0, 0, 1))
    y = _aligned(F.grouped_mm(_aligned(rows.transpose(0, 1)), _aligned(weight))).transpose(0, 1)
    if empty:
        y = y[:0]
    y = y.reshape(*x.shape[:-1], weight.shape[-1])
    return y if bias is None else y + bias


class _AlignRows(torch.autograd.Function):
    """Identity whose result and cotangent, and those of its derivatives, all have rows the kernel can read.

    The kernel's derivative hands cotangents to the same kernel, and a cotangent may be expanded (stride 0, as the
    gradient of a sum is) or strided; only an identity that also intervenes in backward can mend that.
    There is no forward mode, because the kernel has none.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        *outer, innermost = tensor.stride()
        readable = innermost == 1 and all(
            stride > 0 and stride * tensor.element_size() % ROW_ALIGNMENT_BYTES == 0 for stride in outer
        )
        return tensor if readable else tensor.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep nothing: the derivative of the identity needs no value."""

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _aligned(cotangent)


def _aligned(tensor: Tensor) -> Tensor:
    return _AlignRows.apply(tensor)  # pyright: ignore[reportReturnType]
