"""Make text from outside (names, reasons, paths, exceptions) safe for each format of a report.

`printable` decides what may be shown at all; one function for each format then escapes what that format would obey.
Renderers call the function of their format where text leaves them, and nothing else.
"""

import html
import json
import re
import traceback
from typing import Any


def printable(value: object) -> str:
    """Return a value as one line in which every character shows; the others are written as Python escapes.

    That concerns control characters (a terminal obeys some, XML forbids most, a newline begins another line), overrides
    of the writing direction, invisible and unassigned characters, and halves of surrogate pairs, which no file takes.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_tree(value: Any, longest: int) -> Any:
    """Return nested lists and dicts with every text in them printable, names included, and cut where it is longer."""
    if isinstance(value, str):
        text = printable(value)
        return text if len(text) <= longest else f"{text[:longest]}..."
    if isinstance(value, dict):
        return {printable_tree(name, longest): printable_tree(item, longest) for name, item in value.items()}
    return [printable_tree(item, longest) for item in value] if isinstance(value, list | tuple) else value


# --- HTML, and SVG within it ---


def html_text(value: object) -> str:
    """Return a value as text for HTML, between tags or within a quoted attribute."""
    return html.escape(printable(value))


# --- Markdown (that of GitHub) ---

# Only where Markdown would read it, so that `forward_backward`, `n <= 8` and `1.02x [0.98, 1.06]` stay readable.
_OBEYED = re.compile(
    r"[\\`*~|$]"
    r"|<(?![\s=\d])"  # a tag or a comment: also the markers of a page's blocks
    r"|&(?=#?\w+;)"  # an entity
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis, which no underscore within a word begins or ends
    r"|(?<=\])[(\[]"  # a link or an image
    r"|(?<=\s)#"  # ends a heading
)
_BEGINS_BLOCK = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=[#>+\-=\[]))")


def markdown_text(value: object) -> str:
    """Return a value as text within a line of Markdown: a cell of a table, a heading, a part of a sentence."""
    return _OBEYED.sub(lambda found: "&lt;" if found[0] == "<" else f"\\{found[0]}", printable(value))


def markdown_line(value: object) -> str:
    """Return a value as text that begins a paragraph or an item of a list of Markdown."""
    return _BEGINS_BLOCK.sub(r"\1\\", markdown_text(value).lstrip(" "))


def markdown_code(value: object) -> str:
    """Return a name in the type of code, or as plain text where something in it would end the code."""
    text = printable(value)
    return f"`{text}`" if re.fullmatch(r"[\w.:/-]+", text) else markdown_text(text)


# --- CSV ---


def csv_cell(value: Any) -> Any:
    """Return a value as a cell of CSV: numbers as they are, text printable.

    A spreadsheet computes text that begins with one of `= + - @` (or the full-width forms of these): it is preceded
    by an apostrophe, which spreadsheets take for the mark of a text.
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    # In the compatibility form, because the full-width signs are computed too.
    return f"'{text}" if text.startswith(tuple("=+-@\uff1d\uff0b\uff0d\uff20")) else text


# --- JSON ---


def json_text(value: Any, **options: Any) -> str:
    """Return a value as JSON, all of it ASCII: text as it is, with escapes for what JSON or a terminal would obey.

    Half of a surrogate pair is no character: many readers refuse a file that has one, so it becomes U+FFFD. Infinities
    and NaN, for which JSON has no number, are refused.
    """
    text = json.dumps(value, allow_nan=False, **options)
    # Looking for halves takes longer than writing, and hardly any text has a surrogate.
    return json.dumps(_whole(json.loads(text)), allow_nan=False, **options) if "\\ud" in text else text


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole(name): _whole(item) for name, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


_MOST_CHARACTERS = 300  # some messages end in a whole program


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, cut where it is long."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        return "its message cannot be shown"
    return lines[0][:_MOST_CHARACTERS] if lines else "no reason given"


def raised(what: str, error: BaseException) -> str:
    """Return one sentence for work that raised an exception: `what` begins it, such as "the call"."""
    return f"{what} raised {type(error).__name__}: {first_line(error)}"


def located(error: BaseException) -> str:
    """Return an exception in one line with the place where it was raised, instead of a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"
