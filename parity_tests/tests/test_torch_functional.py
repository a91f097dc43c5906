"""The torch function: shapes, strides, dtypes, derivatives and declared properties of every implementation."""

from itertools import product

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch

from torch_impl import UnsupportedImplementationError, functional, implementation_names, partitioned_linear, validation
from torch_impl.registry import DTYPE_NAMES, IMPLEMENTATIONS, get_implementation, unsupported_reason

NAMES = implementation_names(device="cpu")  # `fused` only where Triton's interpreter runs it, see test_torch_fused
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
LEADING = {"none": (), "empty": (0,), "one": (1,), "batch": (5,), "two": (2, 3), "empty-second": (2, 0)}
SIZES = {"plain": (3, 8, 16), "one-partition": (1, 8, 8), "in-1": (4, 1, 3), "out-1": (4, 3, 1), "all-1": (1, 1, 1)}


@pytest.fixture(autouse=True)
def poisoned_allocations():
    # In deterministic mode torch fills fresh memory with NaN, so that a value read before it is written shows.
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def lattice(*shape, dtype=torch.float32):
    """Integers in +-3: every sum below is exact in every dtype, so results are compared bit for bit."""
    return torch.randint(-3, 4, shape).to(dtype)


def supported(name, dtype, sizes):
    _, i, o = sizes
    return unsupported_reason(name, dtype=dtype, device="cpu", in_features=i, out_features=o) is None


