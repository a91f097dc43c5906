"""The operation as a function: validate, select, run."""

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_impl.array_types import Bias, Inputs, Outputs, Weight
from jax_impl.registry import DTYPE_NAMES, UnsupportedImplementationError, get_implementation, unsupported_reason
from jax_impl.selection import run_auto
from jax_impl.validation import (
    check_algorithm,
    check_implementation_name,
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

    Returns:
        Outputs, shape (..., n, out).

    Raises:
        TypeError: If an operand is no array, has no supported floating dtype, or the dtypes differ.
        ValueError: If shapes or devices do not fit, or a name is unknown.
        UnsupportedImplementationError: If the named implementation, or under "auto" every one, cannot run this call,
            or not in the dot algorithm that is given as its precision.

    Source: the operation is that of an ensemble of `flax.nnx.Linear`, one per partition.
    """
    x, kernel, bias = check_operands(x, kernel, bias)
    check_implementation_name(implementation)
    check_precision(precision)
    check_preferred_element_type(preferred_element_type, kernel.dtype)
    # "auto" runs wherever `matmul` does.
    name = "matmul" if implementation == "auto" else implementation
    reason = unsupported_reason(name, dtype=DTYPE_NAMES[kernel.dtype], device=device_type(x, kernel))
    if reason is not None:
        raise UnsupportedImplementationError(reason)
    check_algorithm(precision, name)
    run = run_auto if implementation == "auto" else get_implementation(name).run
    dtype = kernel.dtype if preferred_element_type is None else np.dtype(preferred_element_type)
    run = partial(run, precision=precision, dtype=dtype)
    try:
        return over_explicit_axes(run, x, kernel, bias)
    except Exception as error:
        explain_failure(error, name, precision, kernel)
        raise


def over_explicit_axes(run: Callable[..., Array], x: Array, kernel: Array, bias: Array | None) -> Array:
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
    candidates = [(names,) for names in by_x[:-2]]
    candidates += [(by_x[-2], by_kernel[0], by_bias[0]), (by_kernel[2], by_bias[1])]
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
