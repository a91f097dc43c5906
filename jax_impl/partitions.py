"""Functions of one partition's matrix or vector, used on each partition of a layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_impl.array_types import said
from jax_impl.implementations.unequal import matrices_by_bucket
from jax_impl.layer import PartitionedLinear
from jax_impl.parameters import export_parameters
from jax_impl.validation import as_array, check_callable, check_instance, check_name


def for_each_partition_(
    layer: PartitionedLinear, function: Callable[[Any], Any], *, name: str = "kernel"
) -> PartitionedLinear:
    """Put what a function makes of one partition's kernel (in, out), or bias (out,), in its place, for each partition.

    A norm, a projection or a quantile for pruning that is taken of the stacked kernel would be that of one matrix of
    other sizes. The function is mapped by `jax.vmap`, which does the same inside of a model:
    `jax.vmap(function)(layer.kernel[...])`, or `jax.vmap(function)(params["kernel"])` in linen. Of unequal sizes, it is
    mapped over the partitions of each size.

    Args:
        layer: The nnx layer.
        function: Returns an array of its argument's shape and dtype.
        name: "kernel" or "bias".

    Returns:
        The same layer.

    Raises:
        TypeError: If `layer` is no nnx `PartitionedLinear` or `function` cannot be called, or returns another dtype.
        ValueError: If `name` is another one or the layer has no bias, or the function raises or returns another shape;
            the layer is unchanged.
    """
    check_instance("layer", layer, PartitionedLinear, "for linen use jax.vmap(function)(params['kernel'])")
    check_callable("function", function, "of one partition's array")
    check_name("name", name, ("kernel", "bias"))
    variable: Any = getattr(layer, name)
    if variable is None:
        raise ValueError("`name`: expected a parameter of the layer, got 'bias', of which it has none; use 'kernel'.")
    export_parameters(layer)  # refuses values that are not here
    stored, packing = jnp.asarray(variable.get_value()), layer.packing
    if packing is None:
        values = _mapped(function, stored)
    elif name == "kernel":
        values = jnp.concatenate([_mapped(function, one).ravel() for one in matrices_by_bucket(stored, packing)])
    else:
        values = jnp.concatenate([_mapped(function, one[None])[0] for one in layer.partition_biases() or ()])
    try:
        variable.set_value(values)
    except Exception as error:
        raise ValueError(
            f"`layer`: expected a layer that may be changed here, got an error from Flax ({said(error)}); call this "
            f"outside of transforms."
        ) from error
    return layer


def _mapped(function: Callable[[Any], Any], stacked: Array) -> Array:
    try:
        mapped = jax.vmap(function)(stacked)
    except Exception as error:
        raise ValueError(
            f"`function`: expected a function of one partition's array of shape {stacked.shape[1:]}, got an error from "
            f"it ({said(error)}); pass a function that jax.vmap can map."
        ) from error
    values = as_array("function", mapped)
    if values.shape != stacked.shape:
        raise ValueError(
            f"`function`: expected a result of shape {stacked.shape[1:]}, got {values.shape[1:]}; return the shape of "
            f"its argument."
        )
    if values.dtype != stacked.dtype:
        raise TypeError(f"`function`: expected a result of dtype {stacked.dtype}, got {values.dtype}; cast it.")
    return jnp.asarray(values)
