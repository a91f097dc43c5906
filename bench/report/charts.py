"""Draw ratios, the roofline, and maps of winners and of PyTorch against JAX. Needs the `report` extra."""

import math
from collections.abc import Sequence
from typing import Any

from bench.environments import device_name
from bench.plan.competitors import YARDSTICK
from bench.plan.workloads import size_text
from bench.report.figures import roofs
from bench.report.pictures import ChartError
from bench.report.tables import HEADING, Matrix, matrices, verdict_text
from bench.report.text import titles, told_apart
from bench.study.cells import identity
from bench.study.ranking import Ranking, efficiencies
from bench.study.results import Results
from bench.study.statistics import FASTER, SLOWER
from bench.study.verdicts import FrameworkRatio
from parity_tests.judge.dtypes import short_name

# Past this many panels a picture is a wall of stamps; narrow the records instead.
MOST_PANELS = 60
# Four times as fast or more has the full colour: what lies beyond would leave nothing to tell 1.1 from 1.5.
_FULL = 4.0
_DARK = 0.8 * math.log2(_FULL)
_HEIGHT, _WIDTH = 22, 180
# A picture of more rows is too long to read.
MOST_ROWS = 300
_NOTE = (
    "the faster framework of each cell, the fastest competitor of each, with JAX's mode / PyTorch's mode",
    "open: not resolved (JAX's speed over PyTorch's); grey: one framework has no such speed; empty: neither has",
)


# --- ratios and the roofline ---


def _panels(found: Sequence[Ranking]) -> list[str]:
    """Return a panel for each cell: conditions, and where it was measured if two cells have the same."""
    conditions = [identity(ranking.first) for ranking in found]
    short = [f"{where.workload}, {where.step}, {where.how}" for where in conditions]
    placed = [f"{name}, {ranking.first.environment_id[:6]}" for name, ranking in zip(short, found, strict=True)]
    return told_apart(short, placed, [f"{name}, {one.cell}" for name, one in zip(placed, found, strict=True)])


def _points(found: Sequence[Ranking]) -> list[dict[str, Any]]:
    return [
        {
            "panel": panel,
            "baseline": ranking.baseline,
            "competitor": row.record.label + (" *" if row.record.kind == YARDSTICK else ""),
            "framework": row.record.framework,
            "ratio": row.interval.ratio,
            "low": row.interval.low,
            "high": row.interval.high,
            "verdict": row.verdict,
        }
        for ranking, panel in zip(found, _panels(found), strict=True)
        for row in ranking.rows
        # On a logarithmic axis an interval without ends cannot be drawn.
        if row.interval is not None and row.interval.low > 0 and math.isfinite(row.interval.high)
    ]


def ratio_chart(results: Results) -> Any:
    """Return ratios with intervals as an altair object: a panel for each cell, its competitors ordered by ratio.

    Raises:
        ChartError: if no ranking holds an interval.
    """
    import altair as alt

    points = _points(results.found)
    if not points:
        raise ChartError("--chart: there is no ratio with an interval to draw; measure at least two rounds.")
    panels = []
    for panel, baseline in dict.fromkeys((point["panel"], point["baseline"]) for point in points):
        base = alt.Chart(alt.InlineData(values=[point for point in points if point["panel"] == panel])).encode(
            y=alt.Y("competitor:N", sort=alt.EncodingSortField("ratio", order="descending"), title=None),
            color=alt.Color("framework:N", title="framework"),
        )
        scale = alt.Scale(type="log", nice=False, padding=8)
        dots = base.mark_point(filled=True, size=45).encode(
            x=alt.X("ratio:Q", scale=scale, title="speed relative to the baseline (right is faster)"),
            tooltip=[
                alt.Tooltip(f"{name}:{kind}") for name, kind in (("competitor", "N"), ("ratio", "Q"), ("verdict", "N"))
            ],
        )
        bars = base.mark_rule().encode(x=alt.X("low:Q", scale=scale), x2="high:Q")
        one = (
            alt.Chart(alt.InlineData(values=[{"one": 1}])).mark_rule(strokeDash=[4, 3], color="gray").encode(x="one:Q")
        )
        title = alt.Title(panel, subtitle=f"1 is {baseline}")
        panels.append((one + bars + dots).properties(title=title, width=320))
    known = (results.environments.get(name) for name in results.places())
    places = dict.fromkeys(device_name(fingerprint) for fingerprint in known if fingerprint is not None)
    note = alt.Title("; ".join(places), subtitle="* computes another function: a yardstick, not a competitor")
    # Room for labels in a browser whose font is wider than the one that the picture was laid out with.
    padding = {"left": 30, "right": 10, "top": 5, "bottom": 5}
    return alt.concat(*panels, columns=2, title=note, padding=padding).resolve_scale(y="independent", x="shared")


