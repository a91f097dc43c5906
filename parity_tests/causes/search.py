"""Search for the likely cause of a mismatch: try known mistakes in turn, the common ones first."""

import itertools
from collections.abc import Callable, Iterable


def first_confirmed(
    hypotheses: Iterable[tuple[str, Callable[[], bool]]],
    most: int | None = None,
    passed_over: tuple[type[Exception], ...] = (),
) -> str:
    """Return the sentence of the first hypothesis whose test holds; empty if none does.

    Args:
        hypotheses: sentences, each with a test whether that mistake gives what was observed.
        most: number of hypotheses to stop after; None for all.
        passed_over: exceptions that a test raises where its hypothesis does not apply.
    """
    for sentence, holds in itertools.islice(hypotheses, most):
        try:
            if holds():
                return sentence
        except passed_over:
            continue
    return ""
