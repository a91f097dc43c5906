"""An interpreter of traced JAX programs in float64 that lets every operation err as it may in the format it was traced.

Noise model: see ``pair.calibration``. The traced program says in which format each operation works (a norm's statistics
in float32, a bias gradient summed in bfloat16); no operation is granted a coarser one than the pair is judged in, so
that a module that computes in bfloat16 behind a float32 interface is not excused.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from parity_tests.harness.dtypes import FORMATS
from parity_tests.pair.subjects.jax_accuracy import function_error
from parity_tests.pair.subjects.operations import JAX_ARITHMETIC, JAX_EXACT, JAX_INLINED

_POOL_BITS = 16


@functools.cache
def _pool() -> np.ndarray:
    pool = np.random.default_rng(0xD1CE).standard_normal(1 << _POOL_BITS)
    return (pool - pool.mean()) / pool.std()


def _aval(atom: Any) -> Any:
    """Shape and dtype of a variable of a traced program, which the abstract type does not declare."""
    return atom.aval


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _wide(value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.float64) if _is_float(value) else jnp.asarray(value)


class Interpreter:
    """Evaluates a traced program; to be used inside ``jit`` with 64-bit types enabled.

    Args:
        dtype: no operation errs more coarsely than this format.
        member: traced int64, the number of the ensemble's run.
        amplitude: traced float64, of the noise; None leaves all noise out (the truth).
    """

    def __init__(self, dtype: str = "float64", member: Any = 0, amplitude: Any = None) -> None:
        self._limit, self._member, self._amplitude = FORMATS[dtype].roundoff, member, amplitude
        self._operation = 0
        self.unmodelled: set[str] = set()

    def run(self, closed: ClosedJaxpr, arguments: Sequence[Any]) -> list[jax.Array]:
        """Evaluates; floating-point arguments and results are float64."""
        return self._jaxpr(closed.jaxpr, [_wide(const) for const in closed.consts], [_wide(a) for a in arguments])

    def _jaxpr(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        values: dict[Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
        for equation in jaxpr.eqns:
            operands = [self._literal(a) if isinstance(a, Literal) else values[a] for a in equation.invars]
            values.update(zip(equation.outvars, self._equation(equation, operands), strict=True))
        return [self._literal(v) if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]

    def _literal(self, literal: Literal) -> jax.Array:
        value = _wide(literal.val if hasattr(literal.val, "dtype") else np.asarray(literal.val, _aval(literal).dtype))
        if self._amplitude is None or not _is_float(value) or value.ndim:
            return value
        # A constant such as 0.1 was rounded to the format when the program was traced; 0.5 was not.
        exact = float(literal.val)
        if not math.isfinite(exact) or (math.frexp(exact)[0] * 16).is_integer():
            return value
        return self._round(value, str(_aval(literal).dtype))

    def _equation(self, equation: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        name, params = equation.primitive.name, equation.params
        if name in JAX_INLINED:
            inner = next(params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
            if isinstance(inner, ClosedJaxpr):
                return self._jaxpr(inner.jaxpr, [_wide(const) for const in inner.consts], operands)
            return self._jaxpr(inner, [], operands)
        if name in _CONTROL:
            return _CONTROL[name](self, params, operands)
        if name == "convert_element_type":
            return [self._convert(params["new_dtype"], operands[0])]
        if name == "reduce_precision":
            return operands
        if name == "bitcast_convert_type" or _contains_program(params):
            if self._amplitude is not None and name != "bitcast_convert_type":
                self.unmodelled.add(name)
            return _as_traced(equation, operands)
        results = _evaluate(equation, operands)
        if self._amplitude is None or name in JAX_EXACT:
            return results
        if name in _SUMS:
            squares = _evaluate(equation, [jnp.square(v) if _is_float(v) else v for v in operands])
            terms = _SUMS[name](equation, operands)
            u_acc = self._accumulator(name, equation)
            return [
                self._noisy(value, self._sum_deviation(value, square, terms, u_acc, str(_aval(var).dtype)))
                for value, square, var in zip(results, squares, equation.outvars, strict=True)
            ]
        if not _elementwise(equation) and any(_is_float(value) for value in results):
            self.unmodelled.add(name)
        factor = function_error(equation)
        return [
            self._round(value, str(_aval(var).dtype), factor) if _is_float(value) else value
            for value, var in zip(results, equation.outvars, strict=True)
        ]

    def _convert(self, dtype: Any, value: jax.Array) -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.floating):
            return lax.convert_element_type(value, dtype)
        wide = lax.convert_element_type(value, jnp.float64)
        # From a wider format this rounds; from a narrower one, or from small integers, granting a rounding is harmless.
        return wide if self._amplitude is None or not _is_float(value) else self._round(wide, str(np.dtype(dtype)))

    def _accumulator(self, name: str, equation: JaxprEqn) -> float:
        """Products of 16-bit operands are accumulated in float32; other sums in the format they are written in."""
        fmt = FORMATS[str(_aval(equation.invars[0]).dtype)].roundoff
        products = name in ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")
        return min(fmt, self._limit, FORMATS["float32"].roundoff if products else 1.0)

    def _sum_deviation(self, value: Any, square: Any, terms: Any, u_acc: float, dtype: str) -> jax.Array:
        summation = u_acc**2 * (terms * value**2 / 3 + terms * square / 6 + square)
        u = min(FORMATS[dtype].roundoff, self._limit)
        return jnp.sqrt(jnp.maximum(summation + (u * value) ** 2, 0.0)) + FORMATS[dtype].smallest_normal * (square != 0)

    def _round(self, value: jax.Array, dtype: str, factor: float = 1.0) -> jax.Array:
        u = factor * min(FORMATS[dtype].roundoff, self._limit)
        return self._noisy(value, u * jnp.abs(value) + FORMATS[dtype].smallest_normal * (value != 0))

    def _noisy(self, value: jax.Array, deviation: jax.Array) -> jax.Array:
        # Multiplicative hashing, as on the torch side: xi depends on the value, the operation and the member.
        self._operation += 1
        odd = (self._operation * 0x9E3779B97F4A7C15 | 1) & ((1 << 64) - 1)
        key = (2 * jnp.asarray(self._member, jnp.uint64) + 1) * np.uint64(odd)
        bits = lax.bitcast_convert_type(jnp.abs(value), jnp.uint64) * key
        index = lax.shift_right_logical(bits, np.uint64(64 - _POOL_BITS)).astype(jnp.int32)
        return value + self._amplitude * deviation * jnp.asarray(_pool())[index]


def _elementwise(equation: JaxprEqn) -> bool:
    shape = _aval(equation.outvars[0]).shape
    return equation.primitive.name in JAX_ARITHMETIC or all(
        _aval(atom).shape in (shape, ()) for atom in equation.invars
    )


def _evaluate(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Runs one operation on wide operands: parameters that name a narrow format name float64 instead."""
    params = dict(equation.params)
    for key in ("preferred_element_type", "new_dtype", "dtype"):
        if params.get(key) is not None and jnp.issubdtype(params[key], jnp.floating):
            params[key] = np.dtype(np.float64)
    if equation.primitive.name in ("scatter-add", "scatter_add"):
        # Bound directly it would carry the update function that was traced for the narrow format.
        operand, indices, updates = operands
        options = {key: params[key] for key in ("indices_are_sorted", "unique_indices", "mode")}
        return [lax.scatter_add(operand, indices, updates, params["dimension_numbers"], **options)]
    results = equation.primitive.bind(*operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _contains_program(params: dict[str, Any]) -> bool:
    """A higher-order operation that the interpreter does not know: a kernel, a custom call with its own program."""
    return any(isinstance(value, Jaxpr | ClosedJaxpr) for key, value in params.items() if key != "update_jaxpr")


def _as_traced(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Runs one operation in the formats it was traced in."""
    narrow = [lax.convert_element_type(v, _aval(a).dtype) for v, a in zip(operands, equation.invars, strict=True)]
    results = equation.primitive.bind(*narrow, **equation.params)
    return [_wide(value) for value in (results if equation.primitive.multiple_results else [results])]


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
    ones = [jnp.ones_like(value) if _is_float(value) else value for value in operands]
    return _evaluate(equation, ones)[0]


_SUMS: dict[str, Callable[[JaxprEqn, Sequence[Any]], Any]] = {
    "dot_general": _contracted,
    "conv_general_dilated": _convolved,
    "reduce_sum": _reduced,
    "cumsum": lambda equation, operands: operands[0].shape[equation.params["axis"]],
    "reduce_window_sum": lambda equation, operands: math.prod(equation.params["window_dimensions"]),
    "scatter-add": _scattered,
    "ragged_dot": lambda equation, operands: operands[0].shape[-1],
    "ragged_dot_general": lambda equation, operands: operands[0].shape[-1],
}


def _scan(self: Interpreter, params: dict[str, Any], operands: list[Any]) -> list[Any]:
    consts, carries = params["num_consts"], params["num_carry"]
    closed = params["jaxpr"]
    fixed = operands[:consts]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        results = self.run(closed, [*fixed, *carry, *x])
        return results[:carries], results[carries:]

    start = operands[consts : consts + carries]
    carry, ys = lax.scan(body, start, operands[consts + carries :], length=params["length"], reverse=params["reverse"])
    return [*carry, *ys]


def _while(self: Interpreter, params: dict[str, Any], operands: list[Any]) -> list[Any]:
    conditions, bodies = params["cond_nconsts"], params["body_nconsts"]
    fixed_condition, fixed_body = operands[:conditions], operands[conditions : conditions + bodies]
    return lax.while_loop(
        lambda carry: self.run(params["cond_jaxpr"], [*fixed_condition, *carry])[0],
        lambda carry: self.run(params["body_jaxpr"], [*fixed_body, *carry]),
        operands[conditions + bodies :],
    )


def _cond(self: Interpreter, params: dict[str, Any], operands: list[Any]) -> list[Any]:
    branches = [lambda *values, closed=closed: self.run(closed, values) for closed in params["branches"]]
    return lax.switch(operands[0], branches, *operands[1:])


_CONTROL: dict[str, Callable[[Interpreter, dict[str, Any], list[Any]], list[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
