"""Parameters travel between torch, nnx and linen bit for bit, through arrays and through files, in every dtype."""

import json

import ml_dtypes
import numpy as np
import pytest

from parity_tests.judge.dtypes import STORAGE_DTYPES, numpy_dtype
from parity_tests.judge.subjects import framework_available

if not (framework_available("torch") and framework_available("jax")):
    pytest.skip("exchange needs both frameworks", allow_module_level=True)

import jax
import torch
from flax import nnx

import jax_impl
import torch_impl
from jax_impl import linen

N, I, O = 3, 5, 4  # noqa: E741 - the letters of the equation
BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def special_arrays(dtype, bias):
    """Random bit patterns: NaNs with payloads, infinities, subnormals and both zeros included."""
    rng = np.random.default_rng(5)
    target = numpy_dtype(dtype)

    def bits(shape):
        raw = rng.integers(0, 256, (*shape, target.itemsize), dtype=np.uint8)
        return raw.view(target).reshape(shape)

    arrays = {"weight": bits((N, I, O))} | ({"bias": bits((N, O))} if bias else {})
    arrays["weight"].ravel()[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-39 if target.itemsize > 2 else 1e-7]
    return arrays


def same_bits(first, second):
    assert first.keys() == second.keys()
    for name, array in first.items():
        other = np.asarray(second[name])
        assert other.dtype == array.dtype
        assert other.shape == array.shape
        assert array.tobytes() == np.ascontiguousarray(other).tobytes(), name


def stored(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def torch_layer(dtype, bias, masked=False):
    layer_class = torch_impl.MaskedPartitionedLinear if masked else torch_impl.PartitionedLinear
    return layer_class(N, I, O, bias=bias, dtype=getattr(torch, dtype))


def nnx_layer(dtype, bias):
    return jax_impl.PartitionedLinear(N, I, O, use_bias=bias, param_dtype=numpy_dtype(dtype), rngs=nnx.Rngs(0))


@pytest.fixture(params=STORAGE_DTYPES)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("masked", [False, True], ids=["compact", "masked"])
def test_arrays_travel_both_ways(dtype, bias, masked):
    arrays = special_arrays(dtype, bias)
    torch_side = torch_layer(dtype, bias, masked)
    torch_impl.import_parameters(torch_side, arrays)
    jax_side = nnx_layer(dtype, bias)
    jax_impl.import_parameters(jax_side, torch_impl.export_parameters(torch_side))
    params = linen.import_parameters(
        {"kernel": np.zeros((N, I, O), numpy_dtype(dtype))}
        | ({"bias": np.zeros((N, O), numpy_dtype(dtype))} if bias else {}),
        jax_impl.export_parameters(jax_side),
    )
    back = torch_layer(dtype, bias, masked)
    torch_impl.import_parameters(back, linen.export_parameters(params))
    same_bits(arrays, torch_impl.export_parameters(back))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_files_travel_both_ways(dtype, bias, tmp_path):
    arrays = special_arrays(dtype, bias)
    torch_side = torch_layer(dtype, bias)
    torch_impl.import_parameters(torch_side, arrays)
    torch_impl.save_parameters(torch_side, tmp_path / "torch.safetensors")
    jax_side = nnx_layer(dtype, bias)
    jax_impl.load_parameters(jax_side, tmp_path / "torch.safetensors")
    same_bits(arrays, jax_impl.export_parameters(jax_side))
    jax_impl.save_parameters(jax_side, tmp_path / "jax.safetensors")
    back = torch_layer(dtype, bias)
    torch_impl.load_parameters(back, tmp_path / "jax.safetensors")
    same_bits(arrays, torch_impl.export_parameters(back))
    # Both sides write the same file, up to the order of the metadata's two entries, which safetensors does not fix.
    assert stored(tmp_path / "torch.safetensors") == stored(tmp_path / "jax.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.pop("bias"), "bias"),
        (lambda a: a.update(extra=np.zeros(2, np.float32)), "extra"),
        (lambda a: a.update(weight=a["weight"][:2]), r"\(n, in, out\)"),
        (lambda a: a.update(weight=a["weight"].swapaxes(1, 2)), r"\(n, in, out\)"),
        (lambda a: a.update(bias=a["bias"].astype(np.float64)), "float64"),
        (lambda a: a.update(weight=a["weight"].astype(ml_dtypes.bfloat16)), "bfloat16"),
    ],
    ids=["missing", "extra", "mis-shaped", "transposed", "wrong dtype", "narrower dtype"],
)
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_bad_set_is_refused_whole(framework, spoil, message):
    package = {"torch": torch_impl, "jax": jax_impl}[framework]
    layer = torch_layer("float32", True) if framework == "torch" else nnx_layer("float32", True)
    before = {name: array.copy() for name, array in package.export_parameters(layer).items()}
    arrays = {name: array + 1 for name, array in before.items()}
    spoil(arrays)
    with pytest.raises((ValueError, TypeError), match=message):
        package.import_parameters(layer, arrays)
    same_bits(before, package.export_parameters(layer))


def test_converted_layers_compute_the_same():
    layer = torch_layer("float32", True)
    other = nnx_layer("float32", True)
    jax_impl.import_parameters(other, torch_impl.export_parameters(layer))
    x = np.random.default_rng(0).integers(-3, 4, (2, 7, N, I)).astype(np.float32)
    weights = {name: np.round(array * 8) for name, array in torch_impl.export_parameters(layer).items()}
    torch_impl.import_parameters(layer, weights)
    jax_impl.import_parameters(other, weights)
    assert np.array_equal(layer(torch.from_numpy(x)).detach().numpy(), np.asarray(other(x)))
