"""Every check of user input, called once by the public functions.

A message is one sentence: the argument, the expected value in symbols, the received one, and what to do about it.
Wrong Python types and dtypes raise `TypeError`, wrong values, shapes and devices `ValueError`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jax_impl.array_types import kind_of
from jax_impl.registry import DTYPE_NAMES, IMPLEMENTATIONS

_FLOATS = ", ".join(DTYPE_NAMES.values())
# The names that jax.lax.Precision answers to, its aliases included.
_PRECISIONS = ("default", "fastest", "bfloat16", "high", "bfloat16_3x", "tensorfloat32", "highest", "float32")
_ALGORITHMS = tuple(jax.lax.DotAlgorithmPreset.__members__)


def check_sizes(**sizes: Any) -> None:
    """Refuse what is no int (bool included) by a TypeError, and zero or negative sizes by a ValueError."""
    for argument, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(
                f"`{argument}`: expected a positive int, got {size!r} of type {kind_of(size)}; pass an int."
            )
        if size <= 0:
            raise ValueError(f"`{argument}`: expected a positive int, got {size}; pass at least 1.")


def check_instance(argument: str, value: Any, kind: type, advice: str) -> None:
    """Refuse a value of another type than `kind`, by a TypeError."""
    if not isinstance(value, kind):
        raise TypeError(f"`{argument}`: expected a {kind.__name__}, got a {kind_of(value, kind.__name__)}; {advice}.")


def check_dtype(argument: str, dtype: Any) -> None:
    """Refuse dtypes outside the table by a TypeError, and float64 while x64 is off by a ValueError."""
    try:
        # NumPy reads None as float64.
        resolved = None if dtype is None else np.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved not in DTYPE_NAMES:
        raise TypeError(f"`{argument}`: expected one of {_FLOATS}, got {dtype!r}; pass a floating dtype.")
    if jax.dtypes.canonicalize_dtype(resolved) != resolved:
        raise ValueError(
            f"`{argument}`: expected a dtype that JAX has enabled, got float64 while x64 is off; use jax.enable_x64."
        )


def check_dtypes(dtype: Any, param_dtype: Any, preferred_element_type: Any) -> None:
    """Refuse a layer's dtypes, of which all but `param_dtype` may be None; raises as `check_dtype` does."""
    check_dtype("param_dtype", param_dtype)
    for argument, value in (("dtype", dtype), ("preferred_element_type", preferred_element_type)):
        if value is not None:
            check_dtype(argument, value)


def check_preferred_element_type(preferred_element_type: Any, dtype: np.dtype) -> None:
    """Refuse, by a ValueError, a result narrower than the operands; raises as `check_dtype` does otherwise."""
    if preferred_element_type is None:
        return
    check_dtype("preferred_element_type", preferred_element_type)
    wanted = np.dtype(preferred_element_type)
    if jnp.promote_types(wanted, dtype) != wanted:
        raise ValueError(
            f"`preferred_element_type`: expected a dtype at least as wide as the operands' {dtype.name}, got "
            f"{wanted.name}; cast the result instead."
        )


def check_precision(precision: Any) -> None:
    """Refuse unknown names by a ValueError that lists the choices, and what is no precision by a TypeError."""
    kinds = str | jax.lax.Precision | jax.lax.DotAlgorithm | jax.lax.DotAlgorithmPreset | None
    for name in precision if isinstance(precision, tuple) else (precision,):
        if not isinstance(name, kinds):
            raise TypeError(f"`precision`: expected a name or a jax.lax.Precision, got a {kind_of(name)}; pass one.")
        if isinstance(name, str) and name.lower() not in _PRECISIONS and name not in _ALGORITHMS:
            raise ValueError(
                f"`precision`: expected one of {_quoted(_PRECISIONS)} or a name of jax.lax.DotAlgorithmPreset, got "
                f"{name!r}; choose one of these."
            )


def check_name(argument: str, name: Any, choices: Iterable[str]) -> None:
    """Refuse what is no string by a TypeError, and an unknown name by a ValueError that lists the choices."""
    choices = tuple(choices)
    check_instance(argument, name, str, f"pass one of {_quoted(choices)}")
    if name not in choices:
        raise ValueError(f"`{argument}`: expected one of {_quoted(choices)}, got {name!r}; choose one of these.")


def check_implementation_name(name: Any) -> None:
    """Refuse what is neither "auto" nor in the table; raises as `check_name` does."""
    check_name("implementation", name, ("auto", *IMPLEMENTATIONS))


def check_callable(argument: str, function: Any, signature: str) -> None:
    """Refuse what cannot be called, by a TypeError."""
    if not callable(function):
        raise TypeError(f"`{argument}`: expected a function {signature}, got a {kind_of(function)}; pass a function.")


def check_stream(argument: str, rngs: Any, stream: str) -> None:
    """Refuse, by a ValueError, random streams without the named one and without a default."""
    if not hasattr(rngs, stream):
        raise ValueError(f"`{argument}`: expected a stream {stream!r} or a default, got neither; pass one seed.")


def check_is_array(argument: str, value: Any) -> None:
    """Refuse, by a TypeError, all but JAX and NumPy arrays and holders of one, such as `nnx.Param`."""
    if not (isinstance(value, Array | np.ndarray) or hasattr(value, "__jax_array__")):
        raise TypeError(f"`{argument}`: expected a jax.Array, got a {kind_of(value)}; convert it first.")


def check_partition_axes(x: Any) -> None:
    """Refuse an input from which a layer cannot infer n and in, by a TypeError or a ValueError."""
    check_is_array("x", x)
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(
            f"`x`: expected shape (..., n, in) with positive n and in, got {x.shape}; split the features first."
        )


