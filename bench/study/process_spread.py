"""How far a process may be off, learned from cells that several processes of the same machine measured.

Compilers choose anew in every process, and memory lies elsewhere: each process adds an offset of its own to every
ratio. The A/A control shares the baseline's process, so it does not show these offsets, and no number of rounds
averages them out. A cell of a single process therefore names nobody within the spread of processes. How large that is,
the other cells of the machine tell: a quantile of the deviations of a process from the mean of its competitor. Only
competitors near the baseline are asked, since only those could be named by an offset, and since those that take many
times as long scatter far more from process to process.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from bench.archive import Archive, Damage, read_cells
from bench.environments import device_name
from bench.plan.competitors import YARDSTICK
from bench.records import Record
from bench.study.disturbance import is_disturbed
from bench.study.pairing import Rounds, by_label, log_latencies, paired, spreads_of
from bench.study.statistics import CONFIDENCE, student_t_quantile

# Where nothing is known, processes are taken to differ by up to this, in 95% of all comparisons of two competitors.
GUESS = math.log(1.10)
# How far from the baseline a competitor may be on average for its deviations to count.
NEAR = math.log(1.25)


@dataclass(frozen=True)
class ProcessSpread:
    """What is known of the spread of processes on one machine.

    Attributes:
        off: deviations that were seen, as log ratios without sign, in ascending order; each is that of a process from
            the mean of all processes of its competitor and cell, times `sqrt(m / (m - 1))` for m processes.
        degrees: their degrees of freedom: m - 1 for each cell, since all competitors of a cell share the baseline.
    """

    off: tuple[float, ...] = ()
    degrees: int = 0

    def reach(self, comparisons: int) -> float:
        """Return the log ratio that the offset of a process exceeds with 5% in any of so many comparisons.

        Args:
            comparisons: number of competitors that are compared with one another or with the baseline.
        """
        error = (1 - CONFIDENCE) / max(comparisons, 1)
        normal = NormalDist()
        guess = GUESS * normal.inv_cdf(1 - error / 2) / normal.inv_cdf(0.5 + CONFIDENCE / 2)
        if not self.off:
            return guess
        expected = error * len(self.off)
        # A quantile of a sample is itself uncertain: one standard error of the count is left out.
        beyond = int(expected - math.sqrt(expected))
        if beyond > 0:
            return self.off[-1 - beyond]
        # Too few were seen to tell how far the rare ones reach: the bound of normal offsets, but not beyond the guess
        # unless a deviation was.
        typical = math.sqrt(sum(off * off for off in self.off) / len(self.off))
        return max(self.off[-1], min(guess, student_t_quantile(1 - error / 2, self.degrees) * typical))


NOTHING_SEEN = ProcessSpread()


def deviations(reference: Rounds, others: Mapping[str, Rounds]) -> tuple[list[float], int]:
    """Return the deviations of the processes of one cell, as `ProcessSpread` holds them, and their degrees of freedom.

    Args:
        reference: the baseline's rounds.
        others: label to rounds, of the competitors.
    """
    found, degrees = [], 0
    for block in paired(reference, others):
        count = len(block.processes)
        if count > 1:
            scale = math.sqrt(count / (count - 1))
            near = [
                spread
                for spread in spreads_of(block.log_ratios, block.lengths, block.processes)
                if abs(spread.mean) <= NEAR
            ]
            for spread in near:
                degrees = max(degrees, count - 1)
                found += [scale * abs(mean - spread.mean) for mean in spread.processes.values()]
    return found, degrees


def _deviations(records: Sequence[Record]) -> tuple[list[float], int]:
    groups = by_label(records)
    baseline = next((record.label for record in records if record.baseline and not record.control), None)
    compared = {
        label: log_latencies(group)
        for label, group in groups.items()
        if label != baseline and group[0].kind != YARDSTICK and all(record.status == "ok" for record in group)
    }
    return deviations(log_latencies(groups[baseline]), compared) if baseline is not None else ([], 0)


def spreads_by_machine(groups: Iterable[Sequence[Record]], machines: Mapping[str, str]) -> dict[str, ProcessSpread]:
    """Return what cells of several processes tell of each environment's machine.

    Args:
        groups: the records of one cell and environment each; a disturbed cell and one of a single process tell nothing.
        machines: environment to the machine that it was on; an environment that is missing is a machine of its own.

    Returns:
        Environment to spread, without the environments of machines of which nothing is known.
    """
    off: dict[str, list[float]] = defaultdict(list)
    degrees: dict[str, int] = defaultdict(int)
    environments = dict(machines)
    for group in groups:
        environment_id = group[0].environment_id
        machine = environments.setdefault(environment_id, environment_id)
        found, more = ([], 0) if is_disturbed(group) else _deviations(group)
        off[machine] += found
        degrees[machine] += more
    known = {machine: ProcessSpread(tuple(sorted(found)), degrees[machine]) for machine, found in off.items() if found}
    return {key: known[machine] for key, machine in environments.items() if machine in known}


def seen_spreads(*archives: Archive) -> dict[str, ProcessSpread]:
    """Return what archives tell of the spread of processes, for those of their cells that one process measured.

    All cells are asked, wanted or not, so that a choice of cells changes no verdict.

    Raises:
        StoreError: if a line is damaged.
    """
    cells = [(archive, cell) for archive in archives for cell in archive.places()]
    several = [cell for archive, cell in cells if archive.processes(cell.where) > 1]
    if len(several) == len(cells):
        return {}
    machines = {key: device_name(found) for archive in archives for key, found in archive.environments.items()}
    # What is damaged is told where the cells are ranked.
    return spreads_by_machine(read_cells(several, Damage()), machines)
