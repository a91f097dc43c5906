"""JSON from files that somebody may have edited: whatever JSON leaves open or a reader could stumble over is refused.

What is refused: bytes that are not UTF-8, a byte order mark, text that holds half a character, one name twice in an
object, NaN and infinities, integers of thousands of digits, and nesting without end.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

# Far above anything measured or reported, and still exact enough to be divided and drawn. Integers end where arrays and
# the libraries that draw pictures can hold no larger one.
LARGEST = 2.0**100
LARGEST_INTEGER = 2**63 - 1
# Python itself refuses at 4,300, in words that are meant for programmers.
_MOST_DIGITS = 400
# Half of a pair, written as an escape: text that no file and no terminal takes.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise ValueError(f"the name {twice[:80]!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_int=_integer, object_pairs_hook=_object)


def parse(data: bytes) -> Any:
    """Read one JSON value from all of the bytes.

    Raises:
        ValueError: with the reason, if they hold anything else.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark")
    try:
        value = _DECODER.decode(data.decode())
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text holds half of a surrogate pair") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def moderate(value: float, least: float = 0.0) -> bool:
    """Tell whether a number can be calculated with; one such as 1e999 is valid JSON and is read as infinite."""
    return least <= value <= (LARGEST_INTEGER if isinstance(value, int) else LARGEST)


def plain(value: object, depth: int) -> bool:
    """Tell whether a value can be shown and written again.

    Args:
        value: what `parse` returned, or a part of it.
        depth: levels of lists and objects that are allowed; 0 allows only text, numbers, truth values and null.
    """
    if isinstance(value, str):
        return True
    if isinstance(value, int | float):
        return moderate(abs(value))
    if isinstance(value, list | dict):
        return depth > 0 and all(
            plain(item, depth - 1) for item in (value if isinstance(value, list) else value.values())
        )
    return True


def shown(value: object) -> str:
    """Name a wrong value in a message, in a few words whatever it is."""
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object of {len(value)}"
    if isinstance(value, int | float):
        return str(value)[:40]
    return repr(str(value)[:80])
