"""PyTorch against JAX: the fastest of each in every cell, in tables, files and a picture."""

import csv
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from bench.plan.competitors import CALLS, GRAPHS, launch
from bench.report.charts import framework_map, framework_squares, shade
from bench.report.markdown import results_block
from bench.report.pictures import ChartError, save_picture
from bench.report.tables import framework_table, matrices, verdict_text
from bench.store import Store
from bench.study.statistics import FASTER, SAME, SLOWER, UNRESOLVED
from bench.study.verdicts import framework_ratio
from bench.tests.in_memory import rankings, report, results_of, summary
from bench.tests.synthetic import FINGERPRINT

ENVIRONMENTS = {"e0": FINGERPRINT, "e1": FINGERPRINT | {"division": "tuned"}}


@pytest.fixture
def cell(make_record):
    """Records of a cell: torch matmul, the baseline, takes 20 ms, its einsum 40 ms; JAX is so many times faster."""

    def make(jax_speed, *, rounds=20, noise=0.003, seed=0, processes=1, **shared):
        rng = np.random.default_rng(seed)
        shared = {"cell": f"c{seed}", "cell_size": 5, "environment_id": "e0", "calls_per_block": 10} | shared

        def timed(k, name, speed, **changes):
            blocks = 0.02 / speed * np.exp(noise * rng.standard_normal(2 * rounds))
            found = {"block_latency_s": tuple(blocks.tolist()), "latency_s": float(np.median(blocks)) / 10}
            key = f"{seed}-{shared['environment_id']}-{name}-{k}"
            return make_record(key=key, process_replicate=k, **found, **shared, **changes)

        return [
            record
            for k in range(processes)
            for record in (
                timed(k, "base", 1.0, baseline=True),
                timed(k, "control", 1.0, baseline=True, control=True),
                timed(k, "einsum", 0.5, implementation="einsum"),
                timed(k, "jax", jax_speed, framework="jax", mode="jit"),
                timed(k, "jax loop", 0.4 * jax_speed, framework="jax", implementation="loop", mode="jit"),
            )
        ]

    return make


@pytest.mark.parametrize(
    ("speed", "verdict", "text"),
    [(2.0, FASTER, "JAX 2.00x"), (0.5, SLOWER, "torch 2.00x"), (1.0, SAME, "same (")],
)
def test_the_fastest_of_each_framework_are_compared(cell, speed, verdict, text):
    (ranking,) = rankings(cell(speed, processes=4))
    found = ranking.frameworks
    assert (found.torch, found.jax, found.verdict) == ("torch matmul (eager)", "jax matmul (jit)", verdict)
    assert found.interval.low < speed < found.interval.high
    assert verdict_text(found).startswith(text[:-2])


def test_one_process_tells_frameworks_apart_only_beyond_what_processes_differ_by(cell):
    ratios = {speed: rankings(cell(speed))[0].frameworks for speed in (1.0, 1.05, 1.3)}
    assert {speed: found.verdict for speed, found in ratios.items()} == {
        1.0: UNRESOLVED,
        1.05: UNRESOLVED,
        1.3: FASTER,
    }
    # It is not the rounds that leave it open, and four processes name the same 5%.
    assert ratios[1.05].interval.low > 1.04
    assert rankings(cell(1.05, processes=4))[0].frameworks.verdict == FASTER


def test_noise_leaves_the_frameworks_open_and_few_rounds_do_not_decide(cell):
    (ranking,) = rankings(cell(1.05, noise=0.3))
    assert ranking.frameworks.verdict == UNRESOLVED
    assert verdict_text(ranking.frameworks).startswith("open: ")
    (ranking,) = rankings(cell(1.05, rounds=2, noise=0.05))
    assert ranking.frameworks.verdict == UNRESOLVED


