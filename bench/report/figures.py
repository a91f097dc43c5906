"""Describe pictures: the figures of each competitor in each cell, and which of them lie on which axis.

The script of the page and the library that draws files show the same rows by the same descriptions.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.environments import device_name
from bench.plan.competitors import YARDSTICK
from bench.plan.workloads import size_text, weights_of
from bench.report.tables import verdict_text
from bench.report.text import calls, outcome
from bench.study.cells import DISTURBED, identity
from bench.study.ranking import Efficiency, Ranking, Row, efficiencies
from bench.study.results import Results
from parity_tests.judge.dtypes import short_name
from parity_tests.report.text import printable

# What a page can be narrowed by; the first three and the last of a competitor and a cell, the others of a cell.
FILTERS: tuple[str, ...] = ("framework", "implementation", "mode", "precision", "direction", "division", "workload")
# Cells of different values of these are never in one panel.
PANEL: tuple[str, ...] = ("direction", "optimizer", "precision", "division", "cache", "machine")
LEADS, BEST, BEHIND, _NO_SPEED = "leads", "best of its framework", "behind", "no speed"
# A page of more competitors takes too long to load: those behind the best of their framework are left out.
MOST_ROWS = 60_000
_MOST_CHARACTERS = 90  # of a kernel's name; some are whole templates


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis."""

    column: str
    title: str  # with the unit
    unit: str = ""  # of the numbers along it


@dataclass(frozen=True)
class Picture:
    """What one picture shows: points over two axes, or with marks the figures of each competitor in a line."""

    name: str  # of its file, and of its element on the page
    title: str
    x: Axis  # rows without it are left out, and those without y
    y: Axis | None = None
    low: str | None = None  # columns of the ends of the interval of y
    high: str | None = None
    joined: tuple[str, ...] = ()  # columns; points that agree in them are joined by a line
    label: str | None = None  # column that labels the points of the leaders
    roofs: tuple[Mapping[str, Any], ...] = ()  # lines above the points, of a machine and precision each
    marks: Mapping[str, str] = field(default_factory=dict)  # column to what it is; all in the unit of x
    note: str | None = None  # column of text at the end of a line of marks
    every: bool = False  # True for every competitor, not only the fastest of each framework


@dataclass(frozen=True)
class Figures:
    """Rows of figures, and what is shown of them at first."""

    cells: list[dict[str, Any]]
    rows: list[dict[str, Any]]  # of the competitors; `cell` is the place of their cell
    chosen: dict[str, str]  # filter to its value at first; the others show everything
    left_out: int  # number of competitors behind others, in a page that would be too large

    def having(self, picture: Picture) -> Iterator[dict[str, Any]]:
        """Yield the rows that have what a picture shows, with the columns of their cells."""
        needed = (picture.x.column, *((picture.y.column,) if picture.y else ()))
        for row in self.rows:
            cell = self.cells[row["cell"]]
            if all(row.get(name, cell.get(name)) is not None for name in needed):
                yield {**cell, **row}

    def shown(self, picture: Picture) -> list[dict[str, Any]]:
        """Return those rows that it shows at first."""
        return [
            row
            for row in self.having(picture)
            if all(row[name] == value for name, value in self.chosen.items())
            and (picture.every or row["place"] in (LEADS, BEST))
        ]


def _digits(value: float | None) -> float | None:
    """Return a figure with five digits: a page of all of them holds twice as much."""
    return None if value is None or value != value or abs(value) == float("inf") else float(f"{value:.5g}")


def leader_text(ranking: Ranking) -> str:
    """Name the fastest competitor of a cell, or all that tie."""
    if ranking.disturbed:
        return "disturbed: no verdict"
    if ranking.winner is not None:
        return ranking.winner
    if not ranking.tied:
        return "nothing was timed"
    tied = ranking.tied
    return f"only {tied[0]}" if len(tied) == 1 else f"tie of {len(tied)}: {', '.join(tied)}"


def cell_figures(ranking: Ranking, machine: str) -> dict[str, Any]:
    """Return the conditions of a cell, and who leads it."""
    first, where = ranking.first, identity(ranking.first)
    leading = {row.record.framework for row in ranking.rows if row.record.label in ranking.leaders}
    between = [verdict_text(found) for found in ranking.framework_ratios.values() if found.interval is not None]
    timed = {row.record.framework for row in ranking.rows if row.rank is not None}
    if not between and len(timed) == 1:
        # A winner over one's own kin is no winner over the other framework.
        between = [f"only {next(iter(timed))} was timed"]
    return {
        "workload": first.workload,
        "sizes": where.sizes,
        "batch": first.batch,
        "num_partitions": first.num_partitions,
        "in_features": size_text(first.in_features),
        "out_features": size_text(first.out_features),
        # Of unequal partitions those of the average one.
        "weights": weights_of(first.num_partitions, first.in_features, first.out_features) // first.num_partitions,
        "direction": where.direction,
        "optimizer": where.optimizer,
        "precision": short_name(where.precision),
        "division": where.division,
        "cache": where.cache,
        "layout": where.layout,
        "machine": machine,
        "environment_id": first.environment_id,
        "cell_hash": ranking.cell,
        "leaders": leader_text(ranking),
        # How the square of a matrix is drawn.
        "lead": " ".join(["tie" if len(ranking.tied) > 1 else "win", *sorted(leading)]) if leading else "none",
        "frameworks": "; ".join(between),
        "aa_half_width": _digits(ranking.half_width),
        "process_replicates": ranking.replicates,
        "disturbed": DISTURBED if ranking.disturbed else None,
    }


