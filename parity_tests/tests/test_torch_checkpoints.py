"""Checkpoints of lists of linears in PyTorch: numbered keys, wrappers, files, whole models, weights of other axes."""

import json

import numpy as np
import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import safetensors.torch
import torch
from torch import nn

from torch_impl import (
    MaskedPartitionedLinear,
    PartitionedLinear,
    convert_state_dict,
    export_linears,
    export_parameters,
    import_parameters,
    load_linears,
)
from torch_impl.registry import DTYPE_NAMES


class Model(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 4), heads


def linears(n=11, dtype=None):
    return nn.ModuleList(nn.Linear(4, 5, dtype=dtype) for _ in range(n))


def equal(layer, heads):
    return all(
        torch.equal(own.weight, other.weight) and torch.equal(own.bias, other.bias)
        for own, other in zip(layer.to_linears(), heads, strict=True)
    )


WRAPPED = {
    "plain": lambda state: state,
    "DistributedDataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "both": lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    "arrays": lambda state: {key: value.numpy() for key, value in state.items()},
    "another order": lambda state: dict(sorted(state.items())),  # 1, 10, 2
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("kind", [PartitionedLinear, MaskedPartitionedLinear])
def test_a_list_s_state_dict_is_taken_in_numeric_order(kind, wrap):
    heads = linears()
    for prefix, state in (("heads.", Model(heads).state_dict()), ("", heads.state_dict())):
        layer = kind(11, 4, 5)
        load_linears(layer, wrap(state), prefix=prefix)
        assert equal(layer, heads)


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
@pytest.mark.parametrize("save", [safetensors.torch.save_file, torch.save], ids=["safetensors", "torch.save"])
def test_files_are_taken_and_written_back_under_the_same_keys(save, dtype, tmp_path):
    model = Model(linears(3, dtype))
    state = model.state_dict() | {"steps": torch.tensor(7)}
    save(state, tmp_path / "old")
    layer = PartitionedLinear(3, 4, 5, dtype=dtype)
    load_linears(layer, tmp_path / "old", prefix="heads.")
    assert equal(layer, model.heads)
    back = export_linears(layer, "heads.")
    assert back.keys() == {key for key in state if key.startswith("heads.")}
    assert all(torch.equal(value, state[key]) and value.is_contiguous() for key, value in back.items())
    assert not any(value.requires_grad for value in back.values())


def test_a_list_of_sequentials_has_a_number_in_the_middle():
    critics = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(3))
    first, last = PartitionedLinear(3, 4, 5), PartitionedLinear(3, 5, 2)
    load_linears(first, critics.state_dict(), prefix="*.0.")
    load_linears(last, critics.state_dict(), prefix="*.2.")
    x = torch.randn(6, 3, 4)
    expected = torch.stack([critic(x[:, k]) for k, critic in enumerate(critics)], 1)
    torch.testing.assert_close(last(first(x).relu()), expected)
    assert export_linears(first, "*.0.").keys() | export_linears(last, "*.2.").keys() == critics.state_dict().keys()


@pytest.mark.parametrize("wrap", [name for name in WRAPPED if name != "arrays"])
def test_a_whole_model_s_checkpoint_goes_in_and_back(wrap):
    old, new = Model(linears()), Model(PartitionedLinear(11, 4, 5))
    state = WRAPPED[wrap](old.state_dict())
    kept = dict(state)
    new.load_state_dict(convert_state_dict(new, state))
    assert equal(new.heads, old.heads)
    assert torch.equal(new.body.weight, old.body.weight)
    assert state.keys() == kept.keys()
    again = Model(linears())
    again.load_state_dict(convert_state_dict(new, new.state_dict(), to="linears"))
    assert equal(new.heads, again.heads)
    # What has the layer's form already stays as it is.
    assert convert_state_dict(new, new.state_dict()).keys() == new.state_dict().keys()


def test_the_layer_itself_is_a_whole_model():
    heads, layer = linears(), PartitionedLinear(11, 4, 5)
    layer.load_state_dict(convert_state_dict(layer, WRAPPED["DistributedDataParallel"](heads.state_dict())))
    assert equal(layer, heads)


INSIDE = {
    "a compiled part": lambda key: key.replace("heads.", "heads._orig_mod."),
    "FSDP of each linear": lambda key: key.replace(".weight", "._fsdp_wrapped_module.weight").replace(
        ".bias", "._fsdp_wrapped_module.bias"
    ),
    "checkpointed and whole": lambda key: f"module._fsdp_wrapped_module.{key}".replace(
        "heads.", "heads._checkpoint_wrapped_module."
    ),
}


