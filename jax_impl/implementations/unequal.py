"""The formulations for partitions of unequal sizes, from packed parameters.

Each is a function (x, weight, bias, packing, precision, dtype) -> y of flat features: x (..., in_0 + in_1 + ...), the
packed weight and bias of `jax_impl.packing`, and y (..., out_0 + out_1 + ...); otherwise they are as those of equal
sizes. Operands are cut by `lax.split`, never by one slice each: the gradient of a split is one concatenation, that of
n slices is a sum of n padded arrays.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.lax import PrecisionLike

from jax_impl.implementations import add_bias, product_dtype
from jax_impl.packing import Packing


def unequal_linear_loop(
    x: Array, weight: Array, bias: Array | None, packing: Packing, precision: PrecisionLike, dtype: np.dtype
) -> Array:
    """Compute y_k = x_k W_k + b_k, one partition at a time, and put the results side by side: the reference."""
    rows = _rows(x)
    features = lax.split(rows, packing.in_features, axis=1)
    vectors = [None] * packing.num_partitions if bias is None else lax.split(bias, packing.out_features)
    outputs = []
    for matrix, row, vector in zip(split_weight(weight, packing), features, vectors, strict=True):
        wide = product_dtype(dtype, rows.shape[0], *matrix.shape)
        product = lax.dot(row, matrix, precision=precision, preferred_element_type=wide)
        outputs.append(add_bias(product, vector, dtype))
    return joined(outputs, 1).reshape(*x.shape[:-1], packing.out_offsets[-1])


def unequal_linear_masked(
    x: Array, weight: Array, bias: Array | None, packing: Packing, precision: PrecisionLike, dtype: np.dtype
) -> Array:
    """Compute all y_k = x_k W_k + b_k as one product with a dense matrix that has the W_k as its blocks.

    Its other entries are exact zeros; because 0 * NaN = NaN, a NaN or Inf in one partition reaches every other one.
    """
    rows, all_out = _rows(x), packing.out_offsets[-1]
    places = zip(packing.out_offsets, packing.out_offsets[1:], strict=False)
    beside = [(start, all_out - stop) for start, stop in places]
    blocks = [jnp.pad(matrix, ((0, 0), pad)) for matrix, pad in zip(split_weight(weight, packing), beside, strict=True)]
    dense = joined(blocks, 0)
    wide = product_dtype(dtype, rows.shape[0], *dense.shape)
    product = lax.dot(rows, dense, precision=precision, preferred_element_type=wide)
    return add_bias(product, bias, dtype).reshape(*x.shape[:-1], all_out)


def unequal_linear_bucketed_matmul(
    x: Array, weight: Array, bias: Array | None, packing: Packing, precision: PrecisionLike, dtype: np.dtype
) -> Array:
    """Compute y_k = x_k W_k + b_k by one batched product for the partitions of each size.

    The weights of a size are beside each other and are used where they are. Features are moved by as many pieces as
    there are runs of neighbours of one size.
    """
    features = by_bucket(_rows(x), packing.in_features, packing)
    vectors = [None] * len(packing.buckets) if bias is None else by_bucket(bias[None], packing.out_features, packing)
    outputs = []
    for one, matrices, vector in zip(features, matrices_by_bucket(weight, packing), vectors, strict=True):
        outputs.append(add_bias(_product(one, matrices, precision, dtype), vector, dtype))
    return flat(outputs, packing).reshape(*x.shape[:-1], packing.out_offsets[-1])


def unequal_linear_padded_matmul(
    x: Array, weight: Array, bias: Array | None, packing: Packing, precision: PrecisionLike, dtype: np.dtype
) -> Array:
    """Compute y_k = x_k W_k + b_k by one batched product of all partitions, each padded by zeros to the largest size.

    Both operands are padded, each by its own zeros: no partition's values meet those of another one.
    """
    most_in, most_out = max(packing.in_features), max(packing.out_features)
    features = [_padded(one, most_in) for one in by_bucket(_rows(x), packing.in_features, packing)]
    matrices = [
        jnp.pad(one, ((0, 0), (0, most_in - one.shape[1]), (0, most_out - one.shape[2])))
        for one in matrices_by_bucket(weight, packing)
    ]
    product = _product(joined(features, 0), joined(matrices, 0), precision, dtype)
    if bias is None:
        y = product.astype(dtype)
    else:
        vectors = [_padded(one, most_out) for one in by_bucket(bias[None], packing.out_features, packing)]
        y = add_bias(product, joined(vectors, 0), dtype)
    buckets = lax.split(y, [len(bucket.members) for bucket in packing.buckets])
    outputs = [one[:, :, : bucket.out_features] for one, bucket in zip(buckets, packing.buckets, strict=True)]
    return flat(outputs, packing).reshape(*x.shape[:-1], packing.out_offsets[-1])


def shared_unequal_linear(
    x: Array, weight: Array, bias: Array | None, packing: Packing, precision: PrecisionLike, dtype: np.dtype
) -> Array:
    """Compute y_k = x W_k + b_k of one x (..., in) for all partitions as one product with the W_k side by side."""
    rows, dense = _rows(x), joined(split_weight(weight, packing), 1)
    wide = product_dtype(dtype, rows.shape[0], *dense.shape)
    product = lax.dot(rows, dense, precision=precision, preferred_element_type=wide)
    return add_bias(product, bias, dtype).reshape(*x.shape[:-1], dense.shape[1])


def split_weight(weight: Array, packing: Packing) -> list[Array]:
    """Cut a packed weight into every partition's W_k (in_k, out_k), in the order of the partitions."""
    sizes = list(zip(packing.in_features, packing.out_features, strict=True))
    pieces = lax.split(weight, [math.prod(sizes[k]) for k in packing.order])
    return [piece.reshape(sizes[k]) for k, piece in sorted(zip(packing.order, pieces, strict=True), key=lambda p: p[0])]


