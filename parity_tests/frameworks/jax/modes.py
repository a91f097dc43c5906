"""Run calls in each JAX mode of `judge.subjects.MODES`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jax_impl.registry import IMPLEMENTATIONS
from jax_impl.sharding import partition_sharding
from parity_tests.judge.inputs import Case
from parity_tests.judge.subjects import MODES, members_of, shards_of

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
