"""Initial values, drawn anew for every partition; the fan-in is that of one partition, never n times it.

Initialisers have Flax's form, (key, shape, dtype) -> values, and see the shape of one partition.
"""

import dataclasses
import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta
from jax import Array, lax
from jax.core import Tracer
from jax.typing import DTypeLike

from jax_impl.array_types import said, shown
from jax_impl.validation import as_array, check_callable, check_name, name_of

_LARGE_BYTES = 2**30

Initializer: TypeAlias = Callable[..., Any]
"""A function (key, shape, dtype) that returns an array, or a box of metadata around one."""

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal truncated at -2 and +2."""


def torch_uniform(in_features: int) -> Initializer:
    """Draw from U(-1/sqrt(in), 1/sqrt(in)), as `torch.nn.Linear` does for its weight and its bias."""
    bound = 1.0 / math.sqrt(in_features)

    def draw(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jax.random.uniform(key, shape, _drawn_in(dtype), -bound, bound).astype(dtype)

    return draw


def flax_truncated_normal(in_features: int) -> Initializer:
    """Draw from a normal truncated at two of its standard deviations, of resulting std 1/sqrt(in).

    This is the default of `flax.nnx.Linear`, `lecun_normal`, with the fan-in of one partition. Drawn in at least fp32
    and rounded once, since random bits are few and the inverse error function coarse in bf16 and fp16.
    """
    sigma = 1.0 / (math.sqrt(in_features) * TRUNCATED_STD)

    def draw(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return (jax.random.truncated_normal(key, -2.0, 2.0, shape, _drawn_in(dtype)) * sigma).astype(dtype)

    return draw


def zeros(in_features: int) -> Initializer:
    """Fill with zeros, as `flax.nnx.Linear` does for its bias."""
    del in_features
    return lambda key, shape, dtype: jnp.zeros(shape, dtype)


INITIALIZERS = MappingProxyType({"torch": (torch_uniform, torch_uniform), "flax": (flax_truncated_normal, zeros)})
"""Name -> (kernel initialiser, bias initialiser), each made from in_features."""


def check_initializer(init: Any, kernel_init: Any, bias_init: Any, *, argument: str = "init") -> None:
    """Refuse what `partition_initializers` cannot use, by a TypeError, or an unknown name by a ValueError."""
    check_name(argument, init, INITIALIZERS)
    for name, function in (("kernel_init", kernel_init), ("bias_init", bias_init)):
        if function is not None:
            check_callable(name, function, "(key, shape, dtype)")
            if batch_axis := _batch_axis(function):
                raise ValueError(
                    f"`{name}`: expected an initialiser of one partition, (in, out), got one with "
                    f"batch_axis={shown(batch_axis)}, which takes an axis of the one map for an axis of maps; "
                    f"leave batch_axis out."
                )


def partition_initializers(
    init: str, kernel_init: Initializer | None, bias_init: Initializer | None, in_features: int
) -> tuple[Initializer, Initializer]:
    """Return the initialisers of a whole kernel and a whole bias: (key, (n, ...), dtype) -> values.

    Where they are not None, `kernel_init` and `bias_init` take the place of what `init` names.
    """
    named = (make(in_features) for make in INITIALIZERS[init])
    of_kernel, of_bias = (one if own is None else own for one, own in zip(named, (kernel_init, bias_init), strict=True))
    return per_partition("kernel_init", of_kernel), per_partition("bias_init", of_bias)


def per_partition(argument: str, initializer: Initializer) -> Initializer:
    """Turn an initialiser of one partition into one of all n, with a key of its own for each partition.

    Boxes of metadata (`nnx.with_partitioning`, `linen.with_partitioning` and the like) end up around the stacked
    values, so they must describe the stacked array: three names for a kernel, two for a bias.

    It must be traceable by `jax.vmap`. What is returned raises ValueError if it fails or one partition's values have
    another shape, TypeError if they are no array of the dtype that was asked for, and MemoryError if there is no room
    for all of them; messages call the initialiser `argument`.
    """

    def stacked(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        boxes = []

        def one(partition_key: Array) -> Any:
            try:
                drawn = initializer(partition_key, shape[1:], dtype)
            except jax.errors.JaxRuntimeError:
                raise
            except Exception as error:
                raise ValueError(
                    f"`{argument}`: expected a function that draws one partition's values of shape {shape[1:]}, got an "
                    f"error from it ({said(error)}); pass a function for this shape."
                ) from error
            if isinstance(drawn, nnx.VariableMetadata):
                # Unlike linen's boxes this one is no pytree: it is opened inside vmap and closed again outside.
                boxes.append(drawn)
                drawn = drawn.raw_value
            values = meta.unbox(drawn)
            values = _checked(argument, values, shape[1:], dtype)
            return meta.replace_boxed(drawn, values) if isinstance(drawn, meta.AxisMetadata) else values

        try:
            keys = jax.random.split(key, shape[0])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`rngs`: expected one random key for all partitions, got {shown(key)} ({said(error)}); pass one seed."
            ) from error
        try:
            values = jax.vmap(one)(keys)
            for array in jax.tree.leaves(values):
                if not isinstance(array, Tracer) and array.nbytes >= _LARGE_BYTES:
                    # JAX returns before it has the memory, and fails wherever the values are used.
                    array.block_until_ready()
        except jax.errors.JaxRuntimeError as error:
            raise MemoryError(
                f"`{argument}`: expected sizes that fit into memory, got values of shape {shape} ({said(error)}); use "
                f"smaller ones."
            ) from error
        return dataclasses.replace(boxes[0], raw_value=values) if boxes else values

    return stacked


def _checked(argument: str, drawn: Any, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    values = as_array(argument, drawn)
    if values.shape != shape:
        raise ValueError(
            f"`{argument}`: expected values of shape {'(in, out)' if len(shape) == 2 else '(out,)'} = {shape} for one "
            f"partition, got {values.shape}; return the shape that is asked for."
        )
    if values.dtype != np.dtype(dtype):
        raise TypeError(
            f"`{argument}`: expected values of dtype {np.dtype(dtype).name}, got {name_of(values.dtype)}; return the "
            f"dtype that is asked for."
        )
    # Without this a weak type would stay, whose values JAX rounds to the dtype of whatever they meet.
    return lax.convert_element_type(values, dtype)


def _batch_axis(initializer: Any) -> tuple[Any, ...]:
    """Return the batch axes of an initialiser by `jax.nn.initializers.variance_scaling`, boxed or not, or ()."""
    names = getattr(getattr(initializer, "__code__", None), "co_freevars", ())
    cells = getattr(initializer, "__closure__", None) or ()
    # A cell may be empty while its function is being made.
    held = dict(zip(names, (getattr(cell, "cell_contents", None) for cell in cells), strict=True))
    if {"batch_axis", "in_axis", "out_axis"} <= held.keys():
        axes = held["batch_axis"]
        return (axes,) if isinstance(axes, int) else tuple(axes or ())
    boxed = held.get("initializer", held.get("fn", getattr(initializer, "__wrapped__", None)))
    return _batch_axis(boxed) if callable(boxed) and boxed is not initializer else ()


def _drawn_in(dtype: DTypeLike) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
