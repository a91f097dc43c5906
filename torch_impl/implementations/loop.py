"""Reference formulation: one linear map after another, then a stack."""

import torch
import torch.nn.functional as F

from torch_impl.array_types import Bias, Inputs, Outputs, Weight


def partitioned_linear_loop(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o], one partition at a time.

    This is the pattern that users write by hand (a list of `nn.Linear` and `torch.stack`), kept as the reference
    that everything else is read against.
    """
    biases = [None] * weight.shape[0] if bias is None else bias.unbind(0)
    outputs = [
        F.linear(features, matrix.mT, vector)
        for features, matrix, vector in zip(x.unbind(-2), weight.unbind(0), biases, strict=True)
    ]
    return torch.stack(outputs, dim=-2)
