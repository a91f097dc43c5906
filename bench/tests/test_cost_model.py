import ast
import builtins
import inspect
import itertools
import json
import math
import re
import shlex

import numpy as np
import pytest

from bench.plan.cells import Cell
from bench.plan.competitors import CUDA_GRAPH, IMPLEMENTATION, STOCK, Competitor, offered_modes
from bench.plan.workloads import sweep_workload
from bench.records import parse_line
from bench.report import snippets
from bench.report.snippets import code_to_paste
from bench.store import Store
from bench.study import cost_model
from bench.study.cost_model import (
    CostModel,
    Sample,
    Trial,
    amounts,
    chosen,
    expected_loss,
    try_model,
    try_nearest,
)
from bench.tests.synthetic import FINGERPRINT, NAMES, cell_records
from parity_tests.tests.forked import run_python

OURS = Competitor("torch", "matmul", "eager", IMPLEMENTATION)
LOOP = Competitor("torch", "loop", "eager", IMPLEMENTATION)
THEIRS = Competitor("torch", "stock:baddbmm", "eager", STOCK)
# Seconds for each term of the model.
LAW = {
    OURS.label: np.array([5e-6, 0, 2e-11, 1e-11, 1e-12, 0]),
    LOOP.label: np.array([1e-6, 6e-7, 1e-11, 1e-11, 9e-13, 0]),
}
SHAPES = [(b, n, i, o) for b, n, i, o in itertools.product((8, 64), (4, 32, 128), (16, 64), (16, 32))]


def sample(sizes, extra=None, factor=1.0):
    cell = Cell(sweep_workload(*sizes), "forward", "ieee_fp32", "matched", "cpu")
    competitors = {one.label: one for one in (OURS, LOOP)}
    seconds = {label: float(LAW[label] @ amounts(one, cell)) * factor for label, one in competitors.items()}
    for competitor, at in (extra or {}).items():
        competitors[competitor.label], seconds[competitor.label] = competitor, at
    return Sample(sizes, seconds, competitors, cell)


def first(label):
    return True


def test_a_law_of_its_own_form_is_found_and_holds_at_other_sizes():
    model = CostModel([sample(sizes) for sizes in SHAPES])
    asked = sample((100, 50, 48, 24))
    found = model.seconds(asked.competitors, asked.cell)
    assert found == pytest.approx(asked.seconds, rel=1e-3)
    assert list(found) == sorted(found, key=lambda label: found[label])
    # Positive control: the two are told apart, and one with fewer cells than the model has terms is not guessed at.
    assert abs(math.log(found[OURS.label] / found[LOOP.label])) > 0.05
    rare = [sample(sizes, {THEIRS: 1e-9} if k < 5 else None) for k, sizes in enumerate(SHAPES)]
    assert THEIRS.label not in CostModel(rare).seconds({THEIRS.label: THEIRS}, asked.cell)


def test_a_shape_is_left_out_with_all_of_its_cells(monkeypatch):
    fitted = []

    class Watched(CostModel):
        def __init__(self, samples):
            fitted.append([one.sizes for one in samples])
            super().__init__(samples)

    monkeypatch.setattr(cost_model, "CostModel", Watched)
    twice = [sample(sizes, factor=factor) for sizes in SHAPES for factor in (1.0, 1.01)]
    found = try_model(twice, first)
    assert (found.cells, len(found.regrets)) == (len(twice), len(twice))
    assert [set(SHAPES) - set(sizes) for sizes in fitted] == [{sizes} for sizes in SHAPES]
    assert found.passed
    assert found.high == pytest.approx(0, abs=1e-6)


def test_everything_that_was_timed_at_a_shape_is_a_candidate():
    samples = [sample(sizes) for sizes in SHAPES]
    # Twice as fast as the others, and at this shape alone: no model can know it, and the choice has lost all the same.
    quick = 0.5 * min(samples[3].seconds.values())
    samples[3] = sample(SHAPES[3], {THEIRS: quick})
    found, near = try_model(samples, first), try_nearest(samples, first)
    assert max(found.regrets) == pytest.approx(1.0, rel=1e-3)
    assert max(near.regrets) >= max(found.regrets) - 1e-3
    assert not Trial(20, (0.0,) * 18 + (0.2, 0.2)).passed
    assert Trial(20, (0.0,) * 19 + (0.2,)).high == 0.2


