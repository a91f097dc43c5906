"""Files that reports are written to: whole or not at all; a full disk or a missing permission ends in one sentence."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parity_tests.report import files
from parity_tests.report.files import OutputError, output, write_text
from parity_tests.report.text import csv_cell

__all__ = ["OutputError", "columns_of", "flat", "output", "write_csv", "write_json", "write_text"]


def write_json(path: Path, value: object, *, argument: str = "--json") -> None:
    """Writes a value as indented JSON; infinities and NaN are refused.

    Raises:
        OutputError: if it cannot be written.
    """
    files.write_json(argument, path, value)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An object of objects as one level of `outer_inner` columns; lists become text."""
    row: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            row |= flat(item, f"{prefix}{name}_")
        else:
            row[prefix + name] = "; ".join(map(str, item)) if isinstance(item, list | tuple) else item
    return row


def write_csv(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, argument: str = "--csv"
) -> None:
    """Writes rows as comma-separated values with a heading line; what a row lacks stays empty.

    Raises:
        OutputError: if it cannot be written.
    """
    with output(argument, path) as file:
        lines = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.writer(lines)
        writer.writerow(map(csv_cell, columns))
        writer.writerows([csv_cell(row.get(name, "")) for name in columns] for row in rows)
        # Flushes it; the file below is closed elsewhere.
        lines.detach()


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every column that any row has, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))
