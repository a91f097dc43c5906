"""One formulation of y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] per file.

Each is a function (x, weight, bias, precision, dtype) -> y. The three operands have one dtype, and bias may be None;
`precision` is that of the product, as in `jax.lax.dot_general`; y has `dtype`. They assume valid operands
(`jax_impl.validation` has seen them) and know nothing of one another; what each one supports is declared in
`jax_impl.registry`. The arithmetic rules that several of them share are here.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# The names that `jax.lax.Precision` answers to, its aliases included.
PRECISION_NAMES = ("default", "fastest", "bfloat16", "high", "bfloat16_3x", "tensorfloat32", "highest", "float32")
# XLA leaves a product of a matrix and a vector with more operand entries than this to its matrix products.
_VECTOR_PRODUCT_ENTRIES = 10**7


def product_dtype(dtype: np.dtype, rows: Any, in_features: Any, out_features: Any) -> np.dtype:
    """Return the dtype that a product of (rows, in_features) and (in_features, out_features) is asked for in.

    That is `dtype`, but for 16-bit products with a vector: there it is fp32, which `add_bias` rounds to `dtype`. XLA on
    a GPU turns a product with a vector into one of elements and a sum, and computes the former in the dtype of the
    result: with 16 bits it rounds every single term before it adds them in fp32 (jax 0.11.2 on an H200: sums of 32
    terms were off by ten times the error of adding them in fp32 and rounding once). Where one of the three sizes is
    one, two of the three products of a step are with a vector, and JAX derives the gradient's in the dtype of this one.
    A symbolic number of rows, of a program that is exported for any batch, is taken for many.
    """
    sizes = (rows, in_features, out_features)
    known = [size for size in sizes if isinstance(size, int)]
    if dtype.itemsize > 2 or 1 not in known or math.prod(known) > _VECTOR_PRODUCT_ENTRIES:
        return dtype
    return np.dtype(np.float32)


def sizes_known(*sizes: Any) -> bool:
    """Say whether all sizes are numbers; in a program that is exported for any of them, rows and more are symbols."""
    return all(isinstance(size, int) for size in sizes)


def names_algorithm(precision: Any) -> bool:
    """Say whether a valid precision is a dot algorithm, by itself or by its name."""
    named = isinstance(precision, str) and precision not in PRECISION_NAMES
    return named or isinstance(precision, lax.DotAlgorithm | lax.DotAlgorithmPreset)


def needs_partition_major(x: Array) -> bool:
    """Say whether a batched product must see its operands partition-major, with rows in one axis.

    Otherwise XLA on a CPU refuses a batched bf16 product with an fp32 result when its operands hold the partition axis
    in different places (jax 0.10.2), and accumulates one without it, or its weight gradient over several batch axes, in
    bf16 (jax 0.11.2: 4096 ones sum to 1536, even under `DotAlgorithmPreset.BF16_BF16_F32`).
    """
    return x.dtype.itemsize == 2


def partition_major(x: Array) -> Array:
    """Turn (*b, n, i) into (n, rows, i)."""
    rows = math.prod(x.shape[:-2])
    return jnp.swapaxes(x.reshape(rows, *x.shape[-2:]), 0, 1)


def batch_major(y: Array, batch_shape: tuple[Any, ...]) -> Array:
    """Turn (n, rows, o) back into (*b, n, o); b may be symbolic, in a program that is exported for any batch."""
    return jnp.swapaxes(y, 0, 1).reshape(*batch_shape, y.shape[0], y.shape[2])


def add_bias(product: Array, bias: Array | None, dtype: np.dtype) -> Array:
    """Add a broadcast bias in at least fp32 and round once to `dtype`.

    The casts are there for the gradient: the VJP of a broadcast is a sum over all rows, and JAX sums it in the dtype
    of the addition. In bf16 or fp16 that loses the bias gradient's digits after a few hundred rows; here it is summed
    in fp32 and rounded once. It stays plain traceable code, so forward mode and higher derivatives hold.
    """
    if bias is None:
        return product.astype(dtype)
    # By NumPy's rule, and with the ranks said: users may have JAX refuse both promotions.
    wide = np.promote_types(dtype, np.float32)
    bias = jnp.expand_dims(bias, range(product.ndim - bias.ndim))
    return (product.astype(wide) + bias.astype(wide)).astype(dtype)
