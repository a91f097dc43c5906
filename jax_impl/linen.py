"""The layer for Flax linen, and the way of its parameters to and from canonical arrays and files.

The twin of `jax_impl.layer`: the same function, implementations and initial values, in Flax's other module system.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict, freeze, meta
from flax.linen import dtypes
from jax import Array
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from jax_impl.array_types import Inputs, Outputs, kind_of, shown
from jax_impl.checkpoints import linears_from_arrays
from jax_impl.functional import partitioned_linear
from jax_impl.initializers import Initializer, check_initializer, packed_initializers, partition_initializers
from jax_impl.layouts import IN_AXIS, PARTITION_AXIS, check_axes, infer_sizes
from jax_impl.packing import Packing, check_packing, has_unequal_sizes
from jax_impl.parameters import from_canonical, read_arrays, read_linears, to_canonical, write_arrays
from jax_impl.unequal import check_unequal_axes, packing_of_call
from jax_impl.validation import (
    MOST_ELEMENTS,
    are_promoted,
    as_array,
    check_callable,
    check_dtypes,
    check_implementation_name,
    check_instance,
    check_precision,
    check_sizes,
    promoted,
)

Sizes: TypeAlias = int | Sequence[int] | None

_LINEN_NAMES = {"weight": "kernel", "bias": "bias"}


class PartitionedLinear(nn.Module):
    """n independent linear maps on n groups of features: y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o].

    Also known as block-diagonal linear, grouped linear, batched linear, ensemble linear, headwise linear, NLinear,
    locally connected linear, and, in Keras and Flax, EinsumDense.

    Shape:
        Input (..., n, in), any number of leading axes, none included; output (..., n, out). n and in are inferred from
        the first input. Other layouts by `in_axis` and `partition_axis`. Where sizes are sequences: input (..., in_0 +
        in_1 + ...), output (..., out_0 + out_1 + ...), as in the nnx layer.

    Parameters are "kernel" (n, in, out) and "bias" (n, out), in the collection "params"; where sizes are sequences,
    each is packed in one axis. Dtypes are those of `flax.linen.Dense`: input and parameters are promoted to `dtype`, or
    to their common dtype.

    Attributes: those of the nnx layer of the same names, and

        features: out, features of one partition, not their total; or a sequence of n, one for each partition.
        initializer: The nnx layer's `init` (linen gives that name to a method): "flax" for a truncated
            normal of std 1/sqrt(in) and a zero bias, as n `linen.Dense` have it; "torch" for U(-1/sqrt(in), 1/sqrt(in))
            in kernel and bias.
        kernel_init, bias_init: The names of `linen.with_partitioning` describe all three axes, or both.
        dot_general: As in `partitioned_linear`; None for `jax.lax.dot_general`.
        promote_dtype: Function (x, kernel, bias, dtype=...) -> the three in one dtype.
        num_partitions: n, where neither the input nor a sequence says it: flat, shared, or of some partitions.
        in_features: in, which otherwise the input says; or a sequence of n. Needed where `features` is a sequence.

    Source: a list of `flax.linen.Dense` applied one by one and stacked, whose function it computes.
    """

    features: int | Sequence[int]
    use_bias: bool = True
    implementation: str = "auto"
    initializer: str = "flax"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    preferred_element_type: DTypeLike | None = None
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype
    in_axis: int = IN_AXIS
    partition_axis: int | None = PARTITION_AXIS
    num_partitions: int | None = None
    in_features: int | Sequence[int] | None = None
    dot_general: Callable[..., Any] | None = None

    @nn.compact
    def __call__(self, x: Inputs, partitions: Sequence[int] | Array | None = None) -> Outputs:
        """Compute y[..., n, o] = sum_i x[..., n, i] * W[n, i, o] + b[n, o], as the nnx layer does.

        Raises:
            TypeError: If an attribute or `x` has a wrong type, or the computation a dtype that is not supported.
            ValueError: If an attribute is wrong, a shape or device does not fit, a parameter is missing, or
                `promote_dtype` fails.
            UnsupportedImplementationError: If the named implementation cannot run this call.
        """
        packing = self._packing()
        check_instance("use_bias", self.use_bias, bool, "pass True or False")
        check_implementation_name(self.implementation, unequal=packing is not None)
        check_initializer(self.initializer, self.kernel_init, self.bias_init, argument="initializer")
        check_dtypes(self.dtype, self.param_dtype, self.preferred_element_type)
        check_precision(self.precision)
        check_callable("promote_dtype", self.promote_dtype, "(x, kernel, bias, dtype=...)")
        check_axes(self.in_axis, self.partition_axis)
        array = as_array("x", x)
        kernel_shape, bias_shape = self._shapes(array, packing)
        kernel, bias = self._stored("kernel"), self._stored("bias") if self.use_bias else None
        if bias is not None and bias.shape != bias_shape:
            wanted = "(n, out)" if packing is None else "(out_0 + out_1 + ...,)"
            raise ValueError(
                f"`params['bias']`: expected shape {wanted} = {bias_shape}, got {bias.shape}; pass what init returned."
            )
        if kernel is None or (bias is None and self.use_bias):
            # Only then: with stored values Flax would trace the initialisers in every call, to know their shapes.
            own = self.initializer, self.kernel_init, self.bias_init
            if packing is None:
                draw_kernel, draw_bias = partition_initializers(*own, kernel_shape[1])
            else:
                draw_kernel, draw_bias = packed_initializers(*own, packing)
            kernel = self.param("kernel", draw_kernel, kernel_shape, self.param_dtype)
            if self.use_bias:
                bias = self.param("bias", draw_bias, bias_shape, self.param_dtype)

        def promote() -> Any:
            if self.promote_dtype is dtypes.promote_dtype and are_promoted(self.dtype, array, kernel, bias):
                return array, kernel, bias
            return self.promote_dtype(array, kernel, bias, dtype=self.dtype)

        x, kernel, bias = promoted(promote, array, kernel=kernel, bias=bias)
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

    def _packing(self) -> Packing | None:
        """Return the layout of sizes that are sequences, None for one size; refuse others as the nnx layer does."""
        if self.num_partitions is not None:
            check_sizes(num_partitions=self.num_partitions)
        if not has_unequal_sizes(self.in_features, self.features):
            check_sizes(
                features=self.features, **({} if self.in_features is None else {"in_features": self.in_features})
            )
            return None
        if self.in_features is None:
            raise ValueError(
                f"`features`: expected an int where in_features is not given, got {shown(self.features)}; pass "
                f"in_features too, one int or one for each partition."
            )
        argument = "in_features" if has_unequal_sizes(self.in_features, None) else "features"
        num_partitions = self.num_partitions or len(getattr(self, argument))
        if num_partitions == 0:
            raise ValueError(f"`{argument}`: expected at least one size, got none; pass one for each partition.")
        names = ("in_features", "features")
        packing = check_packing(num_partitions, self.in_features, self.features, MOST_ELEMENTS, names)
        check_unequal_axes(packing, self.in_axis, self.partition_axis)
        return packing

    def _shapes(self, x: Array | np.ndarray, packing: Packing | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of kernel and bias: those of an earlier `init`, where a later input may not fit, or new."""
        stored = self._stored("kernel")
        if packing is not None:
            if stored is not None and stored.shape != (packing.weight_size,):
                raise ValueError(
                    f"`params['kernel']`: expected packed shape (in_0*out_0 + in_1*out_1 + ...,) = "
                    f"({packing.weight_size},), got {stored.shape}; pass what init returned."
                )
            return (packing.weight_size,), (packing.out_offsets[-1],)
        features, in_features = cast(tuple[int, int | None], (self.features, self.in_features))
        told = (self.num_partitions, in_features, features)
        if stored is None:
            n, inferred = infer_sizes(x.shape, self.num_partitions, self.in_axis, self.partition_axis)
            in_features = in_features or inferred
        elif (
            stored.ndim != 3
            or 0 in stored.shape
            or any(size not in (None, own) for size, own in zip(told, stored.shape, strict=True))
        ):
            wanted = ", ".join(
                f"{name} = {size}" for name, size in zip(("n", "in", "out"), told, strict=True) if size is not None
            )
            raise ValueError(
                f"`params['kernel']`: expected shape (n, in, out) with {wanted}, got {stored.shape}; pass what init "
                f"returned."
            )
        else:
            n, in_features = stored.shape[:2]
        check_sizes(num_partitions=n, in_features=in_features, features=features)
        return (n, in_features, features), (n, features)

    def _stored(self, name: str) -> Any:
        """Return a parameter of an earlier `init`, or None where Flax is to draw one."""
        if self.has_variable("params", name):
            stored = meta.unbox(self.get_variable("params", name))
            if not isinstance(stored, Array | np.ndarray):
                raise TypeError(
                    f"`params[{name!r}]`: expected a jax.Array, got {kind_of(stored)}; pass what init returned."
                )
            return as_array(f"params[{name!r}]", stored)
        if not (self.is_mutable_collection("params") and self.has_rng("params")):
            raise ValueError(
                f"`params`: expected {name!r} among the layer's variables, or a random stream 'params' to draw it "
                f"from, got neither; pass what init returned."
            )
        return None


