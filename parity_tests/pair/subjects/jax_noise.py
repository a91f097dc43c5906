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
from parity_tests.pair.subjects.jax_evaluation import (
    SUMS,
    aval_of,
    contains_program,
    evaluated,
    evaluated_as_traced,
    is_elementwise,
    is_floating,
    widened,
)
from parity_tests.pair.subjects.operations import JAX_EXACT, JAX_INLINED

_POOL_BITS = 16


@functools.cache
def normal_pool() -> np.ndarray:
    """The standard normal numbers that all noise is looked up in."""
    pool = np.random.default_rng(0xD1CE).standard_normal(1 << _POOL_BITS)
    return (pool - pool.mean()) / pool.std()


class Interpreter:
    """Evaluates a traced program; to be used inside ``jit`` with 64-bit types enabled.

    Args:
        dtype: no operation errs more coarsely than this format.
        member: traced int64, the number of the ensemble's run.
        amplitude: traced float64, of the noise; None leaves all noise out (the truth).
        pool: traced, ``normal_pool``: as a constant every operation would carry its own copy.
    """

    def __init__(self, dtype: str = "float64", member: Any = 0, amplitude: Any = None, pool: Any = None) -> None:
        self._limit, self._member, self._amplitude, self._pool = FORMATS[dtype].roundoff, member, amplitude, pool
        self._operation = 0
        self.notes: set[str] = set()

    def run(self, closed: ClosedJaxpr, arguments: Sequence[Any]) -> list[jax.Array]:
        """Evaluates; floating-point arguments and results are float64."""
        typed = [_as_integer(argument, atom) for argument, atom in zip(arguments, closed.jaxpr.invars, strict=True)]
        return self._jaxpr(closed.jaxpr, [widened(const) for const in closed.consts], typed)

    def _jaxpr(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        values: dict[Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
        for equation in jaxpr.eqns:
            operands = [self._literal(a) if isinstance(a, Literal) else values[a] for a in equation.invars]
            values.update(zip(equation.outvars, self._equation(equation, operands), strict=True))
        return [self._literal(v) if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]

    def _literal(self, literal: Literal) -> jax.Array:
        value = widened(
            literal.val if hasattr(literal.val, "dtype") else np.asarray(literal.val, aval_of(literal).dtype)
        )
        if self._amplitude is None or not is_floating(value) or value.ndim:
            return value
        # A constant such as 0.1 was rounded to the format when the program was traced; 0.5 was not.
        exact = float(literal.val)
        if not math.isfinite(exact) or (math.frexp(exact)[0] * 16).is_integer():
            return value
        return self._round(value, str(aval_of(literal).dtype))

    def _equation(self, equation: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        name, params = equation.primitive.name, equation.params
        if name in JAX_INLINED:
            inner = next(params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
            if isinstance(inner, ClosedJaxpr):
                return self._jaxpr(inner.jaxpr, [widened(const) for const in inner.consts], operands)
            return self._jaxpr(inner, [], operands)
        if name in _CONTROL:
            return _CONTROL[name](self, params, operands)
        if name == "convert_element_type":
            return [self._convert(params["new_dtype"], operands[0])]
        if name == "reduce_precision":
            return operands
        if name == "bitcast_convert_type" or contains_program(params):
            if self._amplitude is not None and name != "bitcast_convert_type":
                self.notes.add(f"jax {name} has no rounding model of its own")
            return evaluated_as_traced(equation, operands)
        results = evaluated(equation, operands)
        if self._amplitude is None or name in JAX_EXACT:
            return results
        if name in SUMS:
            squares = evaluated(equation, [jnp.square(v) if is_floating(v) else v for v in operands])
            terms = SUMS[name](equation, operands)
            u_acc = self._accumulator(name, equation)
            return [
                self._summed(value, square, terms, u_acc, str(aval_of(var).dtype))
                for value, square, var in zip(results, squares, equation.outvars, strict=True)
            ]
        if not is_elementwise(equation) and any(is_floating(value) for value in results):
            self.notes.add(f"jax {name} has no rounding model of its own")
        factor = function_error(equation)
        return [
            self._round(value, str(aval_of(var).dtype), factor) if is_floating(value) else value
            for value, var in zip(results, equation.outvars, strict=True)
        ]

    def _convert(self, dtype: Any, value: jax.Array) -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.floating):
            return lax.convert_element_type(value, dtype)
        wide = lax.convert_element_type(value, jnp.float64)
        # From a wider format this rounds; from a narrower one, or from small integers, granting a rounding is harmless.
        return wide if self._amplitude is None or not is_floating(value) else self._round(wide, str(np.dtype(dtype)))

    def _roundoff(self, dtype: str) -> float:
        """The format of the operation, no coarser than asked for, and no finer than float32.

        Noise of float64's size would drown in float64's own rounding: what was traced in float64 errs as float32 does,
        and the bound is scaled afterwards.
        """
        return min(self._limit, max(FORMATS[dtype].roundoff, FORMATS["float32"].roundoff))

    def _accumulator(self, name: str, equation: JaxprEqn) -> float:
        """Products of 16-bit operands are accumulated in float32; other sums in the format they are written in."""
        if name in ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"):
            return self._roundoff("float32")
        return self._roundoff(str(aval_of(equation.invars[0]).dtype))

    def _summed(self, value: Any, square: Any, terms: Any, u_acc: float, dtype: str) -> jax.Array:
        tiny = FORMATS[dtype].smallest_normal
        return _noisy_sum(value, square, terms, u_acc, self._roundoff(dtype), tiny, *self._source())

    def _round(self, value: jax.Array, dtype: str, factor: float = 1.0) -> jax.Array:
        u = factor * self._roundoff(dtype)
        return _noisy_rounding(value, u, FORMATS[dtype].smallest_normal, *self._source())

    def _source(self) -> tuple[Any, Any, np.uint64, Any]:
        """Where the next operation's noise comes from."""
        self._operation += 1
        odd = (self._operation * 0x9E3779B97F4A7C15 | 1) & ((1 << 64) - 1)
        return self._amplitude, self._member, np.uint64(odd), self._pool


# Jitted, so that what every operation needs is traced and lowered once a shape, not once an operation.
@jax.jit
def _noisy_rounding(value: Any, u: Any, tiny: Any, *source: Any) -> jax.Array:
    return _perturbed(value, u * jnp.abs(value) + tiny * (value != 0), *source)


@jax.jit
def _noisy_sum(value: Any, square: Any, terms: Any, u_acc: Any, u: Any, tiny: Any, *source: Any) -> jax.Array:
    summation = u_acc**2 * (terms * value**2 / 3 + terms * square / 6 + square)
    variance = jnp.maximum(summation + (u * value) ** 2, 0.0)
    return _perturbed(value, jnp.sqrt(variance) + tiny * (square != 0), *source)


def _perturbed(value: Any, deviation: Any, amplitude: Any, member: Any, odd: Any, pool: Any) -> jax.Array:
    # Multiplicative hashing, as on the torch side: xi depends on the value, the operation and the member.
    key = (2 * jnp.asarray(member, jnp.uint64) + 1) * odd
    bits = lax.bitcast_convert_type(jnp.abs(value), jnp.uint64) * key
    index = lax.shift_right_logical(bits, np.uint64(64 - _POOL_BITS)).astype(jnp.int32)
    return value + amplitude * deviation * pool[index]


def _as_integer(argument: Any, atom: Any) -> jax.Array:
    """64-bit integers are read as 32 bits where the program was traced without 64-bit types."""
    wide = widened(argument)
    return wide.astype(aval_of(atom).dtype) if jnp.issubdtype(wide.dtype, jnp.integer) else wide


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
