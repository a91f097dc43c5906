"""``python -m parity_tests run --pair`` and ``pairs``: a user's own pair, and the five example pairs."""

from pathlib import Path
from typing import Any

from parity_tests.commands.run import Options, check_files
from parity_tests.commands.usage import (
    DEVICES,
    FAILED,
    HOLDS,
    check_writable,
    choose,
    chosen_frameworks,
    console,
    ended,
    refuse,
    write_outputs,
)
from parity_tests.harness.dtypes import STORAGE_DTYPES
from parity_tests.harness.failures import located
from parity_tests.harness.files import read_text, write_json, write_text
from parity_tests.harness.interruption import interruptible
from parity_tests.pair import PairReport, run_pair


def _refuse_options_of_cells(options: Options) -> None:
    given = {
        "--framework": options.frameworks,
        "--implementation": options.implementations,
        "--case": options.cases,
        "--mode": options.modes,
        "--train": options.trainings,
        "--cases": options.case_set != "default",
    }
    for option, value in given.items():
        if value:
            raise refuse(
                f"{option}: expected none beside --pair, got one; it selects cells of this project's own layer."
            )


def _judged(spec: str, **arguments: Any) -> PairReport:
    try:
        return run_pair(spec, **arguments)
    except ValueError as error:
        raise refuse(f"--pair {spec}: {error}") from None
    except Exception as error:  # a user's modules may raise anything; here a person reads one line
        raise refuse(f"--pair {spec}: expected modules that run on their inputs, got {located(error)}.") from None


def run_user_pair(spec: str, options: Options, torch_python: str | None = None, jax_python: str | None = None) -> int:
    """Judges the pair that ``package.module:factory`` returns, prints the report, writes the files.

    Args:
        spec: ``package.module:factory``.
        options: of the command; those that select cells are refused.
        torch_python: interpreter for the torch side, or None for this one.
        jax_python: the same for the flax side.

    Returns:
        0 if all compared holds, 1 for a mismatch or if nothing was compared.
    """
    check_files(options)
    _refuse_options_of_cells(options)
    choose("--dtype", options.dtypes, STORAGE_DTYPES)
    choose("--device", [options.device], DEVICES)
    overrides: dict[str, Any] = {"device": options.device, "seed": options.seed}
    overrides |= {"dtypes": options.dtypes} if options.dtypes else {}
    pythons = {"torch_python": torch_python, "jax_python": jax_python}
    pythons = {name: python for name, python in pythons.items() if python is not None}
    report = _judged(spec, **overrides, **pythons)
    for line in report.describe().splitlines():
        console.print(line, soft_wrap=True)
    failed = write_outputs(
        (options.json_file, report.to_json),
        (options.junit_file, report.to_junit),
        (options.html_file, report.to_html),
    )
    return ended(HOLDS if report.ok else FAILED, "", failed)


def pairs(json_file: Path | None, readme: Path | None) -> int:
    """Judges the five example pairs, made equal and with every default, and prints what differs by default.

    Args:
        json_file: where the results go, or None.
        readme: file whose table of the pairs is replaced, or None.

    Returns:
        0 if every pair that was made equal holds, 130 if interrupted: what was judged until then is written, and the
        readme stays as it is.
    """
    from parity_tests.pair.examples.overview import Entry, overview, readme_block, with_block

    check_writable("--json", json_file)
    if readme is not None and not readme.is_file():
        raise refuse(f"--readme: expected an existing file, got {readme}; give another path.")
    if len(chosen_frameworks([])) < 2:
        raise refuse("pairs: expected torch and Flax, got one of them; install the extras torch and jax.")
    entries: list[Entry] = []
    stopped = ""
    with interruptible() as interruption:
        try:
            for entry in overview():
                interruption.check()
                entries.append(entry)
                for line in entry.describe().splitlines():
                    console.print(line, soft_wrap=True)
            interruption.settle()
        except KeyboardInterrupt:
            stopped = f"interrupted: {len(entries)} pairs were judged, the others were left"
        document = {"schema_version": 1, "stopped": stopped, "pairs": [entry.record() for entry in entries]}
        failed = write_outputs((json_file, lambda path: write_json("--json", path, document)))
        if readme is not None and not stopped:
            differences = [difference for entry in entries for difference in entry.differences]
            block = readme_block({entry.name: entry.defaults for entry in entries}, differences)
            try:
                write_text("--readme", readme, with_block(read_text(readme), block))
            except ValueError as error:
                raise refuse(f"--readme {readme}: {error}") from None
            except OSError as error:
                failed.append(str(error))
    return ended(HOLDS if entries and all(entry.matched.ok for entry in entries) else FAILED, stopped, failed)
