"""One partition's linear map, batched over partitions by `torch.vmap`."""

import torch
from torch import Tensor

from torch_impl.array_types import Bias, Inputs, Outputs, Weight


def partitioned_linear_vmap(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] by mapping one linear map over n.

    The bias is added after the product is rounded.
    """
    # Of several leading axes that are no view of one, matmul makes as many products as the first has entries, and the
    # gradient of W adds their results in the dtype of x: in bf16 and fp16 with hundreds of times the error of one sum.
    rows = x.flatten(0, -3) if x.dim() > 3 else x
    if bias is None:
        y = torch.vmap(torch.matmul, in_dims=(-2, 0), out_dims=-2)(rows, weight)
    else:
        y = torch.vmap(_one_partition, in_dims=(-2, 0, 0), out_dims=-2)(rows, weight, bias)
    return y.unflatten(0, x.shape[:-2]) if x.dim() > 3 else y


def _one_partition(features: Tensor, matrix: Tensor, vector: Tensor) -> Tensor:
    return features @ matrix + vector
