"""Drawn calls of the JAX tree: right, or refused in one sentence, with every kind of flaw in every argument.

More of them: `python -m pytest parity_tests/tests/test_jax_drawn_calls.py --drawn-calls 10000`.
"""

import dataclasses
import itertools
import os

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.numpy as jnp
import safetensors
from flax import nnx
from flax.core import freeze
from jax.sharding import AbstractMesh, AxisType

import jax_impl
from jax_impl import PartitionedLinear, implementation_names, linen, partitioned_linear
from jax_impl.optimizers import weight_decay_mask
from jax_impl.packing import packing_of
from jax_impl.partitions import for_each_partition_
from jax_impl.registry import IMPLEMENTATIONS, unsupported_reason
from jax_impl.sharding import partition_sharding, shard_partitions
from jax_impl.unequal import partition_biases, partition_weights
from parity_tests.judge.dtypes import numpy_dtype
from parity_tests.judge.tolerance import PRECISION_OF_DTYPE, declared_arithmetic
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

NAMES = ("auto", *implementation_names())
PACKED_NAMES = ("auto", *implementation_names(unequal=True))
pytestmark = pytest.mark.usefixtures("quick_compilation")

# Flaws of single arrays.


class Holder:
    """Gives what it holds where JAX asks for an array, or raises it."""

    def __init__(self, held):
        self.held = held

    def __jax_array__(self):
        if isinstance(self.held, Exception):
            raise self.held
        return self.held


def keys(array):
    return jax.random.split(jax.random.key(0), array.shape)


def deleted(array):
    copied = jnp.array(array)
    copied.delete()
    return copied


def another_float(array):
    return array.astype(jnp.float16 if array.dtype != jnp.float16 else jnp.float32)


def plain(value):
    """The NumPy array behind whatever was passed."""
    return np.asarray(value.__jax_array__() if hasattr(value, "__jax_array__") else value)


def masked(array):
    return np.ma.masked_array(np.asarray(array), mask=np.asarray(array) > 0)


NO_JAX_ARRAY = {
    "masked": Flaw(lambda array, _: masked(array)),
    "masked nowhere": Flaw(lambda array, _: np.ma.masked_array(np.asarray(array))),
    "other byte order": Flaw(lambda array, _: np.asarray(array).astype(">f4")),
    "objects": Flaw(lambda array, _: np.asarray(array).astype(object)),
    "records": Flaw(lambda array, _: np.zeros(array.shape, [("a", "f4"), ("b", "f4")])),
    "texts": Flaw(lambda array, _: np.full(array.shape, "a")),
    "dates": Flaw(lambda array, _: np.zeros(array.shape, "M8[s]")),
    "long doubles": Flaw(lambda array, _: np.asarray(array).astype(np.longdouble)),
    "keys": Flaw(lambda array, _: keys(array)),
    "deleted": Flaw(lambda array, _: deleted(array)),
    "abstract": Flaw(lambda array, _: jax.ShapeDtypeStruct(array.shape, array.dtype)),
    "scalar of numpy": Flaw(lambda array, _: np.float32(1)),
    "holder of none": Flaw(lambda array, _: Holder(None)),
    "holder of a list": Flaw(lambda array, _: Holder([1.0])),
    "holder of a masked array": Flaw(lambda array, _: Holder(masked(array))),
    "holder of keys": Flaw(lambda array, _: Holder(keys(array))),
    "holder that raises": Flaw(lambda array, _: Holder(RuntimeError("nothing here"))),
    "class of holders": Flaw(lambda array, _: Holder),
    "complex": Flaw(lambda array, _: array.astype(jnp.complex64)),
    "float8": Flaw(lambda array, _: array.astype(jnp.float8_e4m3fn)),
    "small integers": Flaw(lambda array, _: jnp.zeros(array.shape, jnp.int4)),
    "numpy": Flaw(lambda array, _: np.asarray(array), False),
    "expanded": Flaw(lambda array, _: np.broadcast_to(np.asarray(array[..., :1]), array.shape), False),
    "reversed": Flaw(lambda array, _: np.asarray(array)[..., ::-1], False),
    "columns first": Flaw(lambda array, _: np.asfortranarray(array), False),
    "holder": Flaw(lambda array, _: Holder(array), False),
    "holder of numpy": Flaw(lambda array, _: Holder(np.asarray(array)), False),
    "variable": Flaw(lambda array, _: nnx.Param(array), False),
}
BESIDE = ("x", "weight", "kernel", "bias")


def other_numbers(promoted):
    """Dtypes that the function refuses, and that a layer promotes as Flax does."""
    refused = None if promoted else True
    return {
        "integers": Flaw(lambda array, _: array.astype(jnp.int32), refused),
        "truths": Flaw(lambda array, _: array.astype(bool), refused),
        "another float": Flaw(lambda array, _: another_float(array), not promoted, BESIDE, relative=True),
        "double": Flaw(
            lambda array, _: np.asarray(array).astype(np.float64),
            lambda _, call: not promoted and call.dtype != "float64",
            BESIDE,
        ),
    }


X = NO_OPERAND | NO_JAX_ARRAY | wrong_shapes("x", X_SHAPES)
# A first input says what the sizes are.
FIRST_X = (
    NO_OPERAND
    | NO_JAX_ARRAY
    | {
        "one axis": Flaw(lambda x, _: x.reshape(x.size)),
        "no partitions": Flaw(lambda x, _: x[..., :0, :]),
        "no features": Flaw(lambda x, _: x[..., :0]),
    }
)
KERNEL = NO_OPERAND | NO_JAX_ARRAY | wrong_shapes("weight", WEIGHT_SHAPES)
BIAS = NO_BIAS | NO_JAX_ARRAY | wrong_shapes("bias", BIAS_SHAPES)

# Options.

