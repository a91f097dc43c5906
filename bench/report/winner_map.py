"""Which competitor wins at which size, as a picture: ties are shown as ties. Needs the `report` extra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report.chart import ChartError, save_picture
from bench.study.pairing import identity
from bench.study.ranking import Ranking

# Past this many panels a picture is a wall of stamps; narrow the records instead.
MOST_PANELS = 60


def squares(found: Sequence[Ranking]) -> list[dict[str, Any]]:
    """One square for each cell in which somebody was timed: where it lies, who leads, and how many tie."""
    points = []
    for ranking in found:
        if not ranking.leaders:
            continue
        r = ranking.first
        points.append(
            {
                "panel": f"{r.in_features}->{r.out_features}, {r.layout}, {identity(r).step}, {identity(r).how}, "
                f"{r.device}, {r.environment_id[:6]}",
                "batch": r.batch,
                "num_partitions": r.num_partitions,
                "leader": ranking.leaders[0],
                "outcome": "winner" if ranking.winner else "tie",
                # The number of names that cannot be told from the leader, itself included.
                "mark": "" if ranking.winner else f"={len(ranking.leaders)}",
                "leaders": ", ".join(ranking.leaders),
            }
        )
    return points


def winner_map(found: Sequence[Ranking]) -> Any:
    """The map as an altair object: batch to the right, partitions upwards, a panel for each map and condition.

    Raises:
        ChartError: if nothing was timed, or there are more panels than anybody can read.
    """
    import altair as alt

    points = squares(found)
    panels = list(dict.fromkeys(point["panel"] for point in points))
    if not points:
        raise ChartError("--winner-map: nobody was timed, so there is no winner to draw; run the benchmark first.")
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


def save_winner_map(found: Sequence[Ranking], path: Path) -> None:
    """Draws the map into a file; see `save_picture`."""
    save_picture("--winner-map", path, lambda: winner_map(found))
