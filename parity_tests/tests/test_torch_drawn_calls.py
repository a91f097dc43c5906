"""Drawn calls of the torch tree: right, or refused in one sentence, with every kind of flaw in every argument.

More of them: `python -m pytest parity_tests/tests/test_torch_drawn_calls.py --drawn-calls 10000`.
"""

import dataclasses
import math
import os
import warnings

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import safetensors.torch
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize, prune

import torch_impl
from parity_tests.frameworks.torch import modes as torch_arrays
from parity_tests.frameworks.torch.modes import lay_out, to_torch
from parity_tests.tests.drawn_calls import Attempt, Entry, Flaw, bits_fault, draw_call, every_kind, judge, product_fault
from parity_tests.tests.flaws import (
    ANYTHING,
    BIAS_SHAPES,
    NO_ARRAYS,
    NO_AXES,
    NO_BIAS,
    NO_FILE,
    NO_IN_AXIS,
    NO_LINEAR_ARRAYS,
    NO_NAME,
    NO_OPERAND,
    NO_PARTITION_AXIS,
    NO_PARTITIONS,
    NO_PATH,
    NO_SIZE,
    NO_SIZES,
    NO_SWITCH,
    SIZES,
    WEIGHT_SHAPES,
    X_SHAPES,
    flaws_of,
    wrong_shapes,
)
from torch_impl import MaskedPartitionedLinear, PartitionedLinear, implementation_names, partitioned_linear
from torch_impl.checkpoints import of_partition
from torch_impl.optimizers import weight_decay_groups
from torch_impl.packing import packing_of
from torch_impl.parameters import state_dict_from_linears
from torch_impl.partitions import for_each_partition_
from torch_impl.registry import unsupported_reason
from torch_impl.sharding import shard_inputs, shard_partitions

CPU = torch.device("cpu")
NAMES = ("auto", *implementation_names())
PACKED_NAMES = ("auto", *implementation_names(unequal=True))

# Flaws of single tensors.


