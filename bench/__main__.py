"""Command line: `python -m bench run | report | claims | compare | recommend | validate | compress | list | doctor`."""

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer

    from bench.commands.arguments import CsvFile, JaxPython, JsonFile, TorchPython, ending
    from bench.commands.compare import compare_runs
    from bench.commands.inspect import compress, doctor, list_all, validate
    from bench.commands.recommend import recommend
    from bench.commands.report import claims, report
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
def run(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the records and the report.")],
    preset: Annotated[str, typer.Option(help="smoke, seed, workloads, sweep or full; see `list`.")] = "smoke",
    workload: Annotated[list[str] | None, typer.Option(help="Only this workload; may be repeated.")] = None,
    framework: Annotated[list[str] | None, typer.Option(help="Only torch or only jax.")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="Only this competitor; may be repeated.")] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="Only this mode, such as eager, cuda-graph or jit; may be repeated."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[list[str] | None, typer.Option(help="ieee_fp32, tf32, bf16, fp16 or fp64.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, forward_backward or train_step.")] = None,
    division: Annotated[list[str] | None, typer.Option(help="stock, matched or tuned.")] = None,
    cache: Annotated[list[str] | None, typer.Option(help="warm or cold: is the data in the last cache?")] = None,
    optimizer: Annotated[str | None, typer.Option(help="Of train_step, such as adamw or sgd.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each cell.")] = None,
    cell_s: Annotated[float | None, typer.Option(min=0, help="Seconds for the rounds of an unresolved cell.")] = None,
    most_cell_s: Annotated[
        float | None,
        typer.Option(min=0, help="A cell whose A/A control is not known to 3% may go on for so many seconds."),
    ] = None,
    probe_s: Annotated[float | None, typer.Option(min=0, help="Seconds for each further clock; 0: only speed.")] = None,
    prepare_s: Annotated[
        float | None, typer.Option(min=1, help="Most seconds to build and compile a competitor; then it is a timeout.")
    ] = None,
    replicates: Annotated[int | None, typer.Option(min=1, help="Sets of fresh processes.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs and of the order.")] = 0,
    torch_python: TorchPython = None,
    jax_python: JaxPython = None,
    engine: Annotated[str, typer.Option(help="local, or dask: workers that own a device each.")] = "local",
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Of the dask scheduler, with --engine dask.")
    ] = None,
    when_busy: Annotated[
        str,
        typer.Option(help="warn, wait (at most 60 s a cell) or refuse: what a cell does while others use the machine."),
    ] = "warn",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the records in DIR; repeats nothing.")] = False,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
) -> None:
    """Measures a preset and shows the ranking of every workload and direction.

    Exit status: 0 if every timed result was right; 1 after a mismatch or a crash, or if nothing could be timed;
    2 for wrong usage.
    """
    from bench.commands.run import Options, run_command

    options = Options(
        out=out,
        preset=preset,
        workloads=tuple(workload or ()),
        frameworks=tuple(framework or ()),
        implementations=tuple(implementation or ()),
        modes=tuple(mode or ()),
        device=device,
        precisions=tuple(precision or ()),
        directions=tuple(direction or ()),
        divisions=tuple(division or ()),
        caches=tuple(cache or ()),
        optimizer=optimizer,
        rounds=rounds,
        cell_s=cell_s,
        most_cell_s=most_cell_s,
        probe_s=probe_s,
        prepare_s=prepare_s,
        replicates=replicates,
        seed=seed,
        torch_python=torch_python,
        jax_python=jax_python,
        resume=resume,
        when_busy=when_busy,
        json_file=json_file,
        csv_file=csv_file,
        engine=engine,
        scheduler=scheduler,
    )
    raise typer.Exit(run_command(options))


for name, command in {
    "report": report,
    "claims": claims,
    "compare": compare_runs,
    "recommend": recommend,
    "validate": validate,
    "compress": compress,
    "list": list_all,
    "doctor": doctor,
}.items():
    app.command(name)(ending(command))


def main() -> None:
    """Run the console command that an installation puts beside `python -m bench`."""
    run_application(app, "partitioned-linear-bench")


if __name__ == "__main__":
    run_application(app, "python -m bench")
