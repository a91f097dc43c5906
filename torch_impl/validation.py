"""Every check of user input, called once by the public functions.

A message is one sentence: the argument, the expected value in symbols, the received one, and what to do about it.
Wrong Python types and dtypes raise `TypeError`, wrong values, shapes and devices `ValueError`.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, strided
from torch.nn.parameter import is_lazy

from torch_impl.array_types import kind_of, said, shown
from torch_impl.layouts import layout_advice
from torch_impl.registry import (
    DTYPE_NAMES,
    IMPLEMENTATIONS,
    UNEQUAL_IMPLEMENTATIONS,
    UnsupportedImplementationError,
    get_implementation,
)

_FLOATS = ", ".join(DTYPE_NAMES.values())
# Sizes in bytes are 64-bit integers, and an element has at most eight.
MOST_ELEMENTS = 2**60
_MOST_AXES = 64
_MOST_NAMES = 8  # in a message


def check_sizes(*, dense: bool = False, **sizes: Any) -> None:
    """Refuse what is no int (bool included) by a TypeError, and what is not positive or too large by a ValueError.

    A dense weight has a block for every pair of partitions.
    """
    for argument, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            several = argument != "num_partitions" and not dense and hasattr(size, "__iter__")
            raise TypeError(
                f"`{argument}`: expected a positive int, got {shown(size)} of type {type(size).__name__}; pass an int"
                f"{', or a list of one for each partition' if several else ''}."
            )
        if size <= 0:
            raise ValueError(f"`{argument}`: expected a positive int, got {shown(size)}; pass at least 1.")
    if math.prod(sizes.values()) * (sizes["num_partitions"] if dense else 1) >= MOST_ELEMENTS:
        largest = max(sizes, key=lambda argument: sizes[argument])
        raise ValueError(
            f"`{largest}`: expected sizes whose weight has fewer than 2**60 elements, got {shown(sizes[largest])}; "
            f"give sizes per partition, never totals."
        )


def check_bias_switch(bias: Any) -> None:
    """Refuse, by a TypeError, a `bias` switch that is no bool (a tensor, say, whose truth means something else)."""
    if not isinstance(bias, bool):
        raise TypeError(f"`bias`: expected True or False, got {kind_of(bias)}; pass a bool.")


def check_dtype(dtype: Any) -> None:
    """Refuse, by a TypeError, parameter dtypes outside the table; None stands for PyTorch's default dtype."""
    resolved = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(resolved, torch.dtype) or resolved not in DTYPE_NAMES:
        raise TypeError(f"`dtype`: expected one of {_FLOATS}, got {shown(resolved)}; pass a floating torch.dtype.")


def check_placement(device: Any) -> None:
    """Refuse what is no device by a TypeError, and one that this PyTorch cannot use by a ValueError."""
    if device is None:
        return
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise TypeError(f"`device`: expected a torch.device, a name or an index, got {shown(device)}; pass one.")
    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise ValueError(
            f"`device`: expected a device that this PyTorch can use, got {shown(device)} ({said(error)}); choose "
            f"another one."
        ) from error


def check_implementation_name(name: Any, *, unequal: bool = False) -> None:
    """Refuse what is no string by a TypeError, and a name that is unknown, or of other sizes, by a ValueError."""
    if not isinstance(name, str):
        raise TypeError(f"`implementation`: expected a name, got {kind_of(name)}; pass a str.")
    table = UNEQUAL_IMPLEMENTATIONS if unequal else IMPLEMENTATIONS
    if name != "auto" and name not in table:
        if name in IMPLEMENTATIONS or name in UNEQUAL_IMPLEMENTATIONS:
            get_implementation(name, unequal=unequal)  # raises
        choices = ", ".join(repr(choice) for choice in ("auto", *table))
        raise ValueError(f"`implementation`: expected one of {choices}, got {shown(name)}; choose one of these.")


