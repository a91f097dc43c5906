"""What "auto" means."""

from torch_impl.packing import Packing

AUTO = "matmul"
"""The implementation that `implementation="auto"` runs.

Measured forward and forward + backward in fp32, the batched product with the bias inside the kernel was the fastest
formulation or within noise of it at every size tried, because it copies neither operand. `loop`, which one machine
showed faster forward for 256 rows and more with 30 MB of x or y, is not chosen there: on another, in seven such
settings, it took 0.79 to 1.33 times as long, 1.11 in the geometric mean, and 1.15 forward + backward.
"""

# Measured on a CPU, one thread, fp32, B = 32 and 512, forward and forward + backward, with the sizes of SAINT (1 -> 32,
# 32 -> cardinalities), of categories (2 to 300 -> 8 and 16) and of a few large segments (64 to 896). With 32 buckets or
# more and at most twice the weight, padding took 0.80 to 0.85 of the time of buckets in training, and 1.08 to 1.14
# forward; with fewer buckets or more padding it took 0.81 to 6 times theirs. On a GPU neither was measured: there, too,
# each bucket costs launches and each padded byte is moved.
_MANY_BUCKETS, _MOST_PADDING = 32, 2


def auto_of_unequal(packing: Packing, *, shared: bool) -> str:
    """Name what `implementation="auto"` means for partitions of unequal sizes.

    `padded_matmul` for many buckets of nearly one size, else `bucketed_matmul`, which alone has a product for an input
    that all partitions share.
    """
    padded = packing.num_partitions * max(packing.in_features) * max(packing.out_features)
    many = len(packing.buckets) >= _MANY_BUCKETS and padded <= _MOST_PADDING * packing.weight_size
    return "padded_matmul" if many and not shared else "bucketed_matmul"
