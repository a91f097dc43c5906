"""One batched product whose batch axis is the partition axis."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from torch_impl.array_types import Bias, Inputs, Outputs, Weight

# Maps of few features, on one thread and two of one CPU, by interleaved calls: its library multiplies by up to 11
# columns at 0.05 to 0.3 of its usual speed, by 12 to 15 at half of it (fp32; in fp64 at 0.3 to 0.8 up to 11, and 12 are
# fast). So the many rows are what it gets as columns. A result of up to 8 features then takes 0.2 to 0.9 of the time of
# the other order, one of 9 to 11 0.2 to 0.6, with a contiguous copy behind it 0.2 to 1.0, and one of 12 to 15 0.4 to
# 0.7 (0.6 to 1.0); training, where x needs no gradient, 0.1 to 0.7. Below so many entries of x the questions below cost
# as much as is gained.
NARROW, _NARROW_IN_FP64, FEWEST_ROWS, FEWEST_ENTRIES = 15, 11, 16, 2**12
# Columns of the result that are a multiple of 4 KiB apart evict each other while a copy reads them: at 8 -> 8 it takes
# 0.3 to 0.6 of the time, and with a copy behind it 1.5 to 2.4 times the time. Up to four columns take 0.1 to 0.8 by
# themselves or before a function of their elements, but 0.95 to 1.3 with a copy behind them, and 1.0 to 1.7 with a sum
# over the partitions (4096 rows; 4000 gain in all). A cache line between the columns would help on one thread (0.3 to
# 0.75), but gloo's collectives misread such a result.
_ALIASED_BYTES, _ALIASED = 4096, (5, 6, 7, 8, 12, 13, 14, 15)
# Two halves of such a result of 5 to 8 columns, copied together, take 0.4 to 0.9 of the time, and 0.3 to 0.7 where a
# contiguous result is asked for, from so many entries of y on: with several threads a copy costs more.
_WIDEST_HALVES, _ENTRIES_ON_ONE_THREAD, _ENTRIES_OF_HALVES, _APART = 8, 2**16, 2**20, 16
# As the graph derives it, the gradient of x has the order of the result: the layer below, in the other one, then takes
# longer than is gained (a model of two layers 1.1 to 1.8 times as long). Not so where x is as narrow (0.9 to 1.1 times,
# and 0.5 to 0.9 by itself), or has that order itself, as the result of a narrow layer has (0.5 to 0.9). Elsewhere one
# node of the graph chooses each order by itself, from so many products of elements on: models of one layer and two take
# 0.4 to 1.1 of the time, 0.75 in the geometric mean. Fewer rows than so many gain in training only where the gradient
# of the weight does.
_NARROWEST_INPUT, _FEWEST_PRODUCTS, _MANY_ROWS = 4, 2**19, 64

# By device type, from how many entries of y on every call is one node, whose results are contiguous. Nowhere yet: on
# CUDA it waits for a measurement that shows it faster beyond the noise in training and in inference, and on a CPU it is
# the slower one.
NODE_FROM: dict[str, int] = {}


def partitioned_linear_matmul(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as a batched product over n.

    The partition axis of `x` is moved to the front as a view, so that neither operand is copied, and the bias enters
    the same kernel. The result is laid out with the partition axis outermost and handed back as a view of shape
    (*b, n, o): it is not contiguous unless the batch or n is 1, and `reshape` rather than `view` flattens it. Writing a
    contiguous result would take 1.0 to 1.7 times as long on a CPU, by its cheapest spelling. There results of at most
    15 features from many rows are laid out with the rows innermost, or are contiguous, which takes a fraction of the
    time, and the product with a single feature is spelled as that of elements where no gradient is recorded.
    """
    single_batch_axis = x.ndim == 3
    rows = x if single_batch_axis else x.reshape(-1, *x.shape[-2:])
    _, in_features, out_features = weight.shape
    if in_features == 1 and _is_outer_product(rows, weight, bias):
        matrix = weight.squeeze(1)
        y = rows * matrix if bias is None else torch.addcmul(bias, rows, matrix)
    elif NODE_FROM and _takes_one_node(rows, weight, bias):
        y = _as_one_node(rows, weight, bias)
    elif min(in_features, out_features) <= NARROW and _may_be_narrow(rows, weight):
        y = _product_of_narrow_maps(rows, weight, bias)
    else:
        y = _batched_product(rows, weight, bias)
    return y if single_batch_axis else y.reshape(*x.shape[:-1], out_features)


