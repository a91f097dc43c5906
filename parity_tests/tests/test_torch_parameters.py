"""Torch parameters in and out: canonical arrays, files, state_dicts of linears; whole or not at all."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import safetensors.numpy
import torch
from torch import nn

from torch_impl import (
    MaskedPartitionedLinear,
    PartitionedLinear,
    export_parameters,
    import_parameters,
    load_parameters,
    save_parameters,
)
from torch_impl.linears import partitions_from_linears
from torch_impl.parameters import state_dict_from_linears
from torch_impl.registry import DTYPE_NAMES

LAYERS = [PartitionedLinear, MaskedPartitionedLinear]
NUMPY = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
METADATA = {"format": "partitioned_linear", "format_version": "1"}


def special_arrays(dtype, bias=True, sizes=(3, 4, 5)):
    """Every bit pattern is fair: NaN payloads, infinities, signed zeros, subnormals."""
    generator = np.random.default_rng(0)
    n, i, o = sizes
    kind = np.dtype(NUMPY[dtype])
    unsigned = UNSIGNED[kind.itemsize]
    arrays = {}
    for name, shape in {"weight": (n, i, o), "bias": (n, o)}.items():
        values = generator.integers(0, np.iinfo(unsigned).max, shape, dtype=unsigned, endpoint=True).view(kind)
        values.reshape(-1)[:4] = np.array([0.0, -0.0, np.inf, -np.inf], dtype=np.float32).astype(kind)
        arrays[name] = values
    return arrays if bias else {"weight": arrays["weight"]}


def same_bits(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and np.array_equal(
            np.ascontiguousarray(left[name]).view(UNSIGNED[left[name].itemsize]),
            np.ascontiguousarray(right[name]).view(UNSIGNED[right[name].itemsize]),
        )
        for name in left
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("kind", LAYERS)
def test_arrays_and_files_round_trip_bit_for_bit(kind, dtype, bias, tmp_path):
    layer = kind(3, 4, 5, bias=bias, dtype=getattr(torch, dtype))
    arrays = special_arrays(dtype, bias)
    import_parameters(layer, arrays)
    assert same_bits(export_parameters(layer), arrays)
    save_parameters(layer, tmp_path / "layer.safetensors")
    other = kind(3, 4, 5, bias=bias, dtype=getattr(torch, dtype))
    load_parameters(other, str(tmp_path / "layer.safetensors"))
    assert same_bits(export_parameters(other), arrays)


@pytest.mark.parametrize("dtype", NUMPY)
def test_compact_and_masked_layers_exchange_parameters(dtype):
    compact = PartitionedLinear(3, 4, 5, dtype=getattr(torch, dtype))
    masked = MaskedPartitionedLinear(3, 4, 5, dtype=getattr(torch, dtype))
    import_parameters(masked, export_parameters(compact))
    assert same_bits(export_parameters(masked), export_parameters(compact))
    assert (masked.weight[~masked.mask] == 0).all()


def test_strided_and_read_only_arrays_are_taken():
    layer = PartitionedLinear(3, 4, 5)
    weight = np.asfortranarray(np.arange(60, dtype=np.float32).reshape(3, 4, 5))
    bias = np.zeros((3, 5), np.float32)[:, ::-1]
    weight.flags.writeable = False
    import_parameters(layer, {"weight": weight, "bias": bias})
    assert np.array_equal(export_parameters(layer)["weight"], weight)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("kind", LAYERS)
def test_arrays_share_no_memory_with_a_layer(kind, dtype):
    layer, arrays = kind(3, 4, 5, dtype=getattr(torch, dtype)), special_arrays(dtype)
    kept = {name: array.copy() for name, array in arrays.items()}
    import_parameters(layer, arrays)
    for array in (*arrays.values(), *export_parameters(layer).values()):
        array[...] = 7
    exported = export_parameters(layer)
    assert same_bits(exported, kept)
    # Nor does an export follow what becomes of its layer.
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7)
    assert same_bits(exported, kept)
    assert not same_bits(export_parameters(layer), kept)


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_tensors_of_linears_are_copies_without_gradient(dtype):
    linears = nn.ModuleList(nn.Linear(4, 5, dtype=dtype) for _ in range(3))
    for stacked in (partitions_from_linears(linears), state_dict_from_linears(dict(linears.named_parameters()))):
        kept = {name: tensor.clone() for name, tensor in stacked.items()}
        assert kept.keys() == {"weight", "bias"}
        assert not any(tensor.requires_grad for tensor in stacked.values())
        with torch.no_grad():
            for parameter in linears.parameters():
                parameter.add_(1)
        assert all(torch.equal(stacked[name], tensor) for name, tensor in kept.items())
    # The parameters that were stacked have gradients.
    assert all(parameter.requires_grad for parameter in linears.parameters())


def test_imported_parameters_keep_their_identity():
    layer = PartitionedLinear(3, 4, 5)
    parameters = list(layer.parameters())
    import_parameters(layer, special_arrays("float32"))
    assert all(old is new for old, new in zip(parameters, layer.parameters(), strict=True))


GOOD = special_arrays("float32")
REFUSED_ARRAYS = {
    "missing": ({"weight": GOOD["weight"]}, ValueError, r"exactly the names 'bias', 'weight', got 'weight'"),
    "extra": ({**GOOD, "scale": GOOD["bias"]}, ValueError, r"got 'bias', 'scale', 'weight'"),
    "shape": ({**GOOD, "bias": GOOD["bias"][:, :4]}, ValueError, r"shape \(n, out\) = \(3, 5\), got \(3, 4\)"),
    "transposed": (
        {**GOOD, "weight": GOOD["weight"].swapaxes(1, 2)},
        ValueError,
        r"shape \(n, in, out\) = \(3, 4, 5\), got \(3, 5, 4\)",
    ),
    "dtype": ({**GOOD, "bias": GOOD["bias"].astype(np.float64)}, TypeError, r"dtype float32, got float64"),
    "byte-order": ({**GOOD, "bias": GOOD["bias"].astype(">f4")}, TypeError, r"dtype float32, got >f4"),
    "list": ({**GOOD, "bias": GOOD["bias"].tolist()}, TypeError, r"a NumPy array, got a list"),
}


@pytest.mark.parametrize(("arrays", "error", "message"), REFUSED_ARRAYS.values(), ids=REFUSED_ARRAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_arrays_are_refused_whole(kind, arrays, error, message):
    layer = kind(3, 4, 5)
    before = export_parameters(layer)
    with pytest.raises(error, match=message):
        import_parameters(layer, arrays)
    assert same_bits(export_parameters(layer), before)


def header_only(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


REFUSED_FILES = {
    "not-safetensors": (lambda: b"no such format", ValueError, r"expected a safetensors file, got"),
    "empty": (lambda: b"", ValueError, r"expected a safetensors file, got"),
    "truncated": (lambda: safetensors.numpy.save(GOOD, METADATA)[:-1], ValueError, r"expected a safetensors file, got"),
    "foreign": (lambda: safetensors.numpy.save(GOOD), ValueError, r"format 'partitioned_linear', got None"),
    "version": (
        lambda: safetensors.numpy.save(GOOD, {**METADATA, "format_version": "2"}),
        ValueError,
        r"format version '1', got '2'",
    ),
    "no-version": (
        lambda: safetensors.numpy.save(GOOD, {"format": "partitioned_linear"}),
        ValueError,
        r"format version '1', got None",
    ),
    "missing": (lambda: safetensors.numpy.save({"weight": GOOD["weight"]}, METADATA), ValueError, r"exactly the names"),
    "extra": (lambda: safetensors.numpy.save({**GOOD, "b": GOOD["bias"]}, METADATA), ValueError, r"exactly the names"),
    "shape": (
        lambda: safetensors.numpy.save({**GOOD, "bias": GOOD["bias"].T.copy()}, METADATA),
        ValueError,
        r"shape \(n, out\) = \(3, 5\), got \(5, 3\)",
    ),
    "dtype": (lambda: safetensors.numpy.save(special_arrays("float16"), METADATA), TypeError, r"float32, got float16"),
    "integers": (
        lambda: safetensors.numpy.save({**GOOD, "bias": np.zeros((3, 5), np.int32)}, METADATA),
        TypeError,
        r"'bias' in one of F64, F32, BF16, F16, got I32",
    ),
    "header-only": (
        lambda: header_only({"__metadata__": METADATA}),
        ValueError,
        r"exactly the names",
    ),
}


@pytest.mark.parametrize(("content", "error", "message"), REFUSED_FILES.values(), ids=REFUSED_FILES)
def test_wrong_files_are_refused_whole(content, error, message, tmp_path):
    path = tmp_path / "layer.safetensors"
    path.write_bytes(content())
    layer = PartitionedLinear(3, 4, 5)
    before = export_parameters(layer)
    with pytest.raises(error, match=message):
        load_parameters(layer, path)
    assert same_bits(export_parameters(layer), before)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "layer.safetensors"
    layer = PartitionedLinear(3, 4, 5)
    save_parameters(layer, path)
    old = path.read_bytes()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    layer.reset_parameters()
    with pytest.raises(OSError, match="disk full"):
        save_parameters(layer, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]


def test_file_contents_are_as_documented(tmp_path):
    path = tmp_path / "layer.safetensors"
    layer = PartitionedLinear(3, 4, 5)
    save_parameters(layer, path)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == METADATA
        assert set(file.keys()) == {"weight", "bias"}
        assert np.array_equal(file.get_tensor("weight"), export_parameters(layer)["weight"])


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
@pytest.mark.parametrize("prefix", ["", "model.heads."])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_of_a_module_list(bias, prefix, dtype):
    linears = nn.ModuleList(nn.Linear(4, 5, bias=bias, dtype=dtype) for _ in range(11))
    state = {prefix + key: value for key, value in linears.state_dict().items()}
    if prefix:
        state["model.other.weight"] = torch.zeros(1)
    layer = PartitionedLinear(11, 4, 5, bias=bias, dtype=dtype)
    layer.load_state_dict(state_dict_from_linears(state, prefix))
    assert same_bits(export_parameters(layer), export_parameters(PartitionedLinear.from_linears(linears)))
