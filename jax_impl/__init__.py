"""n independent linear maps on n groups of features, for JAX and Flax (nnx; the linen twin is `jax_impl.linen`)."""

from jax_impl.functional import partitioned_linear
from jax_impl.layer import PartitionedLinear
from jax_impl.parameters import export_parameters, import_parameters, load_parameters, save_parameters
from jax_impl.registry import UnsupportedImplementationError, implementation_names

__all__ = [
    "PartitionedLinear",
    "UnsupportedImplementationError",
    "export_parameters",
    "implementation_names",
    "import_parameters",
    "load_parameters",
    "partitioned_linear",
    "save_parameters",
]
