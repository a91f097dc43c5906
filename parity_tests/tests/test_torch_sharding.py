"""Partitions over two processes: the same values, and nothing communicated."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch

from torch_impl.registry import implementation_names

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="sharding over processes needs a torch built with gloo",
    ),
]

WORKER = """
import copy, functools, json, os, random, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations
from torch_impl import MaskedPartitionedLinear, PartitionedLinear, export_parameters, partitioned_linear
from torch_impl.registry import implementation_names
from torch_impl.sharding import shard_inputs, shard_partitions

rank, store, report = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
rows = []
for name in ("auto", "matmul", "einsum"):
    for leading in ((5,), (2, 3), ()):
        torch.manual_seed(0)
        one = PartitionedLinear(4, 8, 6, implementation=name)
        many = shard_partitions(copy.deepcopy(one), mesh)
        x, dy = torch.randn(*leading, 4, 8, requires_grad=True), torch.randn(*leading, 4, 6)
        xs = shard_inputs(x.detach(), mesh).requires_grad_()
        dys = shard_inputs(dy, mesh)
        with CommDebugMode() as communication:
            y = many(xs)
            y.backward(dys)
        expected = one(x)
        expected.backward(dy)
        batch = dy.reshape(-1, 4, 6)
        # Both sums of db round, in whatever order, within gamma_(rows - 1) times the sum of magnitudes.
        unit = (batch.shape[0] - 1) * 2.0**-24
        bound = 2 * unit / (1 - unit) * batch.abs().sum(0)
        rows.append({
            "name": name,
            "collectives": communication.get_total_counts(),
            "sharded": list(y.placements) == [Shard(len(leading))]
            and all(list(p.placements) == [Shard(0)] and list(p.grad.placements) == [Shard(0)]
                    for p in many.parameters()),
            "local": list(many.weight.to_local().shape),
            "keys": list(many.state_dict()),
            "bitwise": [torch.equal(a.full_tensor(), b) for a, b in
                        ((y, expected), (xs.grad, x.grad), (many.weight.grad, one.weight.grad))],
            "db_holds": bool(((many.bias.grad.full_tensor() - one.bias.grad).abs() <= bound).all()),
        })
# However operands are placed, whole numbers that are exact in fp32 show the slightest mistake.
placed_rows = []
draw = random.Random(0)
axes = {"x": "bni", "weight": "nio", "bias": "no"}
torch.manual_seed(1)
whole = {name: torch.randint(-3, 4, (4,) * len(letters)).float() for name, letters in axes.items()}
dy = torch.randint(-3, 4, (4, 4, 4)).float()

def derived(call, operands, cotangent):
    y = call(*operands)
    gradients = torch.autograd.grad(y, operands, cotangent, create_graph=True)
    second = torch.autograd.grad(gradients[0], operands[1], torch.ones_like(gradients[0]))
    return [y, *gradients, *second]

def on(mesh, tensor, letters, placement):
    chosen = [Replicate() if letter == "-" else Shard(letters.index(letter)) for letter in placement]
    return distribute_tensor(tensor, mesh, chosen)

oracle = derived(
    lambda x, weight, bias: torch.einsum("bni,nio->bno", x, weight) + bias,
    [tensor.double().requires_grad_() for tensor in whole.values()],
    dy.double(),
)
for name in implementation_names(device="cpu"):
    call = functools.partial(partitioned_linear, implementation=name)
    chosen = [("n", "n", "n"), ("b", "-", "-"), ("n", "i", "-"), ("-", "n", "-"), ("i", "i", "-")]
    chosen += [tuple(draw.choice("-" + letters) for letters in axes.values()) for _ in range(3)]
    for placement in [*chosen, ("bn", "-n", "-n")]:
        where = mesh if len(placement[0]) == 1 else init_device_mesh("cpu", (1, 2))
        placed = zip(axes, placement, strict=True)
        operands = [on(where, whole[key], axes[key], at).requires_grad_() for key, at in placed]
        try:
            found = derived(call, operands, on(where, dy, "bno", "-" * where.ndim))
            outcome = [torch.equal(a.full_tensor().double(), b) for a, b in zip(found, oracle, strict=True)]
        except Exception as error:
            outcome = str(error)
        placed_rows.append({"name": name, "placement": placement, "outcome": outcome})
