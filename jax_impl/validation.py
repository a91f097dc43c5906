"""Every check of user input, called once by the public functions.

A message is one sentence: the argument, the expected value in symbols, the received one, and what to do about it.
Wrong Python types and dtypes raise `TypeError`, wrong values, shapes and devices `ValueError`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jax_impl.array_types import kind_of, name_of, said, shown
from jax_impl.implementations import PRECISION_NAMES, names_algorithm
from jax_impl.layouts import layout_advice
from jax_impl.registry import (
    DTYPE_NAMES,
    Implementation,
    UnsupportedImplementationError,
    get_implementation,
    implementation_names,
)

_FLOATS = ", ".join(DTYPE_NAMES.values())
_ALGORITHMS = tuple(jax.lax.DotAlgorithmPreset.__members__)
# Sizes in bytes are 64-bit integers, and an element has at most eight; XLA ends the process where they overflow.
MOST_ELEMENTS = 2**60
_MOST_NAMES = 8  # in a message


def check_sizes(**sizes: Any) -> None:
    """Refuse what is no int (bool included) by a TypeError, and what is not positive or too large by a ValueError."""
    for argument, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            several = argument != "num_partitions" and hasattr(size, "__len__")
            raise TypeError(
                f"`{argument}`: expected a positive int, got {shown(size)} of type {type(size).__name__}; pass an int"
                f"{', or a list of one for each partition' if several else ''}."
            )
        if size <= 0:
            raise ValueError(f"`{argument}`: expected a positive int, got {shown(size)}; pass at least 1.")
    if math.prod(sizes.values()) >= MOST_ELEMENTS:
        largest = max(sizes, key=lambda argument: sizes[argument])
        raise ValueError(
            f"`{largest}`: expected sizes whose weight has fewer than 2**60 elements, got {shown(sizes[largest])}; "
            f"give sizes per partition, never totals."
        )


def check_instance(argument: str, value: Any, kind: type, advice: str) -> None:
    """Refuse a value of another type than `kind`, by a TypeError."""
    if not isinstance(value, kind):
        raise TypeError(f"`{argument}`: expected a {kind.__name__}, got {kind_of(value, kind.__name__)}; {advice}.")


def check_dtype(argument: str, dtype: Any) -> None:
    """Refuse dtypes outside the table by a TypeError, and float64 while x64 is off by a ValueError."""
    try:
        # NumPy reads None as float64.
        resolved = None if dtype is None else np.dtype(dtype)
    except Exception:  # NumPy reads tuples, dicts and objects with a dtype, and raises whatever they raise
        resolved = None
    if resolved not in DTYPE_NAMES:
        raise TypeError(f"`{argument}`: expected one of {_FLOATS}, got {shown(dtype)}; pass a floating dtype.")
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
    if wanted != dtype and wanted.itemsize <= dtype.itemsize:
        raise ValueError(
            f"`preferred_element_type`: expected a dtype at least as wide as the operands' {dtype.name}, got "
            f"{wanted.name}; cast the result instead."
        )


def check_precision(precision: Any) -> None:
    """Refuse unknown names by a ValueError that lists the choices, and what is no precision by a TypeError."""
    pair = isinstance(precision, tuple)
    if pair and (len(precision) != 2 or isinstance(precision[0], str) != isinstance(precision[1], str)):
        raise ValueError(
            f"`precision`: expected a pair of names or of jax.lax.Precision, one for each operand, got "
            f"{shown(precision)}; pass two alike, or one for both."
        )
    kinds = jax.lax.Precision if pair else jax.lax.Precision | jax.lax.DotAlgorithm | jax.lax.DotAlgorithmPreset | None
    for name in precision if pair else (precision,):
        if not isinstance(name, str | kinds):
            raise TypeError(f"`precision`: expected a name or a jax.lax.Precision, got {kind_of(name)}; pass one.")
        if isinstance(name, str) and name not in PRECISION_NAMES and (pair or name not in _ALGORITHMS):
            raise ValueError(
                f"`precision`: expected one of {_quoted(PRECISION_NAMES)} or a name of jax.lax.DotAlgorithmPreset, got "
                f"{shown(name)}; choose one of these."
            )


def check_name(argument: str, name: Any, choices: Iterable[str]) -> None:
    """Refuse what is no string by a TypeError, and an unknown name by a ValueError that lists the choices."""
    choices = tuple(choices)
    check_instance(argument, name, str, f"pass one of {_quoted(choices)}")
    if name not in choices:
        raise ValueError(f"`{argument}`: expected one of {_quoted(choices)}, got {shown(name)}; choose one of these.")


def check_implementation_name(name: Any, *, unequal: bool = False) -> None:
    """Refuse what is neither "auto" nor in the table, as `check_name` does, or only in that of the other sizes."""
    if isinstance(name, str) and name in implementation_names(unequal=not unequal):
        get_implementation(name, unequal=unequal)  # raises where it is only there
    check_name("implementation", name, ("auto", *implementation_names(unequal=unequal)))


def check_callable(argument: str, function: Any, signature: str) -> None:
    """Refuse what cannot be called, by a TypeError."""
    if not callable(function):
        raise TypeError(f"`{argument}`: expected a function {signature}, got {kind_of(function)}; pass a function.")


def check_stream(argument: str, rngs: Any, stream: str) -> None:
    """Refuse, by a ValueError, random streams without the named one and without a default."""
    if not hasattr(rngs, stream):
        raise ValueError(f"`{argument}`: expected a stream {stream!r} or a default, got neither; pass one seed.")


def as_array(argument: str, value: Any) -> Array | np.ndarray:
    """Return an array, or the one that a holder such as `nnx.Param` gives by `__jax_array__`.

    Refuse others, and elements that JAX does not compute with, by a TypeError; deleted arrays by a ValueError.
    """
    array = value
    if not isinstance(value, Array | np.ndarray):
        if isinstance(value, type) or not hasattr(value, "__jax_array__"):
            raise TypeError(f"`{argument}`: expected a jax.Array, got {kind_of(value)}; convert it first.")
        try:
            array = value.__jax_array__()
            given = f"gives {kind_of(array)}"
        except Exception as error:
            array, given = None, f"gives none ({said(error)})"
        if not isinstance(array, Array | np.ndarray):
            raise TypeError(f"`{argument}`: expected a jax.Array, got {kind_of(value)} that {given}; convert it first.")
    if isinstance(array, np.ma.MaskedArray):
        # JAX would drop the mask of one that a holder gives.
        raise TypeError(
            f"`{argument}`: expected an array without a mask, got {kind_of(array)}; fill it with .filled() first."
        )
    if isinstance(array, Array):  # keys of jax.random are no numbers
        computable = array.dtype in DTYPE_NAMES or not jnp.issubdtype(array.dtype, jax.dtypes.extended)
        if not isinstance(array, Tracer) and array.is_deleted():
            raise ValueError(
                f"`{argument}`: expected an array with values, got a deleted one; pass one that was not donated."
            )
    else:
        try:
            computable = jax.dtypes.result_type(array) is not None
        except TypeError:
            computable = False
    if not computable:
        raise _wrong_dtype(argument, array)
    return array


def _wrong_dtype(argument: str, array: Array | np.ndarray) -> TypeError:
    return TypeError(f"`{argument}`: expected a dtype of {_FLOATS}, got {name_of(array.dtype)}; cast it first.")


def are_promoted(dtype: Any, *operands: Any) -> bool:
    """Say whether Flax's `promote_dtype`, which takes longer than many products, returns the operands as they are.

    Not asked of float64, which it rounds while x64 is off, nor of weak types, which it makes strong.
    """
    arrays = [operand for operand in operands if operand is not None]
    if not all(isinstance(array, Array) and not array.weak_type and array.dtype == arrays[0].dtype for array in arrays):
        return False
    own = arrays[0].dtype
    return own in DTYPE_NAMES and own != np.float64 and (dtype is None or jnp.dtype(dtype) == own)


def promoted(promote: Callable[[], Any], x: Array | np.ndarray, **parameters: Any) -> tuple[Any, Any, Any]:
    """Return what `promote` makes of `x` and `parameters`; say by a TypeError or a ValueError why it fails."""
    try:
        x_promoted, kernel, bias = promote()
    except Exception as error:
        for name, value in parameters.items():
            if value is not None:
                dtype = as_array(name, value).dtype
                try:
                    jnp.promote_types(x.dtype, dtype)
                except Exception:
                    raise TypeError(
                        f"`x`: expected a dtype that JAX promotes with that of `{name}`, {name_of(dtype)}, got "
                        f"{name_of(x.dtype)}; cast it first."
                    ) from error
        raise ValueError(
            f"`promote_dtype`: expected a function that returns x, kernel and bias in one dtype, got an error "
            f"({said(error)}); pass another function."
        ) from error
    return x_promoted, kernel, bias


def check_operands(x: Any, kernel: Any, bias: Any, *, shared: bool = False) -> tuple[Array, Array, Array | None]:
    """Return operands as JAX arrays; refuse wrong types and dtypes by a TypeError, what does not fit by a ValueError.

    No axis is broadcast: a partition axis of size 1 does not stand for n partitions. No dtype is promoted. An x that
    all partitions share has no partition axis.
    """
    x, kernel = as_operand("x", x), check_kernel(kernel)
    num_partitions, in_features, out_features = kernel.shape
    if not shared and (x.ndim < 2 or x.shape[-2:] != (num_partitions, in_features)):
        raise ValueError(
            f"`x`: expected shape (..., n, in) = (..., {num_partitions}, {in_features}), got {x.shape}; "
            f"{layout_advice(x.shape, num_partitions, in_features, out_features)}."
        )
    check_beside_kernel("x", x, kernel)
    return x, kernel, check_bias(bias, kernel)


def check_kernel(kernel: Any) -> Array:
    """Return a kernel as a JAX array; refuse it as `check_operands` does."""
    kernel = as_operand("kernel", kernel)
    if kernel.ndim != 3 or 0 in kernel.shape:
        raise ValueError(
            f"`kernel`: expected shape (n, in, out) with positive sizes, got {kernel.shape}; pass one matrix per "
            f"partition."
        )
    return kernel


def check_bias(bias: Any, kernel: Array) -> Array | None:
    """Return a bias as a JAX array; refuse it as `check_operands` does."""
    num_partitions, _, out_features = kernel.shape
    if bias is None:
        return None
    bias = as_operand("bias", bias)
    if bias.shape != (num_partitions, out_features):
        raise ValueError(
            f"`bias`: expected shape (n, out) = ({num_partitions}, {out_features}), got {bias.shape}; pass one "
            f"vector per partition."
        )
    check_beside_kernel("bias", bias, kernel)
    return bias


def as_operand(argument: str, value: Any) -> Array:
    """Return an operand as a JAX array; refuse wrong types and dtypes by a TypeError."""
    array = as_array(argument, value)
    if array.dtype not in DTYPE_NAMES:
        raise _wrong_dtype(argument, array)
    if array.dtype == np.float64:
        # Without x64 JAX would round float64 input to float32 and say nothing.
        check_dtype(argument, array.dtype)
    return array if isinstance(array, Array) else jnp.asarray(array)


def check_beside_kernel(argument: str, array: Array, kernel: Array) -> None:
    """Refuse an operand on other devices than the kernel's, by a ValueError, or of another dtype, by a TypeError."""
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


