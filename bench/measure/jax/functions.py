"""The JAX competitors: the registry's implementations, the functions and layers users write instead, the yardstick.

Layers of other packages are made by builders, which import the package: tracing, which is timed, would import it
otherwise.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from bench.measure.switches import missing_competitors
from bench.measure.timer import Task
from bench.plan.workloads import SHARED
from jax_impl import partitioned_linear
from jax_impl.registry import implementation_names
from parity_tests.judge.inputs import Sizes

Array = jax.Array
Function = Callable[..., Array]


def with_parameters(build: Callable[[], nnx.Module], **parameters: Array) -> Any:
    """Return an nnx module with the given arrays in place of its own, of which none is ever drawn."""
    graph, state = nnx.split(nnx.eval_shape(build))
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state)


def nnx_einsum(x: Array, kernel: Array, bias: Array, *, precision: Any) -> Array:
    """Run Flax nnx `Einsum`."""

    def build() -> nnx.Module:
        return nnx.Einsum(
            "bni,nio->bno", kernel.shape, bias.shape, param_dtype=kernel.dtype, precision=precision, rngs=nnx.Rngs(0)
        )

    return with_parameters(build, kernel=kernel, bias=bias)(x)


def nnx_linear_general(x: Array, kernel: Array, bias: Array, *, precision: Any) -> Array:
    """Run Flax nnx `LinearGeneral` with a batch axis, which must lead: hence a transpose before and after."""
    n, i, o = kernel.shape

    def build() -> nnx.Module:
        return nnx.LinearGeneral(
            i, o, batch_axis={0: n}, param_dtype=kernel.dtype, precision=precision, rngs=nnx.Rngs(0)
        )

    return jnp.swapaxes(with_parameters(build, kernel=kernel, bias=bias)(jnp.swapaxes(x, 0, 1)), 0, 1)


def linen_dense_general(x: Array, kernel: Array, bias: Array, *, precision: Any) -> Array:
    """Run Flax linen `DenseGeneral` with a batch dimension, which must lead: hence a transpose before and after."""
    layer = linen.DenseGeneral(kernel.shape[2], batch_dims=(0,), param_dtype=kernel.dtype, precision=precision)
    y = layer.apply({"params": {"kernel": kernel, "bias": bias}}, jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(cast(Array, y), 0, 1)


def _matmul_precision(precision: Any) -> AbstractContextManager[object]:
    """Return the ambient precision for libraries that hand none to their products; tracing writes it into each."""
    if precision is None:
        return nullcontext()
    name = precision.name
    return jax.default_matmul_precision(name.lower() if isinstance(precision, jax.lax.Precision) else name)


def einmix() -> Function:
    """Return einops `EinMix` for Flax."""
    from einops.layers.flax import EinMix

    def run(x: Array, kernel: Array, bias: Array, *, precision: Any) -> Array:
        n, i, o = kernel.shape
        layer = EinMix("b n i -> b n o", weight_shape="n i o", bias_shape="n o", sizes={"n": n, "i": i, "o": o})
        with _matmul_precision(precision):
            return cast(Array, layer.apply({"params": {"weight": kernel, "bias": bias[None]}}, x))

    return run


def equinox_filter_vmap() -> Function:
    """Return equinox `filter_vmap` over an ensemble of `eqx.nn.Linear`, which keeps (out, in)."""
    import equinox as eqx

    def run(x: Array, kernel: Array, bias: Array, *, precision: Any) -> Array:
        _, i, o = kernel.shape
        # The key is needed to describe the layer, and never drawn from.
        with jax.ensure_compile_time_eval():
            key = jax.random.key(0)
        skeleton = eqx.filter_eval_shape(eqx.nn.Linear, i, o, dtype=kernel.dtype, key=key)
        ensemble = eqx.tree_at(lambda layer: (layer.weight, layer.bias), skeleton, (jnp.swapaxes(kernel, 1, 2), bias))
        each = eqx.filter_vmap(lambda layer, rows: jax.vmap(layer)(rows), in_axes=(eqx.if_array(0), 1), out_axes=1)
        with _matmul_precision(precision):
            return each(ensemble, x)

    return run


def keras_einsum_dense() -> Function:
    """Return Keras `EinsumDense` on its JAX backend, called statelessly."""
    # Read once, when keras is imported; a worker runs one framework only.
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    def run(x: Array, kernel: Array, bias: Array, *, precision: Any) -> Array:
        n, _, o = kernel.shape
        layer = keras.layers.EinsumDense(
            "bni,nio->bno",
            output_shape=(n, o),
            bias_axes="no",
            kernel_initializer="zeros",
            dtype=str(kernel.dtype),
        )
        # Outside the traced program, which holds the stateless call alone.
        with jax.ensure_compile_time_eval():
            layer.build(x.shape)
        with _matmul_precision(precision):
            return layer.stateless_call([kernel, bias], [], x)[0]

    return run


def _dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, precision: Any) -> jax.Array:
    """Run one dense map over all features (case A of the article), on arrays with a partition axis of size 1."""
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
# Their parameters are lists, see `listed`.
UNEQUAL_STOCK: Mapping[str, Callable[[], Callable[..., jax.Array]]] = MappingProxyType(
    {"stock:nnx.Linear": lambda: linears}
)
YARDSTICKS: Mapping[str, Callable[[], Callable[..., jax.Array]]] = MappingProxyType({"dense": lambda: _dense})


def linears(x: Array, kernels: tuple[Array, ...], biases: tuple[Array, ...], *, precision: Any) -> Array:
    """Run a loop over Flax nnx `Linear`, one for each partition: what users have for partitions of unequal sizes.

    Its parameters are tuples: each is an array of its own, as those of layers are.
    """
    parts = jnp.split(x, np.cumsum([len(kernel) for kernel in kernels])[:-1].tolist(), axis=-1)

    def one(part: Array, kernel: Array, bias: Array) -> Array:
        def build() -> nnx.Module:
            return nnx.Linear(*kernel.shape, param_dtype=kernel.dtype, precision=precision, rngs=nnx.Rngs(0))

        return with_parameters(build, kernel=kernel, bias=bias)(part)

    return jnp.concatenate([one(*each) for each in zip(parts, kernels, biases, strict=True)], axis=-1)


def listed(arguments: tuple[Array, ...], sizes: Sizes) -> tuple[Any, ...]:
    """Return x, kernels, biases and dy, with parameters that are tuples; see `linears`."""
    x, kernel, bias, cotangent = arguments
    pairs = zip(sizes.places("weight"), sizes.in_features, sizes.out_features, strict=True)
    kernels = tuple(kernel[place].reshape(i, o) for place, i, o in pairs)
    return x, kernels, tuple(bias[place] for place in sizes.places("bias")), cotangent


def _expanded(function: Function) -> Function:
    """Give every partition the input that all share: what of it is copied is up to the compiler."""

    def run(x: Array, kernel: Array, bias: Array, **options: Any) -> Array:
        return function(jnp.broadcast_to(x[:, None], (len(x), len(kernel), x.shape[-1])), kernel, bias, **options)

    return run


def resolve(task: Task, precision: Any) -> Function:
    """Return the function that a competitor's name means, for the sizes and the layout of a task.

    Raises:
        ValueError: for a name that is none.
    """
    name, unequal, shared = task.implementation, task.sizes is not None, task.layout == SHARED
    if name in implementation_names(unequal=unequal):
        how: dict[str, Any] = {"partition_axis": None} if shared else {}
        if task.sizes is not None:
            how |= {"in_features": task.sizes.in_features, "out_features": task.sizes.out_features}
        return partial(partitioned_linear, implementation=name, precision=precision, **how)
    known = {**(UNEQUAL_STOCK if unequal else STOCK), **YARDSTICKS}
    if name not in known:
        choices = ", ".join((*implementation_names(unequal=unequal), *known))
        raise ValueError(f"implementation: expected one of {choices}, got {name!r}; choose one of these.")
    return partial(_expanded(known[name]()) if shared else known[name](), precision=precision)
