"""One batched product whose batch axis is the partition axis."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from torch_impl.array_types import Bias, Inputs, Outputs, Weight

# Maps of few features, on two CPUs, one thread and two, by interleaved calls: the library multiplies by up to 11
# columns at 0.05 to 0.4 of its usual speed, and by 12 to 15 at half of it where it has 512-bit vectors (without them by
# 13 to 15 at two thirds; in fp64 at 0.3 to 0.9 up to 11, and 12 are fast). So the many rows are what it gets as
# columns. A result of up to 11 features then takes 0.2 to 0.9 of the time of the other order, with a contiguous copy
# behind it 0.2 to 1.0, and one of 12 to 15 0.4 to 0.7 (0.6 to 1.0). Training of fewer rows gains only where the
# gradient of the weight does, whose columns are then those of x.
_NARROW, _NARROW_ANYWHERE, FEWEST_ROWS, _MANY_ROWS = 15, 11, 16, 64
# Without such vectors from so many input features on: y takes 0.5 to 0.9 of the time, and training 0.7 to 1.2.
_FEWEST_TERMS = 32
# From so many rows of all partitions, and products of elements of each, on; below, a call costs more than it gains.
_FEWEST_IN_ALL, _FEWEST_OF_EACH = 2**11, 2**9
# From so many products on where the gradients that autograd derives would be in a bad order, so that they take a node,
# and where a node gains by gradients alone: that of x later without those vectors (1.0 to 1.3 of the time below).
_FEWEST_OF_A_NODE, _FEWEST_OF_GRADIENTS, _FEWEST_OF_DX = 2**18, 2**19, 2**21
# Columns of the result that are a multiple of 4 KiB apart evict each other while a copy reads them: at 8 -> 8 it takes
# 0.3 to 0.6 of the time, and with a copy behind it 1.5 to 2.4 times the time. Up to four columns take 0.1 to 0.8 by
# themselves or before a function of their elements, but 0.95 to 1.3 with a copy behind them, and 1.0 to 1.7 with a sum
# over the partitions (4096 rows; 4000 gain in all). A cache line between the columns would help on one thread (0.3 to
# 0.75), but gloo's collectives misread such a result.
_EVICTING_BYTES, _EVICTED = 4096, (5, 6, 7, 8, 12, 13, 14, 15)
# Two halves of such a result of 5 to 8 columns, copied together, take 0.4 to 0.9 of the time of the other order, and
# 0.3 to 0.7 where a contiguous result is asked for, from so many entries of y on: a copy costs several threads more.
_HALVES, _ENTRIES_ON_ONE_THREAD, _ENTRIES_OF_HALVES, _APART = (5, 6, 7, 8), 2**16, 2**20, 16
# The product with one feature is that of elements, multiplied and added in one pass over y: of 1 to 2048 rows, 8 to 100
# partitions and 1 to 256 features out, 0.05 to 0.9 of the time of the batched product. The gradients of elements are
# sums of products that are written first, so that from so many entries of y on they take a node: in training 0.7 to
# 1.5 of the time, and up to 2 with an activation behind it, whose gradient has the order of y. In 16 bits the products
# would be rounded.
_FEWEST_OF_ELEMENTS = 2**17
# The axes of rows, partitions and features in what the kernels write, for each order of the product.
_AXES = {"batched": (1, 0, 2), "narrow": (2, 0, 1), "halves": (0, 1, 2), "elements": (0, 1, 2)}

# By device type, from how many entries of y on every call is one node, whose results are contiguous. Nowhere yet: on
# CUDA it waits for a measurement that shows it faster beyond the noise in training and in inference, and on a CPU it is
# the slower one.
NODE_FROM: dict[str, int] = {}


def partitioned_linear_matmul(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as a batched product over n.

    The partition axis of `x` is moved to the front as a view, so that neither operand is copied, and the bias enters
    the same kernel. The result is laid out with the partition axis outermost and handed back as a view of shape
    (*b, n, o): it is in general not contiguous, and `reshape` rather than `view` flattens it. Writing a contiguous
    result would take 1.0 to 1.7 times as long on a CPU, by its cheapest spelling. There results of few features (at
    most 11 or 15) from many rows are laid out with the rows innermost, or are contiguous, which takes a fraction of the
    time, and the product with a single feature is spelled as that of elements, which are contiguous.
    """
    single_batch_axis = x.ndim == 3
    rows = x if single_batch_axis else x.reshape(-1, *x.shape[-2:])
    if NODE_FROM and _takes_one_node(rows, weight, bias):
        y = _as_one_node(rows, weight, bias)
    elif _may_be_narrow(rows, weight) and (orders := orders_of(rows.shape[0], *weight.shape, weight.dtype.itemsize)):
        y = ordered_product(rows, weight, bias, *orders)
    else:
        y = _batched_product(rows, weight, bias)
    return y if single_batch_axis else y.reshape(*x.shape[:-1], weight.shape[2])