PRESETS = {name: jax.lax.DotAlgorithmPreset[name] for name in ("F16_F16_F32", "BF16_BF16_F32", "F32_F32_F32")}
ALGORITHMS = PRESETS | {f"{name} by name": name for name in PRESETS}
ALGORITHMS |= {"TF32": "TF32_TF32_F32", "algorithm": jax.lax.DotAlgorithm(np.float32, np.float32, np.float32)}
PRECISION = (
    flaws_of({kind: value for kind, value in ANYTHING.items() if kind != "none"} | {"number": 3, "nothing": ""})
    | flaws_of({"no pair": (), "one": ("highest",), "triple": ("highest",) * 3, "half": ("highest", None)})
    | flaws_of({"mixed pair": ("highest", jax.lax.Precision.HIGH), "pair of numbers": (3, 3), "capitals": "HIGHEST"})
    | flaws_of({"pair of algorithms": ("F32_F32_F32",) * 2, "pair of presets": (PRESETS["F32_F32_F32"],) * 2})
    | flaws_of(
        {"high": "high", "pair": ("highest", "default"), "enumeration": jax.lax.Precision.HIGHEST}
        | {"pair of enumerations": (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT), "none": None},
        False,
    )
    | flaws_of(ALGORITHMS, None)
)
NO_DTYPE = flaws_of(
    {kind: value for kind, value in ANYTHING.items() if kind != "none"}
    | {"integer": jnp.int32, "complex": "complex64", "float8": jnp.float8_e4m3fn, "unknown": "float33", "code": "O"}
    | {"other byte order": ">f4", "negative pair": ("f4", -1), "fields": "f4,f4", "key": jax.dtypes.prng_key}
    | {"no dtype": {"names": 3}, "array": np.zeros(3)}
)
# The class dict stands for objects in NumPy, and a number is no dtype.
NARROWER = {
    "narrower": Flaw(
        lambda _, call: "float16" if call.dtype != "float16" else "bfloat16",
        lambda _, call: True,
    )
}
WIDER = {
    "wider": Flaw(lambda _, call: "float64" if call.dtype == "float64" else "float32", False),
    "double": Flaw(lambda _, call: np.float64, lambda _, call: call.dtype != "float64"),
}

# What a call returns, and what it must leave alone.


def in_precision(prepare):
    """float64 arrays exist only under x64, in everything that a call does."""

    def prepared(call, spoil):
        def within(function):
            def called(*arguments):
                with jax.enable_x64(call.dtype == "float64"):
                    return function(*arguments)

            return called

        attempt = within(prepare)(call, spoil)
        return dataclasses.replace(
            attempt, run=within(attempt.run), fault=within(attempt.fault), state=within(attempt.state)
        )

    return prepared


def operands(inputs):
    """The arrays of a call; JAX has no other layouts than its own."""
    return tuple(None if array is None else jnp.asarray(array) for array in (inputs.x, inputs.weight, inputs.bias))


PLAIN = draw_call({"": Entry(lambda call, spoil: None, {})}, 0, 0).inputs


def output_fault(y, x, kernel, bias, preferred=None):
    """The verdict on y by what was passed, which a flaw may have made other but valid operands."""
    x, kernel, bias = (None if array is None else plain(array) for array in (x, kernel, bias))
    dtype = np.dtype(y.dtype) if preferred is None else kernel.dtype
    arrays = [None if array is None else array.astype(dtype) for array in (x, kernel, bias)]
    cotangent = np.ones((*x.shape[:-1], kernel.shape[-1]), dtype)
    given = dataclasses.replace(
        PLAIN, x=arrays[0], weight=arrays[1], bias=arrays[2], cotangent=cotangent, dtype=dtype.name
    )
    arithmetic = declared_arithmetic(PRECISION_OF_DTYPE[dtype.name])
    if preferred is not None:
        arithmetic = dataclasses.replace(arithmetic, output=np.dtype(preferred).name)
    return product_fault({"y": np.asarray(y)}, given, arithmetic)


def bits(value):
    if isinstance(value, nnx.Variable):
        value = value.get_value()
    if isinstance(value, jax.Array):
        if value.is_deleted() or jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return id(value)
        return np.asarray(value).tobytes()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return np.asarray(value).tobytes()
    return repr(value) if isinstance(value, list) else id(value)


def state_of(layer):
    return (bits(layer.kernel), bits(layer.bias)) if isinstance(layer, PartitionedLinear) else None


def unsupported(call):
    kinds = dict(call.flaws)
    if call.implementation == "auto" or "implementation" in kinds:
        return False
    if call.way in ("vmap", "vmap of jit") and not IMPLEMENTATIONS[call.implementation].maps:
        return bool(call.case.leading)
    sizes = dict(zip(("in_features", "out_features"), call.case.largest, strict=True))
    return unsupported_reason(call.implementation, dtype=call.dtype, device="cpu", **sizes) is not None


# The function and the layers' calls.


def over_leading_axis(function, x):
    return jax.vmap(function)(x) if x.ndim > 2 else function(x)


WAYS = {
    "eager": lambda function, x: function(x),
    "jit": lambda function, x: jax.jit(function)(x),
    "vmap": over_leading_axis,
    "vmap of jit": lambda function, x: over_leading_axis(jax.jit(function), x),
}


def gradients(function, inputs, x, kernel, bias):
    arguments = (x, kernel) if bias is None else (x, kernel, bias)
    y, pullback = jax.vjp(function, *arguments)
    found = (y, *pullback(jnp.asarray(inputs.cotangent)))
    return dict(zip(("y", "dx", "dweight", "dbias"), map(np.asarray, found), strict=False))