@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
def test_wrappers_of_parts_are_passed_over(inside):
    old, new, layer = Model(linears()), Model(PartitionedLinear(11, 4, 5)), PartitionedLinear(11, 4, 5)
    state = {inside(key): value for key, value in old.state_dict().items()}
    new.load_state_dict(convert_state_dict(new, state))
    load_linears(layer, state, prefix="heads.")
    assert equal(new.heads, old.heads)
    assert equal(layer, old.heads)


OWN = {
    "none": lambda model: model,
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "torch.compile": torch.compile,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("saved", OWN.values(), ids=OWN)
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_a_wrapped_model_takes_the_checkpoint_of_another_wrapper(saved, own):
    old, new = Model(linears(3)), Model(PartitionedLinear(3, 4, 5))
    model, state = own(new), saved(old).state_dict()
    assert model.load_state_dict(convert_state_dict(model, state), strict=False).unexpected_keys == []
    heads = new.heads if own is not torch.optim.swa_utils.AveragedModel else model.module.heads
    assert equal(heads, old.heads)
    back = convert_state_dict(model, model.state_dict(), to="linears")
    assert back.keys() - {"n_averaged"} == own(old).state_dict().keys() - {"n_averaged"}


def test_a_checkpoint_without_keys_of_the_model_is_refused():
    model, state = Model(PartitionedLinear(3, 4, 5)), Model(linears(3)).state_dict()
    with pytest.raises(ValueError, match=r"`state_dict`: expected keys of the model, .*; pass its entry 'state_dict'"):
        convert_state_dict(model, {"epoch": 3, "state_dict": state})
    with pytest.raises(ValueError, match=r"got 'net\.body\.weight'; take what is before the model's own names away"):
        convert_state_dict(model, {f"net.{key}": value for key, value in state.items()})
    with pytest.raises(ValueError, match=r"got \[1, 2, 3\]; .* keys=\[\.\.\.\] for numbers that begin"):
        load_linears(
            model.heads, {f"fc{int(key[0]) + 1}{key[1:]}": v for key, v in linears(3).state_dict().items()}, "fc"
        )
    with pytest.raises(ValueError, match=r"got one on the meta device; load them to a CPU first"):
        load_linears(model.heads, {key: value.to("meta") for key, value in linears(3).state_dict().items()})
    with pytest.raises(TypeError, match=r"expected a dtype of float64, .*, got int8; cast it first"):
        load_linears(model.heads, {key: value.to(torch.int8) for key, value in linears(3).state_dict().items()})


def test_an_index_names_the_files_of_a_checkpoint(tmp_path):
    state, layer = Model(linears(3)).state_dict(), PartitionedLinear(3, 4, 5)
    files = {key: f"model-{1 + number % 2}.safetensors" for number, key in enumerate(state)}
    for file in set(files.values()):
        safetensors.torch.save_file({key: state[key] for key in state if files[key] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    load_linears(layer, index, prefix="heads.")
    assert torch.equal(layer.weight[2].mT, state["heads.2.weight"])
    index.write_text("{}")
    with pytest.raises(ValueError, match="`path`: expected an index with a `weight_map`"):
        load_linears(layer, index, prefix="heads.")


def test_versions_of_modules_are_kept():
    model = Model(linears(2))
    converted = convert_state_dict(Model(PartitionedLinear(2, 4, 5)), model.state_dict())
    assert converted._metadata[""] == {"version": 1}


# Axes of the weights and biases of other layers: pattern, and what it stands for in numbers.
LAYOUTS = {
    "n i o": lambda w: w,
    "n o i": lambda w: w.swapaxes(1, 2),
    "(n o) i": lambda w: w.swapaxes(1, 2).reshape(-1, w.shape[1]),
    "(o n) i": lambda w: w.transpose(2, 0, 1).reshape(-1, w.shape[1]),
    "i (n o)": lambda w: w.transpose(1, 0, 2).reshape(w.shape[1], -1),
    "(n o) i 1": lambda w: w.swapaxes(1, 2).reshape(-1, w.shape[1], 1),
    " i  o(n)": lambda w: w.transpose(1, 2, 0),
}
BIASES = {
    "n o": lambda b: b,
    "(n o)": lambda b: b.reshape(-1),
    "n 1 o": lambda b: b[:, None],
    "o n": lambda b: b.T,
}


@pytest.mark.parametrize("sizes", [(3, 4, 5), (3, 4, 4)], ids=["oblong", "square"])
@pytest.mark.parametrize("as_tensors", [False, True], ids=["arrays", "tensors"])
@pytest.mark.parametrize("weight", LAYOUTS)
@pytest.mark.parametrize("bias", BIASES)
def test_axes_say_how_an_array_lies(weight, bias, as_tensors, sizes):
    source, layer = PartitionedLinear(*sizes), PartitionedLinear(*sizes)
    canonical, axes = export_parameters(source), {"weight": weight, "bias": bias}
    foreign = {"weight": LAYOUTS[weight](canonical["weight"]), "bias": BIASES[bias](canonical["bias"])}
    exported = export_parameters(source, axes=axes)
    assert all(np.array_equal(exported[name], array) for name, array in foreign.items())
    import_parameters(layer, {k: torch.tensor(v) for k, v in foreign.items()} if as_tensors else foreign, axes=axes)
    assert all(np.array_equal(array, canonical[name]) for name, array in export_parameters(layer).items())


REFUSED = {
    "a square weight is what the pattern says": (
        {"weight": np.zeros((3, 5, 4), np.float32), "bias": np.zeros((3, 5), np.float32)},
        {"weight": "n i o"},
        r"axes 'n i o' of shape \(3, 4, 5\), got \(3, 5, 4\)",
    ),
    "no guess from sizes": (
        {"weight": np.zeros((3, 5, 4), np.float32), "bias": np.zeros(15, np.float32)},
        {"bias": "(n o)"},
        r"shape \(n, in, out\) = \(3, 4, 5\), got \(3, 5, 4\)",
    ),
    "a pattern without an axis": ({}, {"weight": "n i"}, r"each of the axes n, i, o once, .* got 'n i'"),
}


@pytest.mark.parametrize(("arrays", "axes", "message"), REFUSED.values(), ids=REFUSED)
def test_axes_that_do_not_fit_are_refused(arrays, axes, message):
    layer = PartitionedLinear(3, 4, 5)
    before = export_parameters(layer)
    with pytest.raises(ValueError, match=message):
        import_parameters(layer, arrays, axes=axes)
    assert all(np.array_equal(array, before[name]) for name, array in export_parameters(layer).items())


def test_hints_name_what_would_work(tmp_path):
    state, layer = Model(linears(3)).state_dict(), PartitionedLinear(3, 4, 5)
    with pytest.raises(ValueError, match=r"got 'heads\.0\.weight'; pass the prefix 'heads\.'"):
        load_linears(layer, state, prefix="heads")
    with pytest.raises(ValueError, match=r"got \[\]; pass its entry 'state_dict'"):
        load_linears(layer, {"epoch": 3, "state_dict": state}, prefix="heads.")
    with pytest.raises(ValueError, match=r"expected 2 linears with biases, got 3 with"):
        load_linears(PartitionedLinear(2, 4, 5), state, prefix="heads.")
    with pytest.raises(ValueError, match=r"heads\.0\.weight'\]`: expected shape \(out, in\) = \(4, 5\), got \(5, 4\)"):
        load_linears(PartitionedLinear(3, 5, 4), state, prefix="heads.")
    torch.save({"model": Model(linears(3))}, tmp_path / "code")
    with pytest.raises(ValueError, match=r"that weights_only opens, got code .*; save its state_dict alone"):
        load_linears(layer, tmp_path / "code")
    named = nn.ModuleDict({"age": nn.Linear(4, 5), "sex": nn.Linear(4, 5)})
    with pytest.raises(TypeError, match=r"got a ModuleDict; its order is yours to say, pass list\(linears\.values\(\)"):
        PartitionedLinear.from_linears(named)
    with pytest.raises(TypeError, match=r"got a Sequential; .* pass list\(linears\)"):
        PartitionedLinear.from_linears(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_a_masked_layer_in_the_place_of_a_list_is_named():
    model = Model(MaskedPartitionedLinear(11, 4, 5))
    with pytest.raises(ValueError, match=r"^`model`: .* the list 'heads\.', got a MaskedPartitionedLinear; load"):
        convert_state_dict(model, Model(linears()).state_dict())
    own = model.state_dict()
    assert convert_state_dict(model, own).keys() == own.keys()