def _batched_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product of one batch axis, (b, n, i), with the partition axis outermost in memory."""
    if bias is None:
        return torch.bmm(rows.transpose(0, 1), weight).transpose(0, 1)
    return torch.baddbmm(bias.unsqueeze(1), rows.transpose(0, 1), weight).transpose(0, 1)


def _narrow_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product transposed, W[n, o, i] times x[n, i, b], so that the long axis is the one of the columns."""
    columns, matrices = rows.permute(1, 2, 0), weight.mT
    y = torch.bmm(matrices, columns) if bias is None else torch.baddbmm(bias.unsqueeze(2), matrices, columns)
    return y.permute(2, 0, 1)


def _is_outer_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether a product with one feature is that of elements, multiplied and added in one pass over y.

    Measured in fp32 on one and two threads of a CPU, 1 to 2048 rows, 8 to 100 partitions, 1 to 256 features out: 0.05
    to 0.9 of the time of the batched product. With gradients it took 0.2 to 2.8 times as long: theirs are sums of
    products that are written first. In 16 bits they would be rounded.
    """
    if torch.compiler.is_compiling() or not rows.is_cpu or weight.dtype.itemsize < 4 or type(rows) is not Tensor:
        return False
    if torch._C._is_tracing():  # what is traced with gradients is checked, and run, without them as well
        return False
    recorded = rows.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return not (recorded and torch.is_grad_enabled())


def _may_be_narrow(rows: Tensor, weight: Tensor) -> bool:
    """Say whether maps of few features may be spelled otherwise; a program would be compiled anew for other rows."""
    if torch.compiler.is_compiling() or type(rows) is not Tensor or not rows.is_cpu:
        return False
    count, _, in_features = rows.shape
    # Symbolic rows, which a transform may wrap in an ordinary tensor, are not looked at: that would be a guard.
    return isinstance(count, int) and count >= FEWEST_ROWS and in_features > 1 and weight.dtype.itemsize >= 4


def _product_of_narrow_maps(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product, and its gradients, in the orders that were measured to be the fastest."""
    if not _is_recorded(rows, weight, bias):
        return _in_its_order(rows, weight, bias)
    in_features = weight.shape[1]
    keeps_order = not rows.requires_grad or in_features <= _NARROWEST_INPUT or rows.stride(0) == 1
    keeps_order = keeps_order and (rows.shape[0] >= _MANY_ROWS or _has_narrow_gradient(rows, weight))
    if keeps_order and _has_narrow_results(rows, weight):
        return _narrow_product(rows, weight, bias)
    if rows.numel() * weight.shape[2] >= _FEWEST_PRODUCTS and _is_plain(rows, weight, bias):
        factors = [(rows, weight), (rows, weight.mT)][: 1 + rows.requires_grad]
        alone = any(_has_narrow_results(*each) or _gains_by_halves(*each) for each in factors)
        if alone or _has_narrow_gradient(rows, weight):
            return _OneNode.apply(rows, weight, bias)
    return _batched_product(rows, weight, bias)


