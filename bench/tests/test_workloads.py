from dataclasses import replace

import pytest

from bench.measure.request import Request
from bench.plan.presets import PRESETS, plan_cells
from bench.plan.workloads import (
    LAYOUTS,
    WORKLOADS,
    UnknownWorkloadError,
    Workload,
    catalogue,
    log_grid,
    sweep,
    workload,
)

# Name, rows, partitions, in, out: what the article and the projects state.
PROMISED = """
article-base 128 32 32 32
article-batch-1 1 32 32 32
article-batch-2048 2048 32 32 32
article-n8 128 8 128 128
article-in8096 128 32 253 32
article-in256 128 32 8 32
article-out8096 128 32 32 253
article-out256 128 32 32 8
electricity-336-96 16 321 336 96
electricity-336-192 16 321 336 192
electricity-336-336 16 321 336 336
electricity-336-720 16 321 336 720
electricity-336-96-batch-32 32 321 336 96
electricity-336-96-time-series 16 321 336 96
traffic-336-96 16 862 336 96
traffic-336-720 16 862 336 720
weather-336-96 16 21 336 96
exchange-336-96 8 8 336 96
ett-336-720 32 7 336 720
patchtst-electricity-96 32 321 5376 96
patchtst-traffic-96 24 862 5376 96
rtdl-8-149-264 256 8 149 264
rtdl-54-208-118 1024 54 208 118
rtdl-93-147-61 512 93 147 61
rtdl-200-77-45 1024 200 77 45
periodic-96-24 256 100 96 24
musicgen-heads 512 4 2048 2048
fibinet 4096 325 4 4
saint-1-100 256 32 1 100
redq 256 10 256 256
sac-n-14-256 256 500 14 256
sac-n-256-256 256 500 256 256
sac-n-256-256-partition-major 256 500 256 256
sac-n-256-1 256 500 256 1
pets 256 7 200 200
pets-partition-major 256 7 200 200
tabm 256 32 512 512
recurrentgemma-2b-gates 2048 10 256 256
recurrentgemma-9b-gates 2048 16 256 256
recurrentgemma-9b-gates-8192 8192 16 256 256
deepseek-v4-flash 512 8 4096 1024
deepseek-v4-pro 512 16 4096 1024
deepseek-v3-absorb-up 128 128 128 512
deepseek-v3-absorb-down 128 128 512 128
xlstm-qkv 2048 64 4 4
xlstm-slstm-gates 2048 4 32 32
"""


@pytest.mark.parametrize("line", PROMISED.strip().splitlines(), ids=lambda line: line.split()[0])
def test_the_catalogue_holds_what_its_sources_state(line):
    name, *sizes = line.split()
    found = WORKLOADS[name]
    assert [found.batch, found.num_partitions, found.in_features, found.out_features] == list(map(int, sizes))


def test_the_articles_sizes_are_totals_over_partitions():
    totals = {
        name: (found.num_partitions * found.in_features, found.num_partitions * found.out_features)
        for name, found in WORKLOADS.items()
        if name.startswith("article-")
    }
    assert totals["article-in8096"] == totals["article-out8096"][::-1] == (8096, 1024)
    assert totals["article-in256"] == totals["article-out256"][::-1] == (256, 1024)
    assert {total for name, total in totals.items() if "8096" not in name and "256" not in name} == {(1024, 1024)}


def test_names_are_unique_and_every_layout_is_there():
    found = catalogue()
    assert len({workload.name for workload in found}) == len(found)
    assert {workload.layout for workload in found} == set(LAYOUTS)
    assert WORKLOADS["electricity-336-96-time-series"].layout == "time_series"
    assert sum(workload.layout == "partition_major" for workload in found) >= 2
    shared = WORKLOADS["redq-shared"]
    assert "each has its own" not in shared.source
    # One input for all, which is one map to all of their outputs.
    assert (shared.inputs, shared.outputs, shared.case().shapes["x"]) == (256, 2560, (256, 1, 256))


