"""Command line of the parity judge: `python -m parity_tests run`, `pairs`, `defects` and `findings`."""

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer

    from parity_tests.commands.run import run
    from parity_tests.commands.usage import Options, choices_help
    from parity_tests.judge.subjects import FRAMEWORKS
    from parity_tests.report.console import ending, run_application, takes
except ModuleNotFoundError as missing:
    # Run by an interpreter into which nothing was installed.
    print(
        f"parity_tests: the package {missing.name} is not installed for {sys.executable}; run `pip install -e .` with "
        "it, or take .venv/bin/python after `make test`.",
        file=sys.stderr,
    )
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


app.command("run")(ending(takes(Options)(run)))


@app.command()
def pairs(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Replace the table of the pairs in this file.")] = None,
) -> None:
    """Judge five pairs of stock modules, made equal and with every default, and list what differs by default.

    Exit status: 0 every pair that was made equal holds, 1 one does not, 2 wrong usage.
    """
    from parity_tests.commands.pair import pairs

    raise typer.Exit(pairs(json_file, readme))


@app.command()
def defects(
    framework: Annotated[list[str] | None, typer.Option(help=choices_help(FRAMEWORKS))] = None,
    implementation: Annotated[str, typer.Option(help="The healthy subject that is spoiled.")] = "matmul",
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Judge ported pairs instead, faithful ones and those with bugs.")
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="With --pairs: seeds (default: 3); more than 3 for eight quick pairs only."),
    ] = None,
    pair: Annotated[list[str] | None, typer.Option(help="With --pairs: only this one; repeat for several.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --pairs: go on from what the --json file holds.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the score to this file.")] = None,
) -> None:
    """Plant defects in copies of correct code and count how many the judge kills.

    Exit status: 0 all killed, 1 a survivor (or nothing planted), 2 wrong usage. With --pairs: 0 if every faithful port
    holds, every bug is found, no cause is named wrongly and 85% are named, else 1.
    """
    from parity_tests.commands.defects import defects
    from parity_tests.commands.usage import refuse

    if pairs:
        if framework:
            raise refuse("--framework: expected none beside --pairs, which need both; leave it out.")
        from parity_tests.commands.defects import pair_defects

        raise typer.Exit(pair_defects(seeds or 3, pair or [], json_file, resume))
    if seeds or pair or resume:
        raise refuse("--seeds, --pair, --resume: expected --pairs beside them, got none; add it.")
    raise typer.Exit(defects(framework or [], implementation, json_file))


@app.command()
def findings(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Measure which known traps of public libraries are present in the installed versions."""
    from parity_tests.commands.findings import findings

    raise typer.Exit(findings(json_file))


def main() -> None:
    """Run the console command that an installation puts beside `python -m parity_tests`."""
    run_application(app, "partitioned-linear-parity")


if __name__ == "__main__":
    run_application(app, "python -m parity_tests")
