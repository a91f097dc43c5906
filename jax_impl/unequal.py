"""Partitions of unequal sizes in the function and the layers: check a call, and give views of packed parameters."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jax_impl.array_types import kind_of, shown
from jax_impl.checkpoints import of_partition
from jax_impl.implementations.unequal import joined, split_weight
from jax_impl.layouts import PARTITION_AXIS, static_indices
from jax_impl.packing import Packing, check_packing, has_unequal_sizes, packing_of
from jax_impl.validation import MOST_ELEMENTS, as_operand, check_beside_kernel

known_packing = functools.lru_cache(maxsize=256)(packing_of)
"""The same as `packing_of`, which is asked for in every call of a layer."""


def packing_of_call(in_features: Any, out_features: Any) -> Packing:
    """Return the layout of the sizes that the function was given; refuse others as `check_packing` does."""
    if not has_unequal_sizes(in_features, out_features):
        # Of a packed parameter; one of shape (n, in, out) says its sizes itself.
        argument, given = ("out_features", out_features) if in_features is None else ("in_features", in_features)
        raise TypeError(
            f"`{argument}`: expected a sequence of one size per partition in in_features or out_features, got "
            f"{shown(given)}; leave both out for a kernel of shape (n, in, out)."
        )
    argument = "in_features" if has_unequal_sizes(in_features, None) else "out_features"
    sizes = in_features if argument == "in_features" else out_features
    if len(sizes) == 0:
        raise ValueError(f"`{argument}`: expected at least one size, got none; pass one for each partition.")
    return check_packing(len(sizes), in_features, out_features, MOST_ELEMENTS)


def check_unequal_axes(packing: Packing, in_axis: int, partition_axis: int | None) -> None:
    """Refuse, by a ValueError, a partition axis of flat features, and a shared input of several sizes."""
    if partition_axis is None:
        if len(set(packing.in_features)) > 1:
            raise ValueError(
                f"`partition_axis`: expected its default for partitions of {len(set(packing.in_features))} input "
                f"sizes, got None; an input that all partitions share has one size, in_features=in."
            )
    elif partition_axis not in (PARTITION_AXIS, in_axis):
        raise ValueError(
            f"`partition_axis`: expected its default or in_axis={in_axis} for partitions of unequal sizes, whose "
            f"features are flat, got {partition_axis}; leave it out."
        )


def check_unequal_call(
    x: Any, kernel: Any, bias: Any, packing: Packing, in_axis: int, partition_axis: int | None, partitions: Any
) -> tuple[Array, Array, Array | None, Packing]:
    """Return what is to be computed: x with its features last, packed parameters and layout of the partitions meant.

    Raises as `jax_impl.partitioned_linear` does.
    """
    check_unequal_axes(packing, in_axis, partition_axis)
    x, kernel, bias = as_operand("x", x), as_operand("kernel", kernel), _checked_bias(bias, packing)
    if kernel.shape != (packing.weight_size,):
        raise ValueError(
            f"`kernel`: expected packed shape (in_0*out_0 + in_1*out_1 + ...,) = ({packing.weight_size},), got "
            f"{kernel.shape}; pack the matrices as jax_impl.packing says."
        )
    check_beside_kernel("x", x, kernel)
    if bias is not None:
        check_beside_kernel("bias", bias, kernel)
    if not -x.ndim <= in_axis < x.ndim:
        raise ValueError(
            f"`x`: expected an axis {in_axis} with features, got shape {x.shape}; pass another in_axis or shape."
        )
    x = jnp.moveaxis(x, in_axis, -1)
    indices = None if partitions is None else _known_indices(partitions, packing.num_partitions)
    if indices is None:
        meant = packing
    else:
        meant = packing_of(*(tuple(sizes[k] for k in indices) for sizes in (packing.in_features, packing.out_features)))
    if partition_axis is None:
        totals: tuple[int, ...] = (packing.in_features[0],)
    else:
        totals = tuple(dict.fromkeys((meant.in_offsets[-1], packing.in_offsets[-1])))
    if x.shape[-1] not in totals:
        wanted = "in = " if partition_axis is None else "in_0 + in_1 + ... = "
        raise ValueError(
            f"`x`: expected {wanted}{' or '.join(map(str, totals))} features along axis {in_axis}, got "
            f"{jnp.moveaxis(x, -1, in_axis).shape}; {_advice(x, packing, in_axis, partition_axis)}."
        )
    if indices is None:
        return x, kernel, bias, packing
    if partition_axis is not None and x.shape[-1] != totals[0]:
        x = _chosen(x, packing.in_offsets, indices)
    matrices = split_weight(kernel, packing)
    kernel = joined([matrices[indices[k]].ravel() for bucket in meant.buckets for k in bucket.members], 0)
    return x, kernel, None if bias is None else _chosen(bias, packing.out_offsets, indices), meant


def partition_weights(kernel: Any, packing: Packing) -> list[Any]:
    """Return every partition's W_k (in_k, out_k) of a packed weight, in an array of JAX or NumPy."""
    return [of_partition(kernel, "weight", k, packing) for k in range(packing.num_partitions)]


def partition_biases(bias: Any, packing: Packing) -> list[Any]:
    """Return every partition's b_k (out_k,) of a packed bias, in an array of JAX or NumPy."""
    return [of_partition(bias, "bias", k, packing) for k in range(packing.num_partitions)]


def _checked_bias(bias: Any, packing: Packing) -> Array | None:
    if bias is None:
        return None
    bias = as_operand("bias", bias)
    if bias.shape != (packing.out_offsets[-1],):
        raise ValueError(
            f"`bias`: expected packed shape (out_0 + out_1 + ...,) = ({packing.out_offsets[-1]},), got {bias.shape}; "
            f"put the vectors beside each other."
        )
    return bias


def _known_indices(partitions: Any, num_partitions: int) -> list[int]:
    if isinstance(partitions, Array):
        if isinstance(partitions, Tracer):
            raise TypeError(
                f"`partitions`: expected known indices for partitions of unequal sizes, which the shape of y depends "
                f"on, got {kind_of(partitions)}; pass a list, outside of the arguments that are traced."
            )
        partitions = np.asarray(partitions)
    return static_indices(partitions, num_partitions)


def _chosen(flat: Array, offsets: tuple[int, ...], indices: list[int]) -> Array:
    pieces = jnp.split(flat, offsets[1:-1], axis=-1)
    return joined([pieces[k] for k in indices], -1)


def _advice(x: Array, packing: Packing, in_axis: int, partition_axis: int | None) -> str:
    n, sizes, shape = packing.num_partitions, set(packing.in_features), jnp.moveaxis(x, -1, in_axis).shape
    if partition_axis is not None and packing.in_offsets[-1] in shape:
        return f"for features on another axis pass in_axis={shape.index(packing.in_offsets[-1])}"
    if partition_axis is None:
        return "an input that all partitions share has no partition axis"
    if x.ndim > 1 and x.shape[-2] == n and x.shape[-1] == max(sizes):
        return "put the features of the partitions beside each other, without padding: they have no axis of their own"
    if len(sizes) == 1 and x.shape[-1] in sizes:
        return "for an input that all partitions share pass partition_axis=None"
    return "put the features of all partitions beside each other, those of partition 0 first"
