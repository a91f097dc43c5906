"""Parameters in and out: canonical NumPy arrays, safetensors files, and lists of `nn.Linear`.

The canonical form is {"weight": (n, in, out), "bias": (n, out)}, without "bias" for a layer that has none; for
partitions of unequal sizes they are packed, as `torch_impl.packing` says. Every way in and out copies bit for bit: NaN
payloads, signed zeros and subnormals included.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from torch_impl.array_types import kind_of, said, shown
from torch_impl.checkpoints import (
    arrays_from_linears,
    check_keys,
    from_axes,
    linears_from_arrays,
    linears_in,
    to_axes,
)
from torch_impl.files import as_path, read_file, write_file
from torch_impl.linears import check_plain
from torch_impl.packing import Packing
from torch_impl.registry import DTYPE_NAMES
from torch_impl.state_dicts import convert_state_dict, state_dict_from_linears
from torch_impl.validation import check_arrays, check_materialised, is_plain

__all__ = [
    "check_writable",
    "convert_state_dict",
    "export_linears",
    "export_parameters",
    "import_parameters",
    "load_linears",
    "load_parameters",
    "save_parameters",
    "state_dict_from_linears",
]

FORMAT = "partitioned_linear"
FORMAT_VERSION, PACKED_VERSION = "1", "2"
# The most that the format itself allows.
_MOST_HEADER_BYTES = 100_000_000

# bfloat16 is unknown to NumPy and to safetensors' NumPy reader; ml_dtypes supplies it.
_NUMPY_DTYPES = {
    dtype: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for dtype, name in DTYPE_NAMES.items()
}
_FILE_DTYPES = {
    {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype.name]: dtype
    for dtype in _NUMPY_DTYPES.values()
}


class PartitionedModule(Protocol):
    """A `PartitionedLinear` or `MaskedPartitionedLinear`: its parameters can be seen in canonical layout."""

    def partition_views(self) -> dict[str, Tensor]:
        """Return views of the parameters: "weight" (n, in, out) and, if any, "bias" (n, out)."""
        ...


def export_parameters(layer: PartitionedModule, *, axes: Mapping[str, str] | None = None) -> dict[str, np.ndarray]:
    """Copy a layer's parameters into canonical arrays.

    Args:
        layer: A `PartitionedLinear` or `MaskedPartitionedLinear`.
        axes: Other axes than the canonical ones, as `import_parameters` takes them.

    Returns:
        "weight" (n, in, out) and, if any, "bias" (n, out), in the layer's dtype (bfloat16 is that of `ml_dtypes`).

    Raises:
        TypeError: If `layer` is neither of the two, or a parameter has a dtype that no layer has.
        ValueError: If the parameters hold no values here (meta device, or sharded over devices), or have other shapes
            than the layer's own.
    """
    views = _views(layer)
    return to_axes({name: _exported(name, view) for name, view in views.items()}, axes)


def import_parameters(
    layer: PartitionedModule, arrays: Mapping[str, Any], *, axes: Mapping[str, str] | None = None
) -> None:
    """Copy canonical arrays into a layer: all of them, or none.

    In a `MaskedPartitionedLinear` the off-block weights, which have no effect, stay as they are.

    Args:
        layer: A `PartitionedLinear` or `MaskedPartitionedLinear`.
        arrays: "weight" (n, in, out) and, if the layer has one, "bias" (n, out), in the layer's dtype.
        axes: For weights that another layer has laid out, the axes of each array, outermost first: {"weight": "n o i",
            "bias": "(n o)"}, say. Parentheses hold axes that are one in the array, 1 is an axis of size one. Nothing is
            guessed from sizes: an array without a pattern has the canonical axes. With `axes`, tensors are taken too.

    Raises:
        TypeError: If `layer` is neither of the two, or an array is no NumPy array, is masked or has another dtype; the
            layer is unchanged.
        ValueError: If an array is missing, extra or mis-shaped, or a parameter cannot be written to as a whole (it is
            parametrised, pruned, or shares memory), or `axes` has no pattern that fits; the layer is unchanged.
    """
    views = _views(layer)
    check_writable(views)
    expected = _expected(views)
    found = check_arrays(from_axes(arrays, axes, expected, partial(_as_array, argument="arrays")), expected)
    tensors = {name: to_tensor(np.array(found[name], order="C"), view.device) for name, view in views.items()}
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(tensors[name])


def save_parameters(layer: PartitionedModule, path: str | os.PathLike[str]) -> None:
    """Write a layer's parameters to a safetensors file, which appears whole or not at all.

    Args:
        layer: A `PartitionedLinear` or `MaskedPartitionedLinear`.
        path: Where to; a regular file is replaced and keeps its mode, and a link is followed.

    Raises:
        TypeError: If `layer` is neither of the two, or `path` is no path.
        ValueError: If the parameters hold no values here, or no file can have that name.
        OSError: If the file cannot be written.
    """
    target = as_path(path)
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION}
    packing = _packing(layer)
    if packing is not None:
        metadata["format_version"] = PACKED_VERSION
        metadata |= {name: json.dumps(getattr(packing, name)) for name in ("in_features", "out_features")}
    write_file(target, safetensors.numpy.save(export_parameters(layer), metadata))


def load_parameters(layer: PartitionedModule, path: str | os.PathLike[str]) -> None:
    """Read a file written by `save_parameters`, of either framework, into a layer: all of it, or nothing.

    Args:
        layer: A `PartitionedLinear` or `MaskedPartitionedLinear` of the file's sizes and dtype.
        path: The file.

    Raises:
        TypeError: If `layer` is neither of the two, `path` is no path, or a dtype differs; the layer is unchanged.
        ValueError: If the file is foreign or of another version, or an array is missing, extra or mis-shaped; the
            layer is unchanged.
        OSError: If the file cannot be read.
    """
    import_parameters(layer, _read_arrays(as_path(path), _views(layer), _packing(layer)))


def load_linears(
    layer: PartitionedModule,
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    prefix: str = "",
    *,
    keys: Sequence[str] | None = None,
) -> None:
    """Copy the state_dict of n linears into a layer, W[n, i, o] = weight of n [o, i], bit for bit: all, or nothing.

    Args:
        layer: A `PartitionedLinear` or `MaskedPartitionedLinear` of as many maps, and of their sizes and dtype.
        state_dict: Holds `<prefix>0.weight` (out, in), `<prefix>0.bias` (out,), `<prefix>1.weight` and so on, as
            tensors or NumPy arrays; or the name of a safetensors file, of the index of several (`.index.json`), or of
            a file of torch.save, which is opened with weights_only. All keys may begin with the `module.` of
            DistributedDataParallel; what torch.compile and FSDP put into keys is passed over.
        prefix: Where the list is in its model, such as "heads."; keys that do not start with it are ignored. A `*`
            stands for the number where it is not last, as in "heads.*.0.".
        keys: Names in place of the numbers, in the order of the partitions, for what an `nn.ModuleDict` saved.

    Raises:
        TypeError: If `layer` is neither of the two, `state_dict` neither a mapping of strings nor a path, or a value no
            array of the layer's dtype; the layer is unchanged.
        ValueError: If no key fits, a number is skipped, a key is something else, number, shapes or biases are not the
            layer's, or the file is no checkpoint; the layer is unchanged.
        OSError: If the file cannot be read.
    """
    views = _views(layer)
    found = state_dict if isinstance(state_dict, Mapping) else _read_checkpoint(state_dict)
    packing = _packing(layer)
    check_keys(keys, len(views["weight"]) if packing is None else packing.num_partitions)
    entries = linears_in(found, prefix, keys)
    linears = [{name: _as_array(value) for name, value in linear.items()} for linear in entries]
    import_parameters(layer, arrays_from_linears(linears, prefix, _expected(views), packing, keys))


def export_linears(
    layer: PartitionedModule, prefix: str = "", *, keys: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Copy a layer's parameters into the state_dict of n linears, as `load_linears` takes it.

    Args:
        layer: A `PartitionedLinear` or `MaskedPartitionedLinear`.
        prefix: What the keys begin with, such as "heads.".
        keys: Names in place of the numbers, one for each partition.

    Returns:
        `<prefix>0.weight` (out, in), `<prefix>0.bias` (out,), `<prefix>1.weight` and so on, on the layer's device.

    Raises:
        TypeError: If `layer` is neither of the two, or `prefix` no str.
        ValueError: If the parameters hold no values here, or have other shapes than the layer's own.
    """
    views = _views(layer)
    arrays = {name: _exported(name, view) for name, view in views.items()}
    device = views["weight"].device
    return {key: to_tensor(array, device) for key, array in linears_from_arrays(arrays, prefix, _packing(layer), keys)}


