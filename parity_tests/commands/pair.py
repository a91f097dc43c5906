"""`python -m parity_tests run --pair` and `pairs`: a user's own pair, and the five example pairs."""

import importlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity_tests.commands.usage import (
    DEVICES,
    FAILED,
    HOLDS,
    INTERRUPTED,
    WRONG_USAGE,
    Options,
    check_writable,
    choose,
    chosen_frameworks,
    console,
    ended,
    errors,
    progress_bar,
    refuse,
    write_outputs,
)
from parity_tests.judge.dtypes import STORAGE_DTYPES
from parity_tests.judge.subjects import FRAMEWORKS, framework_available, package_available
from parity_tests.pair.examples import EXAMPLES
from parity_tests.pair.judging import Judgement, judge_apart
from parity_tests.pair.loading import names_in
from parity_tests.pair.report import EFFORTS, VALUES, PairReport
from parity_tests.report.console import interruptible
from parity_tests.report.files import read_text, write_json, write_text
from parity_tests.report.text import markdown_text, printable

_LONGEST_S = 7 * 24 * 3600.0


def _refuse_options_of_cells(options: Options) -> None:
    given = {
        "--framework": options.framework,
        "--implementation": options.implementation,
        "--case": options.case,
        "--mode": options.mode,
        "--train": options.train,
        "--cases": options.cases != "default",
    }
    for option, value in given.items():
        if value:
            raise refuse(
                f"{option}: expected none beside --pair, got one; it selects cells of this project's own layer."
            )


def _check_installed(spec: str, pythons: Mapping[str, str]) -> None:
    """Refuse a pair, before a process is started, for packages that it would lack."""
    packages = {framework: framework_available(framework) for framework in FRAMEWORKS if framework not in pythons}
    lacking = [framework for framework, there in packages.items() if not there]
    if not all(package_available(package) for package in ("einops", "scipy")):
        lacking.append("pair")
    if lacking:
        extras = " and ".join(lacking)
        raise refuse(
            f"--pair {spec}: expected what the extras torch, jax and pair bring, got {sys.executable} without "
            f"{extras}; run {sys.executable} -m pip install 'partitioned-linear[{','.join(lacking)}]'"
            + ("" if lacking == ["pair"] else ", or name an interpreter that has it (--torch-python, --jax-python).")
        )


def _interpreters(pythons: Mapping[str, str | None]) -> dict[str, str]:
    """Return absolute paths of the named interpreters, since the pair's own code may change its folder."""
    found = {}
    for framework, python in pythons.items():
        if python is None:
            continue
        program = shutil.which(python)
        if program is None:
            raise refuse(f"{framework}_python: expected an interpreter, got {python!r} (no program); check the path.")
        found[framework] = str(Path(program).absolute())
    return found


def run_user_pair(spec: str, options: Options) -> int:
    """Judge the pair that `package.module:factory` returns, in a process of its own; prints and writes the report.

    Args:
        spec: `package.module:factory`.
        options: of the command; those that select cells are refused.

    Returns:
        0 if all compared holds, 1 for a mismatch or if nothing was compared, 2 if the pair could not be judged to its
        end and nothing that was compared until then failed, 130 if interrupted.
    """
    if options.precision != "fp32":
        raise refuse(
            f"--precision: expected none beside --pair, got {options.precision}; a pair's modules say how they compute."
        )
    options.check_files()
    _refuse_options_of_cells(options)
    choose("--dtype", options.dtype, STORAGE_DTYPES)
    choose("--device", [options.device], DEVICES)
    choose("--effort", [options.effort], EFFORTS)
    choose("--values", [options.values], VALUES)
    limit = options.timeout_s
    if not 0 < limit <= _LONGEST_S:
        raise refuse(f"--timeout-s: expected seconds above 0 and up to {_LONGEST_S:g} (a week), got {limit:g}.")
    try:
        names_in(spec)
    except ValueError as error:
        raise refuse(f"--pair {spec}: {error}") from None
    pythons = _interpreters({"torch": options.torch_python, "jax": options.jax_python})
    _check_installed(spec, pythons)
    arguments: dict[str, Any] = {"device": options.device, "seed": options.seed}
    arguments |= {"effort": options.effort} if options.effort != "full" else {}
    arguments |= {"values": options.values} if options.values != "drawn" else {}
    arguments |= {"dtypes": list(options.dtype)} if options.dtype else {}
    arguments |= {"dtypes_equal": True} if options.dtypes_equal else {}
    arguments |= {f"{framework}_python": python for framework, python in pythons.items()}
    with interruptible() as interruption:
        with progress_bar() as progress:
            task = progress.add_task("", total=None)

            def show(step: str) -> None:
                progress.update(task, description=printable(step))

            judgement = judge_apart(spec, arguments, limit, interruption, show)
        return _reported(spec, judgement, options)


