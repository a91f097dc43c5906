"""The float64 truth of a JAX program: how it is traced, and how it is evaluated with its constants moved."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import dtypes
from jax.extend.core import ClosedJaxpr

from parity_tests.frameworks.jax.noise import Interpreter, normal_pool
from parity_tests.frameworks.jax.operations import compile_options, wide_dtype
from parity_tests.judge.dtypes import FORMATS, as_stored, format_name
from parity_tests.report.text import first_line

# Part of the key of JAX's caches: a program traced under the changes below is not found by other calls.
_TRUTH = jax.make_user_context(default_value=None)
# Random numbers of another format are other numbers.
_RANDOM = ("jax._src.random", "jax._src.prng")


def _remember_constants_by_type() -> None:
    """Let JAX convert a NumPy array anew where 64-bit types were switched on or off.

    It remembers what an array in a user's function was converted to, and takes the float64 of the truth's program where
    the function is compiled in float32, which fails. Where its private parts have moved, it stays as it is.
    """
    try:
        from jax._src import lib
        from jax._src.literals import TypedNdArray

        register = dtypes.register_canonicalize_value_handler
        cached = getattr(lib, "weakref_lru_cache").weak_key_weak_value_cache  # noqa: B009
    except (ImportError, AttributeError):
        return

    def converted(array: np.ndarray) -> Any:
        return TypedNdArray(np.asarray(array, dtypes.canonicalize_dtype(array.dtype)))

    caches = {np.dtype(widest): cached(functools.partial(converted)) for widest in (np.float32, np.float64)}
    register(np.ndarray, lambda array: caches[dtypes.canonicalize_dtype(np.dtype(np.float64))](array))


_remember_constants_by_type()


@contextlib.contextmanager
def _machine_limits(leg: Any) -> Iterator[None]:
    """Let modules that ask for the limits of float64 (`jnp.finfo(x.dtype).eps`) see those of the leg's dtype.

    The truth is the leg's function without roundings, and an epsilon that follows the dtype belongs to the function.
    JAX's own algorithms, which choose their accuracy by these limits, are left alone.
    """
    original = jnp.finfo

    def of_the_leg(dtype: Any) -> Any:
        found = original(dtype)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return found if caller.startswith("jax.") or found.dtype != np.float64 else original(leg)

    jnp.finfo = of_the_leg if jnp.issubdtype(leg, jnp.floating) else original  # pyright: ignore
    try:
        yield
    finally:
        jnp.finfo = original


@contextlib.contextmanager
def _wide_formats() -> Iterator[None]:
    """Let a module that asks for a narrow format (`dtype=jnp.float32`, `jnp.zeros(n, jnp.float32)`) get float64.

    So its loops may start from zeros of its own, and tracing rounds no constant in its code. All of JAX's functions
    have a dtype of the user's checked in one place, which is not public: where it has moved, formats stay as they are.
    """
    original = getattr(dtypes, "check_and_canonicalize_user_dtype", None)

    def widest(*args: Any, **kwargs: Any) -> Any:
        dtype = original(*args, **kwargs)  # pyright: ignore[reportOptionalCall]
        if format_name(dtype) not in FORMATS:  # integers, and formats of 8 bits, whose rounding is meant
            return dtype
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith(_RANDOM):
                return dtype
            frame = frame.f_back
        return wide_dtype(dtype)

    if original is not None:
        dtypes.check_and_canonicalize_user_dtype = widest
    try:
        yield
    finally:
        if original is not None:
            dtypes.check_and_canonicalize_user_dtype = original


def traced(
    program: Callable[..., Any], arguments: Sequence[Any], leg: Any, purpose: str = ""
) -> tuple[ClosedJaxpr, list[str], str]:
    """Trace a program with float64 arguments; 64-bit types are to be enabled.

    Tried in turn, because not every module can be traced in each way: with every format that it asks for widened; with
    these as they are, which rounds the constants beside them; in float32 throughout, which rounds all constants. The
    interpreter works in float64 in every case, so that nothing but constants is rounded.

    Args:
        program: to be traced.
        arguments: wide.
        leg: dtype that the values are stored in.
        purpose: programs of one purpose are traced apart from those of another.

    Returns:
        The program, the names of its results, and why it was traced in float32, or nothing.
    """
    with _TRUTH(f"{leg} {purpose}"), _machine_limits(leg):
        try:
            with _TRUTH(f"{leg} {purpose} widened"), _wide_formats():
                closed, shapes = jax.make_jaxpr(program, return_shape=True)(*arguments)
            return closed, sorted(shapes), ""  # sorted: the order in which a dict is flattened
        except Exception:  # whatever a module raises that cannot work so; it may be its own, raised again below
            pass
        try:
            closed, shapes = jax.make_jaxpr(program, return_shape=True)(*arguments)
            return closed, sorted(shapes), ""
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
        narrow = jax.tree.map(_narrowed, list(arguments))
        with jax.enable_x64(False):
            closed, shapes = jax.make_jaxpr(program, return_shape=True)(*narrow)
        return closed, sorted(shapes), why


def _narrowed(array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, as_stored(np.zeros((), array.dtype), np.dtype(np.float32)).dtype)


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
        self._compiled = jax.jit(self._evaluate, compiler_options=compile_options(closed.jaxpr.eqns))

    def run(self, leaves: Sequence[np.ndarray], member: int) -> dict[str, np.ndarray]:
        """Evaluate on arguments in float64; member 0 moves no constant."""
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