def test_yardsticks_and_whoever_has_no_speed_are_nobody_s_best(cell, make_record):
    records = cell(2.0)
    fast = replace(records[3], key="y", implementation="dense", kind="yardstick", framework="torch", mode="eager")
    fast = replace(fast, block_latency_s=tuple(b / 10 for b in fast.block_latency_s), latency_s=fast.latency_s / 10)
    (ranking,) = rankings([*records, fast])
    assert ranking.frameworks.torch == "torch matmul (eager)"
    alone = [record for record in records if record.framework == "torch"]
    (ranking,) = rankings(alone)
    assert (ranking.frameworks.jax, ranking.frameworks.interval, ranking.frameworks.verdict) == (None, None, "")
    assert verdict_text(ranking.frameworks) == "torch only (eager)"
    assert verdict_text(None) == "-"
    assert matrices(results_of(alone, ENVIRONMENTS)) == []


def on_a_gpu(cell, make_record, *, jax_graph, seed=0, **shared):
    """A cell on a GPU: recorded graphs are ten times as fast as plain calls, in torch and, if asked for, in JAX."""
    records = [replace(record, device="cuda") for record in cell(2.0, seed=seed, **shared)]

    def graph(record, mode, speed):
        blocks = tuple(block / speed for block in record.block_latency_s)
        return replace(record, key=record.key + mode, mode=mode, block_latency_s=blocks, control=False, baseline=False)

    records.append(graph(records[0], "cuda-graph", 10.0))
    return [*records, graph(records[3], "jit-graph", 10.0)] if jax_graph else records


def test_graphs_meet_graphs_and_plain_calls_meet_plain_calls(cell, make_record):
    (ranking,) = rankings(on_a_gpu(cell, make_record, jax_graph=True))
    assert ranking.leaders == ("jax matmul (jit-graph)",)
    calls, graphs = ranking.frameworks, ranking.framework_graphs
    assert (calls.torch, calls.jax) == ("torch matmul (eager)", "jax matmul (jit)")
    assert (graphs.torch, graphs.jax) == ("torch matmul (cuda-graph)", "jax matmul (jit-graph)")
    assert 1.9 < calls.interval.ratio < 2.1
    assert 1.9 < graphs.interval.ratio < 2.1


def test_a_side_that_has_no_graph_is_missing_and_is_not_filled_with_plain_calls(cell, make_record, tmp_path):
    both = on_a_gpu(cell, make_record, jax_graph=True, seed=1, direction="forward_backward")
    results = results_of([*on_a_gpu(cell, make_record, jax_graph=False), *both], ENVIRONMENTS)
    (matrix,) = matrices(results)
    assert matrix.columns == ["fp32, matched", "fp32, matched, graphs"]
    shown = {row.split("), ")[1]: texts for row, *texts in framework_table(matrix).rows}
    assert shown["forward"][1] == "torch only (cuda-graph)"
    assert re.fullmatch(r"JAX [\d.]+x \(jit / eager\)", shown["forward"][0])
    assert re.fullmatch(r"JAX [\d.]+x \(jit-graph / cuda-graph\)", shown["forward_backward"][1])
    alone = next(square for square in framework_squares(matrix) if square["alone"])
    assert (alone["shade"], alone["jax"], alone["interval"]) == (0.0, "no speed", "")
    save_picture(framework_map, "--framework-map", tmp_path / "f.svg", results)
    drawn = "".join(ElementTree.parse(tmp_path / "f.svg").getroot().itertext())
    assert "torch only (cuda-graph)" in drawn
    first, second = (cell["frameworks"] for cell in summary(results)["cells"])
    assert first["jax"] == second["jax"] == "jax matmul (jit)"
    assert [cell["framework_graphs"]["jax"] for cell in summary(results)["cells"]] == [None, "jax matmul (jit-graph)"]
    # On a CPU nothing is recorded: torch.compile's modes are plain calls there.
    assert (launch("compile-max-autotune", "cpu"), launch("compile-max-autotune", "cuda")) == (CALLS, GRAPHS)


