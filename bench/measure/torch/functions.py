"""The torch competitors: the registry's implementations, the functions and modules users write instead, the yardstick.

Competitors beside the registry are made by builders: one that is a module keeps it as long as the competitor lives.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.measure.switches import missing_competitors
from bench.measure.timer import Task
from bench.plan.workloads import SHARED
from parity_tests.judge.inputs import Sizes
from torch_impl.packing import packing_of
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


def linears() -> Function:
    """Return a loop over `nn.Linear`, one for each partition: what users have for partitions of unequal sizes.

    Its weights (out, in) and biases (out,) are tuples: each is a parameter of its own, as those of modules are.
    """
    held: dict[int, tuple[list[int], list[nn.Module]]] = {}

    def build(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[list[int], list[nn.Module]]:
        modules = []
        for weight, bias in zip(weights, biases, strict=True):
            module: Any = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            del module.weight, module.bias
            module.weight, module.bias = weight, bias
            modules.append(module)
        return [weight.shape[1] for weight in weights], modules

    def run(x: Tensor, weights: Any, biases: Any) -> Tensor:
        if torch.compiler.is_compiling():
            parts = x.split([weight.shape[1] for weight in weights], -1)
            return torch.cat([functional.linear(*one) for one in zip(parts, weights, biases, strict=True)], -1)
        # The same tuple at every call: building modules is no part of one.
        if id(weights) not in held:
            held[id(weights)] = build(weights, biases)
        sizes, modules = held[id(weights)]
        return torch.cat([module(part) for module, part in zip(modules, x.split(sizes, -1), strict=True)], -1)

    return run


def listed(arguments: tuple[Tensor, ...], sizes: Sizes) -> tuple[Any, ...]:
    """Return x, weights, biases and dy, with parameters that are tuples; see `linears`."""
    x, weight, bias, cotangent = arguments
    pairs = zip(sizes.places("weight"), sizes.in_features, sizes.out_features, strict=True)
    weights = tuple(weight[place].view(i, o).T.contiguous() for place, i, o in pairs)
    return x, weights, tuple(bias[place].clone() for place in sizes.places("bias")), cotangent


# Their parameters are lists, see `listed`.
UNEQUAL_STOCK: Mapping[str, Callable[[], Function]] = MappingProxyType({"stock:nn.Linear": linears})


def _expanded(function: Function) -> Function:
    """Give every partition the input that all share, by a view: what is copied is up to the function."""
    return lambda x, weight, bias: function(x[:, None].expand(-1, len(weight), -1), weight, bias)


def resolve(task: Task) -> Function:
    """Return the function that a competitor's name means, for the sizes and the layout of a task.

    An implementation is its formulation, without the checks of the public function, as the stock competitors are: under
    jit and torch.compile those checks run once, while tracing, and eager timings would otherwise compare checks.

    Raises:
        ValueError: for a name that is none.
    """
    name, unequal = task.implementation, task.sizes is not None
    if name in implementation_names(unequal=unequal):
        entry = get_implementation(name, unequal=unequal)
        if task.sizes is not None:
            packing = packing_of(task.sizes.in_features, task.sizes.out_features)
            return lambda x, weight, bias: entry.run(x, weight, bias, packing)
        return entry.run_shared if task.layout == SHARED and entry.run_shared else entry.run
    known = {**(UNEQUAL_STOCK if unequal else STOCK), **YARDSTICKS}
    if name not in known:
        choices = ", ".join((*implementation_names(unequal=unequal), *known))
        raise ValueError(f"implementation: expected one of {choices}, got {name!r}; choose one of these.")
    return _expanded(known[name]()) if task.layout == SHARED else known[name]()
