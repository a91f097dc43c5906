"""FASTER, SLOWER, SAME or UNRESOLVED for every competitor of a cell, corrected for their number.

A verdict is what the competitor's own interval says (`statistics.verdict`), unless chance alone could have named a
competitor: `winners.beyond_chance` tests all competitors of the cell together, against both runs of the baseline, its
A/A control being one. The chance that any of them is named although all are equal is meant to be 2%: that is what the
simulated cells of this package's README come to, where competitors whose noise differs tenfold come to 3%.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.study.pairing import Block, Spread, spreads_of
from bench.study.statistics import FASTER, SLOWER, UNRESOLVED, Interval, ratio_intervals, resolution, verdict
from bench.study.winners import beyond_chance

# Label of the A/A control among the competitors, since it shares the baseline's.
CONTROL = ""
# Of the chance that an interval leaves out the truth, 5%.
_SHARE = 0.4


@dataclass(frozen=True)
class Measured:
    """The ratios of one cell to its baseline, before anything is concluded from them.

    Attributes:
        intervals: label to ratio.
        tested: label to the ratio to the mean of the baseline's two runs, which is known better than either.
        control: ratio of the A/A control, or None.
        floor: the noise floor as a log ratio, or None without a control.
        confidence: of the intervals.
    """

    intervals: dict[str, Interval]
    tested: dict[str, Spread]
    control: Interval | None
    floor: float | None
    confidence: float

    def verdicts(self, compared: Collection[str], spread_of_processes: float) -> dict[str, str]:
        """Return the verdict on each of some competitors, corrected for their number.

        Args:
            compared: labels of those that get a verdict.
            spread_of_processes: log ratio within which a single process names nobody.
        """
        labels = [label for label in self.intervals if label in compared]
        error = _SHARE * (1 - self.confidence)
        named = beyond_chance([self.tested[label] for label in labels], spread_of_processes, error)
        found = {label: verdict(self.intervals[label], self.floor, spread_of_processes) for label in labels}
        chance = {label for label, beyond in zip(labels, named, strict=True) if not beyond}
        return {
            label: UNRESOLVED if said in (FASTER, SLOWER) and label in chance else said for label, said in found.items()
        }


def _tested(block: Block, control: Mapping[int, np.ndarray]) -> list[Spread]:
    """Return the ratios of a block to the mean of the baseline's two runs, round by round."""
    ratios = block.log_ratios
    if all(k in control and len(control[k]) >= count for k, count in zip(block.processes, block.lengths, strict=True)):
        again = [control[k][:count] for k, count in zip(block.processes, block.lengths, strict=True)]
        ratios = ratios - 0.5 * np.concatenate(again)
    return spreads_of(ratios, block.lengths, block.processes)


def measure(blocks: Sequence[Block], confidence: float) -> Measured:
    """Return the ratios of a cell.

    Args:
        blocks: all that were timed, paired with the baseline; the control under the label `CONTROL`.
        confidence: of the intervals.
    """
    control: dict[int, np.ndarray] = {}
    for block in blocks:
        if CONTROL in block.labels:
            rounds = np.split(block.log_ratios[block.labels.index(CONTROL)], np.cumsum(block.lengths)[:-1])
            control = dict(zip(block.processes, rounds, strict=True))
    intervals: dict[str, Interval] = {}
    tested: dict[str, Spread] = {}
    for block in blocks:
        found = ratio_intervals(block.log_ratios, block.lengths, confidence=confidence)
        intervals |= zip(block.labels, found, strict=True)
        tested |= zip(block.labels, _tested(block, control), strict=True)
    again = intervals.pop(CONTROL, None)
    return Measured(intervals, tested, again, None if again is None else resolution(again), confidence)