def _competitor(ranking: Ranking, row: Row, found: Efficiency, best: set[str | None]) -> dict[str, Any]:
    r, interval, speed = row.record, row.interval, found.flops_per_s
    place = LEADS if r.label in ranking.leaders else BEST if r.label in best else BEHIND
    ends = [None, None]
    if speed is not None and interval is not None and interval.ratio > 0:
        # The interval is of the ratio to the baseline, and drawn at the competitor's own speed.
        ends = [speed * end / interval.ratio for end in (interval.low, interval.high)]
    after = found.payback_calls
    pays = "" if after is None else "never pays" if math.isinf(after) else f"pays after {calls(after)}"
    values = {
        "flops_per_s": speed,
        "speed_low": ends[0],
        "speed_high": ends[1],
        "intensity": r.useful_flops / r.compulsory_bytes,
        "latency_s": row.latency_s,
        "ratio": interval and interval.ratio,
        "ratio_low": interval and interval.low,
        "ratio_high": interval and interval.high,
        "enqueue_s": r.enqueue_s,
        "waited_s": row.waited_s,
        "device_busy_s": r.device_busy_s,
        "compile_s": r.compile_s,
        "compile_warm_s": r.compile_warm_s,
        "energy_j": r.energy_j,
        "bound_fraction": r.bound_fraction,
        "ceiling_fraction": found.ceiling_fraction,
        "waste_factor": found.waste_factor,
        "copied_bytes": found.copied_bytes,
    }
    kernels = "; ".join(f"{count} x {name[:_MOST_CHARACTERS]}" for name, count in r.kernels.items())
    return {
        "label": r.label,
        "framework": r.framework,
        "implementation": r.implementation,
        "mode": r.mode,
        "kind": r.kind,
        "status": outcome(r),
        "reason": r.reason,
        "place": YARDSTICK if r.kind == YARDSTICK else place if row.rank else _NO_SPEED,
        "rank": row.rank,
        "verdict": row.verdict or None,
        **{name: _digits(value) for name, value in values.items()},
        "pays": pays or None,
        "kernels_per_call": found.kernels_per_call,
        "launches": None if found.kernels_per_call is None else f"kernels: {found.kernels_per_call}",
        "kernels": kernels or None,
        "peak_memory_bytes": r.peak_memory_bytes,
        "compulsory_bytes": r.compulsory_bytes,
        "observed_precision": r.observed_precision and short_name(r.observed_precision),
        "key": r.key,
    }


def _competitors(results: Results) -> Iterator[dict[str, Any]]:
    for k, ranking in enumerate(results.found):
        rates = efficiencies(ranking)
        best = {label for found in ranking.framework_ratios.values() for label in (found.torch, found.jax)}
        for row in ranking.rows:
            yield {"cell": k, **_competitor(ranking, row, rates[row.record.label], best)}


