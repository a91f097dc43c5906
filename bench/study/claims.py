"""Judge the source article's ten claims by measurements.

Case A is one dense map over all features (another function, a yardstick), case B a loop of `n` linears, case C the
masked dense map. The article gives sizes as totals over partitions (1024 is 32 a partition, 8096 is 253) and says
neither what its times include nor which GPU or dtype they are of. The verdict rests on PyTorch's eager mode, which the
article used; JAX's ratios in the same setting are shown beside it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.plan.competitors import DEFAULT_MODE, IMPLEMENTATION
from bench.records import Record
from bench.study.cells import Identity, by_label, identity, intervals, log_latencies
from bench.study.process_spread import NOTHING_SEEN, ProcessSpread
from bench.study.ranking import Ranking, rank_cells
from bench.study.statistics import Interval

DENSE, LOOP, MASKED = "dense", "loop", "masked"
GPU, CPU, MEMORY = "gpu", "cpu", "memory"
AT_LEAST, ABOUT, SLOWER_THAN_LOOP = "at least", "about", "slower"
# "About 2.5x" is kept by anything from 2x to 3.125x: the article rounds, and gives no interval.
ABOUT_FACTOR = 1.25


@dataclass(frozen=True)
class Part:
    """One ratio of a claim."""

    case: str  # the competitor that is compared with `loop`
    relation: str  # `at least`, `about` or `slower`
    ratio: float  # speed over that of `loop`; for memory, bytes over those of `loop`

    @property
    def text(self) -> str:
        """Return the claim in words."""
        if self.relation == SLOWER_THAN_LOOP:
            return f"{self.case} slower than loop"
        return f"{self.case} {self.relation} {self.ratio:g}x"


@dataclass(frozen=True)
class Claim:
    """One claim of the article."""

    number: int  # in the order of the table in the design
    setting: str  # as the article gives it
    statement: str  # as the article gives it
    subject: str  # `gpu`, `cpu` (speed on that device) or `memory`
    workloads: tuple[str, ...]  # names in the catalogue, with sizes per partition
    parts: tuple[Part, ...]  # what is compared


def _both(relation: str, dense: float, masked: float) -> tuple[Part, ...]:
    return (Part(DENSE, relation, dense), Part(MASKED, relation, masked))


CLAIMS: tuple[Claim, ...] = (
    Claim(
        1,
        "batch <= 128, in = out = 1024 in total, n = 32",
        "A and C more than 10x faster than B",
        GPU,
        ("article-base", "article-batch-1"),
        _both(AT_LEAST, 10, 10),
    ),
    Claim(
        2,
        "one dense 1024 -> 1024 in 0.09648 s, the loop in 1.20879 s",
        "A about 12.5x faster than B",
        GPU,
        ("article-base",),
        (Part(DENSE, ABOUT, 12.5),),
    ),
    Claim(3, "batch = 2048", "A only 1.5x faster than B", GPU, ("article-batch-2048",), (Part(DENSE, ABOUT, 1.5),)),
    Claim(4, "n <= 8", "B faster than A and C", GPU, ("article-n8",), _both(SLOWER_THAN_LOOP, 1, 1)),
    Claim(
        5,
        "in = 8096 in total (253 a partition)",
        "A about 2.5x, C about 1.5x faster than B",
        GPU,
        ("article-in8096",),
        _both(ABOUT, 2.5, 1.5),
    ),
    Claim(6, "in = 256 in total", "A and C about 18x faster than B", GPU, ("article-in256",), _both(ABOUT, 18, 18)),
    Claim(
        7,
        "out = 8096 in total (253 a partition)",
        "A about 2.5x, C about 1.5x faster than B",
        GPU,
        ("article-out8096",),
        _both(ABOUT, 2.5, 1.5),
    ),
    Claim(8, "out = 256 in total", "A and C about 18x faster than B", GPU, ("article-out256",), _both(ABOUT, 18, 18)),
    Claim(
        9,
        "on a CPU",
        "masking pays only on a GPU: C slower than B on a CPU",
        CPU,
        ("article-base", "article-batch-1", "article-batch-2048"),
        (Part(MASKED, SLOWER_THAN_LOOP, 1),),
    ),
    Claim(
        10,
        "memory, n = 32",
        "masking costs much more memory: parameters and their gradients are n times larger",
        MEMORY,
        ("article-base", "article-batch-2048"),
        # "Much more" in bytes of a whole call, activations included; the parameters alone are exactly n times larger.
        (Part(MASKED, AT_LEAST, 2),),
    ),
)


# What the claims are about, by name.
CLAIMED_WORKLOADS: frozenset[str] = frozenset(name for claim in CLAIMS for name in claim.workloads)
HOLDS, IN_PART, DOES_NOT, NOT_HERE = "holds", "holds in part", "does not hold", "not measurable here"


@dataclass(frozen=True)
class Finding:
    """One part of a claim in one measured cell."""

    where: Identity  # the conditions
    framework: str  # `torch` or `jax`
    part: Part  # what was claimed
    interval: Interval | None  # the measured ratio, or None where one of the two has no figure
    verdict: str  # `holds`, `holds in part` or `does not hold`; empty without a ratio
    reason: str = ""  # why there is no ratio, else empty
    absent: bool = False  # True if one of the two did not take part at all


@dataclass(frozen=True)
class Best:
    """Our fastest implementation in one cell: its label and its speed over that of the torch loop."""

    where: Identity
    label: str
    interval: Interval


@dataclass(frozen=True)
class ClaimResult:
    """A claim, its measurements, and the verdict on it."""

    claim: Claim
    findings: tuple[Finding, ...]
    best: tuple[Best, ...]
    verdict: str
    why: str


@dataclass(frozen=True)
class _Cell:
    """The records of one cell by competitor, and their ranking."""

    where: Identity
    records: dict[str, list[Record]]
    ranking: Ranking
    seen: ProcessSpread

    def of(self, framework: str, name: str) -> list[Record]:
        return self.records.get(f"{framework} {name} ({DEFAULT_MODE[framework]})", [])


def judge(part: Part, interval: Interval) -> str:
    """Judge if a measured ratio is what was claimed.

    It holds if the whole interval lies where the claim puts it, in part if the direction is right and the size is not.
    """
    if part.relation == AT_LEAST:
        return HOLDS if interval.low >= part.ratio else IN_PART if interval.low > 1 else DOES_NOT
    if part.relation == ABOUT:
        if part.ratio / ABOUT_FACTOR <= interval.ratio <= part.ratio * ABOUT_FACTOR and interval.low > 1:
            return HOLDS
        return IN_PART if interval.low > 1 else DOES_NOT
    # "Slower than the loop": an interval across 1 shows neither.
    return HOLDS if interval.high < 1 else IN_PART if interval.low < 1 else DOES_NOT


def _missing(records: Sequence[Record], name: str) -> str:
    if not records:
        return f"{name} was not measured"
    failed = next((record for record in records if record.status != "ok"), None)
    return "" if failed is None else f"{name}: {failed.reason}"


def _speed(cell: _Cell, loop: Sequence[Record], case: Sequence[Record]) -> Interval | str:
    if cell.ranking.disturbed:
        return "others used the machine while the two were timed"
    found = intervals(log_latencies(loop), {"case": log_latencies(case)}, cell.ranking.confidence)
    return found.get("case", "the two share no process")


def _memory(loop: Sequence[Record], case: Sequence[Record]) -> Interval | str:
    before, after = loop[0].peak_memory_bytes, case[0].peak_memory_bytes
    if not before or not after:
        return "the memory was not measured"
    # One deterministic reading: the interval has no width.
    return Interval(after / before, after / before, after / before, 1)


def _finding(cell: _Cell, framework: str, part: Part, subject: str) -> Finding:
    loop, case = cell.of(framework, LOOP), cell.of(framework, part.case)
    found = _missing(loop, LOOP) or _missing(case, part.case)
    found = found or (_memory(loop, case) if subject == MEMORY else _speed(cell, loop, case))
    if isinstance(found, str):
        return Finding(cell.where, framework, part, None, "", found, absent=not (loop and case))
    # Shown as it was measured, judged with the ratio by which another process may differ.
    return Finding(cell.where, framework, part, found, judge(part, found.across_processes(cell.seen.reach(1))))


def _best(cell: _Cell) -> Best | None:
    loop = cell.of("torch", LOOP)
    first = next((row for row in cell.ranking.rows if row.rank and row.record.kind == IMPLEMENTATION), None)
    if first is None or not loop or any(record.status != "ok" for record in loop):
        return None
    records = cell.records[first.record.label]
    found = intervals(log_latencies(loop), {"best": log_latencies(records)}, cell.ranking.confidence)
    return Best(cell.where, first.record.label, found["best"]) if "best" in found else None


def _conclude(claim: Claim, findings: Sequence[Finding], cells: Sequence[_Cell]) -> tuple[str, str]:
    """Return the verdict and one sentence why; a claim holds if every part does in every cell that was measured."""
    there = {cell.where.workload for cell in cells}
    missing = ", ".join(name for name in claim.workloads if name not in there)
    absent = f" Not among these records: {missing}; run the preset `seed`." if missing else ""
    if not cells:
        return NOT_HERE, absent.strip()
    counted = [found for found in findings if found.framework == "torch" and found.interval is not None]
    devices = {cell.where.device for cell in cells}
    if claim.subject == GPU and "cuda" not in devices:
        return NOT_HERE, f"The claim is about a GPU; on this CPU: {_ranges(counted)}.{absent}"
    if claim.subject == GPU:
        counted = [found for found in counted if found.where.device == "cuda"]
    if claim.subject == CPU:
        if "cpu" not in devices:
            return NOT_HERE, "The claim is about a CPU, and these records are of a GPU."
        counted = [found for found in counted if found.where.device == "cpu"]
    if not counted:
        reasons = dict.fromkeys(found.reason for found in findings if found.reason)
        return NOT_HERE, f"Nothing could be compared: {'; '.join(reasons) or 'PyTorch was not measured'}."
    verdicts = [found.verdict for found in counted]
    held = verdicts.count(HOLDS)
    verdict = HOLDS if held == len(verdicts) else DOES_NOT if set(verdicts) == {DOES_NOT} else IN_PART
    what = "Bytes" if claim.subject == MEMORY else "Speed"
    share = f"in {held} of {len(verdicts)} ratios as claimed"
    return verdict, f"{what} over the loop's, {share}: {_ranges(counted)}.{absent}"


def _ranges(findings: Iterable[Finding]) -> str:
    """Write the smallest and largest ratio of every case, direction and precision."""
    groups: dict[str, list[float]] = defaultdict(list)
    for found in findings:
        if found.interval is not None:
            groups[f"{found.part.case} {found.where.direction} {found.where.precision}"].append(found.interval.ratio)
    texts = []
    for name, ratios in groups.items():
        low, high = min(ratios), max(ratios)
        texts.append(f"{name} {low:.2f}x" if low == high else f"{name} {low:.2f}x to {high:.2f}x")
    return ", ".join(texts) or "nothing could be compared"


def claim_results(
    groups: Iterable[Sequence[Record]],
    seen: Mapping[str, ProcessSpread] | None = None,
    ranked: Mapping[tuple[str, str], Ranking] | None = None,
) -> list[ClaimResult]:
    """Judge every claim by cells.

    Args:
        groups: as in `rank_cells`.
        seen: as in `rank_cells`.
        ranked: environment and cell to its ranking, of those that were ranked already.
    """
    known = seen or {}
    cells = [
        _Cell(
            identity(group[0]),
            by_label(group),
            (ranked or {}).get((group[0].environment_id, group[0].cell)) or rank_cells([group], known)[0],
            known.get(group[0].environment_id, NOTHING_SEEN),
        )
        for group in groups
        if group[0].workload in CLAIMED_WORKLOADS and group[0].direction in ("forward", "forward_backward")
    ]
    results = []
    for claim in CLAIMS:
        mine = [cell for cell in cells if cell.where.workload in claim.workloads]
        findings = [
            _finding(cell, framework, part, claim.subject)
            for cell in mine
            for framework in DEFAULT_MODE
            for part in claim.parts
        ]
        best = [found for cell in mine if (found := _best(cell)) is not None]
        results.append(ClaimResult(claim, tuple(findings), tuple(best), *_conclude(claim, findings, mine)))
    return results
