"""The JAX competitors: the registry's implementations, what users write instead, the article's dense yardstick."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from bench.measure.jax.modules import (
    einmix,
    equinox_filter_vmap,
    keras_einsum_dense,
    linen_dense_general,
    nnx_einsum,
    nnx_linear_general,
)
from bench.measure.packages import missing_competitors
from jax_impl import partitioned_linear
from jax_impl.registry import implementation_names

Function = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, precision: Any) -> jax.Array:
    """One dense map over all features (case A of the article), on arrays with a partition axis of size 1."""
    return (jnp.matmul(x[:, 0], kernel[0], precision=precision) + bias[0])[:, None]


_KNOWN: Mapping[str, Callable[[], Callable[..., jax.Array]]] = {
    "stock:nnx.Einsum": lambda: nnx_einsum,
    "stock:nnx.LinearGeneral": lambda: nnx_linear_general,
    "stock:linen.DenseGeneral": lambda: linen_dense_general,
    "stock:einops.EinMix": einmix,
    "stock:equinox.filter_vmap": equinox_filter_vmap,
    "stock:keras.EinsumDense": keras_einsum_dense,
}
MISSING: Mapping[str, str] = MappingProxyType(missing_competitors(_KNOWN))
STOCK: Mapping[str, Callable[[], Callable[..., jax.Array]]] = MappingProxyType(
    {name: build for name, build in _KNOWN.items() if name not in MISSING}
)
YARDSTICKS: Mapping[str, Callable[[], Callable[..., jax.Array]]] = MappingProxyType({"dense": lambda: _dense})


def resolve(name: str, precision: Any) -> Function:
    """Returns the function that a competitor's name means.

    Args:
        name: a name of the registry, of `STOCK` or of `YARDSTICKS`.
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
    return partial(known[name](), precision=precision)
