"""JAX's operations: how each of them rounds, how it is evaluated in float64, and how far its kernels err.

Errors of elementary functions are measured on the device at hand, in units of u.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from parity_tests.judge.dtypes import FORMATS, format_name, numpy_dtype
from parity_tests.judge.dtypes import widened as wide_array

_POINTS = 4099  # a vectorised body and a tail
_errors: dict[tuple, float] = {}  # as measured, by operation and formats


def names(text: str) -> frozenset[str]:
    """Return the names in a text, separated by white space."""
    return frozenset(text.split())


# A copy, a choice or a rearrangement: nothing is rounded.
EXACT = names("""
reshape transpose broadcast_in_dim slice dynamic_slice dynamic_update_slice gather concatenate pad rev select_n max
min neg abs sign squeeze expand_dims copy stop_gradient reduce_max reduce_min argmax argmin sort top_k clamp floor
ceil round iota split select_and_gather_add reduce_window_max reduce_window_min is_finite optimization_barrier
device_put cummax cummin reduce_and reduce_or reduce_xor real imag complex conj random_seed random_wrap random_unwrap
random_bits random_fold_in random_split threefry2x32 shift_right_logical sharding_constraint scatter scatter-min
scatter-max nextafter pvary stack unstack
""")
# Calls, whose program is evaluated in place.
INLINED = names("""
pjit jit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
custom_lin
""")
# Element by element, operands of size 1 stretched.
ARITHMETIC = names("""
add sub mul div add_any integer_pow square pow rem scatter-mul
""")
# Elementary functions, which are not always correctly rounded.
FUNCTIONS = names("""
exp exp2 expm1 log log1p tanh logistic erf erfc erf_inv sin cos tan asin acos atan sinh cosh asinh acosh atanh sqrt
rsqrt cbrt pow atan2 div integer_pow lgamma digamma
""")
# Of complex numbers: real ones have an exact absolute value and sign, and a product of one rounding.
COMPLEX_FUNCTIONS = FUNCTIONS | names("""
abs sign square
""")
# A processor may join these with an addition.
MULTIPLICATIONS = names("""
mul square integer_pow
""")
# Algorithms of linear algebra, whose results are right for a matrix that is off by roundings; iterative ones by more.
BACKWARD_STABLE = names("""
lu cholesky eigh eig svd qr geqrf geqp3 householder_product triangular_solve schur hessenberg tridiagonal
tridiagonal_solve
""")
ITERATIVE = names("""
eigh eig svd schur
""")
# Products of many factors: one rounding each.
PRODUCTS = names("""
reduce_prod cumprod
""")


def aval_of(atom: Any) -> Any:
    """Return shape and dtype of a variable of a traced program, which the abstract type does not declare."""
    return atom.aval


def is_inexact(value: Any) -> bool:
    """Tell whether an array holds numbers that are rounded, real or complex."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def wide_dtype(dtype: Any) -> np.dtype:
    """Return float64 or complex128, for a dtype of real or complex numbers."""
    return np.dtype(np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64)


def widened(value: Any) -> jax.Array:
    """Return the array in float64 or complex128, if it holds real or complex numbers."""
    return jnp.asarray(value, wide_dtype(value.dtype)) if is_inexact(value) else jnp.asarray(value)


def is_elementwise(equation: JaxprEqn) -> bool:
    """Tell whether all operands have the result's shape, or stretch to it."""
    shape = aval_of(equation.outvars[0]).shape
    return equation.primitive.name in ARITHMETIC or all(aval_of(atom).shape in (shape, ()) for atom in equation.invars)


def inlined(equation: JaxprEqn) -> Any:
    """Return the program of a call."""
    return next(equation.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params)


def inner_programs(equation: JaxprEqn) -> list[Jaxpr]:
    """Return the programs that an operation holds; of a call the one that is evaluated."""
    values = [v for value in equation.params.values() for v in (value if isinstance(value, tuple | list) else [value])]
    found = [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values if isinstance(v, ClosedJaxpr | Jaxpr)]
    return found[:1] if equation.primitive.name in INLINED else found


def compile_options(equations: Iterable[JaxprEqn]) -> dict[str, Any]:
    """Return options that compile operations quickly, which run a few dozen times only.

    Convolutions are worth more: without any optimisation they take a hundred times as long.
    """

    def convolve(equations: Iterable[JaxprEqn]) -> bool:
        return any(
            equation.primitive.name == "conv_general_dilated"
            or any(convolve(program.eqns) for program in inner_programs(equation))
            for equation in equations
        )

    return {"xla_backend_optimization_level": int(convolve(equations)), "xla_llvm_disable_expensive_passes": True}