def export_parameters(params: Mapping[str, Any], *, axes: Mapping[str, str] | None = None) -> dict[str, np.ndarray]:
    """Copy a linen layer's parameters into canonical arrays, as `jax_impl.export_parameters` does with an nnx layer's.

    Args:
        params: The layer's own {"kernel": ..., "bias": ...}, or {"params": {...}} as its `init` returns it.
        axes: As for `jax_impl.import_parameters`.
    """
    return to_canonical(_canonical(_own(params)), axes)


def import_parameters(
    params: Mapping[str, Any], arrays: Mapping[str, Any], *, axes: Mapping[str, str] | None = None
) -> Mapping[str, Any]:
    """Return a linen layer's parameters with the values of canonical arrays; `params` itself is unchanged.

    Args:
        params: As for `export_parameters`; shapes, dtypes, placement, boxes of metadata and other collections are kept.
        arrays: As for `jax_impl.import_parameters`.
        axes: The same.

    Returns:
        A new mapping of the same structure.
    """
    own = _own(params)
    values = from_canonical(_canonical(own), arrays, axes)
    renewed = meta.replace_boxed(dict(own), {_LINEN_NAMES[name]: value for name, value in values.items()})
    result = {**params, "params": renewed} if "params" in params else renewed
    return freeze(result) if isinstance(params, FrozenDict) else result


