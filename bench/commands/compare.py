"""`bench compare`: compare two runs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from statistics import median
from typing import Annotated, Any

import typer

from bench.commands.arguments import (
    FAILED,
    OK,
    CsvFile,
    EarlierRun,
    JsonFile,
    LaterRun,
    UsageError,
    WhereA,
    WhereB,
    check_outputs,
    cut_short,
    reading,
    selection,
    tell_damage,
)
from bench.environments import device_name
from bench.report.export import flat, interval_json, write_csv
from bench.report.text import ratio
from bench.store import Archive
from bench.study.cells import Identity
from bench.study.comparison import Change, Comparison, Measured, Overall, compare, measured_cells
from bench.study.process_spread import seen_spreads
from bench.study.statistics import FASTER, SAME, SLOWER, UNRESOLVED
from parity_tests.report.console import PlainConsole, interruptible
from parity_tests.report.files import write_json

# Cells of one run alone whose titles are printed; --json has them all.
NAMED = 3


def compare_runs(
    a: EarlierRun,
    b: LaterRun,
    across_devices: Annotated[
        bool, typer.Option("--across-devices", help="Compare runs of different devices all the same.")
    ] = False,
    where_a: WhereA = None,
    where_b: WhereB = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> int:
    """Compare two runs: speed of B over A, and whether their verdicts agree.

    Exit status: 0 if nothing became slower beyond the noise; 1 after a regression; 2 for wrong usage.
    """
    with reading() as damage, interruptible(polled=True) as interruption:
        check_outputs({"--json": json_file, "--csv": csv_file})
        first = Archive([a], selection("--where-a", where_a), damage)
        second = Archive([b], selection("--where-b", where_b), damage)
        seen = seen_spreads(first, second)
        before = measured_cells(interruption.until_asked(first.cells()), str(a), seen)
        after = measured_cells(interruption.until_asked(second.cells()), str(b), seen)
        interruption.settle()
        stopped = "interrupted: only cells that were read of both runs are compared" if interruption.asked else ""
        on = [_devices(archive, cells) for archive, cells in ((first, before), (second, after))]
        if on[0] != on[1] and not across_devices and not stopped:
            raise UsageError(
                f"{a} was measured on {'; '.join(sorted(on[0]))} and {b} on {'; '.join(sorted(on[1]))}: their ratio is "
                "one of devices, not of code; add --across-devices to have it all the same."
            )
        found = compare(before, after)
        if stopped:
            # The other run may have them too.
            found = replace(found, only_a=(), only_b=())
        elif not found.changes and damage.sentences:
            raise damage.error()
        elif not found.changes:
            raise UsageError(f"{a} and {b}: no competitor was timed in both under the same conditions; compare others.")
        if json_file is not None:
            write_json("--json", json_file, _json(found) | {"stopped": stopped})
        if csv_file is not None and not stopped:
            # Those of all cells together have no conditions, and their number of cells.
            write_csv("--csv", csv_file, map(flat, [_change(one) for one in (*found.changes, *found.overall)]))
    _show(PlainConsole(soft_wrap=True), found)
    status = FAILED if found.regressions or found.overall_regressions else OK
    return cut_short(stopped, tell_damage(damage.sentences, status))


def _devices(archive: Archive, cells: Mapping[Identity, Measured]) -> set[str]:
    """Return the devices that measured: two runs are comparable only if these agree."""
    return {device_name(archive.environments[cell.ranking.first.environment_id]) for cell in cells.values()}


def _change(one: Change | Overall) -> dict[str, Any]:
    cell = isinstance(one, Change)
    return {
        **(one.where._asdict() if cell else {}),
        "cells": 1 if cell else one.cells,
        "competitor": one.label,
        "verdict": one.verdict,
        "ratio_b_to_a": interval_json(one.interval),
        "shift_of_the_others": math.exp(one.shift),
        "ranked": one.ranked,
        **({"reason": one.reason} if cell else {}),
    }


def _json(found: Comparison) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "changes": [_change(change) for change in found.changes],
        "overall": [_change(one) for one in found.overall],
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


def _line(one: Change | Overall, rest: str) -> str:
    note = "" if one.ranked else " (yardstick)"
    return f"  {one.label:40} {ratio(one.interval):28} {one.verdict}{note}{rest}"


def _show(console: PlainConsole, found: Comparison) -> None:
    for where, group in groupby(found.changes, key=lambda change: change.where):
        changes = list(group)
        shift = math.exp(median(change.shift for change in changes))
        console.print(f"{where.title} (all competitors together: {shift:.2f}x)")
        for change in changes:
            console.print(_line(change, f" {change.reason}"))
    # Behind the single cells, so that a long run ends with it.
    if found.overall:
        console.print("All cells of several processes together:")
    for one in found.overall:
        console.print(_line(one, f", {one.cells} cells"))
    counts = {word: sum(c.verdict == word for c in found.changes) for word in (FASTER, SLOWER, SAME, UNRESOLVED)}
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
            console.print(f"{len(cells)} cells {title}: {'; '.join(where.title for where in cells[:NAMED])}{more}.")
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
