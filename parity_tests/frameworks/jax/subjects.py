"""Run JAX subjects: the table's implementations through the public function, and the nnx and linen layers."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jax_impl import PartitionedLinear, export_parameters, import_parameters, partitioned_linear
from jax_impl.linen import PartitionedLinear as LinenPartitionedLinear
from jax_impl.registry import IMPLEMENTATIONS, UNEQUAL_IMPLEMENTATIONS, unsupported_reason
from jax_impl.sharding import partition_sharding
from parity_tests.judge.inputs import Case, Inputs, Layout, Sizes
from parity_tests.judge.subjects import (
    DEFAULT_MODES,
    EQUAL,
    MODES,
    UNEQUAL,
    check_precision,
    members_of,
    shards_of,
    sizes_reason,
)

Function = Callable[..., jax.Array]


def _mapped(function: Function) -> Function:
    """Return an ensemble of layers with the partitions divided among its members."""

    def ensemble(x: jax.Array, *parameters: jax.Array) -> jax.Array:
        n = parameters[0].shape[0]
        members = members_of(n)
        own = jnp.moveaxis(x.reshape(*x.shape[:-2], members, n // members, x.shape[-1]), -3, 0)
        stacked = [value.reshape(members, n // members, *value.shape[1:]) for value in parameters]
        y = jnp.moveaxis(jax.vmap(function)(own, *stacked), 0, -3)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return ensemble


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


@dataclass(frozen=True)
class Execution:
    """The steps that a mode adds to a call."""

    wrap: Callable[[Function], Function] = _plainly  # from the subject's function to the one that is called
    # From that function to what runs: `jax.jit`, or nothing
    program: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.jit
    casts: bool = False  # the subject is a layer with a dtype policy
    divides: bool = False  # operands are divided over devices


EXECUTIONS: Mapping[str, Execution] = MappingProxyType(
    {
        "eager": Execution(program=_plainly),
        "jit": Execution(),
        "vmap": Execution(wrap=_mapped),
        "policy": Execution(casts=True),
        "sharded": Execution(divides=True),
    }
)


def _mesh(device: Any, num_partitions: int) -> jax.sharding.Mesh:
    """Return the devices, of this one's platform, that the partitions are divided over."""
    devices = jax.devices(device.platform)[: shards_of(num_partitions)]
    return jax.make_mesh((len(devices),), ("partitions",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def placement(device: Any, num_partitions: int, axis: int) -> jax.sharding.NamedSharding:
    """Divide an array over the devices that the partitions are divided over.

    `device` is one of the platform that is meant, `axis` the axis of the partitions.
    """
    return partition_sharding(_mesh(device, num_partitions), leading_axes=axis)


def mode_reason(mode: str, table_name: str | None, device: Any, case: Case, dtype: str) -> str | None:
    """Return one sentence if an implementation cannot run in this mode here, else None.

    A layer class has no name in the table.
    """
    if dtype not in MODES[mode].dtypes:
        return f"mode {mode}: expected {', '.join(MODES[mode].dtypes)}, got {dtype}; no other program runs there."
    if mode == "vmap" and table_name is not None and not IMPLEMENTATIONS[table_name].maps:
        return f"mode vmap: {table_name} is declared not to be mapped by jax.vmap."
    if mode == "sharded":
        shards, devices = shards_of(case.num_partitions), len(jax.devices(device.platform))
        if shards == 1:
            return f"mode sharded: {case.num_partitions} partitions are divided by no number of devices at hand."
        if shards > devices:
            return (
                f"mode sharded: expected {shards} devices, got {devices}; on a CPU set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count=8 before JAX starts."
            )
    return None


@dataclass(frozen=True)
class JaxSubject:
    """One JAX implementation in one mode; see `judge.subjects.Subject`."""

    implementation: str
    isolates_partitions: bool
    device: Any
    function: Callable[[Sizes | None], Function]
    table_name: str | None
    mode: str = DEFAULT_MODES["jax"]
    framework: str = "jax"
    sizes: str = EQUAL

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """Return one sentence if the table or the mode declares this case unsupported, else None."""
        reason = sizes_reason(self.mode, self.sizes)
        reason = reason or mode_reason(self.mode, self.table_name, self.device, case, dtype)
        if reason is not None or self.table_name is None:
            return reason
        return unsupported_reason(
            self.table_name,
            dtype=MODES[self.mode].computes_in or dtype,
            device="cuda" if self.device.platform == "gpu" else str(self.device.platform),
            in_features=case.largest[0],
            out_features=case.largest[1],
            unequal=self.sizes == UNEQUAL,
        )

    def _put(self, array: np.ndarray, axis: int) -> jax.Array:
        """Place an array on the device, or divided over several along the axis of its partitions."""
        where = placement(self.device, array.shape[axis], axis) if EXECUTIONS[self.mode].divides else self.device
        return jax.device_put(np.ascontiguousarray(array), where)

    def _arguments(self, inputs: Inputs) -> tuple[jax.Array, list[jax.Array]]:
        # JAX arrays are always dense; the transposed layout is a transposition that the function begins with.
        transposed = inputs.layout == "transposed"
        x = inputs.x.swapaxes(-1, -2) if transposed else inputs.x
        return self._put(x, x.ndim - (1 if transposed else 2)), [
            self._put(array, 0) for array in inputs.parameters.values()
        ]

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Return y."""
        # A context: a global switch would change the dtypes of other code.
        with jax.enable_x64(inputs.dtype == "float64"):
            x, parameters = self._arguments(inputs)
            return np.asarray(_forward(self.function(inputs.sizes), inputs.layout, self.mode)(x, *parameters))

    def vjp(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Return y, dx, dweight and dbias."""
        with jax.enable_x64(inputs.dtype == "float64"):
            x, parameters = self._arguments(inputs)
            cotangent = self._put(inputs.cotangent, len(inputs.leading))
            y, gradients = _vjp(self.function(inputs.sizes), inputs.layout, self.mode)(cotangent, x, *parameters)
            names = ("dx", "dweight", "dbias")[: len(parameters) + 1]
            named = dict(zip(names, map(np.asarray, gradients), strict=True))
            if inputs.layout == "transposed":
                named["dx"] = named["dx"].swapaxes(-1, -2)
            return {"y": np.asarray(y), **named}


# Cached, because jit recognises a function by its identity: a new closure at each call would compile each call anew.
@functools.cache
def _called(function: Function, layout: Layout, mode: str) -> Function:
    call = EXECUTIONS[mode].wrap(function)
    if layout == "transposed":
        return lambda x, *parameters: call(jnp.swapaxes(x, -1, -2), *parameters)
    return call


@functools.cache
def _forward(function: Function, layout: Layout, mode: str) -> Function:
    return EXECUTIONS[mode].program(_called(function, layout, mode))


@functools.cache
def _vjp(function: Function, layout: Layout, mode: str) -> Callable[..., Any]:
    def run(cotangent: jax.Array, *arguments: jax.Array):
        y, pullback = jax.vjp(_called(function, layout, mode), *arguments)
        return y, pullback(cotangent.astype(y.dtype))

    return EXECUTIONS[mode].program(run)


# Cached likewise: the subjects of one process share what was compiled.
@functools.cache
def _functional(name: str, precision: jax.lax.Precision, sizes: Sizes | None) -> Function:
    how: dict[str, Any] = {} if sizes is None else dataclasses.asdict(sizes)
    return lambda x, *parameters: partitioned_linear(x, *parameters, implementation=name, precision=precision, **how)


@functools.cache
def _nnx_layer(precision: jax.lax.Precision, name: str, dtype: DTypeLike | None, sizes: Sizes | None) -> Function:
    def call(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        own = kernel.shape if sizes is None else (len(sizes.in_features), sizes.in_features, sizes.out_features)
        layer = PartitionedLinear(
            *cast(tuple[int, int, int], own),
            use_bias=bias is not None,
            implementation=name,
            dtype=dtype,
            param_dtype=kernel.dtype,
            precision=precision,
            rngs=nnx.Rngs(0),
        )
        # Replaced after construction: the gradient flows to the arguments through the attributes the layer reads.
        layer.kernel = nnx.Param(kernel)
        if bias is not None:
            layer.bias = nnx.Param(bias)
        return layer(x)

    return call


@functools.cache
def _linen_layer(precision: jax.lax.Precision, dtype: DTypeLike | None, sizes: Sizes | None) -> Function:
    def call(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        layer = LinenPartitionedLinear(
            features=kernel.shape[2] if sizes is None else sizes.out_features,
            in_features=None if sizes is None else sizes.in_features,
            use_bias=bias is not None,
            dtype=dtype,
            param_dtype=kernel.dtype,
            precision=precision,
        )
        parameters = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
        return cast(jax.Array, layer.apply({"params": parameters}, x))

    return call


@functools.cache
def _for_sizes(build: Callable[..., Function], *arguments: Any) -> Callable[[Sizes | None], Function]:
    """Return the function that a builder makes for given sizes; the same object for the same arguments."""
    return functools.partial(build, *arguments)


def round_trip(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Put canonical arrays into the layer and take them out again."""
    n, i, o = arrays["weight"].shape
    dtype = arrays["weight"].dtype
    with jax.enable_x64(dtype == np.float64):
        layer = PartitionedLinear(n, i, o, use_bias="bias" in arrays, param_dtype=dtype, rngs=nnx.Rngs(0))
        import_parameters(layer, dict(arrays))
        return export_parameters(layer)


def resolve_device(device: str) -> Any:
    """Turn `auto`, `cpu` or `cuda` into a device.

    Raises:
        ValueError: if the device is not there.
    """
    if device == "auto":
        return jax.devices()[0]
    platform = {"cuda": "gpu"}.get(device, device)
    try:
        return jax.devices(platform)[0]
    except RuntimeError:
        raise ValueError(
            f"device: expected a {device} device visible to jax, got none; use --device cpu or auto."
        ) from None


def subjects(
    device: str = "auto", modes: Sequence[str] = (), precision: str | None = None, sizes: str = EQUAL
) -> list[JaxSubject]:
    """Return every JAX subject, in every mode that is asked for; in the default mode if none is."""
    target = resolve_device(device)
    check_precision(precision, has_tf32=target.platform == "gpu")
    # HIGHEST: the formulation is judged, not the device's default of rounding fp32 operands to TF32. For TF32
    # that default and no preset: convolutions take none.
    product = jax.lax.Precision.DEFAULT if precision == "tf32" else jax.lax.Precision.HIGHEST
    found = []
    for mode in modes or (DEFAULT_MODES["jax"],):
        # A dtype policy belongs to a layer: there each implementation is judged inside one.
        cast_to = MODES[mode].computes_in
        functions = {
            name: (entry.isolates_partitions, _for_sizes(_nnx_layer, product, name, cast_to))
            if EXECUTIONS[mode].casts
            else (entry.isolates_partitions, _for_sizes(_functional, name, product))
            for name, entry in (IMPLEMENTATIONS if sizes == EQUAL else UNEQUAL_IMPLEMENTATIONS).items()
        }
        sources = [
            JaxSubject(name, isolates, target, function, name, sizes=sizes)
            for name, (isolates, function) in functions.items()
        ]
        layers = {
            "layer": _for_sizes(_nnx_layer, product, "auto", cast_to),
            "linen": _for_sizes(_linen_layer, product, cast_to),
        }
        sources += [JaxSubject(name, True, target, function, None, sizes=sizes) for name, function in layers.items()]
        found += [dataclasses.replace(source, mode=mode) for source in sources]
    return found


def release_programs() -> None:
    """Drop all compiled programs."""
    jax.clear_caches()


LAYERS = ("layer", "linen")


def initial_weight(layer: str, init: str, sizes: tuple[int, int, int], dtype: str) -> np.ndarray:
    """Return the kernel `(n, in, out)` that a new layer drew."""
    n, i, o = sizes
    number = jnp.dtype(dtype)
    if layer == "layer":
        return np.asarray(PartitionedLinear(n, i, o, init=init, param_dtype=number, rngs=nnx.Rngs(0)).kernel[...])
    twin = LinenPartitionedLinear(features=o, initializer=init, param_dtype=number)
    return np.asarray(twin.init(jax.random.key(0), jnp.zeros((1, n, i), number))["params"]["kernel"])