def call_function(call, spoil):
    inputs = call.inputs
    options = {
        "implementation": spoil("implementation", call.implementation),
        "precision": spoil("precision", "highest"),
        "preferred_element_type": spoil("preferred_element_type", None),
        "in_axis": spoil("in_axis", -1),
        "partition_axis": spoil("partition_axis", -2),
        "partitions": spoil("partitions", None),
    }
    x, kernel, bias = operands(inputs)
    x, kernel, bias = spoil("x", x), spoil("kernel", kernel), None if bias is None else spoil("bias", bias)

    def function(x, kernel=kernel, bias=bias):
        return partitioned_linear(x, kernel, bias, **options)

    if call.way == "gradients":
        return Attempt(
            lambda: gradients(function, inputs, x, kernel, bias),
            lambda found: product_fault(found, inputs),
            unsupported=unsupported(call),
        )

    def fault(y):
        if dict(call.flaws).get("precision") in ALGORITHMS:
            return ""  # as coarse as was asked for, where the device knows it
        return output_fault(y, x, kernel, bias, options["preferred_element_type"])

    return Attempt(lambda: WAYS[call.way](function, x), fault, unsupported=unsupported(call))


def arrays_of(inputs):
    return {"weight": inputs.weight} | ({} if inputs.bias is None else {"bias": inputs.bias})


def layer_of(call, **options):
    """A layer that holds the numbers of the call."""
    inputs, zeros = call.inputs, nnx.initializers.zeros
    layer = PartitionedLinear(
        call.case.num_partitions,
        call.case.in_features,
        call.case.out_features,
        use_bias=inputs.bias is not None,
        param_dtype=numpy_dtype(call.dtype),
        kernel_init=zeros,
        bias_init=zeros,
        precision="highest",
        rngs=nnx.Rngs(0),
        **options,
    )
    jax_impl.import_parameters(layer, arrays_of(inputs))
    return layer


NO_PROMOTION = {
    "returns nothing": lambda arrays, dtype: None,
    "returns two": lambda arrays, dtype: arrays[:2],
    "returns four": lambda arrays, dtype: (*arrays, None),
    "returns a text": lambda arrays, dtype: "abc",
    "returns lists": lambda arrays, dtype: [[1.0]] * 3,
    "raises": lambda arrays, dtype: 1 / 0,
    "takes no dtype": lambda arrays: arrays,
    "is a class": object,
    "leaves two dtypes": lambda arrays, dtype: (arrays[0].astype(jnp.int8), *arrays[1:]),
}


def linen_promotion(function):
    def promote(*arrays, **options):
        return function(arrays, **options)

    return promote


def call_layer(call, spoil):
    x, _, _ = operands(call.inputs)
    layer = layer_of(
        call, implementation=call.implementation, promote_dtype=spoil("promote_dtype", nnx.nn.dtypes.promote_dtype)
    )
    x, layer, partitions = spoil("x", x), spoil("layer", layer), spoil("partitions", None)
    return Attempt(
        lambda: WAYS[call.way](lambda x: layer(x, partitions), x),
        lambda y: output_fault(y, x, layer.kernel[...], None if layer.bias is None else layer.bias[...]),
        lambda: state_of(layer),
        unsupported(call),
    )


def params_of(inputs):
    params = {"kernel": jnp.asarray(inputs.weight)}
    return params if inputs.bias is None else params | {"bias": jnp.asarray(inputs.bias)}


def apply_linen(call, spoil):
    inputs = call.inputs
    layer = linen.PartitionedLinear(
        spoil("features", call.case.out_features),
        use_bias=inputs.bias is not None,
        implementation=call.implementation,
        precision="highest",
        promote_dtype=spoil("promote_dtype", linen.dtypes.promote_dtype),
        in_axis=spoil("in_axis", -1),
        partition_axis=spoil("partition_axis", -2),
        num_partitions=spoil("num_partitions", None),
    )
    x, params = spoil("x", jnp.asarray(inputs.x)), spoil("params", params_of(inputs))
    return Attempt(
        lambda: WAYS[call.way](lambda x: layer.apply({"params": params}, x), x),
        lambda y: output_fault(y, x, params["kernel"], params.get("bias") if inputs.bias is not None else None),
        lambda: {name: bits(value) for name, value in params.items()} if isinstance(params, dict) else None,
        unsupported(call),
    )


# Layers and parameters in an unusual state: how the call must end, by what is asked of them.

CHANGES = {
    "kernel deleted": (lambda kernel, bias: (deleted(kernel), bias), True, True),
    "kernel abstract": (lambda kernel, bias: (jax.ShapeDtypeStruct(kernel.shape, kernel.dtype), bias), True, True),
    "kernel none": (lambda kernel, bias: (None, bias), True, True),
    "kernel list": (lambda kernel, bias: ([1.0], bias), True, True),
    "kernel text": (lambda kernel, bias: ("abc", bias), True, True),
    "kernel of keys": (lambda kernel, bias: (keys(kernel), bias), True, True),
    "kernel masked": (lambda kernel, bias: (masked(kernel), bias), True, True),
    "kernel of objects": (lambda kernel, bias: (np.asarray(kernel).astype(object), bias), True, True),
    "kernel of another byte order": (lambda kernel, bias: (np.asarray(kernel).astype(">f4"), bias), True, True),
    "kernel complex": (lambda kernel, bias: (kernel.astype(jnp.complex64), bias), True, True),
    "kernel of float8": (lambda kernel, bias: (kernel.astype(jnp.float8_e4m3fn), bias), True, True),
    "kernel of integers": (lambda kernel, bias: (kernel.astype(jnp.int32), bias), None, True),
    "kernel of two axes": (lambda kernel, bias: (kernel[0], bias), True, True),
    "kernel without outputs": (lambda kernel, bias: (kernel[..., :0], bias), True, True),
    "kernel of other sizes": (lambda kernel, bias: (jnp.ones((7, 2, 3), kernel.dtype), bias), True, True),
    "bias deleted": (lambda kernel, bias: (kernel, deleted(bias)), True, True),
    "bias vector": (lambda kernel, bias: (kernel, bias[0]), True, True),
    "bias of no axes": (lambda kernel, bias: (kernel, bias[0, 0]), True, True),
    "bias list": (lambda kernel, bias: (kernel, [1.0]), True, True),
    "bias of another float": (lambda kernel, bias: (kernel, another_float(bias)), False, None),
    "numpy arrays": (
        lambda kernel, bias: (np.asarray(kernel), None if bias is None else np.asarray(bias)),
        False,
        False,
    ),
}


