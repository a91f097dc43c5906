"""Say what a page and a short report tell, section by section, in sentences, tables and pictures."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from bench.report.claims import overview
from bench.report.figures import (
    Figures,
    Picture,
    compile_picture,
    figures,
    machine_names,
    memory_picture,
    roofline_picture,
    speed_pictures,
    time_picture,
)
from bench.report.screen import answer, between_lines, recommend_command, winner_lines
from bench.report.tables import Table, training_memory_table
from bench.report.text import environment_sentences, of_bound, percent, resolution_line, source_line, summary_line
from bench.study.claims import ClaimResult
from bench.study.findings import EVERYWHERE, Finding
from bench.study.results import Results
from parity_tests.judge.dtypes import short_name
from parity_tests.report.files import read_text

PARITY_FILE = "parity.json"
# Of sentences, and of the lines of a table, in a page that is read in a minute.
_MOST_FINDINGS = 10
_MOST_LINES = 24


@dataclass(frozen=True)
class Section:
    """One part of a page."""

    name: str  # of its element
    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    more: Sequence[tuple[str, str]] = ()  # further sentences, each with the command that repeats it
    command: str = ""  # that repeats the figures


@dataclass(frozen=True)
class Told:
    """What `bench findings` and `bench claims` say of one run; figures of two machines are never told of together."""

    directory: Path
    findings: Sequence[Finding]
    claims: Sequence[ClaimResult]


@dataclass(frozen=True)
class PageContent:
    """Everything that a page or a short report tells."""

    title: str
    parts: Sequence[Section]
    shown: Figures
    notes: Sequence[str] = ()  # for its top: what was left out


def _noise(results: Results) -> str:
    """Tell in one sentence how small a difference the cells can show."""
    timed = [ranking for ranking in results.found if ranking.baseline is not None]
    least = [one.resolution for one in timed if one.resolution is not None and not math.isinf(one.resolution)]
    if not least:
        return "Nothing is told apart, since no cell has a control and an undisturbed machine."
    disturbed = sum(one.disturbed for one in timed)
    also = f", and {disturbed} of {len(timed)} cells were disturbed and have no verdict" if disturbed else ""
    return f"Differences below {percent(median(least))} are not told apart in the median cell{also}."


def three_sentences(results: Results, told: Sequence[Told]) -> list[str]:
    """Return the answer: who is fastest, the firmest finding of the frameworks, and what cannot be told apart."""
    led, compared, _ = answer(results)
    # That of most cells; where none holds in all of the article's settings, the cells are counted.
    firm = [(len(one.seen), k, one) for k, run in enumerate(told) for one in run.findings if one.headline]
    if firm:
        _, k, one = max(firm, key=lambda found: found[:2])
        compared = _named(told, k) + one.sentence
    return [led, compared, _noise(results)]


def _named(told: Sequence[Told], k: int) -> str:
    """Return the beginning of a sentence about one of several runs."""
    return f"{told[k].directory.resolve().name}: " if len(told) > 1 else ""


def _answer(results: Results, told: Sequence[Told], directories: Sequence[str]) -> Section:
    said = []
    for k, run in enumerate(told):
        matched = [one for one in run.findings if one.where["division"] == "matched"] or run.findings
        firm = sorted(matched, key=lambda one: (one.holds != EVERYWHERE, not one.question.headline, -len(one.seen)))
        for one in firm[:_MOST_FINDINGS]:
            words = ["python", "-m", "bench", "findings", str(run.directory), "--question", one.question.name]
            command = shlex.join([*words, *(word for c in one.conditions for word in ("--where", c))])
            said.append((_named(told, k) + one.sentence, command))
    command = recommend_command(results, directories) or shlex.join(["python", "-m", "bench", "report", *directories])
    return Section("answer", "The answer", three_sentences(results, told), more=said, command=command)


def _claims(told: Sequence[Told]) -> Section:
    commands = [shlex.join(["python", "-m", "bench", "claims", str(run.directory)]) for run in told]
    judged = [k for k, run in enumerate(told) if any(result.findings for result in run.claims)]
    # One table says that nothing was measured as well as several.
    tables = [replace(overview(told[k].claims), title=_named(told, k).rstrip(": ")) for k in judged or (0,) if told]
    said = [] if judged else ["No cell of the article's settings is among these records."]
    return Section("claims", "The article's ten claims", said, tables, command=" && ".join(commands))


def _winners(results: Results, shown: Figures, command: str) -> Section:
    """Return who wins where: a matrix of workloads and conditions where it is short, else a line for each condition."""
    columns, rows = dict[str, None](), dict[str, dict[str, str]]()
    for cell in shown.cells:
        if all(cell[name] == value for name, value in shown.chosen.items()):
            columns[cell["column"]] = None
            line = rows.setdefault(cell["line"], {"workload": cell["workload"], "sizes": cell["sizes"]})
            line[cell["column"]] = _shortened(cell["leaders"])
    heads = ("workload", "sizes", *columns)
    matrix = Table("", heads, [[line.get(name, "-") for name in heads] for line in rows.values()])
    said = ["A tie is a tie: none of those named is shown to be faster than the others (Holm-corrected)."]
    more = [(line.strip(), "") for line in winner_lines(results.found)]
    more += [(f"PyTorch against JAX, {line.strip()}", "") for line in between_lines(results.found)]
    return Section("winners", "Who wins where", said, [matrix], more=more, command=command)


def _shortened(leaders: str) -> str:
    names = leaders.split(", ")
    return leaders if len(names) <= 3 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def parity_account(directories: Sequence[Path]) -> tuple[list[str], list[Table]]:
    """Return what the judge's `parity.json` beside the records says."""
    said, lines = [], []
    for directory in directories:
        path = directory / PARITY_FILE
        if not path.exists():
            said.append(f"No {PARITY_FILE} lies beside the records of {directory.name}: its judge's run is not shown.")
            continue
        try:
            found = json.loads(read_text(path))
            counts = {str(name): int(count) for name, count in found["summary"].items()}
            told = [[str(row[name]) for name in ("framework", "dtype", "status")] for row in found["rows"]]
            worst = [float(row.get("bound_fraction") or 0.0) for row in found["rows"]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            said.append(f"{path.name} of {directory.name} cannot be read ({type(error).__name__}): it is not shown.")
            continue
        said.append(f"The judge's run of {directory.name}: {summary_line(counts)} ({PARITY_FILE}).")
        groups: dict[tuple[str, str], list[int]] = {}
        for k, (framework, dtype, _) in enumerate(told):
            groups.setdefault((framework, dtype), []).append(k)
        for (framework, dtype), places in list(groups.items())[:_MOST_LINES]:
            by_status = Counter(told[k][2] for k in places)
            lines.append(
                (directory.name, framework, dtype, summary_line(by_status), of_bound(max(worst[k] for k in places)))
            )
    columns = ("run", "framework", "dtype", "rows by status", "largest error over its bound")
    return said, [Table("", columns, lines)] if lines else []


def _parity(results: Results, directories: Sequence[Path], command: str) -> Section:
    """Return what the judge said of the models that were timed: a row without parity shows no speed."""
    judged, lines = Counter[tuple[str, str]](), []
    largest: dict[tuple[str, str], float] = {}
    failed = Counter[str]()
    for ranking in results.found:
        for row in ranking.rows:
            r = row.record
            key = (r.framework, short_name(r.precision))
            judged[key] += 1
            largest[key] = max(largest.get(key, 0.0), r.bound_fraction or 0.0)
            failed[f"{r.label}: {r.reason}"] += r.status == "mismatch"
    for (framework, precision), count in judged.items():
        lines.append((framework, precision, str(count), of_bound(largest[framework, precision])))
    wrong = +failed
    said, tables = parity_account(directories)
    said = [
        f"Every timed result was checked first, and again on what was timed last: {summary_line(results.outcomes)}.",
        f"{sum(wrong.values())} competitors gave a wrong result, and show no speed." if wrong else "None was wrong.",
        *said,
    ]
    columns = ("framework", "precision", "competitors", "largest error over its bound")
    own = Table("", columns, lines[:_MOST_LINES])
    more = [(f"{text} ({count} times)", "") for text, count in wrong.most_common(_MOST_FINDINGS)]
    return Section("parity", "Parity", said, [own, *tables], more=more, command=command)


def _noise_section(results: Results, command: str) -> Section:
    groups: dict[tuple[str, ...], list[float]] = {}
    cells, disturbed = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for ranking in results.found:
        first = ranking.first
        key = (first.direction, short_name(first.precision), first.division)
        cells[key] += 1
        disturbed[key] += ranking.disturbed
        groups.setdefault(key, []).extend([] if ranking.half_width is None else [ranking.half_width])
    lines = [
        (
            *key,
            str(cells[key]),
            percent(median(widths)) if widths else "-",
            percent(max(widths)) if widths else "-",
            str(disturbed[key]),
        )
        for key, widths in groups.items()
    ]
    columns = ("direction", "precision", "division", "cells", "A/A half-width, median", "largest", "disturbed cells")
    return Section("noise", "Noise", [resolution_line(results.found)], [Table("", columns, lines)], command=command)


def _environment(results: Results, command: str) -> Section:
    known = {name: results.environments[name] for name in results.places() if name in results.environments}
    more = [(name, "") for name in dict.fromkeys(machine_names(results).values())]
    for name, found in known.items():
        where, *rest = environment_sentences(found)
        more += [(line, "") for line in (f"Environment {name}: {where}", *rest)]
    return Section("environment", "Environment", [source_line(known)], more=more, command=command)


def _drawn(name: str, title: str, pictures: Sequence[Picture], shown: Figures, command: str, *said: str) -> Section:
    """Return a section of pictures; without a figure it says so."""
    there = [picture for picture in pictures if any(True for _ in shown.having(picture))]
    sentences = said if there else ("These records hold no such figure.",)
    return Section(name, title, sentences, pictures=there, command=command)


def sections(
    results: Results, told: Sequence[Told], directories: Sequence[Path], given: str
) -> tuple[list[Section], Figures]:
    """Return the sections of a page in their order, and the figures behind its pictures.

    Args:
        results: of one run or several, at least one cell.
        told: what `bench findings` and `bench claims` say of each.
        directories: of the runs.
        given: the command that reads the same cells, `python -m bench report DIR... --where ...`.
    """
    shown = figures(results)
    names = [str(directory) for directory in directories]
    picked = "".join(f" --where {shlex.quote(f'{name}={value}')}" for name, value in shown.chosen.items())
    pictured = f"{given}{picked} --pictures DIR"
    drawn = _drawn("speed", "Speed against batch, n and size", speed_pictures(), shown, pictured, _SPEED)
    roof = roofline_picture(results.found, shown)
    memory = training_memory_table(results.found)
    return [
        _answer(results, told, names),
        _winners(results, shown, f"{given} --all"),
        drawn,
        _claims(told),
        _drawn("roofline", "Roofline", [roof], shown, pictured, _ROOFLINE),
        _drawn("time", "Where the time goes", [time_picture()], shown, pictured, _TIME),
        replace(
            _drawn(
                "memory",
                "Memory",
                [memory_picture()],
                shown,
                pictured,
                _MEMORY,
                *(memory.caption if memory.rows else ()),
            ),
            tables=[memory] if memory.rows else [],
        ),
        _drawn("compile", "Compile time, and when it pays", [compile_picture()], shown, pictured, _COMPILE),
        _parity(results, directories, f"{given} --markdown report.md"),
        _noise_section(results, f"{given} --all"),
        _environment(results, f"{given} --json report.json"),
    ], shown


_SPEED = (
    "Useful work a second, higher is faster. A bar is the 95% interval of the ratio to the cell's baseline, drawn at "
    "the competitor's own speed; lines join cells that differ in nothing else."
)
_ROOFLINE = (
    "What the machine can do at most, by its bytes (slope) and its operations (flat): measured in the same session, "
    "and by the data sheet where it is known. The leaders are named. What stays in a cache may lie above the slope."
)
_TIME = (
    "Where the host's mark lies right of the device's, calls are what costs and not the work; a recorded graph or a "
    "compiled program then helps. CPUs have no device mark: their kernels run in the host's own threads."
)
_MEMORY = "Growth over the live arguments during one call, beside the bytes of inputs, parameters and results alone."
_COMPILE = (
    "Compiling pays after so many calls against eager calls of the same implementation, and where none were timed, "
    "as in JAX, against those of the baseline."
)