def check_operands(x: Any, weight: Any, bias: Any) -> None:
    """Refuse operands of wrong types or dtypes by a TypeError, of shapes or devices that do not fit by a ValueError.

    No axis is broadcast: a partition axis of size 1 does not stand for n partitions.
    """
    failure = None
    try:
        if operands_fit(x, weight, bias) is not None:
            return
    except Exception as error:  # nested and uninitialised tensors have no shape, others have too few axes
        failure = error
    _explain_operands(x, weight, bias)
    if failure is not None:
        raise TypeError(
            f"`x`: expected plain tensors, got {kind_of(x)} for {kind_of(weight)} ({said(failure)}); convert them "
            f"first."
        ) from failure


def operands_fit(x: Any, weight: Any, bias: Any) -> bool | None:
    """Return None for operands that `check_operands` refuses, and for others whether they have one dtype.

    It runs before kernels that take a few microseconds, so it reads few attributes; a wrong number of axes may raise.
    """
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        return None
    n, i, o = weight.shape
    received, dtype, device, other = x.shape, weight.dtype, weight.device, x.dtype
    if received[-1] != i or received[-2] != n or not (n and i and o) or x.device != device:
        return None
    if dtype not in DTYPE_NAMES or x.layout is not strided or weight.layout is not strided:
        return None
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.shape != (n, o) or bias.device != device or bias.layout is not strided:
            return None
        if bias.dtype is not dtype:
            return False if bias.dtype in DTYPE_NAMES and other in DTYPE_NAMES else None
    return True if other is dtype else False if other in DTYPE_NAMES else None


def _explain_operands(x: Any, weight: Any, bias: Any) -> None:
    check_weight(weight)
    num_partitions, in_features, _ = weight.shape
    check_tensor("x", x)
    if x.ndim < 2 or x.shape[-2] != num_partitions or x.shape[-1] != in_features:
        raise ValueError(
            f"`x`: expected shape (..., n, in) = (..., {num_partitions}, {in_features}), got {_shape(x)}; "
            f"{layout_advice(x.shape, num_partitions, in_features)}."
        )
    check_device("x", x, weight)
    check_bias(bias, weight)


def check_tensors(x: Any, weight: Any, bias: Any) -> None:
    """Refuse operands as `check_operands` does, but for their sizes beside one another, and for devices."""
    with contextlib.suppress(Exception):  # nested and uninitialised tensors have no shape
        n, _, o = weight.shape
        tensors = (x, weight) if bias is None else (x, weight, bias)
        plain = all(tensor.dtype in DTYPE_NAMES and tensor.layout is strided for tensor in tensors)
        if plain and 0 not in weight.shape and x.ndim > 0 and (bias is None or bias.shape == (n, o)):
            return
    check_weight(weight)
    check_tensor("x", x)
    check_bias(bias, weight)


def check_weight(weight: Any) -> None:
    """Refuse a weight as `check_operands` does."""
    check_tensor("weight", weight)
    if weight.ndim != 3 or 0 in weight.shape:
        raise ValueError(
            f"`weight`: expected shape (n, in, out) with positive sizes, got {_shape(weight)}; pass one matrix per "
            f"partition."
        )


def check_bias(bias: Any, weight: Tensor) -> None:
    """Refuse a bias as `check_operands` does."""
    num_partitions, _, out_features = weight.shape
    if bias is None:
        return
    check_tensor("bias", bias)
    if bias.ndim != 2 or bias.shape[0] != num_partitions or bias.shape[1] != out_features:
        raise ValueError(
            f"`bias`: expected shape (n, out) = ({num_partitions}, {out_features}), got {_shape(bias)}; pass one "
            f"vector per partition."
        )
    check_device("bias", bias, weight)


