"""Conditions on cells, as several commands take them: FIELD=PATTERN."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial

from bench.commands.usage import UsageError
from bench.records import Record
from bench.report.export import SHARED
from parity_tests.judge.precisions import precision_class, storage_dtype


def selection(option: str, conditions: Sequence[str]) -> Callable[[Record], bool]:
    """Whether a cell meets conditions such as `direction=forward` or `workload=article-*`.

    Args:
        option: that the conditions were given to.
        conditions: a field and a pattern each; a cell must meet all of them.

    Raises:
        UsageError: if one is no condition on what the competitors of a cell share.
    """
    wanted = []
    for condition in conditions:
        name, sign, pattern = condition.partition("=")
        if not sign or name not in SHARED:
            names = ", ".join(SHARED)
            raise UsageError(f"{option}: expected FIELD=PATTERN with one of {names}, got {condition!r}; name one.")
        spelled = {"precision": precision_class, "observed_precision": precision_class, "dtype": storage_dtype}
        wanted.append((name, spelled.get(name, str)(pattern)))
    # No closure: it travels to other processes.
    return partial(_meets, tuple(wanted))


def _meets(wanted: Iterable[tuple[str, str]], record: Record) -> bool:
    return all(fnmatchcase(str(getattr(record, name)), pattern) for name, pattern in wanted)
