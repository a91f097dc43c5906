"""Partitions of unequal sizes, one input for all, and what each formulation copies: from the plan to the records."""

import json
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.measure.timer import canonical, laid_out
from bench.measure.verification import Oracle, Verifier, first_step
from bench.plan.cells import Cell
from bench.plan.competitors import Catalogue, Competitor, competitors_for
from bench.plan.costs import compulsory_bytes, executed_flops, least_product_flops, useful_flops, waste_factor
from bench.plan.workloads import Workload
from bench.records import RecordError, parse_line
from bench.study.cells import four_sizes, identity
from bench.study.validation import record_violations
from bench.tests.synthetic import FINGERPRINT
from bench.tests.test_programs import MODES, REQUEST, judged, timer_of
from parity_tests.judge.inputs import draw_inputs
from parity_tests.judge.tolerance import declared_arithmetic, reference
from parity_tests.training.tasks import OPTIMIZERS

EVERY = os.environ.get("EVERY_TEST") == "1"
UNEQUAL = Workload("unequal", 6, 5, (4, 9, 4, 1, 9), (3, 5, 3, 7, 5), "test")
SHARED = Workload("shared", 6, 3, 8, 16, "test", "shared")
FLAT = Workload("flat", 6, 3, 8, 16, "test", "flat")


def cell_of(workload, direction="forward_backward"):
    optimizer = "adamw" if direction == "train_step" else None
    return Cell(workload, direction, "ieee_fp32", "matched", "cpu", optimizer=optimizer)


def opened(framework, workload, direction="forward_backward"):
    bench = __import__("bench.measure.workbench", fromlist=["Workbench"]).Workbench(timer_of(framework))
    cell = json.loads(json.dumps(asdict(cell_of(workload, direction))))
    bench.open_cell({"cell": cell, "seed": 0})
    return bench


def test_costs_are_sums_over_the_partitions():
    cell, weights = cell_of(UNEQUAL, "forward"), 4 * 3 * 2 + 9 * 5 * 2 + 7
    assert useful_flops(cell) == 2 * 6 * weights + 6 * 23
    assert compulsory_bytes(cell) == 4 * (6 * 27 + weights + 23 + 6 * 23)
    assert least_product_flops(cell) == 6 * (2 * weights - 23)
    factors = {"masked": 27 * 23 / weights, "padded_matmul": 5 * 9 * 7 / weights, "bucketed_matmul": 1, "loop": 1}
    for name, factor in factors.items():
        assert waste_factor(Competitor("torch", name, "eager"), cell) == pytest.approx(factor)
    assert executed_flops(Competitor("torch", "padded_matmul", "eager"), cell) > 2 * useful_flops(cell)
    alike = replace(UNEQUAL, in_features=(4,) * 5, out_features=(3,) * 5)
    one_size = replace(UNEQUAL, in_features=4, out_features=3)
    for cost in (useful_flops, compulsory_bytes, least_product_flops):
        assert [cost(cell_of(alike, d)) for d in ("forward", "train_step")] == [
            cost(cell_of(one_size, d)) for d in ("forward", "train_step")
        ]
    # A shared input is read once.
    apart = replace(SHARED, layout="contiguous")
    assert compulsory_bytes(cell_of(apart)) - compulsory_bytes(cell_of(SHARED)) == 2 * 4 * 6 * 8 * (3 - 1)
    assert useful_flops(cell_of(apart)) == useful_flops(cell_of(SHARED))


def test_competitors_are_those_of_the_sizes_and_the_layout():
    catalogue = Catalogue(
        "torch",
        ("loop", "matmul"),
        ("stock:bmm",),
        ("dense",),
        {},
        ("loop", "padded_matmul"),
        ("stock:nn",),
        ("matmul",),
    )
    names = {
        workload: [one.implementation for one in competitors_for([catalogue], workload=workload)]
        for workload in (UNEQUAL, SHARED, FLAT)
    }
    assert names[UNEQUAL] == ["loop", "padded_matmul", "stock:nn", "dense"]
    assert names[SHARED] == ["matmul", "stock:bmm"]
    assert names[FLAT] == ["loop", "matmul", "stock:bmm", "dense"]
    assert set(catalogue.kinds()) == {"loop", "matmul", "padded_matmul", "stock:bmm", "stock:nn", "dense"}


