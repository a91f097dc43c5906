"""Initial values, drawn anew for every partition; the fan-in is that of one partition, never n times it.

Initialisers have Flax's form, (key, shape, dtype) -> values, and see the shape of one partition.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from jax_impl.array_types import name_of, said, shown
from jax_impl.packing import Packing
from jax_impl.validation import as_array, check_callable, check_name

_LARGE_BYTES = 2**30

Initializer: TypeAlias = Callable[..., Any]
"""A function (key, shape, dtype) that returns an array, or a box of metadata around one."""

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal truncated at -2 and +2."""


def torch_uniform(in_features: Any) -> Initializer:
    """Draw from U(-1/sqrt(in), 1/sqrt(in)), as `torch.nn.Linear` does for its weight and its bias."""
    bound = 1.0 / _root(in_features)

    def draw(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jax.random.uniform(key, shape, _drawn_in(dtype), -bound, bound).astype(dtype)

    return draw


def flax_truncated_normal(in_features: Any) -> Initializer:
    """Draw from a normal truncated at two of its standard deviations, of resulting std 1/sqrt(in).

    This is the default of `flax.nnx.Linear`, `lecun_normal`, with the fan-in of one partition. Drawn in at least fp32
    and rounded once, since random bits are few and the inverse error function coarse in bf16 and fp16.
    """
    sigma = 1.0 / (_root(in_features) * TRUNCATED_STD)

    def draw(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return (jax.random.truncated_normal(key, -2.0, 2.0, shape, _drawn_in(dtype)) * sigma).astype(dtype)

    return draw


def zeros(in_features: Any) -> Initializer:
    """Fill with zeros, as `flax.nnx.Linear` does for its bias."""
    del in_features
    return lambda key, shape, dtype: jnp.zeros(shape, dtype)


INITIALIZERS = MappingProxyType({"torch": (torch_uniform, torch_uniform), "flax": (flax_truncated_normal, zeros)})
"""Name -> (kernel initialiser, bias initialiser), each made from in_features, or an array of one for each element."""


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


def packed_initializers(
    init: str, kernel_init: Initializer | None, bias_init: Initializer | None, packing: Packing
) -> tuple[Initializer, Initializer]:
    """Return the initialisers of a packed kernel and a packed bias, as `partition_initializers` of stacked ones.

    What `init` names is drawn in one piece, each element with the fan-in of its partition: a piece for each size would
    be a program for each size, where the caller does not jit.
    """
    ins, outs, order = np.array(packing.in_features), np.array(packing.out_features), list(packing.order)
    fan_ins = ((ins[order], (ins * outs)[order]), (ins, outs))

    def named(which: int) -> Initializer:
        def draw(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
            def in_one_piece(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
                sizes, repeats = fan_ins[which]
                fan_in = jnp.repeat(jnp.asarray(sizes, _drawn_in(dtype)), repeats, total_repeat_length=shape[0])
                return INITIALIZERS[init][which](fan_in)(key, shape, dtype)

            whole = per_partition(("kernel_init", "bias_init")[which], in_one_piece)(key, (1, *shape), dtype)
            return whole[0]

        return draw

    return (
        named(0) if kernel_init is None else _packed("kernel_init", kernel_init, packing),
        named(1) if bias_init is None else _packed("bias_init", bias_init, packing),
    )


def per_partition(argument: str, initializer: Initializer) -> Initializer:
    """Turn an initialiser of one partition into one of all n, with a key of its own for each partition.

    Boxes of metadata (`nnx.with_partitioning`, `linen.with_partitioning` and the like) end up around the stacked
    values, so they must describe the stacked array: three names for a kernel, two for a bias.

    It must be traceable by `jax.vmap`. What is returned raises ValueError if it fails or one partition's values have
    another shape, TypeError if they are no array of the dtype that was asked for, and MemoryError if there is no room
    for all of them; messages call the initialiser `argument`.
    """

    def stacked(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        keys = _keys(key, shape[0])
        with _room_for(argument, shape):
            values, close = _drawn(argument, initializer, keys, shape[1:], dtype)
        return close(values)

    return stacked


def _packed(argument: str, initializer: Initializer, packing: Packing) -> Initializer:
    """Turn an initialiser of one partition into one of packed values; boxes of metadata end up around these."""

    def packed(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        keys, pieces, close = _keys(key, packing.num_partitions), [], lambda values: values
        of_kernel = argument == "kernel_init"
        with _room_for(argument, shape):
            for bucket in packing.buckets:
                size = (bucket.in_features, bucket.out_features) if of_kernel else (bucket.out_features,)
                values, close = _drawn(argument, initializer, keys[np.array(bucket.members)], size, dtype)
                pieces.append(values.ravel())
            values = jnp.concatenate(pieces)
            if not of_kernel:  # drawn bucket after bucket, and wanted in the layout of an output
                starts = np.concatenate([[0], np.cumsum([packing.out_features[k] for k in packing.order])])
                places = {k: np.arange(*starts[at : at + 2]) for at, k in enumerate(packing.order)}
                values = values[np.concatenate([places[k] for k in range(packing.num_partitions)])]
        return close(values)

    return packed


def _keys(key: Array, num_partitions: int) -> Array:
    try:
        return jax.random.split(key, num_partitions)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`rngs`: expected one random key for all partitions, got {shown(key)} ({said(error)}); pass one seed."
        ) from error


@contextmanager
def _room_for(argument: str, shape: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise MemoryError(
            f"`{argument}`: expected sizes that fit into memory, got values of shape {shape} ({said(error)}); use "
            f"smaller ones."
        ) from error


def _drawn(
    argument: str, initializer: Initializer, keys: Array, shape: tuple[int, ...], dtype: DTypeLike
) -> tuple[Array, Callable[[Array], Any]]:
    """Draw values of one shape with each key; return them with a function that puts them, or others, into their box."""
    boxes = []

    def one(partition_key: Array) -> Any:
        try:
            drawn = initializer(partition_key, shape, dtype)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            raise ValueError(
                f"`{argument}`: expected a function that draws one partition's values of shape {shape}, got an error "
                f"from it ({said(error)}); pass a function for this shape."
            ) from error
        if isinstance(drawn, nnx.VariableMetadata):
            # Unlike linen's boxes this one is no pytree: it is opened inside vmap and closed again outside.
            boxes.append(drawn)
            drawn = drawn.raw_value
        values = _checked(argument, meta.unbox(drawn), shape, dtype)
        return meta.replace_boxed(drawn, values) if isinstance(drawn, meta.AxisMetadata) else values

    drawn = jax.vmap(one)(keys)
    values: Array = meta.unbox(drawn)
    if not isinstance(values, Tracer) and values.nbytes >= _LARGE_BYTES:
        # JAX returns before it has the memory, and fails wherever the values are used.
        values.block_until_ready()

    def close(values: Array) -> Any:
        inner = meta.replace_boxed(drawn, values) if isinstance(drawn, meta.AxisMetadata) else values
        return dataclasses.replace(boxes[0], raw_value=inner) if boxes else inner

    return values, close


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
    names: tuple[str, ...] = getattr(getattr(initializer, "__code__", None), "co_freevars", ())
    cells: tuple[Any, ...] = getattr(initializer, "__closure__", None) or ()
    # A cell may be empty while its function is being made.
    held: dict[str, Any] = dict(zip(names, (getattr(cell, "cell_contents", None) for cell in cells), strict=True))
    if {"batch_axis", "in_axis", "out_axis"} <= held.keys():
        axes = held["batch_axis"]
        return (axes,) if isinstance(axes, int) else tuple(axes or ())
    boxed = held.get("initializer", held.get("fn", getattr(initializer, "__wrapped__", None)))
    return _batch_axis(boxed) if callable(boxed) and boxed is not initializer else ()


def _root(in_features: Any) -> Any:
    return math.sqrt(in_features) if isinstance(in_features, int) else jnp.sqrt(in_features)


def _drawn_in(dtype: DTypeLike) -> Any:
    return np.promote_types(np.dtype(dtype), np.float32)
