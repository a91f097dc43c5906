"""One self-contained page over parity rows: verdict, filterable table, heatmap of error over bound, training curves.

Nothing is fetched: styles, script and drawings are in the page. Everything that comes from rows is escaped.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from string import Template
from typing import Any

from parity_tests.harness.records import ParityRow, summarize

_COLUMNS = ("status", "kind", "framework", "implementation", "dtype", "case", "tensor")
_WIDTH, _HEIGHT = 640, 220


@dataclass(frozen=True)
class Curves:
    """One drawing of training trajectories over steps.

    Attributes:
        title: above the drawing.
        lines: values by name, one a step.
        band: lowest and highest value a step that rounding noise explains, or None.
        logarithmic: whether the vertical axis is logarithmic; values at or below 0 are then left out.
    """

    title: str
    lines: Mapping[str, Sequence[float]]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    logarithmic: bool = True
    colours: Sequence[str] = field(default=("#b4441f", "#1f6fb4", "#3b8a3e", "#7a3bb4", "#8a7a1f"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _colour(fraction: float) -> str:
    """From white (exact) through yellow to red (at the bound and above), on the logarithm of the fraction."""
    if fraction > 1:
        return "#b0142a"
    warmth = 0.0 if fraction <= 1e-3 else (3 + math.log10(fraction)) / 3
    return f"hsl({60 - 45 * warmth:.0f} 90% {97 - 35 * warmth:.0f}%)"


def _table(rows: Sequence[ParityRow]) -> str:
    lines = []
    for row in rows:
        place = "" if row.worst_index is None else str(list(row.worst_index))
        cells = [str(getattr(row, column)) for column in _COLUMNS]
        cells += [_number(row.bound_fraction), _number(row.max_abs_error), place, row.reason or row.diagnosis]
        text = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr class="{escape(row.status)}" title="{escape(row.command)}">{text}</tr>')
    heads = (*_COLUMNS, "error / bound", "largest error", "worst index", "reason or diagnosis")
    head = "".join(f"<th>{escape(column)}</th>" for column in heads)
    return f'<table id="rows"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _heatmap(rows: Sequence[ParityRow]) -> str:
    """Largest error over bound: a line for each subject and dtype, a column for each partition, else each tensor."""
    by_partition: dict[str, dict[Any, float]] = defaultdict(dict)
    by_tensor: dict[str, dict[Any, float]] = defaultdict(dict)
    for row in rows:
        if row.bound_fraction is None:
            continue
        line = f"{row.framework} {row.implementation} {row.dtype}"
        known = by_tensor[line]
        known[row.tensor] = max(known.get(row.tensor, 0.0), row.bound_fraction)
        # The worst element of each tensor names its partition; others are not kept in the rows.
        if row.partition is not None:
            known = by_partition[line]
            known[row.partition] = max(known.get(row.partition, 0.0), row.bound_fraction)
    drawings = [
        _grid("largest error over bound by partition (of the worst element of each case)", by_partition),
        _grid("largest error over bound by tensor", by_tensor),
    ]
    return "".join(drawings)


def _grid(title: str, cells: Mapping[str, Mapping[Any, float]]) -> str:
    if not cells:
        return ""
    columns = sorted({column for line in cells.values() for column in line}, key=lambda c: (str(type(c)), c))
    side, left, top = 18, 10 + 7 * max(map(len, cells)), 20 + 6 * max(len(str(column)) for column in columns)
    parts = []
    for k, column in enumerate(columns):
        x = left + side * k + side / 2
        parts.append(
            f'<text x="{x}" y="{top - 6}" transform="rotate(-90 {x} {top - 6})" dy="4">{escape(str(column))}</text>'
        )
    for k, (name, line) in enumerate(cells.items()):
        y = top + side * k
        parts.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for c, column in enumerate(columns):
            if column in line:
                shown = escape(f"{name}, {column}: {_number(line[column])}")
                parts.append(
                    f'<rect x="{left + side * c}" y="{y}" width="{side - 1}" height="{side - 1}" '
                    f'fill="{_colour(line[column])}"><title>{shown}</title></rect>'
                )
    width, height = left + side * len(columns) + 10, top + side * len(cells) + 10
    drawing = f'<svg width="{width}" height="{height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<h2>{escape(title)}</h2><div class='wide'>{drawing}</div>"


def _curves(curves: Curves) -> str:
    def height(value: float) -> float:
        return math.log10(value) if curves.logarithmic else value

    def usable(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not curves.logarithmic)

    series = [*curves.lines.values(), *(curves.band or ())]
    heights = [height(value) for line in series for value in line if usable(value)]
    if not heights:
        return f"<h2>{escape(curves.title)}</h2><p>nothing finite to draw</p>"
    low, high, steps = min(heights), max(heights), max(map(len, series))

    def point(step: int, value: float) -> str:
        x = 60 + (_WIDTH - 70) * step / max(steps - 1, 1)
        y = 10 + (_HEIGHT - 40) * (high - height(value)) / ((high - low) or 1.0)
        return f"{x:.1f},{y:.1f}"

    def path(line: Sequence[float], order: int = 1) -> list[str]:
        return [point(step, value) for step, value in list(enumerate(line))[::order] if usable(value)]

    parts = []
    if curves.band is not None:
        outline = " ".join(path(curves.band[0]) + path(curves.band[1], -1))
        parts.append(
            f'<polygon points="{outline}" fill="#88888844"><title>explained by rounding noise</title></polygon>'
        )
    for k, (name, line) in enumerate(curves.lines.items()):
        colour = curves.colours[k % len(curves.colours)]
        parts.append(f'<polyline points="{" ".join(path(line))}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{70 + 180 * k}" y="{_HEIGHT - 4}" fill="{colour}">{escape(name)}</text>')
    for value, y in ((high, 14), (low, _HEIGHT - 30)):
        parts.append(f'<text x="2" y="{y}">{_number(10**value if curves.logarithmic else value)}</text>')
    drawing = f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(curves.title)}">'
    return f"<h2>{escape(curves.title)}</h2>{drawing}{''.join(parts)}</svg>"


def html_document(
    rows: Sequence[ParityRow],
    environment: Mapping[str, Any],
    training: Sequence[Curves] = (),
    title: str = "parity",
    notes: Sequence[str] = (),
) -> str:
    """Returns the page.

    Args:
        rows: of a parity run or a pair's report.
        environment: as from ``records.environment``; shown as it is.
        training: drawings of trajectories, may be empty.
        title: of the page.
        notes: sentences at the top.
    """
    summary = summarize(rows)
    verdict = (
        "all compared cells hold" if summary.ok else "nothing was compared" if not summary.compared else "MISMATCH"
    )
    packages = environment.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version) or "unknown versions"
    skipped = defaultdict(int)
    for row in rows:
        if row.status == "skipped":
            skipped[row.reason] += 1
    return _PAGE.substitute(
        title=escape(title),
        state="ok" if summary.ok else "bad",
        verdict=verdict,
        counts=f"{summary.compared} compared, {summary.failed} failed, {summary.skipped} skipped",
        environment=escape(f"{versions}; Python {environment.get('python')}, {environment.get('machine')}"),
        skipped="".join(f"<li>{escape(note)}</li>" for note in notes)
        + "".join(f"<li>skipped {count} x: {escape(reason)}</li>" for reason, count in skipped.items()),
        heatmap=_heatmap(rows),
        training="".join(_curves(curves) for curves in training),
        table=_table(rows),
    )


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
h1 .ok { color: #27702a } h1 .bad { color: #b0142a } h2 { font-size: 1.05em; margin: 1.6em 0 .4em }
svg text { font-size: 11px; fill: #444 } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 12px }
th, td { padding: 2px 8px; border-bottom: 1px solid #ddd; text-align: left }
th { position: sticky; top: 0; background: #f3f3f3 }
tr.mismatch td { background: #fde7ea } tr.skipped td { color: #888 }
input { font: inherit; width: 30em; padding: 3px 6px; margin: .4em 0 }
</style></head><body>
<h1>$title: <span class="$state">$verdict</span></h1><p>$counts</p><p>$environment</p><ul>$skipped</ul>
$heatmap$training
<h2>rows</h2><input id="filter" placeholder="filter: words that a row must contain, e.g. mismatch bfloat16">
<p id="shown"></p><div class="wide">$table</div>
<script>
const filter = document.getElementById("filter"), lines = [...document.querySelectorAll("#rows tbody tr")];
function apply() {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const line of lines) {
    const text = line.textContent.toLowerCase(), keep = words.every(word => text.includes(word));
    line.hidden = !keep; shown += keep;
  }
  document.getElementById("shown").textContent = shown + " of " + lines.length + " rows";
}
filter.addEventListener("input", apply); apply();
</script></body></html>
""")
