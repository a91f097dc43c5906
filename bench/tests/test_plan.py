import itertools
from dataclasses import replace

import pytest

from bench.measure.request import LeftOutError, Request, SelectionError, SweepNotes, check_modes, chosen_competitors
from bench.plan.cells import DEVICES, DIVISIONS, STORAGE_DTYPES, Cell
from bench.plan.competitors import MODES, Catalogue, Competitor, competitors_for, further_modes, launch, offered_modes
from bench.plan.costs import (
    compulsory_bytes,
    executed_flops,
    planned_skip,
    products,
    useful_flops,
    waste_factor,
    working_bytes,
)
from bench.plan.presets import PRESETS, plan_cells
from bench.plan.workloads import WORKLOADS, Workload, workload

TORCH = Catalogue("torch", ("loop", "matmul"), ("stock:bmm+bias",), ("dense",))
JAX = Catalogue("jax", ("loop", "matmul"), (), ("dense",))
TINY = Workload("tiny", 5, 3, 2, 7, "test")


def cell(direction="forward", workload=TINY, precision="ieee_fp32"):
    return Cell(workload, direction, precision, "matched", "cpu")


def test_useful_work_is_counted_by_hand():
    product, bias = 2 * 5 * 3 * 2 * 7, 5 * 3 * 7
    assert useful_flops(cell()) == product + bias
    assert useful_flops(cell("forward_backward")) == 3 * product + 2 * bias
    x, w, b, y = 5 * 3 * 2, 3 * 2 * 7, 3 * 7, 5 * 3 * 7
    assert compulsory_bytes(cell()) == 4 * (x + w + b + y)
    assert compulsory_bytes(cell("forward_backward")) == 4 * 2 * (x + w + b + y)
    assert compulsory_bytes(cell(precision="bf16")) == 2 * (x + w + b + y)


def test_dense_forms_waste_n_times_the_work():
    for name, factor in (("matmul", 1), ("loop", 1), ("masked", 3), ("dense", 3)):
        competitor = Competitor("torch", name, "eager")
        assert waste_factor(competitor, cell()) == factor
        assert executed_flops(competitor, cell()) == factor * useful_flops(cell())


def test_a_ragged_product_wastes_as_much_on_a_cpu():
    ragged = Competitor("jax", "grouped_matmul", "jit")
    assert waste_factor(ragged, cell()) == 3
    assert waste_factor(ragged, replace(cell(), device="cuda")) == 1
    assert waste_factor(Competitor("torch", "grouped_matmul", "eager"), cell()) == 1


def test_the_dense_matrix_of_electricity_does_not_fit():
    electricity = cell("forward_backward", WORKLOADS["electricity-336-720"])
    masked = Competitor("torch", "masked", "eager")
    assert working_bytes(masked, electricity) > 3 * 4 * (321 * 336) * (321 * 720)
    limits = replace(PRESETS["seed"].limits, executed_flops=1e30)
    assert "of the free memory" in (planned_skip(masked, electricity, limits, 2**36) or "")
    assert planned_skip(Competitor("torch", "matmul", "eager"), electricity, limits, 2**36) is None


def test_the_terms_of_a_sum_are_held_for_its_gradients_alone():
    by_feature, matmul = (Competitor("jax", name, "jit") for name in ("by_feature", "matmul"))
    w = cell().workload
    held = 2 * w.in_features * (4 * w.batch * w.outputs)
    for direction, more in (("forward", 0), ("forward_backward", held)):
        at = cell(direction)
        assert working_bytes(by_feature, at) - working_bytes(matmul, at) == more


def test_only_traced_loops_are_too_many_products():
    electricity, limits = cell("forward_backward", WORKLOADS["electricity-336-96"]), PRESETS["seed"].limits
    assert products(electricity) == 3
    assert "963 products to unroll" in (
        planned_skip(Competitor("jax", "loop", "jit"), electricity, limits, 2**40) or ""
    )
    assert planned_skip(Competitor("torch", "loop", "eager"), electricity, limits, 2**40) is None


def test_every_workload_is_sourced_and_fits_its_cases():
    for name, found in WORKLOADS.items():
        assert found.name == name
        assert found.source
        case, dense = found.case(), found.dense_case()
        shared = found.layout == "shared"  # which is one map to all outputs, in the correctness case
        assert (case.rows, case.num_partitions) == (found.batch, 1 if shared else found.num_partitions)
        assert (dense.num_partitions, dense.in_features, dense.out_features) == (1, found.inputs, found.outputs)


