"""JAX subjects: every implementation of the table through the public function, and the nnx and linen layers."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_impl import PartitionedLinear, export_parameters, import_parameters, partitioned_linear
from jax_impl.linen import PartitionedLinear as LinenPartitionedLinear
from jax_impl.registry import IMPLEMENTATIONS, unsupported_reason
from parity_tests.harness.cases import Case, Layout
from parity_tests.harness.inputs import Inputs

_Function = Callable[..., jax.Array]


@contextlib.contextmanager
def _double_precision_if(needed: bool) -> Iterator[None]:
    """float64 arrays exist only under x64; a context, because a global switch would change other users' dtypes."""
    with jax.enable_x64(needed):
        yield


@dataclass(frozen=True)
class JaxSubject:
    """One JAX implementation, jitted, on one device; see ``base.Subject``."""

    implementation: str
    isolates_partitions: bool
    device: Any
    function: _Function
    table_name: str | None
    framework: str = "jax"

    def unsupported_reason(self, case: Case, dtype: str) -> str | None:
        """One sentence if the table declares this case unsupported, else None."""
        if self.table_name is None:
            return None
        return unsupported_reason(
            self.table_name,
            dtype=dtype,
            device="cuda" if self.device.platform == "gpu" else str(self.device.platform),
            num_partitions=case.num_partitions,
            in_features=case.in_features,
            out_features=case.out_features,
        )

    def _arguments(self, inputs: Inputs) -> tuple[jax.Array, list[jax.Array]]:
        def put(array: np.ndarray) -> jax.Array:
            return jax.device_put(array, self.device)

        # JAX arrays are always dense; the transposed layout is a transposition that the jitted function begins with.
        x = inputs.x.swapaxes(-1, -2) if inputs.layout == "transposed" else inputs.x
        parameters = [inputs.weight] if inputs.bias is None else [inputs.weight, inputs.bias]
        return put(np.ascontiguousarray(x)), [put(array) for array in parameters]

    def forward(self, inputs: Inputs) -> np.ndarray:
        """Returns y."""
        with _double_precision_if(inputs.dtype == "float64"):
            x, parameters = self._arguments(inputs)
            return np.asarray(_forward(self.function, inputs.layout)(x, *parameters))

    def vjp(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Returns y, dx, dweight and dbias."""
        with _double_precision_if(inputs.dtype == "float64"):
            x, parameters = self._arguments(inputs)
            cotangent = jax.device_put(inputs.cotangent, self.device)
            y, gradients = _vjp(self.function, inputs.layout)(cotangent, x, *parameters)
            names = ("dx", "dweight", "dbias")[: len(parameters) + 1]
            named = dict(zip(names, map(np.asarray, gradients), strict=True))
            if inputs.layout == "transposed":
                named["dx"] = named["dx"].swapaxes(-1, -2)
            return {"y": np.asarray(y), **named}


# Cached, because jit recognises a function by its identity: a new closure at each call would compile each call anew.
@functools.cache
def _forward(function: _Function, layout: Layout) -> _Function:
    if layout == "transposed":
        return jax.jit(lambda x, *parameters: function(jnp.swapaxes(x, -1, -2), *parameters))
    return jax.jit(function)


@functools.cache
def _vjp(function: _Function, layout: Layout) -> _Function:
    @jax.jit
    def run(cotangent: jax.Array, *arguments: jax.Array):
        y, pullback = jax.vjp(_forward(function, layout), *arguments)
        return y, pullback(cotangent)

    return run


def _functional(name: str) -> _Function:
    # HIGHEST: what is judged is the formulation, not the device's default of rounding fp32 operands to TF32.
    return lambda x, *parameters: partitioned_linear(
        x, *parameters, implementation=name, precision=jax.lax.Precision.HIGHEST
    )


def _nnx_layer(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    n, i, o = kernel.shape
    layer = PartitionedLinear(
        n,
        i,
        o,
        use_bias=bias is not None,
        param_dtype=kernel.dtype,
        precision=jax.lax.Precision.HIGHEST,
        rngs=nnx.Rngs(0),
    )
    # Replaced after construction: the gradient flows to the arguments through the very attributes the layer reads.
    layer.kernel = nnx.Param(kernel)
    if bias is not None:
        layer.bias = nnx.Param(bias)
    return layer(x)


def _linen_layer(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    layer = LinenPartitionedLinear(
        features=kernel.shape[2],
        use_bias=bias is not None,
        param_dtype=kernel.dtype,
        precision=jax.lax.Precision.HIGHEST,
    )
    parameters = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    return cast(jax.Array, layer.apply({"params": parameters}, x))


def round_trip(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Puts canonical arrays into the layer and takes them out again."""
    n, i, o = arrays["weight"].shape
    dtype = arrays["weight"].dtype
    with _double_precision_if(dtype == np.float64):
        layer = PartitionedLinear(n, i, o, use_bias="bias" in arrays, param_dtype=dtype, rngs=nnx.Rngs(0))
        import_parameters(layer, dict(arrays))
        return export_parameters(layer)


def resolve_device(device: str) -> Any:
    """Turns ``auto``, ``cpu`` or ``cuda`` into a device.

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


def subjects(device: str = "auto") -> list[JaxSubject]:
    """Returns every JAX subject."""
    target = resolve_device(device)
    found = [
        JaxSubject(name, entry.isolates_partitions, target, _functional(name), table_name=name)
        for name, entry in IMPLEMENTATIONS.items()
    ]
    found.append(JaxSubject("layer", True, target, _nnx_layer, table_name=None))
    found.append(JaxSubject("linen", True, target, _linen_layer, table_name=None))
    return found