@pytest.mark.parametrize(
    ("regrets", "passed"),
    [
        ((0.0,) * 5, True),
        ((0.0,) * 4, False),
        ((0.019,) * 5, True),
        ((0.021,) * 5, False),
        ((0.0,) * 9 + (0.11,), False),
        ((0.0,) * 9 + (0.09,), True),
        ((), False),
    ],
)
def test_a_model_passes_by_the_median_and_the_95th_percentile(regrets, passed):
    assert Trial(len(regrets), regrets).passed is passed


def test_no_choice_is_made_far_from_everything():
    alone = (8 * 2**10, 4, 16, 16)
    found = try_model([sample(sizes) for sizes in (*SHAPES, alone)], first)
    assert (found.cells, len(found.regrets)) == (len(SHAPES) + 1, len(SHAPES))


def test_of_predictions_within_two_percent_ours_is_taken():
    near = {THEIRS.label: 1.0, OURS.label: 1.015}
    assert chosen(near, lambda label: label == OURS.label) == OURS.label
    assert chosen(near | {OURS.label: 1.03}, lambda label: label == OURS.label) == THEIRS.label


def test_the_expected_loss_is_that_of_independent_normal_leads():
    assert expected_loss([]) == 0
    assert expected_loss([(-3.0, 0.01)]) == pytest.approx(0, abs=1e-12)
    assert expected_loss([(0.1, 1e-6)]) == pytest.approx(math.exp(0.1) - 1, rel=1e-3)
    assert expected_loss([(0.0, math.inf)]) == math.inf
    leads = [(-0.02, 0.05), (0.01, 0.02), (-0.3, 0.2)]
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.normal(mean, error, 400_000) for mean, error in leads]).max(0)
    assert expected_loss(leads) == pytest.approx(float(np.expm1(np.maximum(drawn, 0)).mean()), rel=0.01)


def write_law(directory, make_record, *, scatter=0.0):
    """Cells whose competitors follow one law each, or are off it from shape to shape."""
    store = Store(directory, resume=False)
    store.add_environment("e0", FINGERPRINT)
    rng = np.random.default_rng(7)
    for number, sizes in enumerate(SHAPES):
        known = sample(sizes).seconds
        # The law of `loop` for all but the baseline, whose control shares it.
        # The baseline's control shares its factor.
        off = {name: math.exp(scatter * rng.standard_normal()) for name in NAMES[:3]}
        records = []
        for record in cell_records(make_record, number, sizes, competitors=3):
            law = LOOP.label if record.implementation == "loop" else OURS.label
            key = (record.framework, record.implementation, record.mode)
            factor = known[law] * off[key] / 0.002 * (1.3 if record.framework == "jax" else 1.0)
            values = json.loads(record.to_line())
            values["block_latency_s"] = [at * factor for at in values["block_latency_s"]]
            values["latency_s"] *= factor
            values["cell_size"] = 4
            records.append(parse_line(json.dumps(values)))
        store.append(records)
    return directory


# Of the fake worker, those that behave; a round of one process.
FEW = ("--implementation", "matmul", "--implementation", "fast", "--replicates", 1, "--rounds", 1, "--probe-s", 0)
ASK = ("--num-partitions", 16, "--in-features", 32, "--out-features", 32, "--batch", 32)


@pytest.fixture
def lawful(tmp_path, make_record):
    return write_law(tmp_path / "lawful", make_record)


def test_between_cells_the_model_answers_with_interval_regret_code_and_machine(lawful, call, tmp_path):
    done = call("recommend", *ASK, lawful, "--json", tmp_path / "r.json")
    assert done.exit_code == 0
    found = json.loads((tmp_path / "r.json").read_text())
    asked = sample((32, 16, 32, 32)).seconds
    best = min(asked, key=lambda label: asked[label])
    assert (found["basis"], found["recommended"][0]) == ("model", best)
    assert found["expected_s"]["low"] <= asked[best] <= found["expected_s"]["high"]
    assert found["expected_s"]["seconds"] == pytest.approx(asked[best], rel=0.05)
    assert found["cost_model"]["passed"]
    assert found["cost_model"]["answered"] == len(SHAPES)
    assert 0 <= found["expected_loss"] < 0.05
    assert found["runner_up"] not in found["recommended"]
    for said in ("Expected: ", "by the cost model", "Runner-up: ", "Expected cost of being wrong: ", "in the median"):
        assert said in done.output
    assert "Machine: cpu with a processor, 2 processors." in done.output
    assert "fp32" in done.output
    assert "ieee_fp32" not in done.output
    exec(compile(found["code"], "code", "exec"), {"__name__": "pasted"})


