"""Blocks that turned out much shorter than they were sized for.

How many calls a block has is found out by a few calls before the first round, and tried once more after a while. Where
these were slow, later blocks last less than was intended, and what surrounds their calls, the clock and the wait at the
end, weighs more in them. The samples are as true as any others: this is worth a remark beside the result, and no fault
of the record.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from bench.plan.presets import BLOCK_S, SHORT_BLOCK
from bench.records import Record


@dataclass(frozen=True, slots=True)
class ShortBlocks:
    """The blocks of one record, some of which lasted less than half of the intended time.

    Attributes:
        label: whose they are.
        control: whether they are those of the A/A control.
        process_replicate: number of the set of processes.
        short: how many lasted less than half of the intended time.
        blocks: how many there are.
        calls_per_block: calls in each.
        median_s: what a block lasted.
        shortest_s: what the shortest lasted.
        intended_s: what a block was meant to last at least.
    """

    label: str
    control: bool
    process_replicate: int
    short: int
    blocks: int
    calls_per_block: int
    median_s: float
    shortest_s: float
    intended_s: float

    @property
    def sentence(self) -> str:
        """One line for a reader."""
        who = f"{self.label}, A/A control" if self.control else self.label
        return (
            f"{who}, process {self.process_replicate}: {self.short} of {self.blocks} blocks lasted less than half of "
            f"the {self.intended_s * 1e3:.3g} ms intended (median {self.median_s * 1e3:.3g} ms, shortest "
            f"{self.shortest_s * 1e3:.3g} ms, calls in each: {self.calls_per_block})"
        )


def short_blocks(records: Iterable[Record]) -> tuple[ShortBlocks, ...]:
    """The records that have such blocks, from their raw samples.

    Args:
        records: with their samples; those without a speed have no blocks.

    Returns:
        One account for each record that has any, in the order of the records.
    """
    found = []
    for record in records:
        blocks = record.block_latency_s
        # Records of earlier runs do not say it; it has been the same since.
        intended = record.block_s if record.block_s is not None else BLOCK_S.get(record.device)
        # The shortest tells of all others, and most records end here.
        if not blocks or intended is None or min(blocks) >= SHORT_BLOCK * intended:
            continue
        found.append(
            ShortBlocks(
                label=record.label,
                control=record.control,
                process_replicate=record.process_replicate,
                short=sum(block < SHORT_BLOCK * intended for block in blocks),
                blocks=len(blocks),
                calls_per_block=record.calls_per_block or 1,
                median_s=float(median(blocks)),
                shortest_s=min(blocks),
                intended_s=intended,
            )
        )
    return tuple(found)
