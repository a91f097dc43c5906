"""One batched product whose batch axis is the partition axis."""

import torch
from torch import Tensor

from torch_impl.array_types import Bias, Inputs, Outputs, Weight


def partitioned_linear_matmul(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as a batched product over n.

    The partition axis of `x` is moved to the front as a view, so that neither operand is copied, and the bias enters
    the same kernel. The result is laid out with the partition axis outermost and handed back as a view of shape
    (*b, n, o): it is not contiguous unless the batch or n is 1, and `reshape` rather than `view` flattens it.
    """
    single_batch_axis = x.ndim == 3
    rows = x if single_batch_axis else x.reshape(-1, *x.shape[-2:])
    by_partition = rows.transpose(0, 1)
    y = torch.bmm(by_partition, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), by_partition, weight)
    y = y.transpose(0, 1)
    return y if single_batch_axis else y.reshape(*x.shape[:-1], weight.shape[-1])


def shared_linear_matmul(x: Tensor, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., i] * W[n, i, o] + b[n, o] as one product with a matrix of n*o columns.

    The matrix is a copy of the weight, and x is not copied; the gradient of x adds up over all partitions in one
    product too.
    """
    num_partitions, in_features, out_features = weight.shape
    dense = weight.transpose(0, 1).reshape(in_features, num_partitions * out_features)
    rows = x.reshape(-1, in_features)
    y = rows @ dense if bias is None else torch.addmm(bias.reshape(-1), rows, dense)
    return y.reshape(*x.shape[:-1], num_partitions, out_features)
