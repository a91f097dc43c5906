"""check_pair: what modules take and return besides one array: trees, keywords, numbers, outputs that correspond."""

import copy
import dataclasses
import json
import warnings
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("flax", reason="flax is not installed here")

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch.utils.checkpoint import checkpoint

from parity_tests.pair import MappingError, check_pair, propose_mapping
from parity_tests.pair.draws import checked_scale, draw_inputs
from parity_tests.pair.loading import _packed, _unpacked

RULES = [("dense.weight", "dense.kernel", "o i -> i o"), ("dense.bias", "dense.bias")]
MASK = np.random.default_rng(0).random((3, 5)) > 0.5


class Torch(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.dense, self.call = torch.nn.Linear(6, 5), call

    def forward(self, *inputs, **named):
        return self.call(self.dense, *inputs, **named)


class Nnx(nnx.Module):
    def __init__(self, call):
        self.dense, self.call = nnx.Linear(6, 5, rngs=nnx.Rngs(0)), call

    def __call__(self, *inputs, **named):
        return self.call(self.dense, *inputs, **named)


class Linen(nn.Module):
    call: Any

    @nn.compact
    def __call__(self, *inputs, **named):
        return self.call(nn.Dense(5, name="dense"), *inputs, **named)


def judged(of_torch, of_flax, module=Nnx, /, **changes):
    sides = {"torch_module": Torch(of_torch), "flax_module": module(of_flax)}
    return check_pair(**sides | {"params": RULES, "inputs": ((3, 6),)} | changes)


def tensors(report):
    return {row.tensor for row in report.rows if row.rung != "weights"}


@dataclasses.dataclass
class Batch:
    x: Any
    mask: Any
    factor: int = 2
    name: str = "batch"


class Fields(NamedTuple):
    x: Any
    mask: Any


def where(framework):
    """A masked layer, with the masked numbers of each framework."""
    select = {"torch": torch.where, "jax": jnp.where}[framework]
    return lambda dense, x, mask: select(mask, dense(x), 0.0)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("inputs", "unpacked", "gradient"),
    [
        ({"x": (3, 6), "mask": MASK}, None, "d_input.x"),
        ({0: (3, 6), "mask": MASK}, None, "d_input0"),
        ((defaultdict(list, {"x": (3, 6), "mask": MASK}),), lambda b: (b["x"], b["mask"]), "d_input0.x"),
        (([{"x": [(3, 6)]}, MASK],), lambda b: (b[0]["x"][0], b[1]), "d_input0.0.x.0"),
        ((Batch((3, 6), MASK),), lambda b: (b.x * b.factor, b.mask), "d_input0.x"),
        ((Fields((3, 6), MASK), None, 0.5), lambda b, none, n: (b.x * (1 if none else n), b.mask), "d_input0.x"),
        (lambda rng: {"x": rng.standard_normal((3, 6)), "mask": MASK}, None, "d_input.x"),
    ],
)
def test_inputs_of_any_structure_are_taken_by_both_sides(inputs, unpacked, gradient):
    def call(framework):
        run = where(framework)
        return run if unpacked is None else (lambda dense, *inputs: run(dense, *unpacked(*inputs)))

    module = Linen if isinstance(inputs, dict) else Nnx
    report = judged(call("torch"), call("jax"), module, inputs=inputs)
    report.assert_ok()
    assert tensors(report) == {"y", "d_dense.weight", "d_dense.bias", gradient}
    wrong = lambda dense, *a, **k: 1.0001 * call("jax")(dense, *a, **k)  # noqa: E731
    assert not judged(call("torch"), wrong, module, inputs=inputs, gradients=False).ok