def run(x, weight, bias, name):
    return partitioned_linear(x, weight, bias, implementation=name)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("leading", LEADING.values(), ids=LEADING)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_values_and_gradients(name, dtype, sizes, leading, with_bias):
    n, i, o = sizes
    kind = DTYPES[dtype]
    x, weight = lattice(*leading, n, i, dtype=kind), lattice(n, i, o, dtype=kind)
    bias = lattice(n, o, dtype=kind) if with_bias else None
    operands = [tensor.requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    if not supported(name, dtype, sizes):
        with pytest.raises(UnsupportedImplementationError, match="`implementation`"):
            run(x, weight, bias, name)
        return
    y = run(x, weight, bias, name)
    assert y.shape == (*leading, n, o)
    assert y.dtype == kind
    cotangent = lattice(*leading, n, o, dtype=kind)
    gradients = torch.autograd.grad(y, operands, cotangent)
    expected_y = (x.detach().double().unsqueeze(-1) * weight.detach().double()).sum(-2)
    if with_bias:
        expected_y = expected_y + bias.detach().double()
    assert torch.equal(y.detach().double(), expected_y)
    rows, cotangent_rows = x.detach().double().reshape(-1, n, i), cotangent.double().reshape(-1, n, o)
    expected = [
        (cotangent.double().unsqueeze(-2) * weight.detach().double()).sum(-1),
        (rows.unsqueeze(-1) * cotangent_rows.unsqueeze(-2)).sum(0),
        cotangent_rows.sum(0),
    ]
    for gradient, operand, value in zip(gradients, operands, expected[: len(operands)], strict=True):
        assert gradient.dtype == operand.dtype
        assert torch.equal(gradient.double(), value)


STRIDED = {
    "contraction-axis-strided": lambda: lattice(5, 8, 3).mT,
    "every-second-feature": lambda: lattice(5, 3, 16)[..., ::2],
    "window": lambda: lattice(5, 3, 11)[..., 2:10],
    "shared-by-partitions": lambda: lattice(5, 1, 8).expand(5, 3, 8),
    "batch-expanded": lambda: lattice(1, 3, 8).expand(5, 3, 8),
    "partition-axis-first": lambda: lattice(3, 5, 8).transpose(0, 1),
    "reversed-leading": lambda: lattice(2, 5, 3, 8).transpose(0, 1),
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name, make):
    x, weight, bias = make(), lattice(3, 8, 16), lattice(3, 16)
    strided = x.detach().requires_grad_()
    dense = x.clone(memory_format=torch.contiguous_format).requires_grad_()
    assert strided.stride() != dense.stride()
    results = []
    for operand in (strided, dense):
        y = run(operand, weight, bias, name)
        results.append((y, *torch.autograd.grad(y.square().sum(), operand)))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_strided_weight_bias_and_expanded_cotangent(name):
    x, weight, bias = lattice(5, 3, 8), lattice(3, 16, 8).mT, lattice(16, 3).T
    operands = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    gradients = torch.autograd.grad(run(*operands, name).sum(), operands)
    expected = (weight.sum(-1).expand_as(x), x.sum(0).unsqueeze(-1).expand_as(weight), torch.full((3, 16), 5.0))
    assert all(torch.equal(found, value) for found, value in zip(gradients, expected, strict=True))


def second_derivatives_hold(function):
    """Compare the derivatives of a sum of squared gradients with those of the reference, exactly, on the lattice."""
    operands = [lattice(4, 3, 8), lattice(3, 8, 8), lattice(3, 8)]
    found = []
    for candidate in (function, get_implementation("loop").run):
        leaves = [tensor.clone().requires_grad_() for tensor in operands]
        try:
            first = torch.autograd.grad(candidate(*leaves).square().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum((g.square().sum() for g in first[:2]), first[2].sum()), leaves)
        except (RuntimeError, NotImplementedError):
            return False
        found.append(second)
    # The sums reach a few hundred thousand, well inside the integers that fp32 represents.
    assert all(gradient.abs().max() < 2**24 for gradient in found[-1])
    return all(torch.equal(left, right) for left, right in zip(*found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_as_declared(name):
    assert second_derivatives_hold(get_implementation(name).run) is get_implementation(name).double_backward


def test_double_backward_check_can_fail():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, cotangent):
            return cotangent

    assert not second_derivatives_hold(lambda *operands: Once.apply(get_implementation("loop").run(*operands)))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", [name for name in NAMES if "float64" in IMPLEMENTATIONS[name].dtypes])
def test_gradients_against_finite_differences(name, with_bias):
    shapes = [(2, 2, 3, 2), (3, 2, 4), (3, 4)][: 2 + with_bias]
    operands = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    bias = [] if with_bias else [None]

    def function(*tensors):
        return run(*tensors, *bias, name)

    assert torch.autograd.gradcheck(function, operands)
    if IMPLEMENTATIONS[name].double_backward:
        assert torch.autograd.gradgradcheck(function, operands)


def isolates(function, poison):
    """Whether poison in one partition's operands leaves every other partition's results bitwise as they were."""
    operands = [torch.randn(4, 3, 8), torch.randn(3, 8, 8), torch.randn(3, 8)]
    cotangent = torch.randn(4, 3, 8)

    def results(tensors, dy):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = function(*leaves)
        dx, dw, db = torch.autograd.grad(y, leaves, dy)
        return [tensor.detach() for tensor in (y.transpose(0, 1), dx.transpose(0, 1), dw, db)]

    clean = results(operands, cotangent)
    for partition in range(3):
        others = [k for k in range(3) if k != partition]
        for target in range(4):
            tensors = [tensor.clone() for tensor in (*operands, cotangent)]
            view = tensors[target].transpose(0, 1) if target in (0, 3) else tensors[target]
            view[partition] = poison
            dirty = results(tensors[:3], tensors[3])
            if not all(torch.equal(left[others], right[others]) for left, right in zip(clean, dirty, strict=True)):
                return False
    return True


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", NAMES)
def test_isolation_of_partitions_is_as_declared(name, poison):
    assert isolates(get_implementation(name).run, poison) is get_implementation(name).isolates_partitions


def test_some_implementation_isolates_and_some_does_not():
    assert {entry.isolates_partitions for entry in IMPLEMENTATIONS.values()} == {True, False}


@pytest.mark.parametrize("name", [*NAMES, "auto"])
def test_autocast_casts_operands_of_any_dtype(name):
    x = torch.randn(4, 3, 8, requires_grad=True)
    weight, bias = torch.randn(3, 8, 8, dtype=torch.bfloat16), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(x, weight, bias, name)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, run(x.bfloat16(), weight, bias.bfloat16(), name))
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert gradient.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    operands = [torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3, 8), (3, 8, 8), (3, 8))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(*operands, "auto").dtype == torch.float64


# torch's own forward-mode set-up scripts a function on first use, and says that scripting is deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "grouped_matmul"])
def test_function_transforms(name):
    x, weight, bias = lattice(4, 3, 8), lattice(3, 8, 8), lattice(3, 8)
    tangent = lattice(4, 3, 8)
    y, dy = torch.func.jvp(lambda value: run(value, weight, bias, name), (x,), (tangent,))
    assert torch.equal(y, run(x, weight, bias, "loop"))
    assert torch.equal(dy, run(tangent, weight, None, "loop"))
    mapped = torch.vmap(lambda value: run(value, weight, bias, name))(torch.stack([x, tangent]))
    assert torch.equal(mapped, run(torch.stack([x, tangent]), weight, bias, "loop"))


