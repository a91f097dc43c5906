"""`fused`: its kernels in Triton's interpreter, in a process of their own, and compiled for a GPU that is not there."""

import dataclasses
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from parity_tests.judge.subjects import framework_available, load_subjects, package_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch

from parity_tests.judge.inputs import DEFAULT
from parity_tests.judge.run import run_cells
from parity_tests.tests import test_torch_functional as every
from torch_impl import PartitionedLinear, UnsupportedImplementationError, implementation_names, partitioned_linear
from torch_impl import registry as table
from torch_impl.implementations.fused import INTERPRETED, fused_linear
from torch_impl.registry import get_implementation, unsupported_reason

HERE = Path(__file__).parent
EVERY = "EVERY_TEST" in os.environ
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
needs_triton = pytest.mark.skipif(not package_available("triton"), reason="the kernels need triton")
in_the_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_the_kernels_hold_in_the_interpreter starts"
)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_kernels_hold_in_the_interpreter():
    """Run the tests below, and those of all implementations, where Triton's interpreter runs `fused` on the CPU."""
    files = ["fused", *(("functional", "layouts", "drawn_calls") if EVERY else ())]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-shape-checks"]
    # NumPy, in which the interpreter computes, warns of NaN and Inf.
    command += ["-W", "ignore::RuntimeWarning", "-k", "interpreter or fused-"]
    command += [str(HERE / f"test_torch_{name}.py") for name in files]
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        timeout=500,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", found.stdout)
    assert int(passed) > 30, found.stdout[-500:]


def lattice(*shape, dtype=torch.float32):
    """Integers in +-3: every sum below is exact in fp32, and rounded once in 16 bits."""
    return torch.randint(-3, 4, shape).to(dtype)


def expected(x, weight, bias, dy):
    """The outputs and all gradients in float64."""
    x, weight, dy = x.detach().double(), weight.detach().double(), dy.double()
    y = torch.einsum("bni,nio->bno", x, weight) + (0 if bias is None else bias.detach().double())
    found = [y, torch.einsum("bno,nio->bni", dy, weight), torch.einsum("bni,bno->nio", x, dy)]
    return found if bias is None else [*found, dy.sum(0)]


# (b, n, i, o): every kernel, with sizes that are no multiple of a tile, in one pass and in several.
SIZES = {
    "odd": (5, 3, 7, 11),
    "four-by-four": (3, 862, 4, 4),
    "one-out": (9, 5, 8, 1),
    "one-in": (70, 4, 1, 9),
    "one-row": (1, 5, 16, 8),
    "one-row-of-many-partitions": (1, 862, 4, 1),
    "one-row-in-blocks": (1, 3, 40, 70),
    "few-rows-of-many-partitions": (2, 5, 9, 70),
    "blocks-of-both": (17, 2, 100, 70),
    "split-rows": (130, 2, 20, 33),
    "split-rows-of-small-blocks": (70, 3, 4, 8),
    "one-partition": (4, 1, 511, 3),
}


@in_the_interpreter
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_in_the_interpreter(size, dtype, with_bias):
    usual = (dtype == "float32" or "split" in size) and (with_bias or size == "odd")
    if not (EVERY or usual):
        pytest.skip("another one is of this kind: run with EVERY_TEST=1")
    torch.manual_seed(0)
    b, n, i, o = SIZES[size]
    kind = DTYPES[dtype]
    x, weight, dy = lattice(b, n, i, dtype=kind), lattice(n, i, o, dtype=kind), lattice(b, n, o, dtype=kind)
    bias = lattice(n, o, dtype=kind) if with_bias else None
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    y = partitioned_linear(x, weight, bias, implementation="fused")
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    for tensor, value in zip(found, expected(x, weight, bias, dy), strict=True):
        assert tensor.is_contiguous()
        assert torch.equal(tensor, value.to(kind))


