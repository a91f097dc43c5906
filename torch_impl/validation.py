"""Every check of user input, called once by the public functions.

A message is one sentence: the argument, the expected value in symbols, the received one, and what to do about it.
Wrong Python types and dtypes raise `TypeError`, wrong values, shapes and devices `ValueError`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, strided

from torch_impl.array_types import kind_of
from torch_impl.registry import DTYPE_NAMES, IMPLEMENTATIONS

_FLOATS = ", ".join(DTYPE_NAMES.values())


def check_sizes(**sizes: Any) -> None:
    """Refuse sizes that are not positive ints.

    Raises:
        TypeError: If one is no int; bool is refused.
        ValueError: If one is zero or negative.
    """
    for argument, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(
                f"`{argument}`: expected a positive int, got {size!r} of type {kind_of(size)}; pass an int."
            )
        if size <= 0:
            raise ValueError(f"`{argument}`: expected a positive int, got {size}; pass at least 1.")


def check_bias_switch(bias: Any) -> None:
    """Refuse a `bias` switch that is not a bool (a tensor, say, whose truth value means something else).

    Raises:
        TypeError: If it is not a bool.
    """
    if not isinstance(bias, bool):
        raise TypeError(f"`bias`: expected True or False, got a {kind_of(bias)}; pass a bool.")


def check_dtype(dtype: Any) -> None:
    """Refuse parameter dtypes outside the table; None stands for PyTorch's default dtype.

    Raises:
        TypeError: If it is no dtype or not one of the supported floating dtypes.
    """
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise TypeError(f"`dtype`: expected one of {_FLOATS}, got {dtype!r}; pass a floating torch.dtype.")


def check_implementation_name(name: Any) -> None:
    """Refuse a name that is neither "auto" nor in the table.

    Raises:
        TypeError: If it is no string.
        ValueError: If it is unknown; the message lists the choices.
    """
    if not isinstance(name, str):
        raise TypeError(f"`implementation`: expected a name, got a {kind_of(name)}; pass a str.")
    if name != "auto" and name not in IMPLEMENTATIONS:
        choices = ", ".join(repr(choice) for choice in ("auto", *IMPLEMENTATIONS))
        raise ValueError(f"`implementation`: expected one of {choices}, got {name!r}; choose one of these.")


def check_operands(x: Any, weight: Any, bias: Any) -> None:
    """Refuse operands of y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] that do not fit together.

    No axis is broadcast: a partition axis of size 1 does not stand for n partitions.

    Raises:
        TypeError: If one is no tensor or has no supported floating dtype.
        ValueError: If ranks, shapes or devices do not fit.
    """
    if not _operands_fit(x, weight, bias):
        _explain_operands(x, weight, bias)


def _operands_fit(x: Any, weight: Any, bias: Any) -> bool:
    # Decides in as few attribute reads as possible, because it runs before kernels that take a few microseconds.
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        return False
    shape, received, dtype, device = weight.shape, x.shape, weight.dtype, weight.device
    if len(shape) != 3 or len(received) < 2 or 0 in shape:
        return False
    n, i, o = shape
    if received[-1] != i or received[-2] != n or x.device != device:
        return False
    if dtype not in DTYPE_NAMES or (x.dtype is not dtype and x.dtype not in DTYPE_NAMES):
        return False
    if x.layout is not strided or weight.layout is not strided:
        return False
    if bias is None:
        return True
    if not isinstance(bias, Tensor) or bias.shape != (n, o) or bias.device != device:
        return False
    return (bias.dtype is dtype or bias.dtype in DTYPE_NAMES) and bias.layout is strided


def _explain_operands(x: Any, weight: Any, bias: Any) -> None:
    check_tensor("weight", weight)
    if weight.ndim != 3 or 0 in weight.shape:
        raise ValueError(
            f"`weight`: expected shape (n, in, out) with positive sizes, got {_shape(weight)}; pass one matrix per "
            f"partition."
        )
    num_partitions, in_features, out_features = weight.shape
    check_tensor("x", x)
    if x.ndim < 2 or x.shape[-2] != num_partitions or x.shape[-1] != in_features:
        raise ValueError(
            f"`x`: expected shape (..., n, in) = (..., {num_partitions}, {in_features}), got {_shape(x)}; "
            f"{_advice(x, num_partitions, in_features)}."
        )
    check_device("x", x, weight)
    if bias is None:
        return
    check_tensor("bias", bias)
    if bias.ndim != 2 or bias.shape[0] != num_partitions or bias.shape[1] != out_features:
        raise ValueError(
            f"`bias`: expected shape (n, out) = ({num_partitions}, {out_features}), got {_shape(bias)}; pass one "
            f"vector per partition."
        )
    check_device("bias", bias, weight)


def check_tensor(argument: str, tensor: Any) -> None:
    """Refuse what is no tensor of a supported floating dtype.

    Raises:
        TypeError: If it is no tensor, is sparse, or its dtype is none of the supported ones.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{argument}`: expected a torch.Tensor, got a {kind_of(tensor)}; convert it first.")
    if tensor.layout is not strided:
        raise TypeError(f"`{argument}`: expected a dense tensor, got layout {tensor.layout}; call to_dense first.")
    if tensor.dtype not in DTYPE_NAMES:
        raise TypeError(f"`{argument}`: expected a dtype of {_FLOATS}, got {_dtype(tensor)}; cast it first.")


def check_device(argument: str, tensor: Tensor, weight: Tensor) -> None:
    """Refuse a tensor that does not lie where the weight lies.

    Raises:
        ValueError: If the devices differ.
    """
    if tensor.device != weight.device:
        raise ValueError(
            f"`{argument}`: expected the device of `weight`, {weight.device}, got {tensor.device}; move one of them."
        )


def check_same_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse operands of different dtypes: nothing is promoted silently.

    Raises:
        TypeError: If the dtypes differ.
    """
    dtype = weight.dtype
    if x.dtype is dtype and (bias is None or bias.dtype is dtype):
        return
    for argument, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != weight.dtype:
            raise TypeError(
                f"`{argument}`: expected the dtype of `weight`, {_dtype(weight)}, got {_dtype(tensor)}; cast one of "
                f"them, or use torch.autocast."
            )


def check_masked_input(x: Any, weight: Tensor, num_partitions: int, in_features: int) -> None:
    """Refuse inputs of the masked dense layer that are neither (..., n, in) nor (..., n*in).

    Raises:
        TypeError: If `x` is no tensor of a supported floating dtype.
        ValueError: If shape or device do not fit.
    """
    check_tensor("x", x)
    flat = num_partitions * in_features
    split = x.ndim >= 2 and x.shape[-2] == num_partitions and x.shape[-1] == in_features
    if not split and (x.ndim < 1 or x.shape[-1] != flat):
        raise ValueError(
            f"`x`: expected shape (..., n, in) = (..., {num_partitions}, {in_features}) or (..., n*in) = "
            f"(..., {flat}), got {_shape(x)}; reshape it."
        )
    check_device("x", x, weight)


def check_materialised(views: Mapping[str, Tensor]) -> None:
    """Refuse parameters whose values are not here.

    Raises:
        ValueError: If one lies on the meta device or is sharded.
    """
    for name, view in views.items():
        where = (
            "the meta device" if view.is_meta else "shards on several devices" if hasattr(view, "placements") else ""
        )
        if where:
            raise ValueError(f"`layer`: expected values in `{name}`, got {where}; use an ordinary layer on one device.")


def check_arrays(arrays: Any, expected: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Refuse canonical arrays unless they are those of name -> (shape, dtype), by a TypeError or a ValueError."""
    if not isinstance(arrays, Mapping):
        raise TypeError(f"`arrays`: expected a mapping of names to NumPy arrays, got a {kind_of(arrays)}; pass a dict.")
    if set(arrays) != set(expected):
        raise ValueError(
            f"`arrays`: expected exactly the names {_names(expected)}, got {_names(arrays)}; the layer is unchanged."
        )
    for name, (shape, dtype) in expected.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray):
            raise TypeError(
                f"`arrays[{name!r}]`: expected a NumPy array, got a {kind_of(array)}; the layer is unchanged."
            )
        if array.shape != shape:
            symbols = "(n, in, out)" if name == "weight" else "(n, out)"
            raise ValueError(
                f"`arrays[{name!r}]`: expected shape {symbols} = {shape}, got {array.shape}; the layer is unchanged."
            )
        if array.dtype != dtype:
            got = array.dtype.name if array.dtype.isnative else array.dtype.str
            raise TypeError(f"`arrays[{name!r}]`: expected dtype {dtype.name}, got {got}; the layer is unchanged.")


def _advice(x: Tensor, num_partitions: int, in_features: int) -> str:
    if x.ndim >= 1 and x.shape[-1] == num_partitions * in_features:
        return f"split its last axis with x.unflatten(-1, ({num_partitions}, {in_features}))"
    if x.ndim >= 2 and x.shape[-2] == 1:
        return f"a shared input is not broadcast, use x.expand(..., {num_partitions}, {in_features})"
    if x.ndim >= 2 and x.shape[-1] == num_partitions and x.shape[-2] == in_features:
        return "swap its last two axes with x.mT"
    if x.ndim >= 2 and x.shape[-2] == num_partitions:
        return "give sizes per partition, never totals: its last axis holds the features of one partition"
    return "move the partition axis next to last and the features last"


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _names(mapping: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(repr, mapping)))
