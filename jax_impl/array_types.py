"""Shape-annotated array types: one letter for each axis of the operation.

Letters: `b` batch (any number of leading axes), `n` partition, `i` in_features, `o` out_features.
"""

from typing import Any, TypeAlias

import numpy as np
from jax import Array
from jaxtyping import Float

_LONGEST_VALUE, _LONGEST_CLAUSE = 80, 120  # characters of a message

Inputs: TypeAlias = Float[Array, "*b n i"]
"""Features of every partition, shape (*b, n, i)."""

Weight: TypeAlias = Float[Array, "n i o"]
"""One matrix per partition, shape (n, i, o)."""

Bias: TypeAlias = Float[Array, "n o"]
"""One bias vector per partition, shape (n, o)."""

Outputs: TypeAlias = Float[Array, "*b n o"]
"""Results of every partition, shape (*b, n, o)."""


class UnsupportedImplementationError(ValueError):
    """A named implementation cannot run this call; nothing else was run in its place."""


def kind_of(value: Any, *expected: str) -> str:
    """Return a type's name with its article, and with its package where it is a namesake of what was expected."""
    name = type(value).__name__
    if name in expected:
        name = f"{type(value).__module__.partition('.')[0]}.{name}"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def name_of(dtype: Any) -> str:
    """Return a dtype's name as messages show it; one of another byte order has the name of its twin, so its code."""
    return str(dtype) if not isinstance(dtype, np.dtype) else dtype.name if dtype.isnative else dtype.str


def shown(value: Any) -> str:
    """Return the repr of any value as a message shows it: on one line, cut where it is long.

    Some values have none, such as an int of more digits than Python writes: they are shown by their type.
    """
    try:
        return _on_one_line(repr(value), _LONGEST_VALUE)
    except Exception:
        return f"{kind_of(value)} that cannot be shown"


def said(error: BaseException) -> str:
    """Return what another library's error says as a clause: its first line, cut where it is long, without a stop."""
    try:
        first = next(filter(None, map(str.strip, str(error).splitlines())), "")
    except Exception:
        first = ""
    text = _on_one_line(first, _LONGEST_CLAUSE).rstrip(".").replace(";", ",").replace(". ", ", ")
    return text or type(error).__name__


def _on_one_line(text: str, longest: int) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * longest]).split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
