"""The torch `matmul`: the orders of its product, its one node of the graph, and what a call allocates."""

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.frameworks.torch.subjects import TorchSubject, functional
from parity_tests.judge.dtypes import STORAGE_DTYPES
from parity_tests.judge.inputs import DEFAULT
from parity_tests.judge.run import run_cells
from torch_impl import PartitionedLinear, partitioned_linear
from torch_impl.implementations import matmul

# Forward-mode differentiation scripts its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

# Name to rows and sizes: on both sides of each limit of the order with the rows innermost.
NARROW = {
    "4 to 4": ((64,), 3, 4, 4),
    "4 to 8": ((65,), 3, 4, 8),
    "one result": ((100,), 2, 3, 1),
    "one partition": ((64,), 1, 4, 4),
    "two axes of rows": ((5, 13), 3, 4, 2),
    "the widest results": ((64,), 3, 4, 11),
    "four columns 4 KiB apart": ((1024,), 2, 4, 4),
    "nine columns 4 KiB apart": ((1024,), 2, 4, 9),
}
WIDE = {
    "few rows": ((63,), 3, 4, 4),
    "wide results": ((64,), 3, 4, 16),
    "one feature": ((64,), 3, 1, 4),
    "five columns 4 KiB apart": ((1024,), 2, 4, 5),
    "eight columns 4 KiB apart": ((1024,), 2, 4, 8),
    "no row": ((0,), 3, 4, 4),
    "five features": ((64,), 3, 5, 4),
}


def lattice(*shape, dtype=torch.float32):
    """Integers in +-3: every sum below is exact, so results are compared bit for bit."""
    return torch.randint(-3, 4, shape).to(dtype)


