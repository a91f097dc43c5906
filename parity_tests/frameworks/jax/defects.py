"""Defects planted in the flax side of the example pairs: each spoils a correct module the way real ports go wrong.

Of the method's list, initialisers, optimisers and blocks of a masked layer have no counterpart here: the harness draws
a pair's parameters, and a pair is not trained.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity_tests.frameworks.jax.modules import Function
from parity_tests.frameworks.jax.pair import JaxSide
from parity_tests.pair.check import judge_pair
from parity_tests.pair.examples import EXAMPLES
from parity_tests.pair.legs import Pair
from parity_tests.pair.loading import build, make_side
from parity_tests.pair.side import Arrays, Side

Edit = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Defect:
    """One way to be wrong, by exactly one of four means."""

    name: str  # what was planted
    example: str  # the pair whose flax side is spoiled
    parameters: Edit | None = None  # what the flax side does to its parameters before it uses them
    results: Edit | None = None  # what it does to its outputs and gradients
    function: Callable[[Function], Function] | None = None  # spoils the flat JAX function
    module: Callable[[], dict[str, Any]] | None = None  # builds another flax side in place of the example's
    # Storage dtypes in which the defect changes the function; elsewhere it is equivalent to correct code
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    cause: str = ""  # a part of the likely cause that the report must name; empty where no hypothesis covers the defect


class _Spoiled:
    """A correct side with wrong parameters or wrong results; compiled once, however many defects it is given."""

    def __init__(self, side: Side, parameters: Edit | None, results: Edit | None) -> None:
        self._side, self.framework, self.name = side, side.framework, side.name
        self._parameters, self._results = parameters or _unchanged, results or _unchanged

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._side, name)
        if name not in ("forward", "vjp", "truth", "ensemble"):
            return method

        def call(parameters: Arrays, *arguments: Any) -> Any:
            found = method({**parameters, **self._parameters(parameters)}, *arguments)
            return found if name == "ensemble" else {**found, **self._results(found)}

        return call


def _unchanged(arrays: Arrays) -> Arrays:
    return arrays


@functools.cache
def _healthy(example: str) -> tuple[dict[str, Any], dict[str, Side]]:
    arguments = build(EXAMPLES[example])
    return arguments, {framework: make_side(framework, arguments, "cpu") for framework in ("torch", "jax")}


def healthy(example: str) -> Pair:
    """Return the example's pair as it is; its sides are the ones that defects are planted in, and are compiled once."""
    return _pair(example, *_healthy(example))


def planted(defect: Defect) -> Pair:
    """Return the example's pair with the defect in its flax side."""
    arguments, sides = _healthy(defect.example)
    if defect.module is not None:
        spoiled: Any = JaxSide(defect.module()["flax_module"])
    elif defect.function is not None:
        spoiled = JaxSide(arguments["flax_module"], change=defect.function)
    else:
        spoiled = _Spoiled(sides["jax"], defect.parameters, defect.results)
    return _pair(f"{defect.example} with {defect.name}", arguments, {"torch": sides["torch"], "jax": spoiled})


def _pair(name: str, arguments: dict[str, Any], sides: dict[str, Any]) -> Pair:
    return Pair(
        name=name,
        sides=sides,
        rules=arguments["params"],
        source=arguments["inputs"],
        input_patterns=arguments.get("input_patterns", {}),
        output_patterns=arguments.get("output_patterns", {}),
    )


def _in_bfloat16(function: Function) -> Function:
    def spoiled(arrays: dict[str, Any], *inputs: jax.Array) -> jax.Array:
        narrow = {name: array.astype(jnp.bfloat16) for name, array in arrays.items()}
        return function(narrow, *(x.astype(jnp.bfloat16) for x in inputs)).astype(inputs[0].dtype)

    return spoiled


