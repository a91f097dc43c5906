"""Cells of invented noise, judged by the functions that judge records: how often is an equal competitor named?

    python -m bench.tests.simulated_cells [CELLS]

prints the tables of the README of this package, whose figures are of 1,000 cells each. A cell has a baseline, its A/A
control and 18 competitors, as many as a cell of the preset `seed`; each round is timed in shuffled order and then in
reverse. Half of the competitors are of the baseline's framework.
"""

import math
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bench.study.frameworks import framework_ratio
from bench.study.pairing import Rounds, paired
from bench.study.process_spread import NOTHING_SEEN, ProcessSpread, deviations
from bench.study.statistics import CONFIDENCE, FASTER, SAME, SLOWER, UNRESOLVED, resolution
from bench.study.trimming import trimmed_mean
from bench.study.verdicts import CONTROL, Measured, measure
from bench.study.winners import leaders

COMPETITORS = 18
ROUNDS = (5, 10, 20, 40)
GAUSSIAN, OFFSETS, FACTOR = (
    "gaussian, 3%",
    "gaussian, and processes off by 3%",
    "a factor of 1 to 3 that a framework shares",
)
RANDOM_WALK = "random walk of the machine, 3% a block"
DISTRIBUTIONS: tuple[str, ...] = (
    GAUSSIAN,
    "gaussian, 1% to 10% by competitor",
    "lognormal, sigma 0.3",
    "lognormal, sigma 1",
    "lognormal, sigma 2",
    "bimodal, 9 us or 16 ms",
    "one-sided stalls in a tenth of the blocks",
    "drift of the machine to 1.6 times",
    RANDOM_WALK,
    OFFSETS,
    FACTOR,
)
# Processes that were seen to agree: the single process is then limited by its rounds alone.
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
    elif distribution.startswith("gaussian, 1%"):
        scale = np.exp(rng.uniform(math.log(0.01), math.log(0.1), count)) / 0.03
        scale[1] = scale[0]
        noise *= scale
    elif distribution.startswith("bimodal"):
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


Shares = dict[str, float]


def shares(
    distribution: str,
    processes: int,
    rounds: int,
    cells: int,
    *,
    faster: float = 1.0,
    wanted: Sequence[str] = (FASTER, SLOWER),
) -> Shares:
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
        spreads = {"alike": ALIKE, "learned": learned(distribution, rounds), "unknown": NOTHING_SEEN}
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


def firsts(distribution: str, processes: int, rounds: int, cells: int, seen: ProcessSpread) -> tuple[float, float]:
    """Return in which share of cells of equals a winner is named, and a framework."""
    rng = _generator(distribution, processes, rounds)
    winners = frameworks = 0
    for _ in range(cells):
        logs = simulated(rng, distribution, processes, rounds)
        floor = measured(logs).floor
        ranked = sorted((0, *range(2, len(logs))), key=lambda k: float(trimmed_mean(logs[k] - logs[0]).mean()))
        competitors = {str(k): _rounds(logs[k]) for k in ranked}
        winners += len(leaders(competitors, floor, seen=seen)) == 1
        sides: dict[str, dict[str, Rounds]] = {"torch": {}, "jax": {}}
        for label, rounds_ in competitors.items():
            sides["torch" if int(label) < 2 + COMPETITORS // 2 else "jax"][label] = rounds_
        ratio = framework_ratio(sides, floor, confidence=CONFIDENCE, seen=seen)
        frameworks += ratio is not None and ratio.verdict in (FASTER, SLOWER)
    return winners / cells, frameworks / cells


# Caption, kind of noise to rule to its shares, one for each number of rounds.
Table = tuple[str, dict[str, dict[str, list[float]]]]


def _table(caption: str, rows: Mapping[str, Mapping[str, object]], processes: int, cells: int) -> Table:
    found: dict[str, dict[str, list[float]]] = {}
    for name, options in rows.items():
        noise = str(options.get("distribution", name))
        rest = {key: value for key, value in options.items() if key != "distribution"}
        for rounds in ROUNDS:
            for rule, share in shares(noise, processes, rounds, cells, **rest).items():  # pyright: ignore
                found.setdefault(name, {}).setdefault(rule, []).append(share)
    return caption, found


def tables(cells: int) -> Iterator[Table]:
    """Simulate all, a table at a time."""
    powers = {
        "truly 3% faster, gaussian, 3%": {"distribution": GAUSSIAN, "faster": 1.03, "wanted": (FASTER,)},
        "truly 10 times as fast, lognormal, sigma 1": {
            "distribution": "lognormal, sigma 1",
            "faster": 10.0,
            "wanted": (FASTER,),
        },
    }
    equal = {name: {} for name in DISTRIBUTIONS}
    different = {name: {"faster": 1.05, "wanted": (SAME,)} for name in DISTRIBUTIONS if name != FACTOR}
    for processes, who in ((1, "one process"), (5, "five processes")):
        yield _table(f"An equal competitor is called FASTER or SLOWER, {who}", equal, processes, cells)
        yield _table(f"A faster competitor is called FASTER, {who}", powers, processes, cells)
        yield _table(f"A competitor that is 5% faster is called SAME, {who}", different, processes, cells)


def markdown(table: Table) -> str:
    """Return a table as Markdown: percent of the cells, at 5, 10, 20 and 40 rounds."""
    caption, rows = table
    rules = list(next(iter(rows.values())))
    lines = [f"{caption}:", "", "| noise | " + " | ".join(rules) + " |", "|---|" + "---|" * len(rules)]
    for name, found in rows.items():
        cells = (" / ".join(f"{100 * share:.1f}" for share in found[rule]) for rule in rules)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for shown in tables(int(sys.argv[1]) if len(sys.argv) > 1 else 1000):
        print(markdown(shown), flush=True)