def operands_of(rows, n, i, o, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((*rows, n, i), (n, i, o), (n, o))
    return [lattice(*shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.fixture(autouse=True)
def of_few_entries(monkeypatch):
    """Let inputs of a few entries be asked about."""
    monkeypatch.setattr("torch_impl.functional.FEWEST_ENTRIES", 0)


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
@pytest.mark.parametrize("shape", [*NARROW.values(), *WIDE.values()], ids=[*NARROW, *WIDE])
def test_narrow_results_lie_with_the_rows_innermost_and_are_the_same(shape, dtype, with_bias):
    operands = operands_of(*shape, dtype)[: 2 + with_bias]
    torch.manual_seed(1)
    found = derivatives(lambda *given: partitioned_linear(*given), operands)
    torch.manual_seed(1)
    expected = derivatives(lambda *given: partitioned_linear(*given, implementation="loop"), operands)
    assert same(found, expected) or dtype == torch.bfloat16  # whose second derivatives round
    assert same(found[:1], expected[:1])
    if shape[3] > 1 and shape[1] > 1 and shape[0] != (0,):
        innermost = [step for step, size in zip(found[0].stride(), found[0].shape, strict=True) if size > 1].index(1)
        assert (innermost == len(shape[0]) - 1) == (shape in NARROW.values() and dtype != torch.bfloat16)


@pytest.mark.parametrize(("dtype", "out_features"), [("float32", 15), ("float64", 11)])
def test_results_are_narrow_up_to_a_width(dtype, out_features):
    for width in (out_features, out_features + 1):
        x, weight, bias = operands_of((64,), 3, 4, width, getattr(torch, dtype))
        assert (partitioned_linear(x, weight, bias).stride(0) == 1) == (width == out_features)
    x, weight, bias = operands_of((1024,), 2, 4, 12)
    assert partitioned_linear(x, weight, bias).stride(0) != 1


def test_few_rows_are_the_long_axis_where_the_gradient_of_the_weight_gains_too(monkeypatch):
    def innermost(rows, in_features, *, recorded):
        operands = [operand.requires_grad_(recorded) for operand in operands_of((rows,), 3, in_features, 8)]
        return partitioned_linear(operands[0].detach(), *operands[1:]).stride(0) == 1

    assert [innermost(rows, 8, recorded=False) for rows in (15, 16)] == [False, True]
    assert [innermost(rows, 8, recorded=True) for rows in (63, 64)] == [False, True]
    assert [innermost(rows, 9, recorded=True) for rows in (15, 16)] == [False, True]
    monkeypatch.setattr("torch_impl.functional.FEWEST_ENTRIES", 16 * 3 * 8)
    assert innermost(16, 8, recorded=False)
    monkeypatch.setattr("torch_impl.functional.FEWEST_ENTRIES", 16 * 3 * 8 + 1)
    assert not innermost(16, 8, recorded=False)


def test_a_wider_input_with_a_gradient_keeps_its_order():
    """The gradient of x has the order of the result: rows innermost in both of two narrow layers, or in neither."""
    x, weight, bias = operands_of((65,), 3, 32, 8)

    def innermost(x):
        y = partitioned_linear(x, weight, bias)
        assert torch.equal(y, partitioned_linear(x, weight, bias, implementation="loop"))
        if x.requires_grad and y.requires_grad:
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
            assert (gradient.stride(0) == 1) == (y.stride(0) == 1)
        return y.stride(0) == 1

    assert innermost(x.detach())
    assert not innermost(x)
    with torch.no_grad():
        assert innermost(x)
    assert innermost(x.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_())


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(5,), (2, 3), (), (0,)], ids=str)
def test_the_product_with_one_feature_is_of_elements_where_no_gradient_is_recorded(rows, dtype, with_bias):
    operands = operands_of(rows, 3, 1, 12, dtype)[: 2 + with_bias]
    of_elements = "aten.addcmul.default" if with_bias else "aten.mul.Tensor"

    def ran(*given):
        with Calls() as calls:
            y = partitioned_linear(*given)
        assert torch.equal(y, partitioned_linear(*given, implementation="loop"))
        return of_elements in calls.names, y

    with torch.no_grad():
        taken, y = ran(*operands)
        assert taken == (dtype != torch.bfloat16)
        assert y.is_contiguous() or not taken
        spread = operands[0].new_ones(1).expand(operands[0].shape)
        assert ran(spread, *operands[1:])[0] == taken
    assert ran(*(operand.detach() for operand in operands))[0] == taken
    for k in range(len(operands)):
        assert not ran(*(operand if k == place else operand.detach() for place, operand in enumerate(operands)))[0]


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


def test_an_order_of_the_product_is_no_matter_of_transformations():
    x, weight, bias = operands_of((64,), 3, 4, 4)
    many = lattice(2, 64, 3, 4)
    mapped = torch.vmap(partitioned_linear, in_dims=(0, None, None))(many, weight, bias)
    assert same(mapped, [partitioned_linear(one, weight, bias) for one in many])
    jacobian = torch.func.jacrev(lambda bias: partitioned_linear(x, weight, bias).sum(0))(bias)
    assert torch.equal(jacobian, 64 * torch.eye(12).reshape(3, 4, 3, 4))


@pytest.fixture
def of_any_size(monkeypatch):
    """Let narrow maps be one node, and two halves, whatever their size."""
    for name in ("_FEWEST_PRODUCTS", "_ENTRIES_ON_ONE_THREAD", "_ENTRIES_OF_HALVES"):
        monkeypatch.setattr(matmul, name, 0)


# Name to rows, sizes, and which of y and dx have the rows innermost.
NODES = {
    "narrow results": ((64,), 3, 32, 8, True, False),
    "narrow inputs": ((2, 33), 3, 8, 32, False, True),
    "both narrow": ((100,), 3, 10, 15, True, True),
    "inputs of two features": ((70,), 3, 2, 16, False, True),
    "two halves": ((1024,), 2, 16, 8, False, False),
    "a gradient of two halves": ((1024,), 2, 6, 16, False, False),
    "only the gradient of the weight": ((1024,), 2, 16, 12, False, False),
}


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", NODES.values(), ids=NODES)
def test_a_node_of_narrow_maps_gives_each_product_its_order_and_every_derivative(of_any_size, shape, with_bias):
    *sizes, narrow_y, narrow_dx = shape
    operands = operands_of(*sizes)[: 2 + with_bias]
    y = partitioned_linear(*operands)
    node = y.grad_fn if len(shape[0]) == 1 else y.grad_fn.next_functions[0][0]
    assert node.name() == "_OneNodeBackward"
    x = operands[0].reshape(-1, *operands[0].shape[-2:]).detach().requires_grad_()
    y = partitioned_linear(x, *operands[1:])
    (dx,) = torch.autograd.grad(y, x, lattice(*y.shape), retain_graph=True)
    assert [y.stride(0) == 1, dx.stride(0) == 1] == [narrow_y, narrow_dx]
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
    y = partitioned_linear(*operands)
    y.relu_()
    (changed,) = torch.autograd.grad(y.sum(), operands[1])
    (expected,) = torch.autograd.grad(partitioned_linear(*operands, implementation="loop").relu().sum(), operands[1])
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_a_node_of_narrow_maps_is_checkpointed(of_any_size, reentrant):
    x, weight, bias = operands_of((1024,), 2, 16, 8)

    def gradients(run):
        return torch.autograd.grad(run().square().sum(), (x, weight, bias)) if not reentrant else backward(run)

    def backward(run):
        x.grad = weight.grad = bias.grad = None
        run().square().sum().backward()
        return x.grad, weight.grad, bias.grad

    def checkpointed():
        given = (partitioned_linear, x, weight, bias)
        return torch.utils.checkpoint.checkpoint(*given, use_reentrant=reentrant)

    assert same(gradients(checkpointed), gradients(lambda: partitioned_linear(x, weight, bias)))


def test_maps_of_few_products_are_no_node():
    x, weight, bias = operands_of((64,), 2, 64, 8)
    assert partitioned_linear(x, weight, bias).grad_fn.name() == "TransposeBackward0"
    x = lattice(512, 2, 64).requires_grad_()
    assert partitioned_linear(x, weight, bias).grad_fn.name() == "_OneNodeBackward"
    # Rows with one feature, and what nobody differentiates or holds 16 bits, are none either.
    assert partitioned_linear(x.detach(), weight.detach(), bias.detach()).grad_fn is None
    assert partitioned_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).grad_fn.name() == "TransposeBackward0"


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_nodes_and_halves_of_narrow_maps_are_judged_by_the_whole_method(of_any_size, monkeypatch, dtype):
    for module in ("functional", "implementations.matmul"):
        monkeypatch.setattr(f"torch_impl.{module}.FEWEST_ROWS", 2)
    monkeypatch.setattr(matmul, "_ALIASED_BYTES", 4)
    subject = TorchSubject("matmul", True, torch.device("cpu"), functional("matmul"), table_name="matmul")
    nodes, halves = [], []
    for name, taken in (("_OneNode", nodes), ("_two_halves", halves)):
        original = getattr(matmul, name)
        seen = original.apply if name == "_OneNode" else original
        noted = lambda *given, seen=seen, taken=taken: taken.append(given) or seen(*given)  # noqa: E731
        monkeypatch.setattr(*((original, "apply") if name == "_OneNode" else (matmul, name)), noted)
    rows = list(run_cells([subject], [dtype], DEFAULT, exact=True))
    assert [row.reason for row in rows if row.status == "mismatch"] == []
    assert len([row for row in rows if row.status == "ok"]) > len(DEFAULT)
    assert bool(nodes) == bool(halves) == (dtype in ("float32", "float64"))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [((5,), 3, 8, 16), ((2, 3), 3, 8, 16), *NARROW.values(), ((0,), 3, 4, 4)], ids=str)
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
        "aten.empty_permuted.default",
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


