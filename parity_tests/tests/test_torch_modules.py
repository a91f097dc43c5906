"""The torch layers under the conventions of PyTorch's own layers: a ModuleInfo each, and the tests that those have."""

import io
import os
import pickle
import sys
import types
import unittest
from copy import deepcopy
from functools import partial

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch
from torch import nn
from torch.testing import make_tensor

from torch_impl import MaskedPartitionedLinear, PartitionedLinear, implementation_names
from torch_impl.implementations import matmul
from torch_impl.registry import IMPLEMENTATIONS

# Forward-mode differentiation scripts its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def pytorch_frame():
    """Import the frame of PyTorch's module tests, and undo what this import does to its process."""
    environment, flags = dict(os.environ), torch.backends.flags_frozen.__globals__
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # a base class there, of which nothing is used here
    own = sys.modules.setdefault("expecttest", stand_in)
    try:
        from torch.testing._internal import common_modules
    finally:
        flags["__allow_nonbracketed_mutation_flag"] = True
        if own is stand_in:
            del sys.modules["expecttest"]
        os.environ.clear()
        os.environ.update(environment)
    return common_modules


frame = pytorch_frame()
SIZES = (3, 8, 16)  # rows of a multiple of 16 bytes in every dtype, which `grouped_matmul` needs


def reference(module, parameters, x):
    """Compute the map as n linear maps; of the masked layer from its blocks."""
    views = module.partition_views()
    y = torch.stack([part @ one for part, one in zip(x.unbind(-2), views["weight"], strict=True)], -2)
    return y if module.bias is None else y + views["bias"]


def module_inputs(module_info, device, dtype, requires_grad, training, *, options=None, **kwargs):
    make = partial(make_tensor, device=device, dtype=dtype, requires_grad=requires_grad, low=-1, high=1)
    options, Arguments = options or {}, frame.FunctionInput
    return [
        frame.ModuleInput(Arguments(*SIZES, **options), Arguments(make(5, 3, 8)), "", reference),
        frame.ModuleInput(Arguments(*SIZES, bias=False, **options), Arguments(make(5, 3, 8)), "no_bias", reference),
        frame.ModuleInput(Arguments(*SIZES, **options), Arguments(make(3, 8)), "no_batch_dim", reference),
        frame.ModuleInput(Arguments(*SIZES, **options), Arguments(make(2, 4, 3, 8)), "two_batch_dims", reference),
    ]


def info(module_class, **options):
    return frame.ModuleInfo(module_class, module_inputs_func=partial(module_inputs, options=options))


NAMES = [name for name in implementation_names() if "cpu" in IMPLEMENTATIONS[name].devices]
INFOS = {name: info(PartitionedLinear, implementation=name) for name in ("auto", *NAMES)}
INFOS |= {"one node": info(PartitionedLinear), "masked layer": info(MaskedPartitionedLinear)}
# Whose results are contiguous. Those of the others are views on a CPU, where that is the faster form.
CONTIGUOUS = {"one node", "loop", "masked", "masked layer"}


@pytest.fixture(params=INFOS)
def case(request, monkeypatch):
    if request.param == "one node":
        monkeypatch.setitem(matmul.NODE_FROM, "cpu", 0)
    torch.manual_seed(0)
    return request.param


def wide(name):
    return torch.float32 if name == "grouped_matmul" else torch.float64


def built(name, dtype=None, requires_grad=False):
    """Yield modules, inputs and references of a ModuleInfo."""
    dtype, module_info = dtype or wide(name), INFOS[name]
    for given in module_info.module_inputs_func(module_info, "cpu", dtype, requires_grad, True):
        arguments = given.constructor_input
        module = module_info.module_cls(*arguments.args, **arguments.kwargs, dtype=dtype)
        yield module, given.forward_input.args[0], given.reference_fn


def with_gradients(module, x, dy=None):
    """Return y and all gradients, as a training step leaves them in `grad`."""
    module.zero_grad()
    x = x.detach().requires_grad_() if x.is_leaf else x
    x.retain_grad()
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape) if dy is None else dy)
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def close(found, expected):
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_forward_and_repr(case):
    for module, x, function in built(case):
        torch.testing.assert_close(module(x), function(module, x))
        assert repr(module).startswith(type(module).__name__)
        assert str(SIZES[1]) in repr(module)


