"""PyTorch against JAX as a picture: a square for each cell, coloured by who is faster. Needs the `report` extra."""

import math
from pathlib import Path
from typing import Any

from bench.report.chart import ChartError, save_picture
from bench.report.frameworks import HEADING, Matrix, matrices, verdict_text
from bench.study.results import Results
from bench.study.statistics import FASTER, SLOWER
from bench.study.verdicts import FrameworkRatio

# Four times as fast or more has the full colour: what lies beyond would leave nothing to tell 1.1 from 1.5.
_FULL = 4.0
_DARK = 0.8 * math.log2(_FULL)
_HEIGHT, _WIDTH = 22, 180
# More rows than this make a picture that nobody scrolls through.
MOST_ROWS = 300
_NOTE = (
    "the faster framework of each cell, the fastest competitor of each, with JAX's mode / PyTorch's mode",
    "open: not resolved (JAX's speed over PyTorch's); grey: one framework has no such speed; empty: neither has",
)


def shade(found: FrameworkRatio) -> float:
    """Binary logarithm of JAX's speed over PyTorch's; 0 where neither was shown to be faster."""
    if found.interval is None or found.verdict not in (FASTER, SLOWER):
        return 0.0
    return math.log2(min(max(found.interval.ratio, 1 / _FULL), _FULL))


def squares(matrix: Matrix) -> list[dict[str, Any]]:
    """One square for each cell of a device."""
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
    """The map as an altair object, a panel for each device.

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
        # Told apart by the colour-blind as well; white where nobody is faster.
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
        base = alt.Chart(alt.InlineData(values=squares(matrix))).encode(
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


def save_framework_map(results: Results, path: Path) -> None:
    """Draws the map into a file; see `save_picture`."""
    save_picture("--framework-map", path, lambda: framework_map(results))
