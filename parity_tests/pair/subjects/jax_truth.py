"""The float64 truth of a JAX program: how it is traced, and how it is evaluated with its constants moved."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from parity_tests.harness.failures import first_line
from parity_tests.pair.casts import is_float
from parity_tests.pair.subjects.jax_noise import Interpreter, normal_pool

# Interpreted programs are large and run a few dozen times: compiling them well would take longer than running them.
COMPILE_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@contextlib.contextmanager
def machine_limits(leg: Any) -> Iterator[None]:
    """Lets modules that ask for the limits of float64 (``jnp.finfo(x.dtype).eps``) see those of the leg's dtype.

    The truth is the leg's function without roundings, and an epsilon that follows the dtype belongs to the function.
    JAX's own algorithms, which choose their accuracy by these limits, are left alone.

    Args:
        leg: dtype of the values.
    """
    original = jnp.finfo

    def of_the_leg(dtype: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        is_wide = not caller.startswith("jax.") and np.dtype(dtype) == np.float64
        return original(leg if is_wide and jnp.issubdtype(leg, jnp.floating) else dtype)

    jnp.finfo = of_the_leg  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        jnp.finfo = original


def traced(program: Callable[..., Any], arguments: Sequence[Any]) -> tuple[ClosedJaxpr, list[str], str]:
    """Traces a program with float64 arguments; 64-bit types are to be enabled.

    A module that starts a loop from float32 zeros cannot be traced so. Traced in float32 and interpreted in float64 it
    is the same function, but for constants in its code: tracing has rounded them.

    Returns:
        The program, the names of its results, and why it was traced in float32, or nothing.
    """
    why = ""
    try:
        closed, shapes = jax.make_jaxpr(program, return_shape=True)(*arguments)
    except Exception as error:  # whatever a module raises that cannot work in float64
        why = first_line(error)
        narrow = jax.tree.map(lambda leaf: leaf.astype(np.float32) if is_float(leaf) else leaf, list(arguments))
        with jax.enable_x64(False):
            closed, shapes = jax.make_jaxpr(program, return_shape=True)(*narrow)
    return closed, sorted(shapes), why  # sorted: the order in which a dict is flattened


class Truth:
    """A traced program as it is in float64, with its rounded constants as they are or moved.

    Args:
        closed: the program.
        names: of its results.
        fixed: which of its arguments are constants.
        computed: whether what is computed from constants alone errs as float32 does.
        device: to run on.
    """

    def __init__(
        self, closed: ClosedJaxpr, names: Sequence[str], fixed: Sequence[bool], computed: bool, device: Any
    ) -> None:
        self._closed, self._names, self._fixed = closed, names, fixed
        self._computed, self._device = computed, device
        # Known as soon as the program has run once: arrays and numbers that a narrow format has rounded.
        self.stored: set[str] = set()
        self.literals: set[str] = set()
        self._compiled = jax.jit(self._evaluate, compiler_options=COMPILE_QUICKLY)

    def run(self, leaves: Sequence[np.ndarray], member: int) -> dict[str, np.ndarray]:
        """Evaluates on arguments in float64; member 0 moves no constant."""
        with jax.enable_x64(True), jax.default_device(self._device):
            noise = (np.float64(member > 0), jnp.asarray(normal_pool())) if self._computed else ()
            results = self._compiled(leaves, np.int64(member), *noise)
            return dict(zip(self._names, map(np.asarray, results), strict=True))

    def _evaluate(self, leaves: Sequence[Any], member: Any, *noise: Any) -> list[Any]:
        amplitude, pool = noise if self._computed else (None, None)
        dtype = "float32" if self._computed else "float64"
        interpreter = Interpreter(dtype, member, amplitude, pool, constants=True)
        results = interpreter.run(self._closed, leaves, self._fixed)
        self.stored |= interpreter.stored
        self.literals |= interpreter.literals
        return results
