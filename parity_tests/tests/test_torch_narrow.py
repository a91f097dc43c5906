"""Maps of few features in the torch `matmul`: the orders of the product and of its gradients, on a CPU."""

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import compiled_autograd
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.functional import dropout, gelu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from parity_tests.frameworks.torch.subjects import TorchSubject, functional
from parity_tests.judge.dtypes import STORAGE_DTYPES
from parity_tests.judge.inputs import DEFAULT
from parity_tests.judge.run import run_cells
from parity_tests.tests.test_torch_matmul import derivatives, lattice, operands_of, same
from torch_impl import partitioned_linear
from torch_impl.implementations import matmul

# Forward-mode differentiation scripts its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

# Name to rows and sizes, the orders of y and dx, and whether one node computes them: on both sides of each limit.
ORDERS = {
    "4 to 4": ((64,), 3, 4, 4, "narrow", "narrow", False),
    "10 to 15": ((5, 20), 3, 10, 15, "narrow", "narrow", False),
    "one result": ((100,), 2, 3, 1, "narrow", "narrow", False),
    "one partition": ((64,), 1, 4, 4, "narrow", "narrow", False),
    "narrow results": ((64,), 3, 16, 8, "narrow", "batched", True),
    "narrow inputs": ((2, 33), 3, 8, 16, "batched", "narrow", True),
    "two features": ((70,), 3, 2, 16, "batched", "narrow", True),
    "few rows": ((16,), 3, 16, 8, "narrow", "batched", True),
    "few rows of wider results": ((63,), 3, 4, 8, "batched", "narrow", True),
    "few rows of 4 to 4": ((63,), 3, 4, 4, "batched", "batched", False),
    "fewer rows": ((15,), 3, 16, 8, "batched", "batched", False),
    "wide maps": ((64,), 3, 16, 16, "batched", "batched", False),
    "one feature": ((5,), 3, 1, 4, "elements", "batched", True),
    "one feature of many rows": ((64,), 3, 1, 4, "elements", "narrow", True),
    "no row": ((0,), 3, 4, 4, "batched", "batched", False),
    "four columns 4 KiB apart": ((1024,), 2, 4, 4, "narrow", "narrow", False),
    "nine columns 4 KiB apart": ((1024,), 2, 9, 9, "narrow", "narrow", False),
    "eight columns 4 KiB apart": ((1024,), 2, 16, 8, "halves", "batched", True),
    "five columns of a gradient 4 KiB apart": ((1024,), 2, 5, 16, "batched", "halves", True),
    "twelve columns 4 KiB apart": ((1024,), 2, 16, 12, "batched", "batched", True),
}


@pytest.fixture
def of_any_size(monkeypatch):
    """Let maps be narrow whatever their number, that of the rows, and the CPU."""
    monkeypatch.setattr(matmul, "_has_wide_vectors", lambda: True)
    for name in ("IN_ALL", "OF_EACH", "OF_A_NODE", "OF_GRADIENTS", "OF_ELEMENTS"):
        monkeypatch.setattr(matmul, f"_FEWEST_{name}", 0)
    for name in ("_ENTRIES_ON_ONE_THREAD", "_ENTRIES_OF_HALVES"):
        monkeypatch.setattr(matmul, name, 0)
    matmul.orders_of.cache_clear()
    yield
    matmul.orders_of.cache_clear()


def order_of(tensor):
    """Name the order in which rows, partitions and features lie."""
    if tensor.is_contiguous():
        return "contiguous"
    return "narrow" if tensor.stride(0) == 1 else "batched"


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ORDERS.values(), ids=ORDERS)
def test_every_derivative_is_the_same_in_every_order(of_any_size, shape, dtype, with_bias):
    operands = operands_of(*shape[:4], dtype)[: 2 + with_bias]
    torch.manual_seed(1)
    found = derivatives(lambda *given: partitioned_linear(*given), operands)
    torch.manual_seed(1)
    expected = derivatives(lambda *given: partitioned_linear(*given, implementation="loop"), operands)
    assert same(found, expected) or dtype == torch.bfloat16  # whose second derivatives round
    assert same(found[:1], expected[:1])
    for k, operand in enumerate(operands):
        rest = [given.detach() for given in operands]
        rest[k] = operand
        (alone,) = torch.autograd.grad(partitioned_linear(*rest).sum(), operand)
        (expected,) = torch.autograd.grad(partitioned_linear(*rest, implementation="loop").sum(), operand)
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "no row"])
def test_orders_are_those_of_the_sizes_alone(of_any_size, name):
    """What is recorded does not change the order of y, and the gradient of the weight lies as the weight does."""
    rows, n, i, o, of_y, of_dx, node = ORDERS[name]
    x, weight, bias = operands_of(rows, n, i, o)
    x = x.detach().reshape(-1, n, i).requires_grad_()
    with torch.no_grad():
        alone = partitioned_linear(x, weight, bias)
    for given in ((x, weight, bias), (x.detach(), weight, bias), (x, weight.detach(), bias.detach())):
        y = partitioned_linear(*given)
        assert y.stride() == alone.stride()
    assert n == 1 or order_of(alone) == {"halves": "contiguous", "elements": "contiguous"}.get(of_y, of_y)
    y = partitioned_linear(x, weight, bias)
    assert (y.grad_fn.next_functions[0][0].name() == "_NarrowProductBackward") == node
    dx, dweight = torch.autograd.grad(y, (x, weight), lattice(*y.shape))
    assert 1 in (n, i) or order_of(dx) == {"halves": "contiguous"}.get(of_dx, of_dx)
    assert dweight.is_contiguous()


