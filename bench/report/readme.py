"""README's block of results; see `page` for where it goes."""

from typing import Any

from bench.environments import device_name, releases
from bench.report.markdown import environment_lines, framework_lines, table
from bench.report.text import (
    baseline_line,
    byte_count,
    parity,
    place,
    ratio,
    resolution_line,
    seconds,
    summary_line,
    winner_line,
)
from bench.study.pairing import Identity, identity
from bench.study.ranking import BASELINE, Ranking, Row
from bench.study.results import Results
from parity_tests.report.text import html_text, markdown_line

_COLUMNS = ("#", "competitor", "time", "ratio [95%]", "verdict", "asked / observed", "parity", "memory")
# Enough to show the winner, the runner-up and the usual alternatives; the full ranking is in the run's report.
_SHOWN = 5


def _cells(row: Row) -> tuple[str, ...]:
    record = row.record
    return (
        place(row),
        record.label,
        seconds(row.latency_s),
        ratio(row.interval),
        row.verdict,
        f"{record.precision} / {record.observed_precision}",
        parity(record),
        byte_count(record.peak_memory_bytes),
    )


def _shown(ranking: Ranking) -> list[Row]:
    """The fastest few, each framework's best, and further down the baseline and the article's loop and masked forms."""
    landmarks = {"loop", "masked", "dense"}
    timed = [row for row in ranking.rows if row.latency_s is not None]
    best = {row.record.framework: row for row in reversed(timed) if row.rank is not None}
    return [
        row
        for row in timed
        if (row.rank or _SHOWN + 1) <= _SHOWN
        or row.verdict == BASELINE
        or row.record.implementation in landmarks
        or row is best.get(row.record.framework)
    ]


def _alike(one: Identity, other: Identity) -> bool:
    """Whether two cells are of one workload under the same conditions, whatever the direction."""
    return (one.workload, one.how) == (other.workload, other.how)


def results_block(results: Results) -> str:
    """The block between the markers, without them."""
    lines = [
        "",
        *framework_lines(results),
        markdown_line(f"Outcomes over all cells: {summary_line(results.outcomes)}. {resolution_line(results.found)}"),
        "",
    ]
    # A page is read to its end only where it is short: the rankings of the first workload, in the conditions that
    # matter most and so come first, stand for the others.
    shown = identity(results.found[0].first) if results.found else None
    cells = sum(_alike(identity(ranking.first), shown) for ranking in results.found if shown)
    if shown and cells < len(results.found):
        those = f"the {cells} of {shown.workload}" if cells > 1 else f"that of {shown.workload}"
        lines += [
            markdown_line(f"Of {len(results.found)} rankings, {those} in {shown.how};")
            + " `bench report` with `--markdown` writes all.",
            "",
        ]
    # Divisions of one run have environments that differ in nothing else: one of them says it all.
    told: list[tuple[str, dict[str, Any]]] = []
    for environment_id, found in results.places().items():
        here = [ranking for ranking in found if shown and _alike(identity(ranking.first), shown)]
        if environment_id in results.environments:
            fingerprint = results.environments[environment_id]
            known = environment_lines(environment_id, fingerprint)
            place = (device_name(fingerprint), releases(fingerprint))
            lines += [f"- {line}" for line in (known[:1] if place in told and not here else known)] + [""]
            told.append(place)
        for ranking in here:
            # Folded, so that a reader sees every cell's verdict at once and opens the tables that matter to them.
            summary = f"<b>{html_text(ranking.title)}</b>: {html_text(winner_line(ranking))}"
            rows, count = _shown(ranking), len(ranking.rows)
            lines += [f"<details><summary>{summary}</summary>", "", *table(_COLUMNS, map(_cells, rows)), ""]
            lines += [markdown_line(f"{baseline_line(ranking)} {len(rows)} of {count} competitors are shown."), ""]
            lines += ["</details>", ""]
    return "\n".join(lines)
