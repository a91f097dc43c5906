"""Placing the partitions on several devices: every device computes its own partitions and talks to no other."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_impl.layer import PartitionedLinear
from jax_impl.validation import check_instance, check_name


def partition_sharding(mesh: Mesh, axis_name: str = "partitions", *, leading_axes: int = 0) -> NamedSharding:
    """Return the sharding that divides the partition axis over a mesh axis and nothing else.

    Args:
        mesh: The devices.
        axis_name: The mesh axis to divide over.
        leading_axes: How many axes come before the partition axis: 0 for kernel and bias; for an input or output of
            shape (*b, n, features) the number of batch axes.

    Returns:
        The sharding, of any array with at least `leading_axes + 1` axes.

    Raises:
        TypeError: If `mesh` is no `jax.sharding.Mesh`, `axis_name` no str or `leading_axes` no int.
        ValueError: If the mesh has no such axis, or `leading_axes` is negative.
    """
    check_instance("mesh", mesh, Mesh, "make one with jax.make_mesh")
    check_name("axis_name", axis_name, mesh.axis_names)
    check_instance("leading_axes", leading_axes, int, "pass the number of batch axes")
    if leading_axes < 0 or isinstance(leading_axes, bool):
        raise ValueError(f"`leading_axes`: expected at least 0, got {leading_axes}; pass the number of batch axes.")
    return NamedSharding(mesh, PartitionSpec(*[None] * leading_axes, axis_name))


def shard_partitions(layer: PartitionedLinear, mesh: Mesh, axis_name: str = "partitions") -> PartitionedLinear:
    """Divide a layer's kernel and bias over the partition axis, in place.

    The maps are independent, so with an input divided alike (`partition_sharding` with its number of leading axes)
    neither the forward pass nor the gradients of input, kernel and bias need any communication in `matmul` (which is
    "auto"), `einsum` and `vmap`. The other implementations are right too, but their devices exchange operands.

    Args:
        layer: The layer; its values are kept, only their placement changes.
        mesh: The devices; make it with `axis_types=(jax.sharding.AxisType.Auto, ...)`.
        axis_name: The mesh axis to divide over; its size must divide n.

    Returns:
        The same layer.

    Raises:
        TypeError: If `layer` is no nnx `PartitionedLinear`, or `mesh` no `jax.sharding.Mesh`.
        ValueError: If the mesh has no such axis, its size does not divide n, or the partitions have unequal sizes; the
            layer is unchanged.
    """
    check_instance("layer", layer, PartitionedLinear, "place linen's parameters with partition_sharding and device_put")
    sharding = partition_sharding(mesh, axis_name)
    if layer.packing is not None:
        raise ValueError(
            "`layer`: expected partitions of one size, got sizes of their own, whose packed parameters no mesh axis "
            "divides; divide the leading axes of x instead."
        )
    size = mesh.shape[axis_name]
    if layer.num_partitions % size:
        raise ValueError(
            f"`mesh`: expected a size of axis {axis_name!r} that divides n = {layer.num_partitions}, got {size}; use "
            f"fewer devices."
        )
    parameters: list[Any] = [layer.kernel] if layer.bias is None else [layer.kernel, layer.bias]
    for parameter in parameters:
        parameter.set_value(jax.device_put(parameter[...], sharding))
    return layer
