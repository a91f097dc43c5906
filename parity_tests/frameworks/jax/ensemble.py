"""Members of a rounding-noise ensemble, run together: every operation once for a batch of them.

Where operations repeat, as in repeated layers, they are run one by one, so that those of equal shapes share one
compiled program; a deep model as one program would take minutes to compile. Others are compiled whole. How many members
one batch holds follows from the memory it takes.

Where two products cancel, a compiled program computes their difference anew wherever it is needed. XLA runs an element
by element operation again in every kernel that needs it, and a kernel may leave one product of a sum unrounded (a fused
multiply-add). So the difference of two equal products, as of `x / scale` with itself in a matrix of distances, is no
zero, but as large as the rounding of one of them, and another number in the next kernel. What is added in one and
subtracted in the other does not cancel then. Torch runs its operations one by one.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from parity_tests.frameworks.jax.noise import Interpreter, Mark, normal_pool, perturbed
from parity_tests.frameworks.jax.operations import (
    BACKWARD_STABLE,
    CONTROL,
    EXACT,
    INLINED,
    MULTIPLICATIONS,
    PRODUCTS,
    SUMS,
    aval_of,
    compile_options,
    contains_program,
    inlined,
    is_elementwise,
    kind_of,
    spent_variables,
)
from parity_tests.pair.calibration import BATCH_BYTES, Member

# As measured: a kind of operation takes so much longer to compile alone than one operation in a program.
_OFTEN = 3
# A division by what is stretched over many elements is compiled as a product with its reciprocal.
_FACTORS = MULTIPLICATIONS | {"div"}
_ADDITIONS = frozenset({"add", "sub", "add_any"})


def live_bytes(jaxpr: Jaxpr) -> int:
    """Return the most memory that a program's values take at one time in float64, results included."""

    def size(atom: Any) -> int:
        return 8 * math.prod(aval_of(atom).shape)

    now = most = 0
    for equation, spent in zip(jaxpr.eqns, spent_variables(jaxpr), strict=True):
        now += sum(map(size, equation.outvars))
        most = max(most, now)
        # Arguments are there once for all members.
        now -= sum(map(size, set(spent) - set(jaxpr.invars) - set(jaxpr.constvars)))
    return max(most, sum(size(atom) for atom in jaxpr.outvars if not isinstance(atom, Literal)))


