"""The five example pairs with every default: what the check says, what was measured, and the page's table of both."""

import functools
from pathlib import Path

import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("scipy", reason="scipy is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

from parity_tests.commands.pair import BEGIN, END, by_default, default_differences, readme_block, with_block
from parity_tests.pair.examples import EXAMPLES

PAGE = Path(__file__).resolve().parents[1] / "README.md"
CAUSES = {
    "linear": "",
    "conv": "sizes: y has shape (2, 8, 5, 4) on the torch side and (2, 8, 7, 6) on the flax side",
    "layer_norm": "epsilon: the torch side uses 1e-05, the flax side behaves like 1e-06",
    "attention": "the batch is the first axis on one side and the second on the other",
    "gru_cell": "inputs 0 and 1 are exchanged between the two sides",
}


@pytest.fixture(scope="module")
def differences():
    return default_differences()


outcome = functools.cache(by_default)


def test_what_differs_by_default_was_measured(differences):
    found = {(d.pair, d.aspect): d for d in differences}
    assert {d.pair for d in differences} == set(EXAMPLES)
    epsilon = found["layer_norm", "epsilon"]
    assert (epsilon.torch, epsilon.flax) == ("1.0e-05", "1.0e-06")
    assert found["linear", "bias at zero"].flax == "True"
    assert (found["attention", "axis of the batch"].torch, found["attention", "axis of the batch"].flax) == ("1", "0")
    assert not found["gru_cell", "update gate among r, z, n (ir, iz, in)"].differs
    assert sum(d.differs for d in differences) >= 10


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_check_finds_what_the_defaults_break(name):
    report = outcome(name)
    assert report.ok == (name == "linear")
    assert report.likely_cause.startswith(CAUSES[name])
    if not report.ok:
        assert report.first_failing_rung == "forward"
        with pytest.raises(AssertionError, match="first failing rung: forward; likely cause: "):
            report.assert_ok()


@pytest.mark.every
def test_the_page_shows_what_the_code_measures(differences):
    text, outcomes = PAGE.read_text(), {name: outcome(name) for name in EXAMPLES}
    assert with_block(text, readme_block(outcomes, differences)) == text, (
        "stale: run python -m parity_tests pairs --readme parity_tests/README.md"
    )


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="expected the markers"):
        with_block("no markers", f"{BEGIN}\n{END}")
