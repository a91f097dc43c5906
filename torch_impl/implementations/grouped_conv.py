"""A grouped convolution over a signal of length one."""

import torch.nn.functional as F

from torch_impl.array_types import Bias, Inputs, Outputs, Weight


def partitioned_linear_grouped_conv(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as `conv1d` with n groups.

    Every feature is a channel, every partition a group, and signal and kernel have length one. The kernel layout
    of a convolution, (n*o, i, 1), costs one transpose of the weight.

    Args:
        x: Inputs, shape (*b, n, i), any strides.
        weight: One matrix per partition, shape (n, i, o), dtype of `x`.
        bias: One vector per partition, shape (n, o), dtype of `x`; or None.

    Returns:
        Outputs, shape (*b, n, o), dtype of `x`.
    """
    num_partitions, in_features, out_features = weight.shape
    signal = x.reshape(-1, num_partitions * in_features, 1)
    kernel = weight.mT.reshape(num_partitions * out_features, in_features, 1)
    y = F.conv1d(signal, kernel, None if bias is None else bias.reshape(-1), groups=num_partitions)
    return y.reshape(*x.shape[:-1], out_features)