class Unreadable(torch.Tensor):
    """Fails in everything that is asked of it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("no such thing")


def nested(tensor, layout=torch.strided):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prototype
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(2, 3)], layout=layout)


def quantised(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in many models
        return torch.quantize_per_tensor(torch.ones(tensor.shape), 0.1, 0, torch.qint8)


def freed(tensor):
    copied = tensor.detach().clone()
    copied.untyped_storage().resize_(0)
    return copied


def another_float(tensor):
    return tensor.to(torch.float16 if tensor.dtype != torch.float16 else torch.float32)


def inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


def respaced(tensor):
    return torch.stack([tensor, torch.full_like(tensor, math.nan)], -1).flatten(-2)[..., ::2]


NO_TENSOR = {
    "numpy": Flaw(lambda tensor, _: np.ones(tuple(tensor.shape), np.float32)),
    "masked array": Flaw(lambda tensor, _: np.ma.masked_array(np.ones(tuple(tensor.shape), np.float32))),
    "nested": Flaw(lambda tensor, _: nested(tensor)),
    "jagged": Flaw(lambda tensor, _: nested(tensor, torch.jagged)),
    "uninitialised": Flaw(lambda tensor, _: nn.UninitializedParameter()),
    "uninitialised buffer": Flaw(lambda tensor, _: nn.UninitializedBuffer()),
    "quantised": Flaw(lambda tensor, _: quantised(tensor)),
    "sparse": Flaw(lambda tensor, _: tensor.to_sparse() if tensor.numel() else torch.ones(2, 2).to_sparse()),
    "mkldnn": Flaw(lambda tensor, _: torch.ones(2, 3, 4).to_mkldnn()),
    "unreadable": Flaw(lambda tensor, _: tensor.as_subclass(Unreadable)),
    "integers": Flaw(lambda tensor, _: tensor.int()),
    "truths": Flaw(lambda tensor, _: tensor.bool()),
    "complex": Flaw(lambda tensor, _: tensor.to(torch.complex64)),
    "float8": Flaw(lambda tensor, _: tensor.to(torch.float8_e4m3fn)),
    "another float": Flaw(lambda tensor, _: another_float(tensor), relative=True, names=("x", "weight", "bias")),
    "elsewhere": Flaw(lambda tensor, _: tensor.to("meta"), relative=True, names=("x", "weight", "bias")),
    "parameter": Flaw(lambda tensor, _: nn.Parameter(tensor), False),
    "respaced": Flaw(lambda tensor, _: respaced(tensor), False),
    "expanded": Flaw(lambda tensor, _: tensor[..., :1].expand(tensor.shape), False),
    "conjugated": Flaw(
        lambda tensor, _: torch.complex(tensor.float(), tensor.float()).conj().imag.to(tensor.dtype), False
    ),
    "inference": Flaw(lambda tensor, _: inference(tensor), False),
}
# Of a tensor without memory PyTorch itself computes nothing (`freed + 1` ends the process), so that only copies ask.
FREED = {"freed": Flaw(lambda tensor, _: freed(tensor))}
# Beside parameters that need gradients.
KEPT_BY_AUTOGRAD = {"inference": Flaw(lambda tensor, _: inference(tensor), None)}
FLAT_X = NO_OPERAND | NO_TENSOR | wrong_shapes("flat x", X_SHAPES)
X = NO_OPERAND | NO_TENSOR | wrong_shapes("x", X_SHAPES)
WEIGHT = NO_OPERAND | NO_TENSOR | wrong_shapes("weight", WEIGHT_SHAPES)
BIAS = NO_BIAS | NO_TENSOR | wrong_shapes("bias", BIAS_SHAPES)


# What a call returns, and what it must leave alone.


def to_numpy(tensor):
    return torch_arrays.to_numpy(tensor.resolve_neg())


def operands(inputs):
    x = lay_out(to_torch(inputs.x, CPU), inputs.layout)
    return x, to_torch(inputs.weight, CPU), None if inputs.bias is None else to_torch(inputs.bias, CPU)


def output_fault(y, x, weight, bias):
    """The verdict on y by what was passed, which a flaw may have made other but valid operands."""
    if y.is_meta:
        return "" if y.shape == (*x.shape[:-1], weight.shape[-1]) else f"shape {tuple(y.shape)}"
    x, weight, bias = (None if tensor is None else to_numpy(tensor) for tensor in (x, weight, bias))
    cotangent = np.ones((*x.shape[:-1], weight.shape[-1]), x.dtype)
    given = dataclasses.replace(PLAIN, x=x, weight=weight, bias=bias, cotangent=cotangent, dtype=weight.dtype.name)
    return product_fault({"y": to_numpy(y)}, given)


PLAIN = draw_call({"": Entry(lambda call, spoil: None, {})}, 0, 0).inputs


def bits(parameter):
    if parameter.is_meta or nn.parameter.is_lazy(parameter) or parameter.is_nested:
        return b""
    if parameter.untyped_storage().nbytes() == 0:
        return b""
    tensor = parameter.detach().clone(memory_format=torch.contiguous_format).resolve_conj()
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else b"scalar"


def state_of(module):
    if not isinstance(module, nn.Module):
        return None
    return [(name, id(value), value.requires_grad, bits(value)) for name, value in module.named_parameters()]


def reason(call, **kinds):
    case, kinds = call.case, dict(call.flaws)
    if call.implementation == "auto" or "implementation" in kinds:
        return False
    if call.way == "forward mode" and call.implementation == "grouped_matmul":
        return True
    sizes = {"in_features": case.in_features, "out_features": case.out_features}
    return unsupported_reason(call.implementation, dtype=call.dtype, device="cpu", **sizes) is not None


# The function and the layers' calls.


def gradients(function, x, weight, bias, cotangent):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    y = function(*leaves)
    found = torch.autograd.grad(y, leaves, cotangent)
    return dict(zip(("y", "dx", "dweight", "dbias"), map(to_numpy, (y, *found)), strict=False))


def over_leading_axis(function, x, weight, bias):
    if x.ndim < 3 or 0 in x.shape:
        return function(x, weight, bias)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        return torch.vmap(function, in_dims=(0, None, None))(x, weight, bias)


def without_gradients(mode):
    def call(function, *tensors):
        with mode():
            return function(*tensors)

    return call


def forward_mode(function, x, weight, bias):
    return torch.func.jvp(lambda value: function(value, weight, bias), (x,), (torch.ones_like(x),))[0]


WAYS = {
    "eager": lambda function, *tensors: function(*tensors),
    "no gradients": without_gradients(torch.no_grad),
    "inference mode": without_gradients(torch.inference_mode),
    "vmap": over_leading_axis,
    "forward mode": forward_mode,
}


def call_function(call, spoil):
    inputs = call.inputs
    options = {
        "implementation": spoil("implementation", call.implementation),
        "in_axis": spoil("in_axis", -1),
        "partition_axis": spoil("partition_axis", -2),
        "partitions": spoil("partitions", None),
    }
    x, weight, bias = operands(inputs)
    x, weight, bias = spoil("x", x), spoil("weight", weight), None if bias is None else spoil("bias", bias)

    def function(x, weight, bias=None):
        return partitioned_linear(x, weight, bias, **options)

    if call.way == "gradients":
        cotangent = to_torch(inputs.cotangent, CPU)
        return Attempt(
            lambda: gradients(function, x, weight, bias, cotangent),
            lambda found: product_fault(found, inputs),
            unsupported=reason(call),
        )
    return Attempt(
        lambda: WAYS[call.way](function, x, weight, bias),
        lambda y: output_fault(y, x, weight, bias),
        unsupported=reason(call),
    )


def layer_of(call, masked=False, implementation="auto"):
    """A layer that holds the numbers of the call."""
    inputs = call.inputs
    sizes = (call.case.num_partitions, call.case.in_features, call.case.out_features, inputs.bias is not None)
    kind, options = (MaskedPartitionedLinear, {}) if masked else (PartitionedLinear, {"implementation": implementation})
    layer = kind(*sizes, dtype=getattr(torch, call.dtype), **options)
    torch_impl.import_parameters(layer, arrays_of(inputs))
    return layer


def arrays_of(inputs):
    return {"weight": inputs.weight} | ({} if inputs.bias is None else {"bias": inputs.bias})


def call_layer(masked):
    def prepare(call, spoil):
        layer = layer_of(call, masked, call.implementation)
        x, _, _ = operands(call.inputs)
        if masked and call.number % 2 and "x" not in dict(call.flaws):
            x = x.flatten(-2)
        x, layer = spoil("x", x), spoil("layer", layer)
        partitions = () if masked else (spoil("partitions", None),)

        def run():
            return WAYS[call.way](lambda x, *_: layer(x, *partitions), x, None, None)

        def fault(y):
            views = layer.partition_views()
            n, i, o = views["weight"].shape
            flat = masked and x.shape[-1:] == (n * i,)
            features, found = (x.unflatten(-1, (n, i)), y.unflatten(-1, (n, o))) if flat else (x, y)
            return output_fault(found, features, views["weight"], views.get("bias"))

        return Attempt(run, fault, lambda: state_of(layer), not masked and reason(call))

    return prepare


# Layers in an unusual state: how the call must end, by what is asked of the layer.

REFUSED_BY_ALL = {"forward": True, "export": True, "import": True, "reset": True, "linears": True}
TAKEN_BY_ALL = dict.fromkeys(REFUSED_BY_ALL, False)


def set_bias(change):
    def apply(layer):
        if layer.bias is None:
            layer.weight = nn.Parameter(torch.zeros(2, 2))
        else:
            layer.bias = nn.Parameter(change(layer.bias.detach()))

    return apply


def set_weight(change):
    def apply(layer):
        layer.weight = nn.Parameter(change(layer.weight.detach()))

    return apply


class Doubled(nn.Module):
    def forward(self, tensor):
        return tensor * 2


def bias_in_the_weight(layer):
    if layer.bias is None:
        layer.weight = nn.Parameter(torch.zeros(2, 2))
    else:
        memory = torch.zeros(layer.weight.numel() + layer.bias.numel(), dtype=layer.weight.dtype)
        layer.weight = nn.Parameter(memory[: layer.weight.numel()].view(layer.weight.shape))
        layer.bias = nn.Parameter(memory[: layer.bias.numel()].view(layer.bias.shape))


def one_buffer(layer):
    flat = nn.utils.parameters_to_vector(layer.parameters()).detach()
    nn.utils.vector_to_parameters(flat, layer.parameters())


def made_under_inference_mode(layer):
    with torch.inference_mode():
        layer.weight = nn.Parameter(layer.weight.clone())


STATES = {
    "bias of one": (set_bias(lambda bias: bias.flatten()[:1]), REFUSED_BY_ALL),
    "bias of one output": (set_bias(lambda bias: bias[..., :1, None]), REFUSED_BY_ALL),
    "bias of another float": (
        set_bias(another_float),
        {"forward": True, "export": None, "import": True, "reset": None, "linears": True},
    ),
    "bias elsewhere": (set_bias(lambda bias: bias.to("meta")), REFUSED_BY_ALL | {"reset": None}),
    "bias nested": (set_bias(nested), REFUSED_BY_ALL),
    "weight of other sizes": (set_weight(lambda weight: weight.new_zeros(2, 3)), REFUSED_BY_ALL),
    "weight of one": (set_weight(lambda weight: weight.flatten()[:1]), REFUSED_BY_ALL),
    "weight expanded": (
        set_weight(lambda weight: weight.flatten()[:1].expand(weight.shape)),
        TAKEN_BY_ALL | {"import": None, "reset": None},
    ),
    "weight in another order": (
        set_weight(lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1)),
        TAKEN_BY_ALL,
    ),
    "weight freed": (set_weight(freed), REFUSED_BY_ALL),
    "weight uninitialised": (lambda layer: setattr(layer, "weight", nn.UninitializedParameter()), REFUSED_BY_ALL),
    "bias in the weight": (
        bias_in_the_weight,
        {"forward": None, "export": None, "import": True, "reset": True, "linears": None},
    ),
    "one buffer": (one_buffer, TAKEN_BY_ALL),
    "complex": (lambda layer: layer.to(torch.complex64), REFUSED_BY_ALL),
    "meta": (
        lambda layer: layer.to("meta"),
        {"forward": True, "export": True, "import": True, "reset": False, "linears": False},
    ),
    "parametrised": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
        {"forward": False, "export": False, "import": True, "reset": True, "linears": True},
    ),
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        {"forward": False, "export": False, "import": True, "reset": True, "linears": True},
    ),
    "hooked": (
        lambda layer: layer.register_forward_hook(lambda module, arguments, output: output),
        TAKEN_BY_ALL | {"linears": True},
    ),
    "frozen": (lambda layer: layer.requires_grad_(False), TAKEN_BY_ALL),
    "inference": (
        made_under_inference_mode,
        {"forward": None, "export": False, "import": True, "reset": True, "linears": False},
    ),
}


def states(asked):
    def make(change):
        def spoil(layer, _):
            # One that was not built by the constructor under test.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                change(layer)
            return layer

        return spoil

    def verdict(kind, refused):
        def decide(layer, call):
            # With a size of one a broadcast bias is whole, and an expanded weight has nothing to share.
            small = call.case.num_partitions == 1 or call.case.out_features == 1
            if kind.startswith("bias of one") and small and call.case.bias:
                return None
            return refused

        return decide

    names = ("layer", "x", "weight", "bias", "arrays", "state_dict")
    return {
        kind: Flaw(make(change), verdict(kind, verdicts[asked]), names, relative=kind == "meta")
        for kind, (change, verdicts) in STATES.items()
        if asked != "forward" or kind != "weight freed"
    }


class Namesake:
    """Has the name of the layer, and nothing else."""


Namesake.__name__ = "PartitionedLinear"
NO_LAYER = flaws_of(
    ANYTHING
    | {"linear": nn.Linear(2, 3), "namesake": Namesake(), "the class": PartitionedLinear, "tensor": torch.ones(2)}
)


# Constructors and initial values.


def swap_data(view):
    view.data = torch.ones_like(view)


def swap_dtype(view):
    view.data = view.double() if view.dtype != torch.float64 else view.float()


def fill_first(view):
    view.flatten()[0] = 1.0


def fail(view):
    raise KeyError("no such initialiser")


INITS = {
    "raises": fail,
    "raises of several lines": lambda view: view.copy_(torch.ones(7, 7, 7)),
    "another tensor": lambda view: torch.ones_like(view),
    "swaps data": swap_data,
    "swaps storage": lambda view: view.set_(torch.ones_like(view)),
    "swaps dtype": swap_dtype,
    "resizes": lambda view: view.resize_(7, 7).fill_(1.0),
    "fills nothing": lambda view: None,
    "fills another": lambda view: torch.empty_like(view).fill_(1.0) is None,
    "fills in part": lambda view: view.flatten()[:1].zero_() is None if view.numel() > 1 else None,
    "fills with NaN": lambda view: view.fill_(math.nan),
    "no argument": lambda: None,
    "two arguments": lambda view, other: None,
}


def seen(call):
    """On the meta device there is nothing to see of what was filled, and with what."""
    return None if {("layer", "meta"), ("layer", "bias elsewhere"), ("device", "meta")} & set(call.flaws) else True


NO_INIT = (
    flaws_of(
        ANYTHING | {"unknown": "xavier", "class": Namesake, "triple": (nn.init.ones_,) * 3}, names=("weight_init",)
    )
    | {
        kind: Flaw(lambda _, __, function=function: function, lambda _, call: seen(call), ("weight_init",))
        for kind, function in INITS.items()
    }
    | {
        f"bias {kind}": Flaw(
            lambda _, __, function=function: (nn.init.ones_, function),
            lambda _, call: seen(call) if call.case.bias else False,
            ("bias_init",),
        )
        for kind, function in INITS.items()
    }
    | flaws_of({"flax": "flax", "ones": nn.init.ones_, "pair": (nn.init.ones_, nn.init.zeros_)}, False)
)
LARGE = Flaw(
    lambda _, __: 2**50,
    lambda _, call: None if "device" in dict(call.flaws) else True,
    ("num_partitions", "in_features", "out_features"),
)
SIZE = NO_SIZE | {"2**50": LARGE}
NO_DTYPE = flaws_of(
    {kind: value for kind, value in ANYTHING.items() if kind != "none"}
    | {"integer": torch.int32, "complex": torch.complex64, "float8": torch.float8_e4m3fn, "quantised": torch.qint8}
    | {"name": "float32", "numpy": np.float32, "numpy dtype": np.dtype(np.float32), "type": float, "pair": ("f4", -1)}
)
NO_DEVICE = (
    flaws_of({kind: value for kind, value in ANYTHING.items() if kind != "none"})
    | flaws_of({"nothing": "", "unknown": "gpu", "capitals": "CPU", "negative": -1, "2**70": 2**70, "truth": True})
    | flaws_of({"minus": "cuda:-1", "missing backend": "privateuseone", "lazy": "lazy", "old": "mkldnn", "hip": "hip"})
    | {
        f"cuda{name}": Flaw(
            lambda _, __, name=name: torch.device(f"cuda{name}") if name else "cuda",
            lambda _, __, name=name: torch.cuda.device_count() <= (int(name[1:]) if name else 0),
        )
        for name in ("", ":99")
    }
    | flaws_of({"meta": "meta", "cpu": "cpu", "cpu:0": torch.device("cpu", 0)}, False)
)


# Before there is an x, any number may be one of an axis.
ANY_PARTITION_AXIS = {
    kind: dataclasses.replace(flaw, refused=False) if flaw.names else flaw for kind, flaw in NO_PARTITION_AXIS.items()
}


def construct(masked):
    def prepare(call, spoil):
        case = call.case
        sizes = (
            spoil("num_partitions", case.num_partitions),
            spoil("in_features", case.in_features),
            spoil("out_features", case.out_features),
        )
        bias, init = spoil("bias", case.bias), spoil("init", "torch")
        options = {"dtype": spoil("dtype", getattr(torch, call.dtype)), "device": spoil("device", "cpu"), "init": init}
        if not masked:
            options["implementation"] = spoil("implementation", call.implementation)
            options["in_axis"] = spoil("in_axis", -1)
            options["partition_axis"] = spoil("partition_axis", -2)

        def fault(layer):
            weight = layer.partition_views()["weight"]
            if tuple(weight.shape) != sizes or weight.dtype != options["dtype"]:
                return f"expected shape {sizes} and dtype {options['dtype']}, got {weight.shape} and {weight.dtype}"
            if not all(parameter.is_meta or parameter.isfinite().all() for parameter in layer.parameters()):
                return "expected finite parameters"
            ones = "ones" in dict(call.flaws).values() and not weight.is_meta
            return "expected ones" if ones and not (weight == 1).all() else ""

        kind = MaskedPartitionedLinear if masked else PartitionedLinear
        return Attempt(lambda: kind(*sizes, bias, **options), fault)

    return prepare


CONSTRUCTOR = {
    "num_partitions": SIZE,
    "in_features": SIZE,
    "out_features": SIZE,
    "bias": NO_SWITCH,
    "init": NO_INIT,
    "dtype": NO_DTYPE,
    "device": NO_DEVICE,
}


def reset(call, spoil):
    layer = spoil("layer", layer_of(call, masked=call.number % 2 == 1))
    layer.init = spoil("init", "torch")

    def fault(_):
        wrong = [name for name, value in layer.named_parameters() if not (value.is_meta or value.isfinite().all())]
        return f"expected finite values in {wrong}" if wrong else ""

    return Attempt(layer.reset_parameters, fault, lambda: state_of(layer))


# Parameters in and out.


def import_arrays(call, spoil):
    layer, arrays = layer_of(call, masked=call.number % 2 == 1), arrays_of(call.inputs)
    torch_impl.import_parameters(layer, {name: np.zeros_like(array) for name, array in arrays.items()})
    layer, arrays, axes = spoil("layer", layer), spoil("arrays", arrays), spoil("axes", None)
    return Attempt(
        lambda: torch_impl.import_parameters(layer, arrays, axes=axes),
        lambda _: bits_fault(
            torch_impl.export_parameters(layer, axes=axes), {k: np.asarray(v) for k, v in arrays.items()}
        ),
        lambda: state_of(layer),
    )


def export_arrays(call, spoil):
    layer = spoil("layer", layer_of(call, masked=call.number % 2 == 1))
    return Attempt(
        lambda: torch_impl.export_parameters(layer),
        lambda found: bits_fault(found, {name: to_numpy(view) for name, view in layer.partition_views().items()}),
        lambda: state_of(layer),
    )


def saving(folder):
    def prepare(call, spoil):
        layer = spoil("layer", layer_of(call, masked=call.number % 2 == 1))
        path = spoil("path", str(folder / f"{call.seed}-{call.number}.safetensors"))

        def fault(_):
            written = {name: to_numpy(tensor) for name, tensor in safetensors.torch.load_file(path).items()}
            os.unlink(path)
            return bits_fault(written, torch_impl.export_parameters(layer))

        return Attempt(
            lambda: torch_impl.save_parameters(layer, path),
            fault,
            lambda: (sorted(os.listdir(folder)), state_of(layer)),
        )

    return prepare


def loading(folder):
    def prepare(call, spoil):
        arrays = arrays_of(call.inputs)
        layer = layer_of(call, masked=call.number % 2 == 1)
        path = folder / "loaded"
        torch_impl.save_parameters(layer, path)
        layer.reset_parameters()
        layer, path = spoil("layer", layer), spoil("path", str(path))
        return Attempt(
            lambda: torch_impl.load_parameters(layer, path),
            lambda _: bits_fault(torch_impl.export_parameters(layer), arrays),
            lambda: state_of(layer),
        )

    return prepare


# Lists of nn.Linear.


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class CallingLinear(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class ComputingLinear(nn.Linear):
    weight = property(lambda self: 2 * self._parameters["weight"])


def as_class(kind):
    def change(linear):
        linear.__class__ = kind
        return linear

    return change


def touched(change):
    def apply(linear):
        change(linear)
        return linear

    return apply


def with_bias(change):
    def apply(linear):
        bias = linear.weight.detach()[:, 0] if linear.bias is None else linear.bias.detach()
        linear.bias = nn.Parameter(change(bias))
        return linear

    return apply


def with_weight(change):
    return touched(lambda linear: setattr(linear, "weight", nn.Parameter(change(linear.weight.detach()))))


def plain_weight(linear):
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight


def instance_forward(linear):
    linear.forward = lambda x: x


def tuple_hook(*arguments):
    return None


LAST_LINEAR = {
    "none": (lambda linear: None, True),
    "text": (lambda linear: "linear", True),
    "class": (lambda linear: nn.Linear, True),
    "convolution": (lambda linear: nn.Conv1d(2, 3, 1), True),
    "bilinear": (lambda linear: nn.Bilinear(2, 2, 3), True),
    "tensor": (lambda linear: linear.weight, True),
    "quantised": (lambda linear: torch.ao.nn.quantized.dynamic.Linear(4, 5), True),
    "lazy": (lambda linear: nn.LazyLinear(5), True),
    "own forward": (as_class(ScaledLinear), True),
    "own call": (as_class(CallingLinear), True),
    "own weight": (as_class(ComputingLinear), True),
    "forward of the instance": (touched(instance_forward), True),
    "forward hook": (touched(lambda linear: linear.register_forward_hook(tuple_hook)), True),
    "forward pre-hook": (touched(lambda linear: linear.register_forward_pre_hook(tuple_hook)), True),
    "backward hook": (touched(lambda linear: linear.register_full_backward_hook(tuple_hook)), True),
    "backward pre-hook": (touched(lambda linear: linear.register_full_backward_pre_hook(tuple_hook)), True),
    "gradient hook": (touched(lambda linear: linear.weight.register_hook(tuple_hook)), True),
    "weight norm": (nn.utils.parametrizations.weight_norm, True),
    "old weight norm": (nn.utils.weight_norm, True),
    "spectral norm": (nn.utils.parametrizations.spectral_norm, True),
    "pruned": (touched(lambda linear: prune.random_unstructured(linear, "weight", 0.5)), True),
    "weight of no parameter": (touched(plain_weight), True),
    "further parameter": (touched(lambda linear: linear.register_parameter("gain", nn.Parameter(torch.ones(1)))), True),
    "bias of another float": (with_bias(another_float), True),
    "bias of no axes": (with_bias(lambda bias: bias[0]), True),
    "bias elsewhere": (with_bias(lambda bias: bias.to("meta")), True),
    "bias sparse": (with_bias(lambda bias: bias.to_sparse()), True),
    "weight of three axes": (with_weight(lambda weight: weight[None]), True),
    "weight of one axis": (with_weight(lambda weight: weight[0]), True),
    "weight without rows": (with_weight(lambda weight: weight[:0]), True),
    "weight nested": (with_weight(nested), True),
    "weight freed": (with_weight(freed), True),
    "complex": (lambda linear: linear.to(torch.complex64), True),
    "another float": (lambda linear: linear.to(another_float(linear.weight).dtype), None),
    "elsewhere": (lambda linear: linear.to("meta"), None),
    "frozen": (lambda linear: linear.requires_grad_(False), None),
    "weight frozen": (touched(lambda linear: linear.weight.requires_grad_(False)), None),
    "weight expanded": (with_weight(lambda weight: weight[:1, :1].expand(weight.shape)), False),
    "weight in another order": (with_weight(lambda weight: weight.T.contiguous().T), False),
    "NaN": (with_weight(lambda weight: torch.full_like(weight, math.nan)), False),
}


def replaced_last(change):
    def make(linears, _):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are deprecated, and still in many models
            return [*linears[:-1], change(linears[-1])]

    return make


def unlike_the_first(linears, _):
    return True if len(linears) > 1 else None


def shared(linears, _):
    return [*linears[:-1], linears[0]]


def tied(linears, _):
    linears[-1].weight = linears[0].weight
    return linears


def one_memory(linears, _):
    linears[-1].weight = nn.Parameter(linears[0].weight.detach())
    return linears


NO_LINEARS = (
    flaws_of(
        ANYTHING | {"one": nn.Linear(2, 3), "sequential": nn.Sequential(nn.Linear(2, 3)), "set": {nn.Linear(2, 3)}}
    )
    | {
        kind: Flaw(replaced_last(change), refused if refused is not None else unlike_the_first)
        for kind, (change, refused) in LAST_LINEAR.items()
    }
    | {
        kind: Flaw(make, unlike_the_first)
        for kind, make in {"shared": shared, "tied": tied, "alias": one_memory}.items()
    }
    | {
        "bias of one": Flaw(
            replaced_last(with_bias(lambda bias: bias[:1])),
            lambda _, call: True if call.case.out_features > 1 else None,
        ),
        # A layer of unequal sizes, which the masked one cannot be.
        "a feature more": Flaw(
            replaced_last(with_weight(lambda weight: torch.cat([weight, weight[:, :1]], 1))),
            lambda linears, call: call.number % 2 == 1 and len(linears) > 1,
        ),
        "generator": Flaw(lambda linears, _: (linear for linear in linears)),
        "bias in one": Flaw(
            replaced_last(touched(lambda linear: linear.register_parameter("bias", None))),
            lambda linears, call: True if call.case.bias and len(linears) > 1 else None,
        ),
        "module list": Flaw(lambda linears, _: nn.ModuleList(linears), False),
        "tuple": Flaw(lambda linears, _: tuple(linears), False),
        "all frozen": Flaw(lambda linears, _: [linear.requires_grad_(False) for linear in linears], False),
        "all meta": Flaw(lambda linears, _: [linear.to("meta") for linear in linears], False),
    }
)


def stacked(linears):
    weight = np.stack([to_numpy(linear.weight).T for linear in linears])
    return {"weight": weight} | (
        {} if linears[0].bias is None else {"bias": np.stack([to_numpy(linear.bias) for linear in linears])}
    )


def new_linears(call):
    return list(layer_of(call).to_linears())


def from_linears(call, spoil):
    linears = spoil("linears", new_linears(call))
    kind = MaskedPartitionedLinear if call.number % 2 else PartitionedLinear

    def fault(layer):
        if layer.weight.is_meta:
            return "" if linears[0].weight.is_meta else "expected values"
        if layer.weight.requires_grad != linears[0].weight.requires_grad:
            return "expected the same requires_grad"
        back, given = (
            {
                f"{k}.{name}": to_numpy(value)
                for k, linear in enumerate(each)
                for name, value in linear.named_parameters()
            }
            for each in (layer.to_linears(), linears)
        )
        return bits_fault(back, given)

    return Attempt(lambda: kind.from_linears(linears), fault)


def to_linears(call, spoil):
    layer = spoil("layer", layer_of(call, masked=call.number % 2 == 1))

    def fault(linears):
        if linears[0].weight.is_meta:
            return "" if layer.weight.is_meta else "expected values"
        return bits_fault(stacked(linears), torch_impl.export_parameters(layer))

    return Attempt(layer.to_linears, fault, lambda: state_of(layer))


def entry_of(name):
    """Flaws of one entry of a state_dict, the last one's weight or the first one's bias."""

    def make(flaw):
        def spoil(state, call):
            key = f"{call.case.num_partitions - 1}.weight" if name == "weight" or "0.bias" not in state else "0.bias"
            return {**state, key: flaw.make(state[key], call)}

        return spoil

    taken = {"parameter", "respaced", "expanded", "conjugated", "inference"}
    return {
        f"{name} {kind}": Flaw(make(flaw), False if kind in taken else None if flaw.relative else True)
        for kind, flaw in {**NO_OPERAND, **NO_TENSOR, **FREED}.items()
        if kind != "expanded"
    }


def renamed(old, new):
    return lambda state, _: {(new if key == old else key): value for key, value in state.items()}


NO_STATE = (
    flaws_of(ANYTHING | {"module": nn.Linear(2, 3)})
    | entry_of("weight")
    | entry_of("bias")
    | {
        "number as key": Flaw(lambda state, _: {**state, 0: torch.ones(1)}),
        "key of bytes": Flaw(lambda state, _: {**state, b"0.weight": torch.ones(1)}),
        "key of nothing": Flaw(lambda state, _: {**state, None: torch.ones(1)}),
        "foreign key": Flaw(lambda state, _: {**state, "norm.weight": torch.ones(1)}),
        "leading zero": Flaw(renamed("0.weight", "00.weight")),
        "other digits": Flaw(renamed("0.weight", "\N{ARABIC-INDIC DIGIT ZERO}.weight")),
        "number of 5,000 digits": Flaw(lambda state, _: {**state, "9" * 5000 + ".weight": torch.ones(1)}),
        "large number": Flaw(lambda state, _: {**state, "999999999.weight": torch.ones(1)}),
        "gap": Flaw(renamed("0.weight", "7.weight")),
        "weight missing": Flaw(lambda state, _: {key: value for key, value in state.items() if key != "0.weight"}),
        "many keys": Flaw(lambda state, _: {f"{3 * k}.weight": state["0.weight"] for k in range(1000)}),
        "bias of one": Flaw(
            lambda state, call: {**state, "0.bias": torch.ones(1, dtype=state["0.weight"].dtype)},
            lambda _, call: None if call.case.out_features == 1 else True,
        ),
        "weight of three axes": Flaw(lambda state, _: {**state, "0.weight": state["0.weight"][None]}),
        "weight of no axes": Flaw(lambda state, _: {**state, "0.weight": state["0.weight"][0, 0]}),
        "weight without rows": Flaw(lambda state, _: {**state, "0.weight": state["0.weight"][:0]}),
        "in another order": Flaw(lambda state, _: dict(reversed(state.items())), False),
    }
)


def convert_state(call, spoil):
    linears = new_linears(call)
    state = spoil("state_dict", dict(nn.ModuleList(linears).state_dict()))
    prefix = spoil("prefix", "")

    def fault(found):
        expected = {"weight": np.stack([to_numpy(state[f"{k}.weight"]).T for k in range(len(linears))])}
        if "0.bias" in state:
            expected["bias"] = np.stack([to_numpy(state[f"{k}.bias"]) for k in range(len(linears))])
        if any(tensor.is_meta for tensor in found.values()):
            return "" if state["0.weight"].is_meta else "expected values"
        return bits_fault({name: to_numpy(tensor) for name, tensor in found.items()}, expected)

    return Attempt(lambda: state_dict_from_linears(state, prefix), fault)


def linear_arrays(inputs):
    weights = {f"{k}.weight": np.ascontiguousarray(matrix.T) for k, matrix in enumerate(inputs.weight)}
    return weights | ({} if inputs.bias is None else {f"{k}.bias": vector for k, vector in enumerate(inputs.bias)})


def load_list(call, spoil):
    layer = layer_of(call, masked=call.number % 2 == 1)
    arrays = linear_arrays(call.inputs)
    layer.reset_parameters()
    layer, state, prefix = spoil("layer", layer), spoil("state_dict", arrays), spoil("prefix", "")

    def fault(_):
        given = {key.removeprefix("_orig_mod."): np.asarray(array) for key, array in state.items()}
        exported = {key: to_numpy(tensor) for key, tensor in torch_impl.export_linears(layer).items()}
        return bits_fault({key: exported[key] for key in given}, given)

    return Attempt(lambda: torch_impl.load_linears(layer, state, prefix), fault, lambda: state_of(layer))


def export_list(call, spoil):
    layer, prefix = spoil("layer", layer_of(call, masked=call.number % 2 == 1)), spoil("prefix", "")

    def fault(found):
        return bits_fault({key: to_numpy(tensor) for key, tensor in found.items()}, linear_arrays_of(layer))

    return Attempt(lambda: torch_impl.export_linears(layer, prefix), fault, lambda: state_of(layer))


def linear_arrays_of(layer):
    views = {name: to_numpy(view) for name, view in layer.partition_views().items()}
    return {f"{k}.{name}": array[k].T for k in range(len(views["weight"])) for name, array in views.items()}


def convert_whole(call, spoil):
    model, to = nn.Sequential(layer_of(call)), spoil("to", "partitions")
    state = {f"0.{key}": to_torch(array, CPU) for key, array in linear_arrays(call.inputs).items()}
    model, state = spoil("model", model), spoil("state_dict", state)

    def fault(found):
        if to == "linears":
            return "" if found.keys() == state.keys() else "expected the same keys"
        return bits_fault({key[2:]: to_numpy(value) for key, value in found.items()}, arrays_of(call.inputs))

    return Attempt(lambda: torch_impl.convert_state_dict(model, state, to=to), fault, lambda: state_of(model))


# Optimisers and utilities.


def for_each(call, spoil):
    layer, function = spoil("layer", layer_of(call)), spoil("function", lambda linear: nn.init.ones_(linear.weight))
    return Attempt(
        lambda: for_each_partition_(layer, function),
        lambda found: "" if found is layer and (layer.weight.is_meta or (layer.weight == 1).all()) else "expected ones",
        lambda: state_of(layer),
    )


def group(call, spoil):
    layer, decay = spoil("module", layer_of(call)), spoil("weight_decay", 0.1)

    def fault(groups):
        own = [[layer.weight], [] if layer.bias is None else [layer.bias]]
        same = all([*map(id, found["params"])] == [*map(id, mine)] for found, mine in zip(groups, own, strict=True))
        return "" if same else "expected the weight and the bias"

    return Attempt(lambda: weight_decay_groups(layer, decay), fault)


# Of linears that are only read, or written back as well.
EACH_STATE = {
    kind: dataclasses.replace(flaw, refused=None)
    if kind in ("weight expanded", "bias in the weight", "inference")
    else flaw
    for kind, flaw in states("linears").items()
}
# A function of anything may be called with a linear, and says then what it misses.
NO_FUNCTION = flaws_of(ANYTHING | {"fails": fail, "method": torch.nn.init.orthogonal_, "constructor": nn.Linear})

# Placement.


def shard(call, spoil):
    layer = layer_of(call, implementation=call.implementation)
    layer, mesh = spoil("layer", layer), spoil("device_mesh", init_device_mesh("cpu", (1,)))

    def fault(sharded):
        if sharded is not layer or any(not isinstance(value, DTensor) for value in layer.parameters()):
            return "expected the same layer with DTensors"
        arrays = {name: to_numpy(value.full_tensor()) for name, value in layer.named_parameters()}
        return bits_fault(arrays, arrays_of(call.inputs))

    return Attempt(lambda: shard_partitions(layer, mesh), fault, lambda: state_of(layer))


def spread(call, spoil):
    x, mesh = spoil("x", operands(call.inputs)[0]), spoil("device_mesh", init_device_mesh("cpu", (1,)))
    return Attempt(lambda: shard_inputs(x, mesh), lambda spread: output_of(spread, x))


def output_of(spread, x):
    whole = spread.full_tensor()
    return "" if whole.is_meta or np.array_equal(to_numpy(whole), to_numpy(x)) else "expected the same values"


# Partitions of unequal sizes.


def packing_of_drawn(call):
    """Sizes that follow from the call: other ones for each partition, and sometimes the same."""
    numbers, case = range(call.case.num_partitions), call.case
    ins = tuple(1 + (call.number + 2 * k) % case.in_features for k in numbers)
    return packing_of(ins, tuple(1 + (call.number + k // 2) % case.out_features for k in numbers))


def packed_operands(call):
    packing, rng = packing_of_drawn(call), np.random.default_rng(call.number)
    bias = (packing.out_offsets[-1],) if call.case.bias else None
    shapes = ((*call.inputs.x.shape[:-2], packing.in_offsets[-1]), (packing.weight_size,), bias)
    return [
        None if shape is None else torch.from_numpy(rng.normal(size=shape)).to(getattr(torch, call.dtype))
        for shape in shapes
    ]


def packed_fault(y, x, weight, bias, packing):
    """The verdict on each partition's share of y."""
    faults = []
    for k in range(packing.num_partitions):
        own = [
            None if part is None else of_partition(part, name, k, packing)
            for part, name in ((weight, "weight"), (bias, "bias"))
        ]
        shares = [
            whole[..., offsets[k] : offsets[k + 1]].unsqueeze(-2)
            for whole, offsets in ((y, packing.out_offsets), (x, packing.in_offsets))
        ]
        faults.append(output_fault(*shares, *(None if part is None else part.unsqueeze(0) for part in own)))
    return ", ".join(filter(None, faults))


