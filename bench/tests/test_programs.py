"""Every direction, layout, cache and division of both frameworks, built, run and judged in one process."""

from dataclasses import asdict, replace

import pytest

from bench.measure.timer import Timer, Unsupported
from bench.measure.workbench import Workbench
from bench.plan.cells import Cell
from bench.plan.workloads import Workload
from parity_tests.judge.subjects import framework_available

TINY = Workload("tiny", 6, 3, 8, 16, "test")
MODES = {"torch": "eager", "jax": "jit"}
REQUEST = {"handle": "0", "kind": "implementation", "call_limit_s": 60, "after_other": False}


def timer_of(framework) -> Timer:
    if not framework_available(framework):
        pytest.skip(f"{framework} is not installed here")
    return __import__(f"bench.measure.{framework}.timer", fromlist=["TIMER"]).TIMER()


def opened(framework, **changes):
    bench = Workbench(timer_of(framework))
    bench.hello({})
    own = {name: changes.pop(name) for name in ("layout", "batch", "in_features", "out_features") if name in changes}
    workload = replace(TINY, **own)
    cell = Cell(
        workload,
        **({"direction": "forward", "precision": "ieee_fp32", "division": "matched", "device": "cpu"} | changes),
    )
    bench.open_cell({"cell": asdict(cell), "seed": 0})
    return bench


def judged(bench, framework, name="matmul", kind="implementation", mode=None):
    bench.prepare(REQUEST | {"implementation": name, "mode": mode or MODES[framework], "kind": kind})
    return bench.check(REQUEST)["judgement"]


@pytest.mark.sample(5)
@pytest.mark.parametrize("division", ["stock", "matched", "tuned"])
@pytest.mark.parametrize("layout", ["contiguous", "partition_major", "time_series", "flat"])
@pytest.mark.parametrize("framework", MODES)
def test_every_layout_gives_the_same_function(framework, layout, division):
    bench = opened(framework, direction="forward_backward", layout=layout, division=division)
    judgement = judged(bench, framework)
    assert judgement["status"] == "ok", judgement["reason"]
    assert set(judgement["tensors"]) == {"y", "dx", "dweight", "dbias"}
    assert judged(bench, framework, "dense", "yardstick")["status"] == "ok"


@pytest.mark.parametrize("layout", ["contiguous", "partition_major", "time_series", "flat"])
def test_results_that_are_compared_lie_like_the_inputs(layout):
    # So many rows of four features are computed with the rows innermost, which flat ones keep as a view.
    for division in ("stock", "matched"):
        narrow = {"layout": layout, "division": division, "batch": 1000}
        bench = opened("torch", **narrow, out_features=4)
        assert judged(bench, "torch")["status"] == "ok"
        assert bench._held["0"].prepared.call().is_contiguous() == (division == "matched")


@pytest.mark.sample(2)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "nesterov", "rmsprop", "adagrad"])
@pytest.mark.parametrize("framework", MODES)
def test_a_training_step_is_judged_by_its_first_update(framework, optimizer):
    bench = opened(framework, direction="train_step", optimizer=optimizer)
    judgement = judged(bench, framework)
    assert judgement["status"] == "ok", judgement["reason"]
    assert set(judgement["tensors"]) == {"y", "dx", "weight", "bias"}
    # The same after hundreds of steps: the judge starts the training again.
    bench.block(REQUEST | {"calls": 200, "verify": False})
    assert bench.block(REQUEST | {"calls": 3, "verify": True})["judgement"]["status"] == "ok"


