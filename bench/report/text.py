"""Write numbers, statuses and the sentences of a ranking, the same in every report."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench.environments import device_name
from bench.records import Record
from bench.study.ranking import Ranking, Row
from bench.study.statistics import COARSE, RESOLUTION, UNKNOWN, Interval

# A log ratio of some 1000%: the digits of anything larger mean nothing.
_LARGEST_SHOWN = 2.4
# More names say less: the JSON lists them all.
_NAMED = 5
MORE_PROCESSES = "more of them, as with --replicates 5, would tell smaller differences"
_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def _scaled(value: float | None, units: tuple[tuple[float, str], ...]) -> str:
    if value is None:
        return "-"
    size, unit = next(((size, unit) for size, unit in units if value >= size), units[-1])
    return f"{value / size:.3g} {unit}" if value / size < 1000 else f"{value / size:.0f} {unit}"


def seconds(value: float | None) -> str:
    """Write seconds with a unit that fits."""
    return _scaled(value, _TIME_UNITS)


def byte_count(value: float | None) -> str:
    """Write bytes with a unit that fits."""
    return _scaled(value, _BYTE_UNITS)


def factor(value: float) -> str:
    """Write a factor with two decimals, and no digits that mean nothing."""
    return "<0.01" if value < 0.005 else ">1000" if value > 1000 else f"{value:.2f}"


def ratio(interval: Interval | None) -> str:
    """Write a ratio with its interval; above 1 is faster than the baseline."""
    if interval is None:
        return "-"
    return f"{factor(interval.ratio)}x [{factor(interval.low)}, {factor(interval.high)}]"


def outcome(record: Record) -> str:
    """Return the status; competitors that a cap kept out are `skipped`."""
    return "skipped" if record.skipped else record.status


def of_bound(fraction: float) -> str:
    """Write which fraction of its bound an error takes; above 1 it fails. Large ones are whole numbers."""
    return f"{fraction:.2g}" if fraction < 99.5 else f"{fraction:.0f}" if fraction < 1e6 else f"{fraction:.0e}"


def parity(record: Record) -> str:
    """Write the status, and how much of the bound the largest error takes."""
    if record.bound_fraction is None:
        return outcome(record)
    return f"{outcome(record)} ({of_bound(record.bound_fraction)})"


def place(row: Row) -> str:
    """Write the rank; `1=` for all that tie for the first place."""
    return "-" if row.rank is None else "1=" if row.tied else str(row.rank)


def share(value: float | None) -> str:
    """Write a fraction as a percentage."""
    return "-" if value is None else f"{value:.1%}"


def calls(value: float | None) -> str:
    """Write a number of calls."""
    return "-" if value is None else "never" if math.isinf(value) else f"{math.ceil(value)} calls"


def rate(value: float | None, unit: str = "FLOP/s") -> str:
    """Write a rate with a unit that fits."""
    units = tuple((10.0**power, prefix + unit) for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (0, "")))
    return _scaled(value, units)


def percent(log_ratio: float) -> str:
    """Write a log ratio as a percentage."""
    return f"{math.expm1(log_ratio):.1%}" if log_ratio < _LARGEST_SHOWN else f"over {math.expm1(_LARGEST_SHOWN):.0%}"


def told_apart(*versions: Sequence[str]) -> list[str]:
    """Return for each item the first of its names, from short to long, that no other item has; else the longest."""
    counted = [Counter(version) for version in versions]
    return [
        next((name for name, count in zip(names, counted, strict=True) if count[name] == 1), names[-1])
        for names in zip(*versions, strict=True)
    ]


def titles(found: Sequence[Ranking]) -> list[str]:
    """Return a heading for each ranking: its conditions, and the environment and cell where others have the same."""
    plain = [ranking.title for ranking in found]
    placed = [f"{ranking.title}, environment {ranking.first.environment_id}" for ranking in found]
    return told_apart(
        plain, placed, [f"{name}, cell {ranking.cell}" for name, ranking in zip(placed, found, strict=True)]
    )


def winner_line(ranking: Ranking) -> str:
    """Name the fastest competitor, or those that cannot be told from it."""
    if ranking.disturbed:
        return "The machine was disturbed while this cell was timed: no competitor is called faster than another."
    if ranking.winner is not None:
        return f"Fastest: {ranking.winner}, against every other competitor (Holm-corrected)."
    if not ranking.tied:
        return "No competitor could be timed."
    if len(ranking.tied) == 1:
        return f"The only competitor that was timed: {ranking.tied[0]}."
    named = ", ".join(ranking.tied[:_NAMED])
    more = len(ranking.tied) - _NAMED
    return f"Tie for the first place: {named}" + (f" and {more} more." if more > 0 else ".")


def baseline_line(ranking: Ranking) -> str:
    """Name the baseline, and the smallest difference that the cell can show."""
    if ranking.baseline is None:
        return "No competitor could be timed, so there is no baseline."
    text = f"Baseline: {ranking.baseline}; above 1x is faster."
    if ranking.disturbed:
        return text
    if ranking.control is None or ranking.floor is None or ranking.resolution is None:
        return f"{text} No A/A control, so nothing is resolved."
    text += f" A/A control {ratio(ranking.control)}: "
    if ranking.floor > UNKNOWN:
        return f"{text}known to no better than a factor of 10, so nothing is resolved."
    noise = percent(ranking.resolution)
    least = "less than " if ranking.resolution < _LARGEST_SHOWN else ""
    text += f"nobody is called faster by {least}{noise}"
    if ranking.floor > COARSE:
        text += ", and only if the whole interval lies beyond the control's"
    if ranking.one_process:
        text += f" (one process; {MORE_PROCESSES})"
    return f"{text}."


def resolution_line(found: Sequence[Ranking]) -> str:
    """Tell how well the A/A controls of a run are known, which limits what it can tell apart."""
    timed = [ranking for ranking in found if ranking.baseline is not None]
    widths = sorted(width for ranking in timed if (width := ranking.half_width) is not None)
    if not widths:
        return "A/A controls: none with an interval, so nothing is resolved."
    fine, disturbed = sum(width < RESOLUTION for width in widths), sum(ranking.disturbed for ranking in timed)
    said = (
        f"A/A controls: half-width below {math.expm1(RESOLUTION):.0%} in {fine} of {len(timed)} cells, "
        f"median {percent(median(widths))}, largest {percent(widths[-1])}."
    )
    if disturbed:
        said += (
            f" In {disturbed} of {len(timed)} cells others used the machine: they have no verdict; measure them again "
            "where nothing else runs, or with --when-busy wait."
        )
    spreads = sorted(ranking.spread_of_processes for ranking in timed if ranking.one_process and not ranking.disturbed)
    if not spreads:
        return said
    low, high = percent(spreads[0]), percent(spreads[-1])
    within = low if low == high else f"{low} to {high}, by the number of competitors"
    return (
        f"{said} One process measured {len(spreads)} of the cells, and names nobody there within {within}: "
        f"{MORE_PROCESSES}."
    )


def reasons(ranking: Ranking) -> list[str]:
    """Return the reason for each competitor without a speed."""
    failed = [row.record for row in ranking.rows if row.record.reason]
    return [f"{r.label}: {r.reason if r.skipped else f'{r.status}, {r.reason}'}" for r in failed]


def remarks(ranking: Ranking) -> list[str]:
    """Return remarks that a reader of a cell's figures should know."""
    found = [f"Remark: {found.sentence}." for found in ranking.short_blocks]
    return found if ranking.disturbance is None else [*found, ranking.disturbance]