def test_factory_arguments(case):
    with torch.random.fork_rng():
        for module, x, _ in built(case, torch.float32):
            arguments = {"bias": module.bias is not None} | (
                {"implementation": case} if case in IMPLEMENTATIONS else {}
            )
            on_meta = type(module)(*SIZES, **arguments, device="meta", dtype=torch.bfloat16)
            with torch.device("meta"):
                in_context = type(module)(*SIZES, **arguments)
            assert {one.device.type for one in [*on_meta.parameters(), *in_context.parameters()]} == {"meta"}
            assert {one.dtype for one in on_meta.parameters()} == {torch.bfloat16}
            with torch.device("cpu"):
                assert in_context.to_empty(device="cpu")(x).shape == module(x).shape


def test_pickling_and_copies(case):
    for module, x, _ in built(case):
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        for copy in (again, pickle.loads(pickle.dumps(module)), deepcopy(module)):
            assert torch.equal(copy(x), module(x))
            assert all(one is not own for one, own in zip(copy.parameters(), module.parameters(), strict=True))


def test_inputs_are_not_changed(case):
    for module, x, _ in built(case):
        before, version = x.clone(), x._version
        with_gradients(module, x)
        assert torch.equal(x, before)
        assert x._version == version


def test_dtypes_and_swapped_parameters(case):
    for module, x, _ in built(case):
        lower = deepcopy(module).to(torch.bfloat16)
        assert lower(x.bfloat16()).dtype == torch.bfloat16
        assert all(parameter.dtype == torch.bfloat16 for parameter in lower.parameters())
        back = lower.to(wide(case))
        torch.testing.assert_close(back(x), module(x), rtol=0.1, atol=0.1)
        doubled = {name: 2 * value.detach() for name, value in module.named_parameters()}
        swapped = torch.func.functional_call(module, doubled, (x,))
        torch.testing.assert_close(swapped, 2 * module(x))


def non_contiguous(tensor):
    """Return the same values in every second place."""
    spread = torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]
    assert spread.numel() < 2 or not spread.is_contiguous()
    return spread


def test_non_contiguous_inputs_cotangents_and_parameters(case):
    for module, x, _ in built(case):
        dy = torch.randn_like(module(x)).contiguous()
        expected = with_gradients(module, x, dy)
        close(with_gradients(module, non_contiguous(x.detach()), non_contiguous(dy)), expected)
        strided = deepcopy(module)
        for name, parameter in list(strided.named_parameters()):
            setattr(strided, name, nn.Parameter(non_contiguous(parameter.detach())))
        close(with_gradients(strided, non_contiguous(x.detach()), dy), expected)


def test_gradients_and_their_gradients(case):
    if wide(case) != torch.float64:
        pytest.skip("not float64")
    check = {"fast_mode": True}
    for module, x, _ in built(case, requires_grad=True):
        names = [name for name, _ in module.named_parameters()]

        def call(x, *parameters, module=module, names=names):
            return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

        operands = (x, *(parameter.detach().requires_grad_() for parameter in module.parameters()))
        assert torch.autograd.gradcheck(call, operands, **check)
        if case not in IMPLEMENTATIONS or IMPLEMENTATIONS[case].double_backward:
            assert torch.autograd.gradgradcheck(call, operands, **check)


def test_memory_format(case):
    for module, x, _ in built(case):
        y, dx, *others = with_gradients(module, x)
        assert all(one.is_contiguous() for one in (dx, *others))  # as those of a leaf are
        one_row = x.ndim == 2  # which has a single form
        if case in CONTIGUOUS or one_row:
            assert y.is_contiguous()
        elif case in ("auto", "matmul"):
            assert not y.is_contiguous()
        if x.ndim == 4:
            formatted = deepcopy(module).to(memory_format=torch.channels_last)
            there = x.detach().to(memory_format=torch.channels_last)
            assert there.stride() != x.stride()
            close(with_gradients(formatted, there), [y, dx, *others])


@pytest.mark.parametrize("name", ["auto", "one node"])
def test_gradients_of_contiguous_operands_are_contiguous_in_one_node(name, monkeypatch):
    if name == "one node":
        monkeypatch.setitem(matmul.NODE_FROM, "cpu", 0)
    module, x, _ = next(iter(built(name, requires_grad=True)))
    dx, *_ = torch.autograd.grad(module(x).square().sum(), (x, *module.parameters()))
    assert dx.is_contiguous() == (name == "one node")


def test_the_frame_leaves_its_process_as_it_was():
    assert not torch.backends.flags_frozen()
    assert "expecttest" not in sys.modules or hasattr(sys.modules["expecttest"], "__file__")
    assert set(INFOS) >= {"auto", "masked layer"}