def check_writable(views: Mapping[str, Tensor]) -> None:
    """Refuse, by a ValueError, views in which a write would be lost, change other values too, or fail halfway."""
    ends: list[tuple[int, int]] = []
    for name, view in views.items():
        owner = view if view._base is None else view._base
        if not isinstance(owner, nn.Parameter):
            raise ValueError(
                f"`layer`: expected a parameter `{name}`, got a tensor that is computed from others; remove its "
                f"parametrization or pruning first."
            )
        if view.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"`layer`: expected a `{name}` that may be changed, got one made under torch.inference_mode; use that "
                f"mode here too."
            )
        if not is_plain(view) or view.is_meta:
            continue
        reach, apart = 0, True
        for step, size in sorted(
            (step, size) for size, step in zip(view.shape, view.stride(), strict=True) if size > 1
        ):
            apart, reach = apart and step > reach, reach + (size - 1) * step
        start = view.data_ptr()
        ends.append((start, start + (reach + 1) * view.element_size()))
        if not apart or (len(ends) == 2 and ends[0][0] < ends[1][1] and ends[1][0] < ends[0][1]):
            raise ValueError(
                f"`layer`: expected a `{name}` with memory of its own, got elements that share theirs; clone it first."
            )


def _views(layer: PartitionedModule) -> dict[str, Tensor]:
    if not (isinstance(layer, nn.Module) and hasattr(layer, "partition_views")):
        got = kind_of(layer, "PartitionedLinear", "MaskedPartitionedLinear")
        raise TypeError(
            f"`layer`: expected a PartitionedLinear or MaskedPartitionedLinear, got {got}; pass the "
            f"layer itself, or use state_dict_from_linears for a list of nn.Linear."
        )
    views = layer.partition_views()
    check_materialised(views)
    return views


