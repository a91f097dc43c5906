"""How far JAX's elementary functions are from correct rounding on the device at hand, measured, in units of u."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from parity_tests.harness.dtypes import FORMATS, numpy_dtype
from parity_tests.pair.subjects.operations import JAX_FUNCTIONS

_POINTS = 4099  # a vectorised body and a tail
_cache: dict[tuple, float] = {}


def _grid(positive: bool, shift: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    size = np.exp(rng.uniform(-9, 4, _POINTS))
    return np.roll(size if positive else size * rng.choice([-1.0, 1.0], _POINTS), shift)


def function_error(equation: JaxprEqn) -> float:
    """Largest error of an elementary function, in the format of its result, in units of u; at least 1.

    Args:
        equation: of a traced program; other operations count as correctly rounded.
    """
    name, aval = equation.primitive.name, equation.outvars[0].aval
    dtype = str(getattr(aval, "dtype", ""))
    if name not in JAX_FUNCTIONS or dtype not in FORMATS or dtype == "float64":
        return 1.0
    key = (name, str(equation.params), dtype, len(equation.invars))
    if key not in _cache:
        fmt, worst = FORMATS[dtype], 1.0

        @jax.jit
        def run(*points: jax.Array) -> jax.Array:
            return equation.primitive.bind(*points, **equation.params)

        for positive in (False, True):
            points = [_grid(positive, shift).astype(numpy_dtype(dtype)) for shift in range(len(equation.invars))]
            # Concrete values even while a caller is being traced.
            with jax.ensure_compile_time_eval(), jax.enable_x64(True):
                rounded = np.asarray(run(*map(jnp.asarray, points)), np.float64)
                exact = np.asarray(run(*(jnp.asarray(point, jnp.float64) for point in points)))
            magnitude = np.abs(exact)
            usable = np.isfinite(exact) & (magnitude < 2.0**15) & (magnitude > 2.0**10 * fmt.smallest_normal)
            usable &= np.isfinite(rounded)
            if usable.any():
                error = np.abs(rounded[usable] - exact[usable]) / magnitude[usable]
                worst = max(worst, float(error.max()) / fmt.roundoff)
        _cache[key] = worst
    return _cache[key]