def applies(kind, call):
    return call.case.bias or not kind.startswith("bias")


def layer_states(called):
    def spoiling(kind, change):
        def spoil(layer, call):
            if applies(kind, call):
                bias = None if layer.bias is None else layer.bias.get_value()
                kernel, bias = change(layer.kernel.get_value(), bias)
                layer.kernel = nnx.Param(kernel)
                if layer.bias is not None:
                    layer.bias = nnx.Param(bias)
            return layer

        return spoil

    names = ("layer", "kernel", "bias", "x", "arrays", "state_dict")
    return {
        kind: Flaw(
            spoiling(kind, change),
            lambda _, call, kind=kind, verdict=in_call if called else in_copy: (
                verdict if applies(kind, call) else False
            ),
            names,
        )
        for kind, (change, in_call, in_copy) in CHANGES.items()
    }


def param_states(called):
    def spoiling(kind, change):
        def spoil(params, call):
            if not applies(kind, call):
                return params
            kernel, bias = change(params["kernel"], params.get("bias"))
            return {"kernel": kernel} | ({"bias": bias} if "bias" in params else {})

        return spoil

    def decide(kind, refused):
        def verdict(_, call):
            if kind == "kernel of other sizes" and not called and not call.case.bias:
                return None  # a dict of parameters says itself what its sizes are
            return refused if applies(kind, call) else False

        return verdict

    names = ("layer", "kernel", "bias", "x", "arrays", "params", "state_dict")
    return {
        kind: Flaw(spoiling(kind, change), decide(kind, in_call if called else in_copy), names)
        for kind, (change, in_call, in_copy) in CHANGES.items()
    }


NO_PARAMS_IN_CALL = param_states(True) | {
    "empty": Flaw(lambda params, _: {}),
    "kernel missing": Flaw(lambda params, _: {name: value for name, value in params.items() if name != "kernel"}),
    "bias missing": Flaw(lambda params, _: {"kernel": params["kernel"]}, lambda _, call: call.case.bias, ("params",)),
    "bias none": Flaw(lambda params, _: params | {"bias": None}, lambda _, call: call.case.bias, ("params",)),
    "bias of one partition": Flaw(
        lambda params, _: params | {"bias": params["kernel"][:1, 0]},
        lambda _, call: call.case.bias and call.case.num_partitions > 1,
    ),
    "further names": Flaw(lambda params, _: params | {"scale": jnp.ones(3)}, False),
}
NO_PARAMS = (
    flaws_of(ANYTHING)
    | param_states(False)
    | {
        "empty": Flaw(lambda params, _: {}),
        "kernel missing": Flaw(lambda params, _: {"bias": jnp.ones((3, 4))}),
        "further names": Flaw(lambda params, _: params | {"scale": jnp.ones(3)}),
        "numbers as names": Flaw(lambda params, _: {0: params["kernel"]}),
        "list inside": Flaw(lambda params, _: {"params": [params["kernel"]]}),
        "other layer": Flaw(lambda params, _: {"params": {"dense": params}}),
        "dense": Flaw(lambda params, _: {"kernel": params["kernel"][0]}, names=("layer",)),
        "bias of one partition": Flaw(
            lambda params, _: params | {"bias": params["kernel"][:1, 0]},
            lambda _, call: call.case.num_partitions > 1,
            ("layer", "arrays", "state_dict"),
        ),
        "whole variables": Flaw(lambda params, _: {"params": params, "stats": {"count": 3}}, False),
        "frozen": Flaw(lambda params, _: freeze(params), False),
    }
)
NO_LAYER = flaws_of(ANYTHING | {"linear": nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "the class": PartitionedLinear})


# Constructors and initial values.

INITS = {
    "none": (lambda key, shape, dtype: None, True),
    "list": (lambda key, shape, dtype: np.zeros(shape, dtype).tolist(), True),
    "tuple": (lambda key, shape, dtype: (jnp.zeros(shape, dtype),), True),
    "dict": (lambda key, shape, dtype: {"a": jnp.zeros(shape, dtype)}, True),
    "number": (lambda key, shape, dtype: 0.0, True),
    "text": (lambda key, shape, dtype: "abc", True),
    "masked": (lambda key, shape, dtype: masked(np.zeros(shape, dtype)), True),
    "objects": (lambda key, shape, dtype: np.zeros(shape, object), True),
    "other byte order": (lambda key, shape, dtype: np.zeros(shape, ">f4"), True),
    "keys": (lambda key, shape, dtype: jax.random.split(key, shape), True),
    "integers": (lambda key, shape, dtype: jnp.zeros(shape, jnp.int32), True),
    "complex": (lambda key, shape, dtype: jnp.zeros(shape, jnp.complex64), True),
    "another float": (lambda key, shape, dtype: another_float(jnp.zeros(shape, dtype)), True),
    "axis added": (lambda key, shape, dtype: jnp.zeros((3, *shape), dtype), True),
    "no axes": (lambda key, shape, dtype: jnp.zeros((), dtype), True),
    "raises": (lambda key, shape, dtype: {}["no such initialiser"], True),
    "raises of several lines": (lambda key, shape, dtype: jnp.zeros(shape, dtype) + jnp.zeros((7, 7, 7)), True),
    "no arguments": (lambda: None, True),
    "reads the key": (lambda key, shape, dtype: np.zeros(shape) + np.asarray(jax.random.key_data(key))[0], True),
    "weak type": (lambda key, shape, dtype: jnp.full(shape, 0.5), None),
    "numpy": (lambda key, shape, dtype: np.zeros(shape, dtype), False),
    "holder": (lambda key, shape, dtype: Holder(jnp.zeros(shape, dtype)), False),
}
NO_FUNCTION = flaws_of({kind: value for kind, value in ANYTHING.items() if kind not in ("none", "class")})


