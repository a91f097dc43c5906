"""Search for the likely cause of a mismatch: try known mistakes in turn, the common ones first."""

import itertools
from collections.abc import Callable, Iterable
from typing import TypeVar

Result = TypeVar("Result")


def search(
    attempts: Iterable[tuple[str, Callable[[], Result | None]]],
    agrees: Callable[[Result], bool],
    most: int | None = None,
    passed_over: tuple[type[Exception], ...] = (),
) -> str:
    """Return the sentence of the first mistake that reproduces what was observed; empty if none does.

    Args:
        attempts: of each mistake the sentence, and a function that computes what it would give, or None where it is
            ruled out.
        agrees: whether such a result is what was observed.
        most: number of attempts to stop after; None for all.
        passed_over: what an attempt may raise where it does not apply.
    """
    for sentence, attempt in itertools.islice(attempts, most):
        try:
            result = attempt()
        except passed_over:
            continue
        if result is not None and agrees(result):
            return sentence
    return ""
