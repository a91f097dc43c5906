"""Optimisers that read shapes: what they see as n matrices and n vectors, as they would of n `nn.Linear`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_impl.array_types import kind_of, shown
from torch_impl.checkpoints import of_partition
from torch_impl.layer import PartitionedLinear
from torch_impl.masked_layer import MaskedPartitionedLinear
from torch_impl.validation import check_materialised


class PartitionParameter(nn.Parameter):
    """One partition's share of a layer's parameter: a view of its values, whose gradient is a view of its gradient.

    Made by `named_partition_parameters`. An optimiser's step changes the layer, and its `zero_grad` clears the layer's
    gradient.
    """

    _owner: nn.Parameter
    _share: Callable[[Tensor], Tensor]
    _address: int

    @classmethod
    def of(cls, owner: nn.Parameter, share: Callable[[Tensor], Tensor]) -> "PartitionParameter":
        """Return the part of a parameter that `share` cuts out of it, as of its gradient."""
        own = cls(share(owner.detach()), requires_grad=owner.requires_grad)
        own._owner, own._share, own._address = owner, share, owner.data_ptr()
        return own

    @property
    def grad(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The partition's share of the gradient of the layer's parameter."""
        if self._owner.data_ptr() != self._address:
            # A step would be lost.
            raise ValueError(
                "`params`: expected the parameters of partitions where they were made, got a layer that was moved or "
                "replaced; make the optimiser after moving it."
            )
        return None if self._owner.grad is None else self._share(self._owner.grad)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if value is None:
            self._owner.grad = None
            return
        if self._owner.grad is None:
            self._owner.grad = torch.zeros_like(self._owner)
        self._share(self._owner.grad).copy_(value)


def named_partition_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's parameters with those of its layers taken apart: n matrices (out, in) and n vectors (out,).

    Their names are those that a list of `nn.Linear` in the layer's place would have, such as "heads.0.weight". Muon,
    Adafactor, LAMB and rules by number of axes treat them as n `nn.Linear`; other parameters are themselves. A step
    costs n times as many kernels, so optimisers that work element by element are faster on `module.parameters()`.

    Args:
        module: A layer, or a model with layers; moved to its device first.

    Returns:
        Name -> parameter; those of partitions share the memory of the layer's parameters and of their gradients.

    Raises:
        TypeError: If `module` is no module.
        ValueError: If a layer's parameters hold no values here (meta device, or sharded).
    """
    _check_module(module)
    owners = {id(parameter): own for own in _layers(module) for parameter in own[1]._parameters.values()}
    found: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if id(parameter) not in owners:
            found[name] = parameter
            continue
        prefix, layer = owners[id(parameter)]
        own = name.removeprefix(prefix)
        check_materialised({own: parameter})
        for k in range(layer.num_partitions):
            found[f"{prefix}{k}.{own}"] = PartitionParameter.of(parameter, _share(layer, own, k))
    return found


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices, which decay, and vectors, which do not, a layer's (n, out) bias included.

    The rule "decay every parameter with at least two axes", as n `nn.Linear` would have it; packed matrices of unequal
    sizes decay, too. The groups hold a layer's whole parameters, for optimisers that work element by element, such as
    AdamW.

    Raises:
        TypeError: If `module` is no module, or `weight_decay` no number.
        ValueError: If `weight_decay` is negative.
    """
    _check_module(module)
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, int | float):
        raise TypeError(f"`weight_decay`: expected a number, got {shown(weight_decay)}; pass one such as 0.1.")
    if not weight_decay >= 0:
        raise ValueError(f"`weight_decay`: expected at least 0, got {shown(weight_decay)}; pass one such as 0.1.")
    vectors = {id(layer.bias) for _, layer in _layers(module)}
    # Packed, the matrices of unequal sizes have one axis.
    matrices = {id(layer.weight) for _, layer in _layers(module)}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in module.parameters():
        vector = id(parameter) in vectors or (parameter.ndim < 2 and id(parameter) not in matrices)
        groups[vector].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module`: expected an nn.Module, got {kind_of(module)}; pass the model itself.")


def _layers(module: nn.Module) -> Iterator[tuple[str, PartitionedLinear | MaskedPartitionedLinear]]:
    for name, layer in module.named_modules():
        if isinstance(layer, PartitionedLinear | MaskedPartitionedLinear):
            yield f"{name}." if name else "", layer


def _share(layer: PartitionedLinear | MaskedPartitionedLinear, name: str, k: int) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, PartitionedLinear):
        part = functools.partial(of_partition, name=name, k=k, packing=layer.packing)
        return lambda whole: part(whole).mT if name == "weight" else part(whole)
    rows = slice(k * layer.out_features, (k + 1) * layer.out_features)
    columns = slice(k * layer.in_features, (k + 1) * layer.in_features)
    return lambda whole: whole[rows, columns] if name == "weight" else whole[rows]
