"""Lists of `nn.Linear`, in and out: the pattern that this package replaces, with the checks of such lists."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_impl.array_types import kind_of
from torch_impl.checkpoints import key_of, linears_in
from torch_impl.validation import check_device, check_storage, check_tensor, is_plain

LayerT = TypeVar("LayerT", bound=nn.Module)


def layer_from_linears(kind: type[LayerT], linears: Sequence[nn.Linear] | nn.ModuleList, **options: Any) -> LayerT:
    """Build a layer with copies of n linears, W[n, i, o] = linears[n].weight[o, i], bit for bit.

    Args:
        kind: A class of layer with `partition_views`; other weights than those of the linears become zero.
        linears: n `nn.Linear` of equal sizes, dtype, device, bias and `requires_grad`, which are those of the layer.
        **options: Of the constructor.

    Raises:
        TypeError: If an element is no plain `nn.Linear`, or the dtypes differ or are not supported.
        ValueError: If there is none, or sizes, bias, device or `requires_grad` differ, or two share a parameter.
    """
    partitions = partitions_from_linears(linears)
    weight = partitions["weight"]
    options |= {"bias": "bias" in partitions, "dtype": weight.dtype}
    # By way of the meta device, so that no random numbers are drawn for values that are overwritten.
    layer: Any = kind(*weight.shape, device="meta", **options).to_empty(device=weight.device)
    with torch.no_grad():
        layer.weight.zero_()
        for name, view in layer.partition_views().items():
            view.copy_(partitions[name])
    for name in partitions:
        layer.get_parameter(name).requires_grad_(linears[0].get_parameter(name).requires_grad)
    return layer


def partitions_from_linears(linears: Sequence[nn.Linear] | nn.ModuleList) -> dict[str, Tensor]:
    """Stack copies of n linears: "weight" (n, in, out) and, if any, "bias"; raises as `layer_from_linears` does."""
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
            if found[trait] != expected:
                error = TypeError if trait == "dtype" else ValueError
                raise error(
                    f"`linears[{k}]`: expected {trait}={expected} as in linears[0], got {found[trait]}; make all of "
                    f"them alike."
                )
    return _stacked([dict(linear.named_parameters()) for linear in linears])


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
    _check_plain("layer.weight", weight)
    if bias is not None:
        _check_plain("layer.bias", bias)
        _check_placed_beside("layer.bias", bias, weight)
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
        prefix: Such as "heads."; keys that do not start with it are ignored, and the `module.` or `_orig_mod.` that
            DistributedDataParallel or torch.compile puts before all keys is passed over.

    Returns:
        Copies: "weight" (n, in, out) and, if there are biases, "bias" (n, out).

    Raises:
        TypeError: If `state_dict` is no mapping of strings, a value no floating tensor, or the dtypes differ.
        ValueError: If no key fits, a number is skipped, a key is something else, or shapes, biases or devices differ.
    """
    linears = linears_in(state_dict, prefix)
    for k, linear in enumerate(linears):
        # The weight first, which the others are compared with.
        for name in sorted(linear, reverse=True):
            _check_entry(key_of(prefix, k, name), name, linear[name], linears[0]["weight"])
    return _stacked(linears)


def _stacked(linears: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    partitions = {"weight": torch.stack([linear["weight"].detach().mT for linear in linears])}
    if "bias" in linears[0]:
        partitions["bias"] = torch.stack([linear["bias"].detach() for linear in linears])
    return partitions


def _traits(k: int, linear: Any) -> dict[str, Any]:
    if not (isinstance(linear, nn.Linear) and _computes_as_built(linear, nn.Linear)):
        got = kind_of(linear) if isinstance(linear, nn.Linear) else kind_of(linear, "Linear")
        raise TypeError(
            f"`linears[{k}]`: expected an nn.Linear without parametrizations, hooks or a forward of its own, got "
            f"{got}; convert it first."
        )
    weight, bias = linear.weight, linear.bias
    _check_plain(f"linears[{k}].weight", weight)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"`linears[{k}].weight`: expected shape (out, in) with positive sizes, got {tuple(weight.shape)}; give it "
            f"both axes."
        )
    if bias is not None:
        _check_plain(f"linears[{k}].bias", bias)
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


def _check_plain(argument: str, parameter: Any) -> None:
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


def _check_entry(key: str, name: str, tensor: Any, weight: Tensor) -> None:
    argument = f"state_dict[{key!r}]"
    _check_plain(argument, tensor)
    symbols, shape = ("(out, in)", tuple(weight.shape)) if name == "weight" else ("(out,)", tuple(weight.shape[:1]))
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"`{argument}`: expected shape (out, in) with positive sizes, got {shape}; pass the weights of linears."
        )
    if tensor.shape != shape:
        raise ValueError(
            f"`{argument}`: expected shape {symbols} = {shape} as in linear 0, got {tuple(tensor.shape)}; make the "
            f"linears alike."
        )
    if tensor.dtype != weight.dtype:
        raise TypeError(
            f"`{argument}`: expected dtype {weight.dtype} as in linear 0, got {tensor.dtype}; make the linears alike."
        )
    check_device(argument, tensor, weight)
