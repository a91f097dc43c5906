"""Bad calls of the torch tree: each gives its one clear sentence."""

import warnings

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from parity_tests.tests.forked import run_python
from torch_impl import (
    MaskedPartitionedLinear,
    PartitionedLinear,
    UnsupportedImplementationError,
    export_parameters,
    implementation_names,
    import_parameters,
    load_parameters,
    partitioned_linear,
    save_parameters,
)
from torch_impl.parameters import state_dict_from_linears
from torch_impl.registry import get_implementation, unsupported_reason
from torch_impl.sharding import shard_inputs, shard_partitions

X, W, B = torch.zeros(5, 4, 8), torch.zeros(4, 8, 6), torch.zeros(4, 6)


def call(x=X, weight=W, bias=B, **options):
    return lambda: partitioned_linear(x, weight, bias, **options)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prototype
        return torch.nested.nested_tensor([torch.zeros(4, 8), torch.zeros(3, 8)])


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in many models
        return torch.quantize_per_tensor(W, 0.1, 0, torch.qint8)


def in_forward_mode():
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch scripts its own set-up on first use
        partitioned_linear(forward_ad.make_dual(X, X), W[..., :4], implementation="grouped_matmul")


class Spelled(TorchFunctionMode):
    """Computes the product by operations that broadcast and promote, as a tool that rewrites calls may."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.baddbmm:
            return args[0] + args[1] @ args[2]
        return func(*args, **(kwargs or {}))


def within(mode, **operands):
    def run():
        with mode():
            call(**operands)()

    return run


def mapped(x=X, weight=W, bias=B):
    return lambda: torch.vmap(partitioned_linear, (0, None, None))(x[None], weight, bias)


FUNCTION = {
    "names-device": (
        lambda: implementation_names(device="gpu"),
        ValueError,
        r"^`device`: expected 'cpu', 'cuda' or None, got 'gpu'; choose one of these\.$",
    ),
    "weight-transposed": (
        call(x=torch.zeros(5, 4, 6)),
        ValueError,
        r"got \(5, 4, 6\); its last axis has the size of out: exchange in and out, or the last two axes of the weight",
    ),
    "partitions-elsewhere": (
        call(partitions=torch.tensor([0], device="meta")),
        ValueError,
        r"^`partitions`: expected indices with values, got some on meta; pass some on cpu\.$",
    ),
    "x-no-tensor": (call(x=X.numpy()), TypeError, r"^`x`: expected a torch.Tensor, got a ndarray; convert it first\.$"),
    "x-none": (call(x=None), TypeError, r"^`x`: expected a torch.Tensor, got a NoneType;"),
    "weight-list": (call(weight=[W]), TypeError, r"^`weight`: expected a torch.Tensor, got a list;"),
    "bias-float": (call(bias=0.0), TypeError, r"^`bias`: expected a torch.Tensor, got a float;"),
    "x-sparse": (
        call(x=X.to_sparse()),
        TypeError,
        r"^`x`: expected a dense tensor, got layout torch\.sparse_coo; call to_dense first\.$",
    ),
    "x-of-no-partitions-without-strides": (  # a view of which ends the process
        call(torch.ones(2, 0, 4).to_mkldnn(), torch.ones(3, 4, 5), torch.ones(0, 5)),
        TypeError,
        r"^`x`: expected a dense tensor, got layout torch\._mkldnn; call to_dense first\.$",
    ),
    "weight-sparse": (call(weight=W.to_sparse()), TypeError, r"^`weight`: expected a dense tensor, got layout"),
    "bias-sparse": (call(bias=B.to_sparse()), TypeError, r"^`bias`: expected a dense tensor, got layout"),
    "x-nested": (call(x=nested()), TypeError, r"^`x`: expected a dense tensor, got a nested one; pad it to one shape"),
    "bias-uninitialised": (
        call(bias=nn.UninitializedParameter()),
        TypeError,
        r"^`bias`: expected a tensor with a shape, got an UninitializedParameter; initialise it first, by a first",
    ),
    "weight-quantised": (
        call(weight=quantised()),
        TypeError,
        r"^`weight`: expected a dtype of float64, .*, got qint8;",
    ),
    "forward-mode-of-grouped_matmul": (
        in_forward_mode,
        UnsupportedImplementationError,
        r"^`implementation`: expected one that supports this call, got 'grouped_matmul' \(.*forward mode AD\); choose",
    ),
    "name-array": (call(implementation=np.zeros(2)), TypeError, r"^`implementation`: expected a name, got a ndarray;"),
    "x-integer": (call(x=X.int()), TypeError, r"^`x`: expected a dtype of float64, .*, got int32; cast it first\.$"),
    "weight-complex": (call(weight=W.cfloat()), TypeError, r"^`weight`: expected a dtype of .*, got complex64;"),
    # The kernel would add these, and compute that.
    "bias-of-one-partition": (call(bias=B[:1]), ValueError, r"^`bias`: expected shape .* = \(4, 6\), got \(1, 6\);"),
    "bias-of-one-feature": (call(bias=B[:, :1]), ValueError, r"^`bias`: expected shape .* = \(4, 6\), got \(4, 1\);"),
    "all-integer": (call(X.int(), W.int(), B.int()), TypeError, r"^`weight`: expected a dtype of .*, got int32; cast"),
    # Kernels of transforms and modes would compute these, and `bmm` one sparse operand.
    "mapped-weight-of-one": (
        mapped(weight=W[:1], bias=B[:1]),
        ValueError,
        r"^`x`: expected shape .* = \(\.\.\., 1, 8\)",
    ),
    "mapped-bias-mixed": (mapped(bias=B.double()), TypeError, r"^`bias`: expected the dtype of `weight`, float32, got"),
    "mapped-bias-integer": (mapped(bias=B.int()), TypeError, r"^`bias`: expected a dtype of .*, got int32; cast it"),
    "mode-weight-of-one": (
        within(Spelled, weight=W[:1], bias=B[:1]),
        ValueError,
        r"^`x`: expected shape .* 1, 8\), got",
    ),
    "fake-mode-sparse": (
        within(FakeTensorMode, x=X.to_sparse()),
        TypeError,
        r"^`x`: expected a dense tensor, got layout",
    ),
    "weight-sparse-of-many-rows": (
        call(torch.zeros(70, 4, 8), W.to_sparse(), None),
        TypeError,
        r"^`weight`: expected a dense tensor, got layout torch\.sparse_coo; call to_dense first\.$",
    ),
    "bias-bool": (call(bias=B.bool()), TypeError, r"^`bias`: expected a dtype of .*, got bool;"),
    "x-dtype-mixed": (
        call(x=X.double()),
        TypeError,
        r"^`x`: expected the dtype of `weight`, float32, got float64; cast one of them, or use torch.autocast\.$",
    ),
    "bias-dtype-mixed": (
        call(bias=B.half()),
        TypeError,
        r"^`bias`: expected the dtype of `weight`, float32, got float16;",
    ),
    "x-scalar": (call(x=torch.tensor(1.0)), ValueError, r"^`x`: expected shape \(\.\.\., n, in\) = .*, got \(\);"),
    "x-vector": (
        call(x=X[0, 0]),
        ValueError,
        r"= \(\.\.\., 4, 8\), got \(8,\); pass n = 4 partitions on axis -2, or partition_axis=None",
    ),
    "x-wrong-n": (
        call(x=torch.zeros(5, 3, 8)),
        ValueError,
        r"^`x`: expected shape \(\.\.\., n, in\) = \(\.\.\., 4, 8\), got \(5, 3, 8\);",
    ),
    "x-wrong-in": (
        call(x=torch.zeros(5, 4, 7)),
        ValueError,
        r"= \(\.\.\., 4, 8\), got \(5, 4, 7\); give sizes per partition",
    ),
    "x-size-1-partition-axis": (
        call(x=torch.zeros(5, 1, 8)),
        ValueError,
        r"got \(5, 1, 8\); an axis of size one is not broadcast, drop it and pass partition_axis=None",
    ),
    "x-size-1-in": (call(x=torch.zeros(5, 4, 1)), ValueError, r"= \(\.\.\., 4, 8\), got \(5, 4, 1\);"),
    "x-axes-swapped": (
        call(x=X.mT),
        ValueError,
        r"got \(5, 8, 4\); for features before partitions pass in_axis=-2 and partition_axis=-1",
    ),
    "x-flat": (
        call(x=X.flatten(-2)),
        ValueError,
        r"got \(5, 32\); for flat features \(\.\.\., n\*in\) pass partition_axis=-1",
    ),
    "x-does-not-divide": (call(x=torch.zeros(5, 33)), ValueError, r"\(5, 33\); its last axis is no multiple of n = 4"),
    "x-partition-major": (call(x=torch.zeros(4, 5, 8)), ValueError, r"\(4, 5, 8\); .* pass partition_axis=0"),
    "weight-2d": (
        call(weight=W[0]),
        ValueError,
        r"^`weight`: expected shape \(n, in, out\) with positive sizes, got \(8, 6\);",
    ),
    "weight-4d": (call(weight=W[None]), ValueError, r"^`weight`: expected shape .*, got \(1, 4, 8, 6\);"),
    "weight-zero-out": (call(weight=W[..., :0]), ValueError, r"^`weight`: .* positive sizes, got \(4, 8, 0\);"),
    "weight-zero-n": (call(weight=W[:0]), ValueError, r"^`weight`: .* positive sizes, got \(0, 8, 6\);"),
    "bias-1d": (call(bias=B[0]), ValueError, r"^`bias`: expected shape \(n, out\) = \(4, 6\), got \(6,\);"),
    "bias-3d": (call(bias=B[None]), ValueError, r"^`bias`: expected shape .* = \(4, 6\), got \(1, 4, 6\);"),
    "bias-size-1-partition-axis": (call(bias=B[:1]), ValueError, r"= \(4, 6\), got \(1, 6\); pass one vector per"),
    "bias-wrong-out": (call(bias=B[:, :5]), ValueError, r"= \(4, 6\), got \(4, 5\);"),
    "x-elsewhere": (
        call(x=X.to("meta")),
        ValueError,
        r"^`x`: expected the device of `weight`, cpu, got meta; move one of them\.$",
    ),
    "bias-elsewhere": (
        call(bias=B.to("meta")),
        ValueError,
        r"^`bias`: expected the device of `weight`, cpu, got meta;",
    ),
    "unknown-name": (
        call(implementation="bmm"),
        ValueError,
        r"^`implementation`: expected one of 'auto', 'loop', 'masked', 'einsum', 'vmap', 'matmul', 'grouped_conv', "
        r"'grouped_matmul', 'fused', got 'bmm'; choose one of these\.$",
    ),
    "name-no-string": (call(implementation=["loop"]), TypeError, r"^`implementation`: expected a name, got a list;"),
    "unsupported-dtype-of-grouped_matmul": (
        call(x=X.double(), weight=W.double(), bias=None, implementation="grouped_matmul"),
        UnsupportedImplementationError,
        r"^`implementation`: 'grouped_matmul' supports bfloat16, float16, float32, got float64; choose another one\.$",
    ),
    "unsupported-size-of-grouped_matmul": (
        call(bias=None, implementation="grouped_matmul"),
        UnsupportedImplementationError,
        r"^`implementation`: 'grouped_matmul' needs rows of a multiple of 16 bytes, got out_features=6 in float32, "
        r"24 bytes;",
    ),
}


def linears(**changed):
    options = {"in_features": 4, "out_features": 5, **changed}
    return [nn.Linear(4, 5), nn.Linear(**options)]


def frozen():
    pair = linears()
    pair[1].weight.requires_grad_(False)
    return pair


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    pair = linears()
    pair[1].register_forward_hook(lambda module, arguments, output: 2 * output)
    return pair


def pruned():
    pair = linears()
    prune.l1_unstructured(pair[0], "weight", amount=0.5)
    return pair


def classically_normalised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in many models
        return [nn.utils.weight_norm(nn.Linear(4, 5))]


def normalised():
    return [nn.utils.parametrizations.weight_norm(linear) for linear in linears()]


def with_bias(bias, kind=PartitionedLinear):
    layer = kind(3, 4, 5)
    layer.bias = nn.Parameter(bias)
    return layer


def swap_storage(view):
    view.data = torch.ones_like(view)


def shared():
    linear = nn.Linear(4, 5)
    return [linear, linear]


def biased(bias):
    pair = linears()
    pair[1].bias = nn.Parameter(bias)
    return pair


def hooked_backward():
    pair = linears()
    pair[1].register_full_backward_hook(lambda module, inputs, outputs: None)
    return pair


LAYER = {
    "n-2**63": (
        lambda: PartitionedLinear(2**63, 4, 5),
        ValueError,
        r"^`num_partitions`: expected sizes whose weight has fewer than 2\*\*60 elements, got 9223372036854775808;",
    ),
    "in-5,000-digits": (
        lambda: MaskedPartitionedLinear(3, 10**5000, 5),
        ValueError,
        r"^`in_features`: expected sizes whose weight has .* elements, got an int that cannot be shown; give sizes",
    ),
    "out-beyond-memory": (
        lambda: PartitionedLinear(3, 4, 2**50),
        MemoryError,
        r"^`num_partitions`: expected sizes that fit into memory, got a parameter of shape \(3, 4, 1125899906842624\)",
    ),
    "dtype-list": (
        lambda: PartitionedLinear(3, 4, 5, dtype=[]),
        TypeError,
        r"^`dtype`: expected .*, got \[\]; pass a fl",
    ),
    "device-absent": (
        lambda: PartitionedLinear(3, 4, 5, device="cuda:99"),
        ValueError,
        r"^`device`: expected a device that this PyTorch can use, got 'cuda:99' \(.*\); choose another one\.$",
    ),
    "device-unknown": (
        lambda: MaskedPartitionedLinear(3, 4, 5, device="gpu"),
        ValueError,
        r"^`device`: expected a device that this PyTorch can use, got 'gpu' \(",
    ),
    "device-list": (
        lambda: PartitionedLinear(3, 4, 5, device=[]),
        TypeError,
        r"^`device`: expected a torch\.device, a n",
    ),
    "init-swaps-storage": (
        lambda: PartitionedLinear(3, 4, 5, init=swap_storage),
        TypeError,
        r"^`weight_init`: expected a function that fills its argument of shape \(5, 4\) in place, got one that puts",
    ),
    "init-fills-nothing": (
        lambda: PartitionedLinear(3, 4, 5, init=(nn.init.ones_, lambda view: None)),
        ValueError,
        r"^`bias_init`: expected a function that fills the whole of one partition's tensor of shape \(5,\), got one",
    ),
    "masked-bias-broadcast": (
        lambda: with_bias(torch.zeros(1), MaskedPartitionedLinear)(torch.zeros(2, 3, 4)),
        ValueError,
        r"^`bias`: expected shape \(n\*out,\) = \(15,\), got \(1,\);",
    ),
    "to-linears-bias-broadcast": (
        lambda: with_bias(torch.zeros(3, 1)).to_linears(),
        ValueError,
        r"^`layer\.bias`: expected shape \(3, 5\), got \(3, 1\);",
    ),
    "to-linears-bias-rounded": (
        lambda: with_bias(torch.zeros(3, 5, dtype=torch.float64)).to_linears(),
        TypeError,
        r"^`layer\.bias`: expected the dtype of `weight`, torch\.float32, got torch\.float64;",
    ),
    "to-linears-parametrised": (
        lambda: nn.utils.parametrizations.weight_norm(PartitionedLinear(3, 4, 5)).to_linears(),
        TypeError,
        r"^`layer`: expected a layer without parametrizations, hooks or further parameters, got a Param",
    ),
    "reset-parametrised": (
        lambda: nn.utils.parametrizations.weight_norm(PartitionedLinear(3, 4, 5)).reset_parameters(),
        ValueError,
        r"^`layer`: expected a parameter `weight`, got a tensor that is computed from others;",
    ),
    "linears-bias-rounded": (
        lambda: PartitionedLinear.from_linears(biased(torch.zeros(5, dtype=torch.float64))),
        TypeError,
        r"^`linears\[1\]\.bias`: expected the dtype of `weight`, torch\.float32, got torch\.float64; cast one",
    ),
    "linears-bias-broadcast": (
        lambda: MaskedPartitionedLinear.from_linears(biased(torch.zeros(1))),
        ValueError,
        r"^`linears\[1\]\.bias`: expected shape \(out,\) = \(5,\), got \(1,\); give it one value for each output\.$",
    ),
    "linears-bias-elsewhere": (
        lambda: PartitionedLinear.from_linears(biased(torch.zeros(5, device="meta"))),
        ValueError,
        r"^`linears\[1\]\.bias`: expected the device of `weight`, cpu, got meta; move one of them\.$",
    ),
    "linears-shared": (
        lambda: PartitionedLinear.from_linears(shared()),
        ValueError,
        r"^`linears\[1\]`: expected parameters of its own, got the weight of linears\[0\] as its weight; use",
    ),
    "linears-hooked-backward": (
        lambda: PartitionedLinear.from_linears(hooked_backward()),
        TypeError,
        r"^`linears\[1\]`: expected an nn\.Linear without parametrizations, hooks or .*, got a Linear;",
    ),
    "zero-n": (lambda: PartitionedLinear(0, 4, 5), ValueError, r"^`num_partitions`: expected a positive int, got 0;"),
    "negative-in": (
        lambda: PartitionedLinear(3, -4, 5),
        ValueError,
        r"^`in_features`: expected a positive int, got -4",
    ),
    "zero-out": (lambda: MaskedPartitionedLinear(3, 4, 0), ValueError, r"^`out_features`: expected a positive int"),
    "float-in": (lambda: PartitionedLinear(3, 4.0, 5), TypeError, r"^`in_features`: .*, got 4\.0 of type float; pass"),
    "bool-n": (lambda: PartitionedLinear(True, 4, 5), TypeError, r"^`num_partitions`: .*, got True of type bool;"),
    "string-out": (lambda: MaskedPartitionedLinear(3, 4, "5"), TypeError, r"^`out_features`: .*, got '5' of type str;"),
    "bias-number": (lambda: PartitionedLinear(3, 4, 5, 1), TypeError, r"^`bias`: expected True or False, got an int;"),
    "unknown-implementation": (
        lambda: PartitionedLinear(3, 4, 5, implementation="fast"),
        ValueError,
        r"^`implementation`: expected one of 'auto', 'loop', .*, got 'fast';",
    ),
    "unknown-init": (
        lambda: PartitionedLinear(3, 4, 5, init="xavier"),
        ValueError,
        r"^`init`: expected one of 'torch', 'flax', got 'xavier'; choose one or pass a function\.$",
    ),
    "init-number": (lambda: PartitionedLinear(3, 4, 5, init=0.1), TypeError, r"^`init`: expected a name, a function"),
    "init-triple": (
        lambda: MaskedPartitionedLinear(3, 4, 5, init=(nn.init.ones_,) * 3),
        TypeError,
        r"^`init`: expected a name, a function or a pair",
    ),
    "init-not-in-place": (
        lambda: PartitionedLinear(3, 4, 5, init=lambda view: torch.ones_like(view)),
        TypeError,
        r"^`weight_init`: expected a function that fills its argument of shape \(5, 4\) in place,",
    ),
    "init-bias-raises": (
        lambda: PartitionedLinear(3, 4, 5, init=(nn.init.xavier_uniform_,) * 2),
        ValueError,
        r"^`bias_init`: expected a function that fills one partition's tensor of shape \(5,\), got an error from it",
    ),
    "init-shape": (
        lambda: PartitionedLinear(3, 4, 5, init=lambda view: view.copy_(torch.ones(3, 3))),
        ValueError,
        r"^`weight_init`: expected a function that fills one partition's tensor of shape \(5, 4\), got an error",
    ),
    "dtype-integer": (
        lambda: PartitionedLinear(3, 4, 5, dtype=torch.int64),
        TypeError,
        r"^`dtype`: expected one of float64, .*, got torch\.int64; pass a floating torch\.dtype\.$",
    ),
    "dtype-string": (lambda: PartitionedLinear(3, 4, 5, dtype="float32"), TypeError, r"^`dtype`: .*, got 'float32';"),
    "forward-shape": (lambda: PartitionedLinear(4, 8, 6)(X.mT), ValueError, r"= \(\.\.\., 4, 8\), got \(5, 8, 4\);"),
    "forward-dtype": (lambda: PartitionedLinear(4, 8, 6)(X.half()), TypeError, r"^`x`: expected the dtype of `weight`"),
    "masked-shape": (
        lambda: MaskedPartitionedLinear(4, 8, 6)(torch.zeros(5, 31)),
        ValueError,
        r"^`x`: expected shape \(\.\.\., n, in\) = \(\.\.\., 4, 8\) or \(\.\.\., n\*in\) = \(\.\.\., 32\), got "
        r"\(5, 31\); reshape it\.$",
    ),
    "masked-broadcast": (lambda: MaskedPartitionedLinear(4, 8, 6)(X[:, :1]), ValueError, r"got \(5, 1, 8\); reshape"),
    "masked-scalar": (lambda: MaskedPartitionedLinear(4, 8, 6)(torch.tensor(0.0)), ValueError, r"got \(\); reshape it"),
    "masked-dtype": (lambda: MaskedPartitionedLinear(4, 8, 6)(X.double()), TypeError, r"^`x`: expected the dtype of"),
    "masked-device": (lambda: MaskedPartitionedLinear(4, 8, 6)(X.to("meta")), ValueError, r"^`x`: .* cpu, got meta;"),
    "masked-no-tensor": (lambda: MaskedPartitionedLinear(4, 8, 6)([1.0]), TypeError, r"^`x`: .*, got a list;"),
    "linears-none": (
        lambda: PartitionedLinear.from_linears([]),
        ValueError,
        r"^`linears`: expected at least one nn\.Linear, got none;",
    ),
    "linears-single": (
        lambda: PartitionedLinear.from_linears(nn.Linear(4, 5)),
        TypeError,
        r"^`linears`: expected a sequence of nn\.Linear, got a Linear;",
    ),
    "linears-kind": (
        lambda: MaskedPartitionedLinear.from_linears([nn.Linear(4, 5), nn.Conv1d(4, 5, 1)]),
        TypeError,
        r"^`linears\[1\]`: expected an nn\.Linear without parametrizations, .*, got a Conv1d;",
    ),
    "linears-own-forward": (
        lambda: PartitionedLinear.from_linears([nn.Linear(4, 5), ScaledLinear(4, 5)]),
        TypeError,
        r"^`linears\[1\]`: expected an nn\.Linear without .* a forward of its own, got a ScaledLinear;",
    ),
    "linears-hooked": (
        lambda: PartitionedLinear.from_linears(hooked()),
        TypeError,
        r"^`linears\[1\]`: expected an nn\.Linear without parametrizations, hooks or .*, got a Linear;",
    ),
    "linears-pruned": (
        lambda: MaskedPartitionedLinear.from_linears(pruned()),
        TypeError,
        r"^`linears\[0\]`: expected an nn\.Linear without parametrizations, hooks or .*, got a Linear;",
    ),
    "linears-weight-norm": (
        lambda: PartitionedLinear.from_linears(classically_normalised()),
        TypeError,
        r"^`linears\[0\]`: expected an nn\.Linear without parametrizations, hooks or .*, got a Linear;",
    ),
    "linears-parametrised": (
        lambda: PartitionedLinear.from_linears(normalised()),
        TypeError,
        r"^`linears\[0\]`: expected an nn\.Linear without parametrizations, .*, got a ParametrizedLinear;",
    ),
    "linears-in": (
        lambda: MaskedPartitionedLinear.from_linears(linears(in_features=3)),
        ValueError,
        r"^`linears\[1\]`: expected in_features=4 as in linears\[0\], got 3; build a PartitionedLinear",
    ),
    "linears-out": (
        lambda: MaskedPartitionedLinear.from_linears(linears(out_features=6)),
        ValueError,
        r"^`linears\[1\]`: expected out_features=5 as in linears\[0\], got 6;",
    ),
    "linears-bias": (
        lambda: PartitionedLinear.from_linears(linears(bias=False)),
        ValueError,
        r"^`linears\[1\]`: expected bias=True as in linears\[0\], got False;",
    ),
    "linears-dtype": (
        lambda: PartitionedLinear.from_linears(linears(dtype=torch.float64)),
        TypeError,
        r"^`linears\[1\]`: expected dtype=torch\.float32 as in linears\[0\], got torch\.float64;",
    ),
    "linears-device": (
        lambda: PartitionedLinear.from_linears(linears(device="meta")),
        ValueError,
        r"^`linears\[1\]`: expected device=cpu as in linears\[0\], got meta;",
    ),
    "linears-frozen": (
        lambda: PartitionedLinear.from_linears(frozen()),
        ValueError,
        r"^`linears\[1\]`: expected requires_grad=",
    ),
}

STATE = nn.ModuleList(linears()).state_dict()


def without(key):
    return {name: value for name, value in STATE.items() if name != key}


def freed():
    layer = PartitionedLinear(3, 4, 5)
    layer.weight.untyped_storage().resize_(0)
    return layer


MASKED = {"weight": np.ma.masked_array(np.zeros((3, 4, 5), np.float32)), "bias": np.zeros((3, 5), np.float32)}

PARAMETERS = {
    "export-freed": (
        lambda: export_parameters(freed()),
        ValueError,
        r"^`layer\.weight`: expected a tensor with values, got one whose storage was freed;",
    ),
    "export-complex": (
        lambda: export_parameters(with_bias(torch.zeros(3, 5, dtype=torch.complex64))),
        TypeError,
        r"^`layer\.bias`: expected a dtype of float64, .*, got complex64;",
    ),
    "import-masked": (
        lambda: import_parameters(PartitionedLinear(3, 4, 5), MASKED),
        TypeError,
        r"^`arrays\['weight'\]`: expected a NumPy array without a mask, got a MaskedArray; the layer is unchanged,",
    ),
    "import-parametrised": (
        lambda: import_parameters(nn.utils.parametrizations.weight_norm(PartitionedLinear(3, 4, 5)), {}),
        ValueError,
        r"^`layer`: expected a parameter `weight`, got a tensor that is computed from others; remove its",
    ),
    "import-class": (
        lambda: import_parameters(PartitionedLinear, {}),
        TypeError,
        r"^`layer`: expected a PartitionedLinear or MaskedPartitionedLinear, got a type;",
    ),
    "save-empty-path": (
        lambda: save_parameters(PartitionedLinear(3, 4, 5), ""),
        ValueError,
        r"^`path`: expected the name of a file, got ''; pass another name\.$",
    ),
    "load-nul-path": (
        lambda: load_parameters(PartitionedLinear(3, 4, 5), "a\0b"),
        ValueError,
        r"^`path`: expected the name of a file, got 'a\\x00b'; pass another name\.$",
    ),
    "state-number-key": (
        lambda: state_dict_from_linears({0: W}),
        TypeError,
        r"^`state_dict`: expected keys that are strings, got 0 of type int; pass the",
    ),
    "state-long-number": (
        lambda: state_dict_from_linears({"9" * 5000 + ".weight": W}),
        ValueError,
        r"^`state_dict`: expected keys <k>\.weight and <k>\.bias only, got '9+\.\.\.; pass",
    ),
    "state-bias-elsewhere": (
        lambda: state_dict_from_linears({**STATE, "1.bias": STATE["1.bias"].to("meta")}),
        ValueError,
        r"^`state_dict\['1\.bias'\]`: expected the device of `weight`, cpu, got meta;",
    ),
    "export-meta": (
        lambda: export_parameters(PartitionedLinear(3, 4, 5, device="meta")),
        ValueError,
        r"^`layer`: expected values in `weight`, got the meta device;",
    ),
    "export-linear": (
        lambda: export_parameters(nn.Linear(4, 5)),
        TypeError,
        r"^`layer`: expected a PartitionedLinear or MaskedPartitionedLinear, got a Linear; pass the layer itself,",
    ),
    "import-foreign": (
        lambda: import_parameters({"weight": W}, {}),
        TypeError,
        r"^`layer`: expected a PartitionedLinear or MaskedPartitionedLinear, got a dict;",
    ),
    "export-namesake": (
        lambda: export_parameters(type("PartitionedLinear", (), {"__module__": "jax_impl.layer"})()),
        TypeError,
        r"^`layer`: expected a PartitionedLinear or MaskedPartitionedLinear, got a jax_impl.PartitionedLinear;",
    ),
    "load-directory": (
        lambda: load_parameters(PartitionedLinear(3, 4, 5), "/"),
        IsADirectoryError,
        r"`path`: expected a readable file, got '/' \(Is a directory\); check the name",
    ),
    "load-missing": (
        lambda: load_parameters(PartitionedLinear(3, 4, 5), "/nowhere/at-all"),
        FileNotFoundError,
        r"`path`: expected a readable file, got '/nowhere/at-all' \(No such file or directory\); check the name",
    ),
    "load-no-path": (
        lambda: load_parameters(PartitionedLinear(3, 4, 5), None),
        TypeError,
        r"^`path`: expected a str or a Path, got a NoneType; pass the file's name\.$",
    ),
    "save-no-path": (
        lambda: save_parameters(PartitionedLinear(3, 4, 5), 3),
        TypeError,
        r"^`path`: expected a str or a Path, got an int; pass the file's name\.$",
    ),
    "save-no-folder": (
        lambda: save_parameters(PartitionedLinear(3, 4, 5), "missing-folder/layer.safetensors"),
        FileNotFoundError,
        r"^`path`: expected a file in an existing folder, got missing-folder/.*; create the folder first\.$",
    ),
    "import-list": (
        lambda: import_parameters(PartitionedLinear(3, 4, 5), [np.zeros(1)]),
        TypeError,
        r"^`arrays`: expected a mapping of names to NumPy arrays, got a list;",
    ),
    "state-empty": (
        lambda: state_dict_from_linears({}),
        ValueError,
        r"^`state_dict`: expected linears 0 to n - 1 under the prefix '', got \[\];",
    ),
    "state-prefix": (
        lambda: state_dict_from_linears(STATE, "heads."),
        ValueError,
        r"under the prefix 'heads\.', got \[\]; pass a complete state_dict\.$",
    ),
    "state-gap": (
        lambda: state_dict_from_linears({**STATE, "3.weight": STATE["0.weight"], "3.bias": STATE["0.bias"]}),
        ValueError,
        r"^`state_dict`: expected linears 0 to n - 1 .*, got \[0, 1, 3\];",
    ),
    "state-foreign-key": (
        lambda: state_dict_from_linears({**STATE, "norm.weight": STATE["0.bias"]}),
        ValueError,
        r"^`state_dict`: expected keys <k>\.weight and <k>\.bias only, got 'norm\.weight';",
    ),
    "state-leading-zero": (
        lambda: state_dict_from_linears({"00.weight": STATE["0.weight"]}),
        ValueError,
        r"^`state_dict`: expected keys .* only, got '00\.weight';",
    ),
    "state-bias-missing": (
        lambda: state_dict_from_linears(without("1.bias")),
        ValueError,
        r"a bias in all or none, got \['weight'\] for linear 1;",
    ),
    "state-weight-missing": (
        lambda: state_dict_from_linears(without("0.weight")),
        ValueError,
        r"expected a weight in every linear .*, got \['bias'\] for linear 0;",
    ),
    "state-shape": (
        lambda: state_dict_from_linears({**STATE, "1.weight": torch.zeros(5, 3)}),
        ValueError,
        r"^`state_dict\['1\.weight'\]`: expected shape \(out, in\) = \(5, 4\) as in linear 0, got \(5, 3\);",
    ),
    "state-bias-shape": (
        lambda: state_dict_from_linears({**STATE, "0.bias": torch.zeros(4)}),
        ValueError,
        r"^`state_dict\['0\.bias'\]`: expected shape \(out,\) = \(5,\) as in linear 0, got \(4,\);",
    ),
    "state-dtype": (
        lambda: state_dict_from_linears({**STATE, "1.bias": STATE["1.bias"].double()}),
        TypeError,
        r"^`state_dict\['1\.bias'\]`: expected dtype torch\.float32 as in linear 0, got torch\.float64;",
    ),
    "state-no-tensor": (
        lambda: state_dict_from_linears({**STATE, "1.bias": [0.0]}),
        TypeError,
        r"^`state_dict\['1\.bias'\]`: expected a torch\.Tensor, got a list;",
    ),
    "shard-what": (
        lambda: shard_partitions(nn.Linear(4, 5), None),
        TypeError,
        r"^`layer`: expected a PartitionedLinear, got a Linear;",
    ),
    "shard-implementation": (
        lambda: shard_partitions(PartitionedLinear(4, 8, 6, implementation="masked"), None),
        UnsupportedImplementationError,
        r"^`layer`: expected an implementation that shards .*, one of auto, einsum, matmul, got 'masked';",
    ),
    "shard-where": (
        lambda: shard_partitions(PartitionedLinear(4, 8, 6), "cpu"),
        TypeError,
        r"^`device_mesh`: expected a DeviceMesh, got a str;",
    ),
    "shard-vector": (
        lambda: shard_inputs(torch.zeros(4), None),
        ValueError,
        r"^`x`: expected shape \(\.\.\., n, in\), got \(4,\);",
    ),
    "registry-name": (
        lambda: get_implementation("auto"),
        ValueError,
        r"^`implementation`: expected one of 'loop', .*, got 'auto';",
    ),
    "registry-reason-name": (
        lambda: unsupported_reason("bmm", dtype="float32", device="cpu", in_features=1, out_features=1),
        ValueError,
        r"^`implementation`: expected one of 'loop', .*, got 'bmm';",
    ),
}

CALLS = {
    f"{part}-{name}": case
    for part, cases in {"function": FUNCTION, "layer": LAYER, "parameters": PARAMETERS}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize(("bad_call", "error", "message"), CALLS.values(), ids=CALLS)
def test_bad_call_gives_one_clear_sentence(bad_call, error, message):
    with pytest.raises(error, match=message) as raised:
        bad_call()
    text = str(raised.value)
    assert raised.type is error
    assert "\n" not in text
    assert text.endswith(".")


def test_there_are_enough_bad_calls():
    assert len(CALLS) >= 25


def test_unsupported_is_a_value_error():
    assert issubclass(UnsupportedImplementationError, ValueError)


_WITHOUT_CHECKER = """
import re
from parity_tests.tests.test_torch_bad_input import CALLS

for name, (bad_call, error, message) in CALLS.items():
    if "grouped_matmul" in name:  # which some PyTorch lacks; nothing is computed first there
        continue
    try:
        bad_call()
    except error as raised:
        assert re.search(message, str(raised)), (name, str(raised))
    else:
        raise AssertionError(f"{name}: nothing was refused")
"""


def test_the_sentences_do_not_hang_on_the_checker_of_annotations():
    # It stands in every test, and refuses what a kernel would broadcast before the kernel does so.
    done = run_python("-c", _WITHOUT_CHECKER)
    assert done.returncode == 0, done.stderr
