"""Command line of the parity judge: `python -m parity_tests run`, `pairs`, `defects` and `findings`."""

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer

    from parity_tests.commands.usage import choices_help, modes_help
    from parity_tests.interpreters.interpreter import DEFAULT_TIMEOUT_S
    from parity_tests.judge.dtypes import STORAGE_DTYPES
    from parity_tests.judge.inputs import CASE_SETS
    from parity_tests.judge.subjects import FRAMEWORKS
    from parity_tests.report.console import run_application
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


@app.command()
def run(
    framework: Annotated[list[str] | None, typer.Option(help=choices_help(FRAMEWORKS))] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: all.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=modes_help())] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=choices_help(STORAGE_DTYPES))] = None,
    cases: Annotated[str, typer.Option(help=f"Which set of shapes: {', '.join(CASE_SETS)}.")] = "default",
    case: Annotated[list[str] | None, typer.Option(help="Single shapes by name, instead of a set.")] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(help="Only this training, TASK:OPTIMIZER such as partitioned-mlp:adamw; repeat for several."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the inputs.")] = 0,
    precision: Annotated[
        str, typer.Option(help="How fp32 products may be computed: fp32, or tf32 (NVIDIA GPUs).")
    ] = "fp32",
    pair: Annotated[str | None, typer.Option(help="Judge your own pair instead: package.module:factory.")] = None,
    torch_python: Annotated[
        str | None, typer.Option(help="With --pair: run the torch side in this interpreter.")
    ] = None,
    jax_python: Annotated[str | None, typer.Option(help="With --pair: run the Flax side in this interpreter.")] = None,
    timeout_s: Annotated[
        float,
        typer.Option(help="With --pair: seconds that one step may take, such as an import or one call of a side."),
    ] = DEFAULT_TIMEOUT_S,
    dtypes_equal: Annotated[
        bool, typer.Option("--dtypes-equal", help="With --pair: outputs must have one dtype on both sides.")
    ] = False,
    effort: Annotated[
        str, typer.Option(help="With --pair: full, or quick for a look without notes on branches and without causes.")
    ] = "full",
    values: Annotated[
        str, typer.Option(help="With --pair: drawn, or given to judge the torch module's own values too.")
    ] = "drawn",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML, one case a row.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write one self-contained page.")] = None,
) -> None:
    """Compare every implementation with the float64 oracle, torch with JAX, and their training.

    Exit status: 0 all compared cells hold, 1 a mismatch or nothing compared, 2 wrong usage or a pair that could not be
    judged to its end, 130 interrupted.
    """
    from parity_tests.commands.run import Options, run
    from parity_tests.commands.usage import FP32_PRECISIONS, choose, refuse
    from parity_tests.judge.precisions import short_name, storage_dtype

    (asked,) = choose("--precision", [short_name(precision)], FP32_PRECISIONS)
    options = Options(
        frameworks=tuple(framework or ()),
        implementations=tuple(implementation or ()),
        modes=tuple(mode or ()),
        dtypes=tuple(map(storage_dtype, dtype or ())),
        case_set=cases,
        cases=tuple(case or ()),
        trainings=tuple(train or ()),
        device=device,
        seed=seed,
        precision=None if asked == "fp32" else asked,
        json_file=json_file,
        junit_file=junit_file,
        html_file=html_file,
    )
    if pair is None:
        if torch_python is not None or jax_python is not None:
            raise refuse("--torch-python, --jax-python: expected --pair beside an interpreter, got none; name a pair.")
        if timeout_s != DEFAULT_TIMEOUT_S:
            raise refuse("--timeout-s: expected --pair beside a time limit, got none; name a pair.")
        if dtypes_equal:
            raise refuse("--dtypes-equal: expected --pair beside it, got none; name a pair.")
        if effort != "full":
            raise refuse("--effort: expected --pair beside an effort, got none; name a pair.")
        if values != "drawn":
            raise refuse("--values: expected --pair beside values, got none; name a pair.")
        raise typer.Exit(run(options))
    from parity_tests.commands.pair import run_user_pair

    if options.precision is not None:
        raise refuse(f"--precision: expected none beside --pair, got {asked}; a pair's modules say how they compute.")
    raise typer.Exit(run_user_pair(pair, options, torch_python, jax_python, timeout_s, effort, dtypes_equal, values))


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
        from parity_tests.commands.pair_defects import pair_defects

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
