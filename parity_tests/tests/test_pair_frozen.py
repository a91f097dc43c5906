"""Frozen parameters, values that are kept, and unmapped buffers: mapped, told, refused, or left out by consent."""

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import jax
import jax.numpy as jnp
import torch
from flax import nnx

from parity_tests.pair import MappingError, check_pair, propose_mapping

LINEAR = [("l.weight", "l.kernel", "o i -> i o"), ("l.bias", "l.bias")]
TABLE = np.sin(np.arange(20, dtype=np.float32).reshape(4, 5))
INPUTS = ((4, 6),)


class Torch(torch.nn.Module):
    """A linear layer and a table of positions: a frozen or trained parameter, or a buffer."""

    def __init__(self, kind="", table=TABLE):
        super().__init__()
        self.l = torch.nn.Linear(6, 5)
        values = torch.from_numpy(table.copy())
        if kind in ("frozen", "trained"):
            self.pos = torch.nn.Parameter(values, requires_grad=kind == "trained")
        elif kind:
            self.register_buffer("pos", values)

    def forward(self, x):
        return self.l(x) + self.pos if hasattr(self, "pos") else self.l(x)


class Flax(nnx.Module):
    """The same: the table is a variable, a parameter, or computed in the call."""

    def __init__(self, kind="", table=TABLE):
        self.l, self.kind, self.table = nnx.Linear(6, 5, rngs=nnx.Rngs(0)), kind, lambda: jnp.asarray(table)
        if kind == "variable":
            self.pos = nnx.Variable(self.table())
        elif kind in ("parameter", "stopped"):
            self.pos = nnx.Param(self.table())

    def __call__(self, x):
        if not self.kind:
            return self.l(x)
        table = self.table() if self.kind == "computed" else self.pos[...]
        return self.l(x) + (jax.lax.stop_gradient(table) if self.kind == "stopped" else table)


def positions(torch_kind, flax_kind, *rules, table=TABLE, **options):
    options = {"torch_module": Torch(torch_kind), "flax_module": Flax(flax_kind, table), "inputs": INPUTS} | options
    return check_pair(params=[*LINEAR, *rules], **options)


@pytest.mark.parametrize(
    ("torch_kind", "flax_kind", "rule"),
    [
        ("frozen", "variable", ("pos", "pos")),
        ("frozen", "stopped", ("pos", "pos")),
        ("buffer", "stopped", ("pos", "pos")),
        ("frozen", "computed", ("pos", None, "keep")),
        ("frozen", "variable", ("pos", "pos", "keep")),
    ],
)
def test_a_frozen_table_holds_wherever_either_side_keeps_it(torch_kind, flax_kind, rule):
    report = positions(torch_kind, flax_kind, rule)
    report.assert_ok()
    assert not any("pos" in row.tensor for row in report.rows if row.rung == "gradients")
    # What has no counterpart could not be trained in the first place.
    listed = any(what.startswith("the gradients of pos, which neither side trains") for what in report.not_compared)
    assert listed == (rule[1] is not None)
    assert (f"{rule} keeps its own values" in report.not_compared) == ("keep" in rule)


def test_kept_tables_that_differ_do_not_hold():
    other = TABLE.copy()
    other[2, 3] += 1e-3
    report = positions("frozen", "computed", ("pos", None, "keep"), table=other, gradients=False)
    assert report.first_failing_rung == "forward"
    report = positions("frozen", "variable", ("pos", "pos", "keep"), table=other, gradients=False)
    assert report.likely_cause == "the values of pos that both sides keep are not the same"


def test_what_one_side_trains_is_told():
    report = positions("frozen", "parameter", ("pos", "pos"))
    assert report.likely_cause.startswith("pos: frozen on the torch side (requires_grad=False")
    assert "pos is a frozen parameter on the torch side, and the flax side trains it" in report.describe()
    positions("frozen", "parameter", ("pos", "pos"), not_compared=("d_pos",)).assert_ok()
    report = positions("trained", "stopped", ("pos", "pos"))
    assert report.likely_cause == "the gradient of pos is stopped on the flax side"
    for report in (
        positions("trained", "computed", ("pos", None, "keep")),
        positions("", "parameter", (None, "pos", "keep"), torch_module=Torch("buffer"), not_compared=("pos",)),
    ):
        assert report.likely_cause == "pos: kept as a constant, and trained on the side that has it"
    with pytest.raises(MappingError, match=r"got a parameter and a buffer; freeze the torch parameter"):
        positions("trained", "variable", ("pos", "pos"))