@pytest.mark.parametrize(
    "shape",
    [
        (128, 32, 32, 32),
        (2048, 32, 32, 32),
        (1, 32, 32, 32),
        (128, 8, 128, 128),
        (16, 321, 336, 96),
        (1024, 10, 256, 256),
    ],
)
def test_seed_holds_the_promised_shapes(shape):
    shapes = {
        (w.batch, w.num_partitions, w.in_features, w.out_features)
        for w in map(WORKLOADS.get, PRESETS["seed"].workloads)
        if w
    }
    assert shape in shapes


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_name_what_exists(preset):
    assert [workload(name).name for name in preset.workloads] == list(preset.workloads)
    assert set(preset.compiled) <= set(WORKLOADS)
    cells = plan_cells(preset, "cpu")
    assert cells
    assert len(set(cells)) == len(cells)
    assert {found.precision for found in cells} <= set(STORAGE_DTYPES)


def test_narrowing_replaces_only_what_is_given():
    preset = Request(direction=("forward",), rounds=2).plan
    assert preset.directions == ("forward",)
    assert preset.rounds == 2
    assert preset.workloads == PRESETS["smoke"].workloads


def test_seed_leaves_out_no_dense_layer_that_the_claims_speak_of():
    seed = PRESETS["seed"]
    for found in plan_cells(seed, "cpu"):
        if found.workload.name.startswith("article"):
            assert (
                executed_flops(Competitor("torch", "dense", "eager", "yardstick"), found) <= seed.limits.executed_flops
            )


def test_time_for_a_cell_alone_lifts_the_number_of_rounds():
    smoke = PRESETS["smoke"]
    preset = Request(cell_s=40.0).plan
    assert preset.cell_s == 40.0
    assert preset.rounds > 1000 * smoke.rounds
    both = Request(cell_s=40.0, rounds=30).plan
    assert (both.cell_s, both.rounds) == (40.0, 30)
    assert Request().plan == smoke
    # What is asked for is the limit, also where the preset has more time for noisy cells.
    assert PRESETS["seed"].most_cell_s > PRESETS["seed"].cell_s
    assert Request(preset="seed", cell_s=2.0).plan.most_cell_s == 0
    patient = Request(most_cell_s=60.0).plan
    assert (patient.cell_s, patient.most_cell_s) == (PRESETS["smoke"].cell_s, 60.0)
    assert patient.rounds == PRESETS["seed"].rounds
    assert Request(most_cell_s=60.0, rounds=3).plan.rounds == 3


def test_tf32_is_no_stock_precision():
    preset = Request(precision=("tf32",), division=("stock",)).plan
    assert plan_cells(preset, "cuda") == ()


def test_competitors_come_from_the_catalogues():
    found = competitors_for([TORCH, JAX], compiled=["matmul"], modes={"torch": ("compile",)})
    assert [c.label for c in found] == [
        "torch loop (eager)",
        "torch matmul (eager)",
        "torch stock:bmm+bias (eager)",
        "torch dense (eager)",
        "torch matmul (compile)",
        "jax loop (jit)",
        "jax matmul (jit)",
        "jax dense (jit)",
    ]
    assert [c.kind for c in found[:4]] == ["implementation", "implementation", "stock", "yardstick"]
    assert {c.implementation for c in competitors_for([TORCH, JAX], only=["matmul"])} == {"matmul"}
    assert competitors_for([TORCH], only=["nothing"]) == ()


def test_named_modes_are_kept_and_everybody_runs_in_them():
    further = {"torch": ("compile", "cuda-graph"), "jax": ("jit-graph",)}
    found = competitors_for(
        [TORCH, JAX], compiled=["matmul"], modes=further, only=["loop", "matmul"], only_modes=["cuda-graph", "jit"]
    )
    assert [c.label for c in found] == [
        "torch loop (cuda-graph)",
        "torch matmul (cuda-graph)",
        "jax loop (jit)",
        "jax matmul (jit)",
    ]
    assert competitors_for([TORCH], only_modes=["jit"]) == ()


def test_the_modes_of_a_division_are_those_of_its_frameworks():
    assert offered_modes("stock", "cuda") == ("eager", "compile", "jit", "nnx-jit")
    jax = ("jit", "jit-graph", "aot", "jit-donate", "nnx-jit")
    assert offered_modes("matched", "cuda", ["jax"]) == offered_modes("tuned", "cuda", ["jax"]) == jax
    for division in DIVISIONS:
        for device in DEVICES:
            assert set(offered_modes(division, device)) <= set(MODES)


def test_a_named_time_to_prepare_replaces_that_cap_alone():
    smoke = PRESETS["smoke"]
    assert Request(prepare_s=7.0).plan.limits == replace(smoke.limits, prepare_s=7.0)


def test_who_is_left_out_takes_part_only_by_name():
    catalogue = Catalogue("torch", ("matmul",), ("stock:bmm+bias", "stock:keras.EinsumDense"), ())
    names = [c.implementation for c in competitors_for([catalogue], without=["stock:keras.EinsumDense"])]
    assert names == ["matmul", "stock:bmm+bias"]
    asked = competitors_for([catalogue], only=["stock:keras.EinsumDense"], without=["stock:keras.EinsumDense"])
    assert [c.implementation for c in asked] == ["stock:keras.EinsumDense"]