def check_dot_general(dot_general: Any, implementation: str, *, one_size: bool) -> None:
    """Refuse what cannot be called by a TypeError, and by another error calls that have no single batched product."""
    check_callable("dot_general", dot_general, "(lhs, rhs, dimension_numbers, precision=, preferred_element_type=)")
    if implementation not in ("auto", "matmul") or not one_size:
        wanted = "partitions of one size" if not one_size else "implementation='matmul', or 'auto'"
        got = "sequences of sizes" if not one_size else shown(implementation)
        raise UnsupportedImplementationError(
            f"`dot_general`: expected {wanted}, whose one batched product it computes, got {got}; leave it out."
        )


def check_algorithm(precision: Any, implementation: Implementation) -> None:
    """Refuse, by an UnsupportedImplementationError, a dot algorithm that an implementation would not compute in."""
    if precision is not None and names_algorithm(precision) and not implementation.dot_algorithms:
        raise UnsupportedImplementationError(
            f"`precision`: expected a name or a jax.lax.Precision for {implementation.name!r}, got the algorithm "
            f"{shown(precision)}, which it would not compute in; choose another one of the two."
        )


def explain_failure(error: Exception, implementation: str, precision: Any, kernel: Array) -> None:
    """Raise, in this package's words, why an implementation failed on operands that fit; return if `error` says it."""
    if isinstance(error, UnsupportedImplementationError):
        return
    if names_algorithm(precision):
        raise UnsupportedImplementationError(
            f"`precision`: expected one that {implementation!r} runs here on {kernel.dtype.name}, got "
            f"{shown(precision)} ({said(error)}); choose another one."
        ) from error
    if isinstance(error, NotImplementedError):
        raise UnsupportedImplementationError(
            f"`implementation`: expected one that supports this call, got {implementation!r} ({said(error)}); choose "
            f"another one."
        ) from error