def _summed_in_bfloat16(function: Function) -> Function:
    """Sum x W with a running sum that is rounded to bfloat16 after every product, then adds b."""

    def spoiled(arrays: dict[str, Any], x: jax.Array) -> jax.Array:
        def step(total: jax.Array, term: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            column, row = term
            return (total + (column[..., None] * row).astype(jnp.bfloat16)).astype(jnp.bfloat16), None

        start = jnp.zeros((*x.shape[:-1], arrays["kernel"].shape[1]), jnp.bfloat16)
        total, _ = jax.lax.scan(step, start, (jnp.moveaxis(x, -1, 0), arrays["kernel"]))
        return total.astype(x.dtype) + arrays["bias"]

    return spoiled


@jax.custom_vjp
def _with_scaled_gradient(x: jax.Array) -> jax.Array:
    return x


_with_scaled_gradient.defvjp(lambda x: (x, None), lambda _, dy: (dy * 1.01,))


def _stopped(function: Function) -> Function:
    return lambda arrays, x: function({**arrays, "bias": jax.lax.stop_gradient(arrays["bias"])}, x)


def _scaled_gradient(function: Function) -> Function:
    return lambda arrays, x: function({**arrays, "kernel": _with_scaled_gradient(arrays["kernel"])}, x)


@jax.custom_vjp
def _added(product: jax.Array, bias: jax.Array) -> jax.Array:
    return product + bias


def _added_backward(shape: tuple[int, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    def step(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        return (total + row.astype(jnp.bfloat16)).astype(jnp.bfloat16), None

    total, _ = jax.lax.scan(step, jnp.zeros(shape, jnp.bfloat16), dy.reshape(-1, *shape))
    return dy, total.astype(dy.dtype)


_added.defvjp(lambda product, bias: (product + bias, bias.shape), _added_backward)


def _bias_gradient_in_bfloat16(function: Function) -> Function:
    return lambda arrays, x: _added(x @ arrays["kernel"], arrays["bias"])


def _with_tf32_operands(function: Function) -> Function:
    def rounded(array: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=10)

    return lambda arrays, x: function({**arrays, "kernel": rounded(arrays["kernel"])}, rounded(x))


def _truncated(results: Arrays) -> Arrays:
    """Keep the bits that a bfloat16 has and drops the rest without rounding; the last one of a bfloat16 itself."""
    y = results["y"]
    mantissa, exponent = np.frexp(y.astype(np.float64))
    bits = 2.0 ** (7 if y.dtype.itemsize == 2 else 8)
    return {"y": np.ldexp(np.trunc(mantissa * bits) / bits, exponent).astype(y.dtype)}


def _scaled(array: np.ndarray, factor: float, where: Any = ...) -> np.ndarray:
    array = array.copy()
    array[where] = (array[where].astype(np.float64) * factor).astype(array.dtype)
    return array


def _one_element(results: Arrays) -> Arrays:
    return {"y": _scaled(results["y"], 1.01, np.unravel_index(np.abs(results["y"]).argmax(), results["y"].shape))}


def _one_nan(results: Arrays) -> Arrays:
    return {"y": _scaled(results["y"], np.nan, (0,) * results["y"].ndim)}


def _epsilon() -> dict[str, Any]:
    return {"flax_module": nnx.LayerNorm(16, epsilon=1e-5, rngs=nnx.Rngs(0))}


def _dropout() -> dict[str, Any]:
    module = nnx.MultiHeadAttention(4, 16, decode=False, dropout_rate=0.1, deterministic=False, rngs=nnx.Rngs(0))
    return {"flax_module": module}


def _gates_exchanged(arrays: Arrays) -> Arrays:
    other = {"ir": "iz", "iz": "ir", "hr": "hz", "hz": "hr"}
    return {
        name.replace(f".{gate}.", f".{other[gate]}."): array
        for name, array in arrays.items()
        for gate in other
        if f".{gate}." in name
    }


def _exchanged(*leaves: str) -> Edit:
    names = [(f"query.{leaf}", f"key.{leaf}") for leaf in leaves]
    return lambda arrays: {a: arrays[b] for a, b in names} | {b: arrays[a] for a, b in names}


_HN = "GRUCell_0.hn.kernel"
DEFECTS: tuple[Defect, ...] = (
    Defect(
        "transposed kernel",
        "gru_cell",
        parameters=lambda arrays: {_HN: arrays[_HN].T.copy()},
        cause="the kernel GRUCell_0.hn.kernel is transposed",
    ),
    Defect("wrong gate order", "gru_cell", parameters=_gates_exchanged, cause="come in the order 1, 0, 2"),
    Defect(
        "missing bias",
        "linear",
        parameters=lambda arrays: {"bias": np.zeros_like(arrays["bias"])},
        cause="bias has no effect on the flax side",
    ),
    Defect("epsilon 1e-5 for 1e-6", "layer_norm", module=_epsilon, cause="epsilon: the torch side uses 1e-06"),
    Defect(
        "kernel of one head times 1.01",
        "attention",
        parameters=lambda arrays: {"query.kernel": _scaled(arrays["query.kernel"], 1.01, (slice(None), 1))},
    ),
    Defect(
        "softmax without scale",
        "attention",
        parameters=lambda arrays: {name: _scaled(arrays[name], 2.0) for name in ("query.kernel", "query.bias")},
    ),
    Defect(
        "query and key kernels exchanged",
        "attention",
        parameters=_exchanged("kernel"),
        cause="key.kernel and query.kernel are exchanged",
    ),
    Defect(
        "query and key exchanged",
        "attention",
        parameters=_exchanged("kernel", "bias"),
        cause="key and query are exchanged",
    ),
    Defect("dropout active", "attention", module=_dropout, cause="dropout is active"),
    Defect("output of one element off by 1 percent", "linear", results=_one_element),
    Defect("output scaled by 1.001", "linear", results=lambda r: {"y": _scaled(r["y"], 1.001)}, cause="1.001 times"),
    Defect("output scaled by 1/n", "linear", results=lambda r: {"y": _scaled(r["y"], 0.2)}, cause="0.2 times"),
    Defect("output rolled by one", "linear", results=lambda r: {"y": np.roll(r["y"], 1, axis=-1)}),
    Defect("output truncated", "linear", results=_truncated),
    Defect("bias rolled", "linear", parameters=lambda arrays: {"bias": np.roll(arrays["bias"], 1)}),
    Defect(
        "gradient all zero",
        "linear",
        results=lambda r: {n: 0 * r[n] for n in ("d_kernel",) if n in r},
        cause="the gradient of weight is stopped on the flax side",
    ),
    Defect(
        "bias gradient summed in bf16",
        "linear",
        function=_bias_gradient_in_bfloat16,
        dtypes=("float32",),  # in bfloat16 the program itself says that every partial sum is rounded
        cause="computes d_bias with less precision than float32 promises",
    ),
    Defect(
        "TF32 operands for fp32",
        "linear",
        function=_with_tf32_operands,
        dtypes=("float32",),  # a bfloat16 operand has fewer bits than TF32 keeps
        cause="computes y with less precision than float32 promises",
    ),
    Defect("NaN where the truth is finite", "linear", results=_one_nan),
    Defect("output channels reversed", "conv", results=lambda r: {"y": r["y"][..., ::-1].copy()}),
    Defect(
        "gradient stopped for one parameter",
        "layer_norm",
        function=_stopped,
        cause="the gradient of bias is stopped on the flax side",
    ),
    Defect(
        "gradient of one parameter times 1.01",
        "linear",
        function=_scaled_gradient,
        cause="d_weight: the flax side is 1.01 times",
    ),
    Defect(
        "bf16 compute for fp32",
        "linear",
        function=_in_bfloat16,
        dtypes=("float32",),  # in bfloat16 this is what is asked for
        cause="computes y with less precision than float32 promises",
    ),
    Defect(
        "bf16 accumulation",
        "linear",
        function=_summed_in_bfloat16,
        # In bfloat16 the program itself says that every partial sum is rounded, and is judged as such.
        dtypes=("float32",),
        cause="computes y with less precision than float32 promises",
    ),
)


@dataclass(frozen=True)
class Killing:
    """Hold the outcome for one defect in one dtype."""

    name: str
    dtype: str
    killed: bool
    likely_cause: str
    cause_named: bool


def score(dtypes: tuple[str, ...] = ("float32", "bfloat16"), seed: int = 0, name: str = "") -> Iterator[Killing]:
    """Plant every defect, or the one of this name, and judge it in each of these dtypes in which it matters."""
    for defect in DEFECTS:
        if name and defect.name != name:
            continue
        chosen = tuple(dtype for dtype in dtypes if dtype in defect.dtypes)
        if not chosen:
            continue
        report = judge_pair(planted(defect), seed, chosen)
        named = defect.cause in report.likely_cause
        for dtype in chosen:
            # Each dtype's verdict rests on its own rows and on the float64 leg, which is part of every check.
            killed = any(row.status == "mismatch" and row.dtype in (dtype, "float64") for row in report.rows)
            yield Killing(
                f"{defect.example}: {defect.name}", dtype, killed or report.random, report.likely_cause, named
            )
