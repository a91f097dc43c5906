"""The grouped product of mixture-of-experts layers, with equally many rows for every partition."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.lax import PrecisionLike

from jax_impl.array_types import Bias, Inputs, Outputs, UnsupportedImplementationError, Weight
from jax_impl.implementations import add_bias, batch_major, partition_major, product_dtype


def partitioned_linear_grouped_matmul(
    x: Inputs, weight: Weight, bias: Bias | None, precision: PrecisionLike, dtype: np.dtype
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] with `jax.lax.ragged_dot`.

    The rows of all partitions are laid one after another, which costs a transposed copy of `x` and of the result. JAX
    cannot take the reverse-mode derivative of its reverse-mode derivative (forward over reverse works), nor map it with
    `jax.vmap` unless the row counts are mapped too. Where the ragged product is computed as a masked dense one, as on a
    CPU, a NaN or Inf in one partition reaches every other one.
    """
    num_partitions, in_features, out_features = weight.shape
    rows = math.prod(x.shape[:-2])
    product = lax.ragged_dot(
        _unmapped(partition_major(x).reshape(num_partitions * rows, in_features)),
        _unmapped(weight),
        jnp.full((num_partitions,), rows, jnp.int32),
        precision=precision,
        preferred_element_type=product_dtype(dtype, rows, in_features, out_features),
    )
    product = _unmapped(product).reshape(num_partitions, rows, out_features)
    y = add_bias(product, None if bias is None else bias[:, None], dtype)
    return batch_major(y, x.shape[:-2])


def _unmapped(array: Array) -> Array:
    """Return the array itself; mapped by `jax.vmap`, here or in a derivative, raise why that cannot be.

    JAX maps some products only after this package's function has returned: those of a jitted function that is mapped,
    and those of `jax.jacrev`. A primitive is what it asks then.
    """
    return _UNMAPPED.bind(array)


def _refuse_to_map(*_: Any, **__: Any) -> Any:
    raise UnsupportedImplementationError(
        "`implementation`: expected one that jax.vmap can map, got 'grouped_matmul', whose product JAX maps only "
        "together with its row counts; choose another one."
    )


_UNMAPPED = Primitive("partitioned_linear_unmapped")
_UNMAPPED.def_impl(lambda array: array)
_UNMAPPED.def_abstract_eval(lambda array: array)
mlir.register_lowering(_UNMAPPED, lambda context, array: [array])
ad.deflinear2(_UNMAPPED, lambda cotangent, array: [_UNMAPPED.bind(cotangent)])
batching.primitive_batchers[_UNMAPPED] = _refuse_to_map
