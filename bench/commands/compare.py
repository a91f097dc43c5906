"""`bench compare`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from bench.archive import Archive, Damage
from bench.commands.conditions import selection
from bench.commands.usage import FAILED, OK, UsageError, check_writable, complain, cut_short, tell_damage
from bench.environments import StoreError, device_name
from bench.report.export import interval_json
from bench.report.output import OutputError, columns_of, flat, write_csv, write_json
from bench.report.text import ratio
from bench.study.comparison import Change, Comparison, compare
from bench.study.identity import Identity
from bench.study.measured_cells import Measured, measured_cells
from bench.study.overall import Overall
from bench.study.process_spread import seen_spreads
from bench.study.statistics import SAME, UNRESOLVED
from parity_tests.report.console import PlainConsole
from parity_tests.report.interruption import interruptible

# Cells of one run alone whose titles are printed; --json has them all.
NAMED = 3


Cells = Mapping[Identity, Measured]


def _devices(archive: Archive, cells: Cells) -> set[str]:
    """What measured, in words: two runs are comparable only if these agree."""
    return {device_name(archive.environments[cell.ranking.first.environment_id]) for cell in cells.values()}


def _check_devices(first: set[str], second: set[str], names: tuple[Path, Path]) -> None:
    if first != second:
        raise UsageError(
            f"{names[0]} was measured on {'; '.join(sorted(first))} and {names[1]} on {'; '.join(sorted(second))}: "
            "their ratio is one of devices, not of code; add --across-devices to have it all the same."
        )


def _change(change: Change) -> dict[str, Any]:
    where: Mapping[str, Any] = change.where._asdict()
    return {
        **where,
        "cells": 1,
        "competitor": change.label,
        "verdict": change.verdict,
        "ratio_b_to_a": interval_json(change.interval),
        "shift_of_the_others": math.exp(change.shift),
        "ranked": change.ranked,
        "reason": change.reason,
    }


def _overall(one: Overall) -> dict[str, Any]:
    return {
        "cells": one.cells,
        "competitor": one.label,
        "verdict": one.verdict,
        "ratio_b_to_a": interval_json(one.interval),
        "shift_of_the_others": math.exp(one.shift),
        "ranked": one.ranked,
    }


def _json(found: Comparison) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "changes": [_change(change) for change in found.changes],
        "overall": [_overall(one) for one in found.overall],
        "regressions": len(found.regressions) + len(found.overall_regressions),
        "only_a": [where._asdict() for where in found.only_a],
        "only_b": [where._asdict() for where in found.only_b],
        "verdicts_agreeing": found.agreeing,
        "verdicts_contradicting": [
            {
                **one.where._asdict(),
                "competitor": one.label,
                "ratio_to_baseline_b_to_a": interval_json(one.interval),
                "beyond_noise": one.beyond_noise,
            }
            for one in found.contradicting
        ],
        "other_baseline": [where._asdict() for where in found.other_baseline],
        "one_process": found.one_process,
    }


def _show_verdicts(console: PlainConsole, found: Comparison) -> None:
    opposite = found.contradicting
    text = f"{found.agreeing} FASTER or SLOWER in both runs alike, {len(opposite)} contradict"
    if opposite:
        text += f" in {len({one.where for one in opposite})} cells"
        text += f", {sum(one.beyond_noise for one in opposite)} of them beyond both runs' noise"
    console.print(f"Verdicts against the baseline: {text}.")
    for one in opposite:
        how = "beyond" if one.beyond_noise else "within"
        console.print(
            f"  contradiction {how} the noise: {one.label} in {one.where.title}: "
            f"B's ratio over A's {ratio(one.interval)}"
        )


def _show_overall(console: PlainConsole, found: Comparison) -> None:
    # Behind the single cells, so that a long run ends with it.
    if found.overall:
        console.print("All cells of several processes together:")
    for one in found.overall:
        note = "" if one.ranked else " (yardstick)"
        console.print(f"  {one.label:40} {ratio(one.interval):28} {one.verdict}{note}, {one.cells} cells")


def _show(console: PlainConsole, found: Comparison) -> None:
    for where, group in groupby(found.changes, key=lambda change: change.where):
        changes = list(group)
        shift = math.exp(median(change.shift for change in changes))
        console.print(f"{where.title} (all competitors together: {shift:.2f}x)")
        for change in changes:
            note = "" if change.ranked else " (yardstick)"
            console.print(f"  {change.label:40} {ratio(change.interval):28} {change.verdict}{note} {change.reason}")
    _show_overall(console, found)
    counts = {word: sum(c.verdict == word for c in found.changes) for word in ("FASTER", "SLOWER", SAME, UNRESOLVED)}
    console.print(
        "Speed of B over A, above 1x is faster; the intervals hold for all of them together and include the noise of "
        "both runs (their A/A controls, and of a single process what processes differ by) and the shift that the "
        "competitors of a cell share."
    )
    console.print("In single cells: " + ", ".join(f"{count} {word}" for word, count in counts.items()) + ".")
    _show_verdicts(console, found)
    for title, cells in (
        ("only in A", found.only_a),
        ("only in B", found.only_b),
        ("with another baseline, so that their verdicts are not compared", found.other_baseline),
    ):
        if cells:
            more = f" and {len(cells) - NAMED} more" if len(cells) > NAMED else ""
            named = "; ".join(where.title for where in cells[:NAMED])
            console.print(f"{len(cells)} cells {title}: {named}{more}.")
    for change in found.regressions:
        console.print(f"Regression: {change.label} in {change.where.title}: {ratio(change.interval)} {change.reason}")
    for one in found.overall_regressions:
        console.print(f"Regression: {one.label} over {one.cells} cells: {ratio(one.interval)}")
    if found.one_process:
        console.print(
            "Cells of a single process are among them, which show no change within what processes differ by: as other "
            "cells of the machine show it, or 10% of two competitors where that is not known. Measure both runs with "
            "--replicates 5 to see smaller changes."
        )


def compare_command(
    a: Path,
    b: Path,
    conditions: tuple[Sequence[str], Sequence[str]] = ((), ()),
    json_file: Path | None = None,
    csv_file: Path | None = None,
    *,
    across_devices: bool = False,
) -> int:
    """Runs `bench compare`; its exit status is 1 if anything became slower beyond the noise or lost its answer."""
    damage = Damage()
    try:
        check_writable("--json", json_file)
        check_writable("--csv", csv_file)
        first = Archive([a], selection("--where-a", conditions[0]), damage)
        second = Archive([b], selection("--where-b", conditions[1]), damage)
        with interruptible(polled=True) as interruption:
            seen = seen_spreads(first, second)
            cells = tuple(measured_cells(*run, seen, interruption) for run in ((first, str(a)), (second, str(b))))
            interruption.settle()
            stopped = "interrupted: only cells that were read of both runs are compared" if interruption.asked else ""
            if not across_devices and not stopped:
                _check_devices(_devices(first, cells[0]), _devices(second, cells[1]), (a, b))
            found = compare(*cells)
            if stopped:
                # Nobody knows what the other run has.
                found = replace(found, only_a=(), only_b=())
            elif not found.changes and damage.sentences:
                raise damage.error()
            elif not found.changes:
                raise UsageError(
                    f"{a} and {b}: no competitor was timed in both under the same conditions; compare others."
                )
            if json_file is not None:
                write_json(json_file, _json(found) | {"stopped": stopped})
            if csv_file is not None and not stopped:
                # Those of all cells together have no conditions, and their number of cells.
                rows = [flat(_change(change)) for change in found.changes]
                rows += [flat(_overall(one)) for one in found.overall]
                write_csv(csv_file, columns_of(rows), rows)
    except (UsageError, StoreError, OutputError) as error:
        tell_damage(damage.sentences, FAILED)
        return complain(error)
    _show(PlainConsole(soft_wrap=True), found)
    status = FAILED if found.regressions or found.overall_regressions else OK
    return cut_short(stopped, tell_damage(damage.sentences, status))
