"""The layer in PyTorch's own tools for several processes, started by torchrun: DDP, FSDP2, checkpoints that move on."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("torch"):
    pytest.skip("the torch tree needs torch", allow_module_level=True)

import torch
import torch.distributed.checkpoint as dcp

from torch_impl import MaskedPartitionedLinear, PartitionedLinear

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="processes need a torch built with gloo",
    ),
]

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "torch_impl" / "README.md").read_text()
# What the page shows as train.py, and its commands: one that starts both processes, and one for each machine.
(TRAIN,) = re.findall(r"```python\n(# train\.py\n.*?)```", PAGE, flags=re.S)
COMMANDS = re.findall(r"^    (torchrun .*? train\.py)", PAGE, flags=re.M)
MACHINES = {"two machines": COMMANDS[1:], "one machine": COMMANDS[:1]}
END = "dist.destroy_process_group()\n"

# Takes the place of the end of train.py.
CHECKS = """
import json, sys
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from parity_tests.tests.test_torch_processes import batch, model, step
from torch_impl.sharding import shard_partitions

folder, found = sys.argv[1], {"train.py": [str(value.placements) for value in model_of_page.parameters()]}
torch.set_num_threads(1)
rank = dist.get_rank()
expected = step(model(), batch()).state_dict()
part = batch().chunk(2)[rank]

def same(state):
    full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    return all(torch.allclose(full[name], value, rtol=1e-12, atol=1e-12) for name, value in expected.items())

replicated = DistributedDataParallel(model())
found["ddp"] = same({k.removeprefix("module."): v for k, v in step(replicated, part).state_dict().items()})

sharded = model()
for layer in (sharded[0], sharded[2], sharded[3]):
    fully_shard(layer, mesh=mesh)
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
    with open(f"{folder}/found.json", "w") as file:
        json.dump(found, file)
dist.barrier()
dist.destroy_process_group()
# torch's own threads may abort a process that ends as usual.
os._exit(0)
"""


def model():
    """Make layers of one size, of several, and masked, and what follows them, in float64."""
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    return torch.nn.Sequential(
        PartitionedLinear(4, 6, 5, **double),
        torch.nn.Flatten(),
        PartitionedLinear(3, (4, 10, 6), (1, 3, 4), **double),
        MaskedPartitionedLinear(4, 2, 3, **double),
        torch.nn.Linear(12, 3, **double),
    )


def batch():
    """Draw inputs that divide into halves."""
    return torch.randn(8, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(module, x):
    """Take one step of gradient descent with momentum."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(x).square().mean().backward()
    optimizer.step()
    return module


@pytest.fixture(
    scope="module", params=[name for name in MACHINES if name == "two machines" or "EVERY_TEST" in os.environ]
)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    assert TRAIN.endswith(END)
    renamed = TRAIN.replace("model", "model_of_page")
    (folder / "train.py").write_text(renamed.removesuffix(END) + CHECKS)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *shlex.split(command.replace("HOST", "localhost").replace("29500", port))[1:],
                str(folder),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )
        for command in MACHINES[request.param]
    ]
    try:
        messages = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "".join(messages)[-3000:]
    return folder, json.loads((folder / "found.json").read_text())


def test_the_page_has_a_command_for_one_machine_and_for_each_of_two():
    assert [len(commands) for commands in MACHINES.values()] == [2, 1]
    assert ["--node-rank 0" in COMMANDS[1], "--node-rank 1" in COMMANDS[2]] == [True, True]


def test_the_program_of_the_page_divides_its_parameters(run):
    assert run[1]["train.py"] == ["(Shard(dim=0),)"] * 4


@pytest.mark.parametrize("tool", ["ddp", "fsdp", "fsdp to partitions"])
def test_two_processes_train_as_one(run, tool):
    assert run[1][tool]


def test_fsdp_does_divide_the_parameters(run):
    assert run[1]["fsdp is sharded"] == ["(Shard(dim=0),)"] * 8


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
