"""Cells of invented noise, judged by the functions that judge records: how often is an equal competitor named?

    python -m bench.tests.simulated_cells [CELLS]

prints the tables of `simulated_cells.md`, whose figures are of 1,000 cells each. A cell has a baseline, its A/A
control and 18 competitors, as many as a cell of the preset `seed`; each round is timed in shuffled order and then in
reverse. Half of the competitors are of the baseline's framework.
"""

import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from bench.study.cells import Rounds, paired
from bench.study.process_spread import NOTHING_SEEN, ProcessSpread, deviations
from bench.study.statistics import CONFIDENCE, FASTER, SAME, SLOWER, UNRESOLVED, resolution
from bench.study.verdicts import CONTROL, Measured, framework_ratio, leaders, measure
from bench.tests.in_memory import trimmed_mean

COMPETITORS = 18
ROUNDS = (5, 10, 20, 40)
GAUSSIAN, MIXED, LOGNORMAL = "gaussian, 3%", "gaussian, 1% to 10% by competitor", "lognormal, sigma 1"
BIMODAL, RANDOM_WALK = "bimodal, 9 us or 16 ms", "random walk of the machine, 3% a block"
OFFSETS, FACTOR = "gaussian, and processes off by 3%", "a factor of 1 to 3 that a framework shares"
DISTRIBUTIONS: tuple[str, ...] = (
    GAUSSIAN,
    MIXED,
    "lognormal, sigma 0.3",
    LOGNORMAL,
    "lognormal, sigma 2",
    BIMODAL,
    "one-sided stalls in a tenth of the blocks",
    "drift of the machine to 1.6 times",
    RANDOM_WALK,
    OFFSETS,
    FACTOR,
)
# By what is known of the spread of processes, a single process has three rules.
ALIKE_, SEEN, UNSEEN = "after, processes alike", "after, 20 cells of five processes seen", "after, none seen"
# Processes that were seen to agree: a single one is then limited by its rounds alone.
ALIKE = ProcessSpread((0.0,) * 10_000, 4)


def _places(rng: np.random.Generator, processes: int, rounds: int, count: int) -> np.ndarray:
    """Return when each block runs: shape (processes, rounds, 2, count), numbered within a process."""
    ranks = np.argsort(rng.random((processes, rounds, count)), axis=-1)
    return np.stack([ranks, 2 * count - 1 - ranks], axis=2) + 2 * count * np.arange(rounds)[None, :, None, None]


def simulated(
    rng: np.random.Generator, distribution: str, processes: int, rounds: int, competitors: int = COMPETITORS
) -> np.ndarray:
    """Return mean log seconds of each round of equal competitors: shape (2 + competitors, processes, rounds).

    The baseline comes first, then its control, which runs in the same process and shares its offset.
    """
    count = competitors + 2
    shape = (processes, rounds, 2, count)
    noise, places = 0.03 * rng.standard_normal(shape), _places(rng, processes, rounds, count)
    if distribution.startswith("lognormal"):
        noise *= float(distribution.split("sigma ")[1]) / 0.03
    elif distribution == MIXED:
        scale = np.exp(rng.uniform(math.log(0.01), math.log(0.1), count)) / 0.03
        scale[1] = scale[0]
        noise *= scale
    elif distribution == BIMODAL:
        noise += math.log(16e-3 / 9e-6) * (rng.random(shape) < 0.5)
    elif distribution.startswith("one-sided"):
        noise += (rng.random(shape) < 0.1) * rng.exponential(1.0, shape)
    elif distribution.startswith("drift"):
        # Not linear: the reverse order alone would cancel that.
        noise += 0.5 * (places / (2 * count * rounds)) ** 2
    elif distribution == RANDOM_WALK:
        walk = np.cumsum(0.03 * rng.standard_normal((processes, 2 * count * rounds)), axis=1)
        noise += np.take_along_axis(walk, places.reshape(processes, -1), axis=1).reshape(shape)
    logs = noise.mean(2)
    if distribution == OFFSETS:
        offsets = 0.03 * rng.standard_normal((processes, 1, count))
        offsets[..., 1] = offsets[..., 0]
        logs += offsets
    elif distribution == FACTOR:
        logs[..., 2 + competitors // 2 :] += math.log(rng.uniform(1, 3))
    return np.moveaxis(logs, -1, 0)


def _rounds(logs: np.ndarray) -> Rounds:
    return dict(enumerate(logs))


def measured(logs: np.ndarray) -> Measured:
    """Return what a cell's rounds say of its ratios, as a ranking sees them."""
    others = {CONTROL: _rounds(logs[1])} | {label: _rounds(logs[int(label)]) for label in _labels(logs)}
    return measure(paired(_rounds(logs[0]), others), CONFIDENCE)


def _labels(logs: np.ndarray) -> list[str]:
    return [str(k) for k in range(2, len(logs))]


def before(found: Measured, processes: int) -> list[str]:
    """Return verdicts by the rule of earlier releases: estimates against the floor, each competitor for itself."""
    assert found.control is not None
    floor, same = resolution(found.control), math.log(1.02)
    floor = floor if processes > 1 else max(floor, same)
    said = []
    for interval in found.intervals.values():
        low, high, middle = (math.log(end) for end in (interval.low, interval.high, interval.ratio))
        if low >= -same and high <= same:
            said.append(SAME)
        else:
            said.append(
                FASTER if low > 0 and middle > floor else SLOWER if high < 0 and -middle > floor else UNRESOLVED
            )
    return said


def learned(distribution: str, rounds: int, cells: int = 20) -> ProcessSpread:
    """Return what other cells of five processes tell of the spread of processes."""
    rng = _generator("learned", distribution, rounds)
    off: list[float] = []
    for _ in range(cells):
        logs = simulated(rng, distribution, 5, rounds)
        off += deviations(_rounds(logs[0]), {label: _rounds(logs[int(label)]) for label in _labels(logs)})[0]
    return ProcessSpread(tuple(sorted(off)), 4 * cells)


def _generator(*what: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(what).encode()))


