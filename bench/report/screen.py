"""Write what a run says on one screen: the answer, who wins where, PyTorch against JAX, and what to ask next."""

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from bench.plan.competitors import CALLS
from bench.report.text import factor, resolution_line, source_line, summary_line, titles, winner_line
from bench.study.cells import four_sizes, identity
from bench.study.ranking import Ranking
from bench.study.results import Results
from bench.study.statistics import FASTER, SAME, SLOWER, Interval

# Of each part; the whole stays within some fifty lines.
_MOST_LINES = 14
_MOST_NAMES = 3


def screen_lines(results: Results, directories: Sequence[str], where: Sequence[str] = ()) -> list[str]:
    """Return the lines of a screen.

    Args:
        results: of one run or several.
        directories: as they were given, for the commands that ask further.
        where: the conditions that were given.
    """
    if not results.found:
        # Stopped before the first cell.
        return [results.stopped or "No cell was read.", f"Outcomes: {summary_line(results.outcomes)}."]
    lines = [
        *filter(None, [results.stopped]),
        *answer(results),
        "",
        "Who wins where (a tie is a tie: none is shown to be faster):",
    ]
    lines += _some(winner_lines(results.found), "cells or groups of them")
    if compared := between_lines(results.found):
        lines += ["", "PyTorch against JAX, the fastest of each (graphs against graphs):", *_some(compared, "groups")]
    return [*lines, "", "What to ask next:", *_next(results, directories, where)]


def _some(lines: Sequence[str], what: str) -> list[str]:
    rest = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], *([f"  and {rest} more {what}; --all shows them"] if rest > 0 else [])]


def answer(results: Results) -> list[str]:
    """Return three sentences: the competitor to begin with, the frameworks, and how far to trust it."""
    cells = [ranking for ranking in results.found if ranking.leaders]
    first = Counter(label for ranking in cells for label in ranking.leaders)
    alone = Counter(ranking.winner for ranking in cells if ranking.winner)
    named = [f"{label} in {count} (alone in {alone[label]})" for label, count in first.most_common(_MOST_NAMES)]
    led = f"Of {len(results.found)} cells, first or tied for the first place: {'; '.join(named)}." if named else ""
    verdicts = Counter(
        found.verdict
        for ranking in results.found
        for found in ranking.framework_ratios.values()
        if found.interval is not None
    )
    open_ = sum(verdicts.values()) - verdicts[FASTER] - verdicts[SLOWER] - verdicts[SAME]
    between = (
        f"PyTorch's fastest leads JAX's in {verdicts[SLOWER]} comparisons and JAX's leads in {verdicts[FASTER]}; "
        f"{verdicts[SAME]} are alike within 2%, {open_} are open."
        if verdicts
        else "No cell has a speed of both PyTorch and JAX, so nothing is said of the two."
    )
    known = source_line({name: results.environments[name] for name in results.places() if name in results.environments})
    return [led or "No competitor could be timed.", between, f"{known} {resolution_line(results.found)}"]


def _kind(ranking: Ranking) -> str:
    where = identity(ranking.first)
    return f"{where.step}, {where.how}, {where.device}"


def winner_lines(found: Sequence[Ranking]) -> list[str]:
    """Return a line for each cell, or for each kind of conditions where there are many cells."""
    if len(found) <= _MOST_LINES:
        return [f"  {title}: {winner_line(ranking)}" for ranking, title in zip(found, titles(found), strict=True)]
    apart: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in found:
        apart[_kind(ranking)].append(ranking)
    lines = []
    for kind, rankings in apart.items():
        won = Counter(ranking.winner for ranking in rankings if ranking.winner)
        tied = Counter(label for ranking in rankings for label in ranking.tied)
        names = sorted(dict.fromkeys((*won, *tied)), key=lambda label: (-won[label] - tied[label], -won[label]))
        said = [f"{label} wins {won[label]}, ties {tied[label]}" for label in names[:_MOST_NAMES]]
        lines.append(f"  {kind} ({len(rankings)} cells): {'; '.join(said) or 'nothing was timed'}")
    return lines


def between_lines(found: Sequence[Ranking]) -> list[str]:
    """Return a line for each kind of conditions: how often either framework leads, and by how much."""
    apart: dict[str, list[tuple[str, Interval]]] = defaultdict(list)
    for ranking in found:
        for kind, between in ranking.framework_ratios.items():
            if between.interval is not None:
                name = _kind(ranking) + ("" if kind == CALLS else ", graphs")
                apart[name].append((between.verdict, between.interval))
    lines = []
    for name, known in apart.items():
        parts = []
        for verdict, leader in ((SLOWER, "PyTorch"), (FASTER, "JAX")):
            # The ratio is JAX's speed over PyTorch's.
            ratios = [one.ratio if verdict == FASTER else 1 / one.ratio for said, one in known if said == verdict]
            if ratios:
                parts.append(f"{leader} leads in {len(ratios)} ({_range(ratios)})")
        rest = sum(said not in (FASTER, SLOWER) for said, _ in known)
        parts += [f"no leader in {rest}"] if rest else []
        lines.append(f"  {name}: {', '.join(parts)}")
    return lines


def _range(ratios: Iterable[float]) -> str:
    low, high = factor(min(ratios := list(ratios))), factor(max(ratios))
    return f"{low}x" if low == high else f"{low}x to {high}x"


def recommend_command(results: Results, directories: Sequence[str]) -> str:
    """Return the command that asks what to use for the first shape of equal partitions; empty without one."""
    first = next((found.first for found in results.found if four_sizes(found.first)), None)
    if first is None:
        return ""
    sizes = {"num-partitions": first.num_partitions, "in-features": first.in_features}
    sizes |= {"out-features": first.out_features, "batch": first.batch}
    shape = " ".join(f"--{name} {size}" for name, size in sizes.items())
    return f"python -m bench recommend {shlex.join(directories)} {shape}"


def _next(results: Results, directories: Sequence[str], where: Sequence[str]) -> list[str]:
    words = shlex.join(directories)
    conditions = "".join(f" --where {shlex.quote(condition)}" for condition in where)
    lines = [f"  python -m bench report {words}{conditions} --all      # every ranking, with reasons and remarks"]
    lines += [f"  python -m bench report {words}{conditions} --html page.html      # as one page for a browser"]
    if command := recommend_command(results, directories):
        lines += [f"  {command}"]
    lines += [f"  python -m bench findings {words}      # what holds in every cell"] if len(directories) == 1 else []
    lines += [f"Outcomes: {summary_line(results.outcomes)}."]
    return lines
