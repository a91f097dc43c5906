"""Draw maps: the winner at each size, and PyTorch against JAX. Needs the `report` extra."""

import math
from collections.abc import Sequence
from typing import Any

from bench.plan.workloads import size_text
from bench.report.pictures import ChartError
from bench.report.tables import HEADING, Matrix, matrices, verdict_text
from bench.study.cells import identity
from bench.study.ranking import Ranking
from bench.study.results import Results
from bench.study.statistics import FASTER, SLOWER
from bench.study.verdicts import FrameworkRatio

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
