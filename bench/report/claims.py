"""The article's claims against the measurements, as text, Markdown, JSON and rows."""

from collections.abc import Iterator, Sequence
from typing import Any

from bench.report.export import interval_json
from bench.report.markdown import table
from bench.report.text import ratio
from bench.study.claim_results import ClaimResult

_MEASURED = ("setting", "framework", "claimed", "measured [95%]", "verdict")
_BEST = ("setting", "our fastest implementation", "speed over the torch loop [95%]")


def overview(results: Sequence[ClaimResult]) -> list[tuple[str, ...]]:
    """One line for each claim: number, setting, what was claimed, verdict, why."""
    return [
        (str(result.claim.number), result.claim.setting, result.claim.statement, result.verdict, result.why)
        for result in results
    ]


def _measured(result: ClaimResult) -> Iterator[tuple[str, ...]]:
    for found in result.findings:
        yield found.where.title, found.framework, found.part.text, ratio(found.interval), found.verdict or found.reason


def markdown(results: Sequence[ClaimResult], places: Sequence[str]) -> str:
    """The whole account.

    Args:
        results: one for each claim.
        places: lines that say where it was measured.
    """
    lines = ["# The article's claims, measured", "", *(f"- {place}" for place in places), ""]
    lines += table(("#", "setting", "claim", "verdict", "why"), overview(results))
    for result in results:
        lines += ["", f"## Claim {result.claim.number}: {result.claim.statement}", ""]
        lines += [f"Setting: {result.claim.setting}. {result.verdict.capitalize()}. {result.why}", ""]
        if result.findings:
            lines += table(_MEASURED, _measured(result))
        if result.best:
            best = ((found.where.title, found.label, ratio(found.interval)) for found in result.best)
            lines += ["", *table(_BEST, best)]
    lines += ["", "Ratios are speeds over the loop's (bytes over the loop's for memory); the verdicts rest on PyTorch."]
    return "\n".join(lines) + "\n"


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