def _batched_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product of one batch axis, (b, n, i), with the partition axis outermost in memory."""
    if bias is None:
        return torch.bmm(rows.transpose(0, 1), weight).transpose(0, 1)
    return torch.baddbmm(bias.unsqueeze(1), rows.transpose(0, 1), weight).transpose(0, 1)


def _may_be_narrow(rows: Tensor, weight: Tensor) -> bool:
    """Say whether maps of few features may be spelled otherwise; a program would be compiled anew for other rows."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or type(rows) is not Tensor or not rows.is_cpu:
        return False
    # Symbolic sizes, which a transform may wrap in an ordinary tensor, are not looked at: that would be a guard.
    return isinstance(rows.numel(), int) and isinstance(weight.numel(), int)


def ordered_product(rows: Tensor, weight: Tensor, bias: Tensor | None, order: str, of_dx: str, gains: bool) -> Tensor:
    """Compute the product, and its gradients, in the orders that `orders_of` names.

    That of y does not depend on what is recorded, nor on the threads of the moment: what is computed once more for a
    gradient has to come out in the same order, since `dropout` draws in it. Gradients whose orders are not those that
    autograd derives take a node.
    """
    if torch.is_grad_enabled():
        derived = order == "narrow" and (of_dx == "narrow" or not rows.requires_grad)
        gains = not derived and (gains or (rows.requires_grad and of_dx != "batched"))
        if gains and _is_recorded(rows, weight, bias) and _is_plain(rows, weight, bias):
            return _NarrowProduct.apply(rows, weight, bias, order, of_dx).permute(_AXES[order])
    return _written(order, rows, weight, bias).permute(_AXES[order])


@functools.lru_cache(maxsize=1024)
def orders_of(count: int, n: int, in_features: int, width: int, item: int) -> tuple[str, str, bool] | None:
    """Name the fastest orders of y and dx on a CPU, and say whether a node gains where x needs no gradient.

    None where the batched product and its derived gradients are the fastest.
    """
    if item < 4:
        return None
    if in_features == 1:
        gains = count * n * width >= _FEWEST_OF_ELEMENTS
        return "elements", _order(count, n, width, in_features, item) if gains else "batched", gains
    if count < FEWEST_ROWS or min(in_features, width) > _NARROW:
        return None
    order = _order(count, n, in_features, width, item)
    if order == "batched" and count * n * in_features * width < _FEWEST_OF_GRADIENTS:
        return None
    of_dx = _order(count, n, width, in_features, item)
    if order == "batched" and not _has_wide_vectors() and count * n * in_features * width < _FEWEST_OF_DX:
        of_dx = "batched"
    gains = order != "batched" or _has_narrow_gradient(in_features, width, item)
    return (order, of_dx, gains) if gains or of_dx != "batched" else None