@pytest.mark.parametrize("name", NAMES)
def test_meta_device_infers_shapes_or_says_why_not(name):
    x, weight = torch.empty(2, 5, 3, 8, device="meta"), torch.empty(3, 8, 16, device="meta")
    if "float32" in IMPLEMENTATIONS[name].traced_dtypes:
        assert run(x, weight, None, name).shape == (2, 5, 3, 16)
    else:
        with pytest.raises(UnsupportedImplementationError, match="traced without data"):
            run(x, weight, None, name)
    half = run(x.bfloat16(), weight.bfloat16(), None, name)
    assert half.shape == (2, 5, 3, 16)
    assert half.is_meta


def test_the_table_is_frozen_and_ordered():
    every = ("loop", "masked", "einsum", "vmap", "matmul", "grouped_conv", "grouped_matmul", "fused")
    assert implementation_names() == every
    assert all(entry.name == name for name, entry in IMPLEMENTATIONS.items())
    with pytest.raises(TypeError):
        IMPLEMENTATIONS["loop"] = get_implementation("matmul")
    with pytest.raises(AttributeError):
        get_implementation("loop").name = "other"


@pytest.mark.parametrize("name", implementation_names())
def test_unsupported_reason_follows_the_declarations(name):
    entry = get_implementation(name)
    for dtype in DTYPES:
        for device in ("cpu", "cuda", "mps"):
            reason = unsupported_reason(name, dtype=dtype, device=device, in_features=8, out_features=16)
            runs = entry.missing is None and dtype in entry.dtypes and device in entry.devices
            assert (reason is None) is runs, reason
    if entry.stride_bytes > 1:
        for sizes in ((5, 8), (8, 5)):
            reason = unsupported_reason(
                name, dtype="float32", device="cpu", in_features=sizes[0], out_features=sizes[1]
            )
            assert "multiple of 16 bytes" in reason


def test_auto_means_matmul_and_raises_where_that_is_not_supported(monkeypatch):
    asked = []
    monkeypatch.setattr(
        functional, "unsupported_reason", lambda name, **_: asked.append(name) or (None, "no")[len(asked) - 1]
    )
    # Ordinary tensors on a CPU, which it always runs, are not asked about.
    operands = (torch.zeros(2, 3, 5, device="meta"), torch.zeros(3, 5, 7, device="meta"), None)
    partitioned_linear(*operands)
    with pytest.raises(UnsupportedImplementationError, match="no"):
        partitioned_linear(*operands)
    assert asked == ["matmul"] * 2
    assert "'matmul' supports devices cpu, cuda, got mps" in unsupported_reason(
        "matmul", dtype="float32", device="mps", in_features=5, out_features=7
    )


def refused(*operands):
    """Whether the checks refuse operands; with an error of any other kind the test ends."""
    try:
        validation.check_operands(*operands)
    except (TypeError, ValueError):
        return True
    return False


def test_only_what_needs_no_cast_and_no_gathering_is_computed_at_once():
    """One for each kind of operand that goes the long way, beside the same operands as ordinary tensors."""
    x, weight, bias = torch.zeros(5, 2, 3), torch.nn.Parameter(torch.zeros(2, 3, 4)), torch.zeros(2, 4)
    assert functional.plain_call(x, weight, bias).shape == functional.plain_call(x, weight, None).shape == (5, 2, 4)

    class Marked(torch.Tensor):
        pass

    for operands in (
        (x.as_subclass(Marked), weight, bias),
        (x, weight, bias.as_subclass(Marked)),
        (x.to_sparse(), weight, None),
        (x, weight.to_sparse(), bias),
        (x, weight, bias.to_sparse()),
        (x.tolist(), weight, bias),
    ):
        assert functional.plain_call(*operands) is None
    # No kernel would refuse the dtypes of no rows at all.
    for rows in ((0,), (2, 0), (0, 1)):
        for empty in (torch.zeros(*rows, 2, 3, dtype=torch.float64), torch.zeros(*rows, 2, 3, dtype=torch.int64)):
            with pytest.raises(TypeError, match=r"`x`: expected (the|a) dtype of"):
                partitioned_linear(empty, weight.detach())
        assert partitioned_linear(torch.zeros(*rows, 2, 3), weight).shape == (*rows, 2, 4)
    # The kernel of many rows and few features would take a sparse kernel, turned.
    many, wide = torch.zeros(2000, 2, 3), torch.zeros(2, 3, 4)
    with torch.no_grad():
        assert functional.plain_call(many, wide, None).stride(0) == 1
        assert functional.plain_call(many, wide.to_sparse(), None) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.plain_call(x, weight, bias) is None
        assert partitioned_linear(x, weight, bias).dtype == torch.bfloat16
    # Inside torch.vmap a batched product would broadcast a partition axis of size one.
    with pytest.raises(ValueError, match="`x`: expected shape"):
        torch.vmap(partitioned_linear, in_dims=(0, None, None))(torch.zeros(2, 5, 1, 3), weight, bias)


