"""Run `python -m parity_tests defects --pairs`: judge ported pairs, faithful ones and those with bugs, and count."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parity_tests.commands.usage import (
    FAILED,
    HOLDS,
    check_writable,
    choose,
    chosen_frameworks,
    console,
    ended,
    heartbeat,
    progress_bar,
    refuse,
    write_outputs,
)
from parity_tests.defects import pairs as ported
from parity_tests.report.files import read_text, write_json
from parity_tests.report.interruption import interruptible


def pair_defects(seeds: int, names: Sequence[str], json_file: Path | None, resume: bool) -> int:
    """Judge ported pairs and their bugs, print the score and write it; see `parity_tests.defects.pairs`.

    Args:
        seeds: see `pairs.plan`.
        names: of pairs; empty for all.
        json_file: for the score, or None; it is written after each bug.
        resume: whether to go on from what the file holds.

    Returns:
        0 if the score is what it must be, 1 if not, 130 if interrupted; what was judged until then is written.
    """
    plan = ported.plan(seeds, choose("--pair", names, ported.PAIRS))
    if len(chosen_frameworks(())) < 2:
        raise refuse("--pairs: expected both frameworks, got one; install the extra pair.")
    check_writable("--json", json_file)
    results = _taken_over(json_file) if resume else []
    done = {(r.pair, r.bug, r.seed) for r in results}
    left = {what: [seed for seed in range_ if (*what, seed) not in done] for what, range_ in plan.items()}
    if resume:
        console.print(f"{len(results)} checks are taken over, {sum(map(len, left.values()))} are left")
    stopped, beat = "", heartbeat()

    def write() -> list[str]:
        document = ported.document(results, seeds, stopped)
        return write_outputs((json_file, lambda path: write_json("--json", path, document)))

    with interruptible() as interruption:
        try:
            with progress_bar() as bar:
                task = bar.add_task("pairs", total=len(plan))
                for (pair, bug), asked in left.items():
                    bar.update(task, description=f"{pair} {bug or 'as it should be'}")
                    beat(f"{pair} {bug or 'as it should be'}: {len(results)} checks are done")
                    found = []
                    for result in ported.judged(pair, bug, asked):
                        interruption.check()
                        results.append(result)
                        found.append(result)
                    bar.advance(task)
                    if found:
                        _show(found)
                        write()
            interruption.settle()
        except KeyboardInterrupt:
            stopped = (
                f"interrupted: {len(results)} checks were made, the others were left; --resume goes on from the file"
            )
        failed = write()
    counts = ported.score(results)
    _show_score(counts)
    return ended(HOLDS if ported.is_met(counts) else FAILED, stopped, failed)


def _taken_over(json_file: Path | None) -> list[ported.Judged]:
    """Read all results of the file, also those of pairs that are not asked for now."""
    if json_file is None:
        raise refuse("--resume: expected --json beside it, got none; name the file of the run that was interrupted.")
    if not json_file.exists():
        return []
    try:
        return ported.results_of(json.loads(read_text(json_file)))
    except ValueError as error:
        raise refuse(f"--resume: {json_file}: {error}") from None


def _show(results: Sequence[ported.Judged]) -> None:
    """Print one line about a pair or a bug in all its seeds, and one for each seed that failed."""
    first, good = results[0], sum(r.ok for r in results)
    if not first.bug:
        text = f"{'holds   ' if good == len(results) else 'CONDEMNED'} {good}/{len(results)} {first.pair}"
        text += f" (cannot run {', '.join(first.skipped)})" if first.skipped else ""
    else:
        causes = "right" if all(r.right for r in results) else "none" if not any(r.cause for r in results) else "WRONG"
        causes = "some" if causes == "WRONG" and all(r.right or not r.cause for r in results) else causes
        shown = next((r.cause for r in results if r.cause and not r.right), first.cause)
        text = f"{'found   ' if good == len(results) else 'SURVIVED'} {good}/{len(results)} {first.pair}__{first.bug}"
        text += f"; cause {causes}{': ' * bool(shown)}{shown}"
    console.print(text, style=None if good == len(results) else "red", soft_wrap=True)
    for result in results:
        if result.why:
            console.print(f"    seed {result.seed}: {result.why}", soft_wrap=True)


def _show_score(counts: Mapping[str, Any]) -> None:
    for what in ("condemned", "survivors", "wrong_causes", "wrong_places"):
        for name in counts[what]:
            console.print(f"{what.replace('_', ' ')}: {name}")
    console.print(
        f"{counts['pairs']} pairs: {counts['faithful_held']} of {counts['faithful_judged']} faithful ports held; "
        f"{counts['bugs_found']} of {counts['bugs_planted']} planted bugs ({counts['bugs']} kinds) were found; "
        f"{counts['causes_right']} causes were named rightly ({100 * (counts['causes_right_fraction'] or 0):.0f}%), "
        f"{counts['causes_wrong']} wrongly; {counts['places_right']} of {counts['places_asked']} places rightly",
        soft_wrap=True,
    )
