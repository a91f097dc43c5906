"""Lists of `nn.Linear`, in and out: the pattern that this package replaces, with the checks of such lists."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_impl.array_types import kind_of, shown
from torch_impl.checkpoints import check_keys, key_of, linears_in, of_partition, without_wrappers
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
    packing = _packing_of_linears(parameters)
    return _stacked(parameters, None if len(packing.buckets) == 1 else packing)


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


def state_dict_from_linears(
    state_dict: Mapping[str, Tensor], prefix: str = "", *, keys: Sequence[str] | None = None, unequal: bool = False
) -> dict[str, Tensor]:
    """Turn the state_dict of an `nn.ModuleList` of linears into that of a `PartitionedLinear`, bit for bit.

    Args:
        state_dict: Holds `<prefix>0.weight` (out, in), `<prefix>0.bias` (out,), `<prefix>1.weight` and so on.
        prefix: Such as "heads."; keys that do not start with it are ignored, and the `module.` or `_orig_mod.` that
            DistributedDataParallel or torch.compile puts before all keys is passed over.
        keys: Names in place of the numbers, in the order of the partitions, for what an `nn.ModuleDict` saved.
        unequal: Whether the layer is one of unequal sizes.

    Returns:
        Copies: "weight" (n, in, out) and, if there are biases, "bias" (n, out); packed for unequal sizes.

    Raises:
        TypeError: If `state_dict` is no mapping of strings, a value no floating tensor, or the dtypes differ.
        ValueError: If no key fits, a number is skipped, a key is something else, or shapes, biases or devices differ.
    """
    linears = linears_in(state_dict, prefix, keys)
    for k, linear in enumerate(linears):
        # The weight first, which the others are compared with.
        for name in sorted(linear, reverse=True):
            key = key_of(prefix, k if keys is None else keys[k], name)
            _check_entry(key, name, linear[name], linears[0]["weight"], linear["weight"] if unequal else None)
    return _stacked(linears, _packing_of_linears(linears) if unequal else None)


def convert_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    to: str = "partitions",
    keys: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Turn the state_dict of a whole model with lists of linears into that of the model with layers in their places.

    `model.load_state_dict(convert_state_dict(model, old))` then loads it, and `to="linears"` leads back. No layer
    changes its keys for that: what distributed checkpointing reads and writes stays whole.

    Args:
        model: The model with a `PartitionedLinear` where each list was.
        state_dict: The checkpoint; it is unchanged. The `module.` of DistributedDataParallel and the `_orig_mod.` of
            torch.compile are taken from its keys where all have them and the model's do not.
        to: "partitions" for the layers' keys, "linears" for those of lists. Entries in that form already are kept.
        keys: For layers in place of an `nn.ModuleDict`, layer name -> names in place of the numbers, in the order of
            the partitions.

    Returns:
        The converted mapping, of the same values but for the layers' entries, which are copies.

    Raises:
        TypeError: If `model` is no module or `state_dict` no mapping of strings, or as `state_dict_from_linears`.
        ValueError: If `to` is another name, `keys` names no layer or is missing for a list without numbers, a masked
            layer is in the place of a list, or as `state_dict_from_linears`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model`: expected an nn.Module, got {kind_of(model)}; pass the model itself.")
    if not isinstance(to, str) or to not in ("partitions", "linears"):
        raise ValueError(f"`to`: expected one of 'partitions', 'linears', got {shown(to)}; choose one of these.")
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise TypeError(f"`state_dict`: expected a mapping of strings, got {kind_of(state_dict)}; pass a state_dict.")
    if keys is not None and not isinstance(keys, Mapping):
        raise TypeError(f"`keys`: expected a mapping of layers to names, got {kind_of(keys)}; pass a dict.")
    # Whatever the model has besides its layers is a key of both.
    own = "|".join(re.escape(name.partition(".")[0]) for name in model.state_dict()) or "(?!)"
    bare = without_wrappers(list(state_dict), rf"({own}|[0-9]+)(\.|$)")
    # Copied, an OrderedDict keeps the versions of its modules.
    result: Any = copy.copy(state_dict) if bare == list(state_dict) and isinstance(state_dict, dict) else {}
    result |= dict(zip(bare, state_dict.values(), strict=True))
    names = {} if keys is None else dict(keys)
    layer: Any
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        if not hasattr(layer, "partition_views"):
            continue
        if not hasattr(layer, "packing"):
            if any(re.match(rf"{re.escape(prefix)}[0-9]+\.weight$", key) for key in result):
                raise ValueError(
                    f"`model`: expected a PartitionedLinear in the place of the list {shown(prefix)}, got "
                    f"{kind_of(layer)}; load this one by load_linears."
                )
            continue
        own_names = check_keys(names.pop(name, None), layer.num_partitions)
        if to == "partitions":
            parts = "[0-9]+" if own_names is None else "|".join(map(re.escape, own_names))
            given = [key for key in result if re.match(rf"{re.escape(prefix)}({parts})\.", key)]
            if not given and own_names is None:
                _check_numbered(result, prefix, name)
            options: Any = {"keys": own_names, "unequal": layer.packing is not None}
            stacked = state_dict_from_linears({key: result[key] for key in given}, prefix, **options) if given else {}
            if given and layer.packing is not None:
                _check_sizes_of_list(result, given, prefix, own_names, layer.packing)
            found = {f"{prefix}{key}": value for key, value in stacked.items()}
        else:
            given = [key for key in (f"{prefix}weight", f"{prefix}bias") if key in result]
            found = {}
            for key in given:
                check_tensor(f"state_dict[{shown(key)}]", result[key])
                for k in range(layer.num_partitions):
                    part = of_partition(result[key], key.removeprefix(prefix), k, layer.packing)
                    number = k if own_names is None else own_names[k]
                    found[f"{prefix}{number}.{key.removeprefix(prefix)}"] = (part.mT if part.ndim == 2 else part).clone(
                        memory_format=torch.contiguous_format
                    )
        for key in given:
            del result[key]
        result |= found
    if names:
        raise ValueError(
            f"`keys`: expected names of PartitionedLinear layers in the model, got {shown(next(iter(names)))}; pass "
            f"them as named_modules gives them."
        )
    return result


def _check_sizes_of_list(
    state_dict: Mapping[str, Any], given: Sequence[str], prefix: str, keys: Sequence[str] | None, packing: Packing
) -> None:
    """Refuse, by a ValueError, linears of other sizes: packed, they may have the same number of elements."""
    expected = list(zip(packing.out_features, packing.in_features, strict=True))
    found = sum(key.endswith(".weight") for key in given)
    if found != len(expected):
        raise ValueError(
            f"`state_dict`: expected {len(expected)} linears under {shown(prefix)}, got {found}; build the layer with "
            f"the sizes of the list."
        )
    for k, shape in enumerate(expected):
        key = key_of(prefix, k if keys is None else keys[k], "weight")
        if state_dict[key].shape != shape:
            raise ValueError(
                f"`state_dict[{shown(key)}]`: expected shape (out, in) = {shape}, got {tuple(state_dict[key].shape)}; "
                f"build the layer with the sizes of the list."
            )


def _check_numbered(state_dict: Mapping[str, Any], prefix: str, name: str) -> None:
    """Refuse, by a ValueError, entries of a list whose keys are names: their order is not known."""
    named = [key for key in state_dict if re.fullmatch(re.escape(prefix) + r"[^.]*[^.0-9][^.]*\.weight", key)]
    if prefix and named and f"{prefix}weight" not in state_dict:
        raise ValueError(
            f"`state_dict`: expected linears with numbers under {shown(prefix)}, got {shown(named[0])}; pass "
            f"keys={{{name!r}: [...]}}, the names in the order of the partitions."
        )


def _packing_of_linears(linears: Sequence[Mapping[str, Tensor]]) -> Packing:
    sizes = [linear["weight"].shape for linear in linears]
    return packing_of(tuple(size[1] for size in sizes), tuple(size[0] for size in sizes))


def joined(parts: Sequence[Tensor], packing: Packing | None) -> Tensor:
    """Stack weights (in, out) or biases (out,) of partitions in one tensor, or pack those of unequal sizes."""
    if packing is None:
        return torch.stack(list(parts))
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    return torch.cat([parts[k].flatten() for k in packing.order])


def _stacked(linears: Sequence[Mapping[str, Tensor]], packing: Packing | None) -> dict[str, Tensor]:
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


def _check_entry(key: str, name: str, tensor: Any, first: Tensor, own: Tensor | None) -> None:
    """Refuse a weight or bias unlike the weight of linear 0, but for its sizes where its `own` weight has others."""
    argument, weight = f"state_dict[{key!r}]", first if own is None else own
    _check_plain(argument, tensor)
    symbols, shape = ("(out, in)", tuple(weight.shape)) if name == "weight" else ("(out,)", tuple(weight.shape[:1]))
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"`{argument}`: expected shape (out, in) with positive sizes, got {shape}; pass the weights of linears."
        )
    if tensor.shape != shape:
        raise ValueError(
            f"`{argument}`: expected shape {symbols} = {shape} {'as in linear 0' if own is None else 'by its weight'}, "
            f"got {tuple(tensor.shape)}; make the linears alike, or use a layer of unequal sizes."
        )
    if tensor.dtype != first.dtype:
        raise TypeError(
            f"`{argument}`: expected dtype {first.dtype} as in linear 0, got {tensor.dtype}; make the linears alike."
        )
    check_device(argument, tensor, first)
