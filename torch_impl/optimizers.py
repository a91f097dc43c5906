"""Optimisers that read shapes: what they see as n matrices and n vectors, as they would of n `nn.Linear`."""

import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_impl.array_types import kind_of, shown
from torch_impl.checkpoints import of_partition
from torch_impl.layer import PartitionedLinear
from torch_impl.masked_layer import MaskedPartitionedLinear
from torch_impl.packing import Packing
from torch_impl.partitions import EachPartition
from torch_impl.validation import check_materialised

Layer: TypeAlias = PartitionedLinear | MaskedPartitionedLinear

# Parameters of a layer that hold all partitions' values: its own, or those of what prunes or parametrises it.
_OF_PARTITIONS = re.compile(r"(?:parametrizations\.)?(weight|bias)(?:_orig|\.original[0-9]*)?")


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

    def __deepcopy__(self, memo: dict[int, Any]) -> "PartitionParameter":
        return PartitionParameter.of(copy.deepcopy(self._owner, memo), self._share)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return PartitionParameter.of, (self._owner, self._share)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function as for every parameter, and fused steps on copies where their kernels would misread memory."""
        run = functools.partial(torch._C._disabled_torch_function_impl, func, types)
        if not getattr(func, "__name__", "").startswith("_fused_"):
            return run(args, kwargs or {})
        # They take all tensors of a parameter for one stretch of memory in one order: those of a block are none, and
        # the moments of a list's optimiser lie in the order of a linear.
        shapes = [own.shape for own in args[0]]
        lists = [several for several in args if [getattr(one, "shape", None) for one in several] == shapes]
        alike = all(len({one.stride() for one in each}) == 1 for each in zip(*lists, strict=True))
        if alike and all(torch.ops.aten.is_non_overlapping_and_dense(own) for own in args[0]):
            return run(args, kwargs or {})
        copies = {id(several): [one.contiguous() for one in several] for several in lists}
        result = run(tuple(copies.get(id(several), several) for several in args), kwargs or {})
        for several in lists:
            for one, copied in zip(several, copies[id(several)], strict=True):
                if one is not copied:
                    one.copy_(copied)
        return result

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

    Names and order are those that a list of `nn.Linear` in the layer's place would have, "heads.0.weight" first, so
    that the state of an optimiser of the list can be loaded. Muon, Adafactor, LAMB and rules by number of axes treat
    them as n `nn.Linear`; other parameters are themselves. A step costs n times as many kernels, so optimisers that
    work element by element are faster on `module.parameters()`.

    Args:
        module: A layer, or a model with layers; moved to its device first.

    Returns:
        Name -> parameter; those of partitions share the memory of the layer's parameters and of their gradients.

    Raises:
        TypeError: If `module` is no module.
        ValueError: If a layer's parameters hold no values here (meta device, or sharded), or are parametrised by what
            sees them as one matrix.
    """
    _check_module(module)
    layers, owners = dict(_layers(module)), {}
    for prefix, layer in layers.items():
        for own, parameter in layer.named_parameters():
            owners.setdefault(id(parameter), (prefix, own))
    found: dict[str, nn.Parameter] = {}
    taken: set[str] = set()
    for name, parameter in module.named_parameters():
        prefix = owners[id(parameter)][0] if id(parameter) in owners else None
        if prefix is None:
            found[name] = parameter
        elif prefix not in taken:
            taken.add(prefix)
            found |= _taken_apart(prefix, layers[prefix], owners)
    return found


def _taken_apart(prefix: str, layer: Layer, owners: Mapping[int, tuple[str, str]]) -> dict[str, nn.Parameter]:
    """Return a layer's parameters in the order of those of a list: all of one partition before those of the next."""
    each: dict[str, nn.Parameter] = {}
    found: dict[str, nn.Parameter] = {}
    for own, parameter in layer.named_parameters():
        if owners[id(parameter)] != (prefix, own):
            continue  # it is shared with another layer, which has it
        if _OF_PARTITIONS.fullmatch(own) and _is_stacked(layer, own):
            check_materialised({own: parameter})
            each[own] = parameter
        elif ".chains." in own or not own.startswith(("parametrizations.", "weight", "bias")):
            found[prefix + own] = parameter  # of one partition's own parametrization, or of a class of the user's
        else:
            raise ValueError(
                f"`module`: expected parametrizations of {prefix.removesuffix('.') or 'the layer'} that were made for "
                f"each partition, got its parameter {own!r}; use for_each_partition_."
            )
    dense = isinstance(layer, MaskedPartitionedLinear)
    place: dict[str, Any] = {"block": (layer.out_features, layer.in_features)} if dense else {"packing": layer.packing}
    parts = {
        f"{prefix}{k}.{own}": PartitionParameter.of(parameter, functools.partial(_share, own=own, k=k, **place))
        for k in range(layer.num_partitions)
        for own, parameter in each.items()
    }
    return parts | found


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
    kinds: dict[int, str] = {}
    for _, layer in _layers(module):
        for own, parameter in layer.named_parameters():
            # Stacked or packed, their axes do not say it; nor do those of pruned and parametrised ones.
            if match := _OF_PARTITIONS.fullmatch(own):
                kinds[id(parameter)] = match[1]
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in module.parameters():
        kind = kinds.get(id(parameter), "bias" if parameter.ndim < 2 else "weight")
        groups[kind == "bias"].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module`: expected an nn.Module, got {kind_of(module)}; pass the model itself.")


def _layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    for name, layer in module.named_modules():
        if isinstance(layer, PartitionedLinear | MaskedPartitionedLinear):
            yield f"{name}." if name else "", layer


def _is_stacked(layer: Layer, own: str) -> bool:
    """Say whether a parameter has all partitions' values in an order that is known."""
    if not own.startswith("parametrizations."):
        return True
    parametrizations: Any = layer.get_submodule(own.rpartition(".")[0])
    return isinstance(parametrizations[0], EachPartition)


def _share(
    whole: Tensor, *, own: str, k: int, packing: Packing | None = None, block: tuple[int, int] | None = None
) -> Tensor:
    """Cut one partition's share out of a parameter or its gradient, as a linear has it; a dense one has blocks."""
    if own.startswith("parametrizations."):
        return whole[k]  # which `EachPartition` keeps as those of linears
    matrix = own.startswith("weight")
    if block is None:
        part = of_partition(whole, "weight" if matrix else "bias", k, packing)
        return part.mT if matrix else part
    o, i = block
    rows = whole[k * o : (k + 1) * o]
    return rows[:, k * i : (k + 1) * i] if matrix else rows
