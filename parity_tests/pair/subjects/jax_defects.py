"""Defects planted in the flax side of the example pairs: each spoils a correct module the way real ports go wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from parity_tests.pair.examples import EXAMPLES
from parity_tests.pair.legs import Pair
from parity_tests.pair.side import make_side
from parity_tests.pair.subjects.jax import JaxSide
from parity_tests.pair.subjects.jax_modules import Function

Change = Callable[[Function], Function]


@dataclass(frozen=True)
class Defect:
    """One way to be wrong.

    Attributes:
        name: what was planted.
        example: the pair whose flax side is spoiled.
        change: spoils the flat function of the flax side; None if ``module`` is wrong already.
        module: builds another flax side in place of the example's.
        dtypes: storage dtypes in which the defect changes the function; elsewhere it is equivalent to correct code.
        cause: a part of the likely cause that the report must name; empty where no hypothesis covers the defect.
    """

    name: str
    example: str
    change: Change | None = None
    module: Callable[[], dict[str, Any]] | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    cause: str = ""


def _on_parameters(edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    return lambda function: lambda arrays, *inputs: function({**arrays, **edit(arrays)}, *inputs)


def _on_output(edit: Callable[[jax.Array], jax.Array]) -> Change:
    return lambda function: lambda arrays, *inputs: edit(function(arrays, *inputs))


def _in_bfloat16(function: Function) -> Function:
    def spoiled(arrays: dict[str, Any], *inputs: jax.Array) -> jax.Array:
        narrow = {name: array.astype(jnp.bfloat16) for name, array in arrays.items()}
        return function(narrow, *(x.astype(jnp.bfloat16) for x in inputs)).astype(inputs[0].dtype)

    return spoiled


def _summed_in_bfloat16(function: Function) -> Function:
    """Sums x W with a running sum that is rounded to bfloat16 after every product, then adds b."""
    del function

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


def _one_element(y: jax.Array) -> jax.Array:
    return y.at[(0,) * y.ndim].multiply(1.01)


def _epsilon() -> dict[str, Any]:
    return {"flax_module": nnx.LayerNorm(16, epsilon=1e-5, rngs=nnx.Rngs(0))}


def _dropout() -> dict[str, Any]:
    module = nnx.MultiHeadAttention(4, 16, decode=False, dropout_rate=0.1, deterministic=False, rngs=nnx.Rngs(0))
    return {"flax_module": module}


def _gates_exchanged(arrays: dict[str, Any]) -> dict[str, Any]:
    pairs = {"ir": "iz", "iz": "ir", "hr": "hz", "hz": "hr"}
    return {
        name.replace(f".{gate}.", f".{pairs[gate]}."): array
        for name, array in arrays.items()
        for gate in pairs
        if f".{gate}." in name
    }


_kernels_exchanged = _on_parameters(lambda a: {"query.kernel": a["key.kernel"], "key.kernel": a["query.kernel"]})
_projections_exchanged = _on_parameters(
    lambda a: {
        f"{first}.{leaf}": a[f"{second}.{leaf}"]
        for first, second in (("query", "key"), ("key", "query"))
        for leaf in ("kernel", "bias")
    }
)
_GRU = "GRUCell_0."
DEFECTS: tuple[Defect, ...] = (
    Defect(
        "transposed kernel",
        "gru_cell",
        _on_parameters(lambda arrays: {f"{_GRU}hn.kernel": arrays[f"{_GRU}hn.kernel"].T}),
        cause="the kernel GRUCell_0.hn.kernel is transposed",
    ),
    Defect("missing bias", "linear", _on_parameters(lambda a: {"bias": 0 * a["bias"]}), cause="bias has no effect"),
    Defect("epsilon 1e-5 for 1e-6", "layer_norm", module=_epsilon, cause="epsilon: the torch side uses 1e-06"),
    Defect("wrong gate order", "gru_cell", _on_parameters(_gates_exchanged), cause="come in the order 1, 0, 2"),
    Defect(
        "kernel of one head times 1.01",
        "attention",
        _on_parameters(lambda a: {"query.kernel": a["query.kernel"].at[:, 1].multiply(1.01)}),
    ),
    Defect(
        "softmax without scale",
        "attention",
        _on_parameters(lambda a: {name: 2 * a[name] for name in ("query.kernel", "query.bias")}),
    ),
    Defect(
        "query and key kernels exchanged",
        "attention",
        _kernels_exchanged,
        cause="query.kernel and key.kernel are exchanged",
    ),
    Defect("query and key exchanged", "attention", _projections_exchanged, cause="query and key are exchanged"),
    Defect("output of one element off by 1 percent", "linear", _on_output(_one_element)),
    Defect("output scaled by 1.001", "linear", _on_output(lambda y: y * 1.001), cause="1.001 times"),
    Defect(
        "gradient stopped for one parameter",
        "layer_norm",
        _on_parameters(lambda arrays: {"bias": jax.lax.stop_gradient(arrays["bias"])}),
        cause="the gradient of bias is stopped on the flax side",
    ),
    Defect(
        "gradient of one parameter times 1.01",
        "linear",
        _on_parameters(lambda arrays: {"kernel": _with_scaled_gradient(arrays["kernel"])}),
        cause="d_weight: the flax side is 1.01 times",
    ),
    Defect("dropout active", "attention", module=_dropout, cause="dropout is active"),
    Defect(
        "bf16 compute for fp32",
        "linear",
        _in_bfloat16,
        dtypes=("float32",),  # in bfloat16 this is what is asked for
        cause="computes y in bfloat16, not in float32",
    ),
    Defect("bf16 accumulation", "linear", _summed_in_bfloat16),
    Defect("NaN where the truth is finite", "linear", _on_output(lambda y: jnp.where(y == y.max(), jnp.nan, y))),
    Defect("output channels reversed", "conv", _on_output(lambda y: y[..., ::-1])),
)


def planted(defect: Defect) -> Pair:
    """The example's pair with the defect in its flax side."""
    factory = EXAMPLES[defect.example]
    arguments = factory("torch") | (defect.module() if defect.module else factory("jax")) | factory("pair")
    return Pair(
        name=f"{defect.example} with {defect.name}",
        sides={
            "torch": make_side("torch", arguments, "cpu"),
            "jax": JaxSide(arguments["flax_module"], change=defect.change),
        },
        rules=arguments["params"],
        source=arguments["inputs"],
        input_patterns=arguments.get("input_patterns", {}),
        output_patterns=arguments.get("output_patterns", {}),
    )