@in_the_interpreter
@pytest.mark.skipif(not EVERY, reason="imports ONNX: run with EVERY_TEST=1")
@pytest.mark.filterwarnings("ignore")
def test_the_onnx_exporter_refuses_it_by_name_in_the_interpreter():
    pytest.importorskip("onnxscript", reason="onnxscript is not installed here")
    layer = PartitionedLinear(3, 8, 16, implementation="fused")
    with pytest.raises(Exception, match=r"partitioned_linear.fused_linear"):
        torch.onnx.export(layer, (torch.ones(4, 3, 8),), dynamo=True, verbose=False)


EXACT = (("odd-sizes", "float32"), ("no-bias", "float16"))


@in_the_interpreter
def test_the_judge_accepts_it_in_the_interpreter():
    (subject,) = [subject for subject in load_subjects("torch", "cpu") if subject.implementation == "fused"]
    named = ("odd-sizes", "no-bias", "leading-dims", "features-first", "strided-rows", "one-out")
    able = [case for case in DEFAULT if subject.unsupported_reason(case, "float32") is None]
    assert {case.name for case in DEFAULT} - {case.name for case in able} == {"long-contraction"}
    cases = [case for case in able if EVERY or case.name in named]
    # The interpreter is given bf16 as fp32, and to learn how a dtype is rounded takes 160 calls.
    dtypes = DTYPES if EVERY else ("float32", "float16")
    # Isolation, the lattice and the metamorphic relations, on tiles and on products.
    exact = [(case, dtype) for case in cases for dtype in dtypes if EVERY or (case.name, dtype) in EXACT]
    rows = [row for case, dtype in exact for row in run_cells([subject], [dtype], [case], exact=True)]
    others = [cell for cell in product(cases, dtypes) if cell not in exact]
    rows += [row for case, dtype in others for row in run_cells([subject], [dtype], [case])]
    held = {(row.case, row.dtype, row.kind) for row in rows if row.status == "ok"}
    assert held >= {(case.name, dtype, "oracle") for case, dtype in product(cases, dtypes)}
    assert held >= {(case.name, dtype, "exact") for case, dtype in exact if case.rows}
    assert [row.reason for row in rows if row.status != "ok" and row.case != "empty-batch"] == []


@in_the_interpreter
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_it_does_as_all_implementations_in_the_interpreter():
    for make in every.STRIDED.values():
        every.test_strides_do_not_matter("fused", make)
    every.test_strided_weight_bias_and_expanded_cotangent("fused")
    every.test_double_backward_is_as_declared("fused")
    every.test_autocast_casts_operands_of_any_dtype("fused")
    every.test_function_transforms("fused")
    every.test_meta_device_infers_shapes_or_says_why_not("fused")


@in_the_interpreter
def test_random_numbers_give_the_same_bits_each_time_in_the_interpreter():
    operands = [torch.randn(*shape, requires_grad=True) for shape in ((130, 2, 20), (2, 20, 33), (2, 33))]
    dy = torch.randn(130, 2, 33)
    calls = []
    for _ in range(2):
        y = partitioned_linear(*operands, implementation="fused")
        calls.append([y, *torch.autograd.grad(y, operands, dy)])
    assert all(torch.equal(first, second) for first, second in zip(*calls, strict=True))


@in_the_interpreter
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x, bias", "weight, bias"])
def test_only_what_is_asked_for_gets_a_gradient_in_the_interpreter(wanted):
    operands = {"x": lattice(6, 3, 7), "weight": lattice(3, 7, 5), "bias": lattice(3, 5)}
    dy, names = lattice(6, 3, 5), wanted.split(", ")
    y = partitioned_linear(
        *(tensor.requires_grad_(name in names) for name, tensor in operands.items()), implementation="fused"
    )
    gradients = dict(zip(operands, expected(*operands.values(), dy)[1:], strict=True))
    for name, found in zip(names, torch.autograd.grad(y, [operands[name] for name in names], dy), strict=True):
        assert torch.equal(found.double(), gradients[name])