def test_a_choice_among_equals_costs_width(cell):
    base = {0: np.zeros(20)}
    rng = np.random.default_rng(0)

    def ratio(count):
        equals = {f"jax {k}": {0: 0.01 * rng.standard_normal(20)} for k in range(count)}
        return framework_ratio({"torch": {"torch 0": base}, "jax": equals}, 0.01, confidence=0.95)

    assert ratio(1).confidence == pytest.approx(0.95)
    assert ratio(8).confidence == pytest.approx(1 - 0.05 / 8)


def test_among_equals_no_framework_is_faster_than_the_other():
    """Eight equal competitors of JAX against two of PyTorch: the best of eight looks fast by chance alone."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        logs = 0.05 * rng.standard_normal((10, 15))
        order = np.argsort(logs.mean(1))
        sides = {"torch": {}, "jax": {}}
        for k in order:
            sides["torch" if k < 2 else "jax"][str(k)] = {0: logs[k]}
        found = framework_ratio(sides, 0.0, confidence=0.95)
        wrong += found.verdict in (FASTER, SLOWER)
    assert wrong <= 0.05 * 400


def test_a_matrix_has_a_column_for_each_precision_and_division(cell):
    records = [
        *cell(2.0, seed=0),
        *cell(0.5, seed=1, direction="forward_backward"),
        *cell(1.0, seed=2, division="tuned", environment_id="e1", processes=4),
        *cell(3.0, seed=3, precision="bf16", dtype="bfloat16", cache="cold"),
        *cell(1.5, seed=4, direction="train_step", optimizer="adamw"),
    ]
    results = results_of(records, ENVIRONMENTS)
    (matrix,) = matrices(results)
    assert matrix.columns == ["fp32, matched", "fp32, tuned", "bf16, matched, cold"]
    assert [row.split("), ")[1] for row in matrix.rows] == ["forward", "forward_backward", "train_step (adamw)"]
    text = report(results)
    assert "## PyTorch against JAX" in text
    assert "| workload | fp32, matched | fp32, tuned | bf16, matched, cold |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("|") and "), forward |" in line]
    assert [part.split()[0] for part in row.split("|")[2:5]] == ["JAX", "same", "JAX"]
    assert text.count("JAX over PyTorch, the fastest of each: ") == 5
    # The README folds the rankings of the first workload and conditions, and counts the others.
    block = results_block(results)
    assert block.count("<details>") == 3
    assert "Of 5 rankings, the 3 of article-base in fp32, matched;" in block
    assert "division tuned" in block


def test_workloads_without_a_condition_in_common_have_tables_of_their_own(cell):
    def conditions(k, workload, **changes):
        return cell(2.0, seed=k, workload=workload, **changes)

    tuned = {"division": "tuned", "environment_id": "e1"}
    apart = [*conditions(0, "a"), *conditions(1, "b", **tuned), *conditions(2, "c")]
    first, second = matrices(results_of(apart, ENVIRONMENTS))
    assert [row.split(" (")[0] for row in first.rows] == ["a", "c"]
    assert (first.columns, first.environments) == (["fp32, matched"], ["e0"])
    assert [row.split(" (")[0] for row in second.rows] == ["b"]
    assert (second.columns, second.environments) == (["fp32, tuned"], ["e1"])
    # A fourth workload that was measured in both conditions joins them, in the order in which they were measured.
    (joined,) = matrices(results_of([*apart, *conditions(3, "d"), *conditions(4, "d", **tuned)], ENVIRONMENTS))
    assert [row.split(" (")[0] for row in joined.rows] == ["a", "b", "c", "d"]


def test_a_page_shows_the_rankings_of_one_workload_and_the_frameworks_in_all(cell):
    block = results_block(results_of([*cell(2.0), *cell(0.5, seed=1, workload="article-n8")], ENVIRONMENTS))
    assert block.count("<details>") == 1
    assert "Of 2 rankings, that of article-base in fp32, matched;" in block
    assert "| article-n8 (" in block
    assert "Of 1 rankings" not in results_block(results_of(cell(2.0), ENVIRONMENTS))


def test_a_second_run_and_a_second_device_have_tables_of_their_own(cell):
    newer = {"torch": FINGERPRINT["frameworks"]["torch"] | {"versions": {"torch": "2.14"}}}
    known = {
        "e0": FINGERPRINT,
        "e1": FINGERPRINT | {"git": None},
        "e2": FINGERPRINT | {"cpu_model": "another"},
        "e3": FINGERPRINT | {"frameworks": newer},
    }
    records = [
        *cell(2.0),
        *cell(2.0, seed=1, environment_id="e1"),
        *cell(0.5, seed=2, environment_id="e2"),
        *cell(0.5, seed=3, environment_id="e3", direction="forward_backward"),
    ]
    results = results_of(records, known)
    found = matrices(results)
    assert [len(matrix.places) for matrix in found] == [1, 1, 1, 1]
    # Another release of a framework is no column of the same table, even where its cells were free.
    assert [matrix.environments for matrix in found] == [["e0"], ["e1"], ["e2"], ["e3"]]
    assert "another" in found[2].device
    text = report(results)
    for environment_id in known:
        assert re.search(rf"^On .*environment {environment_id}:$", text, flags=re.M)
    assert matrices(results_of(records, {}))[0].device == "unknown"


def test_the_comparison_is_in_json_csv_and_on_the_terminal(cell, tmp_path, call):
    records = [*cell(2.0), *cell(0.5, seed=1, direction="forward_backward")]
    store = Store(tmp_path / "run", resume=False)
    store.add_environment("e0", FINGERPRINT)
    store.append(records[:5])
    store.append(records[5:])
    table, picture = tmp_path / "f.csv", tmp_path / "f.svg"
    done = call("report", tmp_path / "run", "--all", "--frameworks-csv", table, "--framework-map", picture)
    assert done.exit_code == 0, done.output
    assert "PyTorch against JAX" in done.output
    assert "torch 2.0" in done.output
    with table.open() as file:
        first, second = csv.DictReader(file)
    assert (first["verdict"], second["verdict"]) == (FASTER, SLOWER)
    assert float(first["jax_over_torch_low"]) < 2.0 < float(first["jax_over_torch_high"])
    assert "JAX 2.0" in "".join(ElementTree.parse(picture).getroot().itertext())
    (tmp_path / "run" / "records.jsonl").write_bytes(b"".join(r.to_line() for r in records if r.framework == "torch"))
    done = call("report", tmp_path / "run", "--frameworks-csv", tmp_path / "none.csv")
    assert done.exit_code == 2
    assert "--frameworks-csv: no cell has a speed of both frameworks" in done.stderr
    assert not (tmp_path / "none.csv").exists()
    found = json.loads(json.dumps(summary(results_of(records, ENVIRONMENTS))))["cells"][0]["frameworks"]
    assert (found["jax"], found["verdict"]) == ("jax matmul (jit)", FASTER)


def test_a_picture_needs_both_frameworks_and_shows_no_colour_where_neither_is_faster(cell, tmp_path):
    alone = [record for record in cell(2.0) if record.framework == "torch"]
    with pytest.raises(ChartError, match="--framework-map: no cell has a speed of both frameworks"):
        framework_map(results_of(alone, ENVIRONMENTS))
    many = results_of([record for k in range(301) for record in cell(2.0, seed=k, batch=k + 1)], ENVIRONMENTS)
    with pytest.raises(ChartError, match="expected at most 300 workloads and directions, got 301"):
        framework_map(many)
    shades = [shade(rankings(cell(speed))[0].frameworks) for speed in (50.0, 1.0, 0.02)]
    assert shades == [2.0, 0.0, -2.0]
