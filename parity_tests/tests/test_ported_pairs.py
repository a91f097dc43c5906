"""The bench of the judge: pairs that people port hold, the bugs of ports are found, and the score counts both.

All pairs and bugs are judged by `python -m parity_tests defects --pairs`. Here: that each can be built, and the score
of `SUBSET` in one seed.
"""

import dataclasses
import importlib
import inspect
import json
import re

import pytest
from typer.testing import CliRunner

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

from parity_tests.__main__ import app
from parity_tests.defects import pairs
from parity_tests.defects.pairs import LEAST_NAMED, MANY_SEEDS, PAIRS, Judged, bugs_of, is_met, judged, plan, score
from parity_tests.defects.ported import bug
from parity_tests.pair.check import check_pair
from parity_tests.pair.loading import load_factory

# Pairs whose bugs are judged here, with the bugs whose causes were named rightly when this was written: no fewer ever.
SUBSET = {
    "linear": {"transposed_kernel", "missing_bias", "bias_twice", "narrow_product"},
    "strided_conv": {"flipped_kernel", "missing_bias"},
    "nlinear": set(),
}


def test_the_set_is_as_large_as_it_must_be():
    assert len(PAIRS) >= 40
    assert len(MANY_SEEDS) == 8
    assert set(MANY_SEEDS) <= set(PAIRS)
    for pair in PAIRS.values():
        assert len(bugs_of(pair.name)) == len(pair.bugs) >= 3
        assert pair.name.isidentifier()
        for planted in pair.bugs:
            assert planted.name.isidentifier()
            assert "__" not in pair.name + planted.name
            assert planted.flax or planted.torch or planted.pair, "a bug changes something"
            re.compile(planted.cause or "")
            re.compile(planted.place)


@pytest.mark.parametrize("side", ["torch", "jax"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))
def test_every_bug_is_an_argument_of_a_half_that_changes_it(pair, side):
    half = getattr(importlib.import_module(f"parity_tests.frameworks.{side}.{pair.room}"), pair.name)
    parameters = inspect.signature(half).parameters
    for planted in pair.bugs:
        changed = planted.torch if side == "torch" else planted.flax
        assert set(changed) <= set(parameters)
        # An argument at its default would be the faithful port again.
        assert not changed or any(parameters[name].default != value for name, value in changed.items()), planted.name
        assert all(pair.part("pair")[name] != value for name, value in planted.pair.items())


def test_the_plan_has_many_seeds_for_eight_pairs_only():
    whole = plan(50)
    assert len(whole) == sum(1 + len(pair.bugs) for pair in PAIRS.values())
    assert {len(seeds) for (pair, _), seeds in whole.items() if pair in MANY_SEEDS} == {50}
    assert {len(seeds) for (pair, _), seeds in whole.items() if pair not in MANY_SEEDS} == {3}
    assert {len(seeds) for seeds in plan(2).values()} == {2}
    assert set(plan(1, ["linear"])) == {("linear", ""), *(("linear", name) for name in bugs_of("linear"))}


@pytest.mark.sample(3)
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("pair", SUBSET)
def test_the_score_of_a_subset(pair):
    results = [result for bug in ("", *bugs_of(pair)) for result in judged(pair, bug, [0])]
    assert not any(result.why or result.skipped for result in results)
    counts = score(results)
    assert (counts["faithful_judged"], counts["faithful_held"]) == (1, 1)
    assert counts["bugs_planted"] == counts["bugs_found"] == len(bugs_of(pair))
    assert counts["wrong_causes"] == []
    assert SUBSET[pair] <= {result.bug for result in results if result.right}


@pytest.mark.every
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "name",
    [
        *("cross_entropy__smoothing", "gaussian_process__missing_half", "grouped_query_attention__scale_of_width"),
        *("encoder_pre__causal", "mixer_block__norm_shared", "dlinear__zeros_at_the_ends"),
    ],
)
def test_a_cause_that_takes_a_search_of_its_own_is_named(name):
    (result,) = judged(*name.split("__"), [0])
    assert result.right, result


@pytest.mark.usefixtures("quick_compilation")
def test_a_pair_and_a_bug_are_factories_by_their_name():
    report = check_pair(pair="parity_tests.defects.pairs:nlinear__around_the_first")
    assert (report.ok, report.name) == (False, "nlinear__around_the_first")
    assert "parity_tests.defects.pairs:nlinear__around_the_first" in report.rows[0].command
    for name in ("nlinear__", "nlinear__no_such_bug", "no_such_pair"):
        if name != "nlinear__":
            with pytest.raises(ValueError, match="expected a function"):
                load_factory(f"parity_tests.defects.pairs:{name}")


def test_what_cannot_be_judged_counts_as_a_fault_of_the_judge(monkeypatch):
    bad = dataclasses.replace(PAIRS["nlinear"], params=[("fc.weight", "fc.no_such")])
    monkeypatch.setitem(PAIRS, "nlinear", bad)
    (faithful,), (planted,) = judged("nlinear", "", [7]), judged("nlinear", "not_added_back", [7])
    assert (faithful.ok, planted.ok, faithful.seed) == (False, False, 7)
    assert faithful.why.startswith("MappingError: params: ")
    counts = score([faithful, planted])
    assert (counts["condemned"], counts["survivors"]) == (["nlinear seed 7"], ["nlinear__not_added_back seed 7"])


def _right(name="transposed_kernel", **changed):
    return Judged("linear", name, 0, **{"ok": True, "cause": "the kernel is transposed", "right": True, **changed})


GOOD = [Judged("linear", "", 0, True), *(_right(name) for name in bugs_of("linear"))]


