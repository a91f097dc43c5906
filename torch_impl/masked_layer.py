"""The source article's layer: one dense parameter whose off-block weights are masked before use."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_impl.array_types import shown
from torch_impl.functional import autocast_is_on, autocast_operands
from torch_impl.initializers import Init, check_initializer, empty_parameter, initialize_, reset_shards_
from torch_impl.layer import Unquantised
from torch_impl.linears import layer_from_linears, linears_from_partitions
from torch_impl.packing import has_unequal_sizes
from torch_impl.parameters import check_writable
from torch_impl.validation import (
    check_bias_switch,
    check_dtype,
    check_masked_operands,
    check_parameters,
    check_placement,
    check_same_dtype,
    check_sizes,
    explain_failure,
)


def masked_linear(
    x: Any, weight: Any, bias: Any, mask: Tensor, num_partitions: int, in_features: int, out_features: int
) -> Tensor:
    """Compute what the layer does of inputs (..., n, in) or (..., n*in), whose checks it makes first."""
    sizes = {"num_partitions": num_partitions, "in_features": in_features, "out_features": out_features}
    check_masked_operands(x, weight, bias, **sizes)
    try:
        # Selected, not multiplied: 0 * NaN and 0 * Inf are NaN, so a product with the mask would let a non-finite
        # off-block weight into the output and a non-finite cotangent into the off-block gradients.
        effective = torch.where(mask, weight, 0.0)
        rows = x
        if autocast_is_on(effective.device.type):
            rows, effective, bias = autocast_operands(x, effective, bias)
        check_same_dtype(rows, effective, bias)
        # One matrix of rows: with more axes torch.vmap turns the product into a batched one over a broadcast weight,
        # whose gradient is then summed in 16 bits.
        product = F.linear(rows.reshape(-1, effective.shape[1]), effective, bias)
    except RuntimeError as error:
        explain_failure(error, "masked", x, weight, bias)
        raise
    if x.shape[-1] == num_partitions * in_features:
        return product.reshape(*x.shape[:-1], effective.shape[0])
    return product.reshape(*x.shape[:-2], num_partitions, out_features)


# Symbolic tracing keeps the call whole: it has no values that could be validated.
torch.fx.wrap("masked_linear")


class MaskedPartitionedLinear(nn.Module):
    """y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o] as one dense product with a block mask.

    Also known as block-diagonal linear by masking. The parameter is a dense (n*out, n*in) matrix, as `nn.Linear`
    holds it, of which only the n diagonal blocks are used: after any optimiser steps, weight decay included, the
    other weights have no effect, and their gradients are exactly zero. It costs n times the weight memory and n times
    the multiplications of `PartitionedLinear`. NaN in the input of one partition reaches every partition.

    Shape:
        Input (..., n, in), output (..., n, out); or flat, input (..., n*in), output (..., n*out). A dense
        product wants features and partitions in its last axes, so others are moved there first; and it has no
        `partitions`, since it computes all of them at once.

    Attributes:
        weight: Parameter of shape (n*out, n*in); its off-block weights start as exact zeros.
        bias: Parameter of shape (n*out), or None.
        mask: Non-persistent bool buffer of shape (n*out, n*in), True in the diagonal blocks.

    Arguments and errors are those of `PartitionedLinear`; `init` sees the blocks only.

    Source: the article that masks one large `nn.Linear` in place of a loop over many small ones.
    """

    __constants__ = ("in_features", "num_partitions", "out_features")

    weight: nn.Parameter
    bias: nn.Parameter | None
    mask: Tensor
    qconfig = Unquantised()

    def __init__(
        self,
        num_partitions: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        init: Init = "torch",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for argument, size in (("in_features", in_features), ("out_features", out_features)):
            if has_unequal_sizes(size, None):
                raise TypeError(
                    f"`{argument}`: expected one int for all partitions, got {shown(size)}; for unequal sizes use "
                    f"PartitionedLinear with implementation='masked'."
                )
        check_sizes(dense=True, num_partitions=num_partitions, in_features=in_features, out_features=out_features)
        check_bias_switch(bias)
        check_initializer(init)
        check_dtype(dtype)
        check_placement(device)
        self.num_partitions = num_partitions
        self.in_features = in_features
        self.out_features = out_features
        self.init = init
        shape = (num_partitions * out_features, num_partitions * in_features)
        self.weight = empty_parameter(shape, device, dtype)
        if bias:
            self.bias = empty_parameter(shape[:1], device, dtype)
        else:
            self.register_parameter("bias", None)
        self.register_buffer("mask", self._block_mask(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the blocks and biases of every partition anew, by `init`, and zero the weights outside the blocks.

        Where `init` raises, they are unchanged.
        """
        if reset_shards_(self):
            return
        views = self.partition_views()
        check_writable(views)
        initialize_(self.init, views["weight"].mT, views.get("bias"))
        with torch.no_grad():
            self.weight.masked_fill_(~self.mask, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o].

        Args:
            x: Inputs, shape (..., n, in) or (..., n*in), dtype and device of the parameters (any dtype under
                `torch.autocast`).

        Returns:
            Outputs, shape (..., n, out) or (..., n*out), as the input came.

        Raises:
            TypeError: If `x` is no tensor or its dtype differs.
            ValueError: If its shape or device does not fit.
        """
        sizes = (self.num_partitions, self.in_features, self.out_features)
        return masked_linear(x, self.weight, self.bias, self.mask, *sizes)

    @classmethod
    def from_linears(cls, linears: Sequence[nn.Linear] | nn.ModuleList, *, init: Init = "torch") -> Self:
        """Build the layer that computes what n linears do, as `PartitionedLinear.from_linears` does."""
        check_initializer(init)
        layer = layer_from_linears(cls, linears)
        layer.init = init
        return layer

    def to_linears(self) -> nn.ModuleList:
        """Return n `nn.Linear` with bitwise copies of the blocks, as `PartitionedLinear.to_linears` does."""
        return linears_from_partitions(self.partition_views(), like=self)

    def partition_views(self) -> dict[str, Tensor]:
        """Return views of the parameters in canonical layout: "weight" (n, in, out) and, if any, "bias" (n, out)."""
        n, i, o = self.num_partitions, self.in_features, self.out_features
        shapes = {"weight": (n * o, n * i)} if self.bias is None else {"weight": (n * o, n * i), "bias": (n * o,)}
        check_parameters(self, **shapes)
        views = {
            "weight": self.weight.unflatten(1, (n, i)).unflatten(0, (n, o)).diagonal(dim1=0, dim2=2).permute(2, 1, 0)
        }
        if self.bias is not None:
            views["bias"] = self.bias.unflatten(0, (n, o))
        return views

    def extra_repr(self) -> str:
        """Return the sizes and choices shown in the module's repr."""
        return (
            f"num_partitions={self.num_partitions}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, init={self.init!r}"
        )

    def _block_mask(self) -> Tensor:
        # Where the weight lies, so that a layer on the meta device takes no memory for its mask either.
        shape = (self.num_partitions, self.out_features, self.in_features)
        return torch.block_diag(*torch.ones(shape, dtype=torch.bool, device=self.weight.device))

    # In no state_dict, the mask must be made anew after to_empty and load_state_dict with assign=True.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.mask = self._block_mask()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, *args, **kwargs)
        if self.mask.device != self.weight.device:
            self.mask = self._block_mask()
