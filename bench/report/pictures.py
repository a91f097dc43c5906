"""Write pictures into files, and draw those of a page as objects of altair. Needs the `report` extra."""

import base64
import importlib.util
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.report.figures import LEADS, PANEL, Figures, Picture
from bench.study.results import Results
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


# --- the pictures of a page, for files that fit on paper ---

# Of one panel, in pixels; two of them lie side by side.
_WIDTH, _HEIGHT = 290, 230
_MOST_PANELS, _MOST_LISTS, _MOST_LINES = 4, 2, 20
# Told apart by the colour-blind, on white; shapes say the same.
_COLOURS = ("#0063a6", "#b84a00", "#00745a", "#8a3f75")
_SHAPES = ("circle", "triangle-up", "square", "diamond")
_FRAMEWORKS = ("torch", "jax")
# A label right of its point, left of it, above it, below it: alignment, and the way from the point.
_BESIDE = (("left", 7, 0), ("right", -7, 0), ("center", 0, -11), ("center", 0, 12))
_LABEL_WIDTH, _LABEL_HEIGHT = 5.8, 11.0
_TITLE = 46  # characters of a line above a panel

_Row = Mapping[str, Any]


def figure_chart(picture: Picture, shown: Figures) -> Any | None:
    """Return what a picture shows at first as an altair object; None where that is nothing."""
    import altair as alt

    rows = shown.shown(picture)
    if not rows:
        return None
    differing = [name for name in PANEL if len({row[name] for row in rows}) > 1]
    groups: dict[tuple[Any, ...], list[_Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in PANEL), []).append(row)
    most = _MOST_PANELS if picture.y else _MOST_LISTS
    drawn, left = [], sum(len(group) for group in list(groups.values())[most:])
    for group in list(groups.values())[:most]:
        title = [", ".join(str(group[0][name]) for name in differing if name != "machine")]
        title += textwrap.wrap(str(group[0]["machine"]), _TITLE) if "machine" in differing else []
        if picture.y is None:
            left += max(0, len(group) - _MOST_LINES)
        panel = (_list if picture.y is None else _scatter)(alt, picture, group)
        drawn.append(panel.properties(title=alt.Title(list(filter(None, title)), fontSize=11, anchor="start")))
    notes = [f"{name} {value}" for name, value in shown.chosen.items()]
    notes += ["filled: first, or tied for the first place"] if picture.y else []
    notes += ["line: measured roof; dashed: data sheet"] if picture.roofs else []
    notes += [f"{left} more competitors are on the page"] if left else []
    title = alt.Title(picture.title, subtitle="; ".join(notes), anchor="start")
    return alt.concat(*drawn, columns=2 if picture.y else 1, title=title).resolve_scale(
        x="independent", y="independent"
    )


def _domain(values: Sequence[float]) -> list[float]:
    return [min(values) / 1.3, max(values) * 1.3]


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between two ends, at most so many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors, step in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 6)):
        found = [factor * 10.0**power for power in powers if power % step == 0 for factor in factors]
        found = [value for value in found if low <= value <= high]
        if 1 < len(found) <= most:
            return found
    return [low, high]


def _scatter(alt: Any, picture: Picture, rows: Sequence[_Row]) -> Any:
    assert picture.y is not None
    across, up = picture.x, picture.y
    roofs = [one for one in picture.roofs if all(one[name] == rows[0][name] for name in ("machine", "precision"))]
    ends = [row[name] for name in (picture.low, picture.high) if name for row in rows if row[name]]
    wide = _domain([row[across.column] for row in rows])
    high = _domain([row[up.column] for row in rows] + ends + [one["at"][2][1] for one in roofs])
    x = alt.X(f"{across.column}:Q", title=across.title, scale=alt.Scale(type="log", domain=wide, nice=False))
    x.axis = alt.Axis(format="~s", values=_ticks(*wide, most=6))
    y = alt.Y(f"{up.column}:Q", title=up.title, scale=alt.Scale(type="log", domain=high, nice=False))
    y.axis = alt.Axis(format="~s", values=_ticks(*high, most=8))
    needed = {across.column, up.column, "framework", "place", *filter(None, (picture.low, picture.high))}
    values = [{name: row[name] for name in needed} for row in rows]
    for value, row in zip(values, rows, strict=True):
        value["series"] = "/".join(str(row[name]) for name in picture.joined)
        value["opacity"] = float(row["place"] == LEADS)
    colour = alt.Color("framework:N", scale=alt.Scale(domain=_FRAMEWORKS, range=_COLOURS[:2]), title=None)
    shape = alt.Shape("framework:N", scale=alt.Scale(domain=_FRAMEWORKS, range=_SHAPES[:2]), title=None)
    base = alt.Chart(alt.InlineData(values=values)).encode(x=x, y=y, color=colour)
    layers = []
    for one in roofs:
        corners = [{across.column: a, up.column: b} for a, b in one["at"]]
        dash = [1, 0] if one["roof"] == "measured" else [6, 4]
        line = alt.Chart(alt.InlineData(values=corners)).mark_line(color="gray", strokeDash=dash, clip=True)
        layers.append(line.encode(x=x, y=y))
    if picture.joined:
        layers.append(base.mark_line(opacity=0.4, strokeWidth=1).encode(detail="series:N"))
    if picture.low and picture.high:
        layers.append(base.mark_rule().encode(y=alt.Y(f"{picture.low}:Q"), y2=f"{picture.high}:Q"))
    filled = alt.FillOpacity("opacity:Q", scale=None, legend=None)
    layers.append(base.mark_point(size=45).encode(shape=shape, fill=colour, fillOpacity=filled))
    for (align, dx, dy), texts in _labels(picture, rows, roofs, wide, high).items():
        names = alt.Chart(alt.InlineData(values=texts)).mark_text(align=align, dx=dx, dy=dy, fontSize=10)
        layers.append(names.encode(x=x, y=y, text="text:N"))
    return alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT)