def explain_failure(error: RuntimeError, implementation: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise, in this package's words, why an implementation failed on operands that fit; return if `error` says it.

    Only a call that has failed gets here, so that others are not searched for what hardly ever happens.
    """
    for argument, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_storage(argument, tensor)
        if tensor is not None and tensor.is_inference() and "nference" in str(error):
            raise ValueError(
                f"`{argument}`: expected a tensor that autograd may keep, got one made under torch.inference_mode; "
                f"clone it, or call this in that mode."
            ) from error
    if isinstance(error, NotImplementedError):
        raise UnsupportedImplementationError(
            f"`implementation`: expected one that supports this call, got {implementation!r} ({said(error)}); choose "
            f"another one."
        ) from error
    if x.ndim > _MOST_AXES or x.numel() * weight.shape[-1] >= MOST_ELEMENTS:
        raise ValueError(
            f"`x`: expected at most {_MOST_AXES} axes and an output of fewer than 2**60 elements, got "
            f"{shown(_shape(x))}; flatten its leading axes, or split them."
        ) from error


def check_tensor(argument: str, tensor: Any) -> None:
    """Refuse, by a TypeError, all but dense tensors of a supported floating dtype that have a shape."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{argument}`: expected a torch.Tensor, got {kind_of(tensor)}; convert it first.")
    if is_lazy(tensor):
        raise TypeError(
            f"`{argument}`: expected a tensor with a shape, got {kind_of(tensor)}; initialise it first, by a first "
            f"batch."
        )
    try:
        nested, layout, dtype = tensor.is_nested, tensor.layout, tensor.dtype
        shape = None if nested else tensor.shape
    except Exception as error:
        raise TypeError(
            f"`{argument}`: expected a dense tensor, got {kind_of(tensor)} ({said(error)}); convert it first."
        ) from error
    if shape is None:
        raise TypeError(f"`{argument}`: expected a dense tensor, got a nested one; pad it to one shape first.")
    if layout is not strided:
        raise TypeError(f"`{argument}`: expected a dense tensor, got layout {layout}; call to_dense first.")
    if dtype not in DTYPE_NAMES:
        raise TypeError(f"`{argument}`: expected a dtype of {_FLOATS}, got {_dtype(tensor)}; cast it first.")


def check_storage(argument: str, tensor: Tensor) -> None:
    """Refuse, by a ValueError, a tensor whose storage was freed, as sharded training does between its steps."""
    if not is_plain(tensor) or tensor.is_meta or tensor.numel() == 0:
        return
    try:
        held = tensor.untyped_storage().nbytes()
    except RuntimeError:  # a tensor inside a transform such as torch.func.jvp
        return
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in steps)
    if held < (last + 1) * tensor.element_size():
        raise ValueError(
            f"`{argument}`: expected a tensor with values, got one whose storage was freed; use it while it holds them."
        )


def is_plain(tensor: Tensor) -> bool:
    """Say whether a tensor's values are its own and here: it is no DTensor, fake tensor or other subclass."""
    return type(tensor) in (Tensor, nn.Parameter)


def check_device(argument: str, tensor: Tensor, weight: Tensor) -> None:
    """Refuse, by a ValueError, a tensor that does not lie where the weight lies."""
    if tensor.device != weight.device:
        raise ValueError(
            f"`{argument}`: expected the device of `weight`, {weight.device}, got {tensor.device}; move one of them."
        )


