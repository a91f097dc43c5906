"""What identifies a measurement apart from where and when it was made."""

from typing import NamedTuple

from bench.records import Record


class Identity(NamedTuple):
    """The conditions of a cell, by which cells of two runs are paired."""

    workload: str
    num_partitions: int
    in_features: int
    out_features: int
    batch: int
    dtype: str
    device: str
    direction: str
    division: str
    precision: str
    layout: str
    cache: str
    optimizer: str | None

    @property
    def what(self) -> str:
        """Workload, sizes and direction."""
        sizes = f"B={self.batch}, n={self.num_partitions}, {self.in_features}->{self.out_features}"
        return f"{self.workload} ({sizes}), {self.step}"

    @property
    def step(self) -> str:
        """Direction, and the optimiser where there is one."""
        return self.direction if self.optimizer is None else f"{self.direction} ({self.optimizer})"

    @property
    def how(self) -> str:
        """Precision and division, and the cache where it is cold."""
        return f"{self.precision}, {self.division}" + ("" if self.cache == "warm" else f", {self.cache}")

    @property
    def title(self) -> str:
        """One line for a heading."""
        return f"{self.what}, {self.how}, {self.device}"


def identity(record: Record) -> Identity:
    """The conditions that a record was measured under."""
    return Identity(*(getattr(record, name) for name in Identity._fields))