@pytest.mark.parametrize("layout", ["flat", "shared"])
def test_a_layout_is_undone(layout):
    rng = np.random.default_rng(0)
    b, n, i, o = 5, 3, 4, 2
    n_case, width = (1, n * o) if layout == "shared" else (n, o)
    arrays = {
        "x": (b, n_case, i),
        "weight": (n_case, i, width),
        "bias": (n_case, width),
        "cotangent": (b, n_case, width),
    }
    given = {name: rng.normal(size=shape) for name, shape in arrays.items()}
    placed = {name: laid_out(name, array, layout, n) for name, array in given.items()}
    results = {"x": "dx", "weight": "dweight", "bias": "dbias", "cotangent": "y"}
    for name, result in results.items():
        assert np.array_equal(canonical(result, placed[name], layout, n), given[name])
    if layout == "shared":
        y = np.einsum("bi,nio->bno", placed["x"], placed["weight"]) + placed["bias"]
        assert np.allclose(canonical("y", y, layout, n)[:, 0], given["x"][:, 0] @ given["weight"][0] + given["bias"])
    else:
        assert placed["x"].shape == (b, n * i)


@pytest.mark.sample(2)
@pytest.mark.parametrize("direction", ["forward_backward", "train_step"])
@pytest.mark.parametrize("framework", MODES)
def test_every_competitor_for_unequal_sizes_is_right(framework, direction):
    bench = opened(framework, UNEQUAL, direction)
    kinds = timer_of(framework).catalogue().kinds(UNEQUAL)
    assert {"loop", "masked", "bucketed_matmul", "padded_matmul", "dense"} < kinds.keys()
    # The step of each is the same update of what the gradients are; parameters in a list are packed to be judged.
    chosen = kinds if EVERY or direction == "forward_backward" else [name for name in kinds if "Linear" in name]
    for name in chosen:
        judgement = judged(bench, framework, name, kinds[name])
        assert judgement["status"] == "ok", f"{name}: {judgement['reason']}"
        assert len(judgement["tensors"]) == 4


@pytest.mark.parametrize("framework", MODES)
def test_one_input_for_all_is_right_and_a_wrong_answer_is_a_mismatch(framework, monkeypatch):
    bench = opened(framework, SHARED)
    timer = timer_of(framework)
    names = [*timer.catalogue().shared, *[name for name in timer.catalogue().stock if "insum" in name][:1]]
    for name in names:
        kind = timer.catalogue().kinds(SHARED)[name]
        assert judged(bench, framework, name, kind)["status"] == "ok"
    canonical_forms = __import__("bench.measure.timer", fromlist=["canonical"])
    monkeypatch.setattr(canonical_forms, "canonical", lambda name, *others: canonical(name, *others) * 1.01)
    assert judged(bench, framework, names[0])["status"] == "mismatch"


@pytest.mark.skipif(not EVERY, reason="compiles for seconds; EVERY_TEST=1 in the environment runs it")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own imports
def test_torch_compiles_the_loop_over_linears_and_hides_its_copies():
    bench = opened("torch", UNEQUAL)
    judgement = judged(bench, "torch", "stock:nn.Linear", "stock", "compile")
    assert judgement["status"] == "ok", judgement["reason"]
    assert bench.probe(REQUEST | {"budget_s": 1e-4})["copied_bytes"] is None


# --- copies ---