def kind_of(equation: JaxprEqn) -> tuple:
    """Return what operations have in common that one compiled program can run."""
    params = tuple(sorted(equation.params.items()))
    try:
        hash(params)
    except TypeError:
        params = (id(equation),)
    atoms = [(aval_of(atom).shape, aval_of(atom).dtype) for atom in (*equation.invars, *equation.outvars)]
    return equation.primitive, params, len(equation.invars), *atoms


def spent_variables(jaxpr: Jaxpr) -> list[list[Var]]:
    """Return for each operation the variables that no later one reads, nor the program returns."""
    spent: list[list[Var]] = []
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    for equation in reversed(jaxpr.eqns):
        read = {atom: None for atom in (*equation.invars, *equation.outvars) if not isinstance(atom, Literal)}
        spent.append([atom for atom in read if atom not in needed])
        needed.update(read)
    return spent[::-1]


_SCATTERS: dict[str, Callable[..., jax.Array]] = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-mul": lax.scatter_mul,
    "scatter-min": lax.scatter_min,
    "scatter-max": lax.scatter_max,
}


def evaluated(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Run one operation on wide operands: parameters that name a narrow format name float64 instead."""
    params = dict(equation.params)
    for key in ("preferred_element_type", "new_dtype", "dtype"):
        if params.get(key) is not None and jnp.issubdtype(params[key], jnp.inexact):
            # Of squared moduli a complex program computes real sums.
            given = [value.dtype for value in operands if is_inexact(value)] or [params[key]]
            params[key] = wide_dtype(jnp.result_type(*given))
    if scatter := _SCATTERS.get(equation.primitive.name):
        # Bound directly it would carry the update function that was traced for the narrow format.
        operand, indices, updates = operands
        options = {key: params[key] for key in ("indices_are_sorted", "unique_indices", "mode")}
        return [scatter(operand, indices, updates, params["dimension_numbers"], **options)]
    run = functools.partial(equation.primitive.bind, **params)
    if equation.primitive.name == "conv_general_dilated":
        # Members of an ensemble run one by one: as groups of one convolution they would take many times as long.
        run = sequential_vmap(run)
    results = run(*operands)
    return list(results) if equation.primitive.multiple_results else [results]


def squared(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Replace the terms of a sum by their squares, whose sum is Q, see `calibration`."""
    if equation.primitive.name == "select_and_scatter_add":  # the second operand only says where the terms go
        return [jnp.square(operands[0]), *operands[1:]]
    moduli = [jnp.abs(value) if jnp.iscomplexobj(value) else value for value in operands]
    return [jnp.square(value) if is_inexact(value) else value for value in moduli]


def transformed_squares(equation: JaxprEqn, operand: Any) -> tuple[jax.Array, float]:
    """Return Q and K of a Fourier transform, whose terms all have the modulus of its input."""
    kind, lengths = equation.params["fft_type"].name, equation.params["fft_lengths"]
    count = math.prod(lengths)
    axes = tuple(range(operand.ndim - len(lengths), operand.ndim))
    total = jnp.sum(jnp.square(jnp.abs(operand)), axes, keepdims=True)
    # Half of a real signal's spectrum implies the other half; inverse transforms divide by their length.
    scale = (2.0 if "IRFFT" in kind else 1.0) / (count**2 if kind.startswith("I") else 1.0)
    return jnp.broadcast_to(scale * total, aval_of(equation.outvars[0]).shape), count


def contains_program(params: dict[str, Any]) -> bool:
    """Tell whether an operation holds a program that the interpreter does not know (a kernel, a custom call)."""
    return any(isinstance(value, Jaxpr | ClosedJaxpr) for key, value in params.items() if key != "update_jaxpr")


def evaluated_as_traced(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Run one operation in the formats it was traced in."""
    narrow = [lax.convert_element_type(v, aval_of(a).dtype) for v, a in zip(operands, equation.invars, strict=True)]
    results = equation.primitive.bind(*narrow, **equation.params)
    return [widened(value) for value in (results if equation.primitive.multiple_results else [results])]


def _reduced(equation: JaxprEqn, operands: Sequence[Any]) -> float:
    return math.prod(operands[0].shape[axis] for axis in equation.params["axes"])


def _contracted(equation: JaxprEqn, operands: Sequence[Any]) -> float:
    (left, _), _ = equation.params["dimension_numbers"]
    return math.prod(operands[0].shape[axis] for axis in left)


def _convolved(equation: JaxprEqn, operands: Sequence[Any]) -> float:
    """Count the elements of the kernel but its output features: an upper bound at the borders."""
    outputs = equation.params["dimension_numbers"].rhs_spec[0]
    return operands[1].size / operands[1].shape[outputs]


def _scattered(equation: JaxprEqn, operands: Sequence[Any]) -> Any:
    ones = [jnp.ones_like(value) if is_inexact(value) else value for value in operands]
    return evaluated(equation, ones)[0]


SUMS: dict[str, Callable[[JaxprEqn, Sequence[Any]], Any]] = {
    "dot_general": _contracted,
    "conv_general_dilated": _convolved,
    "reduce_sum": _reduced,
    "cumsum": lambda equation, operands: operands[0].shape[equation.params["axis"]],
    "reduce_window_sum": lambda equation, operands: math.prod(equation.params["window_dimensions"]),
    "scatter-add": _scattered,
    "select_and_scatter_add": lambda equation, operands: evaluated(equation, [jnp.ones_like(operands[0]), operands[1]])[
        0
    ],
    "ragged_dot": lambda equation, operands: operands[0].shape[-1],
    "ragged_dot_general": lambda equation, operands: operands[0].shape[-1],
}


def _grid(positive: bool, shift: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    size = np.exp(rng.uniform(-9, 4, _POINTS))
    return np.roll(size if positive else size * rng.choice([-1.0, 1.0], _POINTS), shift)


def function_error(equation: JaxprEqn) -> float:
    """Return the largest error of an elementary function, in the format of its result, in units of u; at least 1.

    Of a complex result the modulus of the error counts, in units of sqrt(2) u of the modulus.
    """
    name = equation.primitive.name
    dtypes = [str(getattr(atom.aval, "dtype", "")) for atom in (*equation.invars, equation.outvars[0])]
    in_plane = any(dtype.startswith("complex") for dtype in dtypes)
    dtype = format_name(dtypes[-1])
    if name not in (COMPLEX_FUNCTIONS if in_plane else FUNCTIONS) or dtype not in FORMATS or dtype == "float64":
        return 1.0
    key = (name, str(equation.params), *dtypes)
    if key not in _errors:
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
                rounded = wide_array(np.asarray(run(*map(jnp.asarray, points))))
                exact = np.asarray(run(*(jnp.asarray(wide_array(point)) for point in points)))
            modulus = np.abs(exact)
            usable = np.isfinite(exact) & (modulus < 2.0**15) & (modulus > 2.0**10 * fmt.smallest_normal)
            usable &= np.isfinite(rounded)
            if usable.any():
                error = np.abs(rounded[usable] - exact[usable]) / modulus[usable]
                unit = fmt.roundoff * (2**0.5 if np.iscomplexobj(exact) else 1.0)
                worst = max(worst, float(error.max()) / unit)
        _errors[key] = worst
    return _errors[key]


# Evaluates an inner program on wide operands; flags say which of them are constant.
Run = Callable[..., list[Any]]


def _scan(run: Run, params: dict[str, Any], operands: list[Any], marks: list[Any]) -> list[Any]:
    if "ft_in" in params:  # since JAX 0.11: trees of constants, carries and slices
        consts, carries, _ = map(len, params["ft_in"].unpack())
    else:
        consts, carries = params["num_consts"], params["num_carry"]
    closed = params["jaxpr"]
    fixed = operands[:consts]
    flags = [mark.constant and k < consts for k, mark in enumerate(marks)]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        results = run(closed, [*fixed, *carry, *x], flags)
        return results[:carries], results[carries:]

    start = operands[consts : consts + carries]
    carry, ys = lax.scan(body, start, operands[consts + carries :], length=params["length"], reverse=params["reverse"])
    return [*carry, *ys]


def _while(run: Run, params: dict[str, Any], operands: list[Any], marks: list[Any]) -> list[Any]:
    conditions, bodies = params["cond_nconsts"], params["body_nconsts"]
    fixed_condition, fixed_body = operands[:conditions], operands[conditions : conditions + bodies]
    return lax.while_loop(
        lambda carry: run(params["cond_jaxpr"], [*fixed_condition, *carry])[0],
        lambda carry: run(params["body_jaxpr"], [*fixed_body, *carry]),
        operands[conditions + bodies :],
    )


def _cond(run: Run, params: dict[str, Any], operands: list[Any], marks: list[Any]) -> list[Any]:
    flags = [mark.constant for mark in marks[1:]]
    branches = [lambda *values, closed=closed: run(closed, values, flags) for closed in params["branches"]]
    return lax.switch(operands[0], branches, *operands[1:])


def _linear_solve(run: Run, params: dict[str, Any], operands: list[Any], marks: list[Any]) -> list[Any]:
    """Solve as the program's own method does."""
    lengths, solve = params["const_lengths"], params["jaxprs"].solve
    start = lengths.matvec + lengths.vecmat
    vectors = operands[start + lengths.solve + lengths.transpose_solve :]
    return run(solve, [*operands[start : start + lengths.solve], *vectors])


CONTROL: dict[str, Callable[[Run, dict[str, Any], list[Any], list[Any]], list[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_linear_solve": _linear_solve,
}
