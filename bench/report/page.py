"""The blocks of a page such as README that commands fill from records, so that they cannot drift from them.

A block lies between `<!-- results:begin -->` and `<!-- results:end -->` (`claims` for those of `bench claims`).
A page that shows several directories gives each a name, that of the directory: `<!-- results:begin h200 -->`.
"""

from pathlib import Path

from bench.report.output import write_text
from parity_tests.report.files import read_text

RESULTS, CLAIMS = "results", "claims"


class PageError(ValueError):
    """A page that cannot be read, or without one well-formed block; the message is one sentence."""


def markers(what: str, name: str = "") -> tuple[str, str]:
    """The lines before and after a block.

    Args:
        what: `RESULTS` or `CLAIMS`.
        name: of the records' directory, or empty.
    """
    suffix = f" {name}" if name else ""
    return f"<!-- {what}:begin{suffix} -->", f"<!-- {what}:end{suffix} -->"


def with_block(text: str, block: str, what: str = RESULTS, name: str = "") -> str:
    """A page's text with one block replaced.

    Args:
        text: of the page.
        block: what goes between the markers.
        what: `RESULTS` or `CLAIMS`.
        name: of the records' directory; markers that name it are taken before those without a name.

    Raises:
        PageError: if the markers are not there exactly once, in order.
    """
    named = markers(what, name)
    begin, end = named if any(marker in text for marker in named) else markers(what)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise PageError(f"expected the markers {begin} and {end} once each, in this order; add them to the file.")
    return text[: text.index(begin) + len(begin)] + f"\n{block}\n" + text[text.index(end) :]


def update_page(path: Path, block: str, what: str, name: str, *, check: bool = False) -> bool:
    """Replaces a block of a page.

    Args:
        path: of the page.
        block: what goes between the markers.
        what: `RESULTS` or `CLAIMS`.
        name: of the records' directory.
        check: change nothing.

    Returns:
        Whether the page is up to date now.

    Raises:
        PageError: if it cannot be read, or lacks the markers.
        OutputError: if it cannot be written.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise PageError(f"--readme: {path} cannot be read ({why}); give an existing file.") from error
    try:
        fresh = with_block(text, block, what, name)
    except PageError as error:
        raise PageError(f"{path}: {error}") from error
    if not check:
        write_text("--readme", path, fresh)
    return fresh == text or not check
