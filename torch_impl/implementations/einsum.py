"""The formula itself, handed to `torch.einsum`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_impl.array_types import Bias, Inputs, Outputs, Weight


def partitioned_linear_einsum(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] with `torch.einsum`.

    The bias is added after the product is rounded.
    """
    return _with_bias("...ni,nio->...no", x, weight, bias)


def shared_linear_einsum(x: Tensor, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., i] * W[n, i, o] + b[n, o], which `torch.einsum` does as one product."""
    return _with_bias("...i,nio->...no", x, weight, bias)


def _with_bias(equation: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.shape[1] == 1 and weight.element_size() == 2:
        # torch.einsum turns a contraction of size one into a broadcast product, whose gradients round every product
        # to bf16 or fp16 before they are summed. A second feature of zeros keeps it a matrix product, summed in fp32.
        x, weight = F.pad(x, (0, 1)), F.pad(weight, (0, 0, 0, 1))
    y = torch.einsum(equation, x, weight)
    return y if bias is None else y + bias
