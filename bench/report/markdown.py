"""Write reports as Markdown, and the blocks of a page that commands fill from records.

A block lies between `<!-- results:begin -->` and `<!-- results:end -->` (`claims` for those of `bench claims`,
`findings`, `headlines` or `examples` for those of `bench findings`). A page
that shows several directories gives each a name, that of the directory: `<!-- results:begin h200 -->`.
"""

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench.environments import device_name, releases
from bench.report.sections import PageContent
from bench.report.tables import (
    HEADING,
    LEGEND,
    efficiency_table,
    framework_line,
    framework_table,
    markdown,
    matrices,
    ranking_table,
    training_memory_table,
)
from bench.report.text import (
    baseline_line,
    environment_sentences,
    reasons,
    remarks,
    resolution_line,
    summary_line,
    winner_line,
)
from bench.study.cells import identity
from bench.study.findings import EVERYWHERE, Finding
from bench.study.ranking import BASELINE, Ranking, Row
from bench.study.results import Results
from parity_tests.report.files import read_text, write_text
from parity_tests.report.text import html_text, markdown_code, markdown_line, markdown_text, printable

RESULTS, CLAIMS, FINDINGS, HEADLINES, EXAMPLES = "results", "claims", "findings", "headlines", "examples"
# Of the layers' example models: the workloads that have the sizes of one, and what is asked of the loop it replaces.
_EXAMPLES = {
    "NLinear, DLinear": ("electricity-336-96", "electricity-336-96-time-series"),
    "PeriodicEmbeddings": ("periodic-96-24",),
    "Critics": ("redq", "redq-shared"),
    "RecurrentBlock": ("recurrentgemma-2b-gates-1024", "recurrentgemma-2b-gates"),
    "GroupedOutputProjection": ("deepseek-v4-flash",),
}
_AGAINST_LOOPS = {"PyTorch, eager": "product-or-loop-torch", "JAX, `jit`": "product-or-loop-jax"}
# Enough to show the winner, the runner-up and the usual alternatives; the full ranking is in the run's report.
_SHOWN = 5
# Of a ranking, each with its heading on the page.
_COLUMNS = {name: name for name in ("#", "competitor", "time", "ratio [95%]", "verdict")}
_COLUMNS |= {"precision asked / observed": "asked / observed", "parity (error/bound)": "parity", "memory": "memory"}
# Of a table or a list in the short report.
_MOST_ROWS = 20
_LANDMARKS = {"loop", "masked", "dense"}
_EXPLANATION = (
    "Ratios are paired by round, and averaged geometrically over the middle three fifths of the rounds (over all",
    "where there are fewer than ten); intervals are 95% bootstrap intervals, wider where a run looked several times",
    "before it stopped, and between the frameworks wider by the number of pairs of those that tie. SAME means that",
    "the whole interval lies within 2% of the baseline, UNRESOLVED that nothing may be said. FASTER and SLOWER hold",
    "for all competitors of a cell together (Holm), and need more than the A/A control differs from itself by: of the",
    "estimate, and where that is more than 15%, of the whole interval. With one process they need more than processes",
    "differ by: what several processes of the same machine showed, and where that is not known 10% in a comparison of",
    "two competitors, more among many. More processes tell smaller differences. `1=` marks those that tie for the",
    "first place, since no claim against all others at once holds (Holm). A yardstick computes another function and",
    "is not ranked. The measured ceiling and the data sheet bound the useful work: a share is the least possible time",
    "over the time taken. Compiling pays after so many calls against eager calls of the same implementation, and",
    "where none were timed, as in JAX, against the baseline's.",
)


class PageError(ValueError):
    """A page that cannot be read, or without one well-formed block; the message is one sentence."""


def environment_lines(environment_id: str, found: Mapping[str, Any]) -> list[str]:
    """Describe where it was measured, as lines of Markdown."""
    where, *lines = environment_sentences(found)
    return [f"Environment {markdown_code(environment_id)}: {markdown_text(where)}", *map(markdown_line, lines)]


def framework_lines(results: Results) -> list[str]:
    """Write PyTorch against JAX over all cells, a table for each device; nothing where no cell has both."""
    found = matrices(results)
    lines = [LEGEND, ""] if found else []
    for matrix in found:
        lines += [f"On {markdown_text(matrix.title)}:", ""] if len(found) > 1 else []
        lines += [*markdown(framework_table(matrix)), ""]
    return lines


def ranking_lines(ranking: Ranking) -> list[str]:
    """Write one ranking: heading, table, winner, baseline, reasons, remarks, and how well the machine is used."""
    lines = ["### " + markdown_text(ranking.title), "", *markdown(ranking_table(ranking))]
    lines += ["", *map(markdown_line, (winner_line(ranking), *framework_line(ranking), baseline_line(ranking)))]
    lines += [*(f"- {markdown_line(line)}" for line in (*reasons(ranking), *remarks(ranking))), ""]
    table = efficiency_table(ranking)
    return [*lines, *markdown(table), ""] if table.rows else lines


