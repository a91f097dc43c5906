"""Draw calls of a tree's public functions, and judge each: right in the oracle's eyes, or refused in one sentence.

Nothing else is accepted: no wrong value, no framework's own error, no refusal of a valid call, no module that a failed
call has changed. No framework is imported here; what can be called, and with which flaws in which argument, stands in
`test_torch_drawn_calls.py` and `test_jax_drawn_calls.py`; flaws of arguments that both trees have in `flaws.py`.
"""

import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests.judge.comparison import compare
from parity_tests.judge.dtypes import STORAGE_DTYPES
from parity_tests.judge.inputs import Case, Inputs, draw_inputs
from parity_tests.judge.tolerance import PRECISION_OF_DTYPE, Arithmetic, declared_arithmetic, reference

# Few shapes, since JAX compiles for each: ordinary ones, and those in which one axis can be taken for another.
CASES = (
    Case("plain", (5,), 3, 8, 16),
    Case("no-leading", (), 4, 8, 16),
    Case("empty", (0,), 3, 8, 8),
    Case("two-axes", (2, 3), 2, 4, 5),
    Case("one-partition", (1,), 1, 8, 8),
    Case("one-in", (4,), 3, 1, 3),
    Case("one-out", (4,), 3, 4, 1),
    Case("all-alike", (4,), 4, 4, 4),
    Case("all-one", (1,), 1, 1, 1),
    Case("many-axes", (1,) * 9, 2, 8, 8),
)
LAYOUTS = ("contiguous", "strided", "transposed")
DOCUMENTED = (TypeError, ValueError, MemoryError, FileNotFoundError, IsADirectoryError)
_SENTENCE = re.compile(r"`(?P<argument>\w+)[^`]*`: .*\b(expected|supports|needs|can be traced)\b.*\bgot\b.+\.")


@dataclass(frozen=True)
class Call:
    """One call, which its seed and number draw again.

    Attributes:
        seed: the first half of what it is drawn from.
        number: the other half; also the seed of its numbers.
        entry: what is called.
        case: sizes, leading axes, bias and layout.
        dtype: storage dtype.
        implementation: "auto" or a name.
        way: how it is called, "eager" or a transform.
        flaws: (argument, kind) of what is wrong with it; none in a valid call.
    """

    seed: int
    number: int
    entry: str
    case: Case
    dtype: str
    implementation: str
    way: str
    flaws: tuple[tuple[str, str], ...]

    @property
    def inputs(self) -> Inputs:
        """The numbers of the call."""
        return draw_inputs(self.case, self.dtype, self.number)


@dataclass(frozen=True)
class Flaw:
    """One way in which an argument is not the usual one.

    Attributes:
        make: (the usual value, the call) -> the value to pass.
        refused: whether a call with it must be refused, must be right (False) or may be either (None); or a function
            (the value passed, the call) -> one of these.
        names: arguments that a message may name besides the argument itself.
        relative: whether it is wrong only beside the other arguments, so that two of the kind may fit together.
    """

    make: Callable[[Any, Call], Any]
    refused: bool | Callable[[Any, Call], bool | None] | None = True
    names: tuple[str, ...] = ()
    relative: bool = False


Flaws = Mapping[str, Flaw]


@dataclass(frozen=True)
class Attempt:
    """A call that is ready to be made.

    Attributes:
        run: makes it.
        fault: what is wrong with what it returned, in words; empty where nothing is.
        state: everything that a failed call must leave as it is.
        unsupported: whether the table declares that the call cannot run.
    """

    run: Callable[[], Any]
    fault: Callable[[Any], str]
    state: Callable[[], Any] = lambda: None
    unsupported: bool = False


Spoil = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Entry:
    """A public function, or a method.

    Attributes:
        prepare: (the call, a function (argument, usual value) -> value to pass) -> the attempt.
        flaws: argument -> kind -> flaw.
        ways: how it can be called.
        implementations: names that it can be asked for.
    """

    prepare: Callable[[Call, Spoil], Attempt]
    flaws: Mapping[str, Flaws]
    ways: tuple[str, ...] = ("eager",)
    implementations: tuple[str, ...] = ("auto",)


