"""Lists of `nn.Linear`, in and out: the pattern that this package replaces, with the checks of such lists."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_impl.validation import check_dtype, check_tensor


def partitions_from_linears(linears: Sequence[nn.Linear] | nn.ModuleList) -> dict[str, Tensor]:
    """Stack n linears, W[n, i, o] = linears[n].weight[o, i], bit for bit.

    Args:
        linears: n `nn.Linear` of equal sizes, dtype, device, bias and `requires_grad`.

    Returns:
        Copies: "weight" (n, in, out) and, if the linears have one, "bias" (n, out), without gradient.

    Raises:
        TypeError: If an element is no plain `nn.Linear`, or the dtypes differ or are not supported.
        ValueError: If there is none, or sizes, bias, device or `requires_grad` differ.
    """
    if not isinstance(linears, Sequence | nn.ModuleList):
        raise TypeError(
            f"`linears`: expected a sequence of nn.Linear, got a {type(linears).__name__}; pass a list or ModuleList."
        )
    if len(linears) == 0:
        raise ValueError("`linears`: expected at least one nn.Linear, got none; pass n of them.")
    traits = [_traits(k, linear) for k, linear in enumerate(linears)]
    check_dtype(traits[0]["dtype"])
    for k, found in enumerate(traits):
        for trait, expected in traits[0].items():
            if found[trait] != expected:
                error = TypeError if trait == "dtype" else ValueError
                raise error(
                    f"`linears[{k}]`: expected {trait}={expected} as in linears[0], got {found[trait]}; make all of "
                    f"them alike."
                )
    return _stacked([dict(linear.named_parameters()) for linear in linears])


def linears_from_partitions(partitions: Mapping[str, Tensor], like: nn.Module) -> nn.ModuleList:
    """Split canonical tensors into n linears, linears[n].weight[o, i] = W[n, i, o], bit for bit.

    Args:
        partitions: "weight" (n, in, out) and, if any, "bias" (n, out).
        like: A module whose parameters "weight" and "bias" give `requires_grad`.

    Returns:
        n `nn.Linear` holding copies, in the dtype and on the device of the weight.
    """
    weight, bias = partitions["weight"], partitions.get("bias")
    num_partitions, in_features, out_features = weight.shape
    linears = nn.ModuleList()
    for k in range(num_partitions):
        # By way of the meta device, so that no random numbers are drawn for values that are overwritten.
        linear = nn.Linear(in_features, out_features, bias is not None, device="meta", dtype=weight.dtype)
        linear = linear.to_empty(device=weight.device)
        for name, parameter in linear.named_parameters():
            with torch.no_grad():
                parameter.copy_(partitions[name][k].T if name == "weight" else partitions[name][k])
            parameter.requires_grad_(like.get_parameter(name).requires_grad)
        linears.append(linear)
    return linears


def state_dict_from_linears(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Turn the state_dict of an `nn.ModuleList` of linears into that of a `PartitionedLinear`, bit for bit.

    Args:
        state_dict: Holds `<prefix>0.weight` (out, in), `<prefix>0.bias` (out,), `<prefix>1.weight` and so on.
        prefix: Such as "heads."; keys that do not start with it are ignored.

    Returns:
        Copies: "weight" (n, in, out) and, if there are biases, "bias" (n, out).

    Raises:
        TypeError: If a value is no floating tensor, or the dtypes differ.
        ValueError: If no key fits, a number is skipped, a key is something else, or shapes or biases differ.
    """
    linears: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        if not key.startswith(prefix):
            continue
        match = re.fullmatch(r"(0|[1-9][0-9]*)\.(weight|bias)", key.removeprefix(prefix))
        if match is None:
            raise ValueError(
                f"`state_dict`: expected keys {prefix}<k>.weight and {prefix}<k>.bias only, got {key!r}; pass the "
                f"prefix of the list."
            )
        linears.setdefault(int(match[1]), {})[match[2]] = tensor
    if not linears or sorted(linears) != list(range(len(linears))):
        raise ValueError(
            f"`state_dict`: expected linears 0 to n - 1 under the prefix {prefix!r}, got {sorted(linears)}; pass a "
            f"complete state_dict."
        )
    for k, tensors in linears.items():
        if "weight" not in tensors or set(tensors) != set(linears[0]):
            raise ValueError(
                f"`state_dict`: expected a weight in every linear and a bias in all or none, got {sorted(tensors)} "
                f"for {prefix}{k}; pass a complete state_dict."
            )
        for name, tensor in tensors.items():
            _check_entry(f"{prefix}{k}.{name}", name, tensor, linears[0]["weight"])
    return _stacked([linears[k] for k in range(len(linears))])


def _stacked(linears: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    partitions = {"weight": torch.stack([linear["weight"].detach().mT for linear in linears])}
    if "bias" in linears[0]:
        partitions["bias"] = torch.stack([linear["bias"].detach() for linear in linears])
    return partitions


def _traits(k: int, linear: Any) -> dict[str, Any]:
    # A parametrised, normalised or pruned linear computes its weight, a hook or an own forward changes the result: a
    # copy of the parameters would silently drop that.
    plain = (
        isinstance(linear, nn.Linear)
        and type(linear).forward is nn.Linear.forward
        and "forward" not in vars(linear)
        and not (linear._forward_pre_hooks or linear._forward_hooks)
        and not parametrize.is_parametrized(linear)
        and {name for name, _ in linear.named_parameters()} <= {"weight", "bias"}
    )
    if not plain:
        raise TypeError(
            f"`linears[{k}]`: expected an nn.Linear without parametrizations, hooks or a forward of its own, got a "
            f"{type(linear).__name__}; convert it first."
        )
    return {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "dtype": linear.weight.dtype,
        "device": linear.weight.device,
        "requires_grad": {name: parameter.requires_grad for name, parameter in linear.named_parameters()},
    }


def _check_entry(key: str, name: str, tensor: Any, weight: Tensor) -> None:
    argument = f"state_dict[{key!r}]"
    check_tensor(argument, tensor)
    symbols, shape = ("(out, in)", weight.shape) if name == "weight" else ("(out,)", weight.shape[:1])
    if tensor.shape != shape or weight.ndim != 2:
        raise ValueError(
            f"`{argument}`: expected shape {symbols} = {tuple(shape)} as in linear 0, got {tuple(tensor.shape)}; make "
            f"the linears alike."
        )
    if tensor.dtype != weight.dtype:
        raise TypeError(
            f"`{argument}`: expected dtype {weight.dtype} as in linear 0, got {tensor.dtype}; make the linears alike."
        )
