"""One self-contained page over parity rows: verdict, heatmaps of error over bound, training curves, a filterable table.

Nothing is fetched: styles, script and drawings are in the page. Everything that comes from rows is escaped.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from string import Template
from typing import Any

from parity_tests.judge.modes import DEFAULT_MODES
from parity_tests.judge.records import ParityRow, summarize
from parity_tests.report.drawings import Block, Curves, draw_curves, heatmap, legend, number
from parity_tests.report.text import html_text

__all__ = ["Curves", "html_document"]

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
    """A drawing for each mode and dtype: a line for each subject; a column for each tensor, one for each partition."""
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
    """A drawing for each pair of modes and dtype: torch's implementations against those of JAX."""
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
) -> str:
    """Returns the page.

    Args:
        rows: of a parity run or a pair's report.
        environment: as from `records.environment`; shown as it is.
        training: drawings of trajectories, may be empty.
        title: of the page.
        notes: sentences beside the skipped cells.
        cells_left: how many cells an interrupted run did not come to.
        stopped: True if the run did not come to its end; the notes say why.
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
        heatmap=_section("largest error over its bound", subjects) + _section("against each other", against),
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
