"""Drawings for the page, as SVG without any library: a heatmap of error over bound, and training curves with a band."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from parity_tests.report.text import html_text

ABOVE = "#b0142a"
_UNKNOWN = "#f2f2f2"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 230, 70, 40
_WIDEST = 640  # of a block of columns, in pixels: more columns are drawn narrower


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


@dataclass(frozen=True)
class Block:
    """Some columns of a heatmap: their names in order, and values by line and column."""

    columns: Sequence[str]
    values: Mapping[str, Mapping[str, float]]


def number(value: float | None) -> str:
    """Three digits, or nothing."""
    return "" if value is None else f"{value:.3g}"


def colour(fraction: float) -> str:
    """From nearly white (exact) through yellow to orange on the logarithm of the fraction; dark red above the bound."""
    if fraction > 1 or math.isnan(fraction):
        return ABOVE
    warmth = 0.0 if fraction <= 1e-3 else (3 + math.log10(fraction)) / 3
    return f"hsl({60 - 45 * warmth:.0f} 90% {95 - 33 * warmth:.0f}%)"


def legend() -> str:
    """The scale of every heatmap on the page."""
    steps = ((0.0, "exact"), (0.003, "0.003"), (0.03, "0.03"), (0.3, "0.3"), (1.0, "at the bound"), (2.0, "above"))
    parts = []
    for k, (fraction, name) in enumerate(steps):
        parts.append(f'<rect class="cell" x="{110 * k}" y="2" width="16" height="16" fill="{colour(fraction)}"/>')
        parts.append(f'<text x="{110 * k + 21}" y="14">{name}</text>')
    parts.append(f'<rect x="{110 * len(steps)}" y="2" width="16" height="16" fill="{_UNKNOWN}"/>')
    parts.append(f'<text x="{110 * len(steps) + 21}" y="14">not compared</text>')
    return f'<svg width="{110 * len(steps) + 120}" height="20" role="img" aria-label="colours">{"".join(parts)}</svg>'


def heatmap(title: str, lines: Sequence[str], blocks: Sequence[Block]) -> str:
    """Draws named lines against one or more blocks of columns, side by side.

    Args:
        title: below which it stands; read out as well.
        lines: names from top to bottom.
        blocks: those without columns are left out.
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


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers between two heights; heights are logarithms on a logarithmic axis."""
    if logarithmic:
        powers = range(math.floor(low), math.ceil(high) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [math.log10(factor) + power for power in powers for factor in factors]
            found = [tick for tick in found if low <= tick <= high]
            if len(found) >= 3:
                break
    else:
        step = 10 ** math.floor(math.log10((high - low) or 1.0))
        found = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return found if len(found) >= 2 else [low, high]


def draw_curves(curves: Curves) -> str:
    """Draws the lines over steps with ticks, a legend, and the band that noise explains."""

    def height(value: float) -> float:
        return math.log10(value) if curves.logarithmic else value

    def usable(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not curves.logarithmic)

    series = [*curves.lines.values(), *(curves.band or ())]
    heights = [height(value) for line in series for value in line if usable(value)]
    if not heights:
        return f"<figure><figcaption>{html_text(curves.title)}</figcaption><p>nothing finite to draw</p></figure>"
    low, high, steps = min(heights), max(heights), max(map(len, series))

    def across(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 10) * step / max(steps - 1, 1)

    def down(value: float) -> float:
        return 10 + (_HEIGHT - _BOTTOM - 10) * (high - value) / ((high - low) or 1.0)

    def path(line: Sequence[float], order: int = 1) -> list[str]:
        points = list(enumerate(line))[::order]
        return [f"{across(step):.1f},{down(height(value)):.1f}" for step, value in points if usable(value)]

    parts = []
    for tick in _ticks(low, high, curves.logarithmic):
        y = down(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>')
        name = number(10**tick if curves.logarithmic else tick)
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
        shade = curves.colours[k % len(curves.colours)]
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
