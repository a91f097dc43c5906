"""Every bad call gives one clear sentence: the argument, what was expected, what was received, what to do."""

import re
from functools import partial

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.numpy as jnp
from flax import nnx

import jax_impl
from jax_impl import PartitionedLinear, UnsupportedImplementationError, linen, partitioned_linear

pytestmark = pytest.mark.usefixtures("quick_compilation")

N, IN, OUT = 3, 4, 5
X, KERNEL, BIAS = np.ones((2, N, IN), np.float32), np.ones((N, IN, OUT), np.float32), np.ones((N, OUT), np.float32)
NAMES = "'loop', 'masked', 'einsum', 'vmap', 'matmul', 'grouped_conv', 'grouped_matmul', 'in_turn', 'by_feature'"
FLOATS = "float64, float32, bfloat16, float16"


def call(x=X, kernel=KERNEL, bias=BIAS, **options):
    return lambda: partitioned_linear(
        *(jnp.asarray(a) if isinstance(a, np.ndarray) and a.dtype != np.float64 else a for a in (x, kernel, bias)),
        **options,
    )


def layer(*sizes, **options):
    return lambda: PartitionedLinear(*(sizes or (N, IN, OUT)), **({"rngs": nnx.Rngs(0)} | options))


def layer_call(x, **options):
    return lambda: layer(**options)()(x)


def linen_call(x=X, features=OUT, **options):
    return lambda: linen.PartitionedLinear(features, **options).init(jax.random.key(0), x)


