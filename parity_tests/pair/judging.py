"""A named pair judged in a process of its own: both ends of the conversation.

The factory and the modules are other people's code, which may end, hang or flood the process that it runs in. The
parent imports none of it and no framework: it asks, and gets a text for each step, a row for each comparison and a
report at the end. Whatever happens to the child, the parent has the rows so far, and one sentence about what happened.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parity_tests.interpreters.interpreter import DEFAULT_TIMEOUT_S, GREETING_S, Channel, Interpreter, Message
from parity_tests.interpreters.process import ProcessError, clipped
from parity_tests.pair.report import PairReport, PairRow, Tell
from parity_tests.pair.trace import Place
from parity_tests.report.console import Interruption
from parity_tests.report.text import located

# Seconds in which an interpreter that the child starts must greet, or the child report that it did not.
_BESIDE_S = GREETING_S + 10.0
_MOST_SENTENCE = 1000
_SHOWN_LINES = 20


@dataclass(frozen=True)
class Judgement:
    """The outcome of a check in a process of its own."""

    report: PairReport  # of what was compared; `stopped` says why it is not all
    interrupted: bool = False  # True if this process was asked to stop
    printed: tuple[str, ...] = ()  # the last lines that the pair's own code printed


def judge_apart(
    spec: str,
    arguments: Mapping[str, Any],
    timeout_s: float = DEFAULT_TIMEOUT_S,
    interruption: Interruption | None = None,
    tell: Callable[[str], None] = lambda step: None,
) -> Judgement:
    """Judge a named pair in a process of its own, which is ended with all that it started.

    Args:
        spec: `package.module:factory`, importable from where this process imports.
        arguments: of `check_pair`, those that JSON can carry.
        timeout_s: seconds that one step may take: importing the pair, a call of one side, ...
        interruption: of the caller; settled when the judgement is there.
        tell: called with each step.
    """
    heard, interruption = _Heard(spec, tell), interruption or Interruption()
    beside = any(arguments.get(name) for name in ("torch_python", "jax_python"))
    try:
        with Interpreter(__name__, who="its process", timeout_s=timeout_s) as interpreter:
            asked = {"spec": spec, "path": list(map(str, sys.path)), "arguments": {**arguments, "timeout_s": timeout_s}}
            try:
                interpreter.send(asked)
                while heard.report is None:
                    interruption.check()
                    # The child waits for others by the same limit, and then says which of them it was.
                    alone = not beside or heard.step in (f"importing {spec}", f"calling {spec}")
                    interpreter.timeout_s = timeout_s + (0.0 if alone else _BESIDE_S)
                    interpreter.child.await_line(interpreter.timeout_s)
                    # A message in hand is kept before a signal ends the work.
                    interruption.held = True
                    try:
                        heard.take(interpreter.receive())
                    finally:
                        interruption.held = False
            except KeyboardInterrupt:
                for message in interpreter.messages_left():
                    heard.take(message)
                raise
            interruption.settle()
            printed = () if heard.report.stopped else tuple(interpreter.child.printed_lines(_SHOWN_LINES))
        return Judgement(heard.report, printed=printed)
    except ProcessError as error:
        what = f"expected a pair that can be judged, got one whose process {error.happened} while {heard.step}"
        return Judgement(heard.stopped(f"{what}{error.last_words}."))
    except KeyboardInterrupt:
        return Judgement(heard.stopped(f"interrupted while {heard.step}."), interrupted=True)


class _Heard:
    """The messages of the child so far."""

    def __init__(self, spec: str, tell: Callable[[str], None]) -> None:
        self._spec, self._tell = spec, tell
        self._rows: list[PairRow] = []
        self.step = "starting"
        self.report: PairReport | None = None

    def take(self, message: Message) -> None:
        """Take the next message."""
        if "step" in message:
            self.step = message["step"]
            self._tell(self.step)
        elif "row" in message:
            self._rows.append(_row(message["row"]))
        elif "refused" in message:
            self.report = self.stopped(message["refused"])
        elif "report" in message:
            self.report = _report(message["report"])

    def stopped(self, sentence: str) -> PairReport:
        """Return a report of the rows so far, with the reason for its early end."""
        return PairReport(self._spec, self._rows, stopped=sentence)


def _row(fields: Message) -> PairRow:
    return PairRow(**_with_tuples(fields))


def _report(fields: Message) -> PairReport:
    places = tuple(Place(**_with_tuples(place)) for place in fields.get("places", ()))
    ladder = tuple(map(tuple, fields.get("ladder", ())))
    rows = [_row(row) for row in fields["rows"]]
    return PairReport(**{**_with_tuples(fields), "rows": rows, "places": places, "ladder": ladder})


def _with_tuples(fields: Message) -> Message:
    """Turn lists, the one kind of sequence that JSON has, back into the tuples of records."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def main(channel: Channel) -> None:
    """Judge the pair that the parent asks for; send every step, every row and the outcome."""
    asked = channel.receive()
    if asked is None:
        return
    sys.path[:] = asked["path"]

    def tell(found: Any) -> None:
        channel.send({"row": dataclasses.asdict(found)} if isinstance(found, PairRow) else {"step": str(found)})

    channel.send(outcome(asked["spec"], asked["arguments"], tell))


def outcome(spec: str, arguments: Mapping[str, Any], tell: Tell) -> Message:
    """Judge a named pair in this process.

    Returns:
        The last message: `report` with its fields, or `refused` with one sentence.
    """
    try:
        tell("importing the judge")
        from parity_tests.pair.check import run_pair

        return {"report": dataclasses.asdict(run_pair(spec, tell, **arguments))}
    except (ValueError, ProcessError) as error:
        return {"refused": clipped(" ".join(str(error).split()), _MOST_SENTENCE)}
    except Exception as error:  # a user's modules may raise anything; a person reads one line
        return {"refused": f"expected modules that run on their inputs, got {located(error)}."}