@pytest.mark.sample(3)
@pytest.mark.parametrize("mode", ["jit", "jit-graph"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward", "train_step"])
def test_the_options_for_a_gpu_are_understood_and_given_to_the_compiler(direction, mode, monkeypatch):
    bench = opened("jax", direction=direction, optimizer="sgd" if direction == "train_step" else None)
    timer = __import__("bench.measure.jax.timer", fromlist=["compiler_options"])
    options = {division: timer.compiler_options(division, "cuda", mode) for division in ("stock", "matched", "tuned")}
    assert options["stock"] == {}
    assert options["matched"]
    assert options["tuned"]
    graphs = ["xla_gpu_graph_min_graph_size" in options[division] for division in ("matched", "tuned")]
    assert graphs == [mode == "jit-graph"] * 2
    for chosen in options.values():
        monkeypatch.setattr(timer, "compiler_options", lambda *_, chosen=chosen: chosen)
        assert judged(bench, "jax", mode=mode)["status"] == "ok"
    # One that does not exist shows that they are not just dropped.
    monkeypatch.setattr(timer, "compiler_options", lambda *_: {"xla_no_such_option": True})
    with pytest.raises(Exception, match="xla_no_such_option"):
        judged(bench, "jax", mode=mode)


@pytest.mark.parametrize(
    ("mode", "direction"),
    [("aot", "forward"), ("aot", "forward_backward"), ("aot", "train_step"), ("jit-donate", "train_step")],
)
def test_a_program_is_called_as_compiled_and_a_step_gives_its_old_parameters_up(mode, direction):
    bench = opened("jax", direction=direction, optimizer="sgd" if direction == "train_step" else None)
    assert judged(bench, "jax", mode=mode)["status"] == "ok"
    held = bench._held["0"].prepared
    if direction == "train_step":
        old = held.call()[2]
        held.call()
        assert old.is_deleted() == (mode == "jit-donate")
    assert held.compile_s > 0
    assert bench.block(REQUEST | {"calls": 3, "verify": True})["judgement"]["status"] == "ok"


@pytest.mark.parametrize(
    ("direction", "layout"), [("forward", "shared"), ("forward_backward", "flat"), ("train_step", "contiguous")]
)
def test_nnx_jit_calls_a_layer_with_the_arrays_of_the_cell_and_a_step_updates_it(direction, layout):
    optimizer = "adamw" if direction == "train_step" else None
    bench = opened("jax", direction=direction, layout=layout, optimizer=optimizer)
    judgement = judged(bench, "jax", mode="nnx-jit")
    assert judgement["status"] == "ok", judgement["reason"]
    prepared = bench._held["0"].prepared
    assert prepared.compile_s > 0
    assert (prepared.uncompiled_calls(), prepared.program_flops > 0) == (0, True)
    assert bench.block(REQUEST | {"calls": 3, "verify": True})["judgement"]["status"] == "ok"
    if optimizer:
        weights = [prepared.call()[2] for _ in range(2)]
        assert not (weights[0] == weights[1]).all()


def test_only_a_step_has_something_to_give_up():
    pytest.importorskip("jax", reason="needs jax")
    from bench.measure.timer import Unsupported

    with pytest.raises(Unsupported, match="jit-donate is for train_step"):
        judged(opened("jax", direction="forward_backward"), "jax", mode="jit-donate")


@pytest.mark.parametrize("direction", ["forward_backward", "train_step"])
def test_the_backward_pass_runs_in_the_calling_thread(direction):
    torch = pytest.importorskip("torch", reason="needs torch")
    bench = opened("torch", direction=direction, optimizer="sgd" if direction == "train_step" else None)
    seen, real = [], torch.autograd.grad

    def watched(*args, **kwargs):
        seen.append(torch._C._is_multithreading_enabled())
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.autograd, "grad", watched)
        for mode, inside in (("eager", True), ("eager-one-thread", False)):
            seen.clear()
            assert judged(bench, "torch", mode=mode)["status"] == "ok"
            assert set(seen) == {inside}
    assert torch._C._is_multithreading_enabled()


@pytest.mark.parametrize("direction", ["forward", "forward_backward", "train_step"])
def test_graphed_callables_are_made_of_the_arrays_that_are_called_with(direction, monkeypatch):
    """Without a GPU nothing is recorded: what would be recorded is told, and the function runs in its place."""
    torch = pytest.importorskip("torch", reason="needs torch")
    made, called = [], []

    def record(function, leaves):
        made.append([leaf.data_ptr() for leaf in leaves])
        gradients = direction != "forward"
        assert [leaf.requires_grad for leaf in leaves] == [gradients] * 3

        def replay(*arguments):
            called.append([argument.data_ptr() for argument in arguments])
            return function(*arguments)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 4096 * len(made))
    bench = opened("torch", direction=direction, optimizer="sgd" if direction == "train_step" else None)
    assert judged(bench, "torch", mode="graphed-callables")["status"] == "ok"
    # The first one is thrown away with the libraries' workspaces; no call copies x or a parameter.
    assert made == [called[0]] * 2
    assert all(one == made[0] for one in called)
    prepared = bench._held["0"].prepared
    assert prepared.compile_s > 0
    assert prepared.static_memory_bytes == 4096


