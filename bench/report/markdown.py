"""Rankings as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.records import Record
from bench.report.text import RANKING_COLUMNS, baseline_line, ranking_cells, reasons, summary_line
from bench.study.ranking import Ranking, rankings, tally


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table as lines."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines.extend("| " + " | ".join(map(_escape, row)) + " |" for row in rows)
    return lines


def environment_lines(environment_id: str, found: Mapping[str, Any]) -> list[str]:
    """What a reader must know about where it was measured."""
    git = found.get("git") or {}
    commit = git.get("commit")
    source = (
        "outside a git checkout"
        if commit is None
        else f"commit {commit[:12]}" + (" (modified)" if git["dirty"] else "")
    )
    lines = [
        f"Environment `{environment_id}`: {found['cpu_model']}, {len(found['affinity'])} processors used, "
        f"{found['system']}, device {found['device']}, division {found['division']}, {source}."
    ]
    lines.extend(f"GPU: {gpu}." for gpu in found.get("gpus") or ())
    for name, framework in found["frameworks"].items():
        versions = ", ".join(
            f"{key} {value}" for key, value in framework["versions"].items() if value is not None and "git" not in key
        )
        switches = ", ".join(f"{key}={value}" for key, value in framework["default_switches"].items())
        lines.append(f"{name}: Python {framework['python']}, {versions}. Switches at its start: {switches}.")
    return lines


def ranking_lines(ranking: Ranking, *, level: int = 3) -> list[str]:
    """One ranking: heading, table, baseline, reasons."""
    lines = ["#" * level + " " + ranking.title, ""]
    lines += table(RANKING_COLUMNS, (ranking_cells(row) for row in ranking.rows))
    lines += ["", baseline_line(ranking), *(f"- {line}" for line in reasons(ranking)), ""]
    return lines


def report(records: Sequence[Record], environments: Mapping[str, Mapping[str, Any]], notes: Sequence[str] = ()) -> str:
    """The whole report.

    Args:
        records: of one run or several; those of different environments stay apart.
        environments: id to fingerprint.
        notes: sentences for the top.
    """
    lines = ["# Benchmark report", "", f"Outcomes: {summary_line(tally(records))}.", *notes, ""]
    for environment_id in dict.fromkeys(record.environment_id for record in records):
        lines += ["## Environment " + environment_id, ""]
        if environment_id in environments:
            lines += [f"- {line}" for line in environment_lines(environment_id, environments[environment_id])] + [""]
        for ranking in rankings(record for record in records if record.environment_id == environment_id):
            lines += ranking_lines(ranking)
    lines += [
        "Ratios are paired by round and averaged geometrically; intervals are 95% bootstrap intervals. SAME means that",
        "the whole interval lies within 2% of the baseline, UNRESOLVED that nothing may be said. A yardstick computes",
        "another function and is not ranked.",
    ]
    return "\n".join(lines).rstrip() + "\n"