@pytest.mark.parametrize("every", [True, False], ids=["every-call", "narrow"])
@pytest.mark.parametrize("how", PASSED_OVER)
def test_a_transformation_sees_plain_operations(monkeypatch, how, every):
    operands = operands_of((64,), 3, 8, 3)
    expected = PASSED_OVER[how](*operands)
    if every:
        monkeypatch.setitem(matmul.NODE_FROM, "cpu", 0)
    else:
        monkeypatch.setattr(matmul, "_FEWEST_PRODUCTS", 0)
    taken = []
    original = matmul._OneNode.apply
    monkeypatch.setattr(matmul._OneNode, "apply", lambda *given: taken.append(how) or original(*given))
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


def test_rows_that_a_transform_wraps_stay_symbolic():
    def kept(keep, x, weight):
        return torch.func.functionalize(lambda keep, x, weight: partitioned_linear(x[keep], weight))(keep, x, weight)

    operands = (torch.ones(100, dtype=torch.bool), torch.rand(100, 3, 4), torch.rand(3, 4, 5))
    program = make_fx(kept, tracing_mode="symbolic")(*operands)
    few = (torch.arange(100) < 7, *operands[1:])
    torch.testing.assert_close(program(*few), partitioned_linear(operands[1][:7], operands[2]))


def test_a_wrapped_number_of_rows_gets_no_guard():
    """Ordinary tensors hold symbolic rows here, while no mode and no transform is on."""
    shapes = ShapeEnv()
    fake = FakeTensorMode(shape_env=shapes)
    rows = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC])
    x = fake.from_tensor(torch.rand(70, 3, 4), symbolic_context=rows)
    weight = fake.from_tensor(torch.rand(3, 4, 9), static_shapes=True)
    x, weight = (torch._to_functional_tensor(operand) for operand in (x, weight))
    assert type(x) is torch.Tensor
    assert not isinstance(x.shape[0], int)
    with enable_python_dispatcher():
        assert partitioned_linear(x, weight).shape[1:] == (3, 9)
        assert not shapes.guards
        assert x.shape[0] >= 64  # which is one
    assert shapes.guards
