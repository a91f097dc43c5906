"""A cell: everything that its competitors have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bench.plan.workloads import Workload
from parity_tests.judge.dtypes import short_name

DIRECTIONS: tuple[str, ...] = ("forward", "forward_backward", "train_step")
# Results of each direction, by the names of the parity harness; a step returns the new parameters.
RESULTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "forward": ("y",),
        "forward_backward": ("y", "dx", "dweight", "dbias"),
        "train_step": ("y", "dx", "weight", "bias"),
    }
)
DIVISIONS: tuple[str, ...] = ("stock", "matched", "tuned")
CACHES: tuple[str, ...] = ("warm", "cold")
DEVICES: tuple[str, ...] = ("cpu", "cuda")
STORAGE_DTYPES: Mapping[str, str] = MappingProxyType(
    {"ieee_fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
)
PRECISIONS: tuple[str, ...] = tuple(STORAGE_DTYPES)


@dataclass(frozen=True)
class Cell:
    """One comparison: a workload under one set of conditions."""

    workload: Workload  # the shape
    # `forward` (returns y), `forward_backward` (returns y, dx, dW and db) or `train_step` (returns y and dx, and
    # updates W and b)
    direction: str
    precision: str  # the precision class asked for, a key of `STORAGE_DTYPES`
    # `stock` (framework defaults), `matched` (the same arithmetic and layouts on both sides) or `tuned` (best effort on
    # each side)
    division: str
    device: str  # `cpu` or `cuda`
    cache: str = "warm"  # `warm` (one buffer set) or `cold` (buffer sets in turn, four times the last cache in all)
    optimizer: str | None = None  # of `train_step`, by its name in the neutral specification; None in other directions

    @property
    def dtype(self) -> str:
        """Canonical name of the storage dtype."""
        return STORAGE_DTYPES[self.precision]

    @property
    def title(self) -> str:
        """One line for a heading."""
        what = self.direction if self.optimizer is None else f"{self.direction} ({self.optimizer})"
        cold = ", cold" if self.cache == "cold" else ""
        return (
            f"{self.workload.name} ({self.workload.shape}), {what}, {short_name(self.precision)}, {self.division}{cold}"
        )
