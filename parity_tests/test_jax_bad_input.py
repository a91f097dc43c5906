"""Every bad call gives one clear sentence: the argument, what was expected, what was received, what to do."""

import re

import numpy as np
import pytest

from parity_tests.harness.subjects.base import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)

import jax
import jax.numpy as jnp
from flax import nnx

import jax_impl
from jax_impl import PartitionedLinear, linen, partitioned_linear

pytestmark = pytest.mark.usefixtures("quick_compilation")

N, IN, OUT = 3, 4, 5
X, KERNEL, BIAS = np.ones((2, N, IN), np.float32), np.ones((N, IN, OUT), np.float32), np.ones((N, OUT), np.float32)
NAMES = "'loop', 'masked', 'einsum', 'vmap', 'matmul', 'grouped_conv', 'grouped_matmul'"
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
        "got (2, 12); split its last axis with x.reshape(*x.shape[:-1], 3, 4).",
    ),
    ("x-one-partition", call(X[:, :1]), ValueError, "got (2, 1, 4); a shared input is not broadcast, use jnp.broad"),
    ("x-wrong-n", call(X[:, :2]), ValueError, "got (2, 2, 4); move the partition axis next to last and the features"),
    (
        "x-wrong-in",
        call(X[..., :3]),
        ValueError,
        "expected shape (..., n, in) = (..., 3, 4), got (2, 3, 3); give sizes per partition, never",
    ),
    ("x-one-feature", call(X[..., :1]), ValueError, "expected shape (..., n, in) = (..., 3, 4), got (2, 3, 1);"),
    ("x-swapped", call(X.swapaxes(1, 2)), ValueError, "got (2, 4, 3); swap its last two axes with x.mT."),
    ("x-partitions-first", call(np.ones((N, 2, IN), np.float32)), ValueError, "got (3, 2, 4); move the partition axis"),
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
    # Names and options of the function.
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
        "`precision`: expected a name or a jax.lax.Precision, got a int; pass one.",
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
        "`kernel_metadata`: expected a Mapping, got a int; pass a dict.",
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
    # The linen layer.
    (
        "linen-features",
        linen_call(features=0),
        ValueError,
        "`features`: expected a positive int, got 0; pass at least 1.",
    ),
    ("linen-bias", linen_call(use_bias=1), TypeError, "`use_bias`: expected a bool, got a int; pass True or False."),
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
        "`path`: expected a str or a Path, got a int; pass the file's name.",
    ),
    (
        "export-abstract",
        lambda: jax_impl.export_parameters(nnx.eval_shape(layer())),
        ValueError,
        "`layer`: expected values in `weight`, got a ShapeDtypeStruct; use a layer that holds its values.",
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
        "`arrays['weight']`: expected a NumPy array, got a ArrayImpl; the layer is unchanged.",
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
    assert layer_call(X)().shape == (2, N, OUT)
    assert jax.tree.map(jnp.shape, linen_call()())["params"]["bias"] == (N, OUT)
    assert linen_second_call(X)().shape == (2, N, OUT)


def test_files_that_are_not_there_raise_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        jax_impl.load_parameters(layer()(), tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"^`path`: expected a file in an existing folder, got .*; create"):
        jax_impl.save_parameters(layer()(), tmp_path / "none" / "f")