def shares(
    distribution: str,
    processes: int,
    rounds: int,
    cells: int,
    *,
    faster: float = 1.0,
    wanted: Sequence[str] = (FASTER, SLOWER),
) -> dict[str, float]:
    """Return in which share of cells a verdict is given, by rule.

    Args:
        distribution: of the noise.
        processes: 1 or several.
        rounds: of each process.
        cells: how many to simulate.
        faster: how many times as fast as the baseline one competitor truly is; the others are equal.
        wanted: verdicts that count: on any competitor, or on the one that is faster, if there is one.
    """
    rng = _generator(distribution, processes, rounds)
    spreads = {"after": NOTHING_SEEN}
    if processes == 1:
        spreads = {ALIKE_: ALIKE, SEEN: learned(distribution, rounds), UNSEEN: NOTHING_SEEN}
    counts = dict.fromkeys(("before", *spreads), 0)
    for _ in range(cells):
        logs = simulated(rng, distribution, processes, rounds)
        logs[2] -= math.log(faster)
        found = measured(logs)
        labels = _labels(logs)
        said = {"before": before(found, processes)}
        for name, seen in spreads.items():
            said[name] = list(found.verdicts(labels, seen.reach(len(labels))).values())
        for name, verdicts in said.items():
            counts[name] += any(one in wanted for one in (verdicts if faster == 1 else verdicts[:1]))
    return {name: count / cells for name, count in counts.items()}


def firsts(distribution: str, processes: int, rounds: int, cells: int) -> dict[str, float]:
    """Return in which share of cells of equals a winner is named, and one of two frameworks."""
    rng = _generator(distribution, processes, rounds)
    winners = frameworks = 0
    for _ in range(cells):
        logs = simulated(rng, distribution, processes, rounds)
        floor = measured(logs).floor
        ranked = sorted((0, *range(2, len(logs))), key=lambda k: float(trimmed_mean(logs[k] - logs[0]).mean()))
        competitors = {str(k): _rounds(logs[k]) for k in ranked}
        winners += len(leaders(competitors, floor, seen=NOTHING_SEEN)) == 1
        sides: dict[str, dict[str, Rounds]] = {"torch": {}, "jax": {}}
        for label, found in competitors.items():
            sides["torch" if int(label) < 2 + COMPETITORS // 2 else "jax"][label] = found
        ratio = framework_ratio(sides, floor, confidence=CONFIDENCE, seen=NOTHING_SEEN)
        frameworks += ratio is not None and ratio.verdict in (FASTER, SLOWER)
    return {"a winner": winners / cells, "a framework": frameworks / cells}


@dataclass(frozen=True)
class Table:
    """Shares of cells.

    Attributes:
        caption: what happens in them.
        rounds: for which numbers of rounds, in the order of the shares.
        rows: noise to rule to its shares.
    """

    caption: str
    rounds: tuple[int, ...]
    rows: dict[str, dict[str, list[float]]]


def _table(
    caption: str, rows: Mapping[str, Callable[[int], dict[str, float]]], rounds: tuple[int, ...] = ROUNDS
) -> Table:
    found: dict[str, dict[str, list[float]]] = {}
    for name, simulate in rows.items():
        for count in rounds:
            for rule, share in simulate(count).items():
                found.setdefault(name, {}).setdefault(rule, []).append(share)
    return Table(caption, rounds, found)


def tables(cells: int) -> Iterator[Table]:
    """Simulate all, a table at a time."""
    for processes, who in ((1, "one process"), (5, "five processes")):
        yield _table(
            f"Of equal competitors any is called FASTER or SLOWER, {who}",
            {name: partial(shares, name, processes, cells=cells) for name in DISTRIBUTIONS},
        )
        yield _table(
            f"A faster competitor is called FASTER, {who}",
            {
                "truly 3% faster, gaussian, 3%": partial(
                    shares, GAUSSIAN, processes, cells=cells, faster=1.03, wanted=(FASTER,)
                ),
                "truly 10 times as fast, lognormal, sigma 1": partial(
                    shares, LOGNORMAL, processes, cells=cells, faster=10.0, wanted=(FASTER,)
                ),
            },
        )
        yield _table(
            f"A competitor that is 5% faster is called SAME, {who}",
            {
                name: partial(shares, name, processes, cells=cells, faster=1.05, wanted=(SAME,))
                for name in (GAUSSIAN, "lognormal, sigma 0.3", BIMODAL, RANDOM_WALK, OFFSETS)
            },
            (10, 40),
        )
        yield _table(
            f"Of equal competitors one is called the winner, or one of two frameworks faster, {who}",
            {name: partial(firsts, name, processes, cells=cells) for name in (GAUSSIAN, LOGNORMAL, OFFSETS)},
            (10,),
        )


def markdown(table: Table) -> str:
    """Return a table as Markdown, in percent of the cells."""
    rules = list(next(iter(table.rows.values())))
    at = " / ".join(map(str, table.rounds))
    lines = [f"{table.caption}; in percent of the cells, at {at} rounds:", ""]
    lines += ["| noise | " + " | ".join(rules) + " |", "|---|" + "---|" * len(rules)]
    for name, found in table.rows.items():
        cells = (" / ".join(f"{100 * share:.1f}" for share in found[rule]) for rule in rules)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for shown in tables(int(sys.argv[1]) if len(sys.argv) > 1 else 1000):
        print(markdown(shown), flush=True)
