"""FASTER, SLOWER, SAME or UNRESOLVED for every competitor of a cell, corrected for their number.

A verdict is what the competitor's own interval says (`statistics.verdict`), unless chance alone could have named a
competitor: `winners.beyond_chance` tests all competitors of the cell together. The chance that any of them is named
although all are equal is at most 2.5%, half of what an interval of 95% leaves: moderated variances are estimates, and
simulated cells of equals came to twice as many false names at 5% (see the README of this package).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bench.study.pairing import Block, Spread, spreads_of
from bench.study.statistics import FASTER, SLOWER, UNRESOLVED, Interval, ratio_intervals, resolution, verdict
from bench.study.winners import beyond_chance

# Label of the A/A control among the competitors, since it shares the baseline's.
CONTROL = ""
# Of the chance that an interval leaves out the truth.
_SHARE = 0.5


@dataclass(frozen=True)
class Measured:
    """The ratios of one cell to its baseline, before anything is concluded from them.

    Attributes:
        intervals: label to ratio.
        spreads: label to the same ratio's mean and standard error.
        control: ratio of the A/A control, or None.
        floor: the noise floor as a log ratio, or None without a control.
        confidence: of the intervals.
    """

    intervals: dict[str, Interval]
    spreads: dict[str, Spread]
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
        named = beyond_chance([self.spreads[label] for label in labels], spread_of_processes, error)
        found = {label: verdict(self.intervals[label], self.floor, spread_of_processes) for label in labels}
        chance = {label for label, beyond in zip(labels, named, strict=True) if not beyond}
        return {
            label: UNRESOLVED if said in (FASTER, SLOWER) and label in chance else said for label, said in found.items()
        }


def measure(blocks: Sequence[Block], confidence: float) -> Measured:
    """Return the ratios of a cell.

    Args:
        blocks: all that were timed, paired with the baseline; the control under the label ``CONTROL``.
        confidence: of the intervals.
    """
    intervals: dict[str, Interval] = {}
    spreads: dict[str, Spread] = {}
    for block in blocks:
        found = ratio_intervals(block.log_ratios, block.lengths, confidence=confidence)
        intervals |= zip(block.labels, found, strict=True)
        spreads |= zip(block.labels, spreads_of(block.log_ratios, block.lengths, block.processes), strict=True)
    control = intervals.pop(CONTROL, None)
    return Measured(intervals, spreads, control, None if control is None else resolution(control), confidence)
