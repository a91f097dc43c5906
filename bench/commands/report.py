"""`bench report` and `bench claims`: show the records of earlier runs, and judge the article's claims by them."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import (
    FAILED,
    OK,
    USAGE,
    Chart,
    CsvFile,
    Directories,
    Directory,
    FrameworkMap,
    FrameworksCsv,
    JsonFile,
    MarkdownFile,
    Page,
    PageFile,
    PictureFolder,
    Roofline,
    ShortFile,
    UsageError,
    Where,
    WinnerMap,
    check_folder,
    check_outputs,
    cut_short,
    reading,
    selection,
    tell,
    tell_damage,
    wide_console,
)
from bench.environments import StoreError
from bench.report.charts import framework_map as draw_framework_map
from bench.report.charts import ratio_chart, roofline_chart
from bench.report.charts import winner_map as draw_winner_map
from bench.report.claims import account, claim_rows, claims_block, claims_json, measured, overview
from bench.report.export import write_csv, write_frameworks, write_summary, write_table
from bench.report.markdown import (
    CLAIMS,
    RESULTS,
    environment_lines,
    results_block,
    update_page,
    write_report,
    write_short,
)
from bench.report.page import write_page
from bench.report.pictures import ChartError, save_figures, save_picture
from bench.report.screen import screen_lines
from bench.report.sections import PageContent, Told, sections
from bench.report.tables import show_frameworks, show_rankings, terminal
from bench.report.text import ratio, resolution_line, summary_line
from bench.store import Archive, Damage
from bench.study.claims import CLAIMED_WORKLOADS, ClaimResult, claim_results
from bench.study.findings import findings
from bench.study.process_spread import seen_spreads
from bench.study.results import Results, read_results
from parity_tests.report.console import interruptible
from parity_tests.report.files import OutputError, write_json, write_text

_Writer = Callable[[str, Path, Results], None]


def report(
    directories: Directories,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    chart: Chart = None,
    winner_map: WinnerMap = None,
    roofline: Roofline = None,
    framework_map: FrameworkMap = None,
    html: PageFile = None,
    summary: ShortFile = None,
    pictures: PictureFolder = None,
    frameworks_csv: FrameworksCsv = None,
    where: Where = None,
    readme: Page = None,
    check: Annotated[
        bool, typer.Option("--check", help="With --readme: change nothing, exit 1 if it is stale.")
    ] = False,
    efficiency: Annotated[
        bool, typer.Option("--efficiency", help="With --all: rates, shares of the ceilings and compile pay-back too.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Print every ranking with its reasons and remarks, not a screen.")
    ] = False,
) -> int:
    """Show the records of earlier runs, without measuring anything: on one screen, or all of it.

    Exit status: 0 if everything that was asked for was written; 1 if --check finds a stale page; 2 for wrong usage, and
    if an output could not be drawn or written. The others are written all the same.
    """
    outputs: dict[str, tuple[Path | None, _Writer]] = {
        "--chart": (chart, partial(save_picture, ratio_chart)),
        "--winner-map": (winner_map, partial(save_picture, draw_winner_map)),
        "--roofline": (roofline, partial(save_picture, roofline_chart)),
        "--framework-map": (framework_map, partial(save_picture, draw_framework_map)),
        "--markdown": (markdown, write_report),
        "--json": (json_file, lambda _, path, results: write_summary(path, results)),
        "--csv": (csv_file, lambda _, path, results: write_table(path, results)),
        "--frameworks-csv": (frameworks_csv, lambda _, path, results: write_frameworks(path, results)),
        # Before the short report, which shows those that were drawn.
        "--pictures": (pictures, lambda option, path, _: _draw(option, path, page())),
        "--html": (html, lambda option, path, _: write_page(option, path, page())),
        "--summary": (
            summary,
            lambda option, path, _: write_short(option, path, page(), pictures if pictures in written else None),
        ),
    }
    written: list[Path] = []
    failed: list[Exception] = []

    @cache
    def page() -> PageContent:
        return _page(results, directories, where or (), damage.sentences)

    with reading() as damage, interruptible(polled=True) as interruption:
        if check and readme is None:
            raise UsageError("--check: needs --readme; name the page to check.")
        files = {option: path for option, (path, _) in outputs.items() if option != "--pictures"}
        check_outputs(files, readme=readme)
        check_folder("--pictures", pictures)
        results = read_results(directories, selection("--where", where), interruption, damage)
        interruption.settle()
        if damage.sentences and (readme is not None or not results.found):
            # A page shows all of a run or is left as it is.
            raise damage.error()
        if results.stopped:
            # Files that cannot say that they are cut short stay as they were.
            outputs, readme = {option: outputs[option] for option in ("--markdown", "--json")}, None
        elif not results.found:
            raise UsageError(f"--where: no cell meets {' and '.join(where or ())}; loosen the conditions.")
        if readme is not None:
            fresh = update_page(readme, results_block(results), RESULTS, directories[0].resolve().name, check=check)
            if not fresh:
                tell(f"the results in {readme} are stale; run this without --check.")
            if check:
                return OK if fresh else FAILED
            written.append(readme)
        for option, (path, write) in outputs.items():
            if path is None:
                continue
            try:
                write(option, path, results)
                written.append(path)
            except (ChartError, OutputError) as error:
                # One that cannot be drawn is no reason to go without the others.
                failed.append(error)
    console = wide_console()
    if everything or efficiency:
        show_rankings(console, results.found, efficiency=efficiency)
        show_frameworks(console, results)
        console.print(f"Outcomes: {summary_line(results.outcomes)}. {resolution_line(results.found)}")
    else:
        for line in screen_lines(results, list(map(str, directories)), where or ()):
            console.print(line, soft_wrap=True)
    if written:
        console.print(f"Written: {', '.join(map(str, written))}.", soft_wrap=True)
    for error in failed:
        tell(error)
    return cut_short(results.stopped, tell_damage(damage.sentences, USAGE if failed else OK))


def _page(results: Results, directories: Sequence[Path], where: Sequence[str], damage: Sequence[str]) -> PageContent:
    """Return the content of a page; findings and claims need the samples, which are read again."""
    words = ["python", "-m", "bench", "report", *map(str, directories)]
    given = shlex.join([*words, *(word for condition in where for word in ("--where", condition))])
    ranked = {(one.first.environment_id, one.cell): one for one in results.found}
    there = any(one.first.workload in CLAIMED_WORKLOADS for one in results.found)
    told = []
    for directory in directories:
        try:
            archive = Archive([directory], selection("--where", where), Damage())
        except StoreError:
            # Nothing in it can be read, which was said already.
            continue
        seen = seen_spreads(archive)
        judged = claim_results(archive.cells() if there else (), seen, ranked)
        told.append(Told(directory, findings(archive.cells(), seen, ranked=ranked), judged))
    parts, shown = sections(results, told, directories, given)
    names = ", ".join(directory.resolve().name for directory in directories)
    return PageContent(f"Benchmark of {names}", parts, shown, [*filter(None, [results.stopped]), *damage])


def _draw(option: str, folder: Path, content: PageContent) -> None:
    save_figures(option, folder, [picture for part in content.parts for picture in part.pictures], content.shown)


def claims(
    directory: Directory,
    markdown: MarkdownFile = None,
    readme: Page = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> int:
    """Judge the source article's ten claims by measurements, with the reason for each verdict.

    The preset seed has all that they are about. The exit status is 0 whatever the verdicts are.
    """
    with reading() as damage, interruptible(polled=True) as interruption:
        check_outputs({"--json": json_file, "--csv": csv_file, "--markdown": markdown}, readme=readme)
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
            write_json("--json", json_file, claims_json(results, archive.environments) | {"stopped": stopped})
        if csv_file is not None and not stopped:
            write_csv("--csv", csv_file, claim_rows(results))
        if markdown is not None:
            places = [line for name, found in archive.environments.items() for line in environment_lines(name, found)]
            write_text("--markdown", markdown, account(results, places))
        if readme is not None and not stopped:
            update_page(readme, claims_block(results), CLAIMS, directory.resolve().name)
    _show_claims(results)
    return cut_short(stopped, tell_damage(damage.sentences, OK))


def _show_claims(results: list[ClaimResult]) -> None:
    console = wide_console()
    console.print(terminal(overview(results)))
    for result in results:
        if result.findings:
            console.print(terminal(measured(result)))
    console.print("Our fastest implementation in the same settings, its speed over that of the torch loop:")
    for best in dict.fromkeys(best for result in results for best in result.best):
        console.print(f"  {best.where.title}: {best.label} {ratio(best.interval)}", soft_wrap=True)