def _packing(layer: PartitionedModule) -> Packing | None:
    return getattr(layer, "packing", None)


def to_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor's values bit for bit (bfloat16 as that of `ml_dtypes`); on a CPU, they may share its memory."""
    values = tensor.detach().cpu().resolve_neg().contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return values.numpy()


def to_tensor(array: np.ndarray, device: torch.device | str) -> Tensor:
    """Return an array's values bit for bit as a tensor; on a CPU, it may share the memory of the array."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def _exported(name: str, tensor: Tensor) -> np.ndarray:
    try:
        return to_array(tensor).copy()
    except RuntimeError as error:  # inside a transform such as torch.vmap
        raise ValueError(
            f"`layer`: expected values in `{name}`, got a tensor without them ({said(error)}); call this outside of "
            f"transforms."
        ) from error


def _expected(views: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (tuple(view.shape), _NUMPY_DTYPES[view.dtype]) for name, view in views.items()}


def _as_array(value: Any, argument: str = "state_dict") -> Any:
    """Return a tensor's values as an array; leave others for later checks to refuse."""
    if not isinstance(value, Tensor):
        return value
    check_plain(argument, value)
    if value.is_meta:
        raise ValueError(
            f"`{argument}`: expected tensors with values, got one on the meta device; load them to a CPU first."
        )
    return _exported(argument, value)


