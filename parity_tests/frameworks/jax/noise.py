"""An interpreter of traced JAX programs in float64 that lets every operation err as it may in the format it was traced.

Noise model: see `pair.calibration`. The traced program says in which format each operation works (a norm's statistics
in float32, a bias gradient summed in bfloat16); no operation is granted a coarser one than the pair is judged in, so
that a module that computes in bfloat16 behind a float32 interface is not excused.

A program that is traced with float64 arguments still has narrow constants, where a module is fixed to a format: numbers
in its code, arrays that it has captured. Without noise the interpreter can move these, each by its roundoff.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from parity_tests.frameworks.jax.operations import (
    BACKWARD_STABLE,
    CONTROL,
    EXACT,
    INLINED,
    ITERATIVE,
    MULTIPLICATIONS,
    PRODUCTS,
    SUMS,
    aval_of,
    compile_options,
    contains_program,
    evaluated,
    evaluated_as_traced,
    function_error,
    inlined,
    is_elementwise,
    is_inexact,
    kind_of,
    spent_variables,
    squared,
    transformed_squares,
    wide_dtype,
    widened,
)
from parity_tests.judge.dtypes import FORMATS, format_name, looks_rounded, parts
from parity_tests.judge.dtypes import widened as wide_array
from parity_tests.pair.calibration import MEMBERS, moved_constant

_POOL_BITS = 16
_ODD, _NONE_BEFORE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0)


@functools.cache
def normal_pool() -> np.ndarray:
    """Return the standard normal numbers that all noise is looked up in."""
    pool = np.random.default_rng(0xD1CE).standard_normal(1 << _POOL_BITS)
    # Of 24 bits, see `_shifted`.
    return ((pool - pool.mean()) / pool.std()).astype(np.float32).astype(np.float64)


class Mark(NamedTuple):
    """Knowledge about a value beside its numbers."""

    constant: bool  # no number that parameters or inputs of fractions have changed is part of it
    unit: float  # roundoff of the coarsest format that is known to hold it exactly
    product: bool = False  # what was multiplied last, wherever it was moved


class Interpreter:
    """Evaluate a traced program, with 64-bit types enabled.

    Args:
        dtype: no operation errs more coarsely than this format.
        member: traced int64, the number of the ensemble's run.
        amplitude: traced float64, of the noise; None leaves all noise out (the truth).
        pool: traced, `normal_pool`: as a constant every operation would carry its own copy.
        constants: only rounded constants move, by `moved_constant` of the member; with noise also what is computed
            from constants alone.
        compiled: None inside `jit`. Otherwise operations run one by one, each with its noise, and those of one kind by
            one compiled program, which is kept here.
        start: number of operations that have run before, traced where the program is that of a kind.
    """

    def __init__(
        self,
        dtype: str = "float64",
        member: Any = 0,
        amplitude: Any = None,
        pool: Any = None,
        constants: bool = False,
        compiled: dict[tuple, Any] | None = None,
        start: Any = _NONE_BEFORE,
    ) -> None:
        self._limit, self._member, self._amplitude, self._pool = FORMATS[dtype], member, amplitude, pool
        self._constants, self._compiled = constants, compiled
        self._start, self._operation = start, 0
        self.notes: set[str] = set()
        # Constants that a narrow format has rounded, as they are shown: arrays, and numbers in code.
        self.stored: set[str] = set()
        self.literals: set[str] = set()

    def run(self, closed: ClosedJaxpr, arguments: Sequence[Any], fixed: Sequence[bool] | None = None) -> list[Any]:
        """Evaluate; real and complex arguments and results are float64 and complex128."""
        typed = [_as_integer(argument, atom) for argument, atom in zip(arguments, closed.jaxpr.invars, strict=True)]
        flags = zip(closed.jaxpr.invars, fixed or [False] * len(arguments), strict=True)
        marks = [Mark(flag, _unit(aval_of(variable).dtype)) for variable, flag in flags]
        return self._jaxpr(closed.jaxpr, [self._const(const) for const in closed.consts], typed, marks)[0]

    def _jaxpr(
        self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], marks: Sequence[Mark]
    ) -> tuple[list[Any], list[Mark]]:
        """Return results and their marks."""
        values: dict[Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
        marked = {variable: Mark(True, _unit(aval_of(variable).dtype)) for variable in jaxpr.constvars}
        marked.update(zip(jaxpr.invars, marks, strict=True))

        def read(atom: Any) -> Any:
            return self._literal(atom) if isinstance(atom, Literal) else values[atom]

        def mark(atom: Any) -> Mark:
            return _literal_mark(atom) if isinstance(atom, Literal) else marked[atom]

        for equation, spent in zip(jaxpr.eqns, spent_variables(jaxpr), strict=True):
            operands = [read(atom) for atom in equation.invars]
            results, found = self._equation(equation, operands, [mark(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
            marked.update(zip(equation.outvars, found, strict=True))
            for variable in spent:  # frees the memory of what is needed no more
                del values[variable]
        return [read(atom) for atom in jaxpr.outvars], [mark(atom) for atom in jaxpr.outvars]

    def _literal(self, literal: Literal) -> jax.Array:
        dtype = aval_of(literal).dtype
        if aval_of(literal).ndim:
            return self._const(literal.val)
        value = np.asarray(literal.val, dtype)
        name = format_name(dtype)
        # A constant such as 0.1 was rounded to the format when the program was traced; 0.5 was not.
        if (self._amplitude is None and not self._constants) or not _was_rounded(value, name):
            return widened(value)
        if not self._constants:
            return self._round(widened(value), name)
        if name != "float64":
            self.literals.add(f"{value[()]:.9g} ({name})")
        return self._moved(value, name)

    def _const(self, const: Any) -> jax.Array:
        """Return an array that the program has captured."""
        name = format_name(getattr(const, "dtype", ""))
        if not self._constants or name == "float64" or not _was_rounded(const, name):
            return widened(const)
        self.stored.add(f"an array of {name} and shape {const.shape}")
        return self._moved(const, name)

    def _moved(self, const: Any, name: str) -> jax.Array:
        """Return the constant as it is for the member; 0 moves nothing."""
        array = wide_array(np.asarray(const))
        moved = np.stack([moved_constant(array, member, name) for member in range(MEMBERS + 1)])
        return jnp.asarray(moved)[self._member]

    def _equation(
        self, equation: JaxprEqn, operands: list[Any], marks: list[Mark]
    ) -> tuple[Sequence[Any], Sequence[Mark]]:
        """Return the results of one operation and their marks."""
        name = equation.primitive.name
        if name in INLINED:
            inner = inlined(equation)
            if isinstance(inner, ClosedJaxpr):
                return self._jaxpr(inner.jaxpr, [self._const(const) for const in inner.consts], operands, marks)
            return self._jaxpr(inner, [], operands, marks)
        constant = all(mark.constant for mark in marks)
        units = [_unit(aval_of(variable).dtype) for variable in equation.outvars]
        held = min((mark.unit for mark in marks), default=0.0)
        if name in EXACT or (name == "convert_element_type" and units[0] <= held < math.inf):
            # A choice among numbers of a format, or a cast to one that holds them, rounds nothing.
            units = [max(unit, held) for unit in units]
        if self._compiled is not None:
            results = self._compiled_alone(equation, operands, marks, held)
        else:
            results = self._evaluated(equation, operands, marks, held)
        return results, [Mark(constant, unit) for unit in units]

    def _evaluated(self, equation: JaxprEqn, operands: list[Any], marks: Sequence[Mark], held: float) -> Sequence[Any]:
        if equation.primitive.name in CONTROL:
            return CONTROL[equation.primitive.name](self.run, equation.params, operands, list(marks))
        if self._amplitude is None or (self._constants and not all(mark.constant for mark in marks)):
            return self._exactly(equation, operands)
        return self._noisy(equation, operands, held)

    def _compiled_alone(
        self, equation: JaxprEqn, operands: list[Any], marks: Sequence[Mark], held: float
    ) -> Sequence[Any]:
        """Run one operation with its noise, a loop or a branch whole, by the program of all others of its kind."""
        assert self._compiled is not None
        key = (kind_of(equation), *(marks if equation.primitive.name in CONTROL else (held,)))
        if key not in self._compiled:
            counts: list[int] = []

            def run(operands: list[Any], start: Any, *source: Any) -> Sequence[Any]:
                inner = type(self)(self._limit.name, *source, start=start)
                results = inner._evaluated(equation, operands, marks, held)
                self.notes |= inner.notes
                counts.append(inner._operation)
                return results

            self._compiled[key] = jax.jit(run, compiler_options=compile_options([equation])), counts
        program, counts = self._compiled[key]
        results = program(operands, np.uint64(self._operation), self._member, self._amplitude, self._pool)
        self._operation += counts[0]
        return results

    def _exactly(self, equation: JaxprEqn, operands: list[Any]) -> Sequence[Any]:
        name, params = equation.primitive.name, equation.params
        if name == "convert_element_type":
            return [_converted(params["new_dtype"], operands[0])]
        if name == "reduce_precision":
            return operands
        if name == "bitcast_convert_type" or contains_program(params):
            return evaluated_as_traced(equation, operands)
        results = evaluated(equation, operands)
        if name in MULTIPLICATIONS and self._compiled is None:
            zero = lax.shift_right_logical(jnp.asarray(self._member, jnp.uint64), np.uint64(63))
            return [_uncontracted(value, zero) for value in results]
        return results

    def _noisy(self, equation: JaxprEqn, operands: list[Any], held: float) -> Sequence[Any]:
        """Return results that err; `held` is the roundoff of a format that holds all operands exactly."""
        name = equation.primitive.name
        if name in BACKWARD_STABLE:
            operands = [self._off(name, value) if is_inexact(value) and value.ndim else value for value in operands]
        results = self._exactly(equation, operands)
        if name in EXACT and not (name in ("abs", "sign") and jnp.iscomplexobj(operands[0])):
            return results
        if name == "reduce_precision" or not any(is_inexact(value) for value in results):
            return results
        if name == "convert_element_type":
            dtype = np.dtype(equation.params["new_dtype"])
            if is_inexact(operands[0]):
                exact = held >= _unit(dtype) or format_name(dtype) not in FORMATS
                return results if exact else [self._round(results[0], str(dtype))]
            # Integers are rounded beyond those that the format holds.
            return [self._round(results[0], str(dtype), jnp.abs(results[0]) * self._roundoff(str(dtype)) > 1)]
        if name == "bitcast_convert_type":
            return results
        if contains_program(equation.params):
            self.notes.add(f"jax {name} has no rounding model of its own")
            return results
        if name == "fft":
            square, count = transformed_squares(equation, operands[0])
            u = self._roundoff(str(aval_of(equation.outvars[0]).dtype))
            return [self._summed(results[0], square, count, u, str(aval_of(equation.outvars[0]).dtype))]
        if name in SUMS:
            squares = evaluated(equation, squared(equation, operands))
            terms = SUMS[name](equation, operands)
            u_acc = self._accumulator(name, equation)
            return [
                self._summed(value, square, terms, u_acc, str(aval_of(var).dtype))
                for value, square, var in zip(results, squares, equation.outvars, strict=True)
            ]
        if not is_elementwise(equation) and name not in PRODUCTS | BACKWARD_STABLE:
            self.notes.add(f"jax {name} has no rounding model of its own")
        # A product of many factors is rounded once for each.
        factor = math.sqrt(operands[0].size) if name in PRODUCTS else function_error(equation)
        return [
            self._round(value, str(aval_of(var).dtype), factor) if is_inexact(value) else value
            for value, var in zip(results, equation.outvars, strict=True)
        ]

    def _roundoff(self, dtype: str) -> float:
        """Return the format of the operation, no coarser than asked for, and no finer than float32.

        Noise of float64's size would drown in float64's own rounding: what was traced in float64 errs as float32 does,
        and the bound is scaled afterwards.
        """
        return min(self._limit.roundoff, max(_unit(dtype), FORMATS["float32"].roundoff))

    def _tiny(self, dtype: str) -> float:
        """Return the smallest normal number of the operation's format, at most that of the format asked for."""
        name = format_name(dtype)
        return min(self._limit.smallest_normal, FORMATS[name].smallest_normal) if name in FORMATS else 0.0

    def _accumulator(self, name: str, equation: JaxprEqn) -> float:
        """Return the roundoff of a sum: float32's for products of 16-bit operands, else that of its written format."""
        if name in ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"):
            return self._roundoff("float32")
        return self._roundoff(str(aval_of(equation.invars[0]).dtype))

    def _summed(self, value: Any, square: Any, terms: Any, u_acc: float, dtype: str) -> jax.Array:
        return _noisy_sum(value, square, terms, u_acc, self._roundoff(dtype), self._tiny(dtype), *self._source())

    def _round(self, value: jax.Array, dtype: str, factor: Any = 1.0) -> jax.Array:
        # A part of a complex product is a sum of two products, which may cancel: it errs as its modulus does.
        u = factor * self._roundoff(dtype) * (math.sqrt(2.0) if jnp.iscomplexobj(value) else 1.0)
        return _noisy_rounding(value, u, self._tiny(dtype), *self._source())

    def _off(self, name: str, matrix: jax.Array) -> jax.Array:
        """Let a matrix of n columns be off, in total by u root(n) |A|, of Frobenius: that of sums over a row.

        Iterative algorithms pass through the matrix several times; of them the classic bound counts, u n |A|.
        """
        u = self._roundoff("float32")  # there are no 16-bit kernels
        total = jnp.sum(jnp.square(jnp.abs(matrix)), (-2, -1)[-matrix.ndim :], keepdims=True)
        deviation = u * jnp.sqrt(total / (1 if name in ITERATIVE else max(1, matrix.shape[-1])))
        return perturbed(matrix, jnp.broadcast_to(deviation, matrix.shape), *self._source())

    def _source(self) -> tuple[Any, Any, np.uint64, Any]:
        """Return the source of the next operation's noise."""
        self._operation += 1
        before = self._start * _ODD  # traced, it wraps around by itself
        odd = before + np.uint64(self._operation * int(_ODD) & ((1 << 64) - 1)) | np.uint64(1)
        return self._amplitude, self._member, odd, self._pool


