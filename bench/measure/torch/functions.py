"""The torch competitors: the registry's implementations, the functions and modules users write instead, the yardstick.

Competitors beside the registry are made by builders: one that is a module keeps it as long as the competitor lives.
"""

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure.switches import missing_competitors
from torch_impl.registry import get_implementation, implementation_names

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def einmix() -> Function:
    """Return einops `EinMix`, holding the given arrays as its weight and bias."""
    from einops.layers.torch import EinMix

    # One competitor is called with one set of arrays, again and again; the module goes when the competitor goes.
    held: dict[str, nn.Module] = {}

    def build(weight: Tensor) -> nn.Module:
        n, i, o = weight.shape
        # No storage and no random numbers: its own parameters are replaced at once.
        with torch.device("meta"):
            module = EinMix("b n i -> b n o", weight_shape="n i o", bias_shape="n o", n=n, i=i, o=o)
        del module.weight, module.bias
        return module

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if "module" not in held:
            held["module"] = build(weight)
        module = held["module"]
        # A plain attribute costs a microsecond; torch.func.functional_call, ten times that, would be charged to EinMix.
        module.weight, module.bias = weight, bias[None]
        # Not module(x): torch's counter of operations hooks into that, and fails where x itself is differentiated.
        return module.forward(x)

    return run


def functional_ensemble() -> Function:
    """Return `torch.func`'s ensemble: vmap over `functional_call` of one nn.Linear with stacked parameters."""
    held: dict[str, nn.Module] = {}

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if "base" not in held:
            held["base"] = nn.Linear(weight.shape[1], weight.shape[2], device="meta")
        base = held["base"]

        def member(parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
            return torch.func.functional_call(base, parameters, (rows,))

        # nn.Linear keeps (out, in): a transposed view of the given array, not a copy.
        stacked = {"weight": weight.mT, "bias": bias}
        return torch.vmap(member, in_dims=(0, 1), out_dims=1)(stacked, x)

    return run


def keras_einsum_dense() -> Function:
    """Return Keras `EinsumDense` on its torch backend, called statelessly with the given arrays."""
    # Read once, when keras is imported; a worker runs one framework only.
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    held: dict[str, keras.Layer] = {}
    # No part of a compiled program. Not a decorator: that would import the compiler into every worker, for seconds.
    disable: Any = torch.compiler.disable
    build = disable(_built)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if "layer" not in held:
            held["layer"] = build(keras, x, weight)
        return held["layer"].stateless_call([weight, bias], [], x)[0]

    return run


def _built(keras, x: Tensor, weight: Tensor):
    n, _, o = weight.shape
    layer = keras.layers.EinsumDense(
        "bni,nio->bno", output_shape=(n, o), bias_axes="no", dtype=str(weight.dtype).removeprefix("torch.")
    )
    with keras.device("meta"):
        layer.build(tuple(x.shape))
    return layer


def _bmm_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1) + bias


def _baddbmm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x.transpose(0, 1), weight).transpose(0, 1)


def _einsum(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("bni,nio->bno", x, weight) + bias


def _dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Run one dense map over all features (case A of the article), on arrays with a partition axis of size 1."""
    return torch.addmm(bias[0], x[:, 0], weight[0])[:, None]


_KNOWN: Mapping[str, Callable[[], Function]] = {
    "stock:bmm+bias": lambda: _bmm_bias,
    "stock:baddbmm": lambda: _baddbmm,
    "stock:einsum": lambda: _einsum,
    "stock:torch.func": functional_ensemble,
    "stock:einops.EinMix": einmix,
    "stock:keras.EinsumDense": keras_einsum_dense,
}
MISSING: Mapping[str, str] = MappingProxyType(missing_competitors(_KNOWN))
STOCK: Mapping[str, Callable[[], Function]] = MappingProxyType(
    {name: build for name, build in _KNOWN.items() if name not in MISSING}
)
YARDSTICKS: Mapping[str, Callable[[], Function]] = MappingProxyType({"dense": lambda: _dense})


def resolve(name: str) -> Function:
    """Return the function that a competitor's name means.

    An implementation is its formulation, without the checks of the public function, as the stock competitors are: under
    jit and torch.compile those checks run once, while tracing, and eager timings would otherwise compare checks.

    Raises:
        ValueError: for a name that is none.
    """
    if name in implementation_names():
        return get_implementation(name).run
    known = {**STOCK, **YARDSTICKS}
    if name not in known:
        choices = ", ".join((*implementation_names(), *known))
        raise ValueError(f"implementation: expected one of {choices}, got {name!r}; choose one of these.")
    return known[name]()
