"""The torch `matmul`: the orders of its product, its one node of the graph, and what a call allocates."""

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.frameworks.torch.subjects import TorchSubject, functional
from parity_tests.judge.dtypes import STORAGE_DTYPES
from parity_tests.judge.inputs import DEFAULT
from parity_tests.judge.run import run_cells
from torch_impl import PartitionedLinear, partitioned_linear
from torch_impl.implementations import matmul

# Forward-mode differentiation scripts its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def lattice(*shape, dtype=torch.float32):
    """Integers in +-3: every sum below is exact, so results are compared bit for bit."""
    return torch.randint(-3, 4, shape).to(dtype)


def operands_of(rows, n, i, o, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((*rows, n, i), (n, i, o), (n, o))
    return [lattice(*shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.fixture
def one_node(monkeypatch):
    """Let `matmul` compute as one node on a CPU as well."""
    monkeypatch.setitem(matmul.NODE_FROM, "cpu", 0)


class Calls(TorchDispatchMode):
    """Note the operations that are run, and the strides of their first operands."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def derivatives(function, operands):
    """Return y, first and second derivatives, and forward-mode ones."""
    y = function(*operands)
    dy = lattice(*y.shape, dtype=y.dtype)
    first = torch.autograd.grad(y, operands, dy, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), operands[:2])
    tangents = [lattice(*operand.shape, dtype=operand.dtype) for operand in operands]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(operands, tangents, strict=True)]
        along = forward_ad.unpack_dual(function(*duals)).tangent
    return [y, *first, *second, along]


def same(found, expected):
    return all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(5,), (2, 3), (), (0,)], ids=str)
def test_the_product_with_one_feature_is_of_elements(rows, dtype, with_bias):
    operands = operands_of(rows, 3, 1, 12, dtype)[: 2 + with_bias]
    of_elements = "aten.addcmul.default" if with_bias else "aten.mul.Tensor"

    def ran(*given):
        with Calls() as calls:
            y = partitioned_linear(*given)
        assert torch.equal(y, partitioned_linear(*given, implementation="loop"))
        assert y.is_contiguous() or dtype == torch.bfloat16
        return of_elements in calls.names

    # Whether a gradient is recorded is no matter: what is computed once more for one has to have the same order.
    expected = dtype != torch.bfloat16
    assert ran(*operands) == ran(*(operand.detach() for operand in operands)) == expected
    for k in range(len(operands)):
        assert ran(*(operand if k == place else operand.detach() for place, operand in enumerate(operands))) == expected
    with torch.no_grad():
        spread = operands[0].new_ones(1).expand(operands[0].shape)
        assert ran(spread, *operands[1:]) == ran(*operands) == expected


def test_a_product_of_elements_is_no_matter_of_transformations():
    x, weight, bias = (operand.detach() for operand in operands_of((5,), 3, 1, 12))
    tangents = [lattice(*operand.shape) for operand in (x, weight, bias)]
    y, along = torch.func.jvp(partitioned_linear, (x, weight, bias), tuple(tangents))
    assert torch.equal(along, tangents[0] * weight[:, 0] + x * tangents[1][:, 0] + tangents[2])
    assert torch.equal(torch.vmap(partitioned_linear, (0, None, None))(x, weight, bias), y)
    assert torch.equal(torch.func.jacrev(partitioned_linear, 2)(x, weight, bias).sum(0)[1, 2, 1], 5 * torch.eye(12)[2])
    broken = x.clone().fill_(1.0)
    broken[1, 2] = torch.nan
    assert torch.equal(partitioned_linear(broken, weight, bias).isnan().any(-1), broken.isnan()[..., 0])


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "shape", [((5,), 3, 8, 16), ((2, 3), 3, 8, 16), ((64,), 3, 4, 4), ((64,), 1, 4, 4), ((0,), 3, 4, 4)], ids=str
)
def test_one_node_has_contiguous_results_and_every_derivative(one_node, shape, with_bias):
    operands = operands_of(*shape)[: 2 + with_bias]
    y = partitioned_linear(*operands)
    assert y.is_contiguous()
    node = y.grad_fn if len(shape[0]) == 1 else y.grad_fn.next_functions[0][0]
    assert node.name() == "_OneNodeBackward"
    gradients = torch.autograd.grad(y, operands, lattice(*y.shape))
    assert all(gradient.is_contiguous() for gradient in gradients)
    torch.manual_seed(1)
    found = derivatives(lambda *given: partitioned_linear(*given), operands)
    torch.manual_seed(1)
    assert same(found, derivatives(lambda *given: partitioned_linear(*given, implementation="loop"), operands))
    for k, operand in enumerate(operands):
        rest = [given.detach() for given in operands]
        rest[k] = operand
        (alone,) = torch.autograd.grad(partitioned_linear(*rest).square().sum(), operand)
        (expected,) = torch.autograd.grad(partitioned_linear(*rest, implementation="loop").square().sum(), operand)
        assert torch.equal(alone, expected)


def test_one_node_copies_neither_operand_nor_result(one_node):
    x, weight, bias = operands_of((64,), 3, 8, 16)
    with Calls() as calls, torch.no_grad():
        partitioned_linear(x, weight, bias)
    assert [name for name in calls.names if "transpose" not in name and "unsqueeze" not in name] == [
        "aten.new_empty.default",
        "aten.baddbmm.out",
    ]
    y = partitioned_linear(x, weight, bias)
    with Calls() as calls:
        torch.autograd.grad(y, (x, weight, bias), lattice(*y.shape))
    names = [name.split(".")[1] for name in calls.names]
    assert sorted(name for name in names if name in ("bmm", "sum", "clone", "copy_", "add")) == ["bmm", "bmm", "sum"]


PASSED_OVER = {
    "vmap": lambda *given: torch.vmap(partitioned_linear, in_dims=(0, None, None))(given[0][None], *given[1:])[0],
    "grad": lambda *given: torch.func.grad(lambda x: partitioned_linear(x, *given[1:]).square().sum())(given[0]),
    "jvp": lambda *given: torch.func.jvp(lambda x: partitioned_linear(x, *given[1:]), given[:1], given[:1])[1],
    "meta": lambda *given: partitioned_linear(*(operand.to("meta") for operand in given)).shape,
    "batched gradients": lambda *given: torch.autograd.grad(
        partitioned_linear(*given),
        given[1],
        torch.eye(9).reshape(9, 1, 3, 3).expand(9, 64, 3, 3),
        is_grads_batched=True,
    )[0],
}


@pytest.mark.parametrize("how", PASSED_OVER)
def test_a_transformation_sees_plain_operations(monkeypatch, how):
    operands = operands_of((64,), 3, 8, 3)
    expected = PASSED_OVER[how](*operands)
    monkeypatch.setitem(matmul.NODE_FROM, "cpu", 0)
    taken = []
    original = matmul._as_one_node
    monkeypatch.setattr(matmul, "_as_one_node", lambda *given: taken.append(how) or original(*given))
    found = PASSED_OVER[how](*operands)
    assert found == expected if how == "meta" else torch.equal(found, expected)
    assert taken == (["batched gradients"] if how == "batched gradients" else [])


def test_one_node_under_autocast_and_in_a_layer(one_node):
    layer = PartitionedLinear(3, 8, 16)
    x = torch.randn(5, 3, 8)
    assert layer(x).grad_fn.name() == "_OneNodeBackward"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous()
        y.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.compile
def test_one_node_is_left_out_of_compiled_and_exported_programs(one_node):
    torch._dynamo.reset()
    layer = PartitionedLinear(3, 8, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(layer, (torch.randn(4, 3, 8),), dynamic_shapes=shapes)
    assert not any("autograd" in str(node.target) for node in program.graph.nodes)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for batch in (5, 7, 63, 64, 1024):
            x = lattice(batch, 3, 8)
            torch.testing.assert_close(compiled(x), layer(x))
            torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_one_node_is_judged_by_the_whole_method(one_node, monkeypatch, dtype):
    original, taken = matmul._as_one_node, []
    monkeypatch.setattr(matmul, "_as_one_node", lambda *given: taken.append(given) or original(*given))
    subject = TorchSubject("matmul", True, torch.device("cpu"), functional("matmul"), table_name="matmul")
    rows = list(run_cells([subject], [dtype], DEFAULT, exact=True))
    assert [row.reason for row in rows if row.status == "mismatch"] == []
    assert len(taken) > 2 * len(DEFAULT) < len([row for row in rows if row.status == "ok"])


def allocated(function):
    """Return the most bytes that a call held at once, beyond what was there before it, kernels' own memory included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del kept
    return most


MEMORY = {
    "few rows": ((16,), 8, 64, 64),
    "many rows": ((512,), 8, 32, 32),
    "narrow": ((500,), 8, 32, 8),
    "narrow inputs": ((500,), 8, 8, 32),
    "two halves": ((1024,), 32, 16, 8),
    "one row": ((1,), 32, 64, 64),
    "two axes of rows": ((8, 32), 8, 32, 32),
}


@pytest.mark.parametrize("node", [False, True], ids=["plain", "one-node"])
@pytest.mark.parametrize("shape", MEMORY.values(), ids=MEMORY)
def test_auto_allocates_its_results_and_at_most_one_workspace(monkeypatch, shape, node):
    monkeypatch.setattr(matmul, "_ENTRIES_OF_HALVES", 0)
    if node:
        monkeypatch.setitem(matmul.NODE_FROM, "cpu", 0)
    operands = [torch.randn(operand.shape).requires_grad_() for operand in operands_of(*shape)]
    y = partitioned_linear(*operands)
    dy = torch.randn(y.shape)
    size = {name: tensor.nbytes for name, tensor in zip(("x", "weight", "bias", "y"), (*operands, y), strict=True)}
    workspace = max(size["x"], size["y"]) + 2**14  # what the interpreter and the profiler allocate
    forward = allocated(lambda: partitioned_linear(*operands))
    assert size["y"] <= forward <= size["y"] + workspace
    backward = allocated(lambda: torch.autograd.grad(partitioned_linear(*operands), operands, dy))
    assert backward <= sum(size.values()) + workspace
    # The measure sees what a formulation copies: the dense one holds n weights.
    assert allocated(lambda: partitioned_linear(*operands, implementation="masked")) > size["y"] + size["weight"] * 2


class EveryTermRounded(torch.autograd.Function):
    """The product as a GPU's kernel for a vector may compute it: each term is rounded to 16 bits before it is added."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return ((x.unsqueeze(-1) * weight).float().sum(-2) + bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        n, i, o = weight.shape
        dx = (dy.unsqueeze(-2) * weight).float().sum(-1)
        rows, by = x.reshape(-1, n, i, 1), dy.reshape(-1, n, 1, o)
        return dx.to(x.dtype), (rows * by).float().sum(0).to(x.dtype), by.float().sum((0, 2)).to(x.dtype)


# Case to the tensors that are sums of products with a vector there: rows that `run --device cuda` has by default.
VECTORS = {"no-leading": {"y", "dx"}, "batch-one": {"dx"}, "one-in": {"dx", "dweight"}, "one-out": {"y", "dweight"}}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", VECTORS)
def test_rows_of_one_row_or_one_feature_tell_rounded_terms_from_a_sum(name, dtype):
    (case,) = [case for case in DEFAULT if case.name == name]

    def prepare(inputs, device):
        leaves = [
            torch.from_numpy(array.astype("float32")).to(getattr(torch, dtype)) for array in inputs.parameters.values()
        ]
        return EveryTermRounded.apply, [leaf.requires_grad_() for leaf in leaves]

    device = torch.device("cpu")
    for made, expected in ((prepare, VECTORS[name]), (functional("matmul"), set())):
        subject = TorchSubject("matmul", True, device, made, table_name="matmul")
        found = {row.tensor for row in run_cells([subject], [dtype], [case], exact=True) if row.status == "mismatch"}
        assert found >= expected
        assert expected or not found
