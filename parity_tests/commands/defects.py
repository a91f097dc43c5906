"""Run `python -m parity_tests defects`: plant defects in correct code and count how many the judge kills."""

import dataclasses
import importlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity_tests.commands.usage import (
    FAILED,
    HOLDS,
    check_writable,
    choose,
    chosen_frameworks,
    chosen_subjects,
    console,
    ended,
    heartbeat,
    progress_bar,
    refuse,
    write_outputs,
)
from parity_tests.defects import pairs as ported
from parity_tests.defects.layer import (
    DISTRIBUTIONS,
    DTYPES,
    INITIAL_DEFECTS,
    OFF_BLOCK_DEFECTS,
    has_masked_layer,
    layers_of,
    observe_initial,
    observe_off_block,
)
from parity_tests.defects.subject import DEFECTS, observe
from parity_tests.defects.training import TRAINING_DEFECTS, observe_training
from parity_tests.defects.unequal import PLANTED_UNEQUAL, UNEQUAL_CASE, UNEQUAL_DEFECTS
from parity_tests.report.console import interruptible
from parity_tests.report.files import read_text, write_json


@dataclass(frozen=True)
class Score:
    """One planted defect, the verdict on it, and the likely cause that was named."""

    where: str
    name: str
    killed: bool
    cause: str


def _cell_defects(frameworks: Sequence[str], implementation: str) -> Iterator[Score]:
    for subject in chosen_subjects(frameworks, [implementation], "auto"):
        for defect in DEFECTS:
            for dtype in defect.dtypes:
                seen = observe(defect, subject, dtype)
                yield Score(f"{subject.framework} {dtype}", defect.name, seen.killed, seen.cause)
    for subject in chosen_subjects(frameworks, [], "auto", cases=[UNEQUAL_CASE]):
        # Most implementations of equal sizes have no counterpart for unequal ones.
        if subject.implementation in (implementation, *PLANTED_UNEQUAL):
            for defect, dtype in itertools.product(UNEQUAL_DEFECTS, DTYPES):
                seen = observe(defect, subject, dtype)
                where = f"{subject.framework} {subject.implementation} {dtype}"
                yield Score(where, defect.name, seen.killed, seen.cause)


def _layer_defects(frameworks: Sequence[str]) -> Iterator[Score]:
    for framework, dtype in itertools.product(frameworks, DTYPES):
        for layer, init, defect in itertools.product(layers_of(framework), DISTRIBUTIONS, INITIAL_DEFECTS):
            seen = observe_initial(defect, framework, layer, init, dtype)
            yield Score(f"{framework} {layer} {dtype} {init}", defect.name, seen.killed, seen.cause)
        if not has_masked_layer(framework):
            console.print(f"skipped {len(OFF_BLOCK_DEFECTS)} defects in {framework} {dtype}: it has no masked layer")
            continue
        for defect in OFF_BLOCK_DEFECTS:
            seen = observe_off_block(defect, framework, dtype)
            yield Score(f"{framework} masked_layer {dtype}", defect.name, seen.killed, seen.cause)


def _training_defects(frameworks: Sequence[str]) -> Iterator[Score]:
    if len(frameworks) < 2:
        console.print(f"skipped {len(TRAINING_DEFECTS)} training defects: they need both frameworks")
        return
    for defect, dtype in itertools.product(TRAINING_DEFECTS, DTYPES):
        seen = observe_training(defect, dtype)
        yield Score(f"training {dtype}", defect.name, seen.killed, seen.cause)


def _pair_defects(frameworks: Sequence[str]) -> Iterator[Score]:
    if len(frameworks) < 2:
        console.print("skipped the defects of user pairs: they need both frameworks")
        return
    for killing in importlib.import_module("parity_tests.frameworks.jax.defects").score():
        yield Score(f"pair {killing.dtype}", killing.name, killing.killed, killing.likely_cause)


def defects(frameworks: Sequence[str], implementation: str, json_file: Path | None) -> int:
    """Plant all defects, print the score and write it.

    Args:
        frameworks: named frameworks; empty for all that are installed.
        implementation: the healthy subject that is spoiled.
        json_file: for the score, or None.

    Returns:
        0 if all are killed, 1 for a survivor or if nothing was planted, 130 if interrupted; what was planted until then
        is written and printed.
    """
    check_writable("--json", json_file)
    chosen = chosen_frameworks(frameworks)
    scores: list[Score] = []
    sources = (_cell_defects(chosen, implementation), _layer_defects(chosen), _training_defects(chosen))
    stopped = ""
    with interruptible() as interruption:
        try:
            for score in itertools.chain(*sources, _pair_defects(chosen)):
                interruption.check()
                scores.append(score)
                verdict, style = ("killed  ", None) if score.killed else ("SURVIVED", "red")
                line = f"{verdict} {score.where:<33} {score.name}: {score.cause or 'no cause was named'}"
                console.print(line, style=style)
            interruption.settle()
        except KeyboardInterrupt:
            stopped = f"interrupted: {len(scores)} defects were planted, the others were left"
        document = _document(scores, stopped)
        failed = write_outputs((json_file, lambda path: write_json("--json", path, document)))
    console.print(f"planted {document['planted']}, killed {document['killed']}, survivors {len(document['survivors'])}")
    return ended(HOLDS if scores and not document["survivors"] else FAILED, stopped, failed)


def _document(scores: Sequence[Score], stopped: str) -> dict[str, Any]:
    survivors = [f"{score.where}: {score.name}" for score in scores if not score.killed]
    return {
        "schema_version": 1,
        "stopped": stopped,
        "planted": len(scores),
        "killed": len(scores) - len(survivors),
        "survivors": survivors,
        "defects": [dataclasses.asdict(score) for score in scores],
    }


# --- ported pairs ---


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
