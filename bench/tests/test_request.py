"""What of a request can be done with the workers that are there, and what is said of the rest."""

from dataclasses import replace

import pytest

from bench.measure.request import LeftOutError, Request, SelectionError, chosen_competitors
from bench.plan.cells import Cell
from bench.plan.competitors import Catalogue
from bench.plan.presets import PRESETS, left_out, plan_cells
from bench.plan.workloads import workload
from bench.store import read_records

TORCH = Catalogue("torch", ("loop", "matmul"), ("stock:bmm+bias",), ("dense",))
JAX = Catalogue("jax", ("loop", "matmul"), ("stock:nnx.Einsum",), ("dense",))
CELL = Cell(workload("article-base"), "forward", "ieee_fp32", "matched", "cpu")


def request(**changes):
    return Request(**changes)


def test_a_name_that_nobody_has_is_refused_with_those_that_there_are():
    with pytest.raises(SelectionError, match=r"nothing is called bmm; choose from dense, loop, matmul, stock:bmm"):
        chosen_competitors([TORCH, JAX], request(implementation=("matmul", "bmm")), CELL)


def test_a_name_without_the_mode_that_is_asked_for_is_refused_in_other_words():
    wanted = request(implementation=("stock:nnx.Einsum",), mode=("eager",))
    message = (
        "implementation: no framework that takes part has stock:nnx.Einsum in the mode eager in "
        "article-base (B=128, n=32, 32->32), forward, fp32, matched; choose another --implementation, "
        "--mode, --direction or --framework."
    )
    with pytest.raises(SelectionError) as error:
        chosen_competitors([TORCH, JAX], wanted, CELL)
    assert str(error.value) == message
    (found,) = chosen_competitors([TORCH, JAX], request(implementation=("stock:nnx.Einsum",), mode=("jit",)), CELL)
    assert found.label == "jax stock:nnx.Einsum (jit)"


def test_what_is_no_cell_is_told_and_not_planned():
    preset = request(
        workload=("article-base",),
        direction=("forward", "train_step"),
        precision=("fp32", "tf32", "fp16"),
        division=("stock", "matched"),
    ).plan
    first, second = left_out(preset)
    assert first.startswith("The stock division has no tf32,")
    assert second.startswith("There is no train_step in fp16,")
    planned = {(cell.division, cell.precision, cell.direction) for cell in plan_cells(preset, "cuda")}
    # Of two divisions, three precisions and two directions: stock has no TF32, and fp16 no step.
    assert len(planned) == 12 - 2 - 2
    assert left_out(PRESETS["seed"]) == ()


@pytest.mark.usefixtures("fake_pool")
def test_a_run_says_what_it_left_out(tmp_path, call):
    conditions = ("--division", "stock", "--precision", "ieee_fp32", "--precision", "tf32")
    done = call(
        "run", "--workload", "article-batch-1", "--rounds", "2", *conditions, "--implementation", "matmul",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "The stock division has no tf32, since it runs what one gets by asking for nothing: left out." in done.stdout


def test_a_cell_of_other_sizes_than_the_named_competitors_take_is_told_from_a_wrong_name():
    torch = replace(TORCH, unequal=("loop", "padded_matmul"), unequal_stock=("stock:nn.Linear",))
    unequal = replace(CELL, workload=workload("saint-160-card"))
    assert {one.implementation for one in chosen_competitors([torch], request(preset="seed"), unequal)} == {
        "loop",
        "padded_matmul",
        "stock:nn.Linear",
        "dense",
    }
    (found,) = chosen_competitors([torch], request(implementation=("loop", "matmul")), unequal)
    assert found.implementation == "loop"
    message = r"expected one for saint-160-card, dense, loop, padded_matmul, stock:nn.Linear, got matmul: left out"
    with pytest.raises(LeftOutError, match=message):
        chosen_competitors([torch], request(implementation=("matmul",)), unequal)
    with pytest.raises(SelectionError, match="nothing is called bmm"):
        chosen_competitors([torch], request(implementation=("bmm",)), unequal)


@pytest.mark.usefixtures("fake_pool")
def test_a_run_goes_on_where_the_named_competitors_do_not_compute_one_cell(tmp_path, call):
    words = ("run", "--rounds", "2", "--implementation", "matmul", "--workload", "saint-160-card")
    done = call(*words, "--workload", "article-batch-1", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "expected one for saint-160-card" in done.stdout
    assert {record.workload for record in read_records(tmp_path / "run")} == {"article-batch-1"}
    alone = call(*words, "--out", tmp_path / "alone")
    assert alone.exit_code == 2
    assert "expected one for saint-160-card" in alone.output
