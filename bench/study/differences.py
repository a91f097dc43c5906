"""What two runs say about each competitor of a cell that both have, before anything is concluded from it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from bench.plan.competitors import YARDSTICK
from bench.study.identity import Identity
from bench.study.measured_cells import Measured
from bench.study.pairing import Spread
from bench.study.scatter import Prior, Scatter, apart_from_others, pooled, usual
from bench.study.statistics import Interval, student_t_quantile


@dataclass(frozen=True)
class Difference:
    """One competitor in one cell of both runs.

    Attributes:
        where: the conditions.
        label: who.
        framework: whose scatter its own is drawn towards.
        ranked: False for a yardstick.
        spreads: of A and of B.
        estimate: log of the speed in B over that in A.
        shift: median of the other competitors' estimates.
        apart: of A and of B, how far each process is off, apart from what all others of the cell share in it; empty
            where either has one process.
        scatter: of a process, pooled; None where either run has one.
        floors: log ratios below which A and B name nobody in this cell.
    """

    where: Identity
    label: str
    framework: str
    ranked: bool
    spreads: tuple[Spread, Spread]
    estimate: float
    shift: float
    apart: tuple[Mapping[int, float], Mapping[int, float]]
    scatter: Scatter | None
    floors: tuple[float, float]

    def interval(self, priors: Mapping[str, Prior], confidence: float) -> Interval:
        """The ratio of speeds, with the noise of both runs and the shift of the others in its interval."""
        units = min(spread.units for spread in self.spreads)
        noise = math.inf
        if self.scatter is not None:
            noise = math.hypot(priors[self.framework].moderate(self.scatter).reach(confidence), *self.floors)
        elif units > 1:
            quantile = student_t_quantile(0.5 + confidence / 2, min(spread.degrees for spread in self.spreads))
            noise = math.hypot(quantile * math.hypot(*(spread.error for spread in self.spreads)), *self.floors)
        noise += abs(self.shift)
        # Beyond any ratio that could be measured, and still a number.
        ends = (max(self.estimate - noise, -700.0), min(self.estimate + noise, 700.0))
        low, high = (math.exp(ends[0]), math.exp(ends[1])) if math.isfinite(noise) else (0.0, math.inf)
        return Interval(math.exp(self.estimate), low, high, units)


def differences(where: Identity, a: Measured, b: Measured) -> list[Difference]:
    """The competitors of a cell whose speed both runs know, in the order of A's ranking."""
    shared = a.spreads.keys() & b.spreads.keys()
    # Latencies, so that what took longer in A is faster in B.
    estimates = {label: a.spreads[label].mean - b.spreads[label].mean for label in shared}
    apart = [apart_from_others({label: run.spreads[label] for label in shared}) for run in (a, b)]
    found = []
    for row in a.ranking.rows:
        label = row.record.label
        if label in shared:
            others = [value for name, value in estimates.items() if name != label]
            first, second = ({} if any(label not in run for run in apart) else run[label] for run in apart)
            found.append(
                Difference(
                    where=where,
                    label=label,
                    framework=row.record.framework,
                    ranked=row.record.kind != YARDSTICK,
                    spreads=(a.spreads[label], b.spreads[label]),
                    estimate=estimates[label],
                    shift=median(others) if others else 0.0,
                    apart=(first, second),
                    scatter=pooled(list(first.values()), list(second.values())) if first else None,
                    floors=_floors(a, b),
                )
            )
    return found


def ratio_differences(where: Identity, a: Measured, b: Measured) -> list[Difference]:
    """The same of the ratios to the baseline: rounds are paired, so that no shift is in them, and nothing is shared."""
    found = []
    for row in a.ranking.rows:
        label = row.record.label
        if label in a.to_baseline.keys() & b.to_baseline.keys() and label != a.ranking.baseline:
            first, second = a.to_baseline[label], b.to_baseline[label]
            several = first.processes and second.processes
            found.append(
                Difference(
                    where=where,
                    label=label,
                    framework=row.record.framework,
                    ranked=row.record.kind != YARDSTICK,
                    spreads=(first, second),
                    # Of speeds, where latencies are the minuend in A: the ratio in B over the ratio in A.
                    estimate=second.mean - first.mean,
                    shift=0.0,
                    apart=({}, {}),
                    scatter=pooled(list(first.processes.values()), list(second.processes.values()))
                    if several
                    else None,
                    floors=_floors(a, b),
                )
            )
    return found


def _floors(a: Measured, b: Measured) -> tuple[float, float]:
    first, second = (math.inf if run.ranking.resolution is None else run.ranking.resolution for run in (a, b))
    return first, second


def usual_scatter(found: Iterable[Difference]) -> dict[str, Prior]:
    """What scatter is usual in each framework."""
    scatters: dict[str, list[Scatter]] = {}
    for one in found:
        scatters.setdefault(one.framework, []).extend([] if one.scatter is None else [one.scatter])
    return {framework: usual(group) for framework, group in scatters.items()}