def _deserialized(content: bytes, path: Path) -> dict[str, Any]:
    """Return a file's arrays, and what the file says of those whose dtype no layer has."""
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`path`: expected a safetensors file, got {path.name} ({error}); pass another file."
        ) from error
    return {
        name: np.frombuffer(entry["data"], _FILE_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] in _FILE_DTYPES
        else entry
        for name, entry in entries
    }


def _read_checkpoint(path: Any) -> Any:
    """Read a whole checkpoint, of safetensors or of torch.save, by what it begins with."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"`state_dict`: expected a mapping or the name of a file, got {kind_of(path)}; pass a state_dict."
        )
    path = as_path(path)
    shards = [_read_shard(shard) for shard in _shards(path)]
    return shards[0] if len(shards) == 1 else {key: value for shard in shards for key, value in shard.items()}


def _read_shard(path: Path) -> Any:
    content = read_file(path)
    # Where safetensors has its JSON.
    if content[8:9] == b"{":
        return _deserialized(content, path)
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"`path`: expected a file of safetensors, or of torch.save that weights_only opens, got {path.name} "
            f"({said(error)}); save its state_dict alone."
        ) from error


def _shards(path: Path) -> list[Path]:
    """Return the files of a checkpoint: itself, or those that an index names, as large models are saved in several."""
    if path.suffix != ".json":
        return [path]
    try:
        names = json.loads(read_file(path))["weight_map"].values()
        return [path.parent / name for name in dict.fromkeys(names)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`path`: expected an index with a `weight_map` of keys to files, got {path.name} ({said(error)}); pass a "
            f"file of safetensors."
        ) from error


def _read_arrays(path: Path, like: Mapping[str, Tensor], packing: Packing | None) -> dict[str, np.ndarray]:
    # Twice and more what a file for this layer has: what else is wrong with such a file is said by name.
    content = read_file(path, _MOST_HEADER_BYTES + 8 * sum(view.numel() for view in like.values()))
    entries = _deserialized(content, path)
    # Where the format has them: a length, then as much JSON. What was deserialised is sound.
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"`path`: expected a file of format {FORMAT!r}, got {metadata.get('format')!r} in {path.name}; write it "
            f"with save_parameters."
        )
    _check_version(metadata, path, packing)
    for name, entry in entries.items():
        if not isinstance(entry, np.ndarray):
            raise TypeError(
                f"`path`: expected {name!r} in one of {', '.join(_FILE_DTYPES)}, got {entry['dtype']} in {path.name}; "
                f"the layer is unchanged."
            )
    return entries


def _check_version(metadata: Mapping[str, str], path: Path, packing: Packing | None) -> None:
    """Refuse, by a ValueError, a file of another version, or of the other kind of sizes, or of other unequal sizes."""
    version, wanted = metadata.get("format_version"), FORMAT_VERSION if packing is None else PACKED_VERSION
    sizes = {name: metadata.get(name) for name in ("in_features", "out_features")}
    if version != wanted:
        advice = "write it with a matching version of this package"
        if version == PACKED_VERSION:
            advice = f"its partitions have sizes of their own, build the layer with {shown(sizes)}"
        elif version == FORMAT_VERSION:
            advice = "its partitions have one size, build the layer with ints for sizes"
        raise ValueError(f"`path`: expected format version {wanted!r}, got {shown(version)} in {path.name}; {advice}.")
    for name, size in sizes.items() if packing is not None else ():
        expected = json.dumps(getattr(packing, name))
        if size != expected:
            raise ValueError(
                f"`path`: expected {name} = {shown(expected)[1:-1]}, got {shown(size)} in {path.name}; build the layer "
                f"with the sizes of the file."
            )
