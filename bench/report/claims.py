"""The article's claims against the measurements, as text, Markdown, JSON and rows."""

from collections.abc import Iterator, Sequence
from typing import Any

from bench.report.export import interval_json
from bench.report.markdown import table
from bench.report.text import ratio
from bench.study.claims import MEMORY, NOT_HERE, ClaimResult
from parity_tests.report.text import markdown_line, markdown_text

MEASURED = ("setting", "framework", "claimed", "measured [95%]", "verdict")
_SUMMARY = ("#", "setting", "claim", "forward", "forward and backward", "verdict")
_BEST = ("setting", "our fastest implementation", "speed over the torch loop [95%]")


def overview(results: Sequence[ClaimResult]) -> list[tuple[str, ...]]:
    """One line for each claim: number, setting, what was claimed, verdict, why."""
    return [
        (str(result.claim.number), result.claim.setting, result.claim.statement, result.verdict, result.why)
        for result in results
    ]


def measured(result: ClaimResult) -> Iterator[tuple[str, ...]]:
    """One line for each part of a claim in each cell: setting, framework, claimed, measured with interval, verdict.

    Cells in which one of the two did not take part say nothing, unless there are no others.
    """
    for found in [found for found in result.findings if not found.absent] or result.findings:
        yield found.where.title, found.framework, found.part.text, ratio(found.interval), found.verdict or found.reason


def markdown(results: Sequence[ClaimResult], places: Sequence[str]) -> str:
    """The whole account.

    Args:
        results: one for each claim.
        places: lines of Markdown that say where it was measured.
    """
    lines = ["# The article's claims, measured", "", *(f"- {place}" for place in places), ""]
    lines += table(("#", "setting", "claim", "verdict", "why"), overview(results))
    for result in results:
        lines += ["", f"## Claim {result.claim.number}: {markdown_text(result.claim.statement)}", ""]
        lines += [markdown_line(f"Setting: {result.claim.setting}. {result.verdict.capitalize()}. {result.why}"), ""]
        if result.findings:
            lines += table(MEASURED, measured(result))
        if result.best:
            best = ((found.where.title, found.label, ratio(found.interval)) for found in result.best)
            lines += ["", *table(_BEST, best)]
    lines += ["", "Ratios are speeds over the loop's (bytes over the loop's for memory); the verdicts rest on PyTorch."]
    return "\n".join(lines) + "\n"


def _range(ratios: Sequence[float]) -> str:
    low, high = (f"{found:.2g}" if found < 1 else f"{found:.3g}" for found in (min(ratios), max(ratios)))
    return f"{low}x" if low == high else f"{low}x to {high}x"


def _of_direction(result: ClaimResult, direction: str) -> str:
    """What PyTorch was measured at in one direction, and ours: the smallest and largest ratio of each case."""
    found: dict[str, list[float]] = {}
    for finding in result.findings:
        if finding.framework == "torch" and finding.interval is not None and finding.where.direction == direction:
            found.setdefault(finding.part.case, []).append(finding.interval.ratio)
    ours = [best.interval.ratio for best in result.best if best.where.direction == direction]
    if ours and result.claim.subject != MEMORY:
        found["ours"] = ours
    return ", ".join(f"{case} {_range(ratios)}" for case, ratios in found.items()) or "-"


def claims_block(results: Sequence[ClaimResult]) -> str:
    """README's block of claims: one line for each, over all precisions and divisions that were measured."""
    rows = []
    for result in results:
        claim, measured = result.claim, result.verdict != NOT_HERE
        figures = [_of_direction(result, name) if measured else "-" for name in ("forward", "forward_backward")]
        verdict = result.verdict if measured else f"{result.verdict}: {result.why[0].lower()}{result.why[1:]}"
        rows.append((str(claim.number), claim.setting, claim.statement, *figures, verdict))
    return "\n".join(["", *table(_SUMMARY, rows), ""])


def claims_json(results: Sequence[ClaimResult], environments: dict[str, Any]) -> dict[str, Any]:
    """The whole account as a JSON object."""
    return {
        "schema_version": 1,
        "environments": environments,
        "claims": [
            {
                "number": result.claim.number,
                "setting": result.claim.setting,
                "claim": result.claim.statement,
                "subject": result.claim.subject,
                "verdict": result.verdict,
                "why": result.why,
                "measured": [
                    {
                        **found.where._asdict(),
                        "framework": found.framework,
                        "case": found.part.case,
                        "relation": found.part.relation,
                        "claimed_ratio": found.part.ratio,
                        "measured_ratio": interval_json(found.interval),
                        "verdict": found.verdict or None,
                        "reason": found.reason,
                    }
                    for found in result.findings
                ],
                "best_implementation": [
                    {**found.where._asdict(), "competitor": found.label, "ratio_to_loop": interval_json(found.interval)}
                    for found in result.best
                ],
            }
            for result in results
        ],
    }


def claim_rows(results: Sequence[ClaimResult]) -> Iterator[dict[str, Any]]:
    """One row for each measured part, and one for a claim without any."""
    for result in results:
        head = {"claim": result.claim.number, "statement": result.claim.statement, "claim_verdict": result.verdict}
        if not result.findings:
            yield head | {"reason": result.why}
        for found in result.findings:
            yield (
                head
                | found.where._asdict()
                | {
                    "framework": found.framework,
                    "case": found.part.case,
                    "relation": found.part.relation,
                    "claimed_ratio": found.part.ratio,
                    "verdict": found.verdict,
                    "reason": found.reason,
                    **(interval_json(found.interval) or {}),
                }
            )