X, W, B = lattice(5, 3, 7), lattice(3, 7, 6), lattice(3, 6)
MANY, COTANGENTS = lattice(2, 5, 3, 7), lattice(2, 5, 3, 6)
TRANSFORMS = {
    "hessian": lambda f: torch.func.hessian(lambda x: f(x, W, B).pow(3).sum())(X[:1]),
    "jacobian": lambda f: torch.func.jacrev(lambda w: f(X, w, B))(W),
    "jvp of all": lambda f: torch.func.jvp(f, (X, W, B), (X + 1, W + 2, B + 3)),
    "jvp of bias": lambda f: torch.func.jvp(lambda b: f(X, W, b), (B,), (B + 3,)),
    "jvp of weight": lambda f: torch.func.jvp(lambda w: f(X, w, B), (W,), (W + 2,)),
    "vmap over all": lambda f: torch.vmap(f)(MANY, torch.stack([W, W + 1]), torch.stack([B, B + 1])),
    "vmap over weights": lambda f: torch.vmap(lambda w: f(X, w, None), 1)(torch.stack([W, W + 1], 1)),
    "gradients of samples": lambda f: torch.vmap(torch.func.grad(lambda w, x: f(x, w, B).square().sum()), (None, 0))(
        W, MANY
    ),
    "cotangents of a batch": lambda f: torch.autograd.grad(
        f(X.requires_grad_(), W, B), X, COTANGENTS, is_grads_batched=True
    ),
}


# torch's own forward-mode set-up scripts a function on first use, and says that scripting is deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@in_the_interpreter
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_agree_in_the_interpreter(name):
    found, wanted = (
        torch.utils._pytree.tree_leaves(
            TRANSFORMS[name](lambda *o, way=way: partitioned_linear(*o, implementation=way))
        )
        for way in ("fused", "loop")
    )
    assert len(found) == len(wanted)
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))