def test_a_first_operation_that_works_in_place_sees_the_inputs_of_a_tree_unchanged():
    def in_place(dense, batch, mask):
        batch["x"][0].mul_(2.0)
        mask.logical_not_()
        return torch.where(mask, dense(batch["x"][0]), 0.0)

    inputs = ({"x": [(3, 6)]}, MASK)
    judged(in_place, lambda dense, b, m: jnp.where(~m, dense(2.0 * b["x"][0]), 0.0), inputs=inputs).assert_ok()
    assert not judged(
        in_place, lambda dense, b, m: jnp.where(~m, dense(b["x"][0]), 0.0), inputs=inputs, gradients=False
    ).ok


def test_sides_take_inputs_under_other_names_and_in_another_order():
    sides = {
        "inputs": {"x": (3, 6), "mask": MASK},
        "torch_call": lambda call, x, mask: call(x, attention_mask=mask)["logits"],
        "flax_call": lambda call, x, mask: call((mask, x)),
    }
    calls = (
        lambda dense, x, attention_mask: {"logits": where("torch")(dense, x, attention_mask), "loss": None},
        lambda dense, pair: where("jax")(dense, *reversed(pair)),
    )
    judged(*calls, Linen, **sides).assert_ok()
    modules = {"torch_module": Torch(calls[0]), "flax_module": Linen(calls[1])}
    assert propose_mapping(**modules, **sides).left == ()


def test_an_adapter_sees_the_state_of_every_call():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            count = self.variable("state", "count", lambda: jnp.zeros(()))
            count.value = count.value + 1.0
            return nn.Dense(5, name="dense")(x) * count.value

    class TorchCounting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = torch.nn.Linear(6, 5)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1.0
            return self.dense(x) * self.count

    def twice(call, x):
        return call(x) + call(x)

    pair = {
        "torch_module": TorchCounting(),
        "flax_module": Counting(),
        "params": [*RULES, ("count", "state.count")],
        "inputs": ((3, 6),),
        "flax_kwargs": {"mutable": ["state"]},
    }
    check_pair(**pair, torch_call=lambda call, x: call(x) + call(x), flax_call=twice).assert_ok()
    assert not check_pair(**pair, torch_call=twice, flax_call=lambda call, x: 2 * call(x), gradients=False).ok


@dataclasses.dataclass
class Result:
    logits: Any
    hidden: Any
    name: str = "result"
    past: Any = None


@flax.struct.dataclass
class Struct:
    logits: Any
    hidden: Any
    name: str = flax.struct.field(pytree_node=False, default="struct")


class ModelOutput(OrderedDict):
    """An ordered dict with attributes, as the transformers library returns."""

    def __getattr__(self, name):
        return self[name]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("torch_kind", "flax_kind"), [(Result, Struct), (Result, Result), (ModelOutput, Struct), (dict, dict)]
)
def test_outputs_of_any_structure_are_compared_leaf_by_leaf(torch_kind, flax_kind):
    def call(kind, factor=2.0):
        return lambda dense, x: kind(logits=dense(x), hidden=[dense(x) * factor, None])

    report = judged(call(torch_kind), call(flax_kind), Linen)
    report.assert_ok()
    assert {"y.logits", "y.hidden.0"} <= tensors(report)
    wrong = judged(call(torch_kind), call(flax_kind, 2.001), gradients=False)
    assert {row.tensor for row in wrong.rows if row.status == "mismatch"} == {"y.hidden.0"}


@dataclasses.dataclass(frozen=True)
class Registered:
    first: Any
    second: Any


jax.tree_util.register_dataclass(Registered, ["first"], ["second"])


def test_a_registered_class_has_the_leaves_that_its_framework_sees():
    made = lambda dense, x: Registered(dense(x), "static")  # noqa: E731
    judged(made, made, gradients=False).assert_ok()


