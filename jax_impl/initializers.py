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
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jax_impl.validation import check_callable, check_name

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
    """Refuse what `kernel_initializer` and `bias_initializer` cannot use.

    Raises:
        TypeError: If `init` is no name, or one of the others no function.
        ValueError: If `init` is an unknown name.
    """
    check_name(argument, init, INITIALIZERS)
    for name, function in (("kernel_init", kernel_init), ("bias_init", bias_init)):
        if function is not None:
            check_callable(name, function, "(key, shape, dtype)")


def kernel_initializer(init: str, kernel_init: Initializer | None, in_features: int) -> Initializer:
    """Return the initialiser of a whole kernel: (key, (n, in, out), dtype) -> values.

    Args:
        init: "torch" or "flax".
        kernel_init: An initialiser of one partition's (in, out) matrix, which overrides `init`; or None.
        in_features: in, features of one partition.
    """
    one = INITIALIZERS[init][0](in_features) if kernel_init is None else kernel_init
    return per_partition("kernel_init", one)


def bias_initializer(init: str, bias_init: Initializer | None, in_features: int) -> Initializer:
    """Return the initialiser of a whole bias: (key, (n, out), dtype) -> values.

    Args:
        init: "torch" or "flax".
        bias_init: An initialiser of one partition's (out,) vector, which overrides `init`; or None.
        in_features: in, features of one partition.
    """
    one = INITIALIZERS[init][1](in_features) if bias_init is None else bias_init
    return per_partition("bias_init", one)


def per_partition(argument: str, initializer: Initializer) -> Initializer:
    """Turn an initialiser of one partition into one of all n, with a key of its own for each partition.

    Boxes of metadata (`nnx.with_partitioning`, `linen.with_partitioning` and the like) end up around the stacked
    values, so they must describe the stacked array: three names for a kernel, two for a bias.

    Args:
        argument: What to call the initialiser in messages.
        initializer: (key, shape of one partition, dtype) -> values; it must be traceable by `jax.vmap`.

    Returns:
        (key, (n, *shape), dtype) -> values of all partitions; it raises ValueError if one partition's values have
        another shape, or if the initialiser raises it.
    """

    def stacked(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        boxes = []

        def one(partition_key: Array) -> Any:
            try:
                drawn = initializer(partition_key, shape[1:], dtype)
            except ValueError as error:
                raise ValueError(
                    f"`{argument}`: expected a function that draws one partition's values of shape {shape[1:]}, got an "
                    f"error from it ({error}); pass a function for this shape."
                ) from error
            if isinstance(drawn, nnx.VariableMetadata):
                # Unlike linen's boxes this one is no pytree: it is opened inside vmap and closed again outside.
                boxes.append(drawn)
                drawn = drawn.raw_value
            for values in jax.tree.leaves(drawn):
                if jnp.shape(values) != shape[1:]:
                    raise ValueError(
                        f"`{argument}`: expected values of shape {'(in, out)' if len(shape) == 3 else '(out,)'} = "
                        f"{shape[1:]} for one partition, got {jnp.shape(values)}; return the shape that is asked for."
                    )
            return drawn

        values = jax.vmap(one)(jax.random.split(key, shape[0]))
        return dataclasses.replace(boxes[0], raw_value=values) if boxes else values

    return stacked


def _drawn_in(dtype: DTypeLike) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