def _in_its_order(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product alone, in the fastest order."""
    if _has_narrow_results(rows, weight):
        return _narrow_product(rows, weight, bias)
    if _gains_by_halves(rows, weight):
        return _two_halves(rows, weight, bias)
    return _batched_product(rows, weight, bias)


def _two_halves(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a contiguous result from two narrow ones, whose columns are not a multiple of 4 KiB apart."""
    half = rows.shape[0] // 2 + _APART
    return torch.cat([_narrow_product(part, weight, bias) for part in (rows[:half], rows[half:])])


def _widest_narrow(weight: Tensor) -> int:
    return NARROW if weight.dtype.itemsize == 4 else _NARROW_IN_FP64


def _has_evicting_columns(rows: Tensor, weight: Tensor) -> bool:
    return weight.shape[2] in _ALIASED and rows.shape[0] * weight.dtype.itemsize % _ALIASED_BYTES == 0


def _has_narrow_results(rows: Tensor, weight: Tensor) -> bool:
    """Say whether `_narrow_product` gains."""
    return weight.shape[2] <= _widest_narrow(weight) and not _has_evicting_columns(rows, weight)


def _gains_by_halves(rows: Tensor, weight: Tensor) -> bool:
    """Say whether `_two_halves` gains."""
    fewest = _ENTRIES_ON_ONE_THREAD if torch.get_num_threads() == 1 else _ENTRIES_OF_HALVES
    entries = rows.shape[0] * weight.shape[0] * weight.shape[2]
    return weight.shape[2] <= _WIDEST_HALVES and entries >= fewest and _has_evicting_columns(rows, weight)


def _has_narrow_gradient(rows: Tensor, weight: Tensor) -> bool:
    """Say whether the gradient of the weight gains as the product that is transposed."""
    return weight.shape[2] <= _widest_narrow(weight) and weight.shape[2] < rows.shape[2]


def _is_recorded(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands)


def _takes_one_node(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether every call that is large enough is one node on this device."""
    fewest = NODE_FROM.get(rows.device.type)
    if fewest is None or rows.shape[0] * weight.shape[0] * weight.shape[2] < fewest:
        return False
    return _is_plain(rows, weight, bias)


def _is_plain(*operands: Tensor | None) -> bool:
    """Say whether no transformation has to see through a node of these operands."""
    ordinary = all(type(operand) in (Tensor, Parameter) for operand in operands if operand is not None)
    traced = torch.compiler.is_compiling() or torch._C._is_tracing()
    return ordinary and not traced and not _is_transformed()


def _is_transformed() -> bool:
    """Say whether `torch.func` or forward-mode differentiation has a level open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _as_one_node(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _is_recorded(rows, weight, bias):
        return _OneNode.apply(rows, weight, bias)
    with torch.no_grad():
        return _written_once(rows, weight, bias)


def _written_once(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product alone into a result that is no view: a function of a node that returns one forbids changes.

    Where every call is a node, it is contiguous: the kernel of a GPU takes its strides as they are.
    """
    contiguous, rows_innermost = rows.device.type in NODE_FROM, _has_narrow_results(rows, weight)
    if not contiguous and not rows_innermost and _gains_by_halves(rows, weight):
        return _two_halves(rows, weight, bias)
    order = (0, 1, 2) if contiguous else (1, 2, 0) if rows_innermost else (1, 0, 2)
    shape = (rows.shape[0], weight.shape[0], weight.shape[2])
    y = torch.empty_permuted(shape, order, dtype=rows.dtype, device=rows.device)
    if order == (1, 2, 0):
        factors, into, along = (weight.mT, rows.permute(1, 2, 0)), y.permute(1, 2, 0), 2
    else:
        factors, into, along = (rows.transpose(0, 1), weight), y.transpose(0, 1), 1
    if bias is None:
        torch.bmm(*factors, out=into)
    else:
        torch.baddbmm(bias.unsqueeze(along), *factors, out=into)
    return y


class _OneNode(torch.autograd.Function):
    """The product as one node of the graph: y and dx are written once, each in the order that is best for it.

    Recorded operations would be three: views before and after the product, whose gradients are copied again, and whose
    orders follow from that of y.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _written_once(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight = ctx.saved_tensors
        for_rows, for_weight, for_bias = ctx.needs_input_grad
        # Gradients of gradients, and those of a transformation, are derived from plain operations.
        # `is_grads_batched` opens no level.
        batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # pyright: ignore[reportAttributeAccessIssue]
        plain = batched or torch.is_grad_enabled() or type(dy) is not Tensor or _is_transformed()
        dx = dweight = None
        if for_rows:
            dx = _batched_product(dy, weight.mT, None) if plain else _written_once(dy, weight.mT, None)
        if for_weight:
            by_feature, by_partition = rows.permute(1, 2, 0), dy.transpose(0, 1)
            if plain:
                dweight = torch.bmm(by_feature, by_partition)
            elif weight.device.type not in NODE_FROM and _has_narrow_gradient(rows, weight):
                dweight = torch.bmm(by_partition.mT, rows.transpose(0, 1)).mT
            else:
                dweight = torch.bmm(by_feature, by_partition, out=weight.new_empty(weight.shape))
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
