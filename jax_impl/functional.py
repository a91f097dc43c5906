"""The operation as a function: validate, select, run."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight, name_of
from jax_impl.layouts import IN_AXIS, PARTITION_AXIS, check_axes, find_axes, static_indices
from jax_impl.packing import Packing
from jax_impl.registry import DTYPE_NAMES, UnsupportedImplementationError, get_implementation, unsupported_reason
from jax_impl.selection import auto_of_unequal, run_auto
from jax_impl.unequal import check_unequal_call, packing_of_call
from jax_impl.validation import (
    as_array,
    as_operand,
    check_algorithm,
    check_bias,
    check_dot_general,
    check_implementation_name,
    check_kernel,
    check_operands,
    check_precision,
    check_preferred_element_type,
    explain_failure,
)


def partitioned_linear(
    x: Inputs,
    kernel: Weight,
    bias: Bias | None = None,
    *,
    implementation: str = "auto",
    precision: PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    dot_general: Callable[..., Any] | None = None,
    in_axis: int = IN_AXIS,
    partition_axis: int | None = PARTITION_AXIS,
    partitions: Sequence[int] | Array | None = None,
    in_features: int | Sequence[int] | None = None,
    out_features: int | Sequence[int] | None = None,
) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o].

    A pure function: it may be jitted, differentiated in either mode, vmapped and scanned. bf16 and fp16 products and
    the bias gradient accumulate in fp32.

    Args:
        x: Inputs, shape (..., n, in): any number of leading axes, none included, possibly empty.
        kernel: One matrix per partition, shape (n, in, out).
        bias: One vector per partition, shape (n, out); or None.
        implementation: "auto", or a name from `implementation_names()`. A named implementation runs or raises.
        precision: Precision of the product, as in `jax.lax.dot_general`; None for the device's default, which rounds
            fp32 operands to TF32 on recent GPUs.
        preferred_element_type: Dtype of the result, at least as wide as the operands'; None for that of the operands.
        dot_general: What computes the product in place of `jax.lax.dot_general`, with its arguments (a quantised one,
            say): it is called once, with the partitions as its batch axis, for "auto" and "matmul".
        in_axis: The axis of x with the features, which those of y take.
        partition_axis: The axis of x with the partitions, which keep it in y. The same axis as `in_axis` for flat
            features: (..., n*in) -> (..., n*out). None for an input that all partitions share, which is one dense
            product: (..., in) -> (..., n, out).
        partitions: Indices of the partitions to compute, m of them, in any order; None for all. An x of m partitions
            holds theirs, in this order; an x of all n partitions is indexed as the parameters are (where both fit, as
            for a permutation, it holds theirs). y has m, and the other partitions' gradients are exactly zero. An index
            that is given twice is computed twice, and the gradients are added. Traced indices are not checked: out of
            range they give NaN, and no gradients.
        in_features: For partitions of unequal sizes, the size of each, in one sequence or two; the other may be one
            int. x is then flat, (..., in_0 + in_1 + ...), and y too; kernel and bias are packed, of one axis, as
            `jax_impl.packing` says. None for a kernel (n, in, out).
        out_features: The same for the outputs.

    Returns:
        Outputs, shape (..., n, out); (..., out_0 + out_1 + ...) of unequal sizes.

    Raises:
        TypeError: If an operand is no array, has no supported floating dtype, or the dtypes differ.
        ValueError: If shapes or devices do not fit, or a name is unknown.
        UnsupportedImplementationError: If the named implementation, or under "auto" every one, cannot run this call,
            or not in the dot algorithm that is given as its precision.

    Source: the operation is that of an ensemble of `flax.nnx.Linear`, one per partition.
    """
    options = (implementation, precision, preferred_element_type, dot_general)
    if in_features is not None or out_features is not None:
        return _unequal(x, kernel, bias, options, (in_features, out_features), in_axis, partition_axis, partitions)
    # Identity is the cheapest question that no value can fail; another int of the same value is only slower.
    if in_axis is not IN_AXIS or partition_axis is not PARTITION_AXIS or partitions is not None:
        return _rearranged(x, kernel, bias, options, in_axis, partition_axis, partitions)
    return _product(x, kernel, bias, *options)


def _product(
    x: Any,
    kernel: Any,
    bias: Any,
    implementation: str,
    precision: PrecisionLike,
    preferred_element_type: DTypeLike | None,
    dot_general: Callable[..., Any] | None,
    *,
    shared: bool = False,
) -> Array:
    options = (implementation, precision, preferred_element_type)
    one_program = isinstance(implementation, str) and implementation in ("auto", "matmul") and dot_general is None
    y = _as_one_program(x, kernel, bias, *options, shared) if one_program else None
    if y is not None:
        return y
    x, kernel, bias = check_operands(x, kernel, bias, shared=shared)
    check_implementation_name(implementation)
    y = _as_one_program(x, kernel, bias, *options, shared) if one_program else None  # now they are all arrays of JAX
    return _run(x, kernel, bias, *options, dot_general, shared=shared) if y is None else y


