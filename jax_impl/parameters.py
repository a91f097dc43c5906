"""Parameters in and out: canonical NumPy arrays and safetensors files.

The canonical form is {"weight": (n, in, out), "bias": (n, out)}, without "bias" for a layer that has none; for
partitions of unequal sizes both are packed, as `jax_impl.packing` says. Every way in and out copies bit for bit: NaN
payloads, signed zeros and subnormals included. What the nnx layer and the linen twin share is public here; the
functions for linen's parameter dicts are in `jax_impl.linen`.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from flax.core import meta
from jax import Array
from jax.core import Tracer

from jax_impl.array_types import kind_of, said, shown
from jax_impl.checkpoints import arrays_from_linears, check_keys, from_axes, linears_from_arrays, linears_in, to_axes
from jax_impl.files import as_path, read_file, write_file
from jax_impl.layer import PartitionedLinear
from jax_impl.packing import Packing
from jax_impl.validation import as_array, check_arrays, check_dtype, check_instance, check_parameters

FORMAT = "partitioned_linear"
FORMAT_VERSION, PACKED_VERSION = "1", "2"
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


def export_parameters(layer: PartitionedLinear, *, axes: Mapping[str, str] | None = None) -> dict[str, np.ndarray]:
    """Copy an nnx layer's parameters into canonical arrays.

    Args:
        layer: The layer; its parameters may be sharded over local devices.
        axes: Other axes than the canonical ones, as `import_parameters` takes them.

    Returns:
        "weight" (n, in, out) and, if any, "bias" (n, out), in the parameters' dtype (bfloat16 is that of `ml_dtypes`).

    Raises:
        TypeError: If `layer` is no nnx `PartitionedLinear`, or a parameter has a dtype that no layer has.
        ValueError: If the parameters hold no values here (abstract, traced, deleted, or partly on other hosts), or have
            other shapes than the layer's own.
    """
    return to_canonical(_parameters(layer), axes)


def import_parameters(
    layer: PartitionedLinear, arrays: Mapping[str, Any], *, axes: Mapping[str, str] | None = None
) -> None:
    """Copy canonical arrays into an nnx layer, all of them or none; each stays on its parameter's devices.

    Args:
        layer: The layer.
        arrays: "weight" (n, in, out) and, if the layer has one, "bias" (n, out), in the parameters' dtype.
        axes: For weights that another layer has laid out, the axes of each array, outermost first: {"weight": "n o i",
            "bias": "(n o)"}, say. Parentheses hold axes that are one in the array, 1 is an axis of size one. Nothing is
            guessed from sizes: an array without a pattern has the canonical axes. With `axes`, arrays of JAX are taken
            too.

    Raises:
        TypeError: If `layer` is no nnx `PartitionedLinear`, or an array is no NumPy array, is masked or has another
            dtype; the layer is unchanged.
        ValueError: If an array is missing, extra or mis-shaped, `axes` has no pattern that fits, or the layer cannot be
            written to here (inside a transform, say); the layer is unchanged.
    """
    before = _parameters(layer)
    values = from_canonical(before, arrays, axes)
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
    write_arrays(export_parameters(layer), path, layer.packing)


def load_parameters(layer: PartitionedLinear, path: str | os.PathLike[str]) -> None:
    """Read a file written by `save_parameters`, of either framework, into an nnx layer: all of it, or nothing.

    Args:
        layer: A layer of the file's sizes and dtype; a file of partitions of unequal sizes says these.
        path: The file.

    Raises:
        TypeError: If `layer` is no nnx `PartitionedLinear`, `path` no path, or a dtype differs; the layer is unchanged.
        ValueError: If the file is foreign or of another version, or an array is missing, extra or mis-shaped; the
            layer is unchanged.
        OSError: If the file cannot be read.
    """
    import_parameters(layer, read_arrays(path, _parameters(layer), layer.packing))


def load_linears(
    layer: PartitionedLinear,
    state_dict: Mapping[Any, Any] | str | os.PathLike[str],
    prefix: str = "",
    *,
    keys: Sequence[str] | None = None,
) -> None:
    """Copy the parameters of n linears into an nnx layer, kernel[n, i, o] = weight of n [o, i]: all, or nothing.

    Args:
        layer: A layer of as many maps, and of their sizes and dtype.
        state_dict: Holds `<prefix>0.weight` (out, in), `<prefix>0.bias` (out,), `<prefix>1.weight` and so on, as an
            `nn.ModuleList` of PyTorch names them, in NumPy or JAX arrays; or the name of a safetensors file, or of the
            index of several (`.index.json`). All keys may begin with the `module.` of DistributedDataParallel; what
            torch.compile and FSDP put into keys is passed over. Trees of mappings and of lists of them, as Flax's
            parameters are, have keys that are joined by dots, and so have those that were flattened with tuples; a
            `kernel` is (in, out).
        prefix: Where the list is in its model, such as "heads."; keys that do not start with it are ignored. A `*`
            stands for the number where it is not last, as in "heads.*.0.".
        keys: Names in place of the numbers, in the order of the partitions, for linears that were kept under names.

    Raises:
        TypeError: If `layer` is no nnx `PartitionedLinear`, `state_dict` neither a mapping of strings nor a path, or a
            value no array of the layer's dtype; the layer is unchanged.
        ValueError: If no key fits, a number is skipped, a key is something else, number, shapes or biases are not the
            layer's, or the file is no checkpoint; the layer is unchanged.
        OSError: If the file cannot be read.
    """
    import_parameters(layer, read_linears(state_dict, prefix, keys, _parameters(layer), layer.packing))


def export_linears(
    layer: PartitionedLinear, prefix: str = "", *, keys: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Copy an nnx layer's parameters into the state_dict of n linears, as `load_linears` takes it.

    Args:
        layer: The layer.
        prefix: What the keys begin with, such as "heads.".
        keys: Names in place of the numbers, one for each partition.

    Returns:
        `<prefix>0.weight` (out, in), `<prefix>0.bias` (out,), `<prefix>1.weight` and so on.

    Raises:
        TypeError: If `layer` is no nnx `PartitionedLinear`, or `prefix` no str.
        ValueError: As `export_parameters`.
    """
    return dict(linears_from_arrays(export_parameters(layer), prefix, layer.packing, keys))


