"""`bench findings`: sentences about speeds that are derived from records, each with the query behind it."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.commands.arguments import (
    OK,
    CsvFile,
    Directory,
    JsonFile,
    Page,
    UsageError,
    Where,
    check_choices,
    check_outputs,
    cut_short,
    reading,
    selection,
    tell_damage,
)
from bench.report.export import interval_json, write_csv
from bench.report.markdown import EXAMPLES, FINDINGS, HEADLINES, examples_block, findings_block, has_block, update_page
from bench.report.text import source_line
from bench.store import Archive
from bench.study.findings import QUESTIONS, Finding, findings
from bench.study.process_spread import seen_spreads
from parity_tests.report.console import PlainConsole, interruptible
from parity_tests.report.files import write_json


def findings_command(
    directory: Directory,
    question: Annotated[
        list[str] | None, typer.Option(help="Only the answers to this question; may be repeated.")
    ] = None,
    where: Where = None,
    readme: Page = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> int:
    """Derive sentences about speeds from records, each with the query behind it and the command that repeats it.

    A sentence says "in all" only where the verdict of every cell is that, so one that stops being true is not written.
    """
    with reading() as damage, interruptible(polled=True) as interruption:
        check_choices("--question", question or (), [one.name for one in QUESTIONS])
        check_outputs({"--json": json_file, "--csv": csv_file}, readme=readme)
        asked = [one for one in QUESTIONS if not question or one.name in question]
        archive = Archive([directory], selection("--where", where), damage)
        found = findings(interruption.until_asked(archive.cells()), seen_spreads(archive), asked)
        interruption.settle()
        stopped = "interrupted: some cells were left, so that nothing is said" if interruption.asked else ""
        if stopped:
            found = []
        if damage.sentences and (readme is not None or not found):
            # A page shows all of a run or is left as it is.
            raise damage.error()
        if readme is not None and (question or where):
            raise UsageError("--readme: shows all findings of a run; leave out --question and --where.")
        if json_file is not None:
            places = {"environments": archive.environments, "stopped": stopped}
            told = [_finding(one, directory) for one in found]
            write_json("--json", json_file, {"schema_version": 1, "findings": told} | places)
        if csv_file is not None and not stopped:
            write_csv("--csv", csv_file, [row for one in found for row in _rows(one)])
        if readme is not None and not stopped:
            _update(readme, found, directory)
    console = PlainConsole(soft_wrap=True)
    console.print(source_line(archive.environments))
    for one in found:
        console.print(f"- {one.sentence}")
        console.out(f"    {_command('findings', one, directory)}")
    if not found and not stopped:
        console.print("No question has an answer in these cells: both sides of it must be timed in one cell.")
    return cut_short(stopped, tell_damage(damage.sentences, OK))


def _update(readme: Path, found: Sequence[Finding], directory: Path) -> None:
    """Fill the blocks of a page that show this run."""
    name = directory.resolve().name
    blocks = {FINDINGS: findings_block(found, directory.name), HEADLINES: findings_block(found, "", headlines=True)}
    blocks[EXAMPLES] = examples_block(found)
    there = [what for what in blocks if has_block(readme, what, name)] or [FINDINGS]
    for what in there:
        update_page(readme, blocks[what], what, name)


def _command(command: str, one: Finding, directory: Path) -> str:
    """Return the command that repeats a finding, or shows the cells behind it."""
    words = ["python", "-m", "bench", command, str(directory)]
    words += ["--question", one.question.name] if command == "findings" else []
    for condition in one.conditions:
        words += ["--where", condition]
    return shlex.join(words)


def _finding(one: Finding, directory: Path) -> dict[str, Any]:
    ratios = [seen.interval.ratio for seen in one.seen]
    return {
        "question": one.question.name,
        "sentence": one.sentence,
        "holds": one.holds,
        "headline": one.headline,
        "query": {
            "subject": one.question.subject._asdict(),
            "reference": one.question.reference._asdict(),
            "statistic": "speed of the subject over that of the reference in each cell",
            "where": dict(one.where),
        },
        "command": _command("findings", one, directory),
        "cells_command": _command("report", one, directory),
        "least_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "cells": [_cell(seen) for seen in one.seen],
    }


def _cell(seen: Any) -> dict[str, Any]:
    return {**seen.where._asdict(), "ratio": interval_json(seen.interval), "verdict": seen.verdict}


def _rows(one: Finding) -> list[dict[str, Any]]:
    head = {"question": one.question.name, "sentence": one.sentence, "holds": one.holds}
    return [
        head | seen.where._asdict() | (interval_json(seen.interval) or {}) | {"verdict": seen.verdict}
        for seen in one.seen
    ]