def inits(argument):
    return NO_FUNCTION | {
        kind: Flaw(
            lambda _, __, function=function: function,
            lambda _, call, refused=refused: refused if argument == "kernel_init" or call.case.bias else False,
        )
        for kind, (function, refused) in INITS.items()
    }


SIZE = NO_SIZE | {"2**50": Flaw(lambda _, __: 2**50, names=("kernel_init", "bias_init"))}
NO_INIT = flaws_of(ANYTHING | {"unknown": "xavier", "function": nnx.initializers.zeros})
NO_RNGS = flaws_of(
    ANYTHING
    | {"seed": 0, "key": jax.random.key(0), "stream": nnx.Rngs(0).params, "none inside": nnx.Rngs()}
    | {"other stream": nnx.Rngs(dropout=0), "several keys": nnx.Rngs(0).split(3)}
)
NO_METADATA = flaws_of({kind: value for kind, value in ANYTHING.items() if kind != "dict"}) | flaws_of(
    {"note": {"note": 1}, "nothing": {}}, False
)


def metadata(argument):
    """With metadata of what is not there Flax has no business."""
    refused = {"numbers as names": {3: 4}, "another value": {"value": 1}}
    return NO_METADATA | {
        kind: Flaw(lambda _, __, value=value: value, lambda _, call: argument == "kernel_metadata" or call.case.bias)
        for kind, value in refused.items()
    }


OPTIONS = {
    "use_bias": NO_SWITCH,
    "implementation": NO_NAME,
    "dtype": NO_DTYPE,
    "param_dtype": NO_DTYPE | flaws_of({"none": None}),
    "precision": PRECISION,
    "preferred_element_type": NO_DTYPE,
    "kernel_init": inits("kernel_init"),
    "bias_init": inits("bias_init"),
}


def option_values(call, spoil, init):
    return {
        "use_bias": spoil("use_bias", call.case.bias),
        "implementation": spoil("implementation", call.implementation),
        init: spoil(init, "flax"),
        "dtype": spoil("dtype", None),
        "param_dtype": spoil("param_dtype", numpy_dtype(call.dtype)),
        "precision": spoil("precision", None),
        "preferred_element_type": spoil("preferred_element_type", None),
        "kernel_init": spoil("kernel_init", nnx.initializers.zeros),
        "bias_init": spoil("bias_init", nnx.initializers.zeros),
    }


def built_fault(kernel, bias, call):
    case = call.case
    if kernel.shape != (case.num_partitions, case.in_features, case.out_features):
        return f"kernel of shape {kernel.shape}"
    if (bias is not None) != case.bias or (bias is not None and bias.shape != (case.num_partitions, case.out_features)):
        return "bias of another shape"
    arrays = [kernel] if bias is None else [kernel, bias]
    wrong = [array for array in arrays if array.dtype != numpy_dtype(call.dtype) or array.weak_type]
    return "parameters of another dtype" if wrong or not all(jnp.isfinite(array).all() for array in arrays) else ""


def construct(call, spoil):
    case = call.case
    sizes = (
        spoil("num_partitions", case.num_partitions),
        spoil("in_features", case.in_features),
        spoil("out_features", case.out_features),
    )
    options = option_values(call, spoil, "init") | {
        "promote_dtype": spoil("promote_dtype", nnx.nn.dtypes.promote_dtype),
        "rngs": spoil("rngs", nnx.Rngs(0)),
        "kernel_metadata": spoil("kernel_metadata", {}),
        "bias_metadata": spoil("bias_metadata", {}),
    }
    return Attempt(
        lambda: PartitionedLinear(*sizes, **options),
        lambda layer: built_fault(layer.kernel[...], None if layer.bias is None else layer.bias[...], call),
    )


def init_linen(call, spoil):
    options = option_values(call, spoil, "initializer")
    layer = linen.PartitionedLinear(spoil("features", call.case.out_features), **options)
    x = spoil("x", jnp.asarray(call.inputs.x))

    def fault(variables):
        params = jax_impl.linen.meta.unbox(variables)["params"]
        expected = dataclasses.replace(call.case, num_partitions=plain(x).shape[-2], in_features=plain(x).shape[-1])
        return built_fault(params["kernel"], params.get("bias"), dataclasses.replace(call, case=expected))

    return Attempt(lambda: layer.init(jax.random.key(0), x), fault, unsupported=unsupported(call))


# Parameters in and out.


def import_nnx(call, spoil):
    layer, arrays = layer_of(call), arrays_of(call.inputs)
    jax_impl.import_parameters(layer, {name: np.zeros_like(array) for name, array in arrays.items()})
    layer, arrays, axes = spoil("layer", layer), spoil("arrays", arrays), spoil("axes", None)
    return Attempt(
        lambda: jax_impl.import_parameters(layer, arrays, axes=axes),
        lambda _: bits_fault(
            jax_impl.export_parameters(layer, axes=axes), {k: np.asarray(v) for k, v in arrays.items()}
        ),
        lambda: state_of(layer),
    )


def linear_arrays(inputs):
    weights = {f"{k}.weight": np.ascontiguousarray(matrix.T) for k, matrix in enumerate(inputs.weight)}
    return weights | ({} if inputs.bias is None else {f"{k}.bias": vector for k, vector in enumerate(inputs.bias)})


