"""One batched product whose batch axis is the partition axis."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from torch_impl.array_types import Bias, Inputs, Outputs, Weight

# Where a result whose rows lie next to each other was measured to be the faster one, on one thread of one CPU by
# interleaved calls (fp32 and fp64, 64 to 4000 rows, 2 to 512 features to at most 8): a forward pass takes 0.2 to 0.9
# of the time of the other order, and training, where x needs no gradient, 0.1 to 0.4. With a contiguous copy behind it
# some settings only break even. Where columns of the result are a multiple of 4 KiB apart, they evict each other while
# a copy reads them: at 8 -> 8 such a result takes 0.3 to 0.6 of the time, and with a copy behind it 1.5 to 2.4 times
# the time. Up to four columns it takes 0.1 to 0.8 by itself or before a function of its elements, but 0.95 to 1.3 with
# a copy behind it, and 1.0 to 1.7 with a sum over the partitions (4096 rows; 4000 gain in all). With a cache line
# between the columns all would gain on one thread (0.3 to 0.75), but not on two, and gloo's collectives misread such a
# result.
_WIDEST_NARROW, FEWEST_ROWS, _ALIASED_BYTES, _ALIASED_COLUMNS = 8, 64, 4096, 4
# The gradient of x comes out in the order of the result, so that the layer below, in the other one, takes longer than
# is gained: such a model of two layers 1.1 to 1.5 times as long. Not so where x is as narrow (0.9 to 1.1 times, and 0.5
# to 0.9 by itself), or has that order itself, as the result of a narrow layer has (0.5 to 0.9).
_NARROWEST_INPUT = 4

# By device type, from how many entries of y on `_OneNode` is used. Nowhere yet: on CUDA it waits for a measurement that
# shows it faster beyond the noise in training and in inference, and on a CPU it is the slower one.
NODE_FROM: dict[str, int] = {}


def partitioned_linear_matmul(x: Inputs, weight: Weight, bias: Bias | None) -> Outputs:
    """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as a batched product over n.

    The partition axis of `x` is moved to the front as a view, so that neither operand is copied, and the bias enters
    the same kernel. The result is laid out with the partition axis outermost and handed back as a view of shape
    (*b, n, o): it is not contiguous unless the batch or n is 1, and `reshape` rather than `view` flattens it. Writing a
    contiguous result would take 1.0 to 1.7 times as long on a CPU, by its cheapest spelling. There results of at most
    8 features from many rows are laid out with the rows innermost, which the kernel computes in a fraction of the time,
    and the product with a single feature is spelled as that of elements where no gradient is recorded.
    """
    single_batch_axis = x.ndim == 3
    rows = x if single_batch_axis else x.reshape(-1, *x.shape[-2:])
    _, in_features, out_features = weight.shape
    if in_features == 1 and _is_outer_product(rows, weight, bias):
        matrix = weight.squeeze(1)
        y = rows * matrix if bias is None else torch.addcmul(bias, rows, matrix)
    elif NODE_FROM and _takes_one_node(rows, weight, bias):
        y = _as_one_node(rows, weight, bias)
    elif out_features <= _WIDEST_NARROW and _has_narrow_results(rows, weight):
        y = _narrow_product(rows, weight, bias)
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


def _has_narrow_results(rows: Tensor, weight: Tensor) -> bool:
    """Say whether `_narrow_product` gains; a traced program would be compiled anew for other numbers of rows."""
    if torch.compiler.is_compiling() or type(rows) is not Tensor:
        return False
    count, _, in_features = rows.shape
    # Symbolic rows, which a transform may wrap in an ordinary tensor, are not looked at: that would be a guard.
    if not isinstance(count, int) or count < FEWEST_ROWS or in_features == 1 or not rows.is_cpu:
        return False
    if rows.requires_grad and in_features > _NARROWEST_INPUT and rows.stride(0) != 1 and torch.is_grad_enabled():
        return False
    item = weight.dtype.itemsize
    evicting = weight.shape[2] > _ALIASED_COLUMNS and count * item % _ALIASED_BYTES == 0
    return item >= 4 and not evicting


def _takes_one_node(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether `_OneNode` may compute a call: it is large enough, and no transformation has to see through it."""
    fewest = NODE_FROM.get(rows.device.type)
    if fewest is None or rows.shape[0] * weight.shape[0] * weight.shape[2] < fewest:
        return False
    ordinary = all(type(operand) in (Tensor, Parameter) for operand in (rows, weight, bias) if operand is not None)
    traced = torch.compiler.is_compiling() or torch._C._is_tracing()
    return ordinary and not traced and not _is_transformed()


def _is_transformed() -> bool:
    """Say whether `torch.func` or forward-mode differentiation has a level open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _as_one_node(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    operands = (rows, weight) if bias is None else (rows, weight, bias)
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
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
