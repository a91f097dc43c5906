"""Draw parity rows as one self-contained page: verdict, heatmaps of error over bound, training curves, a table.

Nothing is fetched: styles, script and SVG drawings are in the page. Everything that comes from rows is escaped.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from parity_tests.judge.records import ParityRow, summarize
from parity_tests.judge.subjects import DEFAULT_MODES
from parity_tests.report.text import html_text

ABOVE = "#b0142a"
_UNKNOWN = "#f2f2f2"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 230, 70, 40
_COLOURS = ("#b4441f", "#1f6fb4", "#3b8a3e", "#7a3bb4", "#8a7a1f")
_WIDEST = 640  # of a block of columns, in pixels: more columns are drawn narrower


@dataclass(frozen=True)
class Curves:
    """One drawing of training trajectories over steps, on a logarithmic axis without values at or below 0."""

    title: str  # above the drawing
    lines: Mapping[str, Sequence[float]]  # values by name, one a step
    # Lowest and highest value a step that rounding noise explains, or None
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Block:
    """Some columns of a heatmap: their names in order, and values by line and column."""

    columns: Sequence[str]
    values: Mapping[str, Mapping[str, float]]


def number(value: float | None) -> str:
    """Show three digits, or nothing for None."""
    return "" if value is None else f"{value:.3g}"


def colour(fraction: float) -> str:
    """Shade from nearly white (exact) through yellow to orange by the logarithm of the fraction; dark red above 1."""
    if fraction > 1 or math.isnan(fraction):
        return ABOVE
    warmth = 0.0 if fraction <= 1e-3 else (3 + math.log10(fraction)) / 3
    return f"hsl({60 - 45 * warmth:.0f} 90% {95 - 33 * warmth:.0f}%)"


def legend() -> str:
    """Return the scale of every heatmap on the page."""
    steps = ((0.0, "exact"), (0.003, "0.003"), (0.03, "0.03"), (0.3, "0.3"), (1.0, "at the bound"), (2.0, "above"))
    parts = []
    for k, (fraction, name) in enumerate(steps):
        parts.append(f'<rect class="cell" x="{110 * k}" y="2" width="16" height="16" fill="{colour(fraction)}"/>')
        parts.append(f'<text x="{110 * k + 21}" y="14">{name}</text>')
    parts.append(f'<rect x="{110 * len(steps)}" y="2" width="16" height="16" fill="{_UNKNOWN}"/>')
    parts.append(f'<text x="{110 * len(steps) + 21}" y="14">not compared</text>')
    return f'<svg width="{110 * len(steps) + 120}" height="20" role="img" aria-label="colours">{"".join(parts)}</svg>'


def heatmap(title: str, lines: Sequence[str], blocks: Sequence[Block]) -> str:
    """Draw named lines against one or more blocks of columns, side by side.

    Blocks without columns are left out.
    """
    blocks = [block for block in blocks if block.columns]
    side, gap = 17, 14
    above = {line for block in blocks for line, found in block.values.items() if any(v > 1 for v in found.values())}
    # Bold letters are wider.
    left = 12 + max((round((7.6 if line in above else 6.6) * len(line)) for line in lines), default=0)
    top = 14 + max((round(6.2 * len(column)) for block in blocks for column in block.columns), default=0)
    parts, x = [], left
    for k, line in enumerate(lines):
        bad = ' class="bad"' if line in above else ""
        parts.append(f'<text x="{left - 6}" y="{top + side * k + 13}" text-anchor="end"{bad}>{html_text(line)}</text>')
    for block in blocks:
        width = min(side, max(2.0, _WIDEST / len(block.columns)))
        every = math.ceil(12 / width)  # a name is twelve pixels high
        for c, column in enumerate(block.columns):
            at = x + width * c
            if c % every == 0:
                middle = at + width / 2
                parts.append(
                    f'<text x="{middle:.1f}" y="{top - 5}" transform="rotate(-90 {middle:.1f} {top - 5})" dy="4">'
                    f"{html_text(column)}</text>"
                )
            for k, line in enumerate(lines):
                value = block.values.get(line, {}).get(column)
                fill = _UNKNOWN if value is None else colour(value)
                shown = f"{line}, {column}: {'not compared' if value is None else number(value)}"
                border = ' class="cell"' if value is not None and width > 6 else ""
                parts.append(
                    f'<rect{border} x="{at:.1f}" y="{top + side * k}" width="{width - (1 if width > 6 else 0):.1f}" '
                    f'height="{side - 1}" fill="{fill}"><title>{html_text(shown)}</title></rect>'
                )
        x += width * len(block.columns) + gap
    size = f'width="{x:.0f}" height="{top + side * len(lines) + 4}"'
    drawing = f'<svg {size} role="img" aria-label="{html_text(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{html_text(title)}</figcaption>{drawing}</figure>"


def _ticks(low: float, high: float) -> list[float]:
    """Choose round numbers between two heights, which are logarithms."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [math.log10(factor) + power for power in powers for factor in factors]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 3:
            break
    return found if len(found) >= 2 else [low, high]


