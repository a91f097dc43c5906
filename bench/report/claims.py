"""Show the article's claims against the measurements, as tables, JSON and rows."""

from collections.abc import Iterator, Sequence
from typing import Any

from bench.report.export import interval_json
from bench.report.tables import Table, markdown
from bench.report.text import ratio
from bench.study.claims import MEMORY, NOT_HERE, ClaimResult, Finding
from parity_tests.judge.dtypes import short_name
from parity_tests.report.text import markdown_line, markdown_text


def _why(result: ClaimResult) -> str:
    """Return the reason for a verdict, with the precisions as every command spells them."""
    return " ".join(map(short_name, result.why.split(" ")))


def overview(results: Sequence[ClaimResult]) -> Table:
    """Return one line for each claim: its verdict, and why."""
    rows = [(str(one.claim.number), one.claim.setting, one.claim.statement, one.verdict, _why(one)) for one in results]
    widths = {"#": 2, "setting": 28, "claim": 28, "verdict": 19, "why": 75}
    return Table("The article's claims", tuple(widths), rows, widths=widths)


def measured(result: ClaimResult) -> Table:
    """Return one line for each part of a claim in each cell.

    Cells in which one of the two did not take part are left out, unless there are no others.
    """
    rows = [
        (found.where.title, found.framework, found.part.text, ratio(found.interval), found.verdict or found.reason)
        for found in [found for found in result.findings if not found.absent] or result.findings
    ]
    columns = ("setting", "framework", "claimed", "measured [95%]", "verdict")
    return Table(f"Claim {result.claim.number}: {result.claim.statement}", columns, rows, wrapped={"verdict"})


def account(results: Sequence[ClaimResult], places: Sequence[str]) -> str:
    """Return the whole account as Markdown.

    Args:
        results: one for each claim.
        places: lines of Markdown that say where it was measured.
    """
    lines = ["# The article's claims, measured", "", *(f"- {place}" for place in places), ""]
    lines += markdown(overview(results))
    for result in results:
        lines += ["", f"## Claim {result.claim.number}: {markdown_text(result.claim.statement)}", ""]
        lines += [markdown_line(f"Setting: {result.claim.setting}. {result.verdict.capitalize()}. {_why(result)}"), ""]
        if result.findings:
            lines += markdown(measured(result))
        if result.best:
            best = [(found.where.title, found.label, ratio(found.interval)) for found in result.best]
            columns = ("setting", "our fastest implementation", "speed over the torch loop [95%]")
            lines += ["", *markdown(Table("", columns, best))]
    lines += ["", "Ratios are speeds over the loop's (bytes over the loop's for memory); the verdicts rest on PyTorch."]
    return "\n".join(lines) + "\n"


def _range(ratios: Sequence[float]) -> str:
    low, high = (f"{found:.2g}" if found < 1 else f"{found:.3g}" for found in (min(ratios), max(ratios)))
    return f"{low}x" if low == high else f"{low}x to {high}x"


def _of_direction(result: ClaimResult, direction: str) -> str:
    """Write the smallest and largest ratio of each case in PyTorch in one direction, and of ours."""
    found: dict[str, list[float]] = {}
    for finding in result.findings:
        if finding.framework == "torch" and finding.interval is not None and finding.where.direction == direction:
            found.setdefault(finding.part.case, []).append(finding.interval.ratio)
    ours = [best.interval.ratio for best in result.best if best.where.direction == direction]
    if ours and result.claim.subject != MEMORY:
        found["ours"] = ours
    return ", ".join(f"{case} {_range(ratios)}" for case, ratios in found.items()) or "-"


def claims_block(results: Sequence[ClaimResult]) -> str:
    """Return the block of claims for a page: one line for each, over all precisions and divisions."""
    rows = []
    for result in results:
        claim, measured = result.claim, result.verdict != NOT_HERE
        figures = [_of_direction(result, name) if measured else "-" for name in ("forward", "forward_backward")]
        verdict = result.verdict if measured else f"{result.verdict}: {result.why[0].lower()}{result.why[1:]}"
        rows.append((str(claim.number), claim.setting, claim.statement, *figures, verdict))
    columns = ("#", "setting", "claim", "forward", "forward and backward", "verdict")
    return "\n".join(["", *markdown(Table("", columns, rows)), ""])


def _found(found: Finding) -> dict[str, Any]:
    return {
        **found.where._asdict(),
        "framework": found.framework,
        "case": found.part.case,
        "relation": found.part.relation,
        "claimed_ratio": found.part.ratio,
    }


def claims_json(results: Sequence[ClaimResult], environments: dict[str, Any]) -> dict[str, Any]:
    """Return the whole account as a JSON object."""
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
                    _found(found)
                    | {"measured_ratio": interval_json(found.interval), "verdict": found.verdict or None}
                    | {"reason": found.reason}
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
    """Return one row for each measured part, and one for a claim without any."""
    for result in results:
        head = {"claim": result.claim.number, "statement": result.claim.statement, "claim_verdict": result.verdict}
        if not result.findings:
            yield head | {"reason": result.why}
        for found in result.findings:
            verdict = {"verdict": found.verdict, "reason": found.reason}
            yield head | _found(found) | verdict | (interval_json(found.interval) or {})
