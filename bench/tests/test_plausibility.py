"""What no device can do is rejected, and what it can do in the precision that was observed is not."""

import pytest

from bench.measure.coordinator import flops_limit, reject_the_impossible
from bench.measure.rounds import Entry
from bench.plan.cells import Cell
from bench.plan.competitors import Competitor
from bench.plan.costs import compulsory_bytes, useful_product_flops
from bench.plan.workloads import workload

H200 = "NVIDIA H200"


def timed(cell, amount_per_s, amount, observed=None):
    """A competitor that does so much a second."""
    entry = Entry(Competitor("jax", "matmul", "jit"), "0", blocks=[10 * amount / amount_per_s] * 4, calls_per_block=10)
    entry.judgement = {"observed_precision": observed or cell.precision}
    reject_the_impossible([entry], cell, {}, H200)
    return entry


@pytest.mark.parametrize(
    ("division", "observed", "teraflops", "status"),
    [
        ("stock", "ieee_fp32", 60, "ok"),
        ("stock", "ieee_fp32", 70, "mismatch"),
        # JAX computes in TF32 by default; nothing is left out.
        ("stock", "tf32", 400, "ok"),
        ("stock", "tf32", 500, "mismatch"),
        ("stock", "lower", 70, "mismatch"),
    ],
)
def test_operations_are_bounded_by_the_observed_precision(division, observed, teraflops, status):
    cell = Cell(workload("musicgen-heads"), "forward", "ieee_fp32", division, "cuda")
    entry = timed(cell, 1e12 * teraflops, useful_product_flops(cell), observed)
    assert entry.status == status
    assert bool(entry.blocks) == (status == "ok")
    limit = "4.95e+14" if observed == "tf32" else "6.7e+13"
    said = f"operations a second, over the {limit} that the device can do: not all was done"
    assert entry.reason.endswith(said if status == "mismatch" else "")


def test_what_was_asked_for_bounds_what_was_computed_more_finely():
    cell = Cell(workload("musicgen-heads"), "forward", "tf32", "matched", "cuda")
    assert flops_limit(cell, {}, H200, "ieee_fp32") == flops_limit(cell, {}, H200) == pytest.approx(494.7e12)


@pytest.mark.parametrize(("cache", "status"), [("cold", "mismatch"), ("warm", "ok")])
def test_only_a_cache_is_faster_than_the_memory(cache, status):
    cell = Cell(workload("sac-n-14-256"), "forward", "ieee_fp32", "matched", "cuda", cache)
    entry = timed(cell, 5e12, compulsory_bytes(cell))
    assert entry.status == status
    assert timed(cell, 4e12, compulsory_bytes(cell)).status == "ok"