def load_list(call, spoil):
    layer, arrays = layer_of(call), linear_arrays(call.inputs)
    jax_impl.import_parameters(layer, {name: np.zeros_like(array) for name, array in arrays_of(call.inputs).items()})
    layer, state, prefix = spoil("layer", layer), spoil("state_dict", arrays), spoil("prefix", "")

    def fault(_):
        given = {key.removeprefix("_orig_mod."): np.asarray(array) for key, array in state.items()}
        exported = jax_impl.export_linears(layer)
        return bits_fault({key: exported[key] for key in given}, given)

    return Attempt(lambda: jax_impl.load_linears(layer, state, prefix), fault, lambda: state_of(layer))


def export_list(call, spoil):
    layer, prefix = spoil("layer", layer_of(call)), spoil("prefix", "")

    def fault(found):
        arrays = jax_impl.export_parameters(layer)
        expected = {f"{k}.{name}": array[k].T for k in range(len(arrays["weight"])) for name, array in arrays.items()}
        return bits_fault(found, expected)

    return Attempt(lambda: jax_impl.export_linears(layer, prefix), fault, lambda: state_of(layer))


def load_list_linen(call, spoil):
    params, state = spoil("params", params_of(call.inputs)), spoil("state_dict", linear_arrays(call.inputs))

    def fault(new):
        given = {key.removeprefix("_orig_mod."): np.asarray(array) for key, array in state.items()}
        exported = linen.export_linears(new)
        return bits_fault({key: exported[key] for key in given}, given)

    return Attempt(
        lambda: linen.load_linears(params, state), fault, lambda: [bits(value) for value in jax.tree.leaves(params)]
    )


def import_linen(call, spoil):
    params, arrays = spoil("params", params_of(call.inputs)), spoil("arrays", arrays_of(call.inputs))
    axes = spoil("axes", None)
    return Attempt(
        lambda: linen.import_parameters(params, arrays, axes=axes),
        lambda new: bits_fault(linen.export_parameters(new, axes=axes), {k: np.asarray(v) for k, v in arrays.items()}),
        lambda: [bits(value) for value in jax.tree.leaves(params)],
    )


def held(params):
    own = params.get("params", params)
    return {{"kernel": "weight"}.get(name, name): np.asarray(value) for name, value in own.items()}


def export_nnx(call, spoil):
    layer = spoil("layer", layer_of(call))
    return Attempt(
        lambda: jax_impl.export_parameters(layer),
        lambda found: bits_fault(
            found, held({name: getattr(layer, name).get_value() for name in ("kernel", *["bias"] * call.case.bias)})
        ),
        lambda: state_of(layer),
    )


def export_linen(call, spoil):
    params = spoil("params", params_of(call.inputs))
    return Attempt(lambda: linen.export_parameters(params), lambda found: bits_fault(found, held(params)))


def written(path):
    with safetensors.safe_open(path, framework="flax") as file:
        return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def saving(folder, nnx_layer):
    def prepare(call, spoil):
        path = spoil("path", str(folder / f"{call.seed}-{call.number}.safetensors"))
        if nnx_layer:
            model = spoil("layer", layer_of(call))
            save, export = jax_impl.save_parameters, jax_impl.export_parameters
        else:
            model = spoil("params", params_of(call.inputs))
            save, export = linen.save_parameters, linen.export_parameters

        def fault(_):
            found = written(path)
            os.unlink(path)
            return bits_fault(found, export(model))

        return Attempt(lambda: save(model, path), fault, lambda: (sorted(os.listdir(folder)), state_of(model)))

    return prepare


def loading(folder, nnx_layer):
    def prepare(call, spoil):
        arrays, path = arrays_of(call.inputs), folder / "loaded"
        layer = layer_of(call)
        jax_impl.save_parameters(layer, path)
        zeros = {name: np.zeros_like(array) for name, array in arrays.items()}
        path = spoil("path", str(path))
        if nnx_layer:
            jax_impl.import_parameters(layer, zeros)
            layer = spoil("layer", layer)
            return Attempt(
                lambda: jax_impl.load_parameters(layer, path),
                lambda _: bits_fault(jax_impl.export_parameters(layer), arrays),
                lambda: state_of(layer),
            )
        params = spoil("params", linen.import_parameters(params_of(call.inputs), zeros))
        return Attempt(
            lambda: linen.load_parameters(params, path),
            lambda new: bits_fault(linen.export_parameters(new), arrays),
        )

    return prepare


# Optimisers and functions of one partition.


def for_each(call, spoil):
    layer, function = spoil("layer", layer_of(call)), spoil("function", jnp.ones_like)
    return Attempt(
        lambda: for_each_partition_(layer, function, name=spoil("name", "kernel")),
        lambda found: "" if found is layer and (layer.kernel[...] == 1).all() else "expected ones",
        lambda: state_of(layer),
    )


def mask(call, spoil):
    layers, params = spoil("layers", [""]), params_of(call.inputs)

    def fault(found):
        expected = {"kernel": True} | ({"bias": not layers} if "bias" in params else {})
        return "" if found == expected else f"expected {expected}"

    return Attempt(lambda: weight_decay_mask(layers)(params), fault)


NO_PATHS = flaws_of(
    {kind: value for kind, value in ANYTHING.items() if kind not in ("empty list", "dict")}
    | {"linear": jnp.ones(3), "one path": "heads", "elsewhere": ["heads"], "numbers": [1, 2]}
) | flaws_of({"no path": [], "tuple": ("",)}, False)

# Placement.

NO_MESH = flaws_of(ANYTHING | {"abstract": AbstractMesh((1,), ("n",)), "devices": jax.devices()})


def shard(call, spoil):
    mesh = spoil("mesh", jax.make_mesh((1,), ("n",), axis_types=(AxisType.Auto,)))
    layer, axis_name = spoil("layer", layer_of(call)), spoil("axis_name", "n")

    def fault(sharded):
        where = {variable[...].sharding for variable in jax.tree.leaves(nnx.state(layer), is_leaf=is_variable)}
        wrong = sharded is not layer or where != {partition_sharding(mesh, "n")}
        return f"lies by {where}" if wrong else bits_fault(jax_impl.export_parameters(layer), arrays_of(call.inputs))

    return Attempt(lambda: shard_partitions(layer, mesh, axis_name), fault, lambda: state_of(layer))


