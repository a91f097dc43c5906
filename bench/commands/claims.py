"""`bench claims`."""

from dataclasses import replace
from pathlib import Path

from rich.table import Table

from bench.archive import Archive, Damage
from bench.commands.usage import FAILED, OK, UsageError, check_writable, complain, cut_short, tell_damage
from bench.environments import StoreError
from bench.report.claims import MEASURED, claim_rows, claims_block, claims_json, measured, overview
from bench.report.claims import markdown as whole_account
from bench.report.markdown import environment_lines
from bench.report.output import OutputError, columns_of, write_csv, write_json, write_text
from bench.report.page import CLAIMS, PageError, update_page
from bench.report.tables import wide_console
from bench.report.text import ratio
from bench.study.claim_results import ClaimResult, claim_results
from bench.study.process_spread import seen_spreads
from parity_tests.report.interruption import interruptible


def _show(results: list[ClaimResult]) -> None:
    console = wide_console()
    table = Table(title="The article's claims", title_justify="left", show_lines=True)
    for column, width in (("#", 2), ("setting", 28), ("claim", 28), ("verdict", 19), ("why", 75)):
        table.add_column(column, width=width)
    for line in overview(results):
        table.add_row(*line)
    console.print(table)
    for result in results:
        if result.findings:
            shown = Table(title=f"Claim {result.claim.number}: {result.claim.statement}", title_justify="left")
            for column in MEASURED:
                shown.add_column(column, no_wrap=column != "verdict")
            for line in measured(result):
                shown.add_row(*line)
            console.print(shown)
    console.print("Our fastest implementation in the same settings, its speed over that of the torch loop:")
    shown = dict.fromkeys((best.where, best.label, best.interval) for result in results for best in result.best)
    for where, label, interval in shown:
        console.print(f"  {where.title}: {label} {ratio(interval)}", soft_wrap=True)


def claims_command(
    directory: Path,
    json_file: Path | None = None,
    csv_file: Path | None = None,
    markdown: Path | None = None,
    readme: Path | None = None,
) -> int:
    """Runs `bench claims`; whatever the verdicts are, its exit status is 0."""
    damage = Damage()
    try:
        check_writable("--json", json_file)
        check_writable("--csv", csv_file)
        check_writable("--markdown", markdown)
        with interruptible(polled=True) as interruption:
            archive = Archive([directory], damage=damage)
            results = claim_results(interruption.until_asked(archive.cells()), seen_spreads(archive))
            interruption.settle()
            stopped = "interrupted: some cells were left, so that no claim is judged" if interruption.asked else ""
            if stopped:
                results = [replace(result, verdict="interrupted", why=f"{stopped.capitalize()}.") for result in results]
            if damage.sentences and readme is not None:
                # A page shows all of a run or is left as it is.
                raise damage.error()
            if json_file is not None:
                write_json(json_file, claims_json(results, archive.environments) | {"stopped": stopped})
            if csv_file is not None and not stopped:
                rows = list(claim_rows(results))
                write_csv(csv_file, columns_of(rows), rows)
            if markdown is not None:
                known = archive.environments.items()
                places = [line for name, found in known for line in environment_lines(name, found)]
                write_text("--markdown", markdown, whole_account(results, places))
            if readme is not None and not stopped:
                update_page(readme, claims_block(results), CLAIMS, directory.resolve().name)
    except (UsageError, StoreError, OutputError, PageError) as error:
        tell_damage(damage.sentences, FAILED)
        return complain(error)
    _show(results)
    return cut_short(stopped, tell_damage(damage.sentences, OK))
