"""Draw ratios with intervals, and the roofline. Needs the `report` extra."""

import base64
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.environments import device_name
from bench.plan.competitors import YARDSTICK
from bench.report.figure_charts import figure_chart
from bench.report.figures import Figures, Picture, roofs
from bench.report.text import titles, told_apart
from bench.study.cells import identity
from bench.study.ranking import Ranking, efficiencies
from bench.study.results import Results
from parity_tests.judge.dtypes import short_name
from parity_tests.report.files import output
from parity_tests.report.text import printable, printable_tree

FORMATS: tuple[str, ...] = (".svg", ".png", ".html")
_NEEDED = {"altair": FORMATS, "vl_convert": FORMATS}
# A picture is as wide as its longest text, and a name of a megabyte would fill the memory.
_LONGEST_TEXT = 500
_MOST_S = 600
# Pixels of PNG for one of SVG.
_SCALE = 1.5
# In a process of its own: what the library cannot draw may abort the one that it runs in.
_DRAWING = """
import base64, json, sys, vl_convert
asked = json.load(sys.stdin)
drawn = []
for chart in asked["charts"]:
    svg = vl_convert.vegalite_to_svg(chart, vl_version=asked["version"])
    makers = {"svg": svg.encode, "png": lambda: vl_convert.svg_to_png(svg, scale=asked["scale"])}
    drawn.append([base64.b64encode(makers[kind]()).decode() for kind in asked["kinds"]])
json.dump(drawn, sys.stdout)
"""


class ChartError(ValueError):
    """A chart that cannot be drawn: an unknown file type, no data, or a package that is not installed."""


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


def save_picture(draw: Callable[[Results], Any], argument: str, path: Path, results: Results) -> None:
    """Draw a picture of results into a file.

    Args:
        draw: returns the altair object.
        argument: the option that named the file.
        path: ends in `.svg`, `.png` or `.html`.
        results: of one run or several.

    Raises:
        ChartError: if the type is unknown, a package is missing, there is nothing to draw, or the drawing fails.
        OutputError: if the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise ChartError(
            f"{argument}: expected a file ending in {', '.join(FORMATS)}, got {path.name!r}; choose one of these."
        )
    _check_packages(argument, path.suffix)
    chart = draw(results)
    with _sentence(argument), output(argument, path) as file:
        file.write(_page(chart) if path.suffix == ".html" else _drawn([path.suffix[1:]], [chart])[0][0])


def save_figures(argument: str, folder: Path, pictures: Sequence[Picture], shown: Figures) -> list[Path]:
    """Draw the pictures of a page into a folder, each as SVG and as PNG, and return the files.

    Args:
        argument: the option that named the folder.
        folder: made if it is not there.
        pictures: that are drawn, if there is anything to draw.
        shown: the figures behind them.

    Raises:
        ChartError: if a package is missing, or a drawing fails.
        OutputError: if a file cannot be written.
    """
    _check_packages(argument, ".png")
    there = {picture.name: chart for picture in pictures if (chart := figure_chart(picture, shown)) is not None}
    with _sentence(argument):
        drawn = _drawn(["svg", "png"], list(there.values()))
        folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.{kind}" for name in there for kind in ("svg", "png")]
    for path, content in zip(files, (part for both in drawn for part in both), strict=True):
        with output(argument, path) as file:
            file.write(content)
    return files


def _check_packages(argument: str, suffix: str) -> None:
    for package, formats in _NEEDED.items():
        if suffix in formats and importlib.util.find_spec(package) is None:
            raise ChartError(f"{argument}: {package} is not installed; install the extra: pip install -e '.[report]'.")


@contextmanager
def _sentence(argument: str) -> Iterator[None]:
    try:
        yield
    except (_DrawingError, ValueError) as error:
        # JSON takes no infinity.
        raise ChartError(
            f"{argument}: the picture cannot be drawn ({error}); choose other cells with --where."
        ) from error


class _DrawingError(Exception):
    """The drawing library ended without a picture, or took too long."""


def _drawn(kinds: Sequence[str], charts: Sequence[Any]) -> list[list[bytes]]:
    """Draw charts of altair, each in some kinds."""
    import altair as alt

    # As altair asks for it: major and minor version.
    version = "_".join(alt.SCHEMA_VERSION.split(".")[:2])
    asked = {"kinds": kinds, "version": version, "scale": _SCALE, "charts": [chart.to_dict() for chart in charts]}
    text = json.dumps(printable_tree(asked, _LONGEST_TEXT), allow_nan=False)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DRAWING],
            input=text.encode(),
            capture_output=True,
            check=True,
            timeout=_MOST_S,
            # Ctrl-C is this process's to answer.
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise _DrawingError(f"not done after {_MOST_S} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {error.returncode}"]
        raise _DrawingError(printable(said[-1])[:_LONGEST_TEXT]) from error
    return [[base64.b64decode(part) for part in made] for made in json.loads(done.stdout)]


class _InScript(json.JSONEncoder):
    """JSON within a script of HTML, which whatever looks like its closing tag would end."""

    def encode(self, o: Any) -> str:
        """See `json.JSONEncoder`."""
        return super().encode(printable_tree(o, _LONGEST_TEXT)).replace("<", "\\u003c")


def _page(chart: Any) -> bytes:
    """Return a picture as a page that fetches nothing, with its specification for whoever wants to draw it anew."""
    drawn = _drawn(["svg"], [chart])[0][0].decode()
    told = json.dumps(chart.to_dict(), cls=_InScript, allow_nan=False)
    head = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>benchmark</title></head>'
    return f"{head}\n<body>\n{drawn}\n<script>var spec = {told};</script>\n</body></html>\n".encode()