@pytest.mark.parametrize("sizes", [(16, 2, 32, 32), (64, 2, 16, 16), (64, 64, 8, 8), (2000, 2, 1, 5)], ids=str)
def test_one_axis_of_rows_takes_the_short_way(monkeypatch, sizes):
    """A way more would be some microseconds, which many products take no longer than."""
    count, n, i, o = sizes
    x, weight, bias = torch.randn(count, n, i), torch.randn(n, i, o).requires_grad_(), torch.randn(n, o)
    expected = partitioned_linear(x, weight, bias, implementation="matmul")

    def never(*given):
        raise AssertionError("the long way")

    monkeypatch.setattr(functional, "partitioned_linear_matmul", never)
    y = partitioned_linear(x, weight, bias)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    with pytest.raises(AssertionError, match="the long way"):
        partitioned_linear(x.unflatten(0, (2, -1)), weight, bias)


def test_shapes_are_taken_exactly_where_the_formula_has_them(monkeypatch):
    """Of all small shapes, the quick check and the one that explains agree with y[..., n, o] = x[..., n, i] W[n, i, o].

    No size of one is broadcast, no other axis is looked at in the place of the right one, and what fits is never
    explained.
    """
    sizes = (1, 2, 3)
    of_x = [(*lead, *own) for lead in ((), (3,), (0,), (2, 1)) for own in ((), (2,), *product((0, *sizes), repeat=2))]
    of_weight = [*product(sizes, repeat=3), (2, 3), (2, 2, 3, 3), (0, 2, 3), (2, 0, 3), (2, 3, 0)]
    tensors = {shape: torch.empty(shape) for shape in {*of_x, *of_weight, *product(sizes, repeat=2)}}
    right = 0
    for shape, kernel in product(of_x, of_weight):
        n, i, o = kernel if len(kernel) == 3 else (None,) * 3
        fits = len(kernel) == 3 and 0 not in kernel and shape[-2:] == (n, i)
        biases = (None, (n, o), (o, n), (1, o), (n, 1), (o,), (1, n, o)) if fits else (None,)
        for bias in biases:
            value = None if bias is None else tensors.setdefault(bias, torch.empty(bias))
            wanted = fits and (bias is None or bias == (n, o))
            assert refused(tensors[shape], tensors[kernel], value) != wanted, (shape, kernel, bias)
            assert (functional.plain_call(tensors[shape], tensors[kernel], value) is not None) == wanted
            if wanted:
                right += 1
                with monkeypatch.context() as patch:
                    patch.delattr(validation, "_explain_operands")
                    validation.check_operands(tensors[shape], tensors[kernel], value)
    assert right > 100


def test_dtypes_and_devices_are_taken_exactly_where_they_are_supported():
    kinds = (torch.float32, torch.bfloat16, torch.int32, torch.complex64)
    for dtypes in product(kinds, repeat=3):
        operands = [
            torch.empty(shape, dtype=d) for shape, d in zip(((5, 2, 3), (2, 3, 4), (2, 4)), dtypes, strict=True)
        ]
        assert refused(*operands) == any(dtype not in DTYPE_NAMES for dtype in dtypes), dtypes
        one_dtype = len(set(dtypes)) == 1 and dtypes[0] in DTYPE_NAMES
        assert (functional.plain_call(*operands) is not None) == one_dtype, dtypes
    for devices in product(("cpu", "meta"), repeat=3):
        operands = [
            torch.empty(shape, device=d) for shape, d in zip(((5, 2, 3), (2, 3, 4), (2, 4)), devices, strict=True)
        ]
        assert refused(*operands) == (len(set(devices)) > 1), devices
        assert (functional.plain_call(*operands) is not None) == (set(devices) == {"cpu"}), devices


@pytest.mark.grouped_mm
def test_an_unrestricted_implementation_is_supported_without_a_question(monkeypatch):
    """This is asked at every call, before kernels that take a few microseconds."""
    sizes = {"dtype": "float32", "device": "cpu", "in_features": 4, "out_features": 4}
    assert unsupported_reason("grouped_matmul", **sizes) is None

    def asked():
        raise AssertionError("the compiler was asked")

    monkeypatch.setattr(torch.compiler, "is_compiling", asked)
    for name in NAMES:
        if name not in ("grouped_matmul", "fused"):
            assert unsupported_reason(name, **sizes) is None
    with pytest.raises(AssertionError, match="the compiler was asked"):
        unsupported_reason("grouped_matmul", **sizes)
