"""The layer for Flax nnx."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from jax_impl.array_types import Inputs, Outputs, said, shown
from jax_impl.functional import partitioned_linear
from jax_impl.initializers import Initializer, check_initializer, packed_initializers, partition_initializers
from jax_impl.layouts import IN_AXIS, PARTITION_AXIS, check_axes
from jax_impl.packing import Packing, check_packing, has_unequal_sizes
from jax_impl.unequal import check_unequal_axes, known_packing, partition_biases, partition_weights
from jax_impl.validation import (
    MOST_ELEMENTS,
    are_promoted,
    as_array,
    check_callable,
    check_dot_general,
    check_dtypes,
    check_implementation_name,
    check_instance,
    check_precision,
    check_sizes,
    check_stream,
    promoted,
)


class PartitionedLinear(nnx.Module):
    """n independent linear maps on n groups of features: y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o].

    Also known as block-diagonal linear, grouped linear, batched linear, ensemble linear, headwise linear, NLinear,
    locally connected linear, and, in Keras and Flax, EinsumDense.

    Shape:
        Input (..., n, in), any number of leading axes, none included; output (..., n, out). Other layouts by `in_axis`
        and `partition_axis`. Where sizes are sequences: input (..., in_0 + in_1 + ...), output (..., out_0 + out_1 +
        ...), the features of one partition after those of another.

    Dtypes are those of `flax.nnx.Linear`: input and parameters are promoted to `dtype`, or to their common dtype, and
    the output has that dtype, or `preferred_element_type`.

    Attributes:
        kernel: `nnx.Param` of shape (n, in, out). Where sizes are sequences, every W_k (in_k, out_k) in one axis, as
            `packing` says, and `in_features` and `out_features` are tuples.
        bias: `nnx.Param` of shape (n, out), or None. It has two axes, so the common rule "decay every parameter with
            at least two axes" decays it. Where sizes are sequences, every b_k in one axis, as in an output.

    Args:
        num_partitions: n, the number of maps.
        in_features: in, features of one partition, not their total; or a sequence of n, one for each partition. Then
            `out_features` may still be one int for all, and the reverse.
        out_features: out, features of one partition, not their total; or a sequence of n.
        use_bias: Whether to add a bias.
        implementation: "auto", or a name from `implementation_names()`; for sequences of sizes, from
            `implementation_names(unequal=True)`.
        init: "flax" for a truncated normal of std 1/sqrt(in) and a zero bias, as n `nnx.Linear` have it; "torch" for
            U(-1/sqrt(in), 1/sqrt(in)) in kernel and bias.
        dtype: Dtype of the computation; None to infer it from input and parameters.
        param_dtype: Dtype of the parameters: float64, float32, bfloat16 or float16.
        precision: Precision of the product, as in `jax.lax.dot_general`.
        preferred_element_type: Dtype of the output; None for that of the computation.
        kernel_init: A Flax initialiser (key, shape, dtype) instead of `init`; called once per partition with its own
            key and the shape (in, out), so that it sees the fan-in of one partition. It runs under `jax.vmap`.
        bias_init: The same for the bias, with the shape (out,).
        dot_general: As in `partitioned_linear`; None for `jax.lax.dot_general`.
        promote_dtype: Function ((x, kernel, bias), dtype=...) -> the three in one dtype.
        rngs: Random streams; "params" is drawn from once for the kernel and once for the bias.
        kernel_metadata: Metadata of the kernel's `nnx.Param`, for sharding say; it describes all three axes.
        bias_metadata: Metadata of the bias's `nnx.Param`; it describes both axes.
        in_axis: The axis of x with the features, which those of y take.
        partition_axis: The axis of x and y with the partitions; the same as `in_axis` for flat features (..., n*in);
            None for an input (..., in) that all partitions share.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a size is not positive or too large, a name unknown, or an initialiser fails.
        MemoryError: If there is no room for the parameters.

    Source: a list of `flax.nnx.Linear` applied one by one and stacked, whose function it computes.
    """

    kernel: nnx.Param[Any]
    bias: nnx.Param[Any] | None
    # Of layers that were pickled without them.
    in_axis: int = IN_AXIS
    partition_axis: int | None = PARTITION_AXIS
    dot_general: Callable[..., Any] | None = None

    def __init__(
        self,
        num_partitions: int,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        use_bias: bool = True,
        implementation: str = "auto",
        init: str = "flax",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        preferred_element_type: DTypeLike | None = None,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        dot_general: Callable[..., Any] | None = None,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        in_axis: int = IN_AXIS,
        partition_axis: int | None = PARTITION_AXIS,
    ) -> None:
        packing = None
        if has_unequal_sizes(in_features, out_features):
            check_sizes(num_partitions=num_partitions)
            packing = check_packing(num_partitions, in_features, out_features, MOST_ELEMENTS)
            in_features, out_features = packing.in_features, packing.out_features
        else:
            check_sizes(num_partitions=num_partitions, in_features=in_features, out_features=out_features)
        check_instance("use_bias", use_bias, bool, "pass True or False")
        check_implementation_name(implementation, unequal=packing is not None)
        check_initializer(init, kernel_init, bias_init)
        check_dtypes(dtype, param_dtype, preferred_element_type)
        check_precision(precision)
        if dot_general is not None:
            check_dot_general(dot_general, implementation, one_size=packing is None)
        check_callable("promote_dtype", promote_dtype, "((x, kernel, bias), dtype=...)")
        check_instance("rngs", rngs, nnx.Rngs, "pass rngs=nnx.Rngs(seed)")
        check_stream("rngs", rngs, "params")
        check_instance("kernel_metadata", kernel_metadata, Mapping, "pass a dict")
        check_instance("bias_metadata", bias_metadata, Mapping, "pass a dict")
        check_axes(in_axis, partition_axis)
        if packing is None:
            i, o = cast(tuple[int, int], (in_features, out_features))
            kernel_shape, bias_shape = (num_partitions, i, o), (num_partitions, o)
            draw_kernel, draw_bias = partition_initializers(init, kernel_init, bias_init, i)
        else:
            check_unequal_axes(packing, in_axis, partition_axis)
            kernel_shape, bias_shape = (packing.weight_size,), (packing.out_offsets[-1],)
            draw_kernel, draw_bias = packed_initializers(init, kernel_init, bias_init, packing)
        values = draw_kernel(_key(rngs), kernel_shape, param_dtype)
        self.kernel = _param("kernel_metadata", values, kernel_metadata)
        if use_bias:
            values = draw_bias(_key(rngs), bias_shape, param_dtype)
            self.bias = _param("bias_metadata", values, bias_metadata)
        else:
            self.bias = nnx.data(None)
        self.num_partitions = num_partitions
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.implementation = implementation
        self.init = init
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.preferred_element_type = preferred_element_type
        self.dot_general = dot_general
        self.promote_dtype = promote_dtype
        self.in_axis, self.partition_axis = in_axis, partition_axis

    @property
    def packing(self) -> Packing | None:
        """Where partitions of unequal sizes are in inputs, outputs and packed parameters; None for an equal layer."""
        if isinstance(self.in_features, int) or isinstance(self.out_features, int):
            return None
        return known_packing(self.in_features, self.out_features)

    def own_value(self, name: str) -> Any:
        """Return the value of "kernel" or "bias"; refuse one of another shape than the layer's own by a ValueError.

        Another shape has one of several layers that `vmap` or `scan` has stacked, say.
        """
        packing, variable = self.packing, getattr(self, name)
        if packing is not None:
            shape: tuple[Any, ...] = (packing.weight_size if name == "kernel" else packing.out_offsets[-1],)
        else:
            shape = (self.num_partitions, *([self.in_features] if name == "kernel" else []), self.out_features)
        check_instance(f"layer.{name}", variable, nnx.Variable, "keep the layer's own variables")
        value = variable.get_value()
        if getattr(value, "shape", shape) != shape:
            raise ValueError(f"`layer.{name}`: expected shape {shape}, got {value.shape}; keep the layer's own shape.")
        return value

    def partition_weights(self) -> list[Array]:
        """Return every partition's matrix (in_k, out_k), cut from the kernel."""
        kernel, packing = self.own_value("kernel"), self.packing
        return list(kernel) if packing is None else partition_weights(kernel, packing)

    def partition_biases(self) -> list[Array] | None:
        """Return every partition's vector (out_k,), cut from the bias; None for a layer without one."""
        packing = self.packing
        if self.bias is None:
            return None
        bias = self.own_value("bias")
        return list(bias) if packing is None else partition_biases(bias, packing)

    def __call__(self, x: Inputs, partitions: Sequence[int] | Array | None = None) -> Outputs:
        """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o].

        Args:
            x: Inputs, shape (..., n, in). They and the parameters are promoted to `dtype`, or to their common one, as
                Flax's own layers do: integers become floating, and float64 becomes float32 while x64 is off. (The
                pure function `partitioned_linear` refuses both.)
            partitions: Indices of the m partitions to compute and train, in any order, traced or not; None for all. x
                holds either these m, in this order, or all n. Gradients are exactly zero elsewhere.

        Returns:
            Outputs, shape (..., n, out).

        Raises:
            TypeError: If `x` is no array, or the dtype of the computation is not a supported one.
            ValueError: If its shape or device does not fit, or `promote_dtype` fails.
            UnsupportedImplementationError: If the named implementation cannot run this call.
        """
        array, packing = as_array("x", x), self.packing

        def promote() -> Any:
            operands = array, self.kernel[...], None if self.bias is None else self.bias[...]
            if self.promote_dtype is dtypes.promote_dtype and are_promoted(self.dtype, *operands):
                return operands
            return self.promote_dtype(operands, dtype=self.dtype)

        x, kernel, bias = promoted(promote, array, kernel=self.kernel, bias=self.bias)
        return partitioned_linear(
            x,
            kernel,
            bias,
            implementation=self.implementation,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            dot_general=self.dot_general,
            in_axis=self.in_axis,
            partition_axis=self.partition_axis,
            partitions=partitions,
            in_features=None if packing is None else packing.in_features,
            out_features=None if packing is None else packing.out_features,
        )


def _key(rngs: nnx.Rngs) -> Any:
    try:
        return rngs.params()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`rngs`: expected streams of one key each, got some of several ({said(error)}); pass one seed."
        ) from error


def _param(argument: str, values: Any, metadata: Mapping[str, Any]) -> nnx.Param[Any]:
    try:
        return nnx.Param(values, **metadata)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise ValueError(
            f"`{argument}`: expected metadata of an nnx.Param, got {shown(metadata)} and an error from Flax "
            f"({said(error)}); pass what nnx.Param takes."
        ) from error
