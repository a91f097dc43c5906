"""Lists of `nn.Linear`, in and out: the pattern that this package replaces, with the checks of such lists."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_impl.array_types import kind_of
from torch_impl.checkpoints import of_partition
from torch_impl.packing import Packing, packing_of
from torch_impl.validation import check_device, check_storage, check_tensor, is_plain

LayerT = TypeVar("LayerT", bound=nn.Module)


def layer_from_linears(kind: type[LayerT], linears: Sequence[nn.Linear] | nn.ModuleList, **options: Any) -> LayerT:
    """Build a layer with copies of n linears, W[n, i, o] = linears[n].weight[o, i], bit for bit.

    Args:
        kind: A class of layer with `partition_views`; other weights than those of the linears become zero.
        linears: n `nn.Linear` of equal dtype, device, bias and `requires_grad`, which are those of the layer. Unequal
            sizes give a layer of unequal sizes, if `kind` has such.
        **options: Of the constructor.

    Raises:
        TypeError: If an element is no plain `nn.Linear`, or the dtypes differ or are not supported.
        ValueError: If there is none, or sizes, bias, device or `requires_grad` differ, or two share a parameter.
    """
    partitions = partitions_from_linears(linears, unequal=hasattr(kind, "packing"))
    weight = partitions["weight"]
    sizes: Any = weight.shape
    if weight.ndim == 1:
        outs, ins = zip(*(linear.weight.shape for linear in linears), strict=True)
        sizes = (len(linears), ins, outs)
    options |= {"bias": "bias" in partitions, "dtype": weight.dtype}
    # By way of the meta device, so that no random numbers are drawn for values that are overwritten.
    layer: Any = kind(*sizes, device="meta", **options).to_empty(device=weight.device)
    with torch.no_grad():
        layer.weight.zero_()
        for name, view in layer.partition_views().items():
            view.copy_(partitions[name])
    for name in partitions:
        layer.get_parameter(name).requires_grad_(linears[0].get_parameter(name).requires_grad)
    return layer


def partitions_from_linears(
    linears: Sequence[nn.Linear] | nn.ModuleList, *, unequal: bool = False
) -> dict[str, Tensor]:
    """Stack copies of n linears: "weight" (n, in, out) and, if any, "bias"; raises as `layer_from_linears` does.

    With `unequal`, those whose sizes differ are packed.
    """
    if not isinstance(linears, Sequence | nn.ModuleList):
        advice = "its order is yours to say, pass list(linears.values())" if hasattr(linears, "values") else None
        applied = "one after the other is another function, pass list(linears) if you mean the maps beside one another"
        advice = applied if isinstance(linears, nn.Sequential) else advice or "pass a list or ModuleList"
        raise TypeError(f"`linears`: expected a sequence of nn.Linear, got {kind_of(linears)}; {advice}.")
    if len(linears) == 0:
        raise ValueError("`linears`: expected at least one nn.Linear, got none; pass n of them.")
    traits = [_traits(k, linear) for k, linear in enumerate(linears)]
    _check_apart(linears)
    for k, found in enumerate(traits):
        for trait, expected in traits[0].items():
            size = trait in ("in_features", "out_features")
            if found[trait] != expected and not (size and unequal):
                error = TypeError if trait == "dtype" else ValueError
                advice = (
                    "build a PartitionedLinear, which takes sizes that differ" if size else "make all of them alike"
                )
                raise error(
                    f"`linears[{k}]`: expected {trait}={expected} as in linears[0], got {found[trait]}; {advice}."
                )
    parameters = [dict(linear.named_parameters()) for linear in linears]
    packing = packing_of_linears(parameters)
    return joined_linears(parameters, None if len(packing.buckets) == 1 else packing)


def linears_from_partitions(partitions: Mapping[str, Tensor], like: nn.Module) -> nn.ModuleList:
    """Split canonical tensors into n linears, linears[n].weight[o, i] = W[n, i, o], bit for bit.

    The linears hold copies; `requires_grad` is that of the parameters "weight" and "bias" of `like`.

    Raises:
        TypeError: If `like` has hooks, parametrisations or parameters besides the two, or the bias another dtype.
        ValueError: If the parameters are sharded, or lie on different devices.
    """
    if not _computes_as_built(like, type(like)):
        raise TypeError(
            f"`layer`: expected a layer without parametrizations, hooks or further parameters, got "
            f"{kind_of(like)} with some; remove them first."
        )
    weight, bias = partitions["weight"], partitions.get("bias")
    check_plain("layer.weight", weight)
    if bias is not None:
        check_plain("layer.bias", bias)
        _check_placed_beside("layer.bias", bias, weight)
    packing = getattr(like, "packing", None)
    linears = nn.ModuleList()
    for k in range(len(weight) if packing is None else packing.num_partitions):
        own = {name: of_partition(tensor, name, k, packing) for name, tensor in partitions.items()}
        in_features, out_features = own["weight"].shape
        # By way of the meta device, so that no random numbers are drawn for values that are overwritten.
        linear = nn.Linear(in_features, out_features, bias is not None, device="meta", dtype=weight.dtype)
        linear = linear.to_empty(device=weight.device)
        for name, parameter in linear.named_parameters():
            with torch.no_grad():
                parameter.copy_(own[name].T if name == "weight" else own[name])
            parameter.requires_grad_(like.get_parameter(name).requires_grad)
        linears.append(linear)
    return linears


def packing_of_linears(linears: Sequence[Mapping[str, Tensor]]) -> Packing:
    """Lay out partitions of the sizes of linears' weights (out, in)."""
    sizes = [linear["weight"].shape for linear in linears]
    return packing_of(tuple(size[1] for size in sizes), tuple(size[0] for size in sizes))