def test_workloads_of_unequal_sizes_have_sources_and_sums_over_their_partitions():
    found = {name: workload for name, workload in WORKLOADS.items() if workload.unequal}
    assert {name.split("-")[0] for name in found} == {"saint", "adult", "census", "cuequivariance"}
    assert all(len(workload.source) > 20 for workload in found.values())
    saint = found["saint-160-card"]
    assert (saint.num_partitions, saint.in_features, sum(saint.out_features)) == (9, 160, 103)
    assert saint.shape == "B=256, n=9, 160->1..42 (103 in all)"
    assert (saint.inputs, saint.outputs, saint.weights) == (9 * 160, 103, 160 * 103)
    segments = found["cuequivariance-segments"]
    assert segments.shape == "B=2048, n=4, 128->(64, 192, 192, 192)"
    assert segments.weights == 128 * 640
    assert segments.elements == 2048 * (512 + 640) + segments.weights + 640
    assert (found["census-card-32"].num_partitions, found["census-card-32"].inputs) == (33, 503)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch: expected at least 1, got 0; give a positive size"),
        ({"out_features": -1}, "out_features: expected at least 1, got -1"),
        ({"layout": "diagonal"}, "layout: expected one of contiguous, .*, flat, shared, got 'diagonal'"),
        ({"in_features": (3, 4)}, "in_features: expected one size, or n = 32 of them, got 2; give each partition"),
        ({"out_features": (0,) * 32}, "out_features: expected at least 1, got 0"),
        ({"in_features": (3,) * 32, "layout": "shared"}, "layout: expected contiguous for unequal sizes, got shared"),
    ],
)
def test_a_workload_that_cannot_be_measured_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(WORKLOADS["article-base"], **changes)


def test_a_sweep_is_every_combination_around_the_base():
    found = sweep(batch=log_grid(1, 16, 4), in_features=(8, 32))
    assert [workload.name for workload in found][:3] == [
        "sweep-b1-n32-i8-o32",
        "sweep-b1-n32-i32-o32",
        "sweep-b4-n32-i8-o32",
    ]
    assert len(found) == 6
    (base,) = sweep()
    assert base.shape == WORKLOADS["article-base"].shape
    assert all(workload(found.name) == found for found in sweep(num_partitions=(1, 512), out_features=(3, 1000)))


def test_a_log_grid_multiplies():
    assert log_grid(1, 100, 4) == (1, 4, 16, 64)
    assert log_grid(8, 8) == (8,)
    for wrong in ((0, 4, 2), (4, 2, 2), (1, 4, 1)):
        with pytest.raises(ValueError, match="expected 1 <= low <= high and factor >= 2"):
            log_grid(*wrong)


@pytest.mark.parametrize(
    "name", ["nothing", "sweep-b0-n1-i1-o1", "sweep-b01-n1-i1-o1", "sweep-b1-n1-i1", "article-bose"]
)
def test_an_unknown_name_is_refused_with_the_names_that_look_alike(name):
    with pytest.raises(UnknownWorkloadError, match="expected a name of the catalogue or sweep-b<B>") as error:
        workload(name)
    assert ("perhaps article-base" in str(error.value)) == (name == "article-bose")


def test_a_sweep_of_ten_thousand_cells_plans_every_cell_once():
    sizes = log_grid(1, 64)
    names = [found.name for found in sweep(batch=sizes, num_partitions=sizes, in_features=sizes, out_features=sizes)]
    preset = Request(preset="sweep", workload=tuple(names), precision=("fp32", "bf16", "fp16")).plan
    cells = plan_cells(preset, "cpu")
    assert len(cells) == len(set(cells)) == 7**4 * 3 * 2 > 10_000


def test_the_presets_measure_what_they_promise():
    article = {name for name in WORKLOADS if name.startswith("article-")}
    assert len(article) == 8
    assert article <= set(PRESETS["seed"].workloads)
    assert set(PRESETS["full"].workloads) == set(WORKLOADS)
    left_out = set(WORKLOADS) - set(PRESETS["workloads"].workloads)
    patchtst = {f"patchtst-{data}-{horizon}" for data in ("electricity", "traffic") for horizon in (96, 192, 336, 720)}
    assert patchtst < set(WORKLOADS)
    assert left_out == patchtst - {"patchtst-electricity-96"}
    points = [workload(name) for name in PRESETS["sweep"].workloads]
    for axis in ("batch", "num_partitions", "in_features", "out_features"):
        assert len({getattr(point, axis) for point in points}) >= 7
    assert isinstance(points[0], Workload)