def call_packed(call, spoil):
    packing = packing_of_drawn(call)
    x, weight, bias = packed_operands(call)
    x, weight, bias = spoil("x", x), spoil("weight", weight), None if bias is None else spoil("bias", bias)
    options = {
        "implementation": spoil("implementation", call.implementation),
        "in_axis": spoil("in_axis", -1),
        "partition_axis": spoil("partition_axis", -2),
        "partitions": spoil("partitions", None),
        "in_features": spoil("in_features", packing.in_features),
        "out_features": spoil("out_features", packing.out_features),
    }
    return Attempt(
        lambda: WAYS[call.way](lambda *tensors: partitioned_linear(*tensors, **options), x, weight, bias),
        lambda y: packed_fault(y, x, weight, bias, packing),
    )


def packed_layer(call, spoil):
    packing, x = packing_of_drawn(call), packed_operands(call)[0]
    sizes = (packing.num_partitions, packing.in_features, packing.out_features, call.case.bias)
    layer = PartitionedLinear(*sizes, dtype=getattr(torch, call.dtype), implementation=call.implementation)
    x, partitions = spoil("x", x), spoil("partitions", None)
    return Attempt(
        lambda: WAYS[call.way](lambda x, *_: layer(x, partitions), x, None, None),
        lambda y: packed_fault(y, x, layer.weight, layer.bias, packing),
        lambda: state_of(layer),
    )


