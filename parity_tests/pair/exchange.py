"""Named groups of arrays as the bytes of a safetensors file: what two interpreters hand to each other. Never pickle."""

from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from parity_tests.judge.dtypes import numpy_dtype
from parity_tests.pair.side import Arrays

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": numpy_dtype("bfloat16"),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_SEPARATOR = "/"
# The file format has no complex numbers of 64-bit parts: they are written as pairs of parts, and marked so.
_COMPLEX = {np.dtype(np.complex64): np.dtype(np.float32), np.dtype(np.complex128): np.dtype(np.float64)}
_MARK = "complex "


def packed(groups: Mapping[str, Arrays]) -> bytes:
    """Returns arrays as the bytes of a safetensors file, bit for bit.

    Args:
        groups: arrays by group and name; a group may be empty.

    Raises:
        ValueError: for a dtype that safetensors does not have.
    """
    tensors = {}
    for group, arrays in groups.items():
        for name, array in arrays.items():
            key, array = f"{group}{_SEPARATOR}{name}", np.array(array, order="C")
            if array.dtype in _COMPLEX:
                key, array = f"{_MARK}{key}", array[..., None].view(_COMPLEX[array.dtype])
            if array.dtype not in _DTYPES.values():
                raise ValueError(f"{name}: expected an array of numbers or booleans, got {array.dtype}; convert it.")
            tensors[key] = array
    return safetensors.numpy.save(tensors)


def unpacked(data: bytes) -> dict[str, dict[str, np.ndarray]]:
    """Returns what `packed` was given; groups without arrays are absent."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in safetensors.deserialize(data):
        group, _, name = key.partition(_SEPARATOR)
        array = np.frombuffer(bytearray(tensor["data"]), _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        if group.startswith(_MARK):
            whole = next(dtype for dtype, part in _COMPLEX.items() if part == array.dtype)
            group, array = group.removeprefix(_MARK), array.view(whole)[..., 0]
        groups.setdefault(group, {})[name] = array
    return groups