# Jitted, so that what every operation needs is traced and lowered once a shape, not once an operation.
@jax.jit
def _noisy_rounding(value: Any, u: Any, tiny: Any, *source: Any) -> jax.Array:
    return perturbed(value, u * jnp.abs(value) + tiny * (value != 0), *source)


@jax.jit
def _noisy_sum(value: Any, square: Any, terms: Any, u_acc: Any, u: Any, tiny: Any, *source: Any) -> jax.Array:
    modulus = jnp.abs(value)
    summation = u_acc**2 * (jnp.abs(terms) * modulus**2 / 3 + jnp.abs(terms) * square / 6 + square)
    variance = jnp.maximum(summation + (u * modulus) ** 2, 0.0)
    return perturbed(value, jnp.sqrt(variance) + tiny * (square != 0), *source)


def perturbed(value: Any, deviation: Any, *source: Any) -> jax.Array:
    """Return a value that errs by a deviation times a normal number of the operation, the value and the member."""
    if jnp.iscomplexobj(value):
        return lax.complex(_shifted(value.real, deviation, *source), _shifted(value.imag, deviation, *source))
    return _shifted(value, deviation, *source)


def _shifted(value: Any, deviation: Any, amplitude: Any, member: Any, odd: Any, pool: Any) -> jax.Array:
    # Multiplicative hashing, as on the torch side: xi depends on the value, the operation and the member.
    key = (2 * jnp.asarray(member, jnp.uint64) + 1) * odd
    bits = lax.bitcast_convert_type(jnp.abs(value), jnp.uint64) * key
    index = lax.shift_right_logical(bits, np.uint64(64 - _POOL_BITS)).astype(jnp.int32)
    # A deviation of 8 bits times a normal number of 24 is exact: a compiler that computes this again where it is used
    # again, once with a fused addition and once without, gets the same bits.
    noise = amplitude * lax.reduce_precision(deviation, exponent_bits=11, mantissa_bits=8) * pool[index]
    # Infinities and NaN are not rounded: -inf is what a mask puts in the place of a score.
    return jnp.where(jnp.isfinite(value), value + noise, value)


