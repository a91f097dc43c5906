"""Parameters in and out: canonical NumPy arrays, safetensors files, and lists of `nn.Linear`.

The canonical form is {"weight": (n, in, out), "bias": (n, out)}, without "bias" for a layer that has none. Every way
in and out copies bit for bit: NaN payloads, signed zeros and subnormals included.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from torch_impl.array_types import kind_of, said
from torch_impl.files import as_path, read_file, write_file
from torch_impl.linears import state_dict_from_linears
from torch_impl.registry import DTYPE_NAMES
from torch_impl.validation import check_arrays, check_materialised, is_plain

__all__ = [
    "check_writable",
    "export_parameters",
    "import_parameters",
    "load_parameters",
    "save_parameters",
    "state_dict_from_linears",
]

FORMAT = "partitioned_linear"
FORMAT_VERSION = "1"
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


def export_parameters(layer: PartitionedModule) -> dict[str, np.ndarray]:
    """Copy a layer's parameters into canonical arrays.

    Args:
        layer: A `PartitionedLinear` or `MaskedPartitionedLinear`.

    Returns:
        "weight" (n, in, out) and, if any, "bias" (n, out), in the layer's dtype (bfloat16 is that of `ml_dtypes`).

    Raises:
        TypeError: If `layer` is neither of the two, or a parameter has a dtype that no layer has.
        ValueError: If the parameters hold no values here (meta device, or sharded over devices), or have other shapes
            than the layer's own.
    """
    views = _views(layer)
    return {name: _exported(name, view) for name, view in views.items()}


def import_parameters(layer: PartitionedModule, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy canonical arrays into a layer: all of them, or none.

    In a `MaskedPartitionedLinear` the off-block weights, which have no effect, stay as they are.

    Args:
        layer: A `PartitionedLinear` or `MaskedPartitionedLinear`.
        arrays: "weight" (n, in, out) and, if the layer has one, "bias" (n, out), in the layer's dtype.

    Raises:
        TypeError: If `layer` is neither of the two, or an array is no NumPy array, is masked or has another dtype; the
            layer is unchanged.
        ValueError: If an array is missing, extra or mis-shaped, or a parameter cannot be written to as a whole (it is
            parametrised, pruned, or shares memory); the layer is unchanged.
    """
    views = _views(layer)
    check_writable(views)
    found = check_arrays(arrays, {name: (tuple(view.shape), _NUMPY_DTYPES[view.dtype]) for name, view in views.items()})
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
    import_parameters(layer, _read_arrays(as_path(path), _views(layer)))


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


def _read_arrays(path: Path, like: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    # Twice and more what a file for this layer has: what else is wrong with such a file is said by name.
    content = read_file(path, _MOST_HEADER_BYTES + 8 * sum(view.numel() for view in like.values()))
    try:
        entries = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`path`: expected a safetensors file, got {path.name} ({error}); pass another file."
        ) from error
    # Where the format has them: a length, then as much JSON. What was deserialised is sound.
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"`path`: expected a file of format {FORMAT!r}, got {metadata.get('format')!r} in {path.name}; write it "
            f"with save_parameters."
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"`path`: expected format version {FORMAT_VERSION!r}, got {metadata.get('format_version')!r} in "
            f"{path.name}; write it with a matching version of this package."
        )
    for name, entry in entries.items():
        if entry["dtype"] not in _FILE_DTYPES:
            raise TypeError(
                f"`path`: expected {name!r} in one of {', '.join(_FILE_DTYPES)}, got {entry['dtype']} in {path.name}; "
                f"the layer is unchanged."
            )
    return {
        name: np.frombuffer(entry["data"], _FILE_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries.items()
    }
