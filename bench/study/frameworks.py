"""PyTorch against JAX in one cell: the fastest competitor of the one against the fastest of the other.

Plain calls meet plain calls and recorded graphs meet recorded graphs: where one framework has no speed of a kind of
launch, that side is missing, and nothing of another kind stands in for it.

Which one of several equals comes first in its framework is chance, and to choose it by the same rounds that judge it
would favour whoever has more of them. So its error is shared out (Bonferroni) among the pairs of those that tie for the
first place of their framework: the interval holds for each of these pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bench.study.pairing import Rounds, intervals
from bench.study.process_spread import ProcessSpread
from bench.study.statistics import Interval, verdict
from bench.study.winners import leaders

# The verdict is that of the second: its speed over that of the first.
REFERENCE, RIVAL = "torch", "jax"


@dataclass(frozen=True, slots=True)
class FrameworkRatio:
    """The two frameworks in one cell and one kind of launch.

    Attributes:
        torch: label of PyTorch's fastest competitor, an implementation or what users write instead; None where it has
            no speed.
        jax: label of JAX's, or None.
        interval: speed of JAX over that of PyTorch, of these two; None where a side is missing.
        verdict: FASTER, SLOWER, SAME or UNRESOLVED, of JAX against PyTorch; empty where a side is missing.
        confidence: of the interval, so that it holds at 95% however the two were chosen.
    """

    torch: str | None
    jax: str | None
    interval: Interval | None
    verdict: str
    confidence: float


def framework_ratio(
    ranked: Mapping[str, Mapping[str, Rounds]],
    floor: float | None,
    *,
    confidence: float,
    seen: ProcessSpread | None = None,
) -> FrameworkRatio | None:
    """Compares the frameworks in one cell.

    Args:
        ranked: framework to label to rounds, of everybody who is ranked, the fastest first.
        floor: the cell's noise floor as a log ratio, or None.
        confidence: 1 less the chance of a false verdict.
        seen: what is known of the spread of processes on the machine; None leaves it out, as if processes were alike.

    Returns:
        None where neither framework has anybody, or the two fastest share no round.
    """
    if not all(ranked.get(framework) for framework in (REFERENCE, RIVAL)):
        alone = {framework: next(iter(ranked.get(framework) or ()), None) for framework in (REFERENCE, RIVAL)}
        if not any(alone.values()):
            return None
        return FrameworkRatio(alone[REFERENCE], alone[RIVAL], None, "", confidence)
    first: dict[str, str] = {}
    pairs = 1
    for framework in (REFERENCE, RIVAL):
        competitors = ranked[framework]
        tied = leaders(competitors, floor, confidence=confidence, seen=seen)
        first[framework] = tied[0]
        pairs *= len(tied)
    level = 1 - (1 - confidence) / pairs
    torch, jax = first[REFERENCE], first[RIVAL]
    found = intervals(ranked[REFERENCE][torch], {jax: ranked[RIVAL][jax]}, level).get(jax)
    if found is None:
        return None
    spread = 0.0 if seen is None else seen.reach(pairs)
    return FrameworkRatio(torch, jax, found, verdict(found, floor, spread), level)
