"""Command line: `python -m bench COMMAND`.

Commands: `run`, `report`, `claims`, `compare`, `findings`, `recommend`, `validate`, `compress`, `list` and `doctor`.
"""

import sys

try:
    import typer

    from bench.commands.arguments import MISTAKES, complain
    from bench.commands.compare import compare_runs
    from bench.commands.findings import findings_command
    from bench.commands.inspect import compress, doctor, list_all, validate
    from bench.commands.recommend import recommend
    from bench.commands.report import claims, report
    from bench.commands.run import RunOptions, run_command
    from parity_tests.report.console import ending, run_application, takes
except ModuleNotFoundError as missing:
    # Run by an interpreter into which nothing was installed.
    print(
        f"bench: the package {missing.name} is not installed for {sys.executable}; run `pip install -e .` with it, or "
        "take .venv/bin/python after `make compare`.",
        file=sys.stderr,
    )
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


for name, command in {
    "run": takes(RunOptions)(run_command),
    "report": report,
    "claims": claims,
    "compare": compare_runs,
    "findings": findings_command,
    "recommend": recommend,
    "validate": validate,
    "compress": compress,
    "list": list_all,
    "doctor": doctor,
}.items():
    app.command(name)(ending(command, MISTAKES, complain))


def main() -> None:
    """Run the console command that an installation puts beside `python -m bench`."""
    run_application(app, "partitioned-linear-bench")


if __name__ == "__main__":
    run_application(app, "python -m bench")
