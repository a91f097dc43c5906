"""Members of a rounding-noise ensemble, run together: every operation once for a batch of them.

Where operations repeat, as in repeated layers, they are run one by one, so that those of equal shapes share one
compiled program; a deep model as one program would take minutes to compile. Others are compiled whole. How many members
one batch holds follows from the memory it takes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from parity_tests.frameworks.jax.noise import Interpreter, normal_pool
from parity_tests.frameworks.jax.operations import INLINED, aval_of, compile_options, inlined, kind_of, spent_variables
from parity_tests.pair.calibration import BATCH_BYTES, Member

# As measured: a kind of operation takes so much longer to compile alone than one operation in a program.
_OFTEN = 3


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
            interpreter = Interpreter(self._dtype, number, amplitude, pool, compiled=self._compiled)
            results = interpreter.run(self._closed, arguments)
            self.notes |= interpreter.notes
            return [jnp.asarray(result) for result in results]

        return jax.vmap(member)(numbers, amplitudes)
