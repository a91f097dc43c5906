"""Files that reports are written to; a full disk or a missing permission ends in one sentence."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class OutputError(ValueError):
    """A file that cannot be written; the message is one sentence."""


@contextmanager
def writing(argument: str, path: Path) -> Iterator[None]:
    """Turns what the system says about a file that is being written into one sentence.

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{argument}: {path} cannot be written ({error.strerror or error}); make room or choose another file."
        ) from error


def write_text(argument: str, path: Path, text: str | Iterable[str]) -> None:
    """Writes text, whole or piece by piece.

    Raises:
        OutputError: if it cannot be written.
    """
    with writing(argument, path), path.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)


def write_json(path: Path, value: object, *, argument: str = "--json") -> None:
    """Writes a value as indented JSON; infinities and NaN are refused.

    Raises:
        OutputError: if it cannot be written.
    """
    write_text(argument, path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An object of objects as one level of ``outer_inner`` columns; lists become text."""
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
    with writing(argument, path), path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every column that any row has, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))