@dataclass
class Judged:
    """What became of many calls.

    Attributes:
        outcomes: "right", "refused" or "unsupported" -> how many.
        faults: one sentence for each call that was neither.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def draw_call(entries: Mapping[str, Entry], seed: int, number: int) -> Call:
    """Draw one call: with no flaw, one (mostly) or two."""
    rng = np.random.default_rng([seed, number])

    def one_of(choices: Any) -> Any:
        choices = tuple(choices)
        return choices[rng.integers(len(choices))]

    name = one_of(entries)
    entry = entries[name]
    arguments = rng.permutation(list(entry.flaws))[: rng.choice(3, p=(0.3, 0.55, 0.15))]
    flaws = tuple((str(argument), one_of(entry.flaws[argument])) for argument in arguments)
    case = replace(one_of(CASES), bias=bool(rng.random() < 0.7), layout=one_of(LAYOUTS))
    way = "eager" if flaws else one_of(entry.ways)
    return Call(seed, number, name, case, one_of(STORAGE_DTYPES), one_of(entry.implementations), way, flaws)


def every_kind(entries: Mapping[str, Entry]) -> Iterator[Call]:
    """Give one call for each flaw of each argument, with a bias, so that it is there to be spoilt."""
    for name, entry in entries.items():
        for argument, kinds in entry.flaws.items():
            for kind in kinds:
                yield Call(0, 0, name, CASES[0], "float32", "auto", "eager", ((argument, kind),))


def judge(entries: Mapping[str, Entry], calls: Iterator[Call], tree: str) -> Judged:
    """Make calls and judge them.

    Args:
        entries: what can be called.
        calls: the calls.
        tree: name of the package whose words a refusal must be in.
    """
    judged = Judged()
    for call in calls:
        try:
            outcome, fault = _judge_one(entries[call.entry], call, tree)
        except Exception as error:
            error.add_note(f"in {call}")
            raise
        judged.outcomes[outcome] += 1
        if fault:
            judged.faults.append(f"{call}: {fault}")
    return judged


def _judge_one(entry: Entry, call: Call, tree: str) -> tuple[str, str]:
    allowed: set[str] = set()
    wrong: list[bool] = []  # of every flaw that is one: whether it is so by itself
    kinds = dict(call.flaws)

    def spoil(argument: str, value: Any) -> Any:
        if argument not in kinds:
            return value
        flaw = entry.flaws[argument][kinds[argument]]
        passed = flaw.make(value, call)
        refused = flaw.refused(passed, call) if callable(flaw.refused) else flaw.refused
        if refused:
            wrong.append(not flaw.relative)
        if refused is not False:
            allowed.update((argument, *flaw.names))
        return passed

    attempt = entry.prepare(call, spoil)
    before = attempt.state()
    try:
        result = attempt.run()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if attempt.unsupported:
            allowed.add("implementation")
        fault = _fault_of_refusal(error, allowed, tree)
        if not fault and attempt.state() != before:
            fault = "the failed call has changed the module"
        return "unsupported" if attempt.unsupported else "refused", fault
    if any(wrong) or len(wrong) == 1:
        return "right", f"expected a refusal, got {type(result).__name__}"
    if attempt.unsupported:
        return "right", "expected an UnsupportedImplementationError, as the table declares, got a result"
    return "right", attempt.fault(result)


def _fault_of_refusal(error: BaseException, allowed: set[str], tree: str) -> str:
    text, kind = str(error), type(error)
    said = f"{kind.__name__}: {text[:400]!r}"
    if kind not in DOCUMENTED and kind.__name__ != "UnsupportedImplementationError":
        return f"expected a documented error, got {said}"
    match = _SENTENCE.fullmatch(text)
    if match is None or not text.isprintable() or len(text) > 600 or re.search(r"\. [A-Z]", text):
        return f"expected one sentence, got {said}"
    if match["argument"] not in allowed:
        return f"expected a refusal of {', '.join(sorted(allowed)) or 'nothing'}, got {said}"
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if tree not in raised_in.parts:
        return f"expected an error that {tree} raises, got one of {raised_in.name}: {said}"
    return ""


def product_fault(outputs: Mapping[str, np.ndarray], inputs: Inputs, arithmetic: Arithmetic | None = None) -> str:
    """Say where outputs are not what the oracle allows; nothing where they are."""
    arithmetic = arithmetic or declared_arithmetic(PRECISION_OF_DTYPE[inputs.dtype])
    results = compare(outputs, reference(inputs), arithmetic)
    return ", ".join(result.reason for result in results if result.status != "ok")


def bits_fault(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> str:
    """Say which arrays differ in a bit, in shape or in dtype; nothing where none does."""
    if found.keys() != expected.keys():
        return f"expected the arrays {sorted(expected)}, got {sorted(found)}"
    unequal = [
        name
        for name, array in found.items()
        if (array.shape, array.dtype, array.tobytes())
        != (expected[name].shape, expected[name].dtype, np.ascontiguousarray(expected[name]).tobytes())
    ]
    return f"expected the same bits in {', '.join(unequal)}" if unequal else ""