def test_numbers_of_python_are_outputs():
    dtypes = ("bfloat16", "float64")

    def numbers(dense, x, number=0.1):
        return dense(x), number, 3, True

    judged(numbers, numbers, dtypes=dtypes).assert_ok()
    for wrong in (0.1000001, None):
        changed = lambda dense, x, n=wrong: numbers(dense, x, n) if n else (dense(x), 0.1, 4, True)  # noqa: E731
        assert not judged(numbers, changed, gradients=False).ok
    # A number of Python's has no gradient, whatever the other side's array has.
    report = judged(lambda dense, x: (dense(x), dense(x).sum().item()), lambda dense, x: (dense(x), dense(x).sum()))
    report.assert_ok()
    assert any("y.1 is a number of Python's" in note for note in report.notes)
    detached = judged(lambda dense, x: (dense(x), dense(x).sum().detach()), lambda dense, x: (dense(x), dense(x).sum()))
    assert detached.first_failing_rung == "gradients"


def test_outputs_correspond_as_declared():
    torch_call = lambda dense, x: (dense(x), 2 * dense(x), object())  # noqa: E731
    flax_call = lambda dense, x: {"twice": 2 * dense(x), "once": dense(x), "unused": jnp.nan * dense(x)}  # noqa: E731
    with pytest.raises(ValueError, match=r"y\.0, y\.1, y\.2 from torch and y\.once, .* by outputs=, such as"):
        judged(lambda dense, x: (*torch_call(dense, x)[:2], 1), flax_call)
    report = judged(torch_call, flax_call, outputs=[("0", "once"), ("y.1", "twice")])
    report.assert_ok()
    assert {"y.0", "y.1"} <= tensors(report)
    assert not judged(torch_call, flax_call, outputs={"0": "twice", "1": "once"}, gradients=False).ok
    # A container stands for all that it holds; patterns go by the torch side's names and positions.
    nested = judged(
        lambda dense, x: {"states": (dense(x), 2 * dense(x)), "more": object()},
        lambda dense, x: [(dense(x).T, 2 * dense(x))],
        outputs=[("states", "0")],
        output_patterns={"states.0": "b o -> o b", "y.states.1": "b o -> b o"},
    )
    nested.assert_ok()
    assert {"y.states.0", "y.states.1"} <= tensors(nested)
    judged(lambda dense, x: (dense(x), 1), lambda dense, x: dense(x), outputs=[("0", "y")], gradients=False).assert_ok()


def test_options_name_inputs_by_position_or_name():
    source = {0: {"x": (3, 6), "ids": np.arange(3)}, "mask": (2, 2)}
    plain, wide = draw_inputs(source, 0), draw_inputs(source, 0, {"0.x": 4.0, "mask": 2.0})
    assert plain.layout.names == ("input0.x", "input0.ids", "input.mask")
    np.testing.assert_array_equal(wide.arrays[0], 4.0 * plain.arrays[0])
    np.testing.assert_array_equal(wide.arrays[2], 2.0 * plain.arrays[2])
    np.testing.assert_array_equal(draw_inputs(source, 0, 4.0).arrays[2], 4.0 * plain.arrays[2])
    assert checked_scale({"input0.x": 4.0, "input.mask": 2.0, "w": 3.0}, plain, ["w"])
    for wrong in ("0.ids", "x", 0, 1):  # an array that is given, no name, a dict, no position
        with pytest.raises(ValueError, match=r"scale: expected positions of inputs .* \(0\.x, 'mask'\) or"):
            checked_scale({wrong: 4.0}, plain, ["w"])
    found = plain.layout.filled(plain.arrays)
    assert found[0][0].keys() == {"x", "ids"}
    assert found[1]["mask"] is plain.arrays[2]
    left_out = judged(
        lambda dense, x: dense(x), lambda dense, x: dense(x), inputs={"x": (3, 6)}, not_compared=["d_input.x"]
    )
    left_out.assert_ok()
    assert left_out.not_compared == ("the gradient of input.x, left out by not_compared=",)