def _reported(spec: str, judgement: Judgement, options: Options) -> int:
    """Print and write the report; return the exit status."""
    report = judgement.report
    if report.rows or not report.stopped:
        for line in report.describe().splitlines():
            console.print(line, soft_wrap=True)
    if judgement.printed:
        errors.print(f"printed by {spec}, the last lines:", soft_wrap=True)
        for line in judgement.printed:
            errors.print(f"  {line}", soft_wrap=True)
    failed = write_outputs(
        (options.json_file, report.to_json),
        (options.junit_file, report.to_junit),
        (options.html_file, report.to_html),
    )
    for sentence in failed:
        refuse(sentence)
    if not report.stopped:
        return WRONG_USAGE if failed else HOLDS if report.ok else FAILED
    refuse(f"--pair {spec}: {report.stopped}")
    if judgement.interrupted:
        return INTERRUPTED
    return FAILED if report.summary.failed else WRONG_USAGE


# --- the five example pairs in one view: made equal, with every default, and what differs by default, as measured ---

BEGIN, END = "<!-- pairs:begin -->", "<!-- pairs:end -->"


@dataclass(frozen=True)
class Difference:
    """Hold one aspect in which freshly created modules of a pair may differ."""

    pair: str
    aspect: str
    torch: str
    flax: str

    @property
    def differs(self) -> bool:
        """Tell whether the two measurements read differently."""
        return self.torch != self.flax


def default_differences() -> list[Difference]:
    """Measure every aspect on both sides; needs both frameworks."""
    sides = [
        importlib.import_module(f"parity_tests.frameworks.{side}.examples").measure_defaults()
        for side in ("torch", "jax")
    ]
    return [Difference(key[0], key[1], sides[0][key], sides[1][key]) for key in sides[0]]


@dataclass(frozen=True)
class Entry:
    """Hold the outcome of one example pair."""

    name: str
    matched: PairReport
    defaults: PairReport
    differences: tuple[Difference, ...]

    def describe(self) -> str:
        """Describe the pair in a few lines for a terminal."""
        worst = max(row.bound_fraction or 0.0 for row in self.matched.rows)
        verdict = f"holds, largest error {worst:.2g} of its bound" if self.matched.ok else self.matched.headline
        lines = [self.name, f"  made equal:   {verdict}", f"  by default:   {outcome(self.defaults)}"]
        for difference in self.differences:
            mark = "differs" if difference.differs else "equal"
            lines.append(f"  {mark:<13} {difference.aspect}: torch {difference.torch}, flax {difference.flax}")
        return "\n".join(map(printable, lines))

    def record(self) -> dict[str, Any]:
        """Return the entry as JSON has it."""
        return {
            "name": self.name,
            "matched_ok": self.matched.ok,
            "defaults_ok": self.defaults.ok,
            "defaults_likely_cause": self.defaults.likely_cause,
            "differences": [
                {"aspect": d.aspect, "torch": d.torch, "flax": d.flax, "differs": d.differs} for d in self.differences
            ],
        }


def outcome(report: PairReport) -> str:
    """Describe a report in half a sentence."""
    return "holds" if report.ok else f"MISMATCH: {report.likely_cause or report.headline}"


def _judged(name: str, **given: Any) -> PairReport:
    # What judges is imported late, since `--pair` leaves it to a process of its own.
    from parity_tests.pair.check import run_pair

    return run_pair(f"parity_tests.pair.examples:{name}", **given)


def by_default(name: str) -> PairReport:
    """Judge the outputs of an example with every setting but the parameters at its default."""
    return _judged(f"{name}_defaults", gradients=False)


def overview() -> Iterator[Entry]:
    """Judge and measure every example; needs both frameworks."""
    differences = default_differences()
    for name in EXAMPLES:
        yield Entry(
            name,
            _judged(name, dtypes=("float32", "bfloat16")),
            by_default(name),
            tuple(difference for difference in differences if difference.pair == name),
        )


def readme_block(outcomes: Mapping[str, PairReport], differences: Sequence[Difference]) -> str:
    """Return the README's table of the five pairs, markers included."""
    lines = [BEGIN, "", "| pair | the check, everything else at its default | differs by default (torch / Flax) |"]
    lines += ["|---|---|---|"]
    for name, report in outcomes.items():
        own = "; ".join(f"{d.aspect}: {d.torch} / {d.flax}" for d in differences if d.pair == name and d.differs)
        lines.append("| " + " | ".join(map(markdown_text, (name, outcome(report), own))) + " |")
    return "\n".join([*lines, "", END])


def with_block(text: str, block: str) -> str:
    """Return the README's text with its table replaced.

    Raises:
        ValueError: if the markers are not there exactly once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected the markers {BEGIN} and {END} once each, in this order; add them to the file.")
    return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]


def pairs(json_file: Path | None, readme: Path | None) -> int:
    """Judge the five example pairs, made equal and with every default, and prints what differs by default.

    Returns:
        0 if every pair that was made equal holds, 130 if interrupted: what was judged until then is written, and the
        readme stays as it is.
    """
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