def repeats(jaxpr: Jaxpr) -> bool:
    """Tell whether operations occur so often that compiling each kind once takes less time than all as one program."""

    def kinds(jaxpr: Jaxpr) -> Iterator[tuple]:
        for equation in jaxpr.eqns:
            if equation.primitive.name in INLINED:
                inner = inlined(equation)
                yield from kinds(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
            else:
                yield kind_of(equation)

    found = list(kinds(jaxpr))
    return len(found) > _OFTEN * len(set(found))


class NoisyProgram:
    """A program whose operations err as they may in a format.

    Args:
        closed: as traced in the format of its arguments.
        names: of its results.
        dtype: no operation errs more coarsely than this format.
        device: to run on.
    """

    def __init__(self, closed: ClosedJaxpr, names: Sequence[str], dtype: str, device: Any) -> None:
        self._closed, self._names, self._dtype, self._device = closed, names, dtype, device
        self._compiled: dict[tuple, Any] | None = {} if repeats(closed.jaxpr) else None
        self._whole = jax.jit(self._evaluate, compiler_options=compile_options(closed.jaxpr.eqns))
        # Known as soon as the program has run once.
        self.notes: set[str] = set()

    def run(self, leaves: Sequence[np.ndarray], members: Sequence[Member]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the results of each member in turn, on arguments in float64."""
        batch = max(1, min(len(members), BATCH_BYTES // max(1, live_bytes(self._closed.jaxpr))))
        batch = math.ceil(len(members) / math.ceil(len(members) / batch))  # of one size, for one compiled program
        with jax.enable_x64(True), jax.default_device(self._device):
            arguments, pool = [jnp.asarray(leaf) for leaf in leaves], jnp.asarray(normal_pool())

        for start in range(0, len(members), batch):
            chosen = [*members[start : start + batch]]
            padded = chosen + chosen[-1:] * (batch - len(chosen))
            with jax.enable_x64(True), jax.default_device(self._device):
                numbers = jnp.asarray([member.number for member in padded], jnp.int64)
                amplitudes = jnp.asarray([member.amplitude for member in padded], jnp.float64)
                run = self._whole if self._compiled is None else self._evaluate
                results = [np.asarray(array) for array in run(arguments, pool, numbers, amplitudes)]
            for k in range(len(chosen)):
                yield {name: array[k] for name, array in zip(self._names, results, strict=True)}
            del results

    def _evaluate(self, arguments: Sequence[Any], pool: Any, numbers: Any, amplitudes: Any) -> list[Any]:
        def member(number: Any, amplitude: Any) -> list[Any]:
            interpreter = Contracting(self._dtype, number, amplitude, pool, compiled=self._compiled)
            results = interpreter.run(self._closed, arguments)
            self.notes |= interpreter.notes
            return [jnp.asarray(result) for result in results]

        return jax.vmap(member)(numbers, amplitudes)


class Twice(NamedTuple):
    """A value as two kernels compute it."""

    first: Any
    second: Any


class Contracting(Interpreter):
    """Evaluate with noise, and let each operation that is no part of a kernel before it see one of both values."""

    def run(self, closed: ClosedJaxpr, arguments: Sequence[Any], fixed: Sequence[bool] | None = None) -> list[Any]:
        """Evaluate, see `Interpreter.run`."""
        return [self._seen(result) for result in super().run(closed, arguments, fixed)]

    def _equation(
        self, equation: JaxprEqn, operands: list[Any], marks: list[Mark]
    ) -> tuple[Sequence[Any], Sequence[Mark]]:
        name = equation.primitive.name
        if name in INLINED:
            return super()._equation(equation, operands, marks)
        if not _is_fused(equation):
            operands = [self._seen(operand) for operand in operands]
        before = self._operation
        results, marked = super()._equation(equation, [_of(operand, 0) for operand in operands], marks)
        if any(isinstance(operand, Twice) for operand in operands):
            self._operation = before  # equal values are rounded alike
            again, _ = super()._equation(equation, [_of(operand, 1) for operand in operands], marks)
            results = [Twice(*both) for both in zip(results, again, strict=True)]
        elif name in _ADDITIONS and all(mark.product for mark in marks) and results[0].dtype == jnp.float64:
            results = [self._cancelled(results[0], operands, str(aval_of(equation.outvars[0]).dtype))]
        moves = name in EXACT or name == "convert_element_type"
        product = name in _FACTORS or (moves and any(mark.product for mark in marks))
        return results, [mark._replace(product=product) for mark in marked]

    def _cancelled(self, value: Any, products: Sequence[Any], dtype: str) -> Twice:
        """Return a sum of two products twice, in either one product unrounded where half of the digits cancel."""
        u = self._roundoff(dtype)

        def without_rounding(product: Any) -> Any:
            product = jnp.broadcast_to(product, value.shape)
            size = jnp.abs(product)
            lost = jnp.isfinite(product) & (jnp.abs(value) <= math.sqrt(u) * size)
            return jnp.where(lost, value + (perturbed(product, u * size, *self._source()) - product), value)

        return Twice(*map(without_rounding, products))

    def _seen(self, value: Any) -> Any:
        """Return the value that the next kernel computes: one or the other, by the member."""
        if not isinstance(value, Twice):
            return value
        _, member, odd, _ = self._source()
        key = (2 * jnp.asarray(member, jnp.uint64) + 1) * odd
        return jnp.where(lax.shift_right_logical(key, np.uint64(63)) == 0, value.first, value.second)


def _of(value: Any, which: int) -> Any:
    return value[which] if isinstance(value, Twice) else value


def _is_fused(equation: JaxprEqn) -> bool:
    """Tell whether an operation becomes a part of the kernels that need its result."""
    name = equation.primitive.name
    if name in EXACT or name == "convert_element_type":
        return True
    apart = SUMS.keys() | CONTROL.keys() | BACKWARD_STABLE | PRODUCTS
    return name not in apart and is_elementwise(equation) and not contains_program(equation.params)
