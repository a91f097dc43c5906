"""A workload: the sizes of one map, how x lies in memory, and where both come from."""

from dataclasses import dataclass

from parity_tests.judge.inputs import Case

LAYOUTS: tuple[str, ...] = ("contiguous", "partition_major", "time_series")


@dataclass(frozen=True)
class Workload:
    """One shape of `y[b, n, o] = sum_i x[b, n, i] * W[n, i, o] + b[n, o]`.

    Attributes:
        name: short and unique.
        batch: rows that one partition sees, `b`.
        num_partitions: `n`.
        in_features: `i`, per partition.
        out_features: `o`, per partition.
        source: where the sizes come from.
        layout: how x lies in memory: `contiguous` (`[B, n, in]`), `partition_major` (`[n, B, in]`) or
            `time_series` (`[B, L, C]` with L = in and C = n, so that the contraction axis is strided).

    Raises:
        ValueError: for a size below 1 or an unknown layout.
    """

    name: str
    batch: int
    num_partitions: int
    in_features: int
    out_features: int
    source: str
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        for size in ("batch", "num_partitions", "in_features", "out_features"):
            if getattr(self, size) < 1:
                raise ValueError(f"{size}: expected at least 1, got {getattr(self, size)}; give a positive size.")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {self.layout!r}; choose one of these.")

    @property
    def shape(self) -> str:
        """The sizes as text, for example `B=128, n=32, 32->32`."""
        return f"B={self.batch}, n={self.num_partitions}, {self.in_features}->{self.out_features}"

    @property
    def elements(self) -> int:
        """Numbers in x, W, b and y together."""
        x, y = self.in_features * self.batch, self.out_features * self.batch
        return self.num_partitions * (x + y + (self.in_features + 1) * self.out_features)

    def case(self) -> Case:
        """The correctness case with the same sizes."""
        return Case(self.name, (self.batch,), self.num_partitions, self.in_features, self.out_features)

    def dense_case(self) -> Case:
        """The case of the article's yardstick: one dense map over all features, which is another function."""
        n = self.num_partitions
        return Case(f"{self.name}/dense", (self.batch,), 1, n * self.in_features, n * self.out_features)