def _usable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def draw_curves(curves: Curves) -> str:
    """Draw the lines over steps with ticks, a legend, and the band that noise explains."""
    series = [*curves.lines.values(), *(curves.band or ())]
    heights = [math.log10(value) for line in series for value in line if _usable(value)]
    if not heights:
        return f"<figure><figcaption>{html_text(curves.title)}</figcaption><p>nothing finite to draw</p></figure>"
    low, high, steps = min(heights), max(heights), max(map(len, series))

    def across(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 10) * step / max(steps - 1, 1)

    def down(value: float) -> float:
        return 10 + (_HEIGHT - _BOTTOM - 10) * (high - value) / ((high - low) or 1.0)

    def path(line: Sequence[float], order: int = 1) -> list[str]:
        points = list(enumerate(line))[::order]
        return [f"{across(step):.1f},{down(math.log10(value)):.1f}" for step, value in points if _usable(value)]

    parts = []
    for tick in _ticks(low, high):
        y = down(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>')
        name = number(10**tick)
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    parts += [
        f'<text x="{across(step):.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{step + 1}</text>'
        for step in sorted({0, (steps - 1) // 2, steps - 1})
    ]
    names: list[tuple[str, str]] = []
    if curves.band is not None:
        outline = " ".join(path(curves.band[0]) + path(curves.band[1], -1))
        parts.append(f'<polygon class="band" points="{outline}"><title>explained by rounding noise</title></polygon>')
        names.append(("runs with rounding noise", "#777"))
    for k, (name, line) in enumerate(curves.lines.items()):
        shade = _COLOURS[k % len(_COLOURS)]
        # Equal runs lie on each other: the later ones are dashed, so that the first still shows.
        dash = ' stroke-dasharray="6 5"' if k else ""
        points = " ".join(path(line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{shade}" stroke-width="1.8"{dash}/>')
        names.append((name, shade))
    x = _LEFT
    for name, shade in (*names, ("(over steps)", "#888")):
        parts.append(f'<text x="{x}" y="{_HEIGHT - 6}" style="fill:{shade}">{html_text(name)}</text>')
        x += 24 + round(6.6 * len(name))
    drawing = f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{html_text(curves.title)}">'
    return f"<figure><figcaption>{html_text(curves.title)}</figcaption>{drawing}{''.join(parts)}</svg></figure>"


__all__ = ["Curves", "html_document"]

# --- the page ---

_COLUMNS = ("status", "kind", "framework", "implementation", "mode", "dtype", "case", "tensor")


def _table(rows: Sequence[ParityRow]) -> str:
    lines = []
    for row in rows:
        place = "" if row.worst_index is None else str(list(row.worst_index))
        cells = [str(getattr(row, column)) for column in _COLUMNS]
        said = "; ".join(filter(None, (row.reason or row.diagnosis, row.note and f"note: {row.note}")))
        cells += [number(row.bound_fraction), number(row.max_abs_error), place, said]
        text = "".join(f"<td>{html_text(cell)}</td>" for cell in cells)
        lines.append(f'<tr class="{html_text(row.status)}" title="{html_text(row.command)}">{text}</tr>')
    heads = (*_COLUMNS, "error / bound", "largest error", "worst index", "reason, diagnosis or note")
    head = "".join(f"<th>{html_text(column)}</th>" for column in heads)
    return f'<table id="rows"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


class _Grid:
    """The largest value seen for each line and column, both in the order in which they came."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, float]] = defaultdict(dict)
        self.columns: dict[str, None] = {}

    def add(self, line: str, column: str, value: float) -> None:
        known = self.values[line]
        known[column] = max(known.get(column, 0.0), value)
        self.columns[column] = None

    def block(self, columns: Iterable[str] | None = None) -> Block:
        return Block(list(self.columns if columns is None else columns), self.values)


def _subjects(rows: Sequence[ParityRow]) -> str:
    """Draw a heatmap for each mode and dtype: subjects against tensors, and against partitions."""
    tensors: dict[str, _Grid] = defaultdict(_Grid)
    partitions: dict[str, _Grid] = defaultdict(_Grid)
    for row in rows:
        default = row.mode in ("", DEFAULT_MODES.get(row.framework))
        title, line = f"{row.dtype}{'' if default else ', ' + row.mode}", f"{row.framework} {row.implementation}"
        if row.bound_fraction is None:
            continue
        tensors[title].add(line, row.tensor or row.case, row.bound_fraction)
        if row.partition_fractions is not None:
            for partition, fraction in enumerate(row.partition_fractions):
                partitions[title].add(line, str(partition), fraction)
        elif row.partition is not None:
            partitions[title].add(line, str(row.partition), row.bound_fraction)
    return "".join(
        heatmap(
            f"{title}: by tensor" + (" and by partition" if partitions[title].columns else ""),
            list(grid.values),
            [grid.block(), partitions[title].block(sorted(partitions[title].columns, key=int))],
        )
        for title, grid in tensors.items()
    )


def _against_each_other(rows: Sequence[ParityRow]) -> str:
    """Draw a heatmap for each pair of modes and dtype: torch's implementations against those of JAX."""
    grids: dict[str, _Grid] = defaultdict(_Grid)
    for row in rows:
        if row.bound_fraction is None:
            continue
        first, _, second = row.implementation.partition("+")
        if row.kind == "mode":
            modes = row.mode.partition("+")
            title, line, column = f"{row.dtype}: a mode against the default", f"{row.framework} {first}", modes[0]
        else:
            title, line, column = f"{row.dtype}, {row.mode}: torch (lines) against jax (columns)", first, second
        grids[title].add(line, column, row.bound_fraction)
    return "".join(heatmap(title, list(grid.values), [grid.block()]) for title, grid in grids.items())


def _training(rows: Sequence[ParityRow]) -> str:
    grid = _Grid()
    for row in rows:
        if row.bound_fraction is not None:
            grid.add(row.implementation, row.case, row.bound_fraction)
    return heatmap("each criterion's fraction of its limit", list(grid.values), [grid.block()]) if grid.values else ""


def ladder_picture(ladder: Sequence[tuple[str, str, str]]) -> str:
    """Draw a model as a column of boxes, one a module with its name on both sides, in order of execution.

    Args:
        ladder: names and state: `agrees`, `differs`, or `place` where the two sides part.
    """
    if not ladder:
        return ""
    fills = {"agrees": "#dff0df", "differs": "#fde7ea", "place": ABOVE}
    half = 40 + max(round(7.2 * len(name)) for entry in ladder for name in entry[:2])
    parts = []
    for k, (first, second, state) in enumerate(ladder):
        y, ink = 24 * k, ' style="fill:#fff;font-weight:700"' if state == "place" else ""
        box = f'<rect class="cell" x="0" y="{y}" width="{2 * half}" height="20" rx="3" fill="{fills[state]}"/>'
        names = [(half - 12, "end", first), (half + 12, "start", second)]
        text = [f'<text x="{x}" y="{y + 14}" text-anchor="{at}"{ink}>{html_text(name)}</text>' for x, at, name in names]
        parts.append(f"<g><title>{state}</title>{box}{''.join(text)}</g>")
    size = f'width="{2 * half}" height="{24 * len(ladder)}"'
    caption = "modules in order, torch | flax: green agrees, red is where they part, pink comes after it or within"
    drawing = f'<svg {size} role="img" aria-label="modules">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def _section(title: str, *drawings: str) -> str:
    inside = "".join(drawings)
    return f"<h2>{html_text(title)}</h2><div class='figures'>{inside}</div>" if inside else ""


def _skipped(rows: Sequence[ParityRow]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.status == "skipped":
            counts[row.reason] += 1
    if not counts:
        return ""
    items = "".join(f"<li>skipped {count} x: {html_text(reason)}</li>" for reason, count in counts.items())
    state = " open" if len(counts) <= 6 else ""
    return f"<details{state}><summary>{sum(counts.values())} skipped, with reasons</summary><ul>{items}</ul></details>"


def html_document(
    rows: Sequence[ParityRow],
    environment: Mapping[str, Any],
    training: Sequence[Curves] = (),
    title: str = "parity",
    notes: Sequence[str] = (),
    cells_left: int = 0,
    stopped: bool = False,
    ladder: Sequence[tuple[str, str, str]] = (),
) -> str:
    """Return the page.

    Args:
        rows: of a parity run or a pair's report.
        environment: as from `records.environment`; shown as it is.
        training: curves to draw.
        title: of the page.
        notes: sentences beside the skipped cells.
        cells_left: number of cells that an interrupted run did not come to.
        stopped: True if the run did not come to its end; the notes say why.
        ladder: of a pair that does not hold, see `ladder_picture`.
    """
    summary = summarize(rows)
    verdict = (
        "all compared cells hold" if summary.ok else "nothing was compared" if not summary.compared else "MISMATCH"
    )
    if cells_left:
        verdict += f", interrupted with {cells_left} cells left"
    if stopped:
        verdict += ", STOPPED before its end"
    packages = environment.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version) or "unknown versions"
    by_kind: dict[str, list[ParityRow]] = defaultdict(list)
    for row in rows:
        kind = "against" if row.kind in ("pair", "mode") and "+" in row.mode else row.kind
        by_kind["trained" if kind in ("ladder", "training") else kind].append(row)
    judged = [row for kind, members in by_kind.items() if kind not in ("against", "trained") for row in members]
    subjects, against = _subjects(judged), _against_each_other(by_kind["against"])
    return _PAGE.substitute(
        title=html_text(title),
        state="bad" if stopped or not summary.ok else "open" if cells_left else "ok",
        verdict=verdict,
        counts=f"{summary.compared} compared, {summary.failed} failed, {summary.skipped} skipped",
        environment=html_text(f"{versions}; Python {environment.get('python')}, {environment.get('machine')}"),
        skipped="".join(f"<p>{html_text(note)}</p>" for note in notes) + _skipped(rows),
        legend=legend() if subjects or against else "",
        heatmap=_section("where they part", ladder_picture(ladder))
        + _section("largest error over its bound", subjects)
        + _section("against each other", against),
        training=_section("training", _training(by_kind["trained"]), *map(draw_curves, training)),
        table=_table(rows),
    )


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
h1 { margin-bottom: .2em } p { margin: .3em 0 }
h1 .ok { color: #27702a } h1 .bad { color: #b0142a } h1 .open { color: #8a6a00 }
h2 { font-size: 1.15em; margin: 1.8em 0 .4em; border-bottom: 1px solid #ccc }
.figures { display: flex; flex-wrap: wrap; gap: 1.2em 2.5em; align-items: flex-start }
figure { margin: 0; max-width: 100%; overflow-x: auto }
figcaption { font-weight: 600; margin: .3em 0; max-width: 560px }
svg text { font-size: 11px; fill: #444 } svg text.bad { fill: #b0142a; font-weight: 700 }
rect.cell { stroke: #ccc; stroke-width: .5 } line.grid { stroke: #e4e4e4 }
polygon.band { fill: #8888; stroke: #777; stroke-width: .8 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 12px }
th, td { padding: 2px 8px; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
td:last-child { white-space: normal; min-width: 20em }
thead th { background: #f3f3f3 }
tr.mismatch td { background: #fde7ea } tr.skipped td { color: #888 }
input { font: inherit; width: 36em; max-width: 90%; padding: 3px 6px; margin: .4em 0 }
</style></head><body>
<h1>$title: <span class="$state">$verdict</span></h1><p>$counts</p><p>$environment</p>$skipped
<p>$legend</p>
$heatmap$training
<h2>rows</h2><input id="filter" aria-label="filter" placeholder="words that a row must contain: mismatch bfloat16">
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
