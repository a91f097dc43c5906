"""What an exception says, in one line: rows and refusals carry one sentence, and never a traceback."""

import traceback

_MOST_CHARACTERS = 300  # some messages end in a whole program


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, cut where it is long; some say nothing.

    Args:
        error: any exception.
    """
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        return "its message cannot be shown"
    return lines[0][:_MOST_CHARACTERS] if lines else "no reason given"


def raised(what: str, error: BaseException) -> str:
    """One sentence for work that ended in an exception, as a row's reason.

    Args:
        what: that raised, as the beginning of a sentence: "the call".
        error: what it raised.
    """
    return f"{what} raised {type(error).__name__}: {first_line(error)}"


def located(error: BaseException) -> str:
    """An exception in one line, with the place where it was raised: what a person needs in place of a traceback.

    Args:
        error: one that was raised, by a user's own code.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"
