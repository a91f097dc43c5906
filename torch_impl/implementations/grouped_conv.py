"""A grouped convolution along the batch."""

import torch.nn.functional as F

from torch_impl.array_types import Bias, Inputs, Outputs, Weight


def partitioned_linear_grouped_conv(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as `conv1d` with n groups.

    Every feature is a channel, every partition a group, and the kernel has length one. The rows are the length of
    one signal rather than a batch of signals of length one: the CPU's weight gradient adds up signals in the storage
    dtype, which loses bf16 and fp16 sums over many rows, but adds up along a signal in fp32. It costs one transpose
    of x and of the weight; the result is a view with the features outermost.
    """
    num_partitions, in_features, out_features = weight.shape
    rows = x.reshape(-1, num_partitions * in_features)
    empty = rows.shape[0] == 0
    if empty:
        # A signal may not have length zero; one of zeros goes through the kernel and is dropped again, which keeps
        # the gradients defined (empty and zero).
        rows = F.pad(rows, (0, 0, 0, 1))
    kernel = weight.mT.reshape(num_partitions * out_features, in_features, 1)
    y = F.conv1d(rows.T.unsqueeze(0), kernel, None if bias is None else bias.reshape(-1), groups=num_partitions)
    y = y.squeeze(0).T
    if empty:
        y = y[:0]
    return y.reshape(*x.shape[:-1], out_features)
