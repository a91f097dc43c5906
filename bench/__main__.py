"""Command line: `python -m bench run | report | claims | compare | recommend | validate | compress | list | doctor`."""

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer

    from bench.commands.arguments import CsvFile, Directories, JaxPython, JsonFile, TorchPython, cells_where, picture
    from bench.commands.run import RunOptions, run_command, takes
    from parity_tests.report.console import run_application
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


@app.command()
@takes(RunOptions)
def run(options: RunOptions) -> None:
    """Measure a preset and show the ranking of every workload and direction.

    Exit status: 0 if every timed result was right; 1 after a mismatch or a crash, or if nothing could be timed;
    2 for wrong usage.
    """
    raise typer.Exit(run_command(options))


@app.command()
def report(
    directories: Directories,
    markdown: Annotated[Path | None, typer.Option(metavar="F", help="Write the report as Markdown.")] = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    pytest_benchmark: Annotated[
        Path | None, typer.Option(metavar="F", help="Write the blocks as JSON that pytest-benchmark compares.")
    ] = None,
    chart: Annotated[Path | None, picture("ratios with intervals")] = None,
    winner_map: Annotated[Path | None, picture("who wins at which size")] = None,
    roofline: Annotated[Path | None, picture("rates against the machine's ceilings")] = None,
    framework_map: Annotated[Path | None, picture("PyTorch against JAX")] = None,
    frameworks_csv: Annotated[Path | None, typer.Option(metavar="F", help="The same, one line a cell.")] = None,
    where: Annotated[list[str] | None, cells_where("")] = None,
    readme: Annotated[Path | None, typer.Option(metavar="F", help="Replace the results block of this README.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="With --readme: change nothing, exit 1 if it is stale.")
    ] = False,
    efficiency: Annotated[
        bool, typer.Option("--efficiency", help="Show rates, shares of the ceilings and compile pay-back too.")
    ] = False,
) -> None:
    """Shows the records of earlier runs; measures nothing."""
    from bench.commands.report import Outputs, report_command

    outputs = Outputs(
        markdown=markdown,
        json_file=json_file,
        csv_file=csv_file,
        pytest_benchmark=pytest_benchmark,
        chart=chart,
        winner_map=winner_map,
        roofline=roofline,
        framework_map=framework_map,
        frameworks_csv=frameworks_csv,
        readme=readme,
    )
    raise typer.Exit(report_command(directories, outputs, conditions=where or (), check=check, efficiency=efficiency))


@app.command()
def claims(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a run; the preset seed has it all.")],
    markdown: Annotated[Path | None, typer.Option(metavar="F", help="Write the whole account as Markdown.")] = None,
    readme: Annotated[Path | None, typer.Option(metavar="F", help="Replace the claims block of this README.")] = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> None:
    """Judges the source article's ten claims by measurements: what holds, what does not, and why."""
    from bench.commands.claims import claims_command

    raise typer.Exit(claims_command(directory, json_file, csv_file, markdown, readme))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Directory of the earlier run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Directory of the later run.")],
    across_devices: Annotated[
        bool, typer.Option("--across-devices", help="Compare runs of different devices all the same.")
    ] = False,
    where_a: Annotated[list[str] | None, cells_where("A: ")] = None,
    where_b: Annotated[list[str] | None, cells_where("B: ")] = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> None:
    """Compares two runs: speed of B over A, and whether their verdicts agree.

    Exit status: 0 if nothing became slower beyond the noise; 1 after a regression; 2 for wrong usage.
    """
    from bench.commands.compare import compare_command

    conditions = (where_a or (), where_b or ())
    raise typer.Exit(compare_command(a, b, conditions, json_file, csv_file, across_devices=across_devices))


@app.command()
def recommend(
    directories: Directories,
    num_partitions: Annotated[int, typer.Option(min=1, help="Number of partitions, n.")],
    in_features: Annotated[int, typer.Option(min=1, help="Inputs of one partition.")],
    out_features: Annotated[int, typer.Option(min=1, help="Outputs of one partition.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows that one partition sees.")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or fp64.")] = "fp32",
    precision: Annotated[str | None, typer.Option(help="tf32; default: that of --dtype.")] = None,
    direction: Annotated[str, typer.Option(help="forward or forward_backward.")] = "forward",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the only one that was measured.")] = None,
    framework: Annotated[str | None, typer.Option(help="torch or jax; default: both.")] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Answer even if the nearest measurement is far away.")
    ] = False,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> None:
    """Says which implementation was fastest at the measured sizes nearest to yours, and how near those are.

    Exit status: 0 with an answer; 1 if the nearest measurement is too far away to say anything; 2 for wrong usage.
    """
    from bench.commands.recommend import recommend_command
    from bench.study.recommendation import Shape
    from parity_tests.judge.precisions import precision_class, storage_dtype

    sizes = (batch, num_partitions, in_features, out_features)
    precision = None if precision is None else precision_class(precision)
    shape = Shape(*sizes, storage_dtype(dtype), direction, device, framework, precision)
    raise typer.Exit(
        recommend_command(directories, shape, extrapolate=extrapolate, json_file=json_file, csv_file=csv_file)
    )


@app.command()
def validate(directories: Directories, json_file: JsonFile = None, csv_file: CsvFile = None) -> None:
    """Checks every record against the schema and against itself.

    Exit status: 0 if nothing is wrong, whatever is remarked; 1 if anything is; 2 for wrong usage.
    """
    from bench.commands.validate import validate_command

    raise typer.Exit(validate_command(directories, json_file=json_file, csv_file=csv_file))


@app.command()
def compress(directories: Directories) -> None:
    """Replaces the records of finished runs by compressed ones, as they are published; every command reads both.

    Exit status: 0 if all were compressed; 2 for wrong usage.
    """
    from bench.commands.validate import compress_command

    raise typer.Exit(compress_command(directories))


@app.command(name="list")
def list_(
    torch_python: TorchPython = None,
    jax_python: JaxPython = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> None:
    """List workloads with their sources, presets, and the competitors of the frameworks that are installed."""
    from bench.commands.inspect import list_command

    raise typer.Exit(list_command(torch_python, jax_python, json_file, csv_file))


@app.command()
def doctor(
    torch_python: TorchPython = None,
    jax_python: JaxPython = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> None:
    """Check what a measurement depends on: frameworks, CUDA packages, threads, precision switches, load."""
    from bench.commands.inspect import doctor_command

    raise typer.Exit(doctor_command(torch_python, jax_python, json_file, csv_file))


if __name__ == "__main__":
    run_application(app, "python -m bench")
