"""torch competitors that are modules: einops EinMix, a functional ensemble of nn.Linear, Keras EinsumDense."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def einmix() -> Function:
    """Einops `EinMix`, holding the given arrays as its weight and bias."""
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
    """`torch.func`'s model ensembling: vmap over `functional_call` of one nn.Linear with stacked parameters."""
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
    """Keras `EinsumDense` on its torch backend, called statelessly with the given arrays."""
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
