"""Dense block-diagonal product, built from the compact parameter."""

import torch

from torch_impl.array_types import Bias, Inputs, Outputs, Weight


def partitioned_linear_masked(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as one dense product.

    The n blocks are laid on the diagonal of one (n*i, n*o) matrix whose other entries are exact zeros. It costs n
    times the multiplications and n times the weight memory, in exchange for a single large product. Because
    0 * NaN = NaN, a NaN or Inf in one partition reaches every other one.
    """
    num_partitions, in_features, out_features = weight.shape
    # diag_embed puts the partition axis on both 0 and 2: (i, o, n) -> (n, i, n, o), zero where the two n differ.
    blocks = torch.diag_embed(weight.permute(1, 2, 0), dim1=0, dim2=2)
    dense = blocks.reshape(num_partitions * in_features, num_partitions * out_features)
    rows = x.reshape(-1, num_partitions * in_features)
    y = rows @ dense if bias is None else torch.addmm(bias.reshape(-1), rows, dense)
    return y.reshape(*x.shape[:-1], out_features)