def linen_second_call(x, features=OUT):
    variables = {"params": {"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(BIAS)}}
    return lambda: linen.PartitionedLinear(features).apply(variables, x)


def linen_apply(**params):
    return lambda: linen.PartitionedLinear(OUT).apply({"params": params}, X)


class Holder:
    """Gives what it holds where JAX asks for an array."""

    def __init__(self, held):
        self.held = held

    def __jax_array__(self):
        return self.held


def deleted():
    array = jnp.asarray(X)
    array.delete()
    return array


def plain_call(x):
    return lambda: partitioned_linear(x, KERNEL, BIAS)


def mapped(function):
    return lambda: jax.vmap(function)(X[None])


def grouped(x):
    return partitioned_linear(x, KERNEL, BIAS, implementation="grouped_matmul")


MASKED = np.ma.masked_array(X, mask=X > 0)
KEYS = jax.random.split(jax.random.key(0), X.shape)


def cast(array, dtype):
    return jnp.asarray(array).astype(dtype)


CASES = [
    # Shapes of x.
    ("x-vector", call(X[0, 0]), ValueError, "`x`: expected shape (..., n, in) = (..., 3, 4), got (4,);"),
    ("x-scalar", call(1.0), TypeError, "`x`: expected a jax.Array, got a float;"),
    (
        "x-flat",
        call(X.reshape(2, 12)),
        ValueError,
        "got (2, 12); for flat features (..., n*in) pass partition_axis=-1, the axis of in_axis.",
    ),
    ("x-one-partition", call(X[:, :1]), ValueError, "got (2, 1, 4); an axis of size one is not broadcast, drop it"),
    ("x-does-not-divide", call(np.ones((2, 13), np.float32)), ValueError, "(2, 13); its last axis is no multiple of n"),
    ("x-wrong-n", call(X[:, :2]), ValueError, "got (2, 2, 4); pass n = 3 partitions on axis -2"),
    (
        "x-wrong-in",
        call(X[..., :3]),
        ValueError,
        "expected shape (..., n, in) = (..., 3, 4), got (2, 3, 3); give sizes per partition, never",
    ),
    ("x-one-feature", call(X[..., :1]), ValueError, "expected shape (..., n, in) = (..., 3, 4), got (2, 3, 1);"),
    (
        "names-device",
        lambda: jax_impl.implementation_names(device="gpu"),
        ValueError,
        "`device`: expected 'cpu', 'cuda' or None, got 'gpu'; choose one of these.",
    ),
    (
        "kernel-transposed",
        call(kernel=KERNEL.swapaxes(1, 2), bias=None),
        ValueError,
        "got (2, 3, 4); its last axis has the size of out: exchange in and out, or the last two axes of the weight.",
    ),
    ("x-swapped", call(X.swapaxes(1, 2)), ValueError, "got (2, 4, 3); for features before partitions pass in_axis=-2"),
    (
        "x-partitions-first",
        call(np.ones((N, 2, IN), np.float32)),
        ValueError,
        "got (3, 2, 4); for partitions on another axis",
    ),
    # Shapes of kernel and bias.
    ("kernel-matrix", call(kernel=KERNEL[0]), ValueError, "`kernel`: expected shape (n, in, out) with positive sizes,"),
    (
        "kernel-empty",
        call(X[..., :0], KERNEL[:, :0]),
        ValueError,
        "`kernel`: expected shape (n, in, out) with positive",
    ),
    ("kernel-one-partition", call(kernel=KERNEL[:1]), ValueError, "`x`: expected shape (..., n, in) = (..., 1, 4),"),
    ("bias-vector", call(bias=BIAS[0]), ValueError, "`bias`: expected shape (n, out) = (3, 5), got (5,); pass one vec"),
    ("bias-one-partition", call(bias=BIAS[:1]), ValueError, "`bias`: expected shape (n, out) = (3, 5), got (1, 5);"),
    ("bias-transposed", call(bias=BIAS.T), ValueError, "`bias`: expected shape (n, out) = (3, 5), got (5, 3);"),
    ("bias-three-axes", call(bias=BIAS[None]), ValueError, "`bias`: expected shape (n, out) = (3, 5), got (1, 3, 5);"),
    # Types and dtypes.
    ("x-list", call(X.tolist()), TypeError, "`x`: expected a jax.Array, got a list; convert it first."),
    ("x-none", call(None), TypeError, "`x`: expected a jax.Array, got a NoneType; convert it first."),
    ("kernel-list", call(kernel=KERNEL.tolist()), TypeError, "`kernel`: expected a jax.Array, got a list;"),
    ("bias-true", call(bias=True), TypeError, "`bias`: expected a jax.Array, got a bool; convert it first."),
    ("x-int", call(X.astype(np.int32)), TypeError, f"`x`: expected a dtype of {FLOATS}, got int32; cast it first."),
    ("x-complex", call(X.astype(np.complex64)), TypeError, f"`x`: expected a dtype of {FLOATS}, got complex64;"),
    ("x-bool", call(X.astype(bool)), TypeError, f"`x`: expected a dtype of {FLOATS}, got bool; cast it first."),
    (
        "kernel-int",
        call(kernel=KERNEL.astype(np.int32)),
        TypeError,
        f"`kernel`: expected a dtype of {FLOATS}, got int32",
    ),
    ("x-mixed", call(cast(X, "bfloat16")), TypeError, "`x`: expected the dtype of `kernel`, float32, got bfloat16;"),
    (
        "bias-mixed",
        call(bias=cast(BIAS, "float16")),
        TypeError,
        "`bias`: expected the dtype of `kernel`, float32, got f",
    ),
    (
        "x-float64",
        call(X.astype(np.float64)),
        ValueError,
        "`x`: expected a dtype that JAX has enabled, got float64 whil",
    ),
    ("x-keys", call(KEYS), TypeError, f"`x`: expected a dtype of {FLOATS}, got key<fry>; cast it first."),
    (
        "x-byte-order",
        plain_call(X.astype(">f4")),
        TypeError,
        f"`x`: expected a dtype of {FLOATS}, got >f4; cast it first.",
    ),
    (
        "x-objects",
        plain_call(X.astype(object)),
        TypeError,
        f"`x`: expected a dtype of {FLOATS}, got object; cast it first.",
    ),
    (
        "x-deleted",
        plain_call(deleted()),
        ValueError,
        "`x`: expected an array with values, got a deleted one; pass one that was not donated.",
    ),
    (
        "x-deleted-inside-a-trace",
        partial(jax.eval_shape, partial(partitioned_linear, deleted(), jnp.asarray(KERNEL))),
        ValueError,
        "`x`: expected an array with values, got a deleted one; pass one that was not donated.",
    ),
    (
        "x-masked",
        plain_call(MASKED),
        TypeError,
        "`x`: expected an array without a mask, got a MaskedArray; fill it with .filled() first.",
    ),
    (
        "x-holder-of-masked",
        layer_call(Holder(MASKED)),
        TypeError,
        "`x`: expected an array without a mask, got a MaskedArray; fill it with .filled() first.",
    ),
    (
        "kernel-holder-of-nothing",
        call(kernel=Holder(None)),
        TypeError,
        "`kernel`: expected a jax.Array, got a Holder that gives a NoneType; convert it first.",
    ),
    # Names and options of the function.
    (
        "precision-empty",
        call(precision=()),
        ValueError,
        "`precision`: expected a pair of names or of jax.lax.Precision, one for each operand, got (); pass two alike,",
    ),
    (
        "precision-capitals",
        call(precision="HIGHEST"),
        ValueError,
        "`precision`: expected one of 'default', 'fastest', 'bfloat16',",
    ),
    (
        "precision-pair-of-algorithms",
        call(precision=("F32_F32_F32",) * 2),
        ValueError,
        "`precision`: expected one of 'default', 'fastest', 'bfloat16',",
    ),
    (
        "precision-lost",
        call(precision="F32_F32_F32", implementation="grouped_conv"),
        UnsupportedImplementationError,
        "`precision`: expected a name or a jax.lax.Precision for 'grouped_conv', got the algorithm 'F32_F32_F32',",
    ),
    (
        "sum-algorithm",
        call(precision="F32_F32_F32", implementation="by_feature"),
        UnsupportedImplementationError,
        "`precision`: expected a name or a jax.lax.Precision for 'by_feature', got the algorithm 'F32_F32_F32',",
    ),
    (
        "many-features",
        call(np.ones((2, N, 33), np.float32), np.ones((N, 33, OUT), np.float32), implementation="by_feature"),
        UnsupportedImplementationError,
        "`implementation`: 'by_feature' takes at most 32 input features, got in_features=33; choose another one.",
    ),
    (
        "vmap",
        mapped(grouped),
        UnsupportedImplementationError,
        "`implementation`: expected one that jax.vmap can map, got 'grouped_matmul', whose product JAX maps only",
    ),
    (
        "vmap-of-jit",
        mapped(jax.jit(grouped)),
        UnsupportedImplementationError,
        "`implementation`: expected one that jax.vmap can map, got 'grouped_matmul', whose product JAX maps only",
    ),
    (
        "name-unknown",
        call(implementation="bmm"),
        ValueError,
        f"`implementation`: expected one of 'auto', {NAMES}, got 'b",
    ),
    (
        "name-none",
        call(implementation=None),
        TypeError,
        "`implementation`: expected a str, got a NoneType; pass one of",
    ),
    (
        "precision",
        call(precision="exact"),
        ValueError,
        "`precision`: expected one of 'default', 'fastest', 'bfloat16',",
    ),
    (
        "preferred-int",
        call(preferred_element_type="int32"),
        TypeError,
        f"`preferred_element_type`: expected one of {FLOATS}, got 'int32'; pass a floating dtype.",
    ),
    (
        "preferred-narrow",
        call(preferred_element_type="bfloat16"),
        ValueError,
        "at least as wide as the operands' float32,",
    ),
    # The nnx layer.
    ("n-zero", layer(0, IN, OUT), ValueError, "`num_partitions`: expected a positive int, got 0; pass at least 1."),
    ("in-negative", layer(N, -1, OUT), ValueError, "`in_features`: expected a positive int, got -1; pass at least 1."),
    (
        "out-float",
        layer(N, IN, 5.0),
        TypeError,
        "`out_features`: expected a positive int, got 5.0 of type float; pass a",
    ),
    (
        "n-bool",
        layer(True, IN, OUT),
        TypeError,
        "`num_partitions`: expected a positive int, got True of type bool; pass",
    ),
    ("use-bias", layer(use_bias=None), TypeError, "`use_bias`: expected a bool, got a NoneType; pass True or False."),
    (
        "layer-name",
        layer(implementation="bmm"),
        ValueError,
        f"`implementation`: expected one of 'auto', {NAMES}, got 'b",
    ),
    ("init-unknown", layer(init="he"), ValueError, "`init`: expected one of 'torch', 'flax', got 'he'; choose one of"),
    ("init-function", layer(init=jnp.zeros), TypeError, "`init`: expected a str, got a "),
    (
        "kernel-init",
        layer(kernel_init="zeros"),
        TypeError,
        "`kernel_init`: expected a function (key, shape, dtype), got a",
    ),
    (
        "kernel-init-shape",
        layer(kernel_init=lambda key, shape, dtype: jnp.zeros((N, IN, OUT), dtype)),
        ValueError,
        "`kernel_init`: expected values of shape (in, out) = (4, 5) for one partition, got (3, 4, 5);",
    ),
    (
        "bias-init-raises",
        layer(bias_init=jax.nn.initializers.lecun_normal()),
        ValueError,
        "`bias_init`: expected a function that draws one partition's values of shape (5,), got an error from it (",
    ),
    (
        "bias-init-shape",
        layer(bias_init=lambda key, shape, dtype: jnp.zeros((), dtype)),
        ValueError,
        "`bias_init`: expected values of shape (out,) = (5,) for one partition, got ();",
    ),
    (
        "dtype-int",
        layer(dtype=jnp.int32),
        TypeError,
        f"`dtype`: expected one of {FLOATS}, got <class 'jax.numpy.int32'>;",
    ),
    (
        "dtype-noise",
        layer(dtype="float33"),
        TypeError,
        f"`dtype`: expected one of {FLOATS}, got 'float33'; pass a float",
    ),
    (
        "param-none",
        layer(param_dtype=None),
        TypeError,
        f"`param_dtype`: expected one of {FLOATS}, got None; pass a float",
    ),
    (
        "param-float64",
        layer(param_dtype="float64"),
        ValueError,
        "`param_dtype`: expected a dtype that JAX has enabled, g",
    ),
    (
        "layer-preferred",
        layer(preferred_element_type="int8"),
        TypeError,
        "`preferred_element_type`: expected one of float",
    ),
    ("layer-precision", layer(precision="exact"), ValueError, "`precision`: expected one of 'default',"),
    (
        "layer-precision-number",
        layer(precision=3),
        TypeError,
        "`precision`: expected a name or a jax.lax.Precision, got an int; pass one.",
    ),
    (
        "layer-stream",
        layer(rngs=nnx.Rngs(dropout=0)),
        ValueError,
        "`rngs`: expected a stream 'params' or a default, got neither; pass one seed.",
    ),
    (
        "layer-kernel-metadata",
        layer(kernel_metadata=3),
        TypeError,
        "`kernel_metadata`: expected a Mapping, got an int; pass a dict.",
    ),
    (
        "layer-bias-metadata",
        layer(bias_metadata="model"),
        TypeError,
        "`bias_metadata`: expected a Mapping, got a str; pass a dict.",
    ),
    (
        "promote",
        layer(promote_dtype=None),
        TypeError,
        "`promote_dtype`: expected a function ((x, kernel, bias), dtype=",
    ),
    ("rngs", layer(rngs=jax.random.key(0)), TypeError, "`rngs`: expected a Rngs, got a "),
    ("layer-x-list", layer_call(X.tolist()), TypeError, "`x`: expected a jax.Array, got a list; convert it first."),
    (
        "layer-x-shape",
        layer_call(X[:, :1]),
        ValueError,
        "`x`: expected shape (..., n, in) = (..., 3, 4), got (2, 1, 4);",
    ),
    (
        "layer-x-complex",
        layer_call(X.astype(np.complex64)),
        TypeError,
        f"`x`: expected a dtype of {FLOATS}, got complex64",
    ),
    (
        "layer-preferred-narrow",
        layer_call(X, preferred_element_type="float16"),
        ValueError,
        "`preferred_element_type`: expected a dtype at least as wide as the operands' float32, got float16; cast the",
    ),
    (
        "n-2**63",
        layer(2**63, IN, OUT),
        ValueError,
        "`num_partitions`: expected sizes whose weight has fewer than 2**60 elements, got 9223372036854775808; give",
    ),
    (
        "out-beyond-memory",
        layer(N, IN, 2**50),
        MemoryError,
        "`kernel_init`: expected sizes that fit into memory, got values of shape (3, 4, 1125899906842624) (",
    ),
    ("dtype-list", layer(dtype=[]), TypeError, f"`dtype`: expected one of {FLOATS}, got []; pass a floating dtype."),
    (
        "kernel-init-none",
        layer(kernel_init=lambda key, shape, dtype: None),
        TypeError,
        "`kernel_init`: expected a jax.Array, got a NoneType; convert it first.",
    ),
    (
        "kernel-init-rounded",
        layer(kernel_init=lambda key, shape, dtype: np.zeros(shape)),
        TypeError,
        "`kernel_init`: expected values of dtype float32, got float64; return the dtype that is asked for.",
    ),
    (
        "bias-init-raises-lines",
        layer(bias_init=lambda key, shape, dtype: np.asarray(key)),
        ValueError,
        "`bias_init`: expected a function that draws one partition's values of shape (5,), got an error from it (",
    ),
    (
        "rngs-split",
        layer(rngs=nnx.Rngs(0).split(3)),
        ValueError,
        "`rngs`: expected streams of one key each, got some of several (",
    ),
    (
        "kernel-metadata-names",
        layer(kernel_metadata={3: 4}),
        ValueError,
        "`kernel_metadata`: expected metadata of an nnx.Param, got {3: 4} and an error from Flax (",
    ),
    (
        "promote-returns-two",
        layer_call(X, promote_dtype=lambda arrays, dtype: arrays[:2]),
        ValueError,
        "`promote_dtype`: expected a function that returns x, kernel and bias in one dtype, got an error (",
    ),
    (
        "layer-x-float8",
        layer_call(cast(X, "float8_e4m3fn")),
        TypeError,
        "`x`: expected a dtype that JAX promotes with that of `kernel`, float32, got float8_e4m3fn; cast it first.",
    ),
    # The linen layer.
    (
        "linen-no-params",
        linen_apply(),
        ValueError,
        "`params`: expected 'kernel' among the layer's variables, or a random stream 'params' to draw it from, got",
    ),
    (
        "linen-no-bias",
        linen_apply(kernel=jnp.asarray(KERNEL)),
        ValueError,
        "`params`: expected 'bias' among the layer's variables,",
    ),
    (
        "linen-bias-none",
        linen_apply(kernel=jnp.asarray(KERNEL), bias=None),
        TypeError,
        "`params['bias']`: expected a jax.Array, got a NoneType; pass what init returned.",
    ),
    (
        "linen-kernel-matrix",
        linen_apply(kernel=jnp.asarray(KERNEL[0]), bias=jnp.asarray(BIAS)),
        ValueError,
        "`params['kernel']`: expected shape (n, in, out) with out = 5, got (4, 5); pass what init returned.",
    ),
    (
        "linen-bias-one",
        linen_apply(kernel=jnp.asarray(KERNEL), bias=jnp.asarray(BIAS[:1])),
        ValueError,
        "`params['bias']`: expected shape (n, out) = (3, 5), got (1, 5); pass what init returned.",
    ),
    (
        "linen-features",
        linen_call(features=0),
        ValueError,
        "`features`: expected a positive int, got 0; pass at least 1.",
    ),
    ("linen-bias", linen_call(use_bias=1), TypeError, "`use_bias`: expected a bool, got an int; pass True or False."),
    ("linen-name", linen_call(implementation="bmm"), ValueError, "`implementation`: expected one of 'auto', 'loop',"),
    (
        "linen-init",
        linen_call(initializer="he"),
        ValueError,
        "`initializer`: expected one of 'torch', 'flax', got 'he';",
    ),
    (
        "linen-x-vector",
        linen_call(X[0, 0]),
        ValueError,
        "`x`: expected shape (..., n, in) with positive n and in, got (4,)",
    ),
    (
        "linen-x-empty",
        linen_call(X[:, :0]),
        ValueError,
        "`x`: expected shape (..., n, in) with positive n and in, got (2",
    ),
    ("linen-x-list", linen_call(X.tolist()), TypeError, "`x`: expected a jax.Array, got a list; convert it first."),
    (
        "linen-other-n",
        linen_second_call(X[:, :1]),
        ValueError,
        "`x`: expected shape (..., n, in) = (..., 3, 4), got (2, 1",
    ),
    # Parameters (bad files and arrays: test_jax_parameters.py).
    (
        "export-linear",
        lambda: jax_impl.export_parameters(nnx.Linear(IN, OUT, rngs=nnx.Rngs(0))),
        TypeError,
        "`layer`: expected a PartitionedLinear, got a Linear; pass the nnx layer (for the",
    ),
    (
        "export-namesake",
        lambda: jax_impl.export_parameters(type("PartitionedLinear", (), {"__module__": "torch_impl.layer"})()),
        TypeError,
        "`layer`: expected a PartitionedLinear, got a torch_impl.PartitionedLinear; pass the nnx layer",
    ),
    (
        "load-missing",
        lambda: jax_impl.load_parameters(layer()(), "/nowhere/at-all"),
        FileNotFoundError,
        "`path`: expected a readable file, got '/nowhere/at-all' (No such file or directory); check the name.",
    ),
    (
        "load-no-path",
        lambda: jax_impl.load_parameters(layer()(), None),
        TypeError,
        "`path`: expected a str or a Path, got a NoneType; pass the file's name.",
    ),
    (
        "save-no-path",
        lambda: jax_impl.save_parameters(layer()(), 3),
        TypeError,
        "`path`: expected a str or a Path, got an int; pass the file's name.",
    ),
    (
        "export-abstract",
        lambda: jax_impl.export_parameters(nnx.eval_shape(layer())),
        ValueError,
        "`layer`: expected values in `weight`, got a ShapeDtypeStruct; use a layer that holds its values.",
    ),
    (
        "export-dense",
        lambda: linen.export_parameters({"kernel": jnp.asarray(KERNEL[0]), "bias": jnp.asarray(BIAS[0])}),
        ValueError,
        "`layer.weight`: expected shape (n, in, out) with positive sizes, got (4, 5); use the",
    ),
    (
        "import-masked",
        lambda: jax_impl.import_parameters(
            layer(use_bias=False)(), {"weight": np.ma.masked_array(KERNEL, mask=KERNEL > 0)}
        ),
        TypeError,
        "`arrays['weight']`: expected a NumPy array without a mask, got a MaskedArray; the layer is unchanged, fill",
    ),
    (
        "import-byte-order",
        lambda: jax_impl.import_parameters(layer(use_bias=False)(), {"weight": KERNEL.astype(">f4")}),
        TypeError,
        "`arrays['weight']`: expected dtype float32, got >f4; the layer is unchanged, cast one of the two.",
    ),
    (
        "load-empty-path",
        lambda: jax_impl.load_parameters(layer()(), ""),
        ValueError,
        "`path`: expected the name of a file, got ''; pass another name.",
    ),
    (
        "save-nul-path",
        lambda: jax_impl.save_parameters(layer()(), "a\0b"),
        ValueError,
        "`path`: expected the name of a file, got 'a\\x00b'; pass another name.",
    ),
    (
        "import-list",
        lambda: jax_impl.import_parameters(layer()(), [KERNEL]),
        TypeError,
        "`arrays`: expected a mapping of",
    ),
    (
        "import-jax-arrays",
        lambda: jax_impl.import_parameters(layer(use_bias=False)(), {"weight": jnp.asarray(KERNEL)}),
        TypeError,
        "`arrays['weight']`: expected a NumPy array, got an ArrayImpl; the layer is unchanged, convert it first.",
    ),
    (
        "linen-params",
        lambda: linen.export_parameters({"params": {"dense": {"kernel": KERNEL}}}),
        ValueError,
        "`params`: expected the names 'kernel' and, if any, 'bias', got 'dense'; pass the layer's own dict.",
    ),
    (
        "linen-params-list",
        lambda: linen.export_parameters([KERNEL]),
        TypeError,
        "`params`: expected a Mapping, got a list;",
    ),
]


@pytest.mark.parametrize(("bad", "error", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_bad_call_gives_one_sentence(bad, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        bad()
    sentence = str(caught.value)
    assert sentence.startswith("`")
    assert sentence.endswith(".")
    assert sentence.count("; ") == 1
    assert "\n" not in sentence


def test_there_are_enough_bad_calls():
    assert len({case[0] for case in CASES}) == len(CASES) >= 25


def test_a_good_call_is_accepted():
    """So that the cases above fail for the reason they name."""
    assert call()().shape == (2, N, OUT)
    assert call(Holder(jnp.asarray(X)), Holder(KERNEL), nnx.Param(jnp.asarray(BIAS)))().shape == (2, N, OUT)
    assert layer_call(Holder(X))().shape == (2, N, OUT)
    assert layer_call(X)().shape == (2, N, OUT)
    assert jax.tree.map(jnp.shape, linen_call()())["params"]["bias"] == (N, OUT)
    assert linen_second_call(X)().shape == (2, N, OUT)


def test_files_that_are_not_there_raise_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        jax_impl.load_parameters(layer()(), tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"^`path`: expected a file in an existing folder, got .*; create"):
        jax_impl.save_parameters(layer()(), tmp_path / "none" / "f")
