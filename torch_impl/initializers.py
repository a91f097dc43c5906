"""Initial values, drawn anew for every partition; the fan-in is that of one partition, never n times it."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_impl.array_types import said, shown
from torch_impl.validation import is_plain

InPlaceInit: TypeAlias = Callable[[Tensor], Any]
"""A function that fills its argument in place, as those of `torch.nn.init` do."""

Init: TypeAlias = str | InPlaceInit | tuple[InPlaceInit, InPlaceInit]
"""A name, a weight initialiser, or a pair (weight initialiser, bias initialiser)."""

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal truncated at -2 and +2."""


def torch_uniform_(tensor: Tensor, in_features: int) -> None:
    """Draw from U(-1/sqrt(in), 1/sqrt(in)), as `torch.nn.Linear` does for its weight and its bias."""
    bound = 1.0 / math.sqrt(in_features)
    tensor.uniform_(-bound, bound)


def flax_truncated_normal_(tensor: Tensor, in_features: int) -> None:
    """Draw from a normal truncated at two of its standard deviations, of resulting std 1/sqrt(in).

    This is `lecun_normal` of JAX with the fan-in of one partition. Drawn in at least fp32 and rounded once, since
    the inverse error function behind it is coarse in bf16 and fp16.
    """
    sigma = 1.0 / (math.sqrt(in_features) * TRUNCATED_STD)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    values = torch.empty(tensor.shape, dtype=wide, device=tensor.device)
    tensor.copy_(nn.init.trunc_normal_(values, std=sigma, a=-2.0 * sigma, b=2.0 * sigma))


def zeros_(tensor: Tensor, in_features: int) -> None:
    """Fill with zeros."""
    tensor.zero_()


INITIALIZERS: Mapping[str, tuple[Callable[[Tensor, int], None], Callable[[Tensor, int], None]]] = MappingProxyType(
    {"torch": (torch_uniform_, torch_uniform_), "flax": (flax_truncated_normal_, zeros_)}
)
"""Name -> (weight initialiser, bias initialiser), each called with all partitions at once and in_features."""


def check_initializer(init: Any) -> None:
    """Refuse what `initialize_` cannot use.

    Raises:
        TypeError: If it is no name, no function and no pair of functions.
        ValueError: If it is an unknown name.
    """
    if isinstance(init, str):
        if init not in INITIALIZERS:
            choices = ", ".join(map(repr, INITIALIZERS))
            raise ValueError(f"`init`: expected one of {choices}, got {shown(init)}; choose one or pass a function.")
    elif not callable(init) and not (isinstance(init, tuple) and len(init) == 2 and all(map(callable, init))):
        raise TypeError(
            f"`init`: expected a name, a function or a pair (weight_init, bias_init), got {shown(init)}; "
            f"pass in-place functions as in torch.nn.init."
        )


@torch.no_grad()
def initialize_(init: Init, weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor] | None) -> None:
    """Fill the parameters of all partitions in place: all of them, or none.

    A custom weight initialiser is called once per partition on a tensor of shape (out, in), as `torch.nn.Linear`
    holds its weight, so that `torch.nn.init` computes the fans of one partition; a custom bias initialiser once per
    partition on a tensor of shape (out,). What they fill is copied into the parameters once all are filled. A lone
    weight initialiser leaves the bias to "torch".

    Args:
        init: "torch", "flax", a weight initialiser, or a pair (weight initialiser, bias initialiser).
        weight: View of the weights, shape (n, out, in), any strides; or a view (out_k, in_k) of each.
        bias: View of the biases, shape (n, out), any strides, or a view (out_k,) of each; or None.

    Raises:
        TypeError: If a custom initialiser returns another tensor, or puts one in the place of its argument.
        ValueError: If a custom initialiser raises for the shape of one partition, or leaves elements unfilled.
    """
    check_initializer(init)
    # Partitions of one size are filled at once.
    weights = [weight] if isinstance(weight, Tensor) else [part.unsqueeze(0) for part in weight]
    biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else [part.unsqueeze(0) for part in bias]
    fan_ins = [part.shape[-1] for part in weights]
    if isinstance(init, str):
        for fill, parts in zip(INITIALIZERS[init], (weights, biases), strict=True):
            for part, fan_in in zip(parts, fan_ins, strict=False):
                fill(part, fan_in)
        return
    weight_filler, bias_filler = init if isinstance(init, tuple) else (init, None)
    weight_values = [_filled("weight_init", weight_filler, part) for part in weights]
    if bias_filler is not None:
        bias_values = [_filled("bias_init", bias_filler, part) for part in biases]
        for part, values in zip(biases, bias_values, strict=True):
            part.copy_(values)
    else:
        for part, fan_in in zip(biases, fan_ins, strict=False):
            torch_uniform_(part, fan_in)
    for part, values in zip(weights, weight_values, strict=True):
        part.copy_(values)