def is_variable(value):
    return isinstance(value, nnx.Variable)


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
    return [None if shape is None else jnp.asarray(rng.normal(size=shape), call.dtype) for shape in shapes]


def packed_fault(y, x, kernel, bias, packing):
    """The verdict on each partition's share of y."""
    kernels = partition_weights(plain(kernel), packing)
    biases = [None] * len(kernels) if bias is None else partition_biases(plain(bias), packing)
    shares = [np.split(plain(x), packing.in_offsets[1:-1], -1), np.split(plain(y), packing.out_offsets[1:-1], -1)]
    faults = [
        output_fault(outputs[..., None, :], inputs[..., None, :], kernel[None], None if bias is None else bias[None])
        for inputs, outputs, kernel, bias in zip(*shares, kernels, biases, strict=True)
    ]
    return ", ".join(filter(None, faults))


def call_packed(call, spoil):
    packing = packing_of_drawn(call)
    x, kernel, bias = packed_operands(call)
    x, kernel, bias = spoil("x", x), spoil("kernel", kernel), None if bias is None else spoil("bias", bias)
    options = {
        "implementation": spoil("implementation", call.implementation),
        "precision": "highest",
        "in_axis": spoil("in_axis", -1),
        "partition_axis": spoil("partition_axis", -2),
        "partitions": spoil("partitions", None),
        "in_features": spoil("in_features", packing.in_features),
        "out_features": spoil("out_features", packing.out_features),
    }
    return Attempt(
        lambda: WAYS[call.way](lambda x: partitioned_linear(x, kernel, bias, **options), x),
        lambda y: packed_fault(y, x, kernel, bias, packing),
    )


def construct_packed(call, spoil):
    packing = packing_of_drawn(call)
    sizes = [spoil("num_partitions", packing.num_partitions)]
    sizes += [spoil("in_features", packing.in_features), spoil("out_features", packing.out_features)]
    options = {"implementation": spoil("implementation", call.implementation), "use_bias": call.case.bias}

    def fault(layer):
        shape = layer.kernel.shape
        return "" if shape == (packing.weight_size,) else f"expected {packing.weight_size} weights, got {shape}"

    return Attempt(lambda: PartitionedLinear(*sizes, rngs=nnx.Rngs(0), **options), fault)


def apply_packed_linen(call, spoil):
    packing = packing_of_drawn(call)
    x, kernel, bias = packed_operands(call)
    layer = linen.PartitionedLinear(
        spoil("features", packing.out_features),
        use_bias=bias is not None,
        implementation=call.implementation,
        precision="highest",
        in_features=spoil("in_features", packing.in_features),
        num_partitions=spoil("num_partitions", None),
    )
    params = {"kernel": spoil("params", kernel)} | ({} if bias is None else {"bias": bias})
    x = spoil("x", x)
    return Attempt(
        lambda: WAYS[call.way](lambda x: layer.apply({"params": params}, x), x),
        lambda y: packed_fault(y, x, kernel, bias, packing),
    )


PACKED_NAME = NO_NAME | flaws_of({"of one size": "einsum", "default of one size": "matmul"})
PACKED_SHAPES = {
    "stacked": Flaw(lambda array, _: array[None, None], True, SIZES),
    "an element less": Flaw(lambda array, _: array[:-1], True, SIZES, relative=True),
    "an element more": Flaw(lambda array, _: jnp.concatenate([array, array[:1]]), True, SIZES, relative=True),
    "no axes": Flaw(lambda array, _: jnp.zeros((), array.dtype), True, SIZES),
}
PACKED = NO_OPERAND | NO_JAX_ARRAY | PACKED_SHAPES
PACKED_BIAS = {kind: flaw for kind, flaw in PACKED.items() if kind != "none"}
PACKED_X = (
    NO_OPERAND
    | NO_JAX_ARRAY
    | {
        "a partition axis": Flaw(
            lambda x, call: jnp.zeros(
                (*x.shape[:-1], call.case.num_partitions + 1, max(packing_of_drawn(call).in_features)), x.dtype
            ),
            lambda x, call: None if x.shape[-1] == packing_of_drawn(call).in_offsets[-1] else True,
            SIZES,
            relative=True,
        ),
        "a feature more": Flaw(lambda x, _: jnp.concatenate([x, x[..., :1]], -1), True, SIZES, relative=True),
        "no features": Flaw(lambda x, _: x[..., :0], True, SIZES),
        "no axes": Flaw(lambda x, _: jnp.zeros((), x.dtype), True, SIZES),
    }
)
PACKED_PARTITION_AXIS = {
    kind: dataclasses.replace(flaw, refused=kind not in ("flat", "next to last"))
    for kind, flaw in NO_PARTITION_AXIS.items()
}