_Area = tuple[float, float, float, float]


def _labels(
    picture: Picture,
    rows: Sequence[_Row],
    roofs: Sequence[Mapping[str, Any]],
    wide: Sequence[float],
    high: Sequence[float],
) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """Place the labels of the leaders where nothing is yet; one that finds no room is left out."""
    assert picture.y is not None
    across, up, label = picture.x.column, picture.y.column, picture.label
    if label is None:
        return {}

    def pixels(a: float, b: float) -> tuple[float, float]:
        part = math.log(a / wide[0]) / math.log(wide[1] / wide[0])
        return _WIDTH * part, _HEIGHT * (1 - math.log(b / high[0]) / math.log(high[1] / high[0]))

    taken: list[_Area] = []
    for a, b in (pixels(row[across], row[up]) for row in rows):
        taken.append((a - 4, b - 4, a + 4, b + 4))
    for (a, b), (c, d) in (pair for one in roofs for pair in pairwise(pixels(*corner) for corner in one["at"])):
        parts = [(a + t / 60 * (c - a), b + t / 60 * (d - b)) for t in range(61)]
        taken += [(x - 3, y - 2, x + 3, y + 2) for x, y in parts]
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    named = set[str]()
    for row in rows:
        text = str(row[label])
        if row["place"] != LEADS or text in named:
            continue
        a, b = pixels(row[across], row[up])
        long = _LABEL_WIDTH * len(text)
        for align, dx, dy in _BESIDE:
            left = a + dx - {"left": 0.0, "center": long / 2, "right": long}[align]
            area = (left, b + dy - _LABEL_HEIGHT / 2, left + long, b + dy + _LABEL_HEIGHT / 2)
            within = area[0] >= 0 and area[1] >= 0 and area[2] <= _WIDTH and area[3] <= _HEIGHT
            if within and not any(_overlap(area, other) for other in taken):
                found.setdefault((align, dx, dy), []).append({across: row[across], up: row[up], "text": text})
                taken.append(area)
                named.add(text)
                break
    return found


def _overlap(a: _Area, b: _Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _list(alt: Any, picture: Picture, rows: Sequence[_Row]) -> Any:
    kinds = list(picture.marks.values())
    values, lines = [], []
    for row in rows[:_MOST_LINES]:
        note = row[picture.note] if picture.note else None
        line = "; ".join(filter(None, (f"{row['workload']}: {row['label']}", note)))
        # Two cells may differ in what no line says.
        line += " " * lines.count(line)
        lines.append(line)
        values += [
            {"line": line, "kind": kind, "value": row[name]} for name, kind in picture.marks.items() if row[name]
        ]
    domain = _domain([value["value"] for value in values])
    axis = alt.Axis(format="~s", values=_ticks(*domain, most=5))
    return (
        alt.Chart(alt.InlineData(values=values))
        .mark_point(filled=True, size=45, opacity=1)
        .encode(
            x=alt.X(
                "value:Q", title=picture.x.title, scale=alt.Scale(type="log", domain=domain, nice=False), axis=axis
            ),
            y=alt.Y("line:N", sort=lines, title=None, axis=alt.Axis(labelLimit=340, grid=True)),
            color=alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=_COLOURS[: len(kinds)]), title=None),
            shape=alt.Shape("kind:N", scale=alt.Scale(domain=kinds, range=_SHAPES[: len(kinds)]), title=None),
        )
        .properties(width=_WIDTH - 40, height=16 * len(lines))
    )