def check_operands(x: Any, kernel: Any, bias: Any) -> tuple[Array, Array, Array | None]:
    """Refuse operands of y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] that do not fit together.

    No axis is broadcast: a partition axis of size 1 does not stand for n partitions. No dtype is promoted.

    Returns:
        The operands as JAX arrays.

    Raises:
        TypeError: If one is no array, has no supported floating dtype, or the dtypes differ.
        ValueError: If ranks, shapes or devices do not fit, or one is float64 while x64 is off.
    """
    x, kernel = _as_array("x", x), _as_array("kernel", kernel)
    if kernel.ndim != 3 or 0 in kernel.shape:
        raise ValueError(
            f"`kernel`: expected shape (n, in, out) with positive sizes, got {kernel.shape}; pass one matrix per "
            f"partition."
        )
    num_partitions, in_features, out_features = kernel.shape
    if x.ndim < 2 or x.shape[-2:] != (num_partitions, in_features):
        raise ValueError(
            f"`x`: expected shape (..., n, in) = (..., {num_partitions}, {in_features}), got {x.shape}; "
            f"{_advice(x, num_partitions, in_features)}."
        )
    _check_beside_kernel("x", x, kernel)
    if bias is None:
        return x, kernel, None
    bias = _as_array("bias", bias)
    if bias.shape != (num_partitions, out_features):
        raise ValueError(
            f"`bias`: expected shape (n, out) = ({num_partitions}, {out_features}), got {bias.shape}; pass one "
            f"vector per partition."
        )
    _check_beside_kernel("bias", bias, kernel)
    return x, kernel, bias


def _as_array(argument: str, value: Any) -> Array:
    check_is_array(argument, value)
    array = value if isinstance(value, Array) else jnp.asarray(value)
    received = np.dtype(value.dtype)
    if received not in DTYPE_NAMES:
        raise TypeError(f"`{argument}`: expected a dtype of {_FLOATS}, got {received.name}; cast it first.")
    # Without x64 JAX would round float64 NumPy input to float32 and say nothing.
    check_dtype(argument, received)
    return array


def _check_beside_kernel(argument: str, array: Array, kernel: Array) -> None:
    where, kernel_where = _committed_devices(array), _committed_devices(kernel)
    if where and kernel_where and where != kernel_where:
        raise ValueError(
            f"`{argument}`: expected the devices of `kernel`, {', '.join(kernel_where)}, got {', '.join(where)}; move "
            f"one of them."
        )
    if array.dtype != kernel.dtype:
        raise TypeError(
            f"`{argument}`: expected the dtype of `kernel`, {kernel.dtype.name}, got {array.dtype.name}; cast one of "
            f"them."
        )


def _committed_devices(array: Array) -> list[str]:
    # JAX moves uncommitted arrays by itself, and traced ones have no place yet; it has no public name for "committed".
    if isinstance(array, Tracer) or not getattr(array, "_committed", False):
        return []
    return sorted(map(str, array.devices()))


def check_materialised(parameters: Mapping[str, Any]) -> None:
    """Refuse, by a ValueError, parameters without values here: abstract, traced, or partly on other hosts."""
    for name, value in parameters.items():
        concrete = isinstance(value, np.ndarray) or (isinstance(value, Array) and not isinstance(value, Tracer))
        if not concrete or not getattr(value, "is_fully_addressable", True):
            raise ValueError(
                f"`layer`: expected values in `{name}`, got a {kind_of(value)}; use a layer that holds its values."
            )


def check_arrays(arrays: Any, expected: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Refuse canonical arrays unless they are those of name -> (shape, dtype), by a TypeError or a ValueError."""
    if not isinstance(arrays, Mapping):
        raise TypeError(f"`arrays`: expected a mapping of names to NumPy arrays, got a {kind_of(arrays)}; pass a dict.")
    if set(arrays) != set(expected):
        raise ValueError(
            f"`arrays`: expected exactly the names {_quoted(sorted(expected))}, got "
            f"{_quoted(sorted(arrays, key=str))}; the layer is unchanged."
        )
    for name, (shape, dtype) in expected.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray):
            raise TypeError(
                f"`arrays[{name!r}]`: expected a NumPy array, got a {kind_of(array)}; the layer is unchanged."
            )
        if array.shape != shape:
            symbols = "(n, in, out)" if name == "weight" else "(n, out)"
            raise ValueError(
                f"`arrays[{name!r}]`: expected shape {symbols} = {shape}, got {array.shape}; the layer is unchanged."
            )
        if array.dtype != dtype:
            raise TypeError(
                f"`arrays[{name!r}]`: expected dtype {dtype.name}, got {array.dtype.name}; the layer is unchanged."
            )


def _advice(x: Array, num_partitions: int, in_features: int) -> str:
    if x.ndim >= 1 and x.shape[-1] == num_partitions * in_features:
        return f"split its last axis with x.reshape(*x.shape[:-1], {num_partitions}, {in_features})"
    if x.ndim >= 2 and x.shape[-2] == 1:
        return f"a shared input is not broadcast, use jnp.broadcast_to(x, (..., {num_partitions}, {in_features}))"
    if x.ndim >= 2 and x.shape[-1] == num_partitions and x.shape[-2] == in_features:
        return "swap its last two axes with x.mT"
    if x.ndim >= 2 and x.shape[-2] == num_partitions:
        return "give sizes per partition, never totals: its last axis holds the features of one partition"
    return "move the partition axis next to last and the features last"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