def read_linears(
    state_dict: Any, prefix: Any, keys: Any, like: Mapping[str, Any], packing: Packing | None
) -> dict[str, np.ndarray]:
    """Return canonical arrays of linears in a mapping or a file, for a layer with arrays `like`."""
    check_parameters(like)
    if not isinstance(state_dict, Mapping | list | tuple | str | os.PathLike):
        raise TypeError(
            f"`state_dict`: expected a mapping or the name of a file, got {kind_of(state_dict)}; pass a state_dict."
        )
    if isinstance(state_dict, str | os.PathLike):
        paths = _shards(as_path(state_dict))
        entries = {name: value for path in paths for name, value in _deserialized(read_file(path), path).items()}
        state_dict = {
            name: value if isinstance(value, np.ndarray) else value["dtype"] for name, value in entries.items()
        }
    if isinstance(state_dict, Mapping) or _holds_mappings(state_dict):
        state_dict = dict(_flat(state_dict))
    else:
        raise TypeError(
            f"`state_dict`: expected mappings of names to arrays, got {shown([*map(type, state_dict[:3])])}; stack the "
            f"arrays and pass them to import_parameters with `axes`."
        )
    check_keys(keys, len(like["weight"]) if packing is None else packing.num_partitions)
    found = linears_in(state_dict, prefix, keys)
    linears = [{name: _as_array(value) for name, value in linear.items()} for linear in found]
    return arrays_from_linears(linears, prefix, _expected(like), packing, keys)