def construct_packed(call, spoil):
    packing = packing_of_drawn(call)
    sizes = [spoil("num_partitions", packing.num_partitions)]
    sizes += [spoil("in_features", packing.in_features), spoil("out_features", packing.out_features)]
    implementation = spoil("implementation", call.implementation)

    def fault(layer):
        shape = tuple(layer.weight.shape)
        return "" if shape == (packing.weight_size,) else f"expected {packing.weight_size} weights, got {shape}"

    return Attempt(lambda: PartitionedLinear(*sizes, call.case.bias, implementation=implementation), fault)


NO_TENSOR_SIZES = NO_SIZES | {
    "tensor": Flaw(
        lambda sizes, _: torch.tensor(sizes), lambda _, call: True if call.case.num_partitions > 1 else None, SIZES
    )
}
PACKED_NAME = NO_NAME | flaws_of({"of one size": "einsum", "default of one size": "matmul"})
PACKED_X = (
    NO_OPERAND
    | NO_TENSOR
    | {
        "a partition axis": Flaw(
            lambda x, call: x.new_zeros(
                *x.shape[:-1], call.case.num_partitions + 1, max(packing_of_drawn(call).in_features)
            ),
            lambda x, call: None if x.shape[-1] == packing_of_drawn(call).in_offsets[-1] else True,
            SIZES,
            relative=True,
        ),
        "a feature more": Flaw(lambda x, _: torch.cat([x, x[..., :1]], -1), True, SIZES, relative=True),
        "no features": Flaw(lambda x, _: x[..., :0], True, SIZES),
        "no axes": Flaw(lambda x, _: x.new_zeros(()), True, SIZES),
    }
)
PACKED = (
    NO_OPERAND
    | NO_TENSOR
    | {
        "stacked": Flaw(lambda weight, _: weight[None, None], True, SIZES),
        "an element less": Flaw(lambda weight, _: weight[:-1], True, SIZES, relative=True),
        "an element more": Flaw(lambda weight, _: torch.cat([weight, weight[:1]]), True, SIZES, relative=True),
        "no axes": Flaw(lambda weight, _: weight.new_zeros(()), True, SIZES),
    }
)
PACKED_BIAS = {kind: flaw for kind, flaw in PACKED.items() if kind != "none"}
PACKED_PARTITION_AXIS = {
    kind: dataclasses.replace(flaw, refused=kind not in ("flat", "next to last"))
    for kind, flaw in NO_PARTITION_AXIS.items()
}


