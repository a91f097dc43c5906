"""Lines of progress: which call of which side is being made, in which leg of the check."""

import functools
from typing import Any

from parity_tests.pair.report import Tell
from parity_tests.pair.side import Side

_BETWEEN = "drawing and comparing values"
_STEPS = {
    "arrange": "arranging the inputs of",
    "parameters": "reading the parameters of",
    "outline": "tracing",
    "round_trip": "putting parameters into",
    "forward": "running",
    "vjp": "differentiating",
    "truth": "running, in float64,",
    "ensemble": "running, with rounding noise,",
    "constants": "moving the constants of",
    "is_random": "looking for random numbers in",
    "unexercised": "watching the branches of",
    "wider_operations": "looking at the formats of",
}


class Progress:
    """Tell every step, with the leg that it belongs to."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._leg, self._calls, self._done = tell, "", 0, 0

    def start(self, leg: str, calls: int) -> None:
        """Begin a leg that will make about so many calls."""
        self._leg, self._calls, self._done = leg, calls, 0

    def call(self, text: str) -> None:
        """Tell of one call of a side."""
        self._done += 1
        counted = f" ({self._leg}, {self._done} of {max(self._done, self._calls)})" if self._leg else ""
        self._tell(text + counted)

    def between(self) -> None:
        """Tell of what is done beside the sides."""
        self._tell(_BETWEEN + (f" ({self._leg})" if self._leg else ""))


class Told:
    """Announce every call of a side before it is made."""

    def __init__(self, side: Side, progress: Progress) -> None:
        self._side, self._progress = side, progress

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._side, name)
        if not callable(value):
            return value

        @functools.wraps(value)
        def told(*arguments: Any, **named: Any) -> Any:
            if name not in _STEPS:
                return value(*arguments, **named)
            self._progress.call(f"{_STEPS[name]} the {self._side.framework} side")
            result = value(*arguments, **named)
            self._progress.between()
            return result

        return told
