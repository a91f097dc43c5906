"""The formulations of y_k = x_k W_k + b_k for partitions of unequal sizes, which lie as `torch_impl.packing` says.

Each is a function (x, weight, bias, packing) -> y of inputs (..., in_0 + in_1 + ...), a packed weight, a packed bias or
None, and outputs (..., out_0 + out_1 + ...). Operands are cut by static sizes and padding is laid beside them, so that
NaN and Inf stay in their partition, but in `masked`.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_impl.packing import Bucket, Packing


def split_weight(weight: Tensor, packing: Packing) -> list[Tensor]:
    """Return views of a packed weight: W_k (in_k, out_k) for each k."""
    matrices: dict[int, Tensor] = {}
    for bucket, stacked in _buckets(weight, packing):
        matrices |= zip(bucket.members, stacked.unbind(0), strict=True)
    return [matrices[k] for k in range(packing.num_partitions)]


def unequal_linear_loop(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
    """Compute y_k = x_k W_k + b_k, one partition at a time: the reference."""
    features = x.reshape(-1, x.shape[-1]).split(packing.in_features, -1)
    vectors = [None] * len(features) if bias is None else bias.split(packing.out_features)
    matrices = split_weight(weight, packing)
    outputs = [
        F.linear(part, matrix.mT, vector) for part, matrix, vector in zip(features, matrices, vectors, strict=True)
    ]
    return torch.cat(outputs, -1).reshape(*x.shape[:-1], packing.out_offsets[-1])


def unequal_linear_masked(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
    """Compute y_k = x_k W_k + b_k by one product with the matrix of all W_k on its diagonal and zeros elsewhere.

    Because 0 * NaN = NaN, a NaN or Inf in one partition reaches every other one.
    """
    return _product(x, torch.block_diag(*split_weight(weight, packing)), bias)


def unequal_linear_bucketed_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
    """Compute y_k = x_k W_k + b_k by one batched product for the partitions of each size.

    The inputs of a bucket are copied where its partitions are no neighbours, and all outputs once, to their places. A
    bucket of one partition is one linear map, which is the quicker call.
    """
    features = _in_runs(x.reshape(-1, x.shape[-1]), packing.in_offsets, packing)
    biases = None if bias is None else _in_runs(bias, packing.out_offsets, packing)
    outputs: dict[int, Tensor] = {}
    for bucket, matrices in _buckets(weight, packing):
        if len(bucket.members) == 1:
            own = None if biases is None else biases[bucket.runs[0]]
            outputs[bucket.members[0]] = F.linear(features[bucket.runs[0]], matrices[0].mT, own)
            continue
        rows, vectors = _stacked(features, bucket), None if biases is None else _stacked(biases, bucket)
        outputs |= zip(bucket.members, _batched(rows, matrices, vectors).unbind(0), strict=True)
    return _in_place(outputs, packing).reshape(*x.shape[:-1], packing.out_offsets[-1])


def unequal_linear_padded_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
    """Compute y_k = x_k W_k + b_k by one batched product, of operands that zeros pad to the largest sizes.

    The partitions are in the order of the packed weight, bucket after bucket.
    """
    in_features, out_features = max(packing.in_features), max(packing.out_features)
    order = packing.order
    matrices = torch.cat(
        [
            F.pad(stacked, (0, out_features - bucket.out_features, 0, in_features - bucket.in_features))
            for bucket, stacked in _buckets(weight, packing)
        ]
    )
    rows = x.reshape(-1, x.shape[-1])
    features = _padded(rows, packing.in_features, order)
    vectors = None if bias is None else _padded(bias, packing.out_features, order)
    y = _batched(features, matrices, vectors).transpose(0, 1).flatten(1)
    # Every second part is padding.
    sizes = [size for k in order for size in (packing.out_features[k], out_features - packing.out_features[k])]
    return _in_place(dict(zip(order, y.split(sizes, -1)[::2], strict=True)), packing).reshape(
        *x.shape[:-1], packing.out_offsets[-1]
    )


def shared_unequal_linear(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
    """Compute y_k = x W_k + b_k for x of shape (..., in), which all partitions share, by one product."""
    return _product(x, torch.cat(split_weight(weight, packing), 1), bias)


def _buckets(weight: Tensor, packing: Packing) -> Iterator[tuple[Bucket, Tensor]]:
    # One split, whose derivative is one concatenation: that of each slice would be a whole packed weight.
    parts = weight.split([bucket.stop - bucket.start for bucket in packing.buckets])
    for bucket, part in zip(packing.buckets, parts, strict=True):
        yield bucket, part.view(len(bucket.members), bucket.in_features, bucket.out_features)


def _in_runs(flat: Tensor, offsets: Sequence[int], packing: Packing) -> dict[tuple[int, int], Tensor]:
    runs = sorted(run for bucket in packing.buckets for run in bucket.runs)
    return dict(zip(runs, flat.split([offsets[stop] - offsets[first] for first, stop in runs], -1), strict=True))


def _stacked(parts: Mapping[tuple[int, int], Tensor], bucket: Bucket) -> Tensor:
    """Return (..., m, size), as a view where the partitions of the bucket are neighbours."""
    own = [parts[run] for run in bucket.runs]
    flat = own[0] if len(own) == 1 else torch.cat(own, -1)
    return flat.view(*flat.shape[:-1], len(bucket.members), flat.shape[-1] // len(bucket.members))


def _padded(flat: Tensor, sizes: tuple[int, ...], order: Sequence[int]) -> Tensor:
    """Turn (..., sum of sizes) into (..., n, largest size), in that order, with zeros after each part."""
    largest, parts = max(sizes), flat.split(sizes, -1)
    missing = [largest - size for size in sizes]
    zeros = flat.new_zeros(1).expand(*flat.shape[:-1], sum(missing)).split(missing, -1)
    pieces = [piece for k in order for piece in (parts[k], zeros[k])]
    return torch.cat(pieces, -1).unflatten(-1, (len(sizes), largest))


def _batched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute (rows, m, i) by (m, i, o) with (m, o) -> (m, rows, o)."""
    by_partition = x.transpose(0, 1)
    return torch.bmm(by_partition, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), by_partition, weight)


def _in_place(outputs: dict[int, Tensor], packing: Packing) -> Tensor:
    return torch.cat([outputs[k] for k in range(packing.num_partitions)], -1)


def _product(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, dense.shape[0])
    y = rows @ dense if bias is None else torch.addmm(bias, rows, dense)
    return y.reshape(*x.shape[:-1], dense.shape[1])