def test_a_frozen_parameter_needs_a_rule_and_the_proposal_has_one():
    with pytest.raises(MappingError, match=r"without counterpart is kept by \('pos', None, 'keep'\)"):
        positions("frozen", "computed")
    proposal = propose_mapping(Torch("frozen"), Flax("computed"), INPUTS)
    assert proposal.rules[-1] == ("pos", None, "keep")
    assert "pos is frozen and has no counterpart" in str(proposal)
    check_pair(
        torch_module=Torch("frozen"), flax_module=Flax("computed"), params=proposal, inputs=INPUTS, gradients=False
    ).assert_ok()
    assert ("pos", "pos", "") in propose_mapping(Torch("frozen"), Flax("variable"), INPUTS).rules
    report = positions("frozen", "computed", ("pos", None, "0"), gradients=False)
    assert report.likely_cause.endswith("with its own values ('keep') both agree")


def test_an_unmapped_buffer_that_results_depend_on_is_refused_or_consented_to():
    class Ignoring(nnx.BatchNorm):
        def __call__(self, x):
            return x * jax.lax.rsqrt(self.var[...] + 1e-5) * self.scale[...] + self.bias[...]

    def judged(*rules, **options):
        return check_pair(
            torch_module=torch.nn.BatchNorm1d(5).eval(),
            flax_module=Ignoring(5, rngs=nnx.Rngs(0)),
            params=[("weight", "scale"), ("bias", "bias"), *rules],
            inputs=((6, 5),),
            **options,
        )

    with pytest.raises(
        MappingError, match=r"torch buffer running_mean, torch buffer running_var, flax buffer var; map"
    ):
        judged()
    # Nothing depends on the mean of the flax side, which is listed.
    report = judged(not_compared=("running_*", "var"), gradients=False)
    report.assert_ok()
    assert "torch buffer running_mean, left out by not_compared=" in report.not_compared
    assert "flax buffer mean" in report.not_compared
    assert not judged(("running_mean", "mean"), ("running_var", "var"), gradients=False).ok


def test_a_table_that_the_other_side_computes_is_listed_and_one_that_hides_a_port_is_not():
    report = positions("buffer", "computed", gradients=False)
    report.assert_ok()
    assert report.not_compared == ("torch buffer pos, a constant whose own values results depend on",)
    with pytest.raises(MappingError, match=r"got none for torch buffer pos, flax buffer pos; map them"):
        positions("buffer", "variable", gradients=False)
    ones = np.ones_like(TABLE)
    with pytest.raises(MappingError, match=r"got none for torch buffer pos; map them"):
        positions("buffer", "computed", torch_module=Torch("buffer", ones), table=ones, gradients=False)


class Counting(Torch):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        self.steps += 1
        return super().forward(x)


class FlaxCounting(Flax):
    def __init__(self, step):
        super().__init__()
        self.count, self.step = nnx.Variable(0), step

    def __call__(self, x):
        self.count[...] = self.count.get_value() + self.step
        return super().__call__(x)


def test_a_counter_is_compared_refused_or_listed():
    def judged(*rules, flax_module):
        pair = {"torch_module": Counting(), "flax_module": flax_module, "params": [*LINEAR, *rules]}
        return check_pair(**pair, inputs=INPUTS, gradients=False)

    report = judged(("steps", "count"), flax_module=FlaxCounting(2))
    assert {row.tensor for row in report.rows if row.status == "mismatch"} == {"state:steps"}
    judged(("steps", "count"), flax_module=FlaxCounting(1)).assert_ok()
    with pytest.raises(
        MappingError, match=r"updates on both sides, got none for torch buffer steps, flax buffer count"
    ):
        judged(flax_module=FlaxCounting(2))
    report = judged(flax_module=Flax())
    report.assert_ok()
    assert report.not_compared == ("torch buffer steps, which a call updates",)
