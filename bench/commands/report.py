"""`bench report`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from bench.archive import Archive, Damage
from bench.commands.conditions import selection
from bench.commands.usage import FAILED, OK, UsageError, check_writable, complain, cut_short, tell, tell_damage
from bench.environments import StoreError
from bench.records import Record
from bench.report.chart import ChartError, save_chart
from bench.report.export import write_frameworks, write_summary, write_table
from bench.report.framework_map import save_framework_map
from bench.report.markdown import write_report
from bench.report.output import OutputError
from bench.report.page import RESULTS, PageError, update_page
from bench.report.pytest_benchmark import write_pytest_benchmark
from bench.report.readme import results_block
from bench.report.roofline import save_roofline
from bench.report.tables import show_frameworks, show_rankings, wide_console
from bench.report.text import resolution_line, summary_line
from bench.report.winner_map import save_winner_map
from bench.study.results import Results, read_results
from parity_tests.report.interruption import interruptible


@dataclass(frozen=True)
class Outputs:
    """Where a report is written to, each None unless asked for; see `bench report --help`."""

    markdown: Path | None = None
    json_file: Path | None = None
    csv_file: Path | None = None
    pytest_benchmark: Path | None = None
    chart: Path | None = None
    winner_map: Path | None = None
    roofline: Path | None = None
    framework_map: Path | None = None
    frameworks_csv: Path | None = None
    readme: Path | None = None

    def check(self) -> None:
        """Refuses files that cannot be written, before anything is read."""
        for item in fields(self):
            if item.name != "readme":
                option = "--" + item.name.removesuffix("_file").replace("_", "-")
                check_writable(option, getattr(self, item.name))

    def written(self) -> list[Path]:
        """The files that were asked for."""
        return [path for item in fields(self) if (path := getattr(self, item.name)) is not None]


def _write(
    results: Results,
    directories: Sequence[Path],
    keep: Callable[[Record], bool],
    outputs: Outputs,
    damage: Damage,
) -> None:
    if outputs.chart is not None:
        save_chart(results, outputs.chart)
    if outputs.winner_map is not None:
        save_winner_map(results.found, outputs.winner_map)
    if outputs.roofline is not None:
        save_roofline(results.found, outputs.roofline)
    if outputs.framework_map is not None:
        save_framework_map(results, outputs.framework_map)
    if outputs.markdown is not None:
        write_report("--markdown", outputs.markdown, results)
    if outputs.json_file is not None:
        write_summary(outputs.json_file, results)
    if outputs.csv_file is not None:
        write_table(outputs.csv_file, results)
    if outputs.frameworks_csv is not None:
        write_frameworks(outputs.frameworks_csv, results)
    if outputs.pytest_benchmark is not None:
        write_pytest_benchmark(outputs.pytest_benchmark, Archive(directories, keep, damage))


def report_command(
    directories: Sequence[Path],
    outputs: Outputs,
    *,
    conditions: Sequence[str] = (),
    check: bool = False,
    efficiency: bool = False,
) -> int:
    """Runs `bench report` and returns its exit status."""
    readme, damage = outputs.readme, Damage()
    try:
        if check and readme is None:
            raise UsageError("--check: needs --readme; name the README to check.")
        outputs.check()
        keep = selection("--where", conditions)
        with interruptible(polled=True) as interruption:
            results = read_results(directories, keep, interruption, damage)
            interruption.settle()
            if damage.sentences and (readme is not None or not results.found):
                # A page shows all of a run or is left as it is.
                raise damage.error()
            if results.stopped:
                # What cannot say that it is cut short stays as it was.
                outputs = Outputs(markdown=outputs.markdown, json_file=outputs.json_file)
                readme = None
            elif not results.found:
                raise UsageError(f"--where: no cell meets {' and '.join(conditions)}; loosen the conditions.")
            if readme is not None:
                fresh = update_page(readme, results_block(results), RESULTS, directories[0].resolve().name, check=check)
                if not fresh:
                    tell(f"the results in {readme} are stale; run this without --check.")
                if check:
                    return OK if fresh else FAILED
            _write(results, directories, keep, outputs, damage)
    except (UsageError, StoreError, ChartError, OutputError, PageError) as error:
        tell_damage(damage.sentences, FAILED)
        return complain(error)
    console = wide_console()
    show_rankings(console, results.found, efficiency=efficiency)
    show_frameworks(console, results)
    console.print(f"Outcomes: {summary_line(results.outcomes)}. {resolution_line(results.found)}")
    if written := outputs.written():
        console.print(f"Written: {', '.join(map(str, written))}.", soft_wrap=True)
    return cut_short(results.stopped, tell_damage(damage.sentences, OK))