def joined(parts: Sequence[Tensor], packing: Packing | None) -> Tensor:
    """Stack weights (in, out) or biases (out,) of partitions in one tensor, or pack those of unequal sizes."""
    if packing is None:
        return torch.stack(list(parts))
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    return torch.cat([parts[k].flatten() for k in packing.order])


def joined_linears(linears: Sequence[Mapping[str, Tensor]], packing: Packing | None) -> dict[str, Tensor]:
    """Return copies of linears' weights and biases as canonical tensors, packed for sizes that differ."""
    partitions = {"weight": joined([linear["weight"].detach().mT for linear in linears], packing)}
    if "bias" in linears[0]:
        partitions["bias"] = joined([linear["bias"].detach() for linear in linears], packing)
    return partitions


def _traits(k: int, linear: Any) -> dict[str, Any]:
    if isinstance(linear, nn.Linear) and is_lazy(linear.weight):
        raise TypeError(
            f"`linears[{k}]`: expected an nn.Linear whose sizes are known, got {kind_of(linear)} before its first "
            f"batch; call it on a batch first."
        )
    if not (isinstance(linear, nn.Linear) and _computes_as_built(linear, nn.Linear)):
        got = kind_of(linear) if isinstance(linear, nn.Linear) else kind_of(linear, "Linear")
        raise TypeError(
            f"`linears[{k}]`: expected an nn.Linear without parametrizations, hooks or a forward of its own, got "
            f"{got}; convert it first."
        )
    weight, bias = linear.weight, linear.bias
    check_plain(f"linears[{k}].weight", weight)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"`linears[{k}].weight`: expected shape (out, in) with positive sizes, got {tuple(weight.shape)}; give it "
            f"both axes."
        )
    if bias is not None:
        check_plain(f"linears[{k}].bias", bias)
        # Copied, it would be broadcast, rounded or moved.
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"`linears[{k}].bias`: expected shape (out,) = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}; "
                f"give it one value for each output."
            )
        _check_placed_beside(f"linears[{k}].bias", bias, weight)
    return {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": bias is not None,
        "dtype": weight.dtype,
        "device": weight.device,
        "requires_grad": {name: parameter.requires_grad for name, parameter in linear.named_parameters()},
    }


def _computes_as_built(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether a module computes what its class does with the parameters that it holds, so that copies suffice."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    if any(hooks) or not {"forward", "__call__"}.isdisjoint(vars(module)):
        return False
    if type(module).forward is not kind.forward or type(module).__call__ is not nn.Module.__call__:
        return False
    own = module._parameters
    if not {name for name, _ in module.named_parameters()} <= {"weight", "bias"} or own.get("weight") is None:
        return False
    if any(getattr(module, name, None) is not own.get(name) for name in ("weight", "bias")):
        return False
    return not any(
        parameter is not None and (parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
        for parameter in own.values()
    )


def _check_apart(linears: Sequence[nn.Linear] | nn.ModuleList) -> None:
    # Copies of a shared parameter are trained apart, so that the layer would learn what the linears do not.
    owners: dict[int, str] = {}
    for k, linear in enumerate(linears):
        for name, parameter in linear.named_parameters():
            place = parameter.data_ptr() if is_plain(parameter) and not parameter.is_meta else id(parameter)
            if place in owners:
                raise ValueError(
                    f"`linears[{k}]`: expected parameters of its own, got the {owners[place]} as its {name}; use "
                    f"copy.deepcopy first."
                )
            owners[place] = f"{name} of linears[{k}]"


def check_plain(argument: str, parameter: Any) -> None:
    """Refuse what is no ordinary tensor with its values here, by a TypeError or a ValueError."""
    check_tensor(argument, parameter)
    if not is_plain(parameter):
        raise ValueError(
            f"`{argument}`: expected an ordinary tensor with its values here, got {kind_of(parameter)}; gather or "
            f"convert it first."
        )
    check_storage(argument, parameter)


def _check_placed_beside(argument: str, bias: Tensor, weight: Tensor) -> None:
    if bias.dtype != weight.dtype:
        raise TypeError(
            f"`{argument}`: expected the dtype of `weight`, {weight.dtype}, got {bias.dtype}; cast one of them."
        )
    check_device(argument, bias, weight)