@in_the_interpreter
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by opcheck
def test_programs_hold_the_operator_in_the_interpreter():
    layer = PartitionedLinear(3, 7, 6, implementation="fused")
    x = torch.randn(5, 3, 7)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    assert "fused_linear" in str(program.graph)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for function in (program.module(), compiled):
        for batch in (5, 9):
            x = torch.randn(batch, 3, 7, requires_grad=True)
            results = [[y, *torch.autograd.grad(y.sum(), x)] for y in (function(x), layer(x))]
            assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
    if EVERY:
        for operands in ((X, W, B), (X, W, None)):
            leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in operands]
            torch.library.opcheck(fused_linear, leaves)
    # The operator itself would lose the tangent without a word.
    tangent = torch.randn(5, 3, 7)
    pushed = torch.compile(lambda v: torch.func.jvp(layer, (v,), (tangent,))[1], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(pushed(x[:5].detach()), torch.einsum("bni,nio->bno", tangent, layer.weight))


# --- without the interpreter ---

SHAPES = {
    "one pass of tiles": (128, 3, 32, 32),
    "one pass of products": (8, 9, 4, 4),
    "several tiles": (1024, 200, 77, 45),
    "long sides": (64, 5, 511, 256),
    "largest single tile": (4096, 32, 64, 64),
    "few rows": (16, 321, 336, 96),
    "small blocks": (256, 325, 8, 8),
    "one row": (1, 321, 336, 96),
}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compile_for_a_gpu(shape, dtype, monkeypatch, tmp_path, request):
    """Every candidate of every kernel becomes machine code of an H100 or H200; there need be no GPU."""
    if not EVERY and (shape, dtype) not in (("one pass of tiles", "float32"), ("one pass of products", "bfloat16")):
        pytest.skip("another one is of this kind: run with EVERY_TEST=1")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    from torch_impl import fused_kernels

    class Device:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    programs = []

    def compile_only(self, *args, grid, warmup=False, **meta):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        candidates = self.prune_configs(meta)
        assert 1 <= len(candidates) <= 3
        for config in candidates if EVERY else candidates[:1]:
            program = self.fn.warmup(*args, grid=grid, **meta, **config.all_kwargs())
            programs.append((self.base_fn.__name__, program))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Autotuner, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Device())
    b, n, i, o = SHAPES[shape]
    kind = DTYPES.get(dtype, torch.float32)
    x, weight, bias, y = (torch.empty(s, dtype=kind) for s in ((b, n, i), (n, i, o), (n, o), (b, n, o)))
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    fused_kernels.forward(x, weight, bias, y)
    fused_kernels.backward(y, x, weight, True)
    if EVERY:
        fused_kernels.backward(y, x, None, False)
    name = "product" if max(i, o) <= 8 or b == 1 else "tile"
    assert {kernel for kernel, _ in programs} == {f"{name}_forward", f"{name}_backward"}
    for kernel, program in programs:
        assert program.asm["cubin"]
        # Atomic additions would make results differ from call to call.
        assert "atom." not in program.asm["ptx"], kernel
        assert not re.search(r"\bred\.", program.asm["ptx"]), kernel
        # Tensor cores where products of fp32 are not asked for.
        assert ("mma" in program.asm["ptx"]) == (name == "tile" and dtype != "float32"), kernel


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="a CPU is refused where the interpreter is off")
def test_a_cpu_is_refused_in_one_sentence():
    operands = lattice(5, 3, 7), lattice(3, 7, 6), None
    with pytest.raises(
        UnsupportedImplementationError, match=r"^`implementation`: 'fused' supports devices cuda, got cpu"
    ):
        partitioned_linear(*operands, implementation="fused")
    assert "fused" not in implementation_names(device="cpu")
    assert "fused" in implementation_names(device="cuda")
    assert "fused" not in {subject.implementation for subject in load_subjects("torch", "cpu")}


SENTENCES = {
    "size": ({"in_features": 512}, "takes at most 511 features in and out, got in_features=512, out_features=8"),
    "other size": ({"out_features": 5000}, "got in_features=8, out_features=5000; choose another one"),
    "dtype": ({"dtype": "float64"}, "supports bfloat16, float16, float32, got float64"),
    "shared input": (
        {"shared": True},
        "expected one with a product for a shared input, 'einsum', 'matmul', got 'fused'",
    ),
    "unequal sizes": ({"unequal": True}, "expected one for sequences of sizes, 'loop', "),
}


@pytest.mark.parametrize("why", SENTENCES)
def test_other_calls_are_refused_in_one_sentence(why, monkeypatch):
    entry = dataclasses.replace(get_implementation("fused"), missing=None)
    monkeypatch.setattr(table, "IMPLEMENTATIONS", {**table.IMPLEMENTATIONS, "fused": entry})
    call = {"dtype": "float32", "device": "cuda", "in_features": 8, "out_features": 8}
    assert unsupported_reason("fused", **call) is None
    changed, sentence = SENTENCES[why]
    if why == "unequal sizes":
        with pytest.raises(UnsupportedImplementationError, match=sentence):
            unsupported_reason("fused", **call, **changed)
    else:
        assert sentence in unsupported_reason("fused", **call | changed)


def test_without_triton_the_sentence_says_what_to_install(monkeypatch):
    entry = dataclasses.replace(get_implementation("fused"), missing="triton, which is not installed; run it")
    monkeypatch.setattr(table, "IMPLEMENTATIONS", {**table.IMPLEMENTATIONS, "fused": entry})
    call = {"dtype": "float32", "in_features": 8, "out_features": 8}
    for device in ("cuda", "meta"):
        reason = unsupported_reason("fused", device=device, **call)
        assert reason == "`implementation`: 'fused' needs triton, which is not installed; run it."
