"""What "auto" means."""

from jax_impl.registry import UnsupportedImplementationError, implementation_names, unsupported_reason

_PREFERENCE = ("matmul", *(name for name in implementation_names() if name != "matmul"))


def select_implementation(
    *, num_partitions: int, in_features: int, out_features: int, rows: int, dtype: str, device: str
) -> str:
    """Name the implementation that `implementation="auto"` runs.

    That is `matmul` wherever it is supported: measured in fp32 on a CPU, forward and forward + backward, the batched
    product over partition-major operands was the fastest formulation or within noise of it at every size tried,
    because it is the one whose gradients need no transpose of a whole operand. Where it is not supported, the first
    supported one in table order is named.

    Args:
        num_partitions: n.
        in_features: i, per partition.
        out_features: o, per partition.
        rows: Number of rows, the product of the leading axes.
        dtype: Canonical dtype name of the operands.
        device: Device type of the operands.

    Returns:
        A name that supports this call.

    Raises:
        UnsupportedImplementationError: If none does; the message says why `matmul` does not.
    """
    reasons = []
    for name in _PREFERENCE:
        reason = unsupported_reason(
            name,
            dtype=dtype,
            device=device,
            num_partitions=num_partitions,
            in_features=in_features,
            out_features=out_features,
        )
        if reason is None:
            return name
        reasons.append(reason)
    raise UnsupportedImplementationError(reasons[0])