def test_copies_of_a_torch_call_are_counted_also_inside_a_product():
    torch = pytest.importorskip("torch")
    from bench.measure.torch.timer import copied_bytes

    x, square = torch.ones(4, 6), torch.ones(6, 6)
    assert copied_bytes(lambda: x * 2 + 1, 4) == 0
    assert copied_bytes(lambda: x.T, 4) == 0
    assert copied_bytes(lambda: x.T.contiguous(), 4) == 4 * 24
    assert copied_bytes(lambda: x.T.reshape(-1) + torch.cat([x, x]).sum(), 4) == 4 * (24 + 48)
    # A library takes a matrix whose rows or columns lie one behind the other: this one is neither.
    wide = torch.ones(6, 24)[:, ::4]
    assert copied_bytes(lambda: square @ wide, 4) == copied_bytes(lambda: square @ square, 4) + 4 * 36


def test_copies_of_a_jax_program_are_counted_but_not_what_is_fused_with_arithmetic():
    jax = pytest.importorskip("jax")
    from bench.measure.jax.xla import copied_bytes

    x = jax.numpy.ones((4, 6))

    def copied(function):
        return copied_bytes(jax.jit(function).lower(x).compile().as_text())

    assert copied(lambda x: x * 2 + 1) == 0
    assert copied(lambda x: x.T) == 4 * 24
    assert copied(lambda x: x.T * 2) == 0
    assert copied(lambda x: jax.numpy.concatenate([x, x])) == 4 * 48
    assert copied(jax.numpy.zeros_like) == 0
    # In a loop: each pass writes one row, in place, and not the whole array.
    assert 4 * 24 <= copied(lambda x: jax.lax.map(jax.numpy.flip, x)) < 2 * 4 * 24 + 64


@pytest.mark.parametrize("framework", MODES)
def test_the_probe_tells_what_a_formulation_copies(framework):
    probe = REQUEST | {"budget_s": 1e-4}
    found = {}
    for workload in (FLAT, UNEQUAL):
        bench = opened(framework, workload, "forward")
        for name in ("loop", "padded_matmul") if workload.unequal else ("loop", "matmul"):
            judged(bench, framework, name)
            found[workload.name, name] = bench.probe(probe)["copied_bytes"]
    # Padding writes n of the largest rows; a loop puts its outputs, and in JAX its inputs, together.
    assert found["unequal", "padded_matmul"] > found["unequal", "loop"] >= 4 * 6 * 23
    assert found["flat", "matmul"] <= found["flat", "loop"]


# --- records ---

WHOLE = {"latency_s": 0.002055, "inputs_digest": "d", "started_at": "2026-11-29T00:00:00.000+00:00"}
SIZES = {"num_partitions": 2, "in_features": (1, 4), "out_features": (3, 5), "workload": "u", "schema_version": 2}


def unequal_record(make_record, **changes):
    workload = Workload("u", 128, 2, (1, 4), (3, 5), "")
    cell = Cell(workload, "forward", "ieee_fp32", "matched", "cpu")
    amounts = {"useful_flops": useful_flops(cell), "compulsory_bytes": compulsory_bytes(cell)}
    return make_record(**(SIZES | amounts | WHOLE | {"implementation": "bucketed_matmul"} | changes))


def test_sequences_of_sizes_have_a_schema_version_of_their_own(make_record):
    record = unequal_record(make_record)
    line = record.to_line()
    assert json.loads(line)["in_features"] == [1, 4]
    assert parse_line(line) == record
    assert list(record_violations(record)) == []
    padded = replace(record, implementation="padded_matmul", waste_factor=2 * 4 * 5 / 23)
    assert list(record_violations(parse_line(padded.to_line()))) == []
    assert identity(record).what == "u (B=128, n=2, (1, 4)->(3, 5)), forward"
    assert four_sizes(make_record())
    assert not four_sizes(record)
    wrong = replace(record, useful_flops=1)
    assert any(said.startswith("useful_flops: expected") for said in record_violations(wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 1}, "schema_version: expected 2, got 1, of a record with one size for each partition"),
        ({"in_features": 4, "out_features": 4}, "schema_version: expected 1, got 2, of a record with one size for all"),
        ({"in_features": [1, 4, 2]}, "in_features: expected one for each of 2 partitions, got 3"),
        ({"out_features": [1, 0]}, "out_features: expected a list of integers from 1 to 2.63, got 0 in it"),
        ({"out_features": [1, True]}, "out_features: expected a list of integers from 1 to 2.63, got True in it"),
        ({"in_features": ["1", "2"]}, "in_features: expected a list of integers"),
        ({"in_features": "1, 2"}, "in_features: expected int or list, got '1, 2'"),
    ],
)
def test_sizes_that_are_none_are_refused(make_record, changes, message):
    fields = json.loads(unequal_record(make_record).to_line()) | changes
    with pytest.raises(RecordError, match=message):
        parse_line(json.dumps(fields))


