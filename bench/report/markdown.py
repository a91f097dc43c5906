"""Rankings as Markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.frameworks import HEADING, LEGEND, framework_line, line, matrices
from bench.report.output import write_text
from bench.report.text import (
    EFFICIENCY_COLUMNS,
    RANKING_COLUMNS,
    baseline_line,
    efficiency_cells,
    ranking_cells,
    reasons,
    remarks,
    resolution_line,
    summary_line,
    winner_line,
)
from bench.study.ranking import Ranking
from bench.study.results import Results
from bench.study.roofline import efficiencies
from parity_tests.report.text import markdown_code, markdown_line, markdown_text


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table as lines."""
    lines = ["| " + " | ".join(map(markdown_text, header)) + " |", "|" + "---|" * len(header)]
    lines.extend("| " + " | ".join(map(markdown_text, row)) + " |" for row in rows)
    return lines


def environment_lines(environment_id: str, found: Mapping[str, Any]) -> list[str]:
    """What a reader must know about where it was measured, as lines of Markdown."""
    git = found.get("git") or {}
    commit = None if git.get("commit") is None else str(git["commit"])
    source = (
        "outside a git checkout"
        if commit is None
        else f"commit {commit[:12]}" + (" (modified)" if git.get("dirty") else "")
    )
    features = "".join(f"{feature}, " for feature in found.get("cpu_features") or ())
    where = (
        f"{found['cpu_model']}, {len(found['affinity'])} processors used, {features}{found['system']}, device "
        f"{found['device']}, division {found['division']}, {source}."
    )
    lines = []
    lines.extend(f"GPU: {gpu}." for gpu in found.get("gpus") or ())
    for name, framework in found["frameworks"].items():
        versions = ", ".join(
            f"{key} {value}" for key, value in framework["versions"].items() if value is not None and "git" not in key
        )
        switches = ", ".join(f"{key}={value}" for key, value in framework["default_switches"].items())
        variables = ", ".join(
            f"{key}={value}" for key, value in (framework.get("variables") or {}).items() if value not in (None, "")
        )
        lines.append(
            f"{name}: Python {framework.get('python')}, {versions}. Switches at its start: {switches}."
            + (f" Variables: {variables}." if variables else "")
        )
    if unset := found.get("unset_variables"):
        named = ", ".join(f"{key}={value}" for key, value in unset.items())
        lines.append(f"Set in the shell, and unset for the measurement: {named}.")
    return [f"Environment {markdown_code(environment_id)}: {markdown_text(where)}", *map(markdown_line, lines)]


def framework_lines(results: Results) -> list[str]:
    """PyTorch against JAX over all cells, a table for each device; nothing where no cell has both."""
    found = matrices(results)
    lines = [LEGEND, ""] if found else []
    for matrix in found:
        columns = matrix.columns
        lines += [f"On {markdown_text(matrix.title)}:", ""] if len(found) > 1 else []
        lines += [*table(("workload", *columns), (line(matrix, row, columns) for row in matrix.rows)), ""]
    return lines


def ranking_lines(ranking: Ranking, *, level: int = 3) -> list[str]:
    """One ranking: heading, table, winner, baseline, reasons, remarks, and how well the machine is used."""
    lines = ["#" * level + " " + markdown_text(ranking.title), ""]
    lines += table(RANKING_COLUMNS, (ranking_cells(row) for row in ranking.rows))
    lines += ["", *map(markdown_line, (winner_line(ranking), *framework_line(ranking), baseline_line(ranking)))]
    lines += [*(f"- {markdown_line(line)}" for line in (*reasons(ranking), *remarks(ranking))), ""]
    found = efficiencies(ranking)
    timed = [row.record.label for row in ranking.rows if row.latency_s is not None]
    if timed:
        lines += [*table(EFFICIENCY_COLUMNS, (efficiency_cells(label, found[label]) for label in timed)), ""]
    return lines


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


def report_lines(results: Results, notes: Sequence[str] = ()) -> Iterator[str]:
    """The whole report, line by line; cells of different environments stay apart.

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
    for environment_id, found in results.places().items():
        yield from ("## Environment " + markdown_text(environment_id), "")
        if environment_id in results.environments:
            known = environment_lines(environment_id, results.environments[environment_id])
            yield from (*(f"- {line}" for line in known), "")
        for ranking in found:
            yield from ranking_lines(ranking)
    yield from _EXPLANATION


def report(results: Results, notes: Sequence[str] = ()) -> str:
    """The whole report as text; see `report_lines`."""
    return "\n".join(report_lines(results, notes)).rstrip() + "\n"


def write_report(argument: str, path: Path, results: Results, notes: Sequence[str] = ()) -> None:
    """Writes the report.

    Raises:
        OutputError: if it cannot be written.
    """
    write_text(argument, path, (line + "\n" for line in report_lines(results, notes)))
