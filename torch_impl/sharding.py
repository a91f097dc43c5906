"""Partitions spread over devices: the operation never mixes partitions, so neither do its devices."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torch_impl.array_types import kind_of, shown
from torch_impl.layer import PartitionedLinear
from torch_impl.parameters import check_writable
from torch_impl.registry import IMPLEMENTATIONS, UnsupportedImplementationError
from torch_impl.validation import check_tensor

LayerT = TypeVar("LayerT", bound=PartitionedLinear)


def shard_partitions(layer: LayerT, device_mesh: DeviceMesh) -> LayerT:
    """Spread a layer's partitions over a one-dimensional mesh: each device holds n / devices whole maps.

    Every rank calls it with the same values in its layer; those of rank 0 count. Afterwards
    y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] for inputs from `shard_inputs` communicates nothing,
    neither forward nor backward, and the outputs are sharded over the same axis.

    Args:
        layer: The layer, on an ordinary device; its parameters are replaced.
        device_mesh: One-dimensional; its size divides n.

    Returns:
        The same layer, with DTensor parameters of unchanged names and global shapes.

    Raises:
        TypeError: If `layer` is no `PartitionedLinear` or `device_mesh` no mesh.
        ValueError: If the mesh has several dimensions or its size does not divide n, or the layer is parametrised or
            pruned.
        UnsupportedImplementationError: If the layer names an implementation that cannot be sharded.
    """
    if not isinstance(layer, PartitionedLinear):
        raise TypeError(f"`layer`: expected a PartitionedLinear, got {kind_of(layer)}; convert it first.")
    if layer.packing is not None:
        raise ValueError(
            f"`layer`: expected partitions of one size, got in_features={shown(layer.in_features)} and "
            f"out_features={shown(layer.out_features)}; packed parameters are not sharded, keep the layer whole."
        )
    shardable = ["auto", *(entry.name for entry in IMPLEMENTATIONS.values() if entry.shards_partitions)]
    if layer.implementation not in shardable:
        raise UnsupportedImplementationError(
            f"`layer`: expected an implementation that shards without communication, one of {', '.join(shardable)}, "
            f"got {layer.implementation!r}; build the layer with one of these."
        )
    _check_mesh(device_mesh, layer.num_partitions)
    check_writable(layer.partition_views())  # neither parametrised nor pruned
    for name, parameter in list(layer.named_parameters()):
        with torch.no_grad():
            sharded = distribute_tensor(parameter.detach(), device_mesh, [Shard(0)])
        layer.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
    layer.register_forward_pre_hook(_check_inputs)
    return layer


def shard_inputs(x: Tensor, device_mesh: DeviceMesh) -> DTensor:
    """Spread inputs of shape (..., n, in) over the partition axis, as a layer from `shard_partitions` takes them.

    This is the one place that communicates: rank 0's values are scattered.

    Args:
        x: Inputs, shape (..., n, in), the same on every rank.
        device_mesh: The layer's mesh.

    Returns:
        The same inputs, sharded over axis -2.

    Raises:
        TypeError: If `x` is no tensor or `device_mesh` no mesh.
        ValueError: If `x` has no partition axis, or the mesh does not fit it.
    """
    check_tensor("x", x)
    if x.ndim < 2:
        raise ValueError(f"`x`: expected shape (..., n, in), got {tuple(x.shape)}; add the partition axis.")
    _check_mesh(device_mesh, x.shape[-2])
    return distribute_tensor(x, device_mesh, [Shard(x.ndim - 2)])


def _check_mesh(device_mesh: Any, num_partitions: int) -> None:
    if not isinstance(device_mesh, DeviceMesh):
        raise TypeError(f"`device_mesh`: expected a DeviceMesh, got {kind_of(device_mesh)}; use init_device_mesh.")
    if device_mesh.ndim != 1 or num_partitions % device_mesh.size():
        raise ValueError(
            f"`device_mesh`: expected one dimension whose size divides n = {num_partitions}, got shape "
            f"{tuple(device_mesh.shape)}; choose another mesh."
        )


def _check_inputs(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
    if arguments and not isinstance(arguments[0], DTensor):
        raise TypeError(
            f"`x`: expected a DTensor sharded over the partition axis, got {kind_of(arguments[0])}; pass it "
            f"through shard_inputs."
        )