def test_every_command_reads_a_run_of_equal_and_unequal_sizes(make_record, tmp_path):
    shared = {"cell_size": 2, "environment_id": "e0", "baseline": True} | WHOLE
    lines = [
        record.to_line()
        for k, make in enumerate((make_record, lambda **changes: unequal_record(make_record, **changes)))
        for control in (False, True)
        for record in [make(key=f"k{k}{control}", cell=f"c{k}", control=control, **shared)]
    ]
    run = tmp_path / "run"
    run.mkdir()
    (run / "records.jsonl").write_bytes(b"".join(lines))
    (run / "environment.json").write_text(json.dumps({"e0": FINGERPRINT}))

    def ends(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    code, shown = ends("report", run, "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    assert code == 0, shown
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["schema_version"] == 2
    assert [cell["in_features"] for cell in document["cells"]] == [32, [1, 4]]
    assert '"(1, 4)"' in (tmp_path / "r.csv").read_text()
    assert "u (B=128, n=2, (1, 4)->(3, 5))" in ends("report", run, "--all")[1]
    assert ends("validate", run)[0] == 0, ends("validate", run)[1]
    for words in (("claims", run), ("compare", run, run), ("findings", run)):
        assert ends(*words)[0] in (0, 1), words
    code, shown = ends(
        "recommend", run, "--num-partitions", 32, "--in-features", 32, "--out-features", 32, "--batch", 128
    )
    assert code == 0, shown
    assert "article-base" in shown
    code, shown = ends("report", run, "--where", "workload=u", "--json", tmp_path / "u.json")
    assert code == 0, shown
    assert "recommend" not in shown
    # The page for a browser draws speeds against sizes: of unequal partitions those of the average one.
    code, shown = ends("report", run, "--html", tmp_path / "page.html")
    assert code == 0, shown
    assert "u (B=128, n=2, (1, 4)-" in (tmp_path / "page.html").read_text()
    assert ends("report", run, "--where", "workload=u", "--html", tmp_path / "u.html")[0] == 0


def test_the_judge_of_timed_results_rejects_a_wrong_offset_and_a_wrong_step():
    inputs = draw_inputs(UNEQUAL.case(), "float32")
    truth, arithmetic = reference(inputs), declared_arithmetic("ieee_fp32")
    right = {name: tensor.value.astype(np.float32) for name, tensor in truth.items()}
    verifier = Verifier(Oracle(inputs), "forward_backward")
    assert verifier.judge(right, "ieee_fp32").status == "ok"
    for name in right:
        found = verifier.judge(right | {name: np.roll(right[name], 1, axis=-1)}, "ieee_fp32")
        assert found.status == "mismatch", name
        assert f"{name}[" in found.reason
    stepping, before = Verifier(Oracle(inputs), "train_step", "adamw"), inputs.parameters
    stepped = {
        name: first_step(OPTIMIZERS["adamw"], name, before[name], truth[f"d{name}"], arithmetic)[0].astype(np.float32)
        for name in before
    }
    right = {"y": right["y"], "dx": right["dx"]} | stepped
    assert stepping.judge(right, "ieee_fp32").status == "ok"
    # The last partition takes no step.
    place = inputs.sizes.places("weight")[-1]
    right["weight"][place] = before["weight"][place]
    found = stepping.judge(right, "ieee_fp32")
    assert found.status == "mismatch"
    assert "(partition 4)" in found.reason