def test_a_model_that_fails_its_trial_gives_no_estimate(tmp_path, make_record, call):
    run = write_law(tmp_path / "run", make_record, scatter=0.7)
    done = call("recommend", *ASK, run, "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["basis"], found["expected_s"]) == ("nearest", None)
    assert not found["cost_model"]["passed"]
    assert found["cost_model"]["regret_95th_percentile"] > 0.1
    assert "it gives no estimate here" in done.output
    assert "times away" in done.output


def test_the_settling_command_is_one_that_runs_and_its_time_is_that_of_the_records(
    lawful, call, tmp_path, make_record, fake_pool
):
    lines = [json.loads(line) for line in (lawful / "records.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"started_at": "2026-01-01T00:00:00+00:00", "finished_at": "2026-01-01T00:00:12+00:00"}
    (lawful / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    far = ("--num-partitions", 4096, "--in-features", 32, "--out-features", 32, "--batch", 4096)
    done = call("recommend", *far, lawful, "--json", tmp_path / "r.json")
    assert done.exit_code == 1
    settle = json.loads((tmp_path / "r.json").read_text())["settle"]
    assert settle["estimated_s"] == pytest.approx(5 * 12)
    assert "about 60 s" in done.output
    assert settle["command"] in done.output
    words = shlex.split(settle["command"])
    assert words[:4] == ["python", "-m", "bench", "run"]
    assert "sweep-b4096-n4096-i32-o32" in words
    small = [word.replace("b4096-n4096", "b4-n4") for word in words[3:-1]]
    assert call(*small, tmp_path / "settled", *FEW).exit_code == 0
    assert (tmp_path / "settled" / "records.jsonl").exists()


PROGRAM = """
import os
import sys
from bench.plan.cells import Cell
from bench.plan.competitors import IMPLEMENTATION, STOCK, Competitor
from bench.plan.workloads import sweep_workload
from bench.report import snippets

framework, *modes = sys.argv[1:]
known = {"torch": snippets._TORCH, "jax": snippets._JAX}[framework]
for name, mode in [(name, modes[0]) for name in ("matmul", *known)] + [("matmul", mode) for mode in modes[1:]]:
    kind = STOCK if name in known else IMPLEMENTATION
    for direction in ("forward", "forward_backward") if "EVERY_TEST" in os.environ else ("forward_backward",):
        cell = Cell(sweep_workload(4, 3, 5, 6), direction, "ieee_fp32", "matched", "cpu")
        found = {"__name__": "pasted"}
        try:
            exec(snippets.code_to_paste(Competitor(framework, name, mode, kind), cell), found)
        except ModuleNotFoundError as missing:
            assert missing.name in ("einops", "equinox", "keras"), missing
            continue
        assert tuple(found["y"].shape) == (4, 3, 6), name
        assert direction == "forward" or tuple(found["gradients"][0].shape) == (4, 3, 5), name
print("ran")
"""


@pytest.mark.parametrize("modes", [("torch", "eager", "eager-one-thread"), ("jax", "jit", "aot", "jit-donate")])
def test_the_code_of_every_spelling_runs_as_printed(modes):
    pytest.importorskip(modes[0])
    done = run_python("-c", PROGRAM, *modes)
    assert done.stdout.strip().endswith("ran"), done.stderr[-2000:]


def test_every_mode_has_code_that_compiles_and_says_how_it_is_launched():
    cell = Cell(sweep_workload(4, 3, 5, 6), "forward_backward", "tf32", "matched", "cuda")
    for mode, said in {
        CUDA_GRAPH: "graph.replay()",
        "graphed-callables": "torch.cuda.make_graphed_callables(linear, (x, weight, bias))",
        "eager-one-thread": "torch.autograd.set_multithreading_enabled(False)",
        "compile-reduce-overhead": 'mode="reduce-overhead"',
        "compile": "torch.compile(linear, dynamic=False)",
    }.items():
        code = code_to_paste(Competitor("torch", "matmul", mode), cell)
        compile(code, mode, "exec")
        assert said in code
        assert 'set_float32_matmul_precision("high")' in code
    graph = code_to_paste(Competitor("jax", "matmul", "jit-graph"), cell)
    compile(graph, "jit-graph", "exec")
    assert "xla_gpu_graph_min_graph_size" in graph
    assert "step.lower(x, weight, bias, dy).compile()" in code_to_paste(Competitor("jax", "matmul", "aot"), cell)
    assert code_to_paste(Competitor("torch", "stock:unheard-of", "eager", STOCK), cell) is None


def unresolved(code):
    """Names of a program that nothing defines, attributes that a module lacks, and keywords that a function refuses."""
    tree, modules, found = ast.parse(code), {}, []
    nodes = list(ast.walk(tree))
    for node in nodes:
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            origin = alias.name if isinstance(node, ast.Import) else node.module
            module = pytest.importorskip(origin) if alias.asname or isinstance(node, ast.ImportFrom) else None
            module = module or pytest.importorskip(origin.split(".")[0])
            name = alias.asname or alias.name.split(".")[0]
            whole = isinstance(node, ast.Import) or not hasattr(module, alias.name)
            modules[name] = module if whole else getattr(module, alias.name)
    known = {*modules, *dir(builtins), *(node.arg for node in nodes if isinstance(node, ast.arg))}
    known |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    found += [node.id for node in nodes if isinstance(node, ast.Name) and node.id not in known]

    def value(node):
        if isinstance(node, ast.Name):
            return modules.get(node.id)
        above = value(node.value) if isinstance(node, ast.Attribute) else None
        if above is None:
            return None
        if not hasattr(above, node.attr):
            found.append(ast.unparse(node))
        return getattr(above, node.attr, None)

    for node in nodes:
        if isinstance(node, ast.Attribute):
            value(node)
        if not isinstance(node, ast.Call) or (called := value(node.func)) is None:
            continue
        try:
            accepted = inspect.signature(called).parameters
        except ValueError:
            # Written in C, without a signature.
            continue
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values()):
            found += [f"{ast.unparse(node.func)}({one.arg}=)" for one in node.keywords if one.arg not in accepted]
    return sorted(set(found))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_code_for_a_gpu_names_what_there_is(framework):
    """No GPU is needed for that: the builds for CPUs have the same names."""
    pytest.importorskip(framework)
    tried = 0
    for mode in offered_modes("tuned", "cuda", (framework,)):
        for name in ("matmul", *{"torch": snippets._TORCH, "jax": snippets._JAX}[framework]):
            kind = IMPLEMENTATION if name == "matmul" else STOCK
            if name.startswith("stock:keras"):
                # It reads its backend when it is imported, so it is run in a process of its own above.
                continue
            for direction, precision in (("forward", "bf16"), ("forward_backward", "tf32")):
                cell = Cell(sweep_workload(4, 3, 5, 6), direction, precision, "matched", "cuda")
                code = code_to_paste(Competitor(framework, name, mode, kind), cell)
                assert unresolved(code) == [], (name, mode)
                tried += 1
    assert tried >= 20
    # Positive control.
    assert unresolved("import torch\ntorch.cuda.Grph()\ntorch.compile(f, dynmic=True)") == [
        *("f", "torch.compile(dynmic=)", "torch.cuda.Grph")
    ]


def test_the_options_of_compilers_in_the_code_exist():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    modes = {option.split('"')[1] for option in snippets._COMPILE_MODES.values() if option}
    assert modes
    assert modes <= set(torch._inductor.list_mode_options())
    cell = Cell(sweep_workload(4, 3, 5, 6), "forward", "tf32", "matched", "cuda")
    code = code_to_paste(Competitor("jax", "matmul", "jit-graph"), cell)
    options = ast.literal_eval(re.search(r"compiler_options=(\{.*?\})", code)[1])
    assert jax.jit(lambda x: x, compiler_options=options)(1.0) == 1.0
    with pytest.raises(Exception, match="xla_gpu_graph_smallest"):
        jax.jit(lambda x: x, compiler_options={"xla_gpu_graph_smallest": 1})(1.0)


def test_every_competitor_that_users_write_has_its_code():
    from bench.plan.presets import _MODULES

    assert {*_MODULES, "stock:baddbmm"} <= {*snippets._TORCH, *snippets._JAX}
    for framework, known in (("torch", snippets._TORCH), ("jax", snippets._JAX)):
        functions = pytest.importorskip(f"bench.measure.{framework}.functions")
        assert set(functions._KNOWN) == set(known)


def test_nothing_that_a_record_says_is_pasted_unless_it_is_a_name():
    cell = Cell(sweep_workload(4, 3, 5, 6), "train_step", "ieee_fp32", "matched", "cpu", optimizer="x\nimport os")
    assert code_to_paste(Competitor("torch", 'matmul")\nimport os #', "eager"), cell) is None
    assert code_to_paste(Competitor("torch", "matmul", "eager\nimport os"), cell) is None
    assert "import os" not in code_to_paste(OURS, cell)