@pytest.mark.sample(3)
@pytest.mark.parametrize("framework", MODES)
@pytest.mark.parametrize("wrong", ["sgd", "adam", "rmsprop"])
def test_another_optimizer_is_a_mismatch(framework, wrong, monkeypatch):
    from parity_tests.training import tasks

    bench = opened(framework, direction="train_step", optimizer="adamw")
    programs = __import__(f"bench.measure.{framework}.programs", fromlist=["OPTIMIZERS"])
    planted = {**tasks.OPTIMIZERS, "adamw": replace(tasks.OPTIMIZERS[wrong], learning_rate=3e-3)}
    monkeypatch.setattr(programs, "OPTIMIZERS", planted)
    judgement = judged(bench, framework)
    assert judgement["status"] == "mismatch"
    assert "weight" in judgement["reason"]


@pytest.mark.parametrize("framework", MODES)
@pytest.mark.parametrize("direction", ["forward", "forward_backward", "train_step"])
def test_a_cold_cell_takes_its_buffers_in_turn(framework, direction, monkeypatch):
    optimizer = "sgd" if direction == "train_step" else None
    timer = timer_of(framework)
    bench = Workbench(timer)
    monkeypatch.setattr(timer, "cache_bytes", lambda: 4096)
    cell = Cell(TINY, direction, "ieee_fp32", "matched", "cpu", cache="cold", optimizer=optimizer)
    bench.open_cell({"cell": asdict(cell), "seed": 0})
    assert judged(bench, framework)["status"] == "ok"
    assert bench.block(REQUEST | {"calls": 7, "verify": True})["judgement"]["status"] == "ok"


@pytest.mark.parametrize("framework", MODES)
def test_the_other_clocks(framework):
    bench = opened(framework, direction="forward_backward")
    judged(bench, framework)
    found = bench.probe(REQUEST | {"budget_s": 0.01})
    assert len(found["synchronised_latency_s"]) >= 3
    assert min(found["synchronised_latency_s"]) > 0
    assert found["enqueue_s"] > 0
    assert found["kernels"]
    assert found["doubt"] == ""
    assert found["program_flops"] >= 3 * 2 * 6 * 3 * 8 * 16
    # torch's eager mode compiles nothing.
    assert (found["compile_warm_s"] is None) == (framework == "torch")
    rates = bench.ceilings({})
    assert rates["ceiling_flops_per_s"] > 1e8
    assert rates["ceiling_bytes_per_s"] > 1e7


@pytest.mark.parametrize("framework", MODES)
def test_a_program_that_leaves_products_out_is_doubted(framework):
    bench = opened(framework, direction="forward_backward")
    judged(bench, framework)
    held = bench._held["0"]
    bench._timer.account = lambda prepared: 6 * 3 * 8 * 16
    assert "does 2.3e+03 operations" in bench.probe(REQUEST | {"budget_s": 0.01})["doubt"], held


@pytest.mark.parametrize("direction", ["forward_backward", "train_step"])
def test_a_module_of_another_library_can_be_probed(direction):
    pytest.importorskip("einops", reason="needs einops")
    bench = opened("torch", direction=direction, optimizer="sgd" if direction == "train_step" else None)
    assert judged(bench, "torch", "stock:einops.EinMix", "stock")["status"] == "ok"
    found = bench.probe(REQUEST | {"budget_s": 0.001})
    assert found["program_flops"] == 3 * 2 * 6 * 3 * 8 * 16
    assert found["doubt"] == ""