@pytest.mark.parametrize(("dtype", "widest"), [("float32", 15), ("float64", 11)])
def test_maps_are_narrow_up_to_a_width(of_any_size, dtype, widest):
    for width in (widest, widest + 1):
        operands = operands_of((64,), 3, 4, width, getattr(torch, dtype))
        assert order_of(partitioned_linear(*operands)) == ("narrow" if width == widest else "batched")
    assert order_of(partitioned_linear(*operands_of((64,), 3, 4, 4, torch.bfloat16))) == "batched"


def test_maps_are_narrow_only_where_it_was_measured_to_pay(monkeypatch):
    def orders(count, n, in_features, width, item=4):
        return (matmul.orders_of(count, n, in_features, width, item) or ("batched", "batched"))[:2]

    def on(*, wide):
        monkeypatch.setattr(matmul, "_has_wide_vectors", lambda: wide)
        matmul.orders_of.cache_clear()

    on(wide=True)
    assert [orders(64, n, 8, 8) for n in (31, 32)] == [("batched", "batched"), ("narrow", "narrow")]
    assert [orders(16, n, 64, 8)[0] for n in (127, 128)] == ["batched", "narrow"]
    assert [orders(64, 64, in_features, 1)[0] for in_features in (7, 8)] == ["batched", "narrow"]
    assert [orders(rows, 900, 16, 8)[0] for rows in (15, 16, 63)] == ["batched", "narrow", "narrow"]
    assert [orders(rows, 900, 16, 8, 8)[0] for rows in (63, 64)] == ["batched", "narrow"]
    assert [orders(rows, 900, 8, 8)[0] for rows in (63, 64)] == ["batched", "narrow"]
    assert orders(512, 4, 8, 8, 8) == ("batched", "batched")
    assert matmul.orders_of(64, 900, 8, 8, 2) is matmul.orders_of(64, 900, 1, 8, 2) is None
    assert [orders(2, n, 1, 64) for n in (1023, 1024)] == [("elements", "batched")] * 2
    assert [matmul.orders_of(2, n, 1, 64, 4)[2] for n in (1023, 1024)] == [False, True]
    assert [orders(100, n, 8, 64) for n in (20, 21)] == [("batched", "batched"), ("batched", "narrow")]
    assert [orders(100, 200, 16, width)[0] for width in (11, 12, 15, 16)] == ["narrow"] * 3 + ["batched"]
    on(wide=False)
    assert [orders(100, n, 8, 64) for n in (40, 41)] == [("batched", "batched"), ("batched", "narrow")]
    assert [orders(100, 200, 31, width)[0] for width in (11, 12, 15)] == ["narrow", "batched", "batched"]
    assert [orders(100, 200, 32, width)[0] for width in (12, 13, 15, 16)] == ["batched", "narrow", "narrow", "batched"]
    for threads, (fewer, enough) in {1: (7, 8), 2: (127, 128)}.items():
        monkeypatch.setattr(matmul, "_threads", lambda threads=threads: threads)
        matmul.orders_of.cache_clear()
        assert [orders(1024, n, 32, 8)[0] for n in (fewer, enough)] == ["batched", "halves"]
    matmul.orders_of.cache_clear()
    assert all((rows // 2 + matmul._APART) * 4 % matmul._EVICTING_BYTES for rows in range(1024, 2**16, 1024))
    x, weight, bias = operands_of((64,), 32, 8, 8)
    assert order_of(partitioned_linear(x, weight, bias)) == "narrow"
    assert order_of(partitioned_linear(x[:, :3], weight[:3], bias[:3])) == "batched"


def test_threads_are_counted_once():
    counted, threads = matmul._threads(), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(counted, 2))
        assert matmul._threads() == counted
    finally:
        torch.set_num_threads(threads)


NODES = {name: shape[:4] for name, shape in ORDERS.items() if shape[-1]}


@pytest.mark.parametrize("shape", NODES.values(), ids=NODES)
def test_a_node_is_as_good_as_operations(of_any_size, shape):
    """It keeps only what its gradients need, gives no gradient where none came, and allows changes of its result."""
    x, weight, bias = operands_of(*shape)
    expected = torch.autograd.grad(partitioned_linear(x, weight, bias, implementation="loop").relu().sum(), weight)
    y = partitioned_linear(x, weight, bias)
    y.relu_()
    assert same(torch.autograd.grad(y.sum(), weight), expected)
    # What no gradient needs may change.
    x_again, weight_again = x * 1, weight * 1
    y = partitioned_linear(x_again, weight.detach(), bias)
    x_again.mul_(2)
    y.sum().backward()
    y = partitioned_linear(x.detach(), weight_again, bias)
    weight_again.mul_(2)
    y.sum().backward()

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.sum()

        @staticmethod
        def backward(ctx, dy):
            return None

    y = Nothing.apply(partitioned_linear(x, weight, bias))
    assert torch.autograd.grad(y, (x, weight, bias), allow_unused=True) == (None, None, None)


@pytest.mark.parametrize("shape", NODES.values(), ids=NODES)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_what_is_computed_anew_meets_the_same_order(monkeypatch, of_any_size, shape, reentrant):
    x, weight, bias = operands_of(*shape)
    drawn = []

    def run(x):
        y = dropout(partitioned_linear(x, weight, bias) + 100, 0.5, True)
        drawn.append(y.detach() == 0)
        return y

    threads = torch.get_num_threads()
    monkeypatch.setattr(matmul, "_ENTRIES_ON_ONE_THREAD", 2**40)
    try:
        torch.set_num_threads(2)
        with set_checkpoint_early_stop(False):
            y = checkpoint(run, x, use_reentrant=reentrant)
        torch.set_num_threads(1)
        y.sum().backward()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("shape", NODES.values(), ids=NODES)
def test_selective_checkpoints_keep_products(of_any_size, shape):
    x, weight, bias = operands_of(*shape)
    kept = []

    def policy(ctx, operation, *args, **kwargs):
        product = operation._overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        kept.extend([operation] * product)
        return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

    def run(x):
        return gelu(partitioned_linear(x, weight, bias)).square().sum()

    y = checkpoint(run, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    found = torch.autograd.grad(y, (x, weight, bias))
    assert kept or x.shape[-1] == 1
    assert same(found, torch.autograd.grad(run(x), (x, weight, bias)))


@pytest.mark.parametrize("shape", [shape[:4] for shape in ORDERS.values()], ids=ORDERS)
def test_fused_optimizers_take_gradients_as_they_come(of_any_size, shape):
    x, weight, bias = operands_of(*shape)

    def stepped(given, derive, *, fused):
        parameter = torch.nn.Parameter(weight.detach().clone())
        optimizer = torch.optim.SGD([parameter], lr=1.0, fused=fused)
        parameter.grad = derive(given)
        optimizer.step()
        return parameter.detach()

    def recorded(x):
        return torch.autograd.grad(partitioned_linear(x, weight, bias).square().sum(), weight)[0]

    def transformed(x):
        return torch.func.grad(lambda weight: partitioned_linear(x, weight, bias.detach()).square().sum())(
            weight.detach()
        )

    for given in (x, x.detach()):
        for derive in (recorded, transformed):
            assert torch.equal(stepped(given, derive, fused=True), stepped(given, derive, fused=False))


def test_an_order_of_the_product_is_no_matter_of_transformations():
    x, weight, bias = operands_of((64,), 32, 4, 4)
    many = lattice(2, 64, 32, 4)
    mapped = torch.vmap(partitioned_linear, in_dims=(0, None, None))(many, weight, bias)
    assert same(mapped, [partitioned_linear(one, weight, bias) for one in many])
    jacobian = torch.func.jacrev(lambda bias: partitioned_linear(x, weight, bias).sum(0))(bias)
    assert torch.equal(jacobian, 64 * torch.eye(128).reshape(32, 4, 32, 4))


MISFITS = {
    "x of one feature": ((64, 8, 1), (1, 8, 3)),
    "one row, one feature": ((1, 4, 1), (4, 4, 3)),
    "one partition, one feature": ((20, 1, 1), (1, 4, 3)),
    "as many features as results": ((64, 8, 3), (8, 1, 3)),
    "one partition": ((64, 1, 1), (8, 1, 3)),
    "narrow": ((64, 3, 5), (3, 4, 4)),
}


@pytest.mark.parametrize("shapes", MISFITS.values(), ids=MISFITS)
def test_operands_that_do_not_fit_are_not_broadcast(of_any_size, shapes):
    x, weight = (torch.randn(shape) for shape in shapes)
    for given in (x, x.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"`x`: expected shape"):
            partitioned_linear(given, weight)
        # Where tests look at shapes, nothing of this comes to the product. With one feature its caller looks.
        if weight.shape[1] > 1:
            orders = matmul.orders_of(*given.shape[:2], *weight.shape[1:], 4)
            with pytest.raises(RuntimeError, match=r"size|batch"):
                matmul.ordered_product(given, weight, None, *(orders or ("batched", "batched", False)))


@pytest.mark.parametrize("shape", [shape[:4] for shape in ORDERS.values()], ids=ORDERS)
def test_the_order_and_the_gradient_are_not_those_of_the_operands_strides(of_any_size, shape):
    class Kind(torch.nn.Parameter):
        pass

    x, weight, bias = operands_of(*shape)
    y = partitioned_linear(x, weight, bias)
    (expected,) = torch.autograd.grad(y.square().sum(), weight)
    # Axes of size one may have any stride, and mean nothing.
    x_again = x.detach().transpose(0, -2).contiguous().transpose(0, -2).requires_grad_()
    bias_again = bias.detach().T.contiguous().T.requires_grad_()
    for again in (weight.detach().mT.contiguous().mT, torch.cat([weight.detach()] * 2)[len(weight) :], Kind(weight)):
        again = again if isinstance(again, Kind) else again.requires_grad_()
        found = partitioned_linear(x_again, again, bias_again)
        assert found.stride() == y.stride()
        assert torch.equal(found, y)
        (gradient,) = torch.autograd.grad(found.square().sum(), again)
        assert torch.equal(gradient, expected)
        assert gradient.stride() == expected.stride() == weight.stride()


@pytest.mark.parametrize("shape", NODES.values(), ids=NODES)
def test_a_traced_node_is_operations(of_any_size, shape):
    operands = operands_of(*shape)
    program = make_fx(lambda *given: partitioned_linear(*given))(*operands)
    x, weight, bias = operands
    elsewhere = [x, weight.detach().mT.contiguous().mT.requires_grad_(), bias]
    fewer = [x[..., 1:, :], weight[1:], bias[1:]]
    for given in (operands, elsewhere, fewer)[: 6 - x.ndim]:  # several axes of rows are reshaped to traced sizes
        found, expected = program(*given), partitioned_linear(*given, implementation="loop")
        assert torch.equal(found, expected)
        assert same(torch.autograd.grad(found.sum(), given), torch.autograd.grad(expected.sum(), given))


@pytest.mark.parametrize("sizes", [(1, 8, 1, 5), (64, 8, 4, 12), (64, 8, 16, 12)], ids=str)
def test_sizes_that_are_symbolic_are_not_looked_at(of_any_size, sizes):
    rows, n, i, o = sizes

    def gradient(x, weight):
        return partitioned_linear(x, weight).sum()

    def expanded(x, weight):
        return torch.vmap(lambda row: partitioned_linear(row.expand(rows, *row.shape), weight))(x)

    x, weight = lattice(rows, n, i), lattice(n, i, o)
    for function in (torch.func.grad(gradient), expanded):
        assert torch.equal(make_fx(function, tracing_mode="symbolic")(x, weight)(x, weight), function(x, weight))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("shape", NODES.values(), ids=NODES)
def test_backward_passes_of_a_node_are_compiled(of_any_size, shape):
    torch._dynamo.reset()
    operands = operands_of(*shape)
    expected = torch.autograd.grad(partitioned_linear(*operands).sum(), operands)
    y = partitioned_linear(*operands).sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        y.backward()
    assert same([operand.grad for operand in operands], expected)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_narrow_maps_are_judged_by_the_whole_method(of_any_size, monkeypatch, dtype):
    for module in ("functional", "implementations.matmul"):
        monkeypatch.setattr(f"torch_impl.{module}.FEWEST_ROWS", 2)
    monkeypatch.setattr(matmul, "_MANY_ROWS", 2)
    monkeypatch.setattr(matmul, "_EVICTING_BYTES", 8)
    monkeypatch.setattr(matmul, "_APART", 1)
    original, taken = matmul._written, set()
    monkeypatch.setattr(matmul, "_written", lambda order, *given: taken.add(order) or original(order, *given))
    subject = TorchSubject("matmul", True, torch.device("cpu"), functional("matmul"), table_name="matmul")
    rows = list(run_cells([subject], [dtype], DEFAULT, exact=True))
    assert [row.reason for row in rows if row.status == "mismatch"] == []
    assert len([row for row in rows if row.status == "ok"]) > len(DEFAULT)
    assert taken == ({"narrow", "halves", "batched", "elements"} if dtype in ("float32", "float64") else set())


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