def _as_one_program(x: Any, kernel: Any, bias: Any, *options: Any) -> Array | None:
    """Compute a call outside `jit`; return None where an operand is traced, or where something is wrong with the call.

    The caller says what is wrong, as operands have devices there. An outer trace would take deleted arrays silently.
    """
    for array in (x, kernel) if bias is None else (x, kernel, bias):
        if not isinstance(array, Array) or isinstance(array, Tracer) or array.is_deleted():
            return None
    with contextlib.suppress(Exception):
        return _compiled(x, kernel, bias, *options)


# One program for a call that nobody jits: each of its operations, and the checks, would cost as much as all of it. One
# jitted function for all calls, so that it is checked and compiled once for each shape.
@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _compiled(
    x: Array,
    kernel: Array,
    bias: Array | None,
    implementation: str,
    precision: PrecisionLike,
    preferred_element_type: DTypeLike | None,
    shared: bool,
) -> Array:
    x, kernel, bias = check_operands(x, kernel, bias, shared=shared)
    return _run(x, kernel, bias, implementation, precision, preferred_element_type, None, shared=shared)


def _run(
    x: Array,
    kernel: Array,
    bias: Array | None,
    implementation: str,
    precision: PrecisionLike,
    preferred_element_type: DTypeLike | None,
    dot_general: Callable[..., Any] | None,
    *,
    shared: bool,
    packing: Packing | None = None,
) -> Array:
    check_precision(precision)
    check_preferred_element_type(preferred_element_type, kernel.dtype)
    if dot_general is not None:
        check_dot_general(dot_general, implementation, one_size=packing is None)
    unequal = packing is not None
    device = device_type(x, kernel)
    if implementation != "auto":
        name = implementation
    elif packing is None:
        name = "matmul"  # "auto" runs wherever it does
    else:
        rows = math.prod(x.shape[:-1])
        name = auto_of_unequal(packing, rows, kernel.dtype.itemsize, device, shared=shared)
    sizes = kernel.shape[1:] if packing is None else (max(packing.in_features), max(packing.out_features))
    reason = unsupported_reason(
        name,
        dtype=DTYPE_NAMES[kernel.dtype],
        device=device,
        in_features=sizes[0],
        out_features=sizes[1],
        shared=shared,
        unequal=unequal,
    )
    if reason is not None:
        raise UnsupportedImplementationError(reason)
    entry = get_implementation(name, unequal=unequal)
    check_algorithm(precision, entry)
    run = run_auto if implementation == "auto" and not unequal and dot_general is None else entry.run
    run = cast(Callable[..., Array], entry.run_shared) if shared else run
    dtype = kernel.dtype if preferred_element_type is None else np.dtype(preferred_element_type)
    run = partial(run, precision=precision, dtype=dtype, **({"packing": packing} if unequal else {}))
    run = run if dot_general is None else partial(run, dot_general=dot_general)
    try:
        return over_explicit_axes(run, x, kernel, bias, shared=shared)
    except Exception as error:
        explain_failure(error, name, precision, kernel)
        raise


def _unequal(
    x: Any,
    kernel: Any,
    bias: Any,
    options: tuple[Any, ...],
    sizes: tuple[Any, Any],
    in_axis: Any,
    partition_axis: Any,
    partitions: Any,
) -> Array:
    packing = packing_of_call(*sizes)
    check_axes(in_axis, partition_axis)
    check_implementation_name(options[0], unequal=True)
    x, kernel, bias, meant = check_unequal_call(x, kernel, bias, packing, in_axis, partition_axis, partitions)
    return jnp.moveaxis(_run(x, kernel, bias, *options, shared=partition_axis is None, packing=meant), -1, in_axis)


