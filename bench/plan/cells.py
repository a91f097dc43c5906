"""A cell: everything that its competitors have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bench.plan.workloads import Workload

DIRECTIONS: tuple[str, ...] = ("forward", "forward_backward")
DIVISIONS: tuple[str, ...] = ("stock", "matched")
DEVICES: tuple[str, ...] = ("cpu", "cuda")
STORAGE_DTYPES: Mapping[str, str] = MappingProxyType(
    {"ieee_fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
)
PRECISIONS: tuple[str, ...] = tuple(STORAGE_DTYPES)


@dataclass(frozen=True)
class Cell:
    """One comparison: a workload under one set of conditions.

    Attributes:
        workload: the shape.
        direction: ``forward`` (returns y) or ``forward_backward`` (returns y, dx, dW and db).
        precision: the precision class asked for, a key of ``STORAGE_DTYPES``.
        division: ``stock`` (framework defaults) or ``matched`` (the same arithmetic on both sides).
        device: ``cpu`` or ``cuda``.
        cache: ``warm`` (one buffer set).
    """

    workload: Workload
    direction: str
    precision: str
    division: str
    device: str
    cache: str = "warm"

    @property
    def dtype(self) -> str:
        """Canonical name of the storage dtype."""
        return STORAGE_DTYPES[self.precision]

    @property
    def title(self) -> str:
        """One line for a heading."""
        return f"{self.workload.name} ({self.workload.shape}), {self.direction}, {self.precision}, {self.division}"