def source_line(environments: Mapping[str, Mapping[str, Any]]) -> str:
    """Name the machines and the code that were measured; code that was not committed is said to be so."""
    devices = "; ".join(dict.fromkeys(device_name(found) for found in environments.values()))
    dirty, commits = 0, []
    for found in environments.values():
        git = found.get("git") or {}
        dirty += bool(git.get("dirty"))
        commits += [str(git["commit"])[:12]] if git.get("commit") else []
    source = f"commit {', '.join(dict.fromkeys(commits))}" if commits else "code outside a git checkout"
    changed = f", with changes that were not committed in {dirty} of {len(environments)} environments" if dirty else ""
    return f"Measured on {devices}; {source}{changed}."


def _pairs(found: Mapping[str, Any], without: tuple[Any, ...] = (), sign: str = "=") -> str:
    return ", ".join(f"{key}{sign}{value}" for key, value in found.items() if value not in without)


def environment_sentences(found: Mapping[str, Any]) -> list[str]:
    """Describe where it was measured: the machine and the code, then its GPUs, frameworks and variables."""
    git = found.get("git") or {}
    commit = f"commit {str(git.get('commit'))[:12]}" + (" (modified)" if git.get("dirty") else "")
    source = "outside a git checkout" if git.get("commit") is None else commit
    features = "".join(f"{feature}, " for feature in found.get("cpu_features") or ())
    where = (
        f"{found['cpu_model']}, {len(found['affinity'])} processors used, {features}{found['system']}, device "
        f"{found['device']}, division {found['division']}, {source}."
    )
    lines = [f"GPU: {gpu}." for gpu in found.get("gpus") or ()]
    for name, framework in found["frameworks"].items():
        versions = {key: value for key, value in framework["versions"].items() if "git" not in key}
        variables = _pairs(framework.get("variables") or {}, (None, ""))
        lines.append(
            f"{name}: Python {framework.get('python')}, {_pairs(versions, (None,), ' ')}. Switches at its start: "
            f"{_pairs(framework['default_switches'])}." + (f" Variables: {variables}." if variables else "")
        )
        if (large := framework.get("large_pages")) is not None:
            lines[-1] += f" New arrays of {name} lie in {'large' if large else 'small'} pages."
    if unset := found.get("unset_variables"):
        lines.append(f"Set in the shell, and unset for the measurement: {_pairs(unset)}.")
    return [where, *lines]


def summary_line(counts: Mapping[str, int]) -> str:
    """Count competitors by outcome."""
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "nothing was measured"
