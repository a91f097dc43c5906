"""What torch.compile made of a function: its products are counted in its graphs, its caches are its own."""

from contextlib import contextmanager

import pytest

from bench.tests.test_programs import REQUEST, judged, opened

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = [
    pytest.mark.compile,
    # Inductor's own use of what torch has deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
PRODUCT = 2 * 6 * 3 * 8 * 16  # six rows of three partitions


def probe_of(name, **changes):
    torch.compiler.reset()
    bench = opened("torch", **changes)
    assert judged(bench, "torch", name, mode="compile")["status"] == "ok"
    return bench.probe(REQUEST | {"budget_s": 0.001})


@pytest.mark.parametrize(
    ("name", "direction", "factor"),
    [
        ("matmul", "forward", 1),
        ("matmul", "forward_backward", 3),
        ("matmul", "train_step", 3),
        ("loop", "forward_backward", 3),
        ("masked", "forward", 3),
        ("einsum", "forward_backward", 3),
        ("vmap", "forward", 1),
    ],
)
def test_products_are_those_of_the_compiled_graphs(name, direction, factor):
    found = probe_of(name, direction=direction, optimizer="sgd" if direction == "train_step" else None)
    assert found["program_flops"] == factor * PRODUCT
    assert found["doubt"] == ""


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("precision", ["ieee_fp32", "bf16"])
def test_products_that_inductor_writes_as_loops_are_counted_too(direction, precision):
    # With one row, the gradient of the weight is an outer product.
    found = probe_of("matmul", direction=direction, precision=precision, batch=1)
    assert found["program_flops"] == (1 if direction == "forward" else 3) * PRODUCT / 6
    assert found["doubt"] == ""


@contextmanager
def a_compiler_that_drops_a_product():
    """Inductor with a fault: a product of the backward pass becomes zeros."""
    import torch._inductor.config as config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Fault(CustomGraphPass):
        def __call__(self, graph):
            products = [node for node in graph.nodes if node.target is torch.ops.aten.bmm.default]
            if len(products) == 2:
                shape = list(products[0].meta["val"].shape)
                with graph.inserting_before(products[0]):
                    zeros = graph.call_function(torch.ops.aten.full.default, (shape, 0.0), {"dtype": torch.float32})
                zeros.meta["val"] = products[0].meta["val"]
                products[0].replace_all_uses_with(zeros)
                graph.erase_node(products[0])

        def uuid(self):
            return "fault"

    with config.patch(post_grad_custom_pre_pass=Fault()):
        yield


def test_a_compiler_that_drops_a_product_is_doubted_and_not_only_found_wrong():
    torch.compiler.reset()
    bench = opened("torch", direction="forward_backward")
    with a_compiler_that_drops_a_product():
        assert judged(bench, "torch", mode="compile")["status"] == "mismatch"
        found = bench.probe(REQUEST | {"budget_s": 0.001})
    assert found["program_flops"] == 2 * PRODUCT
    assert f"does {2 * PRODUCT:.3g} operations" in found["doubt"]


def test_a_function_that_is_compiled_in_part_has_no_count(tmp_path):
    from bench.measure.torch.inductor import kept_in, products_seen

    torch.compiler.reset()

    def broken(a, b):
        y = a @ b
        torch._dynamo.graph_break()
        return y @ b

    a = torch.ones(4, 4)
    with kept_in(str(tmp_path)), products_seen() as seen:
        torch.compile(broken)(a, a)
    assert seen.graphs == 2
    assert seen.flops is None


def test_cold_is_an_empty_cache_and_warm_the_one_that_it_filled(tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    bench = opened("torch", direction="forward")
    for _ in range(2):
        torch.compiler.reset()
        judged(bench, "torch", mode="compile")
    found = counters["inductor"]
    assert (found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]) == (2, 0)
    assert bench.probe(REQUEST | {"budget_s": 0.001})["compile_warm_s"] > 0
    assert (found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]) == (2, 1)
    assert not list(tmp_path.iterdir())
