"""Parity records: one row a comparison, and the documents that `--json` and `--junit` write."""

import dataclasses
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar
from xml.etree import ElementTree

from parity_tests.judge.comparison import TensorResult
from parity_tests.judge.tolerance import FALSE_ALARM_RATE
from parity_tests.report import files
from parity_tests.report.text import printable

SCHEMA_VERSION = 1
_PACKAGES = ("numpy", "ml_dtypes", "torch", "jax", "jaxlib", "flax", "optax")


@dataclass(frozen=True)
class ParityRow:
    """Record one comparison: a subject against the oracle, or a pair of subjects against each other."""

    # `oracle`, `pair` (torch against jax), `mode` (a mode against its subject's default mode), `exact` (a check that
    # needs no tolerance), `ladder` (a rung) or `training` (a criterion)
    kind: Literal["oracle", "pair", "mode", "exact", "ladder", "training"]
    framework: str  # `torch` or `jax`; `torch+jax` for a pair
    implementation: str  # the subject's name; `a+b` for a pair
    dtype: str  # storage dtype
    case: str  # name of the case
    # `y`, `dx`, `dweight`, `dbias`; for a pair that holds, the tensor that came closest to its bound; for `exact` the
    # check: `lattice`, `wide lattice` or `isolation`
    tensor: str
    status: Literal["ok", "mismatch", "skipped"]  # `ok`, `mismatch` or `skipped`
    reason: str = ""  # one sentence for a mismatch or a skip
    diagnosis: str = ""  # what the arithmetic fingerprint says about this subject and dtype
    command: str = ""  # reproduces this row
    # How the subject was run, see `subjects.modes`; `a+b` for two subjects, `truth` for the float64 functions of a
    # pair, empty for what has no mode
    mode: str = ""
    arithmetic: str = ""  # what the bound was derived for: the promise of mode and dtype, closed by what was measured
    observed: str = ""  # the precision class that the error shows, `ieee_fp32`, `tf32`, ...; `lower` for none
    max_abs_error: float | None = None  # see `comparison.TensorResult`, as are the following
    median_abs_error: float | None = None
    bound_fraction: float | None = None
    bound_fraction_t2: float | None = None
    bound_fraction_t3: float | None = None
    worst_index: tuple[int, ...] | None = None
    partition: int | None = None
    subject_value: float | None = None
    expected_value: float | None = None
    partition_fractions: tuple[float, ...] | None = None
    tensor_fractions: dict[str, float] | None = None  # for a pair, the error over bound of every tensor
    note: str = ""  # what a reader must know about the row, whatever its status; empty for nothing


Row = TypeVar("Row", bound=ParityRow)
_RESULT_FIELDS = {field.name for field in dataclasses.fields(TensorResult)} & {
    field.name for field in dataclasses.fields(ParityRow)
}


def row_from_result(
    result: TensorResult,
    row_type: type[Row] = ParityRow,  # pyright: ignore[reportArgumentType]
    **where: Any,
) -> Row:
    """Make a row from a tensor's verdict.

    Args:
        result: the verdict.
        row_type: the kind of row.
        where: its other fields (kind, framework, implementation, dtype, case, ...), or others than the verdict has.
    """
    return row_type(**{name: getattr(result, name) for name in _RESULT_FIELDS} | where)


@dataclass(frozen=True)
class Summary:
    """Hold counts over rows; a run in which nothing was compared has failed."""

    compared: int
    passed: int
    failed: int
    skipped: int

    @property
    def ok(self) -> bool:
        """Tell whether something was compared and all of it holds."""
        return self.compared > 0 and self.failed == 0


def summarize(rows: Sequence[ParityRow]) -> Summary:
    """Count rows by status."""
    count = {status: sum(row.status == status for row in rows) for status in ("ok", "mismatch", "skipped")}
    return Summary(count["ok"] + count["mismatch"], count["ok"], count["mismatch"], count["skipped"])


def environment() -> dict[str, Any]:
    """Return what a reader needs to repeat and to weigh the run; no framework is imported for it.

    Returns:
        `python`, `machine`, `packages` by name (None for one that is not installed) and `false_alarm_rate`, at
        which tiers T2 and T3 reject correct code.
    """
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": versions,
        "false_alarm_rate": FALSE_ALARM_RATE,
    }


def _plain(value: Any) -> Any:
    """Write infinities, which JSON lacks, as the strings that Python's float() reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def write_json(
    path: Path | str, rows: Sequence[ParityRow], cells_left: int = 0, stopped: str = "", **more: Any
) -> None:
    """Write `schema_version, environment, summary, cells_left, stopped, rows`, and what else is given.

    Args:
        path: where to.
        rows: what was compared or skipped.
        cells_left: how many cells an interrupted run did not come to.
        stopped: why the run did not come to its end; empty if it did.
        more: further entries by name.

    Raises:
        OutputError: if it cannot be written.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(),
        "summary": dataclasses.asdict(summarize(rows)),
        "cells_left": cells_left,
        "stopped": stopped,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    files.write_json("--json", path, _plain(document | more))


# --- JUnit XML, which continuous-integration systems read ---


def _case(row: ParityRow) -> ElementTree.Element:
    parts = (row.kind, row.framework, row.implementation, row.mode, row.dtype)
    place = printable(".".join(part for part in parts if part))
    name = printable(" ".join(part for part in (row.case, row.tensor) if part))
    case = ElementTree.Element("testcase", {"classname": place, "name": name, "time": "0"})
    if row.status == "mismatch":
        failure = ElementTree.SubElement(case, "failure", {"message": printable(row.reason)})
        details = [f"error over bound: {row.bound_fraction}", row.diagnosis, row.command]
        failure.text = "\n".join(printable(line) for line in details if line)
    elif row.status == "skipped":
        ElementTree.SubElement(case, "skipped", {"message": printable(row.reason)})
    return case


def junit_document(rows: Sequence[ParityRow], stopped: str = "") -> str:
    """Return a JUnit document with one case a row: failures with their reason and the command that reproduces them.

    `stopped` says why the run did not come to its end; it becomes a case of its own, with an error.
    """
    summary = summarize(rows)
    counts = {
        "tests": str(len(rows) + bool(stopped)),
        "failures": str(summary.failed),
        "skipped": str(summary.skipped),
        "errors": str(int(bool(stopped))),
    }
    root = ElementTree.Element("testsuites", {"name": "parity", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": "parity", **counts})
    suite.extend(_case(row) for row in rows)
    if stopped:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "run", "name": "comes to its end", "time": "0"})
        ElementTree.SubElement(case, "error", {"message": printable(stopped)})
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