def joined(arrays: Sequence[Array], axis: int) -> Array:
    """Put arrays beside each other; a single one is itself."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def _product(rows: Array, matrices: Array, precision: PrecisionLike, dtype: np.dtype) -> Array:
    """Compute y[m, r, o] = sum_i x[m, r, i] * W[m, i, o], in the dtype that its bias is added to."""
    wide = product_dtype(dtype, rows.shape[1], *matrices.shape[1:])
    dimensions = (((2,), (1,)), ((0,), (0,)))
    return lax.dot_general(rows, matrices, dimensions, precision=precision, preferred_element_type=wide)


def _rows(x: Array) -> Array:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _padded(features: Array, size: int) -> Array:
    return jnp.pad(features, ((0, 0), (0, 0), (0, size - features.shape[2])))


def matrices_by_bucket(weight: Array, packing: Packing) -> list[Array]:
    """Cut a packed weight into the stacked matrices (m, in, out) of each bucket, without a copy where jitted."""
    pieces = lax.split(weight, [bucket.stop - bucket.start for bucket in packing.buckets])
    return [
        piece.reshape(len(bucket.members), bucket.in_features, bucket.out_features)
        for piece, bucket in zip(pieces, packing.buckets, strict=True)
    ]


def _runs(packing: Packing) -> list[tuple[int, int, int]]:
    """Return the runs of neighbours of one size by their first partition: (first, stop, number of the bucket)."""
    return sorted((*run, number) for number, bucket in enumerate(packing.buckets) for run in bucket.runs)


def by_bucket(rows: Array, sizes: Sequence[int], packing: Packing) -> list[Array]:
    """Turn (rows, s_0 + s_1 + ...) into (m, rows, s) for the m partitions of each size."""
    runs = _runs(packing)
    pieces = lax.split(rows, [(stop - first) * sizes[first] for first, stop, _ in runs], axis=1)
    found: list[list[Array]] = [[] for _ in packing.buckets]
    for (first, stop, number), piece in zip(runs, pieces, strict=True):
        found[number].append(jnp.swapaxes(piece.reshape(rows.shape[0], stop - first, sizes[first]), 0, 1))
    return [joined(run, 0) for run in found]


def flat(outputs: Sequence[Array], packing: Packing) -> Array:
    """Turn (m, rows, o) of each size back into (rows, out_0 + out_1 + ...)."""
    runs = _runs(packing)
    lengths = [[stop - first for first, stop in bucket.runs] for bucket in packing.buckets]
    pieces = [iter(lax.split(y, of_bucket)) for y, of_bucket in zip(outputs, lengths, strict=True)]
    columns = [jnp.swapaxes(next(pieces[number]), 0, 1) for _, _, number in runs]
    return joined([one.reshape(one.shape[0], one.shape[1] * one.shape[2]) for one in columns], 1)