def test_layouts_may_group_and_split_axes_by_position_or_name():
    inputs = {"x": (3, 2, 6), "mask": MASK}

    def grouped(dense, x, mask):
        return dense(x)[:, :1] * mask[:, None]

    flax = {"inputs": inputs, "input_patterns": {"x": "b h i -> (b h) i", "input.mask": "b o -> b 1 o"}}
    report = judged(
        grouped,
        lambda dense, x, mask: dense(x.reshape(3, 2, 6))[:, 0] * mask[:, 0],
        **flax,
        output_patterns={0: "b 1 o -> b o"},
    )
    report.assert_ok()
    assert "d_input.x" in tensors(report)
    split = {"inputs": ((6, 6),), "input_patterns": {0: ("(b h) i -> b h i", {"h": 2})}}
    judged(
        lambda dense, x: dense(x), lambda dense, x: dense(x), **split, output_patterns={"y": "(b h) o -> b h o"}
    ).assert_ok()
    # Another order of the grouped axes is another function; another size is a mismatch, not an error.
    shaped = {"inputs": ((3, 3, 6),), "output_patterns": {"y": "a b o -> (a b) o"}}
    swapped = lambda dense, x: dense(x).swapaxes(0, 1).reshape(9, 5)  # noqa: E731
    assert not judged(lambda dense, x: dense(x), swapped, **shaped, gradients=False).ok
    short = judged(lambda dense, x: dense(x), lambda dense, x: dense(x[:, 0]), **shaped, gradients=False)
    assert "y has shape (3, 5), expected (3, 3, 5)" in short.describe()


def test_noise_and_masks_are_inputs_like_others():
    def noisy(framework, factor=1.0):
        exp = {"torch": torch.exp, "jax": jnp.exp}[framework]
        return lambda dense, x, noise, keep: (dense(x) + factor * noise * exp(dense(x) / 2)) * keep / 0.5

    inputs = ((3, 6), (3, 5), MASK)
    report = judged(noisy("torch"), noisy("jax"), inputs=inputs)
    report.assert_ok()
    assert {"d_input0", "d_input1"} <= tensors(report)
    assert not judged(noisy("torch"), noisy("jax", 1.0001), inputs=inputs, gradients=False).ok
    # Without them it is refused, with what to do.
    drawn = judged(lambda dense, x: torch.nn.functional.dropout(dense(x)), lambda dense, x: dense(x))
    assert not drawn.ok
    assert "module.eval()" in drawn.describe()
    assert "feed the mask or the noise to both sides as an input" in drawn.describe()


def test_no_cast_on_the_way_drops_a_part_of_a_value():
    """Complex numbers, 64-bit integers and booleans in trees, with every warning about a cast an error."""

    def call(framework, conjugate=False):
        conj = {"torch": torch.conj, "jax": jnp.conj}[framework] if conjugate else (lambda z: z)

        def run(dense, batch, ids):
            wave = batch["z"] * dense(batch["x"])
            return {"wave": conj(wave), "rest": (abs(wave), ids * 2 - ids, batch["on"], 0.1 + 0.2j)}

        return run

    rng = np.random.default_rng(0)
    wave = (rng.standard_normal((3, 5)) + 1j * rng.standard_normal((3, 5))).astype(np.complex64)
    inputs = ({"x": (3, 6), "z": wave, "on": MASK}, np.asarray([2**31 - 1, -5]))
    names = {"y.wave", "y.rest.0", "y.rest.1", "y.rest.2", "y.rest.3"}
    layouts = {"input_patterns": {"0.z": "b o -> b o"}, "output_patterns": {"wave": "b o -> b o"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = judged(call("torch"), call("jax"), inputs=inputs, dtypes=("bfloat16",), **layouts)
        report.assert_ok()
        assert names | {"d_input0.z", "d_input0.x"} <= tensors(report)
        assert not judged(call("torch"), call("jax", True), inputs=inputs, gradients=False).ok
        with pytest.raises(ValueError, match=r"inputs\[1\]: expected integers that fit in 32 bits"):
            judged(call("torch"), call("jax"), inputs=(inputs[0], np.asarray([2**40, -5])), gradients=False)
        # The warning that is an error here is one that a cast raises.
        with pytest.raises(ValueError, match=r"\bCasting\b.* complex"):
            judged(call("torch"), lambda *a: call("jax")(*a)["wave"].astype(jnp.float32), inputs=inputs)


def test_positions_and_flags_are_judged_as_they_are():
    embed = lambda dense, x, index, on: dense(x)[index] * on  # noqa: E731
    report = judged(embed, embed, inputs=((3, 6), np.asarray([2, 0]), np.asarray([True, False])[:, None]))
    report.assert_ok()
    assert {"d_input1", "d_input2"}.isdisjoint(tensors(report))


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(torch.relu(self.dense(x)))


class NnxNormed(nnx.Module):
    def __init__(self, epsilon=1e-5):
        self.dense = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(5, epsilon=epsilon, momentum=0.9, use_running_average=True, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(jax.nn.relu(self.dense(x)))


@pytest.mark.sample(2)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(9, 6))])
def test_scripted_and_traced_modules_are_judged_and_left_as_they_were(compiled):
    module = compiled(Normed().eval())
    before = copy.deepcopy(module.state_dict())
    norm = [("norm.weight", "norm.scale"), ("norm.bias", "norm.bias")]
    norm += [("norm.running_mean", "norm.mean"), ("norm.running_var", "norm.var")]
    pair = {"torch_module": module, "params": [*RULES, *norm], "inputs": ((9, 6),)}
    check_pair(**pair, flax_module=NnxNormed(), dtypes=("bfloat16",)).assert_ok()
    assert not check_pair(**pair, flax_module=NnxNormed(1e-6), gradients=False).ok
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_backward_pass_that_runs_the_module_again_has_the_same_parameters():
    def recomputed(dense, x):
        return checkpoint(lambda h: torch.tanh(dense(h)), x, use_reentrant=False)

    judged(recomputed, lambda dense, x: jnp.tanh(dense(x))).assert_ok()


