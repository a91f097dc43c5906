"""n independent linear maps on n groups of features, for JAX and Flax (nnx; the linen twin is `jax_impl.linen`)."""

try:
    from jax_impl.functional import partitioned_linear
    from jax_impl.layer import PartitionedLinear
    from jax_impl.parameters import (
        export_linears,
        export_parameters,
        import_parameters,
        load_linears,
        load_parameters,
        save_parameters,
    )
    from jax_impl.partitions import for_each_partition_
    from jax_impl.registry import UnsupportedImplementationError, implementation_names
except ModuleNotFoundError as missing:
    if missing.name not in ("jax", "jaxlib", "flax"):
        raise
    raise ModuleNotFoundError(
        f"jax_impl: expected jax and flax to be installed, got no {missing.name}; install partitioned-linear with its "
        "extra `jax`, or on an NVIDIA GPU with `cuda12` or `cuda13`.",
        name=missing.name,
    ) from None

__all__ = [
    "PartitionedLinear",
    "UnsupportedImplementationError",
    "export_linears",
    "export_parameters",
    "for_each_partition_",
    "implementation_names",
    "import_parameters",
    "load_linears",
    "load_parameters",
    "partitioned_linear",
    "save_parameters",
]
