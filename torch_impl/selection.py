"""What "auto" means."""

from torch_impl.packing import Packing

AUTO = "matmul"
"""The implementation that `implementation="auto"` runs.

Measured forward and forward + backward in fp32, the batched product with the bias inside the kernel was the fastest
formulation or within noise of it at every size tried, because it copies neither operand.
"""


def auto_of_unequal(packing: Packing, *, shared: bool) -> str:
    """Name what `implementation="auto"` means for partitions of unequal sizes."""
    del packing, shared
    return "bucketed_matmul"
