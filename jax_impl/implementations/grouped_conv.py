"""A grouped convolution over a signal of length one."""

import math
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.lax import PrecisionLike
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.implementations import add_bias, product_dtype


def partitioned_linear_grouped_conv(
    x: Inputs, weight: Weight, bias: Bias | None, precision: PrecisionLike, dtype: np.dtype
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as a convolution with n feature groups.

    Every feature is a channel, every partition a group, and signal and kernel have length one. The kernel layout
    of a convolution, (n*o, i, 1), costs one transpose of the weight. In a program for several devices every device
    gathers all operands and computes the whole convolution: see `_undivided`.
    """
    num_partitions, in_features, out_features = weight.shape
    rows = math.prod(x.shape[:-2])
    # XLA makes a matrix product of a convolution of kernel size one where there is a single group.
    wide = product_dtype(dtype, rows, in_features, out_features) if num_partitions == 1 else dtype
    product = _convolution(
        x.reshape(rows, num_partitions * in_features, 1),
        weight.mT.reshape(num_partitions * out_features, in_features, 1),
        groups=num_partitions,
        precision=precision,
        dtype=wide,
    )
    return add_bias(product.reshape(*x.shape[:-1], out_features), bias, dtype)


# One program also where the caller does not jit: a constraint binds the values inside of a program only.
@partial(jax.jit, static_argnames=("groups", "precision", "dtype"), inline=True)
def _convolution(signal: Array, kernel: Array, *, groups: int, precision: PrecisionLike, dtype: Any) -> Array:
    product = lax.conv_general_dilated(
        _undivided(signal),
        _undivided(kernel),
        window_strides=(1,),
        padding="VALID",
        dimension_numbers=("NCH", "OIH", "NCH"),
        feature_group_count=groups,
        precision=precision,
        preferred_element_type=dtype,
    )
    return _undivided(product)


def _undivided(x: Array) -> Array:
    """Return `x`, which every device of the program then holds whole.

    XLA divides a grouped convolution wrongly, without an error: features divided over devices keep the number of
    groups, and a weight gradient over divided rows is counted several times on a mesh of two axes (jax 0.10.2 and
    0.11.2). Where nothing is divided there is nothing to get wrong. It is linear and its own transpose, so the operands
    and results of all derivatives' convolutions are whole too.

    `jax.lax.with_sharding_constraint` needs the mesh, which no tracer shows while a jitted function with `Auto` axes is
    traced. The number of devices is known when the program is lowered; hence a primitive.
    """
    return _undivided_p.bind(x)


_undivided_p = Primitive("undivided")


def _evaluate(x: Array) -> Array:
    # Reached under `jax.disable_jit` only.
    if len(x.devices()) == 1:
        return x
    return jax.device_put(x, NamedSharding(cast(NamedSharding, x.sharding).mesh, PartitionSpec()))


def _lower(context: mlir.LoweringRuleContext, value: Any) -> Any:
    mesh = cast(ShapedArray, context.avals_in[0]).sharding.mesh
    if mesh.empty:
        devices = getattr(context.module_context.axis_context, "num_devices", 1)
        mesh = AbstractMesh((devices,), ("devices",), axis_types=(AxisType.Auto,))
    if mesh.size == 1 or mesh.are_all_axes_manual:
        return [value]
    constrain = partial(lax.with_sharding_constraint, shardings=NamedSharding(mesh, PartitionSpec()))
    return mlir.lower_fun(constrain, multiple_results=False)(context, value)


def _map(operands: Any, axes: Any) -> Any:
    return _undivided_p.bind(*operands), *axes


_undivided_p.def_impl(_evaluate)
_undivided_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_undivided_p, lambda cotangent, _: [_undivided_p.bind(cotangent)])
batching.primitive_batchers[_undivided_p] = _map
mlir.register_lowering(_undivided_p, _lower)
