"""The torch competitors: the registry's implementations, what users write instead, the article's dense yardstick.

What users write is a table of builders: a competitor that is a module keeps it as long as the competitor lives.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from bench.measure.packages import missing_competitors
from bench.measure.torch.modules import einmix, functional_ensemble, keras_einsum_dense
from torch_impl.registry import get_implementation, implementation_names

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def _bmm_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1) + bias


def _baddbmm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x.transpose(0, 1), weight).transpose(0, 1)


def _einsum(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("bni,nio->bno", x, weight) + bias


def _dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One dense map over all features (case A of the article), on arrays with a partition axis of size 1."""
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
    """Returns the function that a competitor's name means.

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
