"""The judge of drawn calls: each thing that a call may not do is a fault, and what it may do is none."""

import numpy as np
import pytest

from parity_tests.judge.inputs import SMOKE
from parity_tests.tests.drawn_calls import (
    Attempt,
    Call,
    Entry,
    Flaw,
    bits_fault,
    draw_call,
    every_kind,
    judge,
    product_fault,
)
from parity_tests.tests.flaws import NO_ARRAYS, NO_PATH, NO_SIZE, Hostile
from parity_tests.tests.numpy_subject import NumpySubject

TREE = "parity_tests"  # where the errors of this file come from


def refuse(text, error=ValueError):
    def run():
        raise error(text)

    return run


SENTENCE = "`size`: expected a positive int, got 0; pass at least 1."


def judged(run, *, flaw=None, fault="", state=lambda: None, unsupported=False, tree=TREE):
    """The one fault found in a call, or None."""

    def prepare(call, spoil):
        spoil("size", 1)
        return Attempt(run, lambda result: fault, state, unsupported)

    entries = {"function": Entry(prepare, {"size": {"zero": flaw or Flaw(lambda value, call: 0)}})}
    call = Call(
        0, 0, "function", SMOKE[0], "float32", "auto", "eager", (("size", "zero"),) if flaw is not False else ()
    )
    found = judge(entries, iter([call]), tree)
    assert len(found.faults) <= 1
    assert sum(found.outcomes.values()) == 1
    return found.faults[0].partition("): ")[2] if found.faults else None


def test_a_refusal_in_one_sentence_and_a_right_result_are_accepted():
    assert judged(refuse(SENTENCE)) is None
    assert judged(lambda: 1, flaw=False) is None
    assert judged(lambda: 1, flaw=Flaw(lambda value, call: 2, refused=False)) is None
    either = Flaw(lambda value, call: 2, refused=None)
    assert judged(lambda: 1, flaw=either) is None
    assert judged(refuse(SENTENCE), flaw=either) is None


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (refuse(SENTENCE, RuntimeError), "expected a documented error, got RuntimeError"),
        (refuse(SENTENCE, SystemExit), "expected a documented error, got SystemExit"),
        (refuse("sizes must be positive"), "expected one sentence"),
        (refuse(SENTENCE + "\nSee the manual."), "expected one sentence"),
        (refuse(SENTENCE[:-1] + ". That is all."), "expected one sentence"),
        (refuse(SENTENCE[:-1]), "expected one sentence"),
        (refuse(SENTENCE.replace("0", "\x1b[31m0")), "expected one sentence"),
        (refuse(SENTENCE.replace("0", "9" * 700)), "expected one sentence"),
        (refuse(SENTENCE.replace("size", "other")), "expected a refusal of size"),
        (lambda: np.zeros((2, 3)).reshape(4), "expected one sentence"),
        (lambda: 1, "expected a refusal, got int"),
    ],
    ids=["type", "exit", "words", "lines", "two", "stop", "colours", "length", "argument", "framework", "taken"],
)
def test_what_is_no_refusal_is_a_fault(run, found):
    assert judged(run).startswith(found)


def test_an_error_must_come_from_the_tree():
    assert judged(refuse(SENTENCE), tree="torch_impl").startswith("expected an error that torch_impl raises")


def test_a_valid_call_must_be_taken_and_right():
    assert judged(refuse(SENTENCE), flaw=False).startswith("expected a refusal of nothing")
    assert judged(refuse(SENTENCE), flaw=Flaw(lambda value, call: 2, refused=False)).startswith(
        "expected a refusal of n"
    )
    assert judged(lambda: 1, flaw=False, fault="y is wrong") == "y is wrong"
    assert judged(lambda: 1, flaw=False, unsupported=True).startswith("expected an UnsupportedImplementationError")


def test_a_failed_call_must_leave_the_module_alone():
    values = []

    def half():
        values.append(1)
        raise ValueError(SENTENCE)

    assert judged(half, state=lambda: list(values)) == "the failed call has changed the module"


def test_two_flaws_of_one_kind_may_fit_together():
    def prepare(call, spoil):
        first, second = spoil("first", 1), spoil("second", 1)
        run = refuse(SENTENCE.replace("size", "first")) if first != second else lambda: first
        return Attempt(run, lambda result: "")

    two = {"two": Flaw(lambda value, call: 2, relative=True)}
    entries = {"function": Entry(prepare, {"first": two, "second": two})}

    def call(*arguments):
        return Call(0, 0, "function", SMOKE[0], "float32", "auto", "eager", tuple((name, "two") for name in arguments))

    assert judge(entries, iter([call("first"), call("first", "second")]), TREE).faults == []


def test_products_and_bits_are_judged():
    call = draw_call({"": Entry(lambda call, spoil: None, {})}, 0, 1)
    outputs = NumpySubject().vjp(call.inputs)
    assert product_fault(outputs, call.inputs) == ""
    assert "y" in product_fault({"y": outputs["y"] + outputs["y"].dtype.type(1)}, call.inputs)
    array = np.ones((2, 3), np.float32)
    assert bits_fault({"a": array}, {"a": array.copy()}) == ""
    assert bits_fault({"a": array}, {"a": -array}) == "expected the same bits in a"
    assert bits_fault({"a": array}, {"a": array.astype(np.float64)}) == "expected the same bits in a"
    assert bits_fault({"a": array}, {}) == "expected the arrays [], got ['a']"


def test_draws_repeat_and_reach_every_kind():
    flaws = {"path": NO_PATH, "size": NO_SIZE, "arrays": NO_ARRAYS}
    entries = {"function": Entry(lambda call, spoil: None, flaws, ("eager", "mapped"), ("auto", "loop"))}
    calls = [draw_call(entries, 0, number) for number in range(2000)]
    assert calls[7] == draw_call(entries, 0, 7) != draw_call(entries, 1, 7)
    drawn = {flaw for call in calls for flaw in call.flaws}
    assert drawn == {flaw for call in every_kind(entries) for flaw in call.flaws}
    assert {len(call.flaws) for call in calls} == {0, 1, 2}
    assert {call.way for call in calls if not call.flaws} == {"eager", "mapped"}
    assert {call.way for call in calls if call.flaws} == {"eager"}


def test_a_hostile_value_fails_in_everything():
    for ask in (repr, len, np.asarray, open):
        with pytest.raises(RuntimeError):
            ask(Hostile())
