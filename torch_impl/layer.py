"""The layer with compact parameters."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from torch_impl.array_types import Inputs, Outputs
from torch_impl.functional import packed_linear, partitioned_linear, plain_call
from torch_impl.implementations.unequal import split_weight
from torch_impl.initializers import Init, check_initializer, empty_parameter, initialize_, reset_shards_
from torch_impl.layouts import IN_AXIS, PARTITION_AXIS, check_axes
from torch_impl.linears import layer_from_linears, linears_from_partitions
from torch_impl.packing import Packing, check_packing, has_unequal_sizes
from torch_impl.parameters import check_writable
from torch_impl.unequal import check_unequal_axes
from torch_impl.validation import (
    MOST_ELEMENTS,
    check_bias_switch,
    check_dtype,
    check_implementation_name,
    check_parameters,
    check_placement,
    check_sizes,
)

# Symbolic tracing keeps the call whole: it has no values that could be validated.
torch.fx.wrap("partitioned_linear")
torch.fx.wrap("packed_linear")


class Unquantised:
    """The attribute `qconfig`, by which `torch.ao.quantization` has a layer quantised: refused, for it is not."""

    def __get__(self, layer: nn.Module | None, kind: type | None = None) -> Any:
        if layer is None or "qconfig" in layer.__dict__:
            return None if layer is not None else self
        raise AttributeError("qconfig")  # as of a module that nothing was asked of

    def __set__(self, layer: nn.Module, value: Any) -> None:
        if value is not None:
            raise TypeError(
                f"`qconfig`: expected None, got a {type(value).__name__}; PyTorch has no quantised form of this "
                f"layer: set layer.qconfig = None to keep it as it is, or put layer.to_linears() in its place."
            )
        layer.__dict__["qconfig"] = None

    def __delete__(self, layer: nn.Module) -> None:
        layer.__dict__.pop("qconfig", None)


class PartitionedLinear(nn.Module):
    """n independent linear maps on n groups of features: y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o].

    Also known as block-diagonal linear, grouped linear, batched linear, ensemble linear, headwise linear, NLinear,
    locally connected linear, and, in Keras and Flax, EinsumDense.

    Shape:
        Input (..., n, in), any number of leading axes, none included; output (..., n, out), in the input's dtype. Other
        layouts by `in_axis` and `partition_axis`. For unequal sizes input (..., in_0 + in_1 + ...) and output
        (..., out_0 + out_1 + ...), partition after partition.

    Attributes:
        weight: Parameter of shape (n, in, out); for unequal sizes packed into one axis, see `partition_weights`;
            rules by number of axes then take it for a vector, see `torch_impl.optimizers`.
        bias: Parameter of shape (n, out), or None. It has two axes, so the common rule "decay every parameter with
            at least two axes" decays it. For unequal sizes packed, (out_0 + out_1 + ...,).
        packing: Where each partition of unequal sizes lies; None for equal ones.

    Args:
        num_partitions: n, the number of maps.
        in_features: in, features of one partition, not their total; or a sequence of n sizes, one of each partition.
        out_features: out, features of one partition, not their total; or a sequence of n sizes. Where one of the two is
            a sequence, the layer is one of unequal sizes, whatever they are.
        bias: Whether to add a bias.
        implementation: "auto", or a name from `implementation_names()`, with `unequal=True` for unequal sizes.
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
    packing: Packing | None = None
    qconfig = Unquantised()

    def __init__(
        self,
        num_partitions: int,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
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
        unequal = has_unequal_sizes(in_features, out_features)
        if unequal:
            check_sizes(num_partitions=num_partitions)
            self.packing = check_packing(num_partitions, in_features, out_features, MOST_ELEMENTS)
            in_features, out_features = self.packing.in_features, self.packing.out_features
        else:
            check_sizes(num_partitions=num_partitions, in_features=in_features, out_features=out_features)
        check_bias_switch(bias)
        check_implementation_name(implementation, unequal=unequal)
        check_initializer(init)
        check_dtype(dtype)
        check_placement(device)
        check_axes(in_axis, partition_axis)
        if self.packing is not None:
            check_unequal_axes(self.packing, in_axis, partition_axis)
        self.num_partitions = num_partitions
        self.in_features: Any = in_features
        self.out_features: Any = out_features
        self.implementation = implementation
        self.init = init
        self.in_axis, self.partition_axis = in_axis, partition_axis
        shapes = self._shapes()
        self.weight = empty_parameter(shapes["weight"], device, dtype)
        if bias:
            self.bias = empty_parameter(shapes["bias"], device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters of every partition anew, by `init`; where that raises, they are unchanged."""
        if reset_shards_(self):
            return
        views = self.partition_views()
        check_writable(views)
        if self.packing is None:
            initialize_(self.init, views["weight"].mT, views.get("bias"))
        else:
            initialize_(self.init, [part.mT for part in self.partition_weights()], self.partition_biases())

    def forward(self, x: Inputs, partitions: Sequence[int] | Tensor | None = None) -> Outputs:
        """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o].

        Args:
            x: Inputs, shape (..., n, in), or (..., in_0 + in_1 + ...) for unequal sizes, dtype and device of the
                parameters (any dtype under `torch.autocast`).
            partitions: Indices of the m partitions to compute and train, in any order; None for all. x holds either
                these m, in this order, or all n. Gradients are exactly zero elsewhere.

        Returns:
            Outputs, shape (..., n, out), or (..., out_0 + out_1 + ...) for unequal sizes; flatten them with `reshape`,
            not `view`. On a CPU a contiguous result would take 1.0 to 1.7 times as long.

        Raises:
            TypeError: If `x` is no tensor or its dtype differs.
            ValueError: If its shape or device does not fit.
            UnsupportedImplementationError: If the named implementation cannot run this call.
        """
        name, usual = self.implementation, self.in_axis is IN_AXIS and self.partition_axis is PARTITION_AXIS
        if usual and partitions is None and isinstance(name, str) and name == "auto" and self.packing is None:
            # A module finds its parameters by a search that takes longer than all checks.
            own = self._parameters
            y = plain_call(x, own["weight"], own["bias"]) if "weight" in own and "bias" in own else None
            if y is not None:
                return y
        if self.packing is not None:
            axes = (self.in_axis, self.partition_axis)
            return packed_linear(x, self.weight, self.bias, self.packing, self.implementation, *axes, partitions)
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
            linears: n `nn.Linear` of equal dtype, device, bias and `requires_grad`; their sizes may differ.
            implementation: As for the constructor.
            init: As for the constructor; used by a later `reset_parameters` only.
            in_axis: As for the constructor.
            partition_axis: As for the constructor.

        Returns:
            The layer.

        Raises:
            TypeError: If an element is no plain `nn.Linear` (it has hooks or parametrisations, say), or the dtypes
                differ, of a bias beside its weight too.
            ValueError: If there is none, or bias, device or `requires_grad` differ, or two share a parameter.
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
        """Return the parameters in canonical layout: "weight" (n, in, out) and, if any, "bias" (n, out); or packed."""
        shapes = self._shapes()
        if self.bias is None:
            check_parameters(self, weight=shapes["weight"])
            return {"weight": self.weight}
        check_parameters(self, **shapes)
        return {"weight": self.weight, "bias": self.bias}

    def partition_weights(self) -> list[Tensor]:
        """Return n views of the weight, W_k (in_k, out_k), which can be written to under `torch.no_grad`."""
        weight = self.partition_views()["weight"]
        return list(weight.unbind(0)) if self.packing is None else split_weight(weight, self.packing)

    def partition_biases(self) -> list[Tensor] | None:
        """Return n views of the bias, b_k (out_k,), as `partition_weights` does; None without a bias."""
        bias = self.partition_views().get("bias")
        if bias is None:
            return None
        return list(bias.unbind(0) if self.packing is None else bias.split(self.packing.out_features))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if self.packing is not None:
            return {"weight": (self.packing.weight_size,), "bias": (self.packing.out_offsets[-1],)}
        n, i, o = self.num_partitions, self.in_features, self.out_features
        return {"weight": (n, i, o), "bias": (n, o)}

    def extra_repr(self) -> str:
        """Return the sizes and choices shown in the module's repr."""
        axes = (self.in_axis, self.partition_axis)
        layout = "" if axes == (IN_AXIS, PARTITION_AXIS) else f", in_axis={axes[0]}, partition_axis={axes[1]}"
        return (
            f"num_partitions={self.num_partitions}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}, "
            f"implementation={self.implementation!r}, init={self.init!r}{layout}"
        )
