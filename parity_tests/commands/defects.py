"""``python -m parity_tests defects``: plants defects in correct code and counts how many the judge kills."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parity_tests.commands.usage import FAILED, HOLDS, check_writable, chosen_frameworks, chosen_subjects, console
from parity_tests.harness.defects import DEFECTS, killed
from parity_tests.harness.training_defects import TRAINING_DEFECTS
from parity_tests.harness.training_run import training_defect_killed


@dataclass(frozen=True)
class Score:
    """One planted defect and whether it was killed."""

    where: str
    name: str
    dead: bool


def _cell_defects(frameworks: Sequence[str], implementation: str) -> Iterator[Score]:
    for subject in chosen_subjects(frameworks, [implementation], "auto"):
        for defect in DEFECTS:
            for dtype in defect.dtypes:
                yield Score(f"{subject.framework} {dtype}", defect.name, killed(defect, subject, dtype))


def _training_defects(frameworks: Sequence[str]) -> Iterator[Score]:
    if len(frameworks) < 2:
        console.print(f"skipped {len(TRAINING_DEFECTS)} training defects: they need both frameworks")
        return
    for defect in TRAINING_DEFECTS:
        yield Score("training", defect.name, training_defect_killed(defect))


def _pair_defects(frameworks: Sequence[str]) -> Iterator[Score]:
    if len(frameworks) < 2:
        console.print("skipped the defects of user pairs: they need both frameworks")
        return
    from parity_tests.pair.defects import score

    for killing in score():
        yield Score(f"pair {killing.dtype}", killing.name, killing.killed)


def defects(frameworks: Sequence[str], implementation: str, json_file: Path | None) -> int:
    """Plants everything, prints the score, writes it.

    Args:
        frameworks: named frameworks; empty for all that are installed.
        implementation: the healthy subject that is spoiled.
        json_file: where the score goes, or None.

    Returns:
        0 if all are killed, 1 for a survivor or if nothing was planted.
    """
    check_writable("--json", json_file)
    chosen = chosen_frameworks(frameworks)
    scores: list[Score] = []
    for source in (_cell_defects(chosen, implementation), _training_defects(chosen), _pair_defects(chosen)):
        for score in source:
            scores.append(score)
            verdict, style = ("killed  ", None) if score.dead else ("SURVIVED", "red")
            console.print(f"{verdict} {score.where:<15} {score.name}", style=style, highlight=False)
    survivors = [f"{score.where}: {score.name}" for score in scores if not score.dead]
    document = {
        "schema_version": 1,
        "planted": len(scores),
        "killed": len(scores) - len(survivors),
        "survivors": survivors,
    }
    console.print(
        f"planted {document['planted']}, killed {document['killed']}, survivors {len(survivors)}", highlight=False
    )
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    return HOLDS if scores and not survivors else FAILED
