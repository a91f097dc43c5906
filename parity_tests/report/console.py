"""Print to a terminal on which every string is text: parity rows, and the end of a command that cannot write there."""

import contextlib
import dataclasses
import functools
import inspect
import io
import os
import signal
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parity_tests.judge.records import ParityRow, Summary
from parity_tests.judge.tolerance import FALSE_ALARM_RATE, PRECISION_OF_DTYPE
from parity_tests.report.files import OutputError
from parity_tests.report.text import printable

PAIR_PACKAGES = ("einops", "scipy")  # of the extra `pair`


class PlainConsole(Console):
    """A console on which every string is text: no markup, no codes of emoji, nothing that a terminal would obey.

    What has a style of its own is passed as `rich.text.Text`, or with `style=`; what has several lines, in several
    calls.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """See `rich.console.Console`.

        Raises:
            OutputError: if nothing can be written there; one sentence.
        """
        try:
            super().print(*objects, **options)
        except OSError as error:
            name = "standard error" if self.stderr else "standard output"
            raise OutputError(f"{name}: cannot be written ({error.strerror}); make room or write to a file.") from error

    def render_str(self, text: str, **options: Any) -> Text:
        """See `rich.console.Console`: every string that is printed, alone or in a table, comes through here."""
        options |= {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(printable(text), **options)


def run_application(application: Callable[..., Any], name: str) -> None:
    """Run a command line; one that cannot write to its terminal or pipe ends with a sentence and no traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where a terminal or a pipe cannot show a character, its escape is better than an exception.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        application(prog_name=name)
    except OutputError as error:
        _silence()
        print(f"{name.split()[-1]}: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in PAIR_PACKAGES:
            raise
        extra = f"install the extra: {sys.executable} -m pip install 'partitioned-linear[pair]'"
        print(
            f"{name.split()[-1]}: expected {' and '.join(PAIR_PACKAGES)}, got no {error.name}; {extra}.",
            file=sys.stderr,
        )
        sys.exit(2)
    except SystemExit:
        try:
            sys.stdout.flush()
        except OSError:
            # Said already, or there is no reader left.
            _silence()
        raise


def ending(
    command: Callable[..., int],
    mistakes: tuple[type[Exception], ...] = (),
    complain: Callable[[Exception], int] | None = None,
) -> Callable[..., None]:
    """Return a command for typer of one that returns its exit status; `complain` turns mistakes into one."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            status = command(*arguments, **options)
        except mistakes as error:
            assert complain is not None  # it comes with the mistakes
            status = complain(error)
        raise typer.Exit(status)

    return run


def _silence() -> None:
    """Let Python end without another try to write, which would say so in lines of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def takes(options: type) -> Callable[[Callable[[Any], int]], Callable[..., int]]:
    """Return a decorator that lets typer make a command of a function of one object of options.

    Args:
        options: a dataclass; its fields are the command's options, the required ones first.
    """
    hints = get_type_hints(options, include_extras=True)
    many = {name for name, hint in get_type_hints(options).items() if hint == tuple[str, ...]}

    def parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
        hint, default = hints[field.name], None if field.name in many else field.default
        said = hint.__metadata__[0] if get_origin(hint) is Annotated else typer.Option(**field.metadata["typer"])
        plain = hint.__origin__ if get_origin(hint) is Annotated else hint
        hint = Annotated[list[str] | None if field.name in many else plain, said]
        default = inspect.Parameter.empty if default is dataclasses.MISSING else default
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)

    def decorate(function: Callable[[Any], int]) -> Callable[..., int]:
        def command(**given: Any) -> int:
            return function(
                options(**{name: tuple(value or ()) if name in many else value for name, value in given.items()})
            )

        parameters = sorted(map(parameter, dataclasses.fields(options)), key=lambda one: one.default is not one.empty)
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


# --- parity rows ---

_RATE = f"{FALSE_ALARM_RATE:.0e}"
# Subjects that are named beside the reason why they were skipped.
_NAMED = 3
_MISMATCH = Text("MISMATCH", "red")


def _fraction(rows: Sequence[ParityRow], field: str) -> str:
    values = [getattr(row, field) for row in rows if getattr(row, field) is not None]
    return f"{max(values):.3f}" if values else "-"


def _exact(rows: Sequence[ParityRow]) -> str:
    """Return how many of the checks that need no tolerance hold."""
    checks = [row.status == "ok" for row in rows if row.kind == "exact" and row.status != "skipped"]
    return f"{sum(checks)}/{len(checks)}" if checks else "-"


def _diagnosis(rows: Sequence[ParityRow]) -> str:
    """Return the fingerprint's diagnosis, and every precision class observed in place of the dtype's own."""
    said = [next((row.diagnosis for row in rows if row.diagnosis), "")]
    other = {row.observed: None for row in rows if row.observed not in ("", PRECISION_OF_DTYPE.get(row.dtype))}
    return "; ".join(filter(None, [*said, *(f"observed precision: {name}" for name in other)]))