def _rearranged(
    x: Any, kernel: Any, bias: Any, options: tuple[Any, ...], in_axis: Any, partition_axis: Any, partitions: Any
) -> Array:
    """Compute partitions of an input of any layout, which XLA copies where its product needs that."""
    check_axes(in_axis, partition_axis)
    x, kernel = as_operand("x", x), check_kernel(kernel)
    n, i, _ = kernel.shape
    indices = None if partitions is None else _as_indices(partitions, n)
    chosen = n if indices is None else len(indices)
    place, feature_axis = find_axes(x.shape, n, i, chosen=chosen, in_axis=in_axis, partition_axis=partition_axis)
    if indices is not None:
        bias = check_bias(bias, kernel)
        kernel, bias = _taken(kernel, indices, 0), None if bias is None else _taken(bias, indices, 0)
    if place is None:
        return _product(jnp.moveaxis(x, feature_axis, -1), kernel, bias, *options, shared=True)
    flat = place == feature_axis
    if flat:
        x = x.reshape(*x.shape[:place], x.shape[place] // i, i, *x.shape[place + 1 :])
        feature_axis += 1
    x = jnp.moveaxis(x, (place, feature_axis), (-2, -1))
    if indices is not None and x.shape[-2] != chosen:
        x = _taken(x, indices, x.ndim - 2)
    y = jnp.moveaxis(_product(x, kernel, bias, *options), (-2, -1), (place, feature_axis))
    return y.reshape(*y.shape[:place], y.shape[place] * y.shape[place + 1], *y.shape[place + 2 :]) if flat else y


def _as_indices(partitions: Any, num_partitions: int) -> Array:
    if isinstance(partitions, Array | np.ndarray):
        partitions = as_array("partitions", partitions)
        if not jnp.issubdtype(partitions.dtype, jnp.integer) or partitions.ndim != 1 or len(partitions) == 0:
            raise TypeError(
                f"`partitions`: expected integers in one axis, got {name_of(partitions.dtype)} of shape "
                f"{partitions.shape}; pass at least one index, such as jnp.flatnonzero(mask)."
            )
        if isinstance(partitions, Tracer):
            return partitions
        # In a transform the elements of an array of JAX are traced, though they are known.
        partitions = np.asarray(partitions)
    return jnp.asarray(static_indices(partitions, num_partitions), np.int32)


def _taken(array: Array, indices: Array, axis: int) -> Array:
    places = (slice(None),) * axis + (indices,)
    sharding = jax.typeof(array).sharding
    if sharding.mesh.explicit_axes:
        # Whatever device has a partition that was chosen, each one gets it.
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:axis], None, *sharding.spec[axis + 1 :]))
    else:
        sharding = None
    options = {"mode": "fill", "fill_value": np.nan, "wrap_negative_indices": False, "out_sharding": sharding}
    return array.at[places].get(**options)


def over_explicit_axes(
    run: Callable[..., Array], x: Array, kernel: Array, bias: Array | None, *, shared: bool = False
) -> Array:
    """Run an implementation on operands that may be divided over mesh axes of type `Explicit`.

    Over such axes JAX wants to be told how every intermediate value is divided, and refuses most formulations of most
    placements. Here XLA chooses inside, as it does for axes of type `Auto`, and only the result's division is fixed: as
    the operands', leading axes as those of `x`, the partition axis as that of the first operand that divides it, the
    features as those of `kernel` or else of `bias`. No mesh axis divides two of them: the first one keeps it.
    """
    shardings = [jax.typeof(operand).sharding for operand in (x, kernel, bias) if operand is not None]
    meshes = [sharding.mesh for sharding in shardings if not sharding.mesh.empty]
    mesh = meshes[0] if meshes else jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return run(x, kernel, bias)
    by_x, by_kernel = (tuple(sharding.spec) for sharding in shardings[:2])
    by_bias = (None, None) if bias is None else tuple(shardings[2].spec)
    packed = kernel.ndim == 1
    candidates: list[tuple[Any, ...]] = [(names,) for names in (by_x[:-1] if shared or packed else by_x[:-2])]
    if packed:  # whose outputs have one axis of features, which no operand says how to divide
        candidates.append(())
    else:
        candidates += [(None if shared else by_x[-2], by_kernel[0], by_bias[0]), (by_kernel[2], by_bias[1])]
    taken: list[str] = []
    division = []
    for choices in candidates:
        names = next((names for names in choices if names), ())
        free = [name for name in ((names,) if isinstance(names, str) else names) if name not in taken]
        taken += free
        division.append(tuple(free) or None)
    sharding = NamedSharding(mesh, PartitionSpec(*division))
    inside = jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=sharding)
    return cast(Callable[..., Array], inside)(x, kernel, bias)


def device_type(*arrays: Array) -> str:
    """Name the type of the device that a call on these arrays runs on: "cpu", "cuda", or JAX's name of another one.

    A traced array has no device; where all are traced, this is JAX's default device.
    """
    for array in arrays:
        if not isinstance(array, Tracer):
            platform = next(iter(array.devices())).platform
            break
    else:
        default = jax.default_device.value
        platform = jax.default_backend() if default is None else getattr(default, "platform", default)
    return {"gpu": "cuda"}.get(platform, platform)
