"""The layer with compact parameters."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from torch_impl.array_types import Inputs, Outputs
from torch_impl.functional import partitioned_linear
from torch_impl.initializers import Init, check_initializer, empty_parameter, initialize_
from torch_impl.layouts import IN_AXIS, PARTITION_AXIS, check_axes
from torch_impl.linears import layer_from_linears, linears_from_partitions
from torch_impl.parameters import check_writable
from torch_impl.validation import (
    check_bias_switch,
    check_dtype,
    check_implementation_name,
    check_parameters,
    check_placement,
    check_sizes,
)

# Symbolic tracing keeps the call whole: it has no values that could be validated.
torch.fx.wrap("partitioned_linear")


class PartitionedLinear(nn.Module):
    """n independent linear maps on n groups of features: y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o].

    Also known as block-diagonal linear, grouped linear, batched linear, ensemble linear, headwise linear, NLinear,
    locally connected linear, and, in Keras and Flax, EinsumDense.

    Shape:
        Input (..., n, in), any number of leading axes, none included; output (..., n, out), in the input's dtype. Other
        layouts by `in_axis` and `partition_axis`.

    Attributes:
        weight: Parameter of shape (n, in, out).
        bias: Parameter of shape (n, out), or None. It has two axes, so the common rule "decay every parameter with
            at least two axes" decays it.

    Args:
        num_partitions: n, the number of maps.
        in_features: in, features of one partition, not their total.
        out_features: out, features of one partition, not their total.
        bias: Whether to add a bias.
        implementation: "auto", or a name from `implementation_names()`.
        init: "torch" for U(-1/sqrt(in), 1/sqrt(in)) in weight and bias, as n `nn.Linear` have it; "flax" for a
            truncated normal of std 1/sqrt(in) and a zero bias; a function that fills one partition's whole
            (out, in) weight in place; or a pair of such functions for weight and bias.
        device: Where the parameters lie.
        dtype: float64, float32, bfloat16 or float16; None for PyTorch's default.
        in_axis: The axis of x with the features, which those of y take.
        partition_axis: The axis of x and y with the partitions; the same as `in_axis` for flat features (..., n*in);
            None for an input (..., in) that all partitions share.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a size is not positive or too large, a name unknown, or the device not there.
        MemoryError: If there is no room for the parameters.

    Source: a list of `torch.nn.Linear` applied one by one and stacked, whose function it computes.
    """

    __constants__ = ("implementation", "in_features", "num_partitions", "out_features")

    weight: nn.Parameter
    bias: nn.Parameter | None
    # Of layers that were pickled without them.
    in_axis: int = IN_AXIS
    partition_axis: int | None = PARTITION_AXIS

    def __init__(
        self,
        num_partitions: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        implementation: str = "auto",
        init: Init = "torch",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        in_axis: int = IN_AXIS,
        partition_axis: int | None = PARTITION_AXIS,
    ) -> None:
        super().__init__()
        check_sizes(num_partitions=num_partitions, in_features=in_features, out_features=out_features)
        check_bias_switch(bias)
        check_implementation_name(implementation)
        check_initializer(init)
        check_dtype(dtype)
        check_placement(device)
        check_axes(in_axis, partition_axis)
        self.num_partitions = num_partitions
        self.in_features = in_features
        self.out_features = out_features
        self.implementation = implementation
        self.init = init
        self.in_axis, self.partition_axis = in_axis, partition_axis
        shape = (num_partitions, in_features, out_features)
        self.weight = empty_parameter(shape, device, dtype)
        if bias:
            self.bias = empty_parameter((num_partitions, out_features), device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters of every partition anew, by `init`; where that raises, they are unchanged."""
        views = self.partition_views()
        check_writable(views)
        initialize_(self.init, views["weight"].mT, views.get("bias"))

    def forward(self, x: Inputs, partitions: Sequence[int] | Tensor | None = None) -> Outputs:
        """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o].

        Args:
            x: Inputs, shape (..., n, in), dtype and device of the parameters (any dtype under `torch.autocast`).
            partitions: Indices of the m partitions to compute and train, in any order; None for all. x holds either
                these m, in this order, or all n. Gradients are exactly zero elsewhere.

        Returns:
            Outputs, shape (..., n, out); flatten them with `reshape`, not `view`.

        Raises:
            TypeError: If `x` is no tensor or its dtype differs.
            ValueError: If its shape or device does not fit.
            UnsupportedImplementationError: If the named implementation cannot run this call.
        """
        return partitioned_linear(
            x,
            self.weight,
            self.bias,
            implementation=self.implementation,
            in_axis=self.in_axis,
            partition_axis=self.partition_axis,
            partitions=partitions,
        )

    @classmethod
    def from_linears(
        cls,
        linears: Sequence[nn.Linear] | nn.ModuleList,
        *,
        implementation: str = "auto",
        init: Init = "torch",
        in_axis: int = IN_AXIS,
        partition_axis: int | None = PARTITION_AXIS,
    ) -> Self:
        """Build the layer that computes what n linears do, copying their weights bit for bit.

        Dtype, device and `requires_grad` are those of the linears; the parameters are copies, not shared.

        Args:
            linears: n `nn.Linear` of equal sizes, dtype, device, bias and `requires_grad`.
            implementation: As for the constructor.
            init: As for the constructor; used by a later `reset_parameters` only.
            in_axis: As for the constructor.
            partition_axis: As for the constructor.

        Returns:
            The layer.

        Raises:
            TypeError: If an element is no plain `nn.Linear` (it has hooks or parametrisations, say), or the dtypes
                differ, of a bias beside its weight too.
            ValueError: If there is none, or sizes, bias, device or `requires_grad` differ, or two share a parameter.
        """
        check_initializer(init)
        axes = {"in_axis": in_axis, "partition_axis": partition_axis}
        layer = layer_from_linears(cls, linears, implementation=implementation, **axes)
        layer.init = init
        return layer

    def to_linears(self) -> nn.ModuleList:
        """Return n `nn.Linear` with bitwise copies of the weights, and the same dtype, device and `requires_grad`.

        Raises:
            TypeError: If the layer has hooks, parametrisations or further parameters, or the bias another dtype.
            ValueError: If a parameter has another shape than the layer's own, or is sharded.
        """
        return linears_from_partitions(self.partition_views(), like=self)

    def partition_views(self) -> dict[str, Tensor]:
        """Return the parameters in canonical layout: "weight" (n, in, out) and, if any, "bias" (n, out)."""
        n, i, o = self.num_partitions, self.in_features, self.out_features
        if self.bias is None:
            check_parameters(self, weight=(n, i, o))
            return {"weight": self.weight}
        check_parameters(self, weight=(n, i, o), bias=(n, o))
        return {"weight": self.weight, "bias": self.bias}

    def extra_repr(self) -> str:
        """Return the sizes and choices shown in the module's repr."""
        axes = (self.in_axis, self.partition_axis)
        layout = "" if axes == (IN_AXIS, PARTITION_AXIS) else f", in_axis={axes[0]}, partition_axis={axes[1]}"
        return (
            f"num_partitions={self.num_partitions}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, "
            f"implementation={self.implementation!r}, init={self.init!r}{layout}"
        )