def _roofline_panel(ranking: Ranking) -> str:
    r = ranking.first
    return f"{short_name(r.precision)}, {r.device}, {r.environment_id[:6]}"


def points(found: Sequence[Ranking]) -> list[dict[str, Any]]:
    """Return one point for each ranked competitor of each cell."""
    listed = []
    for ranking, title in zip(found, titles(found), strict=True):
        rates = efficiencies(ranking)
        for row in ranking.rows:
            rate = rates[row.record.label].flops_per_s
            if rate is None or row.record.kind == YARDSTICK:
                continue
            listed.append(
                {
                    "panel": _roofline_panel(ranking),
                    "intensity": row.record.useful_flops / row.record.compulsory_bytes,
                    "flops_per_s": rate,
                    "framework": row.record.framework,
                    "competitor": row.record.label,
                    "cell": title,
                    "place": "leads" if row.leads else "behind",
                }
            )
    return listed


def roofline_chart(results: Results) -> Any:
    """Return useful work a second over useful work a byte as an altair object, a panel for each precision and place.

    Raises:
        ChartError: if nothing was timed.
    """
    import altair as alt

    listed = points(results.found)
    if not listed:
        raise ChartError("--roofline: no competitor was timed, so there is no rate to draw; run the benchmark first.")
    low, high = min(point["intensity"] for point in listed) / 2, max(point["intensity"] for point in listed) * 2
    lines = roofs(results.found, low, high, list(map(_roofline_panel, results.found)))
    x = alt.X("intensity:Q", scale=alt.Scale(type="log"), title="useful operations per compulsory byte")
    y = alt.Y("flops_per_s:Q", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s"), title="useful FLOP/s")
    drawn = []
    for panel in dict.fromkeys(point["panel"] for point in listed):
        dots = (
            alt.Chart(alt.InlineData(values=[point for point in listed if point["panel"] == panel]))
            .mark_point(filled=True, size=35)
            .encode(
                x=x,
                y=y,
                color=alt.Color("framework:N"),
                opacity=alt.Opacity("place:N", scale=alt.Scale(domain=["leads", "behind"], range=[1.0, 0.25])),
                tooltip=[alt.Tooltip("competitor:N"), alt.Tooltip("cell:N"), alt.Tooltip("flops_per_s:Q")],
            )
        )
        above = [line for line in lines if line["panel"] == panel]
        roof = alt.Chart(alt.InlineData(values=above)).mark_line(color="gray").encode(x=x, y=y, strokeDash="roof:N")
        title = panel if above else f"{panel} (no ceiling was measured)"
        drawn.append((roof + dots if above else dots).properties(title=title, width=380, height=280))
    return alt.concat(*drawn, columns=2)


# --- maps ---


def squares(found: Sequence[Ranking]) -> list[dict[str, Any]]:
    """Return one square for each cell in which a competitor was timed: its place, its leader, and how many tie."""
    points = []
    for ranking in found:
        if not ranking.leaders:
            continue
        r = ranking.first
        points.append(
            {
                "panel": f"{size_text(r.in_features)}->{size_text(r.out_features)}, {r.layout}, {identity(r).step}, "
                f"{identity(r).how}, "
                f"{r.device}, {r.environment_id[:6]}",
                "batch": r.batch,
                "num_partitions": r.num_partitions,
                "leader": ranking.leaders[0],
                "outcome": "winner" if ranking.winner else "tie",
                # The number of competitors that cannot be told from the leader, itself included.
                "mark": "" if ranking.winner else f"={len(ranking.leaders)}",
                "leaders": ", ".join(ranking.leaders),
            }
        )
    return points


def winner_map(results: Results) -> Any:
    """Return winners as an altair object, ties as ties: batch to the right, partitions upwards, a panel a condition.

    Raises:
        ChartError: if nothing was timed, or there are more panels than anybody can read.
    """
    import altair as alt

    points = squares(results.found)
    panels = list(dict.fromkeys(point["panel"] for point in points))
    if not points:
        raise ChartError(
            "--winner-map: no competitor was timed, so there is no winner to draw; run the benchmark first."
        )
    if len(panels) > MOST_PANELS:
        raise ChartError(
            f"--winner-map: expected at most {MOST_PANELS} combinations of sizes and conditions, got {len(panels)}; "
            "choose some of them with --where."
        )
    names = sorted({point["leader"] for point in points})
    legend = alt.Legend(labelLimit=320)
    drawn = []
    for panel in panels:
        base = alt.Chart(alt.InlineData(values=[point for point in points if point["panel"] == panel])).encode(
            x=alt.X("batch:O", title="batch"),
            y=alt.Y("num_partitions:O", sort="descending", title="partitions"),
        )
        rectangles = base.mark_rect(stroke="white").encode(
            color=alt.Color("leader:N", scale=alt.Scale(domain=names), title="fastest", legend=legend),
            opacity=alt.Opacity(
                "outcome:N", scale=alt.Scale(domain=["winner", "tie"], range=[1.0, 0.4]), title="pale where several tie"
            ),
            tooltip=[alt.Tooltip(f"{name}:N") for name in ("leaders", "outcome", "batch", "num_partitions")],
        )
        drawn.append((rectangles + base.mark_text(fontSize=10).encode(text="mark:N")).properties(title=panel))
    note = "=k: k competitors tie for the first place (Holm-corrected); the colour is that of the first in the ranking"
    return alt.concat(*drawn, columns=3, title=note)


def shade(found: FrameworkRatio) -> float:
    """Return the binary logarithm of JAX's speed over PyTorch's; 0 where neither was shown to be faster."""
    if found.interval is None or found.verdict not in (FASTER, SLOWER):
        return 0.0
    return math.log2(min(max(found.interval.ratio, 1 / _FULL), _FULL))


def framework_squares(matrix: Matrix) -> list[dict[str, Any]]:
    """Return one square for each cell of a device."""
    return [
        {
            "workload": row,
            "conditions": column,
            "shade": shade(ratio),
            "text": verdict_text(ratio),
            "torch": ratio.torch or "no speed",
            "jax": ratio.jax or "no speed",
            "interval": "" if ratio.interval is None else f"{ratio.interval.low:.3g} to {ratio.interval.high:.3g}",
            "alone": ratio.interval is None,
        }
        for (row, column), (_, ratio) in matrix.places.items()
    ]


def framework_map(results: Results) -> Any:
    """Return PyTorch against JAX as an altair object: a panel for each device, a square for each cell.

    Raises:
        ChartError: if no cell has both frameworks, or there are more rows than anybody can read.
    """
    import altair as alt

    found = matrices(results)
    if not found:
        raise ChartError("--framework-map: no cell has a speed of both frameworks; measure both first.")
    rows = sum(len(matrix.rows) for matrix in found)
    if rows > MOST_ROWS:
        raise ChartError(
            f"--framework-map: expected at most {MOST_ROWS} workloads and directions, got {rows}; choose some of them "
            "with --where."
        )
    limit = math.log2(_FULL)
    colour = alt.Color(
        "shade:Q",
        # Told apart by the colour-blind as well; white where neither is faster.
        scale=alt.Scale(scheme="purpleorange", domain=[limit, -limit]),
        legend=alt.Legend(
            title="faster",
            values=[limit, 1, 0, -1, -limit],
            labelExpr="datum.value == 0 ? 'neither' : "
            "(datum.value > 0 ? 'JAX ' : 'torch ') + pow(2, abs(datum.value)) + 'x'",
        ),
    )
    # A square that lacks a side is no tie.
    fill = alt.condition("datum.alone", alt.value("lightgray"), colour)
    # Black on the darkest squares would be hard to read.
    ink = alt.condition(f"abs(datum.shade) > {_DARK}", alt.value("white"), alt.value("black"))
    panels = []
    for matrix in found:
        base = alt.Chart(alt.InlineData(values=framework_squares(matrix))).encode(
            x=alt.X("conditions:N", sort=matrix.columns, title=None, axis=alt.Axis(orient="top", labelAngle=0)),
            y=alt.Y("workload:N", sort=matrix.rows, title=None, axis=alt.Axis(labelLimit=460)),
        )
        tooltip = [alt.Tooltip(f"{name}:N") for name in ("torch", "jax", "interval")]
        panels.append(
            (
                base.mark_rect(stroke="lightgray").encode(color=fill, tooltip=tooltip)
                + base.mark_text(fontSize=10).encode(text="text:N", color=ink)
            ).properties(
                title=matrix.device if len(found) == 1 else matrix.title,
                width=_WIDTH * len(matrix.columns),
                height=_HEIGHT * len(matrix.rows),
            )
        )
    return alt.vconcat(*panels, title=alt.Title(HEADING, subtitle=_NOTE, anchor="start"))