def test_one_dtype_can_be_demanded():
    wide = lambda dense, x: (dense(x).astype(jnp.float32), dense(x).argmax(-1))  # noqa: E731
    plain = lambda dense, x: (dense(x), dense(x).argmax(-1))  # noqa: E731
    dtypes = ("float32", "bfloat16")
    noted = judged(plain, wide, dtypes=dtypes, gradients=False)
    noted.assert_ok()
    (row,) = [row for row in noted.rows if row.tensor == "y.0" and (row.framework, row.dtype) == ("jax", "bfloat16")]
    assert "flax returns y.0 in float32 where bfloat16 is judged" in row.note
    report = judged(plain, wide, dtypes=dtypes, dtypes_equal=True, gradients=False)
    (row,) = [row for row in report.rows if row.status == "mismatch"]
    assert (row.tensor, row.dtype) == ("y.0", "bfloat16")
    assert row.reason.startswith("y.0 is bfloat16 on the torch side and float32 on the flax side")
    assert report.likely_cause == row.reason
    # The positions have 64 bits on one side and 32 on the other, as each framework has them.
    judged(plain, plain, dtypes=dtypes, dtypes_equal=True, gradients=False).assert_ok()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"inputs": {"x y": (3, 6)}},
            ValueError,
            r"inputs: expected a dict with arguments by name.*got the keys 'x y'",
        ),
        ({"inputs": {1: (3, 6)}}, ValueError, r"inputs: expected .* by the numbers from 0.*got the keys 1"),
        ({"inputs": {"x": object}}, TypeError, r"inputs\['x'\]: expected a shape .* got <class 'object'>"),
        ({"inputs": ({"x": torch.ones(3)},)}, TypeError, r"inputs\[0\.x\]: expected a shape .* got Tensor of"),
        (
            {"inputs": {"x": (3, 6)}, "torch_kwargs": {"x": 1}},
            ValueError,
            "torch_kwargs: expected no input again, got x",
        ),
        ({"flax_call": 3}, TypeError, "flax_call: expected a function such as lambda call, x, mask: .*, got 3"),
        ({"torch_call": dict}, TypeError, "torch_call: expected a function .*, got <class 'dict'>"),
        ({"outputs": ["z"]}, ValueError, r"outputs: expected names of the torch side's outputs \(y\), got 'y.z'"),
        ({"outputs": [("y", "z")]}, ValueError, r"outputs: expected names of the flax side's outputs \(y\), got 'y.z'"),
        ({"outputs": []}, ValueError, "outputs: expected at least one name, got none"),
        ({"outputs": 3.5}, ValueError, r"outputs: expected names such as 'logits', or pairs .*, got 3\.5"),
        ({"outputs": [("a", "b", "c")]}, ValueError, r"outputs: expected names .* got \('a', 'b', 'c'\)"),
        (
            {"outputs": [("y", "a"), ("y", "b")]},
            ValueError,
            "outputs: expected every output once, got y of torch twice",
        ),
        (
            {"output_patterns": {1: "b o -> o b"}},
            MappingError,
            "output_patterns: expected names among y, got 1; .* position",
        ),
        ({"output_patterns": {0: "b -> b"}}, MappingError, r"output_patterns\[0\]: expected 2 axes .* got 'b -> b'"),
        ({"output_patterns": {0: 3}}, MappingError, r"output_patterns\[0\]: expected an axis pattern .* got 3"),
        ({"input_patterns": {0: "(a b) i -> a b i"}}, MappingError, r"input_patterns: expected a permutation .* sizes"),
        ({"input_patterns": {0: "b i -> i b", "input0": "b i -> i b"}}, MappingError, "expected one pattern an input"),
    ],
)
def test_calls_that_cannot_be_made_get_one_sentence(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        judged(lambda dense, x: dense(x), lambda dense, x: dense(x), **changes)
    assert "\n" not in str(caught.value)


def test_a_layout_goes_to_another_interpreter_and_comes_out_the_same():
    source = {0: {"x": [(3, 6)], 1: None}, "rest": ((2,), 0.5, "text", True)}
    layout = draw_inputs(source, 0).layout

    def sent(value):
        message, payload = _packed(value)
        return _unpacked({**json.loads(json.dumps(message)), "payload": payload})

    assert sent((layout, ("y.0", "y.1"))) == (layout, ("y.0", "y.1"))
    own = draw_inputs((Batch((3, 6), MASK),), 0).layout
    with pytest.raises(
        ValueError, match=r"inputs: expected .* beside another interpreter, got Batch; .* by torch_call="
    ):
        sent((own, None))


def test_an_output_that_is_no_array_is_refused_on_either_side():
    plain = lambda dense, x: (dense(x), 1)  # noqa: E731
    odd = lambda dense, x: (dense(x), object())  # noqa: E731
    for side, calls in (("torch", (odd, plain)), ("flax", (plain, odd))):
        with pytest.raises(
            TypeError, match=f"outputs: expected arrays, .* got object at y.1 from {side}; leave it out"
        ):
            judged(*calls)


@pytest.mark.usefixtures("quick_compilation")
def test_a_module_that_differentiates_itself_runs_where_no_gradient_is_asked_for():
    class Penalty(torch.nn.Linear):
        def forward(self, x):
            x = x.requires_grad_()
            (force,) = torch.autograd.grad(torch.tanh(super().forward(x)).sum(), x, create_graph=True)
            return (force.norm(dim=-1) - 1).square().mean()

    def ported(p, x, one=1.0):
        force = jax.vmap(jax.grad(lambda row: jnp.tanh(row @ p["kernel"] + p["bias"]).sum()))(x)
        return jnp.square(jnp.linalg.norm(force, axis=-1) - one).mean()

    pair = {
        "torch_module": Penalty(4, 3),
        "flax_params": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
        "params": [("weight", "kernel", "o i -> i o"), ("bias", "bias")],
        "inputs": ((5, 4),),
        "effort": "quick",
    }
    check_pair(flax_module=ported, **pair).assert_ok()
    assert not check_pair(flax_module=lambda p, x: ported(p, x, 0.0), **pair).ok