frozen = PartitionedLinear(4, 8, 6)
frozen.weight.requires_grad_(False)
frozen = {name: p.requires_grad for name, p in shard_partitions(frozen, mesh).named_parameters()}
# FSDP2's way of making a model: on the meta device, sharded, and only then with values.
torch.manual_seed(rank)
reset = {}
for label, make in {
    "auto": lambda **options: PartitionedLinear(4, 8, 6, **options),
    "odd": lambda **options: PartitionedLinear(3, 8, 6, init="flax", **options),
    "function": lambda **options: PartitionedLinear(4, 8, 6, init=torch.nn.init.xavier_uniform_, **options),
    "unequal": lambda **options: PartitionedLinear(4, (1, 4, 9, 2), (3, 5, 1, 2), **options),
    "masked": lambda **options: MaskedPartitionedLinear(3, 8, 6, **options),
}.items():
    layer = make(device="meta")
    fully_shard(layer, mesh=mesh)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    torch.manual_seed(0)
    one = make()
    torch.manual_seed(0)
    layer.reset_parameters()
    own = [parameter.full_tensor() for parameter in layer.parameters()]
    reset[label] = all(torch.equal(a, b) for a, b in zip(own, one.parameters(), strict=True))
errors = {}
plain = [tensor.clone() for tensor in whole.values()]
placed = [on(mesh, tensor, axes[key], "-") for key, tensor in whole.items()]
elsewhere = on(init_device_mesh("cpu", (1, 2)), plain[2], "no", "--")
for label, call in {
    "plain weight": lambda: partitioned_linear(placed[0], plain[1]),
    "plain x": lambda: partitioned_linear(plain[0], placed[1], implementation="loop"),
    "plain bias": lambda: partitioned_linear(*placed[:2], plain[2]),
    "placed bias": lambda: partitioned_linear(*plain[:2], placed[2]),
    "other mesh": lambda: partitioned_linear(*placed[:2], elsewhere),
    "plain input": lambda: many(torch.zeros(5, 4, 8)),
    "indivisible": lambda: shard_partitions(PartitionedLinear(3, 8, 6), mesh),
    "export": lambda: export_parameters(many),
    "parametrised": lambda: shard_partitions(parametrizations.weight_norm(PartitionedLinear(4, 8, 6)), mesh),
}.items():
    try:
        call()
    except (TypeError, ValueError) as error:
        errors[label] = str(error)
if rank == 0:
    with open(report, "w") as file:
        json.dump({"rows": rows, "placed": placed_rows, "errors": errors, "frozen": frozen, "reset": reset}, file)
dist.barrier()
dist.destroy_process_group()
# A thread of gloo's that still runs when the interpreter takes down its modules aborts the process now and then.
os._exit(0)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(folder / "report.json")],
            env=environment,
            cwd=Path(__file__).resolve().parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        messages = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(messages)
    return json.loads((folder / "report.json").read_text())


def test_every_case_ran(report):
    assert [row["name"] for row in report["rows"]] == ["auto"] * 3 + ["matmul"] * 3 + ["einsum"] * 3


def test_nothing_is_communicated(report):
    assert [row["collectives"] for row in report["rows"]] == [0] * 9


def test_everything_stays_sharded_over_partitions(report):
    assert all(row["sharded"] for row in report["rows"])
    assert all(row["local"] == [2, 8, 6] for row in report["rows"])
    assert all(row["keys"] == ["weight", "bias"] for row in report["rows"])


def test_values_are_those_of_one_device(report):
    assert [row["bitwise"] for row in report["rows"]] == [[True, True, True]] * 9
    assert all(row["db_holds"] for row in report["rows"])


def test_shards_are_initialised_as_one_process_does(report):
    assert report["reset"] == dict.fromkeys(("auto", "odd", "function", "unequal", "masked"), True)


def test_frozen_parameters_stay_frozen(report):
    assert report["frozen"] == {"weight": False, "bias": True}


def test_every_implementation_is_right_wherever_its_operands_lie(report):
    assert len(report["placed"]) == 9 * len(implementation_names(device="cpu"))
    # y, the gradients of the three operands, and a second derivative.
    assert [row for row in report["placed"] if row["outcome"] != [True] * 5] == []


def test_mistakes_give_one_sentence(report):
    every = "as another operand is one, got a Tensor; call distribute_tensor with the same mesh."
    (mesh_differs,) = (report["errors"].pop(label) for label in ["other mesh"])
    assert mesh_differs.startswith("`bias`: expected one mesh for all operands, DeviceMesh(")
    assert mesh_differs.endswith("; use distribute_tensor.")
    assert report["errors"] == {
        "plain weight": f"`weight`: expected a DTensor, {every}",
        "plain x": f"`x`: expected a DTensor, {every}",
        "plain bias": f"`bias`: expected a DTensor, {every}",
        "placed bias": f"`x`: expected a DTensor, {every}",
        "plain input": "`x`: expected a DTensor sharded over the partition axis, got a Tensor; pass it through "
        "shard_inputs.",
        "indivisible": "`device_mesh`: expected one dimension whose size divides n = 3, got shape (2,); choose "
        "another mesh.",
        "export": "`layer`: expected values in `weight`, got shards on several devices; use an ordinary layer on one "
        "device.",
        "parametrised": "`layer`: expected a parameter `weight`, got a tensor that is computed from others; remove its "
        "parametrization or pruning first.",
    }
