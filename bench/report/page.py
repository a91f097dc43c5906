"""Write a run as one page for people: self-contained, narrowed by filters, with the record under the pointer.

The page fetches nothing, and its own policy forbids it to. All text from records is escaped or in a block of JSON.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.report.figures import BEST, FILTERS, LEADS, PANEL, Figures, Picture
from bench.report.sections import PageContent, Section
from bench.report.tables import Table
from parity_tests.report.files import write_text
from parity_tests.report.text import html_text, json_text, printable_tree

# Names of a megabyte were seen in records, and a page is read.
_LONGEST_TEXT = 500
# Of a table that no filter narrows; the script draws the matrix of winners anew with all of them.
_MOST_LINES = 60


def _column(values: Sequence[Any]) -> Any:
    """Return a column as the page holds it: numbers as they are, texts as places in the list of those there are."""
    if not any(isinstance(value, str) for value in values):
        return list(values)
    levels = {value: k for k, value in enumerate(dict.fromkeys(value for value in values if value is not None))}
    return {"levels": list(levels), "codes": [-1 if value is None else levels[value] for value in values]}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows as columns; one without any value is left out."""
    found = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    return {name: _column(values) for name, values in found.items() if any(value is not None for value in values)}


def _data(shown: Figures, pictures: Sequence[Picture]) -> str:
    """Return what the script draws, as JSON that no closing tag can end."""
    found = {
        "cells": _columns(shown.cells),
        "rows": _columns(shown.rows),
        "number_of_cells": len(shown.cells),
        "number_of_rows": len(shown.rows),
        "filters": FILTERS,
        "chosen": shown.chosen,
        "panel": PANEL,
        "places": (LEADS, BEST),
        "pictures": [asdict(picture) for picture in pictures],
    }
    return json_text(printable_tree(found, _LONGEST_TEXT), separators=(",", ":")).replace("<", "\\u003c")


def _row(tag: str, texts: Iterable[str]) -> str:
    short = (text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..." for text in texts)
    return f"<tr>{''.join(f'<{tag}>{html_text(text)}</{tag}>' for text in short)}</tr>"


def _table(table: Table) -> Iterator[str]:
    yield f"<table>{f'<caption>{html_text(table.title)}</caption>' if table.title else ''}{_row('th', table.columns)}"
    yield from (_row("td", row) for row in table.rows[:_MOST_LINES])
    yield "</table>"
    if (rest := len(table.rows) - _MOST_LINES) > 0:
        yield f'<p class="note">and {rest} more lines</p>'


def _command(command: str) -> str:
    return f"<code>{html_text(command)}</code>" if command else ""


def _section(section: Section) -> Iterator[str]:
    name = html_text(section.name)
    yield f'<section id="{name}"><h2>{html_text(section.title)}</h2>'
    yield from (f"<p>{html_text(sentence)}</p>" for sentence in section.sentences)
    for table in section.tables:
        matrix = ' id="matrix"' if section.name == "winners" else ""
        yield from (f'<div{matrix}><div class="scroll">', *_table(table), "</div></div>")
    for picture in section.pictures:
        caption = f"<figcaption>{html_text(picture.title)}</figcaption>"
        yield f'<figure id="picture-{html_text(picture.name)}">{caption}</figure>'
    if section.more:
        yield f"<details><summary>More ({len(section.more)} lines)</summary><ul>"
        yield from (f"<li>{html_text(text)} {_command(command)}</li>" for text, command in section.more)
        yield "</ul></details>"
    if section.command:
        yield f'<p class="command">The figures behind this: {_command(section.command)}</p>'
    yield "</section>\n"


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def page_pieces(content: PageContent) -> Iterator[str]:
    """Return the page, piece by piece."""
    title, parts, shown = html_text(content.title), content.parts, content.shown
    script = _beside("page.js")
    # Only this script may run, and nothing may be fetched.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    yield (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{_beside('page.css')}</style></head><body><h1>{title}</h1>"
    )
    yield from (f"<p><strong>{html_text(note)}</strong></p>" for note in content.notes)
    links = "".join(f'<a href="#{html_text(part.name)}">{html_text(part.title)}</a> ' for part in parts)
    left = f" Not in the page: {shown.left_out} competitors behind others; --csv has all." if shown.left_out else ""
    yield f"<nav>{links}</nav>"
    for k, part in enumerate(parts):
        yield from _section(part)
        if k == 0:
            yield (
                '<div id="controls"><h2>Filters</h2><p class="note">Of the matrix and the pictures; hold Ctrl for '
                f"several. Point at a mark or a square for its record.{html_text(left)}</p>"
                '<div id="filters"></div><label><input type="checkbox" id="every"> every competitor, not only the '
                "fastest of each framework</label><noscript><p>The pictures and filters need JavaScript.</p></noscript>"
                "</div>\n"
            )
    pictures = [picture for part in parts for picture in part.pictures]
    yield '<div id="tip" role="tooltip" hidden></div><script type="application/json" id="data">'
    yield f"{_data(shown, pictures)}</script>\n<script>{script}</script></body></html>\n"


def write_page(argument: str, path: Path, content: PageContent) -> None:
    """Write the page; see `files.output`."""
    write_text(argument, path, page_pieces(content))
