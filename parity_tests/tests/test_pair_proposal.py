"""Proposed mappings: right for the example pairs where names and shapes decide, and honest where they do not."""

import ast

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")

from parity_tests.judge.subjects import framework_available
from parity_tests.pair.examples import EXAMPLES
from parity_tests.pair.mapping import ParameterMapping
from parity_tests.pair.proposal import propose_mapping, propose_rules
from parity_tests.pair.side import ParameterSpec

both = pytest.mark.skipif(
    not (framework_available("torch") and framework_available("jax")), reason="needs both frameworks"
)


def specs(**shapes):
    return {name.replace("__", "."): ParameterSpec(np.zeros(shape, np.float32), True) for name, shape in shapes.items()}


def effect(rules, torch, flax):
    """What the rules do with distinct numbers, so that different spellings of one mapping compare equal."""
    mapping = ParameterMapping(rules, torch, flax)
    counter = iter(range(10))
    arrays = {
        name: (np.arange(torch[name].value.size) + 1000 * next(counter))
        .astype(np.float32)
        .reshape(torch[name].value.shape)
        for name in mapping.torch_names
    }
    return {name: array.tolist() for name, array in mapping.to_flax(arrays).items()}


@both
@pytest.mark.parametrize("name", ["linear", "conv", "layer_norm", "attention"])
def test_proposal_for_an_example_is_its_mapping(name):
    from parity_tests.pair.loading import make_side

    factory = EXAMPLES[name]
    arguments = factory("torch") | factory("jax") | factory("pair")
    patterns = arguments.get("input_patterns")
    proposal = propose_mapping(
        arguments["torch_module"], arguments["flax_module"], arguments["inputs"], input_patterns=patterns
    )
    assert proposal.left == ()
    torch, flax = (make_side(key, arguments, "cpu").parameters(()) for key in ("torch", "jax"))
    assert effect(proposal.rules, torch, flax) == effect(arguments["params"], torch, flax)
    # Pasting the text gives the rules back.
    assert ast.literal_eval(str(proposal).split("#")[0].removeprefix("params = ").strip()) == list(proposal.rules)


@both
def test_proposal_for_the_gru_leaves_what_has_no_counterpart():
    arguments = EXAMPLES["gru_cell"]("torch") | EXAMPLES["gru_cell"]("jax") | EXAMPLES["gru_cell"]("pair")
    proposal = propose_mapping(arguments["torch_module"], arguments["flax_module"], arguments["inputs"])
    assert ("weight_ih[0:8]", "GRUCell_0.ir.kernel", "b a -> a b") in proposal.rules
    assert ("weight_ih[16:24]", "GRUCell_0.in.kernel", "b a -> a b") in proposal.rules
    assert any(what.startswith("torch bias_hh") for what in proposal.left)
    assert any("is a guess" in sentence for sentence in proposal.ambiguities)


def test_ambiguities_are_listed():
    torch, flax = specs(a__weight=(4, 4), b__weight=(4, 4)), specs(x__kernel=(4, 4), y__kernel=(4, 4))
    proposal = propose_rules(torch, flax)
    assert len(proposal.rules) == 2
    assert any("no better than" in sentence for sentence in proposal.ambiguities)
    assert any("also allow the axis pattern" in sentence for sentence in proposal.ambiguities)
    assert all(rule[2] == "b a -> a b" for rule in proposal.rules)


def test_names_decide_among_equal_shapes():
    torch = specs(layers__0__weight=(4, 4), layers__1__weight=(4, 4), layers__0__bias=(4,), layers__1__bias=(4,))
    flax = specs(layers__1__kernel=(4, 4), layers__0__kernel=(4, 4), layers__1__bias=(4,), layers__0__bias=(4,))
    found = {rule[0]: rule[1] for rule in propose_rules(torch, flax).rules}
    assert found == {name: name.replace("weight", "kernel") for name in torch}


def test_frozen_parameters_may_be_buffers_elsewhere_and_are_kept_where_they_have_no_counterpart():
    def table(trainable=False, frozen=False, dtype=np.float32):
        return ParameterSpec(np.zeros((3, 4), dtype), trainable, frozen)

    proposal = propose_rules({"pos": table(frozen=True)}, {"pos": table()})
    assert proposal.rules == (("pos", "pos", ""),)
    for other in (table(trainable=True), table(dtype=np.int32)):
        assert propose_rules({"pos": table()}, {"pos": other}).rules == ()
    proposal = propose_rules({"pos": table(frozen=True)}, {})
    assert (proposal.rules, proposal.left) == ((("pos", None, "keep"),), ())
    assert "pos is frozen and has no counterpart" in proposal.ambiguities[0]


def test_nothing_fits():
    proposal = propose_rules(specs(weight=(3,)), specs(kernel=(4,)))
    assert proposal.rules == ()
    assert proposal.left == ("torch weight (3,)", "flax kernel (4,)")