def _order(count: int, n: int, in_features: int, width: int, item: int) -> str:
    """Name the fastest order of a product of so many rows by itself."""
    products = count * in_features * width
    enough = count >= (FEWEST_ROWS if width < in_features and item == 4 else _MANY_ROWS)
    enough = enough and count * n >= _FEWEST_IN_ALL and products >= _FEWEST_OF_EACH
    enough = enough and (_are_few(in_features, width, item) or n * products >= _FEWEST_OF_A_NODE)
    if not enough or not _are_few(width, in_features, item):
        return "batched"
    if width not in _EVICTED or count * item % _EVICTING_BYTES:
        return "narrow"
    fewest = _ENTRIES_ON_ONE_THREAD if _threads() == 1 else _ENTRIES_OF_HALVES
    return "halves" if width in _HALVES and count * n * width >= fewest else "batched"


def _are_few(columns: int, terms: int, item: int) -> bool:
    """Say whether the library is slow with so many columns, each a sum of so many terms."""
    if columns <= _NARROW_ANYWHERE or columns > _NARROW or item > 4:
        return columns <= _NARROW_ANYWHERE
    return _has_wide_vectors() or (columns > _NARROW_ANYWHERE + 1 and terms >= _FEWEST_TERMS)


@functools.cache
def _has_wide_vectors() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


@functools.cache
def _threads() -> int:
    """Count the threads at the first call: orders must not change between a call and its repetition."""
    return torch.get_num_threads()


