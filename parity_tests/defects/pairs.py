"""Judge pairs that people port, and the bugs that ports have: the bench of the judge itself.

Every pair has a faithful port, which must hold in fp32 and bf16, and bugs, which must be found and whose causes should
be named. `parity_tests.defects.pairs:<pair>` and `:<pair>__<bug>` are factories for `run --pair`.
"""

import functools
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parity_tests.defects import pairs_attention, pairs_basic, pairs_convolution, pairs_sequence
from parity_tests.defects.ported import Bug, Ported
from parity_tests.judge.comparison import UNDECIDED
from parity_tests.judge.records import environment
from parity_tests.pair.check import DEFAULT_ARGUMENTS, judge_pair, prepared
from parity_tests.pair.loading import build
from parity_tests.pair.report import PairReport
from parity_tests.report.text import first_line

PAIRS: dict[str, Ported] = {
    pair.name: pair for room in (pairs_basic, pairs_convolution, pairs_attention, pairs_sequence) for pair in room.PAIRS
}
# All pairs are judged in the first few seeds, these in as many as are asked for: one of each kind, all of them quick.
FEW_SEEDS = 3
MANY_SEEDS = (
    *("linear", "swiglu", "layer_norm", "embedding_padding"),
    *("strided_conv", "average_pool", "attention_pooling", "nlinear"),
)
FAITHFUL_DTYPES = ("float32", "bfloat16")
# Of all planted bugs, the least share whose cause must be named.
LEAST_NAMED = 0.85


@dataclass(frozen=True)
class Judged:
    """Hold the outcome of one check."""

    pair: str  # its name
    bug: str  # the bug's name; empty for the faithful port
    seed: int  # of the draws
    ok: bool  # True for a faithful port that holds, and for a bug that is found
    cause: str = ""  # as named by the report; empty if none was
    right: bool = False  # whether it is the bug's
    place: str = ""  # as named by the report
    # Whether it is the bug's; None where the pair has only one place, or none was named
    place_right: bool | None = None
    why: str = ""  # first line of what is wrong, of a faithful port that does not hold or a check that raised
    skipped: tuple[str, ...] = ()  # dtypes that a framework cannot run
    cpu_s: float = 0.0  # processor time


def __getattr__(name: str) -> Callable[[str], dict[str, Any]]:
    """Return the factory of a pair, or of a pair with a bug, by its name."""
    pair, _, bug = name.partition("__")
    if pair not in PAIRS or (bug and bug not in bugs_of(pair)):
        raise AttributeError(f"{__name__} has no {name!r}; it has {', '.join(PAIRS)}, and <pair>__<bug>")
    return functools.partial(PAIRS[pair].part, bug=bugs_of(pair).get(bug))


def bugs_of(pair: str) -> dict[str, Bug]:
    """Return a pair's bugs by name."""
    return {bug.name: bug for bug in PAIRS[pair].bugs}


def plan(seeds: int, names: Iterable[str] = ()) -> dict[tuple[str, str], range]:
    """Return what is to be judged: the seeds by pair and bug, the empty bug being the faithful port.

    Args:
        seeds: for the pairs of `MANY_SEEDS`; the others are judged in `FEW_SEEDS` at most.
        names: of pairs; empty for all.
    """
    return {
        (name, bug): range(seeds if name in MANY_SEEDS else min(seeds, FEW_SEEDS))
        for name in names or PAIRS
        for bug in ("", *bugs_of(name))
    }


def judged(pair: str, bug: str, seeds: Iterable[int]) -> Iterator[Judged]:
    """Judge one pair, faithful or with a bug, in these seeds; its sides are compiled once."""
    planted = bugs_of(pair).get(bug)
    dtypes = planted.dtypes if planted else FAITHFUL_DTYPES
    for seed, report, cpu_s in _reports(PAIRS[pair], planted, dtypes, seeds):
        if isinstance(report, str):
            yield Judged(pair, bug, seed, False, why=report, cpu_s=cpu_s)
            continue
        skipped = tuple(dict.fromkeys(row.dtype for row in report.rows if row.status == "skipped"))
        if planted is None:
            why = "" if report.ok else next((row.reason for row in report.rows if row.status == "mismatch"), "no rows")
            yield Judged(pair, bug, seed, report.ok, report.likely_cause, why=why, skipped=skipped, cpu_s=cpu_s)
            continue
        found = any(row.status == "mismatch" and row.bound != UNDECIDED for row in report.rows) or report.random
        cause, place = report.likely_cause, getattr(report, "place", "")
        yield Judged(
            *(pair, bug, seed, found, cause),
            right=bool(cause and planted.cause and re.search(planted.cause, cause, re.IGNORECASE)),
            place=place,
            place_right=bool(re.search(planted.place, place)) if planted.place and place else None,
            skipped=skipped,
            cpu_s=cpu_s,
        )


