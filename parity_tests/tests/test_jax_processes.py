"""The layer over two processes of JAX, on a mesh of rows by partitions, and its checkpoint in one process."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.judge.subjects import framework_available

if not framework_available("jax"):
    pytest.skip("the JAX tree needs jax and flax", allow_module_level=True)
pytest.importorskip("orbax.checkpoint", reason="orbax is not installed here")

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from jax_impl import PartitionedLinear

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "jax_impl" / "README.md").read_text()
# What the page shows as train.py, and its command for each machine.
(TRAIN,) = re.findall(r"```python\n(# train\.py\n.*?)```", PAGE, flags=re.S)
COMMANDS = re.findall(r"^    (python train\.py HOST:\d+ \d)", PAGE, flags=re.M)

# Follows train.py.
CHECKS = """
import json, os, re
import orbax.checkpoint as ocp
from parity_tests.tests.test_jax_processes import batch, loss, model, step

folder = os.getcwd()
found = {"train.py": [str(value[...].sharding.spec) for value in (layer.kernel, gradients["kernel"])]}
assert jax.process_count() == 2 and jax.device_count() == 8
layer = shard_partitions(model(), mesh, "partitions")
graph, state = nnx.split(layer)
x = jax.make_array_from_callback(batch().shape, divided, lambda index: batch()[index])

forward = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).compile().as_text()
gradient = jax.jit(jax.grad(lambda state, x: loss(nnx.merge(graph, state), x))).lower(state, x).compile().as_text()
collective = r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?[(]"
found |= {
    "forward": sorted(set(re.findall(collective, forward))),
    "gradient": sorted(set(re.findall(collective, gradient))),
    "divided": str(layer.kernel[...].sharding.spec),
}
state = jax.jit(lambda state, x: step(graph, state, x))(state, x)
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(f"{folder}/layer", nnx.to_pure_dict(state))
if jax.process_index() == 0:
    print(json.dumps(found))
"""


def model():
    """Make a layer of four maps."""
    return PartitionedLinear(4, 6, 5, rngs=nnx.Rngs(0))


def batch():
    """Draw inputs that divide into halves."""
    return np.random.default_rng(1).standard_normal((8, 4, 6)).astype(np.float32)


def loss(layer, x):
    """Average what is nowhere flat."""
    return jax.numpy.square(layer(x)).mean()


def step(graph, state, x):
    """Take one step of gradient descent."""
    gradients = jax.grad(lambda state: loss(nnx.merge(graph, state), x))(state)
    return jax.tree.map(lambda value, gradient: value - 0.1 * gradient, state, gradients)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    (folder / "train.py").write_text(TRAIN + CHECKS)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *re.sub(r"HOST:\d+", f"localhost:{port}", command).split()[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        )
        for command in COMMANDS
    ]
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], results[0][1][-3000:]
    return folder, json.loads(results[0][0].strip().splitlines()[-1])


def test_the_program_of_the_page_runs_on_both(run):
    assert len(COMMANDS) == 2
    assert all("partitions" in spec for spec in run[1]["train.py"])


def test_the_forward_pass_communicates_nothing_and_the_gradient_reduces_over_rows_alone(run):
    found = run[1]
    assert "partitions" in found["divided"]
    assert found["forward"] == []
    assert found["gradient"] == ["all-reduce"]


def test_a_step_of_two_processes_is_that_of_one_and_its_checkpoint_loads_there(run):
    graph, state = nnx.split(model())
    expected = step(graph, state, batch())
    like = jax.tree.map(jax.numpy.zeros_like, nnx.to_pure_dict(state))
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(run[0] / "layer", like)
    for name, value in nnx.to_pure_dict(expected).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7)
        assert not np.allclose(found[name], nnx.to_pure_dict(state)[name], rtol=1e-6, atol=1e-7)
