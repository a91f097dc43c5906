"""Draw the pictures of a page as objects of altair, for files that fit on paper. Needs the `report` extra."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from bench.report.figures import LEADS, PANEL, Figures, Picture

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