@torch.no_grad()
def reset_shards_(layer: Any) -> bool:
    """Draw the parameters of a layer anew whose shards lie on several devices, and say whether they do.

    Partitions that a device holds in parts cannot be filled there. Every process draws whole parameters, and the shards
    are those of the first one: the values of one process of its seed.
    """
    shards = {name: parameter for name, parameter in layer._parameters.items() if hasattr(parameter, "placements")}
    if not shards or any(parameter is not None and name not in shards for name, parameter in layer._parameters.items()):
        return False
    from torch.distributed.tensor import distribute_tensor

    # Not by copy.copy, which FSDP refuses.
    drawn = {n: nn.Parameter(one.to_local().new_empty(one.shape)) for n, one in shards.items()}
    whole = object.__new__(type(layer))
    whole.__dict__ = layer.__dict__ | {"_parameters": dict(layer._parameters) | drawn}
    whole.reset_parameters()
    for name, shard in shards.items():
        if not shard.is_meta:
            shard.copy_(distribute_tensor(drawn[name].detach(), shard.device_mesh, shard.placements))
    return True


def _filled(argument: str, fill: InPlaceInit, views: Tensor) -> Tensor:
    # NaN shows what the function leaves alone; otherwise that would be whatever the memory held before.
    values = torch.full_like(views, math.nan, memory_format=torch.contiguous_format)
    shape = tuple(values.shape[1:])
    for partition in range(len(values)):
        own, expected = values[partition], values[partition]
        try:
            result = fill(own)
        except Exception as error:
            raise ValueError(
                f"`{argument}`: expected a function that fills one partition's tensor of shape {shape}, got an error "
                f"from it ({said(error)}); pass a function for this shape."
            ) from error
        for what, tensor in (("puts another tensor in its place", own), ("returns another tensor", result)):
            if isinstance(tensor, Tensor) and _place(tensor) != _place(expected):
                raise TypeError(
                    f"`{argument}`: expected a function that fills its argument of shape {shape} in place, got one "
                    f"that {what}; use view.copy_(...)."
                )
    if is_plain(values) and not values.is_meta and values.isnan().any():
        raise ValueError(
            f"`{argument}`: expected a function that fills the whole of one partition's tensor of shape {shape}, got "
            f"one that leaves NaN in it; set every element to a number."
        )
    return values


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's elements lie and how they are read; a fake tensor has no address."""
    address = tensor.data_ptr() if is_plain(tensor) else None
    return address, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def empty_parameter(shape: tuple[int, ...], device: Any, dtype: torch.dtype | None) -> nn.Parameter:
    """Allocate a parameter whose values are still to be drawn.

    Raises:
        MemoryError: If there is no room for it.
    """
    try:
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
    except (RuntimeError, MemoryError) as error:
        raise MemoryError(
            f"`num_partitions`: expected sizes that fit into memory, got a parameter of shape {shape} ({said(error)}); "
            f"use smaller ones."
        ) from error