def report_lines(results: Results, notes: Sequence[str] = ()) -> Iterator[str]:
    """Write the whole report, line by line; cells of different environments stay apart.

    Args:
        results: of one run or several.
        notes: sentences for the top.
    """
    yield from (
        "# Benchmark report",
        "",
        markdown_line(f"Outcomes: {summary_line(results.outcomes)}."),
        resolution_line(results.found),
        *map(markdown_line, (*filter(None, [results.stopped]), *notes)),
        "",
    )
    if overview := framework_lines(results):
        yield from (f"## {HEADING}", "", *overview)
    if (memory := training_memory_table(results.found)).rows:
        yield from (f"## {memory.title}", "", *map(markdown_line, memory.caption), "", *markdown(memory), "")
    for environment_id, found in results.places().items():
        yield from ("## Environment " + markdown_text(environment_id), "")
        if environment_id in results.environments:
            known = environment_lines(environment_id, results.environments[environment_id])
            yield from (*(f"- {line}" for line in known), "")
        for ranking in found:
            yield from ranking_lines(ranking)
    yield from _EXPLANATION


def write_report(argument: str, path: Path, results: Results, notes: Sequence[str] = ()) -> None:
    """Write the report; see `files.output`."""
    write_text(argument, path, (line + "\n" for line in report_lines(results, notes)))


def short_lines(content: PageContent, drawn: str = "") -> Iterator[str]:
    """Write the sections of a page as a short report, line by line.

    Args:
        content: of the page.
        drawn: the folder of the pictures, as a link from here; empty where none were drawn.
    """
    yield from (f"# {markdown_text(content.title)}", "", *map(markdown_line, content.notes))
    for part in content.parts:
        yield from ("", f"## {markdown_text(part.title)}", "")
        for sentence in part.sentences:
            yield from (markdown_line(sentence), "")
        for table in part.tables:
            yield from (f"{markdown_text(table.title)}:", "") if table.title else ()
            yield from markdown(replace(table, rows=table.rows[:_MOST_ROWS]))
            if (rest := len(table.rows) - _MOST_ROWS) > 0:
                yield from ("", f"{rest} more lines are on the page that `--html` writes.")
            yield ""
        for picture in part.pictures if drawn else ():
            yield from (f"![{markdown_text(picture.title)}]({quote(f'{drawn}/{picture.name}.svg')})", "")
        yield from (f"- {markdown_line(text)}" for text, _ in part.more[:_MOST_ROWS])
        if part.command:
            yield from ("", "The figures behind this:", "", f"    {printable(part.command)}")


def write_short(argument: str, path: Path, content: PageContent, folder: Path | None) -> None:
    """Write the short report, with the pictures in a folder, or without; see `files.output`."""
    drawn = "" if folder is None else os.path.relpath(folder, path.parent)
    write_text(argument, path, (line + "\n" for line in short_lines(content, drawn)))


def _shown(ranking: Ranking) -> list[Row]:
    """Choose the fastest few, each framework's best, and further down the baseline and the article's forms."""
    timed = [row for row in ranking.rows if row.latency_s is not None]
    best = {row.record.framework: row for row in reversed(timed) if row.rank is not None}
    return [
        row
        for row in timed
        if (row.rank or _SHOWN + 1) <= _SHOWN
        or row.verdict == BASELINE
        or row.record.implementation in _LANDMARKS
        or row is best.get(row.record.framework)
    ]


def results_block(results: Results) -> str:
    """Return the block of results for a page, without its markers.

    A page is read to its end only where it is short: the rankings of the first workload, in the conditions that matter
    most and so come first, stand for the others.
    """

    def kind(ranking: Ranking) -> tuple[str, str]:
        return ranking.first.workload, identity(ranking.first).how

    outcomes = f"Outcomes over all cells: {summary_line(results.outcomes)}. {resolution_line(results.found)}"
    lines = ["", *framework_lines(results), markdown_line(outcomes), ""]
    shown = kind(results.found[0]) if results.found else None
    cells = sum(kind(ranking) == shown for ranking in results.found)
    if shown and cells < len(results.found):
        those = f"the {cells} of {shown[0]}" if cells > 1 else f"that of {shown[0]}"
        said = markdown_line(f"Of {len(results.found)} rankings, {those} in {shown[1]};")
        lines += [f"{said} `bench report` with `--markdown` writes all.", ""]
    # Divisions of one run have environments that differ in nothing else: one of them says it all.
    told: list[tuple[str, dict[str, Any]]] = []
    for environment_id, found in results.places().items():
        here = [ranking for ranking in found if kind(ranking) == shown]
        if environment_id in results.environments:
            fingerprint = results.environments[environment_id]
            known = environment_lines(environment_id, fingerprint)
            machine = (device_name(fingerprint), releases(fingerprint))
            lines += [f"- {line}" for line in (known[:1] if machine in told and not here else known)] + [""]
            told.append(machine)
        for ranking in here:
            # Folded, so that a reader sees every cell's verdict at once and opens the tables that matter to them.
            rows = _shown(ranking)
            summary = f"<b>{html_text(ranking.title)}</b>: {html_text(winner_line(ranking))}"
            table = ranking_table(ranking, rows=rows).only(_COLUMNS)
            lines += [f"<details><summary>{summary}</summary>", "", *markdown(table), ""]
            count = f"{len(rows)} of {len(ranking.rows)} competitors are shown."
            lines += [markdown_line(f"{baseline_line(ranking)} {count}"), "", "</details>", ""]
    return "\n".join(lines)