def check_parameters(parameters: Mapping[str, Any], argument: str = "layer") -> None:
    """Refuse parameters, by canonical name, of a wrong kind or dtype (TypeError), or shape or without values here."""
    for name, value in parameters.items():
        concrete = isinstance(value, np.ndarray) or (isinstance(value, Array) and not isinstance(value, Tracer))
        if not concrete or not getattr(value, "is_fully_addressable", True):
            raise ValueError(
                f"`{argument}`: expected values in `{name}`, got {kind_of(value)}; use a layer that holds its values."
            )
        array = as_array(f"{argument}.{name}", value)
        if array.dtype not in DTYPE_NAMES:
            raise _wrong_dtype(f"{argument}.{name}", array)
    weight, bias = parameters["weight"], parameters.get("bias")
    packed = weight.ndim == 1  # of unequal sizes, which it does not say
    if (weight.ndim != 3 and not packed) or 0 in weight.shape:
        raise ValueError(
            f"`{argument}.weight`: expected shape (n, in, out) with positive sizes, got {weight.shape}; use the "
            f"parameters of this layer."
        )
    if bias is not None and (bias.ndim != 1 if packed else bias.shape != weight.shape[::2]):
        wanted = "packed shape (out_0 + out_1 + ...,)" if packed else f"shape (n, out) = {weight.shape[::2]}"
        raise ValueError(f"`{argument}.bias`: expected {wanted}, got {bias.shape}; use the parameters of this layer.")


