"""Buffers that a call updates are compared as they are after it, and named where they are not."""

import json

import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import flax.linen as nn
import torch
from flax import nnx

from parity_tests.pair import check_pair

RULES = [("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var")]
LINEN = [*RULES[:2], ("running_mean", "batch_stats.mean"), ("running_var", "batch_stats.var")]


class Unbiased(nnx.BatchNorm):
    """With torch's variance, divided by n - 1."""

    def __call__(self, x):
        before, count = self.var[...], x.shape[0]
        y = super().__call__(x)
        kept = self.momentum * before
        self.var[...] = (kept + (self.var[...] - kept) * count / (count - 1)).astype(before.dtype)
        return y


class Replacing(torch.nn.BatchNorm1d):
    """Puts new tensors in its buffers' place, where the stock module updates them."""

    def forward(self, x):
        self.running_mean, self.running_var = self.running_mean.clone(), self.running_var.clone()
        return super().forward(x)


def batch_norm(flax_module=None, torch_module=None, **options):
    return check_pair(
        **{
            "torch_module": torch_module or torch.nn.BatchNorm1d(5),
            "flax_module": flax_module or nnx.BatchNorm(5, momentum=0.9, rngs=nnx.Rngs(0)),
            "params": RULES,
            "inputs": ((6, 5),),
            "gradients": False,
        }
        | options
    )


def of_state(report, status="ok"):
    return {
        (row.framework, row.dtype, row.tensor) for row in report.rows if (row.rung, row.status) == ("state", status)
    }


# Flax's BatchNorm computes its statistics in float32 and puts them into the bfloat16 arrays that it was given.
@pytest.mark.sample(2)
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
@pytest.mark.parametrize("module", [torch.nn.BatchNorm1d, Replacing])
def test_running_statistics_that_agree_are_compared_in_every_dtype(module):
    unbiased = Unbiased(5, momentum=0.9, rngs=nnx.Rngs(0))
    report = batch_norm(unbiased, module(5), dtypes=("float32", "bfloat16"), gradients=True)
    report.assert_ok()
    compared = [("torch", "float32"), ("jax", "float32"), ("torch", "bfloat16"), ("jax", "bfloat16")]
    compared += [("torch+jax", dtype) for dtype in ("float64", "float32", "bfloat16")]
    names = ("state:running_mean", "state:running_var")
    assert of_state(report) == {(*where, name) for where in compared for name in names}
    assert "torch buffer num_batches_tracked, which a call updates" in report.not_compared


def test_stock_running_variances_differ_and_the_cause_says_how():
    report = batch_norm()
    assert report.first_failing_rung == "state"
    assert {tensor for *_, tensor in of_state(report, "mismatch")} == {"state:running_var"}
    # n is 6.
    assert report.likely_cause.startswith(
        "the value that a call adds to running_var is 0.833333 times as large on the fl"
    )
    # Outputs and gradients hold, which is all that is asked for without the state.
    report = batch_norm(state=False)
    report.assert_ok()
    assert of_state(report) == set()
    assert "torch buffer running_var, which a call updates" in report.not_compared
    assert "flax buffer var, which a call updates" in report.not_compared


def test_another_momentum_is_a_likely_cause_in_linen_too():
    options = {"params": LINEN, "flax_kwargs": {"mutable": ["batch_stats"]}}
    report = batch_norm(nn.BatchNorm(use_running_average=False, momentum=0.99), **options)
    assert {tensor for *_, tensor in of_state(report, "mismatch")} == {"state:running_mean", "state:running_var"}
    assert report.likely_cause.startswith("momentum: a call moves running_mean 0.1 times as far on the flax side")


def test_statistics_that_one_side_leaves_alone_are_named():
    class Frozen(nnx.BatchNorm):
        def __call__(self, x):
            before = self.mean[...], self.var[...]
            y = super().__call__(x)
            self.mean[...], self.var[...] = before
            return y

    report = batch_norm(Frozen(5, rngs=nnx.Rngs(0)))
    assert report.likely_cause == "a call updates running_mean, but not on the flax side"


def test_what_no_call_updates_has_no_rows():
    report = batch_norm(nnx.BatchNorm(5, use_running_average=True, rngs=nnx.Rngs(0)), torch.nn.BatchNorm1d(5).eval())
    report.assert_ok()
    assert {row.rung for row in report.rows} == {"weights", "forward"}
    assert report.not_compared == ("torch buffer num_batches_tracked",)


def test_every_form_of_the_report_says_which_updates_were_not_compared(tmp_path):
    report = batch_norm(
        nn.BatchNorm(use_running_average=False),
        params=RULES[:2],
        flax_kwargs={"mutable": "batch_stats"},
        not_compared=("running_*", "batch_stats.*"),
    )
    report.assert_ok()
    for name in ("torch buffer running_mean", "flax buffer batch_stats.var"):
        line = f"{name}, which a call updates, left out by not_compared="
        assert f"not compared: {line}\n" in report.describe()
        report.to_json(tmp_path / "r.json")
        assert line in json.loads((tmp_path / "r.json").read_text())["pair"]["not_compared"]
        report.to_html(tmp_path / "r.html")
        assert f"<p>not compared: {line}</p>" in (tmp_path / "r.html").read_text()