def save_parameters(
    params: Mapping[str, Any], path: str | os.PathLike[str], *, in_features: Sizes = None, out_features: Sizes = None
) -> None:
    """Write a linen layer's parameters to a file, as `jax_impl.save_parameters` does with an nnx layer's.

    Args:
        params: As for `export_parameters`.
        path: Where to.
        in_features: Sizes of a layer of unequal sizes, which its packed parameters do not say.
        out_features: The same.
    """
    arrays = export_parameters(params)
    write_arrays(arrays, path, _packing_of(arrays, in_features, out_features))


def load_parameters(
    params: Mapping[str, Any], path: str | os.PathLike[str], *, in_features: Sizes = None, out_features: Sizes = None
) -> Mapping[str, Any]:
    """Return a linen layer's parameters with the values of a file written by `save_parameters` of either framework.

    `params` itself is unchanged. Sizes are as for `save_parameters`. Raises as `jax_impl.load_parameters` does.
    """
    like = _canonical(_own(params))
    return import_parameters(params, read_arrays(path, like, _packing_of(like, in_features, out_features)))


def export_linears(
    params: Mapping[str, Any],
    prefix: str = "",
    *,
    keys: Sequence[str] | None = None,
    in_features: Sizes = None,
    out_features: Sizes = None,
) -> dict[str, np.ndarray]:
    """Copy a linen layer's parameters into the state_dict of n linears, as `jax_impl.export_linears` does.

    Sizes are as for `save_parameters`.
    """
    arrays = export_parameters(params)
    return dict(linears_from_arrays(arrays, prefix, _packing_of(arrays, in_features, out_features), keys))


def load_linears(
    params: Mapping[str, Any],
    state_dict: Mapping[Any, Any] | str | os.PathLike[str],
    prefix: str = "",
    *,
    keys: Sequence[str] | None = None,
    in_features: Sizes = None,
    out_features: Sizes = None,
) -> Mapping[str, Any]:
    """Return a linen layer's parameters with the values of n linears, as `jax_impl.load_linears` takes them.

    `params` itself is unchanged. In linen's own parameters lists are named `heads_0`: their prefix is "heads_". Sizes
    are as for `save_parameters`.
    """
    like = _canonical(_own(params))
    return import_parameters(
        params, read_linears(state_dict, prefix, keys, like, _packing_of(like, in_features, out_features))
    )


def _packing_of(parameters: Mapping[str, Any], in_features: Any, out_features: Any) -> Packing | None:
    """Return the layout of canonical parameters, None for those of one size; refuse sizes that are not theirs."""
    packed = getattr(parameters["weight"], "ndim", 0) == 1
    if in_features is None and out_features is None:
        if packed:
            raise ValueError(
                "`in_features`: expected the sizes of partitions of unequal sizes, which packed parameters do not say, "
                "got None; pass those of the layer, and its out_features."
            )
        return None
    packing = packing_of_call(in_features, out_features)
    found = [value.shape for value in parameters.values()]
    if found != [(packing.weight_size,), (packing.out_offsets[-1],)][: len(found)]:
        raise ValueError(
            f"`in_features`: expected sizes of packed parameters of the shapes {shown(found)}, got sizes of "
            f"{packing.weight_size} weights and {packing.out_offsets[-1]} biases; pass those of the layer."
        )
    return packing


def _own(params: Mapping[str, Any]) -> Mapping[str, Any]:
    check_instance("params", params, Mapping, "pass the layer's own dict")
    own = params.get("params", params)
    check_instance("params", own, Mapping, "pass the layer's own dict")
    if set(own) not in ({"kernel"}, {"kernel", "bias"}):
        raise ValueError(
            f"`params`: expected the names 'kernel' and, if any, 'bias', got {', '.join(map(shown, own)) or 'none'}; "
            f"pass the layer's own dict."
        )
    return own


def _canonical(own: Mapping[str, Any]) -> dict[str, Any]:
    return {name: meta.unbox(own[key]) for name, key in _LINEN_NAMES.items() if key in own}