def print_report(console: PlainConsole, rows: Sequence[ParityRow], summary: Summary) -> None:
    """Print the table, each failure with the command that reproduces it, and the skipped cells with their reasons."""
    groups: dict[tuple[str, str, str, str], list[ParityRow]] = defaultdict(list)
    for row in rows:
        # 72 pairs a case would bury the subjects: pairs are one line a dtype and mode.
        name = {"pair": "every torch-jax pair", "mode": "every implementation"}.get(row.kind, row.implementation)
        groups[row.framework, name, row.mode, row.dtype].append(row)
    title = f"parity: largest error over its bound, at most 1 (T1 certain; T2, T3 at a false-alarm rate of {_RATE})"
    table = Table(title=title, title_justify="left")
    for column in ("framework", "implementation", "mode", "dtype", "status"):
        table.add_column(column)
    for column in ("compared", "skipped", "T1", "T2", "T3", "exact"):
        table.add_column(column, justify="right")
    table.add_column("diagnosis")
    for (framework, name, mode, dtype), members in groups.items():
        compared = [row for row in members if row.status != "skipped"]
        failed = sum(row.status == "mismatch" for row in members)
        status = _MISMATCH if failed else Text("ok", "green") if compared else Text("skipped", "yellow")
        table.add_row(
            framework,
            name,
            mode,
            dtype,
            status,
            str(len(compared)),
            str(len(members) - len(compared)),
            _fraction(compared, "bound_fraction"),
            _fraction(compared, "bound_fraction_t2"),
            _fraction(compared, "bound_fraction_t3"),
            _exact(compared),
            _diagnosis(compared),
        )
    console.print(table)
    for row in rows:
        if row.status == "mismatch":
            place = " ".join(
                part for part in (row.framework, row.implementation, row.mode, row.dtype, row.case) if part
            )
            console.print(_MISMATCH, f"{place}: {row.reason}")
            if row.command:
                # Not wrapped: a command that is cut into lines cannot be pasted.
                console.print(f"  reproduce: {row.command}", soft_wrap=True)
    skipped: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.status == "skipped":
            skipped[row.reason][f"{row.framework} {row.implementation} {row.dtype}"] += 1
    for reason, who in skipped.items():
        # One line a reason: a line a subject would bury the result.
        more = f" and {len(who) - _NAMED} more" if len(who) > _NAMED else ""
        names = ", ".join(list(who)[:_NAMED]) + more
        console.print(f"skipped {who.total()} x {names}: {reason}", style="dim")
    verdict = "all compared cells hold" if summary.ok else "FAILED"
    if summary.compared == 0:
        verdict = "FAILED: nothing was compared"
    console.print(
        f"{summary.compared} compared, {summary.passed} passed, {summary.failed} failed, {summary.skipped} skipped:",
        Text(verdict, "green" if summary.ok else "red"),
    )


# --- the end that a user asks for ---

INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_Item = TypeVar("_Item")


class Interruption:
    """Tell if the user asked for an end, and decide what a signal does now.

    Attributes:
        asked: True from the first signal on.
        held: set while something is in hand that must not be lost: a signal is then only remembered, for `check`.
    """

    def __init__(self, *, polled: bool = False) -> None:
        self.asked = self.held = False
        self._polled = polled
        self._settled = False
        self._late = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if the user asked for an end and the exception was lost.

        Python's own is raised wherever the program happens to be; in a finaliser or a callback of a library it is
        printed or dropped, or becomes another one, and the work would go on.
        """
        if self.asked and not self._settled:
            raise KeyboardInterrupt

    def settle(self) -> None:
        """Begin the writing of files, which must be finished: from here on a signal is only remembered.

        Call it where the work ends, within the `try` that expects KeyboardInterrupt. A signal that came after all the
        work was done ends the program when the files are there.
        """
        self._settled = True

    def until_asked(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yield items until the user asks for an end: for work that a signal does not end halfway through an item."""
        for item in items:
            if self.asked:
                return
            yield item

    def finish(self) -> None:
        """Raise KeyboardInterrupt if the first signal came after the work."""
        if self._late:
            raise KeyboardInterrupt

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Answer a signal."""
        first, self.asked = not self.asked, True
        self._late |= first and self._settled
        # In impatience a user sends a second one: it must not cost the files, but end what only polls.
        if not (self._settled or self.held) and first != self._polled:
            raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible(*, polled: bool = False) -> Iterator[Interruption]:
    """Let the first Ctrl-C or SIGTERM end the work in order: KeyboardInterrupt is raised once, later ones are ignored.

    With `polled`, the first one is only remembered, for `until_asked`; a second one raises.
    """
    interruption = Interruption(polled=polled)
    # Only the main thread may set a handler, and only it is interrupted.
    own = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, interruption.handle) for number in _SIGNALS} if own else {}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    interruption.finish()