def check_arrays(arrays: Any, expected: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, np.ndarray]:
    """Refuse canonical arrays unless they are those of name -> (shape, dtype), by a TypeError or a ValueError.

    Returns:
        The arrays, each read once: what a mapping reads from a file might be another array the next time.
    """
    if not isinstance(arrays, Mapping):
        raise TypeError(f"`arrays`: expected a mapping of names to NumPy arrays, got {kind_of(arrays)}; pass a dict.")
    if set(arrays) != set(expected):
        raise ValueError(
            f"`arrays`: expected exactly the names {_names(expected)}, got {_names(arrays)}; the layer is unchanged."
        )
    found = {}
    for name, (shape, dtype) in expected.items():
        argument = f"arrays[{name!r}]"
        try:
            array = found[name] = arrays[name]
        except Exception as error:
            raise ValueError(
                f"`{argument}`: expected a NumPy array, got an error from the mapping ({said(error)}); the layer is "
                f"unchanged."
            ) from error
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            # A copy of the numbers would drop the mask.
            masked = isinstance(array, np.ndarray)
            wanted, advice = ("a NumPy array without a mask", "fill") if masked else ("a NumPy array", "convert")
            raise TypeError(
                f"`{argument}`: expected {wanted}, got {kind_of(array)}; the layer is unchanged, {advice} it first."
            )
        if array.shape != shape:
            symbols = ("(packed,)", "(n, out)", "(n, in, out)")[len(shape) - 1]
            raise ValueError(
                f"`{argument}`: expected shape {symbols} = {shape}, got {array.shape}; the layer is unchanged."
            )
        if array.dtype != dtype:
            raise TypeError(
                f"`{argument}`: expected dtype {dtype.name}, got {name_of(array.dtype)}; the layer is unchanged, cast "
                f"one of the two."
            )
    return found


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _names(mapping: Mapping[Any, Any]) -> str:
    names = sorted(map(shown, mapping))
    return ", ".join([*names[:_MOST_NAMES], *(["..."] if len(names) > _MOST_NAMES else [])])