def findings_block(found: Sequence[Finding], name: str, *, headlines: bool = False) -> str:
    """Return the block of findings for a page, without its markers: those of the matched division, the firmest first.

    Args:
        found: all findings of a run.
        name: of its directory.
        headlines: only those of the frameworks and modes in the article's settings that hold everywhere, and no query.
    """
    if headlines:
        chosen = [one for one in found if one.headline]
    else:
        matched = [one for one in found if one.where["division"] == "matched"]
        # Of what does not hold everywhere, a page shows the frameworks and modes alone.
        firm = [one for one in matched if one.holds == EVERYWHERE or one.question.headline]
        chosen = sorted(firm, key=lambda one: one.holds != EVERYWHERE)
    lines = [f"- {markdown_line(one.sentence)}" for one in chosen] or ["- No sentence about speeds holds here."]
    if not headlines:
        rest = len(found) - len(chosen)
        more = f", and of {rest} more" if rest else ""
        command = markdown_code(f"python -m bench findings bench/results/{name}")
        lines += ["", f"The query behind each{more}: {command}."]
    return "\n".join(["", *(wrapped for line in lines for wrapped in _wrapped(line)), ""])


def examples_block(found: Sequence[Finding]) -> str:
    """Return the block of the example models for a page: one batched product against the loop, in fp32, matched."""
    told: dict[tuple[str, str], dict[str, str]] = {}
    for one in found:
        for seen in one.seen:
            cell = seen.where
            if (cell.division, cell.precision) == ("matched", "ieee_fp32"):
                times = f"{seen.interval.ratio:.2f}x [{seen.interval.low:.2f}, {seen.interval.high:.2f}] {seen.verdict}"
                told.setdefault((cell.workload, cell.direction), {})[one.question.name] = times
    lines = [f"| model | cell | {' | '.join(_AGAINST_LOOPS)} |", "|---|---|---|---|"]
    for model, workloads in _EXAMPLES.items():
        for workload, direction in sorted(key for key in told if key[0] in workloads):
            answers = told[workload, direction]
            times = [answers.get(question, "not measured") for question in _AGAINST_LOOPS.values()]
            lines.append(f"| {model} | `{workload}`, {direction} | {' | '.join(times)} |")
    return "\n".join(["", *lines, ""])


def _wrapped(line: str) -> list[str]:
    """Break a line of a page at its words."""
    return textwrap.wrap(
        line,
        120,
        subsequent_indent="  " if line.startswith("- ") else "",
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def has_block(path: Path, what: str, name: str) -> bool:
    """Return True if a page has the beginning of a block."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError):
        return False
    return markers(what, name)[0] in text or markers(what)[0] in text


def markers(what: str, name: str = "") -> tuple[str, str]:
    """Return the lines before and after a block: `RESULTS` or `CLAIMS`, of a directory's name or of none."""
    suffix = f" {name}" if name else ""
    return f"<!-- {what}:begin{suffix} -->", f"<!-- {what}:end{suffix} -->"


def with_block(text: str, block: str, what: str = RESULTS, name: str = "") -> str:
    """Return a page's text with one block replaced; markers with a name are taken before those without.

    Raises:
        PageError: if the markers are not there exactly once, in order.
    """
    named = markers(what, name)
    begin, end = named if any(marker in text for marker in named) else markers(what)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise PageError(f"expected the markers {begin} and {end} once each, in this order; add them to the file.")
    return text[: text.index(begin) + len(begin)] + f"\n{block}\n" + text[text.index(end) :]


def update_page(path: Path, block: str, what: str, name: str, *, check: bool = False) -> bool:
    """Replace a block of a page, or only check it.

    Returns:
        True if the page is up to date now.

    Raises:
        PageError: if it cannot be read, or lacks the markers.
        OutputError: if it cannot be written.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise PageError(f"--readme: {path} cannot be read ({why}); give an existing file.") from error
    try:
        fresh = with_block(text, block, what, name)
    except PageError as error:
        raise PageError(f"{path}: {error}") from error
    if not check:
        write_text("--readme", path, fresh)
    return fresh == text or not check
