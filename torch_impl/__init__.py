"""n independent linear maps on n groups of features, for PyTorch."""

try:
    from torch_impl.functional import partitioned_linear
    from torch_impl.layer import PartitionedLinear
    from torch_impl.masked_layer import MaskedPartitionedLinear
    from torch_impl.parameters import (
        convert_state_dict,
        export_linears,
        export_parameters,
        import_parameters,
        load_linears,
        load_parameters,
        save_parameters,
        state_dict_from_linears,
    )
    from torch_impl.partitions import for_each_partition_
    from torch_impl.registry import UnsupportedImplementationError, implementation_names
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    raise ModuleNotFoundError(
        "torch_impl: expected torch to be installed, got none; install partitioned-linear with its extra `torch`, or "
        "on an NVIDIA GPU with `cuda12` or `cuda13`.",
        name=missing.name,
    ) from None

__all__ = [
    "MaskedPartitionedLinear",
    "PartitionedLinear",
    "UnsupportedImplementationError",
    "convert_state_dict",
    "export_linears",
    "export_parameters",
    "for_each_partition_",
    "implementation_names",
    "import_parameters",
    "load_linears",
    "load_parameters",
    "partitioned_linear",
    "save_parameters",
    "state_dict_from_linears",
]
