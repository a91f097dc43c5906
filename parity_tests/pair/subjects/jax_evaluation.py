"""Single operations of traced JAX programs, evaluated on float64 operands whatever format they were traced in."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from parity_tests.pair.subjects.operations import JAX_ARITHMETIC


def aval_of(atom: Any) -> Any:
    """Shape and dtype of a variable of a traced program, which the abstract type does not declare."""
    return atom.aval


def is_floating(value: Any) -> bool:
    """Whether an array holds floating-point numbers."""
    return jnp.issubdtype(value.dtype, jnp.floating)


def widened(value: Any) -> jax.Array:
    """The array in float64, if it holds floating-point numbers."""
    return jnp.asarray(value, jnp.float64) if is_floating(value) else jnp.asarray(value)


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
        if params.get(key) is not None and jnp.issubdtype(params[key], jnp.floating):
            params[key] = np.dtype(np.float64)
    if scatter := _SCATTERS.get(equation.primitive.name):
        # Bound directly it would carry the update function that was traced for the narrow format.
        operand, indices, updates = operands
        options = {key: params[key] for key in ("indices_are_sorted", "unique_indices", "mode")}
        return [scatter(operand, indices, updates, params["dimension_numbers"], **options)]
    results = equation.primitive.bind(*operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


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
    ones = [jnp.ones_like(value) if is_floating(value) else value for value in operands]
    return evaluated(equation, ones)[0]


SUMS: dict[str, Callable[[JaxprEqn, Sequence[Any]], Any]] = {
    "dot_general": _contracted,
    "conv_general_dilated": _convolved,
    "reduce_sum": _reduced,
    "cumsum": lambda equation, operands: operands[0].shape[equation.params["axis"]],
    "reduce_window_sum": lambda equation, operands: math.prod(equation.params["window_dimensions"]),
    "scatter-add": _scattered,
    "ragged_dot": lambda equation, operands: operands[0].shape[-1],
    "ragged_dot_general": lambda equation, operands: operands[0].shape[-1],
}