NO_MESH = flaws_of(ANYTHING | {"device": torch.device("cpu"), "name": "cpu"})


@pytest.fixture(autouse=True, scope="module")
def process_group():
    """One process is a group of its own: enough for every mesh of one device."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def entries(folder):
    """Everything that can be called."""
    return {
        "partitioned_linear": Entry(
            call_function,
            {"x": X, "weight": WEIGHT, "bias": BIAS, "implementation": NO_NAME}
            | {"in_axis": NO_IN_AXIS, "partition_axis": NO_PARTITION_AXIS, "partitions": NO_PARTITIONS},
            (*WAYS, "gradients"),
            NAMES,
        ),
        "partitioned_linear of unequal sizes": Entry(
            call_packed,
            {"x": PACKED_X, "weight": PACKED, "bias": PACKED_BIAS, "implementation": PACKED_NAME}
            | {"in_axis": NO_IN_AXIS, "partition_axis": PACKED_PARTITION_AXIS, "partitions": NO_PARTITIONS}
            | {"in_features": NO_TENSOR_SIZES, "out_features": NO_TENSOR_SIZES},
            tuple(WAYS),
            PACKED_NAMES,
        ),
        "PartitionedLinear of unequal sizes": Entry(
            construct_packed,
            {
                "num_partitions": NO_SIZE,
                "in_features": NO_TENSOR_SIZES,
                "out_features": NO_TENSOR_SIZES,
                "implementation": PACKED_NAME,
            },
            implementations=PACKED_NAMES,
        ),
        "layer of unequal sizes": Entry(
            packed_layer, {"x": PACKED_X | KEPT_BY_AUTOGRAD, "partitions": NO_PARTITIONS}, tuple(WAYS), PACKED_NAMES
        ),
        "PartitionedLinear": Entry(
            construct(False),
            CONSTRUCTOR | {"implementation": NO_NAME, "in_axis": NO_IN_AXIS, "partition_axis": ANY_PARTITION_AXIS},
            implementations=NAMES,
        ),
        "MaskedPartitionedLinear": Entry(construct(True), CONSTRUCTOR),
        "layer": Entry(
            call_layer(False),
            {"x": X | KEPT_BY_AUTOGRAD, "layer": states("forward"), "partitions": NO_PARTITIONS},
            tuple(WAYS),
            NAMES,
        ),
        "masked layer": Entry(
            call_layer(True),
            {"x": FLAT_X | KEPT_BY_AUTOGRAD, "layer": states("forward")},
            ("eager", "no gradients"),
        ),
        "reset_parameters": Entry(reset, {"init": NO_INIT, "layer": states("reset")}),
        "import_parameters": Entry(
            import_arrays, {"arrays": NO_ARRAYS, "axes": NO_AXES, "layer": NO_LAYER | states("import")}
        ),
        "load_linears": Entry(
            load_list,
            {"state_dict": NO_LINEAR_ARRAYS, "layer": NO_LAYER | states("import")}
            | {"prefix": flaws_of(ANYTHING, names=("state_dict",))},
        ),
        "export_linears": Entry(
            export_list,
            {"layer": NO_LAYER | states("export")} | {"prefix": flaws_of({**ANYTHING, "text": 3})},
        ),
        "for_each_partition_": Entry(for_each, {"layer": NO_LAYER | EACH_STATE, "function": NO_FUNCTION}),
        "weight_decay_groups": Entry(
            group,
            {"module": flaws_of(ANYTHING)}
            | {
                "weight_decay": flaws_of(
                    {kind: value for kind, value in ANYTHING.items() if kind != "number"}
                    | {"truth": True, "negative": -0.1, "not a number": math.nan, "tensor": torch.ones(1)}
                )
            },
        ),
        "convert_state_dict": Entry(
            convert_whole,
            {"model": flaws_of(ANYTHING), "state_dict": flaws_of({k: v for k, v in ANYTHING.items() if k != "dict"})}
            | {"to": flaws_of(ANYTHING) | flaws_of({"back": "linears"}, False)},
        ),
        "export_parameters": Entry(export_arrays, {"layer": NO_LAYER | states("export")}),
        "save_parameters": Entry(saving(folder), {"path": NO_PATH, "layer": NO_LAYER | states("export")}),
        "load_parameters": Entry(loading(folder), {"path": NO_FILE, "layer": NO_LAYER | states("import")}),
        "from_linears": Entry(from_linears, {"linears": NO_LINEARS}),
        "to_linears": Entry(to_linears, {"layer": states("linears")}),
        "shard_partitions": Entry(
            shard,
            {"layer": NO_LAYER | {"undivided": Flaw(lambda _, call: layer_of(call, implementation="loop"))}}
            | {"device_mesh": NO_MESH},
            implementations=("auto", "einsum", "matmul"),
        ),
        "shard_inputs": Entry(spread, {"x": NO_OPERAND, "device_mesh": NO_MESH}),
        "state_dict_from_linears": Entry(
            convert_state, {"state_dict": NO_STATE, "prefix": flaws_of(ANYTHING, names=("state_dict",))}
        ),
    }


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


def test_every_flaw_is_refused_in_one_sentence(tmp_path):
    judged = judge(entries(tmp_path), every_kind(entries(tmp_path)), "torch_impl")
    assert judged.faults == []
    assert judged.outcomes["refused"] > 600
    assert judged.outcomes["right"] > 60


def test_drawn_calls(drawn_calls, tmp_path):
    table = entries(tmp_path)
    judged = judge(table, (draw_call(table, 0, number) for number in drawn_calls), "torch_impl")
    assert judged.faults == []
    assert min(judged.outcomes[outcome] for outcome in ("right", "refused")) > len(drawn_calls) // 100
