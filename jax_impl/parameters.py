"""Parameters in and out: canonical NumPy arrays and safetensors files.

The canonical form is {"weight": (n, in, out), "bias": (n, out)}, without "bias" for a layer that has none. Every way
in and out copies bit for bit: NaN payloads, signed zeros and subnormals included. What the nnx layer and the linen twin
share is public here; the functions for linen's parameter dicts are in `jax_impl.linen`.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax import Array

from jax_impl.array_types import said
from jax_impl.files import as_path, read_file, write_file
from jax_impl.layer import PartitionedLinear
from jax_impl.validation import check_arrays, check_dtype, check_instance, check_parameters

FORMAT = "partitioned_linear"
FORMAT_VERSION = "1"
# The most that the format itself allows.
_MOST_HEADER_BYTES = 100_000_000

_CANONICAL_NAMES = {"kernel": "weight", "bias": "bias"}

# bfloat16 is unknown to NumPy and to safetensors' NumPy reader; ml_dtypes supplies it.
_FILE_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}


def export_parameters(layer: PartitionedLinear) -> dict[str, np.ndarray]:
    """Copy an nnx layer's parameters into canonical arrays.

    Args:
        layer: The layer; its parameters may be sharded over local devices.

    Returns:
        "weight" (n, in, out) and, if any, "bias" (n, out), in the parameters' dtype (bfloat16 is that of `ml_dtypes`).

    Raises:
        TypeError: If `layer` is no nnx `PartitionedLinear`, or a parameter has a dtype that no layer has.
        ValueError: If the parameters hold no values here (abstract, traced, deleted, or partly on other hosts), or have
            other shapes than the layer's own.
    """
    return to_canonical(_parameters(layer))


def import_parameters(layer: PartitionedLinear, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy canonical arrays into an nnx layer, all of them or none; each stays on its parameter's devices.

    Args:
        layer: The layer.
        arrays: "weight" (n, in, out) and, if the layer has one, "bias" (n, out), in the parameters' dtype.

    Raises:
        TypeError: If `layer` is no nnx `PartitionedLinear`, or an array is no NumPy array, is masked or has another
            dtype; the layer is unchanged.
        ValueError: If an array is missing, extra or mis-shaped, or the layer cannot be written to here (inside a
            transform, say); the layer is unchanged.
    """
    before = _parameters(layer)
    values = from_canonical(before, arrays)
    variables = {"weight": layer.kernel} if layer.bias is None else {"weight": layer.kernel, "bias": layer.bias}
    written = []
    try:
        for name, variable in variables.items():
            variable.set_value(values[name])
            written.append(name)
    except Exception as error:
        for name in written:
            variables[name].set_value(before[name])
        raise ValueError(
            f"`layer`: expected a layer that may be changed here, got an error from Flax ({said(error)}); call this "
            f"outside of transforms."
        ) from error


def save_parameters(layer: PartitionedLinear, path: str | os.PathLike[str]) -> None:
    """Write an nnx layer's parameters to a safetensors file, which appears whole or not at all.

    Args:
        layer: The layer.
        path: Where to; a regular file is replaced and keeps its mode, and a link is followed.

    Raises:
        TypeError: If `layer` is no nnx `PartitionedLinear`, or `path` no path.
        ValueError: If the parameters hold no values here, or no file can have that name.
        OSError: If the file cannot be written.
    """
    write_arrays(export_parameters(layer), path)


def load_parameters(layer: PartitionedLinear, path: str | os.PathLike[str]) -> None:
    """Read a file written by `save_parameters`, of either framework, into an nnx layer: all of it, or nothing.

    Args:
        layer: A layer of the file's sizes and dtype.
        path: The file.

    Raises:
        TypeError: If `layer` is no nnx `PartitionedLinear`, `path` no path, or a dtype differs; the layer is unchanged.
        ValueError: If the file is foreign or of another version, or an array is missing, extra or mis-shaped; the
            layer is unchanged.
        OSError: If the file cannot be read.
    """
    import_parameters(layer, read_arrays(path, _parameters(layer)))


def to_canonical(parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copy arrays under canonical names to NumPy; raises as `check_parameters` does."""
    check_parameters(parameters)
    return {name: np.array(value) for name, value in parameters.items()}


def from_canonical(parameters: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """Copy canonical arrays to JAX arrays that can take the place of `parameters`, in shape, dtype and placement.

    Raises as `check_arrays` does, and a ValueError for float64 while x64 is off.
    """
    check_parameters(parameters)
    expected = {name: (value.shape, np.dtype(value.dtype)) for name, value in parameters.items()}
    placed = {}
    for name, array in check_arrays(arrays, expected).items():
        check_dtype(f"arrays[{name!r}]", array.dtype)
        # A copy of its own: on a CPU, JAX may keep using the memory it is given.
        placed[name] = jax.device_put(np.array(array, order="C"), getattr(parameters[name], "sharding", None))
    return placed


def write_arrays(arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Write canonical arrays to a safetensors file, which appears whole or not at all."""
    target = as_path(path)
    write_file(target, safetensors.numpy.save(dict(arrays), {"format": FORMAT, "format_version": FORMAT_VERSION}))


def read_arrays(path: str | os.PathLike[str], like: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read the arrays of a file of `write_arrays`, for a layer with arrays `like`, whose size bounds the file's."""
    path = as_path(path)
    check_parameters(like)
    # Twice and more what a file for this layer has: what else is wrong with such a file is said by name.
    content = read_file(path, _MOST_HEADER_BYTES + 8 * sum(value.size for value in like.values()))
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


def _parameters(layer: PartitionedLinear) -> dict[str, Any]:
    check_instance(
        "layer",
        layer,
        PartitionedLinear,
        "pass the nnx layer (for the parameter dicts of linen, jax_impl.linen has functions of the same names)",
    )
    sizes = layer.num_partitions, layer.in_features, layer.out_features
    shapes = {"kernel": sizes} if layer.bias is None else {"kernel": sizes, "bias": (sizes[0], sizes[2])}
    parameters = {}
    for name, shape in shapes.items():
        variable = getattr(layer, name)
        check_instance(f"layer.{name}", variable, nnx.Variable, "keep the layer's own variables")
        value = parameters[_CANONICAL_NAMES[name]] = variable.get_value()
        if getattr(value, "shape", shape) != shape:
            raise ValueError(f"`layer.{name}`: expected shape {shape}, got {value.shape}; keep the layer's own shape.")
    return parameters