GRAPHS = ("cuda-graph", "graphed-callables", "compile-reduce-overhead")


@pytest.mark.parametrize(
    ("division", "device", "gradients", "direction", "torch", "jax"),
    [
        ("stock", "cpu", True, "forward", ("compile",), ()),
        ("stock", "cuda", True, "forward_backward", ("compile",), ()),
        ("matched", "cpu", False, "forward_backward", (), ("aot",)),
        ("matched", "cuda", True, "forward", ("compile", *GRAPHS), ("jit-graph", "aot")),
        ("matched", "cuda", False, "forward_backward", (*GRAPHS, "eager-one-thread"), ("jit-graph", "aot")),
        (
            "matched",
            "cuda",
            False,
            "train_step",
            (*GRAPHS[1:], "eager-one-thread"),
            ("jit-graph", "aot", "jit-donate"),
        ),
        ("tuned", "cpu", True, "train_step", ("compile", "compile-max-autotune"), ("aot", "jit-donate")),
        ("tuned", "cuda", False, "forward", GRAPHS, ("jit-graph", "aot")),
    ],
)
def test_cuda_graphs_are_on_both_sides_or_on_neither(division, device, gradients, direction, torch, jax):
    found = further_modes(division, device, compile_gradients=gradients, direction=direction)
    assert found == {"torch": torch, "jax": jax}
    graphs = {name: [mode for mode in modes if launch(mode, device) == "graphs"] for name, modes in found.items()}
    assert bool(graphs["torch"]) == bool(graphs["jax"]) == (device == "cuda" and division != "stock")


def test_every_gpu_cell_has_every_way_of_launching_and_only_what_the_device_runs():
    torch = replace(TORCH, implementations=("matmul", "grouped_matmul", "fused"), only_on={"fused": ["cuda"]})
    wanted = Request(preset="seed", division=("matched",))
    for found in (replace(cell(workload=WORKLOADS[name]), device="cuda") for name in wanted.plan.workloads):
        labels = [one.label for one in chosen_competitors([torch, JAX], wanted, found)]
        for name in ("matmul", "fused"):
            assert {f"torch {name} ({mode})" for mode in ("eager", *GRAPHS)} <= set(labels)
        assert {"jax matmul (jit)", "jax matmul (jit-graph)", "jax matmul (aot)"} <= set(labels)
        assert "torch grouped_matmul (eager)" in labels
        assert len(labels) == len(set(labels))
    here = [one.label for one in chosen_competitors([torch, JAX], wanted, cell(workload=WORKLOADS["article-base"]))]
    assert "torch grouped_matmul (eager)" in here
    assert not [label for label in here if "fused" in label or "graph" in label]
    # By name it is tried, and its record says why it cannot run.
    asked = Request(implementation=("fused",), framework=("torch",))
    assert [one.label for one in chosen_competitors([torch], asked, cell())] == ["torch fused (eager)"]


def test_nnx_jit_is_a_mode_of_layers_that_takes_part_only_by_name():
    for division, device in itertools.product(DIVISIONS, DEVICES):
        here = replace(cell("train_step"), division=division, device=device, optimizer="sgd")
        jax = replace(JAX, stock=("stock:nnx.Einsum",))
        usual = chosen_competitors([TORCH, jax], Request(preset="full"), here)
        assert "nnx-jit" not in {one.mode for one in usual}
        asked = chosen_competitors([TORCH, jax], Request(mode=("jit", "nnx-jit")), here)
        assert {(one.framework, one.kind) for one in asked if one.mode == "nnx-jit"} == {("jax", "implementation")}
        assert "jit" in {one.mode for one in asked}


@pytest.mark.parametrize(
    ("mode", "framework"), [("nnx-jit", "torch"), ("eager-one-thread", "jax"), ("graphed-callables", "torch")]
)
def test_a_mode_that_is_not_there_is_refused_with_those_that_are(mode, framework):
    with pytest.raises(SelectionError, match=f"division on cpu with {framework}, got {mode}; choose one of these"):
        check_modes(Request(mode=(mode,)), "cpu", (framework,), SweepNotes())


def test_a_mode_of_training_steps_leaves_out_the_other_directions():
    wanted = Request(direction=("forward", "train_step"), mode=("jit-donate",))
    with pytest.raises(LeftOutError, match=r"in the mode jit-donate in tiny"):
        chosen_competitors([JAX], wanted, cell())
    step = replace(cell("train_step"), optimizer="sgd")
    assert {one.mode for one in chosen_competitors([JAX], wanted, step)} == {"jit-donate"}
