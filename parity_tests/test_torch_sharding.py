"""Partitions over two processes: the same values, and nothing communicated."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.harness.subjects.base import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="sharding over processes needs a torch built with gloo",
    ),
]

WORKER = """
import copy, json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch_impl import PartitionedLinear, export_parameters
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
errors = {}
for label, call in {
    "plain input": lambda: many(torch.zeros(5, 4, 8)),
    "indivisible": lambda: shard_partitions(PartitionedLinear(3, 8, 6), mesh),
    "export": lambda: export_parameters(many),
}.items():
    try:
        call()
    except (TypeError, ValueError) as error:
        errors[label] = str(error)
if rank == 0:
    with open(report, "w") as file:
        json.dump({"rows": rows, "errors": errors}, file)
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
            cwd=Path(__file__).resolve().parent.parent,
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


def test_mistakes_give_one_sentence(report):
    assert report["errors"] == {
        "plain input": "`x`: expected a DTensor sharded over the partition axis, got a Tensor; pass it through "
        "shard_inputs.",
        "indivisible": "`device_mesh`: expected one dimension whose size divides n = 3, got shape (2,); choose "
        "another mesh.",
        "export": "`layer`: expected values in `weight`, got shards on several devices; use an ordinary layer on one "
        "device.",
    }