def check_same_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse, by a TypeError, operands of different dtypes: nothing is promoted silently."""
    dtype = weight.dtype
    if x.dtype is dtype and (bias is None or bias.dtype is dtype):
        return
    for argument, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != weight.dtype:
            raise TypeError(
                f"`{argument}`: expected the dtype of `weight`, {_dtype(weight)}, got {_dtype(tensor)}; cast one of "
                f"them, or use torch.autocast."
            )


def check_masked_operands(
    x: Any, weight: Any, bias: Any, *, num_partitions: int, in_features: int, out_features: int
) -> None:
    """Refuse operands of the masked dense layer as `check_operands` does; inputs are (..., n, in) or (..., n*in)."""
    all_in, all_out = num_partitions * in_features, num_partitions * out_features
    with contextlib.suppress(Exception):  # nested and uninitialised tensors have no shape
        if _masked_operands_fit(x, weight, bias, all_in, (num_partitions, in_features), all_out):
            return
    check_tensor("x", x)
    check_tensor("weight", weight)
    if weight.shape != (all_out, all_in):
        raise ValueError(
            f"`weight`: expected shape (n*out, n*in) = ({all_out}, {all_in}), got {_shape(weight)}; keep the layer's "
            f"own shape."
        )
    split = x.ndim >= 2 and x.shape[-2] == num_partitions and x.shape[-1] == in_features
    if not split and (x.ndim < 1 or x.shape[-1] != all_in):
        raise ValueError(
            f"`x`: expected shape (..., n, in) = (..., {num_partitions}, {in_features}) or (..., n*in) = "
            f"(..., {all_in}), got {_shape(x)}; reshape it."
        )
    check_device("x", x, weight)
    if bias is None:
        return
    check_tensor("bias", bias)
    if bias.shape != (all_out,):
        raise ValueError(
            f"`bias`: expected shape (n*out,) = ({all_out},), got {_shape(bias)}; keep the layer's own shape."
        )
    check_device("bias", bias, weight)


def _masked_operands_fit(x: Any, weight: Any, bias: Any, flat: int, split: tuple[int, int], all_out: int) -> bool:
    if not isinstance(x, Tensor) or weight.shape != (all_out, flat) or x.device != weight.device:
        return False
    if x.shape[-1:] != (flat,) and x.shape[-2:] != split:
        return False
    if bias is not None and (bias.shape != (all_out,) or bias.device != weight.device):
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return all(tensor.dtype in DTYPE_NAMES and tensor.layout is strided for tensor in tensors)


def check_parameters(layer: nn.Module, **shapes: tuple[int, ...]) -> None:
    """Refuse parameters that were replaced by others of a wrong kind (TypeError), shape or storage (ValueError)."""
    for name, shape in shapes.items():
        parameter = getattr(layer, name)
        check_tensor(f"layer.{name}", parameter)
        if parameter.shape != shape:
            raise ValueError(
                f"`layer.{name}`: expected shape {shape}, got {_shape(parameter)}; keep the layer's own shape."
            )
        check_storage(f"layer.{name}", parameter)


def check_materialised(views: Mapping[str, Tensor]) -> None:
    """Refuse, by a ValueError, parameters without values here: on the meta device, sharded, or fake."""
    for name, view in views.items():
        if hasattr(view, "placements"):
            where = "shards on several devices"
        elif not is_plain(view):
            where = kind_of(view)
        elif view.is_meta:
            where = "the meta device"
        else:
            continue
        raise ValueError(f"`layer`: expected values in `{name}`, got {where}; use an ordinary layer on one device.")


def check_arrays(arrays: Any, expected: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, np.ndarray]:
    """Refuse canonical arrays unless they are those of name -> (shape, dtype), by a TypeError or a ValueError.

    Returns:
        The arrays, each read once: what a mapping reads from a file might be another array the next time.
    """
    if not isinstance(arrays, Mapping):
        raise TypeError(f"`arrays`: expected a mapping of names to NumPy arrays, got {kind_of(arrays)}; pass a dict.")
    if set(arrays) != set(expected):
        raise ValueError(
            f"`arrays`: expected exactly the names {_names(expected)}, got {_names(arrays)}; the layer is unchanged."
        )
    found = {}
    for name, (shape, dtype) in expected.items():
        argument = f"arrays[{name!r}]"
        try:
            array = found[name] = arrays[name]
        except Exception as error:
            raise ValueError(
                f"`{argument}`: expected a NumPy array, got an error from the mapping ({said(error)}); the layer is "
                f"unchanged."
            ) from error
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            # A copy of the numbers would drop the mask.
            masked = isinstance(array, np.ndarray)
            wanted, advice = ("a NumPy array without a mask", "fill") if masked else ("a NumPy array", "convert")
            raise TypeError(
                f"`{argument}`: expected {wanted}, got {kind_of(array)}; the layer is unchanged, {advice} it first."
            )
        if array.shape != shape:
            symbols = ("(packed,)", "(n, out)", "(n, in, out)")[len(shape) - 1]
            raise ValueError(
                f"`{argument}`: expected shape {symbols} = {shape}, got {array.shape}; the layer is unchanged."
            )
        if array.dtype != dtype:
            got = array.dtype.name if array.dtype.isnative else array.dtype.str
            raise TypeError(
                f"`{argument}`: expected dtype {dtype.name}, got {got}; the layer is unchanged, cast one of the two."
            )
    return found


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _names(mapping: Mapping[Any, Any]) -> str:
    names = sorted(map(shown, mapping))
    return ", ".join([*names[:_MOST_NAMES], *(["..."] if len(names) > _MOST_NAMES else [])])
