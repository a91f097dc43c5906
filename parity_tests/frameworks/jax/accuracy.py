"""How far JAX's elementary functions are from correct rounding on the device at hand, measured, in units of u."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from parity_tests.judge.dtypes import FORMATS, numpy_dtype
from parity_tests.pair.casts import format_name, widened
from parity_tests.pair.operations import JAX_COMPLEX_FUNCTIONS, JAX_FUNCTIONS

_POINTS = 4099  # a vectorised body and a tail
_cache: dict[tuple, float] = {}


def _grid(positive: bool, shift: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    size = np.exp(rng.uniform(-9, 4, _POINTS))
    return np.roll(size if positive else size * rng.choice([-1.0, 1.0], _POINTS), shift)


def function_error(equation: JaxprEqn) -> float:
    """Largest error of an elementary function, in the format of its result, in units of u; at least 1.

    Of a complex result the modulus of the error counts, in units of sqrt(2) u of the modulus.

    Args:
        equation: of a traced program; other operations count as correctly rounded.
    """
    name = equation.primitive.name
    dtypes = [str(getattr(atom.aval, "dtype", "")) for atom in (*equation.invars, equation.outvars[0])]
    in_plane = any(dtype.startswith("complex") for dtype in dtypes)
    dtype = format_name(dtypes[-1])
    if name not in (JAX_COMPLEX_FUNCTIONS if in_plane else JAX_FUNCTIONS) or dtype not in FORMATS or dtype == "float64":
        return 1.0
    key = (name, str(equation.params), *dtypes)
    if key not in _cache:
        fmt, worst = FORMATS[dtype], 1.0

        @jax.jit
        def run(*points: jax.Array) -> jax.Array:
            return equation.primitive.bind(*points, **equation.params)

        for positive in (False, True):
            points = []
            for shift, kind in enumerate(dtypes[:-1]):
                if not kind.startswith(("complex", "float", "bfloat")):  # an exponent
                    points.append(np.resize(np.arange(-2 if kind.startswith("i") else 0, 7), _POINTS).astype(kind))
                    continue
                point = _grid(positive, shift).astype(numpy_dtype(dtype))
                # A quarter turn of the points is a grid of its own for the imaginary part.
                turned = np.roll(point, _POINTS // 4)
                points.append(point + 1j * turned if kind.startswith("complex") else point)
            # Concrete values even while a caller is being traced.
            with jax.ensure_compile_time_eval(), jax.enable_x64(True):
                rounded = widened(np.asarray(run(*map(jnp.asarray, points))))
                exact = np.asarray(run(*(jnp.asarray(widened(point)) for point in points)))
            modulus = np.abs(exact)
            usable = np.isfinite(exact) & (modulus < 2.0**15) & (modulus > 2.0**10 * fmt.smallest_normal)
            usable &= np.isfinite(rounded)
            if usable.any():
                error = np.abs(rounded[usable] - exact[usable]) / modulus[usable]
                unit = fmt.roundoff * (2**0.5 if np.iscomplexobj(exact) else 1.0)
                worst = max(worst, float(error.max()) / unit)
        _cache[key] = worst
    return _cache[key]
