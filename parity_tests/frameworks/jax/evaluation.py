"""Single operations of traced JAX programs, evaluated on float64 operands whatever format they were traced in."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from parity_tests.pair.operations import JAX_ARITHMETIC


def aval_of(atom: Any) -> Any:
    """Shape and dtype of a variable of a traced program, which the abstract type does not declare."""
    return atom.aval


def is_inexact(value: Any) -> bool:
    """True for an array of numbers that are rounded, real or complex."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def wide_dtype(dtype: Any) -> np.dtype:
    """float64 or complex128, for a dtype of real or complex numbers."""
    return np.dtype(np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64)


def widened(value: Any) -> jax.Array:
    """The array in float64 or complex128, if it holds real or complex numbers."""
    return jnp.asarray(value, wide_dtype(value.dtype)) if is_inexact(value) else jnp.asarray(value)


def is_elementwise(equation: JaxprEqn) -> bool:
    """Whether all operands have the result's shape, or stretch to it."""
    shape = aval_of(equation.outvars[0]).shape
    return equation.primitive.name in JAX_ARITHMETIC or all(
        aval_of(atom).shape in (shape, ()) for atom in equation.invars
    )


_SCATTERS: dict[str, Callable[..., jax.Array]] = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-mul": lax.scatter_mul,
    "scatter-min": lax.scatter_min,
    "scatter-max": lax.scatter_max,
}


def evaluated(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Runs one operation on wide operands: parameters that name a narrow format name float64 instead."""
    params = dict(equation.params)
    for key in ("preferred_element_type", "new_dtype", "dtype"):
        if params.get(key) is not None and jnp.issubdtype(params[key], jnp.inexact):
            # Of squared moduli a complex program computes real sums.
            given = [value.dtype for value in operands if is_inexact(value)] or [params[key]]
            params[key] = wide_dtype(jnp.result_type(*given))
    if scatter := _SCATTERS.get(equation.primitive.name):
        # Bound directly it would carry the update function that was traced for the narrow format.
        operand, indices, updates = operands
        options = {key: params[key] for key in ("indices_are_sorted", "unique_indices", "mode")}
        return [scatter(operand, indices, updates, params["dimension_numbers"], **options)]
    results = equation.primitive.bind(*operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def squared(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The operands of a sum with squares in the place of its terms: the sum of these is Q, see `calibration`."""
    if equation.primitive.name == "select_and_scatter_add":  # the second operand only says where the terms go
        return [jnp.square(operands[0]), *operands[1:]]
    return [jnp.square(jnp.abs(value)) if is_inexact(value) else value for value in operands]


def transformed_squares(equation: JaxprEqn, operand: Any) -> tuple[jax.Array, float]:
    """Q and K of a Fourier transform, whose terms all have the modulus of its input."""
    kind, lengths = equation.params["fft_type"].name, equation.params["fft_lengths"]
    count = math.prod(lengths)
    axes = tuple(range(operand.ndim - len(lengths), operand.ndim))
    total = jnp.sum(jnp.square(jnp.abs(operand)), axes, keepdims=True)
    # Half of a real signal's spectrum implies the other half; inverse transforms divide by their length.
    scale = (2.0 if "IRFFT" in kind else 1.0) / (count**2 if kind.startswith("I") else 1.0)
    return jnp.broadcast_to(scale * total, aval_of(equation.outvars[0]).shape), count


def contains_program(params: dict[str, Any]) -> bool:
    """A higher-order operation that the interpreter does not know: a kernel, a custom call with its own program."""
    return any(isinstance(value, Jaxpr | ClosedJaxpr) for key, value in params.items() if key != "update_jaxpr")


def evaluated_as_traced(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Runs one operation in the formats it was traced in."""
    narrow = [lax.convert_element_type(v, aval_of(a).dtype) for v, a in zip(operands, equation.invars, strict=True)]
    results = equation.primitive.bind(*narrow, **equation.params)
    return [widened(value) for value in (results if equation.primitive.multiple_results else [results])]


def _reduced(equation: JaxprEqn, operands: Sequence[Any]) -> float:
    return math.prod(operands[0].shape[axis] for axis in equation.params["axes"])


def _contracted(equation: JaxprEqn, operands: Sequence[Any]) -> float:
    (left, _), _ = equation.params["dimension_numbers"]
    return math.prod(operands[0].shape[axis] for axis in left)


def _convolved(equation: JaxprEqn, operands: Sequence[Any]) -> float:
    """All elements of the kernel but its output features: an upper bound at the borders."""
    outputs = equation.params["dimension_numbers"].rhs_spec[0]
    return operands[1].size / operands[1].shape[outputs]


def _scattered(equation: JaxprEqn, operands: Sequence[Any]) -> Any:
    ones = [jnp.ones_like(value) if is_inexact(value) else value for value in operands]
    return evaluated(equation, ones)[0]


SUMS: dict[str, Callable[[JaxprEqn, Sequence[Any]], Any]] = {
    "dot_general": _contracted,
    "conv_general_dilated": _convolved,
    "reduce_sum": _reduced,
    "cumsum": lambda equation, operands: operands[0].shape[equation.params["axis"]],
    "reduce_window_sum": lambda equation, operands: math.prod(equation.params["window_dimensions"]),
    "scatter-add": _scattered,
    "select_and_scatter_add": lambda equation, operands: evaluated(equation, [jnp.ones_like(operands[0]), operands[1]])[
        0
    ],
    "ragged_dot": lambda equation, operands: operands[0].shape[-1],
    "ragged_dot_general": lambda equation, operands: operands[0].shape[-1],
}