def _written(order: str, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product in an order, with the axes of `_AXES`."""
    if order == "narrow":
        turned, columns = _turned(weight), rows.permute(1, 2, 0)
        return torch.bmm(turned, columns) if bias is None else torch.baddbmm(bias.unsqueeze(2), turned, columns)
    if order == "batched":
        factor = rows.transpose(0, 1)
        return torch.bmm(factor, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), factor, weight)
    if order == "halves":  # their columns are not a multiple of 4 KiB apart
        half = rows.shape[0] // 2 + _APART
        parts = [_written("narrow", part, weight, bias) for part in (rows[:half], rows[half:])]
        return torch.cat([part.permute(_AXES["narrow"]) for part in parts])
    matrix = weight.squeeze(1)
    y = rows * matrix if bias is None else torch.addcmul(bias, rows, matrix)
    return y.contiguous()  # whatever the strides of operands, which it would follow


def _turned(weight: Tensor) -> Tensor:
    """View W[n, i, o] as W[n, o, i], so that the gradient lies as the weight does: fused optimizers ignore strides."""
    kind = type(weight)
    if not torch.is_grad_enabled() or (kind is not Tensor and not issubclass(kind, Parameter)):
        return weight.mT
    if not weight.is_contiguous() or torch.compiler.is_compiling():
        return weight[:].mT  # a slice has such a gradient too, and costs more
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return weight[:].mT  # in a traced program strides would stay those of the moment
    n, in_features, out_features = weight.shape
    return weight.as_strided((n, out_features, in_features), (in_features * out_features, 1, out_features))


class _NarrowProduct(torch.autograd.Function):
    """The product as one node, whose gradients have orders of their own; derived ones would follow from that of y.

    It consists of operations that have derivatives, so that those of gradients are theirs.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, order: str, of_dx: str) -> Tensor:
        for_rows, for_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(rows if for_weight else None, weight if for_rows else None)
        ctx.set_materialize_grads(False)
        ctx.orders = order, of_dx
        return _written(order, rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = dweight = dbias = None
        if dy is not None:
            rows, weight = ctx.saved_tensors
            order, of_dx = ctx.orders
            dy = dy.permute(_AXES[order])
            for_rows, for_weight, for_bias = ctx.needs_input_grad[:3]
            if for_rows:
                dx = _written(of_dx, dy, weight.mT, None).permute(_AXES[of_dx])
            if for_weight:
                dweight = _gradient_of_weight(rows, dy)
            dbias = dy.sum(0) if for_bias else None
        return dx, dweight, dbias, None, None


def _gradient_of_weight(rows: Tensor, dy: Tensor) -> Tensor:
    """Compute sum_b x[b, n, i] * dy[b, n, o], where few columns are slow with those of x as columns."""
    if _has_narrow_gradient(rows.shape[2], dy.shape[2], rows.dtype.itemsize):
        transposed = torch.bmm(dy.permute(1, 2, 0), rows.transpose(0, 1))
        return transposed.mT.clone(memory_format=torch.contiguous_format)
    return torch.bmm(rows.permute(1, 2, 0), dy.transpose(0, 1))


def _has_narrow_gradient(in_features: int, width: int, item: int) -> bool:
    return width < in_features and _are_few(width, in_features, item)


def _is_recorded(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands)


def _is_plain(*operands: Tensor | None) -> bool:
    """Say whether no transformation has to see through a node of these operands."""
    given = [operand for operand in operands if operand is not None]
    if not all(type(operand) in (Tensor, Parameter) for operand in given):
        return False
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return forward_ad._current_level < 0 or all(forward_ad.unpack_dual(each).tangent is None for each in given)


def _takes_one_node(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether `_OneNode` may compute a call: it is large enough, and no transformation has to see through it."""
    fewest = NODE_FROM.get(rows.device.type)
    if fewest is None or rows.shape[0] * weight.shape[0] * weight.shape[2] < fewest:
        return False
    return _is_plain(rows, weight, bias)


def _is_transformed() -> bool:
    """Say whether `torch.func` or forward-mode differentiation has a level open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _as_one_node(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _is_recorded(rows, weight, bias):
        return _OneNode.apply(rows, weight, bias)
    with torch.no_grad():
        return _written_once(rows, weight, bias)


def _written_once(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product into a contiguous result, whose strides the kernel of a GPU takes as they are."""
    y = rows.new_empty(rows.shape[0], weight.shape[0], weight.shape[2])
    by_partition, into = rows.transpose(0, 1), y.transpose(0, 1)
    if bias is None:
        torch.bmm(by_partition, weight, out=into)
    else:
        torch.baddbmm(bias.unsqueeze(1), by_partition, weight, out=into)
    return y


class _OneNode(torch.autograd.Function):
    """The product as one node of the graph: y and dx are written once and contiguous, dW has the strides of a weight.

    Recorded operations would be three: views before and after the product, whose gradients are copied again.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _written_once(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight = ctx.saved_tensors
        for_rows, for_weight, for_bias = ctx.needs_input_grad
        by_feature = rows.permute(1, 2, 0)
        # Gradients of gradients, and those of a transformation, are derived from plain operations.
        # `is_grads_batched` opens no level.
        batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # pyright: ignore[reportAttributeAccessIssue]
        plain = batched or torch.is_grad_enabled() or type(dy) is not Tensor or _is_transformed()
        dx = dweight = None
        if for_rows:
            if plain:
                dx = torch.bmm(dy.transpose(0, 1), weight.mT).transpose(0, 1)
            else:
                dx = _written_once(dy, weight.mT, None)
        if for_weight:
            into = None if plain else weight.new_empty(weight.shape)
            dweight = torch.bmm(by_feature, dy.transpose(0, 1), out=into)
        # Added up in fp32, and rounded once.
        return dx, dweight, dy.sum(0) if for_bias else None


def shared_linear_matmul(x: Tensor, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., i] * W[n, i, o] + b[n, o] as one product with a matrix of n*o columns.

    The matrix is a copy of the weight, and x is not copied; the gradient of x adds up over all partitions in one
    product too.
    """
    num_partitions, in_features, out_features = weight.shape
    dense = weight.transpose(0, 1).reshape(in_features, num_partitions * out_features)
    rows = x.reshape(-1, in_features)
    y = rows @ dense if bias is None else torch.addmm(bias.reshape(-1), rows, dense)
    return y.reshape(*x.shape[:-1], num_partitions, out_features)
