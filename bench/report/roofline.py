"""The roofline as a picture: useful work a second over useful work a byte. Needs the `report` extra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.plan.competitors import YARDSTICK
from bench.report.chart import ChartError, save_picture
from bench.report.text import titles
from bench.study.ranking import Ranking
from bench.study.roofline import efficiencies

_ROOFS = (
    ("measured", "ceiling_flops_per_s", "ceiling_bytes_per_s"),
    ("data sheet", "peak_flops_per_s", "peak_bytes_per_s"),
)


def _panel(ranking: Ranking) -> str:
    r = ranking.first
    return f"{r.precision}, {r.device}, {r.environment_id[:6]}"


def points(found: Sequence[Ranking]) -> list[dict[str, Any]]:
    """One point for each ranked competitor of each cell."""
    listed = []
    for ranking, title in zip(found, titles(found), strict=True):
        rates = efficiencies(ranking)
        for row in ranking.rows:
            rate = rates[row.record.label].flops_per_s
            if rate is None or row.record.kind == YARDSTICK:
                continue
            listed.append(
                {
                    "panel": _panel(ranking),
                    "intensity": row.record.useful_flops / row.record.compulsory_bytes,
                    "flops_per_s": rate,
                    "framework": row.record.framework,
                    "competitor": row.record.label,
                    "cell": title,
                    "place": "leads" if row.leads else "behind",
                }
            )
    return listed


def roofs(found: Sequence[Ranking], low: float, high: float) -> list[dict[str, Any]]:
    """The lines of each panel between two intensities: the highest ceiling seen, and the data sheet's."""
    lines = []
    for panel in dict.fromkeys(map(_panel, found)):
        # A cell's first record may be of a competitor that never ran, so every row is asked.
        records = [row.record for ranking in found if _panel(ranking) == panel for row in ranking.rows]
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


def roofline_chart(found: Sequence[Ranking]) -> Any:
    """The chart as an altair object, one panel for each precision, device and environment.

    Raises:
        ChartError: if nothing was timed.
    """
    import altair as alt

    listed = points(found)
    if not listed:
        raise ChartError("--roofline: nobody was timed, so there is no rate to draw; run the benchmark first.")
    low, high = min(point["intensity"] for point in listed) / 2, max(point["intensity"] for point in listed) * 2
    lines = roofs(found, low, high)
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


def save_roofline(found: Sequence[Ranking], path: Path) -> None:
    """Draws the chart into a file; see `save_picture`."""
    save_picture("--roofline", path, lambda: roofline_chart(found))
