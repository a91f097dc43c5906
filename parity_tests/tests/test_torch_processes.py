"""The layer in PyTorch's own tools for several processes, started by torchrun: DDP, FSDP2, checkpoints that move on."""

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
import torch.distributed.checkpoint as dcp

from torch_impl import PartitionedLinear

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="processes need a torch built with gloo",
    ),
]

# The same file is the program that torchrun starts, so that both halves have one model.
PROGRAM = """
import json, os, sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from parity_tests.tests.test_torch_processes import batch, model, step
from torch_impl.sharding import shard_partitions

folder, found = sys.argv[1], {}
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
expected = step(model(), batch()).state_dict()
part = batch().chunk(2)[rank]

def same(state):
    full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    return all(torch.allclose(full[name], value, rtol=1e-12, atol=1e-12) for name, value in expected.items())

replicated = DistributedDataParallel(model())
found["ddp"] = same({k.removeprefix("module."): v for k, v in step(replicated, part).state_dict().items()})

sharded = model()
fully_shard(sharded[0], mesh=mesh)
fully_shard(sharded, mesh=mesh)
step(sharded, part)
found["fsdp"] = same(get_model_state_dict(sharded))
found["fsdp is sharded"] = [str(value.placements) for value in sharded.state_dict().values()]
dcp.save(get_model_state_dict(sharded), checkpoint_id=f"{folder}/fsdp")

divided = model()
shard_partitions(divided[0], mesh)
state = get_model_state_dict(divided)
dcp.load(state, checkpoint_id=f"{folder}/fsdp")
set_model_state_dict(divided, state)
found["fsdp to partitions"] = same(get_model_state_dict(divided))
dcp.save(get_model_state_dict(divided), checkpoint_id=f"{folder}/partitions")
if rank == 0:
    print(json.dumps(found), flush=True)
dist.barrier()
dist.destroy_process_group()
# torch's own threads may abort a process that ends as usual.
os._exit(0)
"""


def model():
    """Make a layer and what follows it, in float64."""
    torch.manual_seed(0)
    layer = PartitionedLinear(4, 6, 5, dtype=torch.float64)
    return torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(20, 3, dtype=torch.float64))


def batch():
    """Draw inputs that divide into halves."""
    return torch.randn(8, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(module, x):
    """Take one step of gradient descent with momentum."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(x).square().mean().backward()
    optimizer.step()
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(folder / "program.py"), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("tool", ["ddp", "fsdp", "fsdp to partitions"])
def test_two_processes_train_as_one(run, tool):
    assert run[1][tool]


def test_fsdp_does_divide_the_parameters(run):
    assert run[1]["fsdp is sharded"] == ["(Shard(dim=0),)"] * 4


# torch says that it takes the one process for what is meant.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("checkpoint", ["fsdp", "partitions"])
def test_a_checkpoint_of_two_processes_loads_in_one(run, checkpoint):
    expected, fresh = step(model(), batch()).state_dict(), model()
    state = {name: torch.zeros_like(value) for name, value in fresh.state_dict().items()}
    dcp.load(state, checkpoint_id=run[0] / checkpoint, no_dist=True)
    fresh.load_state_dict(state)
    for name, value in expected.items():
        torch.testing.assert_close(fresh.state_dict()[name], value, rtol=1e-12, atol=1e-12)