def test_every_jax_program_is_compiled_with_an_empty_cache_and_again_with_a_filled_one(tmp_path):
    jax = pytest.importorskip("jax", reason="needs jax")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        bench = opened("jax")
        hits = cache_hits(jax)
        # The same program twice: the second finds nothing of the first.
        for _ in range(2):
            judged(bench, "jax")
            assert bench._held["0"].prepared.compile_s > 0
        assert hits == []
        assert bench.probe(REQUEST | {"budget_s": 0.001})["compile_warm_s"] > 0
        assert hits == ["/jax/compilation_cache/cache_hits"]
        # The user's own cache is where it was.
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def cache_hits(jax):
    found = []
    jax.monitoring.register_event_listener(
        lambda event, **_: found.append(event) if event.endswith("compilation_cache/cache_hits") else None
    )
    return found


@pytest.mark.parametrize("framework", MODES)
def test_one_row_takes_fewer_operations_and_is_not_doubted(framework):
    bench = opened(framework, direction="forward_backward", batch=1)
    judged(bench, framework)
    assert bench.probe(REQUEST | {"budget_s": 0.001})["doubt"] == ""


@pytest.mark.parametrize("direction", ["forward", "forward_backward", "train_step"])
@pytest.mark.parametrize("framework", MODES)
def test_one_feature_is_multiplied_by_elements_and_not_doubted(framework, direction):
    optimizer = "sgd" if direction == "train_step" else None
    bench = opened(framework, direction=direction, optimizer=optimizer, batch=2000, in_features=1, out_features=40)
    assert judged(bench, framework)["status"] == "ok"
    found = bench.probe(REQUEST | {"budget_s": 0})
    assert found["doubt"] == ""
    assert found["program_flops"]


def test_products_in_loops_are_counted_as_often_as_they_run():
    jax = pytest.importorskip("jax", reason="needs jax")
    jnp = jax.numpy
    from bench.measure.jax.programs import _flops

    x, weight = jnp.ones((4, 6, 8)), jnp.ones((8, 16))

    def once_a_pass(x, weight):
        return jax.lax.map(lambda rows: jax.lax.map(lambda row: row @ weight, rows), x)

    def once_in_all(x, weight):
        product = x[0] @ weight
        return jax.lax.fori_loop(0, 40, lambda step, y: jnp.sin(y) + product, product)

    def in_a_branch(x, weight):
        return jax.lax.cond(x[0, 0, 0] > 0, once_a_pass, lambda x, w: jnp.zeros((4, 6, 16)), x, weight)

    # The last one has both branches of a condition in its program; the longer one is counted.
    cases = ((once_a_pass, 4), (once_in_all, 1), (lambda x, w: x @ w, 4), (in_a_branch, 4))
    for function, passes in cases:
        compiled = jax.jit(function).lower(x, weight).compile()
        needed = passes * 2 * 6 * 8 * 16
        assert needed <= _flops(compiled) < 1.9 * needed


def test_partitions_that_are_taken_in_turn_are_not_doubted():
    pytest.importorskip("jax", reason="needs jax")
    bench = opened("jax")
    judged(bench, "jax", "in_turn")
    found = bench.probe(REQUEST | {"budget_s": 0.001})
    assert "while" in found["kernels"]
    assert found["doubt"] == ""


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_a_sum_over_the_features_is_not_doubted(direction):
    pytest.importorskip("jax", reason="needs jax")
    bench = opened("jax", direction=direction)
    assert judged(bench, "jax", "by_feature")["status"] == "ok"
    assert bench.probe(REQUEST | {"budget_s": 0})["doubt"] == ""


def test_a_sum_over_many_features_is_unsupported(monkeypatch):
    pytest.importorskip("jax", reason="needs jax")
    monkeypatch.setitem(globals(), "TINY", replace(TINY, in_features=33))
    with pytest.raises(Unsupported, match="at most 32 input features, got in_features=33"):
        judged(opened("jax"), "jax", "by_feature")


def test_products_with_a_vector_count_in_every_pass_of_a_loop():
    jax = pytest.importorskip("jax")
    from bench.measure.jax.programs import _flops
    from jax_impl import partitioned_linear

    def flops(implementation, n):
        def loss(x, weight):
            return (partitioned_linear(x, weight, implementation=implementation) ** 2).sum()

        shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, n, 8), (n, 8, 8))]
        return _flops(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile())

    # Two operations for each weight forward and for the gradient of x, one for the gradient of the weight.
    products = 5 * 64 * 8 * 8
    assert flops("matmul", 64) >= products
    assert products <= flops("in_turn", 64) < 1.2 * products
