"""Checkpoints of lists of linears, of a layer alone or of a whole model, turned into those of layers and back."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_impl.array_types import kind_of, shown
from torch_impl.checkpoints import bare_forms, check_keys, key_of, linears_in, of_partition
from torch_impl.linears import check_plain, joined_linears, packing_of_linears
from torch_impl.packing import Packing
from torch_impl.validation import check_device, check_tensor


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
    return joined_linears(linears, packing_of_linears(linears) if unequal else None)


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
        state_dict: The checkpoint; it is unchanged. What DistributedDataParallel, FSDP, torch.compile, AveragedModel
            and activation checkpointing put into keys may be in its keys, in the model's, or in both.
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
    layers: dict[str, Any] = {
        f"{name}." if name else "": layer
        for name, layer in model.named_modules()
        # Of its class: wrappers lend the attributes of what they wrap.
        if hasattr(type(layer), "partition_views")
    }
    own: list[str] = list(model.state_dict())
    ours, bare = _without_wrappers(own, list(layers), state_dict)
    # Copied, an OrderedDict keeps the versions of its modules.
    result: Any = copy.copy(state_dict) if bare == list(state_dict) and isinstance(state_dict, dict) else {}
    result |= dict(zip(bare, state_dict.values(), strict=True))
    if "n_averaged" not in own:
        result.pop("n_averaged", None)  # of AveragedModel, not of the model in it
    names: dict[str, Any] = {} if keys is None else dict(keys)
    renamed: dict[Any, Any] = dict(zip(ours, own, strict=False))
    for (whole, layer), prefix in zip(layers.items(), ours[len(own) :], strict=True):
        name = whole.removesuffix(".")
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
                kind = key.removeprefix(prefix)
                for k in range(layer.num_partitions):
                    part = of_partition(result[key], kind, k, layer.packing)
                    found[f"{whole}{k if own_names is None else own_names[k]}.{kind}"] = (
                        part.mT if part.ndim == 2 else part
                    ).clone(memory_format=torch.contiguous_format)
        for key in given:
            del result[key]
        result |= found
    if names:
        raise ValueError(
            f"`keys`: expected names of PartitionedLinear layers in the model, got {shown(next(iter(names)))}; pass "
            f"them as named_modules gives them."
        )
    return {renamed.get(key, key): value for key, value in result.items()} if ours[: len(own)] != own else result


def _without_wrappers(
    own: list[str], prefixes: list[str], state_dict: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Return a model's keys and its layers' prefixes, and the keys of a checkpoint, in forms that have keys in common.

    Raises:
        ValueError: If there are none.
    """
    for ours in bare_forms([*own, *prefixes]):
        # Whatever the model has besides its layers is a key of both.
        places = [rf"{re.escape(key.partition('.')[0])}(\.|$)" for key in ours[: len(own)]]
        lists = [rf"{re.escape(prefix)}[^.]+\.(weight|bias)$" for prefix in ours[len(own) :]]
        shared = re.compile("|".join([*places, *lists]) or "(?!)")
        for bare in bare_forms(list(state_dict)):
            if not bare or any(map(shared.match, bare)):
                return ours, bare
    nested = next((key for key, value in state_dict.items() if isinstance(value, Mapping)), None)
    advice = "take what is before the model's own names away first"
    raise ValueError(
        f"`state_dict`: expected keys of the model, such as {shown(own[0] if own else 'none')}, got "
        f"{shown(next(iter(state_dict)))}; {advice if nested is None else f'pass its entry {nested!r}'}."
    )


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


def _check_entry(key: str, name: str, tensor: Any, first: Tensor, own: Tensor | None) -> None:
    """Refuse a weight or bias unlike the weight of linear 0, but for its sizes where its `own` weight has others."""
    argument, weight = f"state_dict[{key!r}]", first if own is None else own
    check_plain(argument, tensor)
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