def _reports(
    pair: Ported, bug: Bug | None, dtypes: Sequence[str], seeds: Iterable[int]
) -> Iterator[tuple[int, PairReport | str, float]]:
    """Yield each seed's report, or what was raised in its place, with the processor time it took."""
    left, start = list(seeds), time.process_time()

    def took() -> float:
        nonlocal start
        before, start = start, time.process_time()
        return round(start - before, 2)

    try:
        arguments = {**DEFAULT_ARGUMENTS, **build(functools.partial(pair.part, bug=bug))}
        with prepared(arguments, None) as both:
            while left:
                report = judge_pair(both, left[0], dtypes)
                yield left.pop(0), report, took()
    except Exception as error:
        # A pair that cannot be judged is a fault of the judge like any other: the others are judged all the same.
        while left:
            yield left.pop(0), f"{type(error).__name__}: {first_line(error)}", took()


def score(results: Sequence[Judged]) -> dict[str, Any]:
    """Count what holds, what was found and what was named, and list what failed."""
    faithful, bugs = [r for r in results if not r.bug], [r for r in results if r.bug]
    asked = [r for r in bugs if bugs_of(r.pair)[r.bug].place]
    right = sum(r.right for r in bugs)

    def names(found: Iterable[Judged]) -> list[str]:
        return [f"{r.pair}{'__' * bool(r.bug)}{r.bug} seed {r.seed}" for r in found]

    return {
        "pairs": len({r.pair for r in results}),
        "faithful_judged": len(faithful),
        "faithful_held": sum(r.ok for r in faithful),
        "bugs": len({(r.pair, r.bug) for r in bugs}),
        "bugs_planted": len(bugs),
        "bugs_found": sum(r.ok for r in bugs),
        "causes_named": sum(bool(r.cause) for r in bugs),
        "causes_right": right,
        "causes_wrong": sum(bool(r.cause) and not r.right for r in bugs),
        "causes_right_fraction": right / len(bugs) if bugs else None,
        "places_asked": len(asked),
        "places_named": sum(bool(r.place) for r in asked),
        "places_right": sum(bool(r.place_right) for r in asked),
        "condemned": names(r for r in faithful if not r.ok),
        "survivors": names(r for r in bugs if not r.ok),
        "wrong_causes": names(r for r in bugs if r.cause and not r.right),
        "wrong_places": names(r for r in asked if r.place_right is False),
        "unnamed_causes": names(r for r in bugs if r.ok and not r.cause),
    }


def is_met(counts: dict[str, Any]) -> bool:
    """Tell whether the score is what it must be: nothing condemned, nothing missed, no cause wrong, enough named."""
    judged_any = counts["faithful_judged"] and counts["bugs_planted"]
    failed = counts["condemned"] or counts["survivors"] or counts["wrong_causes"]
    return bool(judged_any and not failed and counts["causes_right_fraction"] >= LEAST_NAMED)


def document(results: Sequence[Judged], seeds: int, stopped: str) -> dict[str, Any]:
    """Return what the score's file holds."""
    return {
        "schema_version": 1,
        "code": code_version(),
        "environment": environment(),
        "seeds": seeds,
        "stopped": stopped,
        "score": score(results),
        "results": [asdict(result) for result in results],
    }


def results_of(found: Any) -> list[Judged]:
    """Return the results that a score's file holds, to go on from them.

    Raises:
        ValueError: if it is no such file, or another version of the judge or of a library wrote it.
    """
    if not isinstance(found, dict) or "results" not in found:
        raise ValueError("expected a score of `defects --pairs`, got another document; name its file, or a new one.")
    for what, here in (("code", code_version()), ("environment", environment())):
        if found.get(what) != here:
            raise ValueError(
                f"expected a score of this version of the judge and its libraries, got one of another ({what}); "
                "judge anew without --resume."
            )
    return [Judged(**{**result, "skipped": tuple(result["skipped"])}) for result in found["results"]]


@functools.cache
def code_version() -> str:
    """Return a hash over what decides the results: the judge's sources, and those of the layer that it ports."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in sorted(path for package in ("parity_tests", "jax_impl") for path in (root / package).rglob("*.py")):
        if "tests" not in path.relative_to(root).parts:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
