"""JAX competitors that are modules: the layers of Flax nnx and linen, einops EinMix, equinox, Keras EinsumDense.

Those of other packages are builders, which import the package: tracing, which is timed, would import it otherwise.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen, nnx

Array = jax.Array
Function = Callable[..., Array]


def _with_parameters(build: Callable[[], nnx.Module], x: Array, **parameters: Array) -> Array:
    """Calls an nnx module with the given arrays in place of its own, of which none is ever drawn."""
    graph, state = nnx.split(nnx.eval_shape(build))
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state)(x)


def nnx_einsum(x: Array, kernel: Array, bias: Array, *, precision: Any) -> Array:
    """Flax nnx `Einsum`."""

    def build() -> nnx.Module:
        return nnx.Einsum(
            "bni,nio->bno", kernel.shape, bias.shape, param_dtype=kernel.dtype, precision=precision, rngs=nnx.Rngs(0)
        )

    return _with_parameters(build, x, kernel=kernel, bias=bias)


def nnx_linear_general(x: Array, kernel: Array, bias: Array, *, precision: Any) -> Array:
    """Flax nnx `LinearGeneral` with a batch axis, which must lead: hence a transpose before and after."""
    n, i, o = kernel.shape

    def build() -> nnx.Module:
        return nnx.LinearGeneral(
            i, o, batch_axis={0: n}, param_dtype=kernel.dtype, precision=precision, rngs=nnx.Rngs(0)
        )

    return jnp.swapaxes(_with_parameters(build, jnp.swapaxes(x, 0, 1), kernel=kernel, bias=bias), 0, 1)


def linen_dense_general(x: Array, kernel: Array, bias: Array, *, precision: Any) -> Array:
    """Flax linen `DenseGeneral` with a batch dimension, which must lead: hence a transpose before and after."""
    layer = linen.DenseGeneral(kernel.shape[2], batch_dims=(0,), param_dtype=kernel.dtype, precision=precision)
    y = layer.apply({"params": {"kernel": kernel, "bias": bias}}, jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(cast(Array, y), 0, 1)


def _matmul_precision(precision: Any) -> AbstractContextManager[object]:
    """For libraries that hand no precision to their products: the ambient one, which tracing writes into each."""
    if precision is None:
        return nullcontext()
    name = precision.name
    return jax.default_matmul_precision(name.lower() if isinstance(precision, jax.lax.Precision) else name)


def einmix() -> Function:
    """Einops `EinMix` for Flax."""
    from einops.layers.flax import EinMix

    def run(x: Array, kernel: Array, bias: Array, *, precision: Any) -> Array:
        n, i, o = kernel.shape
        layer = EinMix("b n i -> b n o", weight_shape="n i o", bias_shape="n o", sizes={"n": n, "i": i, "o": o})
        with _matmul_precision(precision):
            return cast(Array, layer.apply({"params": {"weight": kernel, "bias": bias[None]}}, x))

    return run


def equinox_filter_vmap() -> Function:
    """Equinox: `filter_vmap` over an ensemble of `eqx.nn.Linear`, which keeps (out, in)."""
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
    """Keras `EinsumDense` on its JAX backend, called statelessly."""
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