def test_a_score_is_met_only_without_faults():
    assert is_met(score(GOOD))
    assert not is_met(score([]))
    assert not is_met(score(GOOD[:1]))
    assert not is_met(score([*GOOD, Judged("linear", "", 1, False)]))
    assert not is_met(score([*GOOD, _right(ok=False)]))
    assert not is_met(score([*GOOD, _right(right=False)]))
    unnamed = _right(cause="", right=False)
    assert is_met(score([*GOOD * 5, unnamed]))
    counts = score([*GOOD, unnamed])
    assert counts["causes_right_fraction"] == 0.8 < LEAST_NAMED
    assert not is_met(counts)
    assert counts["unnamed_causes"] == ["linear__transposed_kernel seed 0"]


class _Report:
    """A report as the judge would give it."""

    random, ok, place = False, False, "layers.3.norm2 / blocks[3].norm2"

    def __init__(self, cause, bound="calibrated"):
        self.likely_cause = cause
        self.rows = [type("Row", (), {"status": "mismatch", "bound": bound, "dtype": "float32", "reason": ""})()]


@pytest.mark.parametrize(
    ("expected", "place", "cause", "right", "place_right"),
    [
        ("epsilon.*1e-06", "norm2", "Epsilon: torch has 1e-05, flax 1e-06", True, True),
        ("epsilon.*1e-06", "norm1", "Epsilon: torch has 1e-05, flax 1e-03", False, False),
        (None, "", "epsilon", False, None),
        ("epsilon", "", "", False, None),
    ],
)
def test_a_cause_and_a_place_are_right_if_they_say_what_was_planted(
    monkeypatch, expected, place, cause, right, place_right
):
    monkeypatch.setattr(pairs, "_reports", lambda *_: iter([(0, _Report(cause), 1.0)]))
    monkeypatch.setitem(PAIRS, "linear", dataclasses.replace(PAIRS["linear"], bugs=(bug("b", expected, place, x=1),)))
    (result,) = judged("linear", "b", [0])
    assert (result.ok, result.right, result.place_right) == (True, right, place_right)


def test_an_undecided_bug_is_not_found(monkeypatch):
    monkeypatch.setattr(pairs, "_reports", lambda *_: iter([(0, _Report("", "undecided"), 1.0)]))
    (result,) = judged("linear", "missing_bias", [0])
    assert not result.ok


@pytest.fixture
def invented(monkeypatch):
    """Judging costs nothing; the list tells what was judged, and after `stop` checks Ctrl-C comes."""
    done = []

    def instead(pair, bug, seeds):
        for seed in seeds:
            if len(done) == invented.stop:
                raise KeyboardInterrupt
            done.append((pair, bug, seed))
            yield Judged(pair, bug, seed, True, "why", right=True)

    invented.stop = None
    invented.done = done
    monkeypatch.setattr(pairs, "judged", instead)
    return invented


def invoke(*arguments):
    return CliRunner().invoke(app, ["defects", "--pairs", *map(str, arguments)])


def test_an_interrupted_run_goes_on_where_it_was(invented, tmp_path):
    target = tmp_path / "score.json"
    asked = ("--pair", "linear", "--pair", "nlinear", "--seeds", 2, "--json", target)
    invented.stop = 5
    assert invoke(*asked).exit_code == 130
    found = json.loads(target.read_text())
    assert (len(found["results"]), found["stopped"][:12]) == (5, "interrupted:")
    first = list(invented.done)
    invented.done.clear()
    invented.stop = None
    assert invoke(*asked, "--resume").exit_code == 0
    assert not set(first) & set(invented.done)
    assert len(first) + len(invented.done) == 2 * (5 + 4)
    found = json.loads(target.read_text())
    assert (found["stopped"], found["score"]["bugs_planted"], found["score"]["faithful_held"]) == ("", 14, 4)
    # Nothing is left to do, and the score is the same.
    invented.done.clear()
    assert invoke(*asked, "--resume").exit_code == 0
    assert not invented.done
    # Without it, everything is judged anew.
    assert invoke(*asked).exit_code == 0
    assert len(invented.done) == 18


def test_results_of_other_code_or_of_another_document_are_not_taken_over(invented, tmp_path):
    target = tmp_path / "score.json"
    asked = ("--pair", "linear", "--json", target)
    assert invoke(*asked).exit_code == 0
    for change in ({"code": "other"}, {"environment": {}}, {"results": None}):
        document = json.loads(target.read_text()) | change
        spoiled = tmp_path / "spoiled.json"
        spoiled.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
        refused = invoke("--pair", "linear", "--json", spoiled, "--resume")
        assert refused.exit_code == 2
        assert "expected a score of" in refused.output
    (tmp_path / "no.json").write_text("{")
    assert invoke("--pair", "linear", "--json", tmp_path / "no.json", "--resume").exit_code == 2


def test_a_survivor_is_told_by_exit_status_and_by_name(invented, monkeypatch, tmp_path):
    monkeypatch.setattr(pairs, "judged", lambda pair, bug, seeds: iter([Judged(pair, bug, 0, bug != "missing_bias")]))
    result = invoke("--pair", "linear", "--json", tmp_path / "score.json")
    assert result.exit_code == 1
    assert "survivors: linear__missing_bias seed 0" in result.output
    assert json.loads((tmp_path / "score.json").read_text())["score"]["survivors"] == ["linear__missing_bias seed 0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "--pair", "no_such"], "--pair"),
        (["--pairs", "--framework", "jax"], "--framework"),
        (["--pairs", "--resume"], "--json"),
        (["--seeds", "2"], "--pairs"),
        (["--resume"], "--pairs"),
    ],
)
def test_wrong_usage_is_told_in_one_sentence(arguments, message):
    result = CliRunner().invoke(app, ["defects", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
