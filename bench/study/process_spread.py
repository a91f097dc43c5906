"""Learn from all competitors how far processes differ.

Compilers choose anew in every process, and memory lies elsewhere: each process adds an offset of its own to every
ratio. The A/A control shares the baseline's process and does not show these offsets, and no number of rounds averages
them out. A cell of a single process names no competitor within the spread that other cells of the machine show. A few
processes say little about their own scatter, so a variance is drawn towards the usual one.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

import numpy as np

from bench.environments import device_name
from bench.plan.competitors import YARDSTICK
from bench.records import Record
from bench.store import Archive, read_cells
from bench.study.cells import Rounds, Spread, by_label, is_disturbed, log_latencies, paired, spread_of
from bench.study.statistics import CONFIDENCE, student_t_quantile
from parity_tests.judge.variances import Prior, fit_prior

# With fewer competitors, the scatter of their variances is a guess.
LEAST_COMPETITORS = 20
# Standard errors of the variance of the log variances that are added to it.
CAUTION = 1.0
# From here on Student's t is a normal distribution for all that a comparison needs.
MOST_DEGREES = 200.0


@dataclass(frozen=True)
class Scatter:
    """Variance of the mean of one process, about the mean of its run."""

    variance: float  # pooled over both runs
    degrees: float  # its degrees of freedom
    inverse_processes: float  # `1/m_A + 1/m_B`, which makes the variance of a difference of runs of it

    def reach(self, confidence: float) -> float:
        """Return the half width of the interval of the difference of two runs."""
        error = math.sqrt(self.variance * self.inverse_processes)
        return student_t_quantile(0.5 + confidence / 2, self.degrees) * error

    def towards(self, prior: Prior, most_from_others: float = math.inf) -> "Scatter":
        """Draw the variance towards what is usual; others add so many times its own degrees of freedom at most."""
        weight = min(prior.degrees, most_from_others * self.degrees)
        degrees = weight + self.degrees
        variance = (weight * prior.variance + self.degrees * self.variance) / degrees
        return Scatter(variance, min(degrees, MOST_DEGREES), self.inverse_processes)


def pooled(a: Sequence[float], b: Sequence[float]) -> Scatter:
    """Return the common scatter of the processes of two runs, at least two in each.

    Both runs tell of one scatter: it is the machine's and the frameworks', not that of the code which changed.
    """
    degrees = len(a) + len(b) - 2
    squares = sum(float(np.var(values)) * len(values) for values in (a, b))
    return Scatter(squares / degrees, degrees, 1 / len(a) + 1 / len(b))


def apart_from_others(spreads: Mapping[str, Spread]) -> dict[str, dict[int, float]]:
    """Return how far each process is off its competitor's mean, less the median by which it is off for all others.

    Args:
        spreads: the competitors of one cell in one run, by label.

    Returns:
        By label and process, centred on 0; without the competitors of a single process.
    """
    off = {
        label: {k: value - spread.mean for k, value in spread.processes.items()}
        for label, spread in spreads.items()
        if spread.processes
    }
    apart = {}
    for label, own in off.items():
        rest: dict[int, float] = {}
        for k, value in own.items():
            others = [other[k] for name, other in off.items() if name != label and k in other]
            rest[k] = value - (median(others) if others else 0.0)
        center = sum(rest.values()) / len(rest)
        apart[label] = {k: value - center for k, value in rest.items()}
    return apart


def usual(scatters: Sequence[Scatter], least: int = LEAST_COMPETITORS) -> Prior:
    """Return the usual one of several scatters, see `judge.variances`; of no weight if there are fewer than `least`.

    At a level that 1,000 comparisons share out, an interval of 4 degrees of freedom reaches 21 standard errors to
    either side, and one of 8 degrees 8.
    """
    if len(scatters) < least:
        return Prior(0.0, 0.0)
    variances = np.array([scatter.variance for scatter in scatters])
    # A variance of 0 has no logarithm and is an accident of the clock's resolution.
    logs = np.log(np.maximum(variances, max(1e-5 * float(np.median(variances)), 1e-30)))
    return fit_prior(logs, np.array([scatter.degrees for scatter in scatters]), MOST_DEGREES, CAUTION)


# Where nothing is known, processes are taken to differ by up to this, in 95% of all comparisons of two competitors.
GUESS = math.log(1.10)
# How far from the baseline a competitor may be on average for its deviations to count.
NEAR = math.log(1.25)


@dataclass(frozen=True)
class ProcessSpread:
    """The known spread of processes on one machine."""

    # Deviations that were seen, as log ratios without sign, in ascending order; each is that of a process from the mean
    # of all processes of its competitor and cell, times `sqrt(m / (m - 1))` for m processes.
    off: tuple[float, ...] = ()
    # Their degrees of freedom: m - 1 for each cell, since all competitors of a cell share the baseline.
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


def log_seconds(rounds: Rounds, seen: ProcessSpread) -> tuple[float, float]:
    """Return the mean log seconds of a competitor's call, and the half width of its 95% interval."""
    spread = spread_of(rounds)
    off = student_t_quantile(0.975, max(1, spread.degrees)) * spread.error
    return spread.mean, off if spread.processes else math.hypot(off, seen.reach(1))


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
            for spread in block.spreads().values():
                if abs(spread.mean) > NEAR:
                    continue
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
    """Return the spread that cells of several processes show of each environment's machine.

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
    """Return the spread of processes that archives show, for those of their cells that one process measured.

    All cells are asked, wanted or not, so that a choice of cells changes no verdict.

    Raises:
        StoreError: if a line is damaged.
    """
    cells = [cell for archive in archives for cell in archive.places()]
    several = [cell for cell in cells if cell.processes > 1]
    if len(several) == len(cells):
        return {}
    machines = {key: device_name(found) for archive in archives for key, found in archive.environments.items()}
    return spreads_by_machine(read_cells(several), machines)