def entries(folder):
    """Everything that can be called."""
    promotion = flaws_of(NO_PROMOTION, names=("x", "kernel", "bias"))
    linen_promotions = NO_FUNCTION | flaws_of(
        {kind: linen_promotion(function) for kind, function in NO_PROMOTION.items()}, names=("x", "kernel", "bias")
    )
    table = {
        "partitioned_linear": Entry(
            call_function,
            {
                "x": X | other_numbers(promoted=False),
                "kernel": KERNEL | other_numbers(promoted=False),
                "bias": BIAS | other_numbers(promoted=False),
                "implementation": NO_NAME,
                "precision": PRECISION,
                "preferred_element_type": NO_DTYPE | NARROWER | WIDER,
                "in_axis": NO_IN_AXIS,
                "partition_axis": NO_PARTITION_AXIS,
                "partitions": NO_PARTITIONS,
            },
            (*WAYS, "gradients"),
            NAMES,
        ),
        "partitioned_linear of unequal sizes": Entry(
            call_packed,
            {
                "x": PACKED_X | other_numbers(promoted=False),
                "kernel": PACKED | other_numbers(promoted=False),
                "bias": PACKED_BIAS | other_numbers(promoted=False),
                "implementation": PACKED_NAME,
                "in_axis": NO_IN_AXIS,
                "partition_axis": PACKED_PARTITION_AXIS,
                "partitions": NO_PARTITIONS,
                "in_features": NO_SIZES,
                "out_features": NO_SIZES,
            },
            tuple(WAYS),
            PACKED_NAMES,
        ),
        "PartitionedLinear of unequal sizes": Entry(
            construct_packed,
            {"num_partitions": NO_SIZE, "implementation": PACKED_NAME}
            | {"in_features": NO_SIZES, "out_features": NO_SIZES},
            implementations=PACKED_NAMES,
        ),
        "linen layer of unequal sizes": Entry(
            apply_packed_linen,
            {
                "x": PACKED_X | other_numbers(promoted=True),
                "features": NO_SIZES,
                "in_features": NO_SIZES,
                "params": PACKED_SHAPES,
                "num_partitions": {kind: flaw for kind, flaw in NO_SIZE.items() if kind != "none"},
            },
            tuple(WAYS),
            PACKED_NAMES,
        ),
        "layer": Entry(
            call_layer,
            {"x": X | other_numbers(promoted=True), "layer": layer_states(called=True), "promote_dtype": promotion}
            | {"partitions": NO_PARTITIONS},
            tuple(WAYS),
            NAMES,
        ),
        "linen layer": Entry(
            apply_linen,
            {
                "x": X | other_numbers(promoted=True),
                "params": NO_PARAMS_IN_CALL,
                "features": NO_SIZE,
                "promote_dtype": linen_promotions,
                "in_axis": NO_IN_AXIS,
                "partition_axis": NO_PARTITION_AXIS,
                "num_partitions": {kind: flaw for kind, flaw in NO_SIZE.items() if kind != "none"},
            },
            tuple(WAYS),
            NAMES,
        ),
        "PartitionedLinear": Entry(
            construct,
            {"num_partitions": SIZE, "in_features": SIZE, "out_features": SIZE, "init": NO_INIT, "rngs": NO_RNGS}
            | {"promote_dtype": NO_FUNCTION, "kernel_metadata": metadata("kernel_metadata")}
            | {"bias_metadata": metadata("bias_metadata")}
            | OPTIONS,
            implementations=NAMES,
        ),
        "linen init": Entry(
            init_linen,
            {"features": SIZE, "initializer": NO_INIT, "x": FIRST_X | other_numbers(promoted=True)} | OPTIONS,
            implementations=NAMES,
        ),
        "import_parameters": Entry(
            import_nnx, {"arrays": NO_ARRAYS, "axes": NO_AXES, "layer": NO_LAYER | layer_states(called=False)}
        ),
        "load_linears": Entry(
            load_list,
            {"state_dict": NO_LINEAR_ARRAYS, "layer": NO_LAYER | layer_states(called=False)}
            | {"prefix": flaws_of(ANYTHING, names=("state_dict",))},
        ),
        "export_linears": Entry(
            export_list,
            {"layer": NO_LAYER | layer_states(called=False)} | {"prefix": flaws_of({**ANYTHING, "text": 3})},
        ),
        "linen.load_linears": Entry(load_list_linen, {"state_dict": NO_LINEAR_ARRAYS, "params": NO_PARAMS}),
        "export_parameters": Entry(export_nnx, {"layer": NO_LAYER | layer_states(called=False)}),
        "save_parameters": Entry(
            saving(folder, True), {"path": NO_PATH, "layer": NO_LAYER | layer_states(called=False)}
        ),
        "load_parameters": Entry(
            loading(folder, True), {"path": NO_FILE, "layer": NO_LAYER | layer_states(called=False)}
        ),
        "shard_partitions": Entry(shard, {"layer": NO_LAYER, "mesh": NO_MESH, "axis_name": flaws_of(ANYTHING)}),
        "for_each_partition_": Entry(
            for_each,
            {"layer": NO_LAYER | layer_states(called=False), "name": flaws_of(ANYTHING)}
            | {"function": flaws_of(ANYTHING | {"another shape": jnp.sum, "another dtype": jnp.isnan, "list": list})},
        ),
        "weight_decay_mask": Entry(mask, {"layers": NO_PATHS}),
        "linen.import_parameters": Entry(import_linen, {"arrays": NO_ARRAYS, "axes": NO_AXES, "params": NO_PARAMS}),
        "linen.export_parameters": Entry(export_linen, {"params": NO_PARAMS}),
        "linen.save_parameters": Entry(saving(folder, False), {"path": NO_PATH, "params": NO_PARAMS}),
        "linen.load_parameters": Entry(loading(folder, False), {"path": NO_FILE, "params": NO_PARAMS}),
    }
    return {name: dataclasses.replace(entry, prepare=in_precision(entry.prepare)) for name, entry in table.items()}


def test_every_flaw_is_refused_in_one_sentence(tmp_path):
    step = 1 if "EVERY_TEST" in os.environ else 4
    judged = judge(entries(tmp_path), itertools.islice(every_kind(entries(tmp_path)), 0, None, step), "jax_impl")
    assert judged.faults == []
    assert judged.outcomes["refused"] > 800 // step
    assert judged.outcomes["right"] > 100 // step


def test_drawn_calls(drawn_calls, tmp_path):
    table = entries(tmp_path)
    judged = judge(table, (draw_call(table, 0, number) for number in drawn_calls), "jax_impl")
    # JAX keeps every program, and a process may have only so many memory maps.
    jax.clear_caches()
    assert judged.faults == []
    assert min(judged.outcomes[outcome] for outcome in ("right", "refused")) > len(drawn_calls) // 100
