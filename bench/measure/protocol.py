"""The language between coordinator and worker: one JSON object a line, one reply for each request.

A request is `{"operation": name, ...}`. A reply is `{"ok": true, ...}` or
`{"ok": false, "status": s, "reason": r}` with a status that a record may end in, or `missing` where the framework
is not installed. Needs the standard library only, since a worker may run in an interpreter that has nothing but NumPy
and its framework.
"""

import json
from collections.abc import Mapping
from typing import Any, Protocol

Message = dict[str, Any]
MISSING = "missing"


class RequestError(Exception):
    """A request that ended with a status other than ok.

    Args:
        status: `unsupported`, `mismatch`, `oom`, `timeout`, `crash` or `missing`.
        reason: one sentence.
    """

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Workers(Protocol):
    """What the coordinator needs of a pool."""

    def request(self, framework: str, message: Message, timeout_s: float) -> Message:
        """Asks a worker."""
        ...

    def alive(self, framework: str) -> bool:
        """Whether a worker still runs."""
        ...

    def replace(self, framework: str) -> None:
        """Starts a new worker in place of a dead one."""
        ...


def encode(message: Mapping[str, Any]) -> bytes:
    """One line; infinities and NaN are refused, since JSON has none."""
    return (json.dumps(message, allow_nan=False) + "\n").encode()


def decode(line: bytes) -> Message:
    """The message in a line.

    Raises:
        RequestError: with status `crash` if the line is not a message.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError("crash", f"the worker wrote something that is no message: {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise RequestError("crash", f"the worker wrote something that is no message: {line[:80]!r}")
    return message


def failure(status: str, reason: str) -> Message:
    """The reply to a request that did not succeed."""
    return {"ok": False, "status": status, "reason": one_line(reason)}


def one_line(text: str, limit: int = 300) -> str:
    """The text on one line, shortened to `limit` characters."""
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else joined[: limit - 3] + "..."