def _chosen(cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what is shown at first: the matched division and full precision, or what was measured most."""
    chosen = {}
    for name, wanted in (("division", "matched"), ("precision", "fp32")):
        counts = Counter(str(cell[name]) for cell in cells if all(cell[k] == v for k, v in chosen.items()))
        if len(counts) > 1:
            chosen[name] = wanted if wanted in counts else counts.most_common(1)[0][0]
    return chosen


def machine_names(results: Results) -> dict[str, str]:
    """Return environment to the name of its machine, numbered where there are several."""
    known = {
        name: printable(device_name(results.environments[name]))
        for name in results.places()
        if name in results.environments
    }
    numbers = {machine: k for k, machine in enumerate(dict.fromkeys(known.values()), start=1)}
    return {
        name: f"machine {numbers[machine]}: {machine}" if len(numbers) > 1 else machine
        for name, machine in known.items()
    }


def _place_in_matrix(cells: Sequence[dict[str, Any]]) -> None:
    """Give each cell the line and the column that it has in a matrix of workloads and conditions."""
    differing = [name for name in PANEL if len({cell[name] for cell in cells}) > 1] or ["direction"]
    taken = set[tuple[str, str]]()
    for cell in cells:
        values = (str(cell[name]).split(": ")[0] if name == "machine" else cell[name] for name in differing)
        column = ", ".join(str(value) for value in values if value is not None)
        line, again = f"{cell['workload']} {cell['sizes']} {cell['layout']}", 1
        # What was measured twice under the same conditions has a line for each.
        while (line, column) in taken:
            line, again = f"{line} {again}", again + 1
        taken.add((line, column))
        cell |= {"line": line, "column": column}


def figures(results: Results) -> Figures:
    """Return the figures of all cells."""
    machines = machine_names(results)
    cells = [cell_figures(one, machines.get(one.first.environment_id, "unknown machine")) for one in results.found]
    _place_in_matrix(cells)
    everything = sum(len(ranking.rows) for ranking in results.found)
    kept = (LEADS, BEST) if everything > MOST_ROWS else (LEADS, BEST, BEHIND, YARDSTICK, _NO_SPEED)
    rows = [row for row in _competitors(results) if row["place"] in kept]
    return Figures(cells, rows, _chosen(cells), everything - len(rows))


# --- what the pictures show ---

_RATE = Axis("flops_per_s", "useful FLOP/s")
_SECONDS = "time (s)"


def speed_pictures() -> list[Picture]:
    """Return speed against batch, partitions and size, with intervals."""
    sizes = {
        "batch": "batch (rows of a partition)",
        "num_partitions": "n (partitions)",
        "weights": "size (weights of a partition, in x out)",
    }
    fixed = ("label", "batch", "num_partitions", "in_features", "out_features", "layout", *PANEL)
    varying = {"weights": ("in_features", "out_features")}
    return [
        Picture(
            name=f"speed-{name.replace('_', '-')}",
            title=f"Speed against {title.partition(' (')[0]}",
            x=Axis(name, title),
            y=_RATE,
            low="speed_low",
            high="speed_high",
            joined=tuple(column for column in fixed if column not in varying.get(name, (name,))),
        )
        for name, title in sizes.items()
    ]


_ROOFS = (
    ("measured", "ceiling_flops_per_s", "ceiling_bytes_per_s"),
    ("data sheet", "peak_flops_per_s", "peak_bytes_per_s"),
)


def roofs(found: Sequence[Ranking], low: float, high: float, panels: Sequence[Hashable]) -> list[dict[str, Any]]:
    """Return the lines of each panel between two intensities: the highest ceiling seen, and the data sheet's.

    Args:
        found: rankings.
        low: least intensity.
        high: largest intensity.
        panels: of each ranking.
    """
    lines = []
    for panel in dict.fromkeys(panels):
        # A cell's first record may be of a competitor that never ran, so every row is asked.
        here = (ranking for ranking, its in zip(found, panels, strict=True) if its == panel)
        records = [row.record for ranking in here for row in ranking.rows]
        for name, flops, memory in _ROOFS:
            work = max((getattr(r, flops) or 0.0 for r in records), default=0.0)
            bytes_ = max((getattr(r, memory) or 0.0 for r in records), default=0.0)
            if not work or not bytes_:
                continue
            ridge = min(max(work / bytes_, low), high)
            lines += [
                {"panel": panel, "roof": name, "intensity": x, "flops_per_s": min(work, x * bytes_)}
                for x in (low, ridge, high)
            ]
    return lines


def roofline_picture(found: Sequence[Ranking], shown: Figures) -> Picture:
    """Return useful work a second against useful work a byte, below the roofs of each machine and precision."""
    places = [(cell["machine"], cell["precision"]) for cell in shown.cells]
    known = [row["intensity"] for row in shown.rows if row["flops_per_s"] is not None]
    lines = roofs(found, min(known) / 2, max(known) * 2, places) if known else []
    joined = [
        {
            "machine": corner[0]["panel"][0],
            "precision": corner[0]["panel"][1],
            "roof": corner[0]["roof"],
            "at": [[_digits(point["intensity"]), _digits(point["flops_per_s"])] for point in corner],
        }
        for corner in (lines[k : k + 3] for k in range(0, len(lines), 3))
    ]
    x = Axis("intensity", "useful FLOP per compulsory byte")
    return Picture("roofline", "Roofline", x, _RATE, label="workload", roofs=tuple(joined))


def time_picture() -> Picture:
    """Return where the time of a call goes."""
    marks = {
        "enqueue_s": "host, until a call returns",
        "device_busy_s": "device busy",
        "latency_s": "a call among others",
        "waited_s": "one call, waited for",
    }
    return Picture("time", "Where the time goes", Axis("enqueue_s", _SECONDS, "s"), marks=marks, note="launches")


def memory_picture() -> Picture:
    """Return the memory of a call."""
    marks = {"peak_memory_bytes": "peak memory of a call", "compulsory_bytes": "bytes that must move"}
    return Picture(
        "memory", "Memory of a call", Axis("peak_memory_bytes", "memory (bytes)", "B"), marks=marks, every=True
    )


def compile_picture() -> Picture:
    """Return how long compiling takes, and when it pays."""
    marks = {"compile_s": "compile, empty cache", "compile_warm_s": "again, with that cache", "latency_s": "a call"}
    axis = Axis("compile_s", _SECONDS, "s")
    return Picture("compile", "Compile time", axis, marks=marks, note="pays", every=True)
