"""Utilities for one `nn.Linear`, used on each partition of a layer: initialisers, parametrizations, pruning."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from torch_impl.array_types import kind_of, said
from torch_impl.checkpoints import of_partition
from torch_impl.layer import PartitionedLinear
from torch_impl.linears import joined, linears_from_partitions
from torch_impl.parameters import check_writable


class EachPartition(nn.Module):
    """The parametrization of a stacked parameter by one of each partition, in the orientation of `nn.Linear`.

    Args:
        chains: The parametrizations of each partition, in the order in which they are computed.
    """

    def __init__(self, chains: list[list[nn.Module]]) -> None:
        super().__init__()
        self.chains: Any = nn.ModuleList(nn.ModuleList(chain) for chain in chains)

    def forward(self, *originals: Tensor) -> Tensor:
        """Compute the stacked parameter from the stacked originals."""
        values = []
        for k, (first, *others) in enumerate(self.chains):
            value = first(*(original[k] for original in originals))
            for parametrization in others:
                value = parametrization(value)
            values.append(_turned(value))
        return torch.stack(values)

    def right_inverse(self, value: Tensor) -> Any:
        """Return stacked originals of which `value` is computed."""
        originals = []
        for part, chain in zip(value, self.chains, strict=True):
            original: Any = _turned(part)
            for parametrization in reversed(chain):
                inverse = getattr(parametrization, "right_inverse", None)
                original = original if inverse is None else inverse(original)
            originals.append(original)
        if isinstance(originals[0], Tensor):
            return torch.stack(originals)
        return tuple(map(torch.stack, zip(*originals, strict=True)))


def for_each_partition_(layer: PartitionedLinear, function: Callable[[nn.Linear], Any]) -> PartitionedLinear:
    """Call a function on an `nn.Linear` of each partition, and put what it did with it into the layer.

    The function may change the weight (out, in) and bias (out,) in place, as `torch.nn.init.xavier_uniform_` does;
    register parametrizations, as `torch.nn.utils.parametrizations.spectral_norm` does; or prune, as
    `torch.nn.utils.prune.l1_unstructured` does. The layer then is parametrised or pruned itself, with the same modules
    for each partition, or the same masks. On the stacked weight these utilities would see one matrix of other fans,
    norms and quantiles.

    Args:
        layer: The layer, itself neither parametrised nor pruned.
        function: Called n times; what it returns is ignored.

    Returns:
        The same layer.

    Raises:
        TypeError: If `layer` is no `PartitionedLinear` or `function` cannot be called, or the layer has hooks.
        ValueError: If the function raises, or does what is none of the three, or not the same with each partition; or
            the layer's parameters cannot be written to. The layer is unchanged.
    """
    if not isinstance(layer, PartitionedLinear):
        raise TypeError(f"`layer`: expected a PartitionedLinear, got {kind_of(layer)}; convert it first.")
    if not callable(function):
        raise TypeError(f"`function`: expected a function of an nn.Linear, got {kind_of(function)}; pass a function.")
    views = layer.partition_views()
    check_writable(views)
    linears: list[Any] = list(linears_from_partitions(views, like=layer))
    for linear in linears:
        try:
            with torch.no_grad():
                function(linear)
        except Exception as error:
            raise ValueError(
                f"`function`: expected a function that takes one partition's nn.Linear({linear.in_features}, "
                f"{linear.out_features}), got an error from it ({said(error)}); pass a function for this shape."
            ) from error
    packing = layer.packing
    done = {
        name: [_what_was_done(own, name, of_partition(view, name, k, packing)) for k, own in enumerate(linears)]
        for name, view in views.items()
    }
    for name, found in done.items():
        if packing is not None and "parametrised" in found:
            raise ValueError(
                f"`function`: expected one that fills or prunes partitions of unequal sizes, got a parametrization of "
                f"the {name}; parametrise layer.to_linears() and train these."
            )
        if len(set(found)) > 1 or None in found:
            raise ValueError(
                f"`function`: expected one that fills, parametrises or prunes each {name} alike, got one that does "
                f"something else; use torch.nn.utils.parametrizations or prune."
            )
    with torch.no_grad():
        for name, view in views.items():
            if done[name][0] == "filled":
                view.copy_(joined([_turned(getattr(linear, name)) for linear in linears], packing))
    for name, (kind, *_) in done.items():
        if kind == "pruned":
            masks = joined([_turned(getattr(linear, f"{name}_mask")) for linear in linears], packing)
            prune.custom_from_mask(layer, name, masks)
        elif kind == "parametrised":
            each = EachPartition([list(linear.parametrizations[name]) for linear in linears])
            # In training, spectral_norm would take one more step of its iteration.
            training, layer.training = layer.training, False
            parametrize.register_parametrization(layer, name, each)
            layer.train(training)
    return layer


def _turned(part: Tensor) -> Tensor:
    return part.mT if part.ndim == 2 else part


def _what_was_done(linear: nn.Module, name: str, part: Tensor) -> str | None:
    if parametrize.is_parametrized(linear, name):
        return "parametrised"
    if f"{name}_mask" in dict(linear.named_buffers(recurse=False)):
        return "pruned"
    found = linear._parameters.get(name)
    plain = found is not None and found.shape == _turned(part).shape and found.dtype == part.dtype
    hooks = [*linear._forward_pre_hooks.values(), *linear._forward_hooks.values()]
    return "filled" if plain and all(isinstance(hook, prune.BasePruningMethod) for hook in hooks) else None
