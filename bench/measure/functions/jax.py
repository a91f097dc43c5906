"""The JAX competitors: the registry's implementations, what users write instead, the article's dense yardstick."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_impl import partitioned_linear
from jax_impl.registry import implementation_names

Function = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _nnx_einsum(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, precision: Any) -> jax.Array:
    """Flax's own module for the same map, with the given parameters in place of its initial ones."""

    def build() -> nnx.Einsum:
        return nnx.Einsum(
            "bni,nio->bno", kernel.shape, bias.shape, param_dtype=kernel.dtype, precision=precision, rngs=nnx.Rngs(0)
        )

    # Abstract, so that no initial value is drawn inside the traced program.
    graph, state = nnx.split(nnx.eval_shape(build))
    nnx.replace_by_pure_dict(state, {"kernel": kernel, "bias": bias})
    return nnx.merge(graph, state)(x)


def _dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, precision: Any) -> jax.Array:
    """One dense map over all features (case A of the article), on arrays with a partition axis of size 1."""
    return (jnp.matmul(x[:, 0], kernel[0], precision=precision) + bias[0])[:, None]


STOCK: Mapping[str, Callable[..., jax.Array]] = MappingProxyType({"stock:nnx.Einsum": _nnx_einsum})
YARDSTICKS: Mapping[str, Callable[..., jax.Array]] = MappingProxyType({"dense": _dense})


def resolve(name: str, precision: Any) -> Function:
    """Returns the function that a competitor's name means.

    Args:
        name: a name of the registry, of ``STOCK`` or of ``YARDSTICKS``.
        precision: what JAX calls the precision of a product; None for the framework's default.

    Raises:
        ValueError: for a name that is none.
    """
    if name in implementation_names():
        return partial(partitioned_linear, implementation=name, precision=precision)
    known = {**STOCK, **YARDSTICKS}
    if name not in known:
        choices = ", ".join((*implementation_names(), *known))
        raise ValueError(f"implementation: expected one of {choices}, got {name!r}; choose one of these.")
    return partial(known[name], precision=precision)
