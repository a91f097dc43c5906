"""The shapes that are timed, each with the place it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from parity_tests.harness.cases import Case

ARTICLE = "the source article (sizes per partition; the article states totals over partitions)"
LTSF = "cure-lab/LTSF-Linear, NLinear and DLinear with individual=True (a ModuleList loop), batch 16"
RECURRENTGEMMA = "google-deepmind/recurrentgemma 2B, block-diagonal gates of the RG-LRU"


@dataclass(frozen=True)
class Workload:
    """One shape of ``y[b, n, o] = sum_i x[b, n, i] * W[n, i, o] + b[n, o]``.

    Attributes:
        name: short and unique.
        batch: rows that one partition sees, ``b``.
        num_partitions: ``n``.
        in_features: ``i``, per partition.
        out_features: ``o``, per partition.
        source: where the sizes come from.
        layout: how x lies in memory.
    """

    name: str
    batch: int
    num_partitions: int
    in_features: int
    out_features: int
    source: str
    layout: str = "contiguous"

    @property
    def shape(self) -> str:
        """The sizes as text, for example ``B=128, n=32, 32->32``."""
        return f"B={self.batch}, n={self.num_partitions}, {self.in_features}->{self.out_features}"

    def case(self) -> Case:
        """The correctness case with the same sizes."""
        return Case(self.name, (self.batch,), self.num_partitions, self.in_features, self.out_features)

    def dense_case(self) -> Case:
        """The case of the article's yardstick: one dense map over all features, which is another function."""
        n = self.num_partitions
        return Case(f"{self.name}/dense", (self.batch,), 1, n * self.in_features, n * self.out_features)


_ALL = (
    Workload("article-base", 128, 32, 32, 32, f"{ARTICLE}: claims 1 and 2"),
    Workload("article-batch-1", 1, 32, 32, 32, f"{ARTICLE}: the smallest batch of claim 1"),
    Workload("article-batch-2048", 2048, 32, 32, 32, f"{ARTICLE}: claim 3"),
    Workload("article-n8", 128, 8, 128, 128, f"{ARTICLE}: claim 4"),
    Workload("electricity-336-96", 16, 321, 336, 96, f"{LTSF}; Electricity, horizon 96"),
    Workload("electricity-336-720", 16, 321, 336, 720, f"{LTSF}; Electricity, horizon 720"),
    Workload("recurrentgemma-2b-gates", 2048, 10, 256, 256, f"{RECURRENTGEMMA}; 2048 tokens"),
    Workload("recurrentgemma-2b-gates-1024", 1024, 10, 256, 256, f"{RECURRENTGEMMA}; 1024 tokens"),
    Workload("recurrentgemma-2b-gates-256", 256, 10, 256, 256, f"{RECURRENTGEMMA}; 256 tokens"),
)

WORKLOADS: Mapping[str, Workload] = MappingProxyType({workload.name: workload for workload in _ALL})