def _uncontracted(value: Any, zero: Any) -> Any:
    """Keep a compiler from adding to a product in one rounding; `zero` is a zero that it does not know.

    A value is computed again where it is used again. With a fused addition at one place and none at the other, a
    maximum would not be among the numbers that it is the maximum of, and its gradient would go nowhere.
    """
    if value.dtype != jnp.float64:
        return value
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.uint64) ^ zero, jnp.float64)


def _converted(dtype: Any, value: jax.Array) -> jax.Array:
    """Cast as in float64: leave out casts between formats, keep those to integers, to a real part, to 8 bits."""
    if format_name(dtype) not in FORMATS:
        # A format of 8 bits is asked for because of its rounding.
        return widened(lax.convert_element_type(value, dtype))
    if jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
        return lax.real(value)
    return lax.convert_element_type(value, wide_dtype(dtype))


def _unit(dtype: Any) -> float:
    """Return the roundoff of a format; infinite for integers and booleans: the other operands decide."""
    name = format_name(dtype)
    return FORMATS[name].roundoff if name in FORMATS else math.inf


def _literal_mark(literal: Literal) -> Mark:
    """Mark a number in code with the unit of the bits that it needs: 0.5 fits into every format."""
    dtype = aval_of(literal).dtype
    if format_name(dtype) not in FORMATS or aval_of(literal).ndim:
        return Mark(True, _unit(dtype))
    numbers = parts(np.asarray(literal.val, dtype)).ravel()
    ratios = [abs(number).as_integer_ratio()[0] for number in numbers.tolist() if math.isfinite(number) and number]
    needed = [numerator.bit_length() - ((numerator & -numerator).bit_length() - 1) for numerator in ratios]
    return Mark(True, 2.0 ** -max(needed) if needed else 1.0)


def _was_rounded(value: Any, name: str) -> bool:
    """Tell whether a concrete array or number of a format holds what the format has rounded."""
    return name in FORMATS and bool(looks_rounded(parts(np.asarray(value)), name).any())


def _as_integer(argument: Any, atom: Any) -> jax.Array:
    """Read 64-bit integers as 32 bits where the program was traced without 64-bit types."""
    wide = widened(argument)
    return wide.astype(aval_of(atom).dtype) if jnp.issubdtype(wide.dtype, jnp.integer) else wide
