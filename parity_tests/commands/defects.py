"""Run `python -m parity_tests defects`: plant defects in correct code and count how many the judge kills."""

import dataclasses
import importlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity_tests.commands.usage import (
    FAILED,
    HOLDS,
    check_writable,
    chosen_frameworks,
    chosen_subjects,
    console,
    ended,
    write_outputs,
)
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
from parity_tests.report.files import write_json
from parity_tests.report.interruption import interruptible


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