def _flat(tree: Any, path: str = "") -> Iterator[tuple[Any, Any]]:
    """Give the leaves of a tree under the names that PyTorch would have: parts with dots between, weights (out, in)."""
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        value = value.get_value() if isinstance(value, nnx.Variable) else meta.unbox(value)
        key = ".".join(map(str, key)) if isinstance(key, tuple) else key
        if isinstance(value, Mapping) or _holds_mappings(value):
            yield from _flat(value, f"{path}{key}.")
        elif re.fullmatch(r"(.*[./])?kernel", str(key)) and getattr(value, "ndim", 0) == 2:
            yield f"{path}{str(key).removesuffix('kernel')}weight", _as_array(value).T
        else:
            yield f"{path}{key}" if path else key, value


def _holds_mappings(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value)


def _as_array(value: Any) -> Any:
    """Return a JAX array's values as those of NumPy; leave others for later checks to refuse."""
    if not isinstance(value, Array) or isinstance(value, Tracer) or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return value
    return np.asarray(as_array("state_dict", value))


def _expected(parameters: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (value.shape, np.dtype(value.dtype)) for name, value in parameters.items()}


def to_canonical(parameters: Mapping[str, Any], axes: Mapping[str, str] | None = None) -> dict[str, np.ndarray]:
    """Copy arrays under canonical names to NumPy; raises as `check_parameters` does."""
    check_parameters(parameters)
    return to_axes({name: np.array(value) for name, value in parameters.items()}, axes)


def from_canonical(
    parameters: Mapping[str, Any], arrays: Mapping[str, Any], axes: Mapping[str, str] | None = None
) -> dict[str, Array]:
    """Copy canonical arrays to JAX arrays that can take the place of `parameters`, in shape, dtype and placement.

    Raises as `check_arrays` does, and a ValueError for float64 while x64 is off.
    """
    check_parameters(parameters)
    expected, placed = _expected(parameters), {}
    for name, array in check_arrays(from_axes(arrays, axes, expected, _as_array), expected).items():
        check_dtype(f"arrays[{name!r}]", array.dtype)
        # A copy of its own: on a CPU, JAX may keep using the memory it is given.
        placed[name] = jax.device_put(np.array(array, order="C"), getattr(parameters[name], "sharding", None))
    return placed


def write_arrays(arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str], packing: Packing | None) -> None:
    """Write canonical arrays to a safetensors file, which appears whole or not at all."""
    target = as_path(path)
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION}
    if packing is not None:
        metadata["format_version"] = PACKED_VERSION
        metadata |= {name: json.dumps(getattr(packing, name)) for name in ("in_features", "out_features")}
    write_file(target, safetensors.numpy.save(dict(arrays), metadata))


def read_arrays(
    path: str | os.PathLike[str], like: Mapping[str, Any], packing: Packing | None
) -> dict[str, np.ndarray]:
    """Read the arrays of a file of `write_arrays`, for a layer with arrays `like`, whose size bounds the file's."""
    path = as_path(path)
    check_parameters(like)
    # Twice and more what a file for this layer has: what else is wrong with such a file is said by name.
    content = read_file(path, _MOST_HEADER_BYTES + 8 * sum(value.size for value in like.values()))
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


def _parameters(layer: PartitionedLinear) -> dict[str, Any]:
    check_instance(
        "layer",
        layer,
        PartitionedLinear,
        "pass the nnx layer (for the parameter dicts of linen, jax_impl.linen has functions of the same names)",
    )
    packing, n = layer.packing, layer.num_partitions
    if packing is None:
        shapes = {"kernel": (n, layer.in_features, layer.out_features), "bias": (n, layer.out_features)}
    else:
        shapes = {"kernel": (packing.weight_size,), "bias": (packing.out_offsets[-1],)}
    if layer.bias is None:
        del shapes["bias"]
    parameters = {}
    for name, shape in shapes.items():
        variable = getattr(layer, name)
        check_instance(f"layer.{name}", variable, nnx.Variable, "keep the layer's own variables")
        value = parameters[_CANONICAL_NAMES[name]] = variable.get_value()
        if getattr(value, "shape", shape) != shape:
            raise ValueError(f"`layer.{name}`: expected shape {shape}, got {value.shape}; keep the layer's own shape.")
    return parameters
