"""Partitions divided over devices or processes, against the oracle and against one device.

All of it runs through the command line, which starts JAX with eight virtual devices, or in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.judge.inputs import Case
from parity_tests.judge.subjects import DEFAULT_MODES, FRAMEWORKS, framework_available, load_subjects
from parity_tests.tests.test_modes import exact_failures

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = [framework for framework in FRAMEWORKS if framework_available(framework)]
# Several partitions in each shard, or nothing could leak inside one: two processes of torch, eight devices of JAX.
DIVIDED = {"torch": Case("divided", (6,), 22, 8, 16), "jax": Case("divided", (6,), 16, 8, 16)}
SHARDED_JAX = """
import json, jax
from parity_tests.judge.subjects import load_subjects
from parity_tests.tests.test_modes import exact_failures
from parity_tests.tests.test_sharded_modes import DIVIDED

jax.config.update("jax_disable_most_optimizations", True)
assert len(jax.devices()) == 8
subjects = load_subjects("jax", "cpu", ["sharded"])
assert not any(subject.unsupported_reason(DIVIDED["jax"], "float32") for subject in subjects)
print(json.dumps({subject.implementation: exact_failures(subject, DIVIDED["jax"], "float32") for subject in subjects}))
"""


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "parity_tests", "run", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"},
        timeout=500,
        check=False,
    )


# Eight devices of JAX are threads; eight processes of PyTorch are eight start-ups, once for all implementations.
@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("framework", sorted(INSTALLED))
def test_eight_shards_agree_with_the_oracle_and_with_one_device(framework, tmp_path):
    target = tmp_path / "rows.json"
    implementations = {subject.implementation for subject in load_subjects(framework, "cpu")}
    if "EVERY_TEST" not in os.environ:
        implementations &= {"loop", "masked", "matmul", "grouped_conv", "layer"}
    result = command(
        *("--framework", framework, "--mode", "sharded", "--mode", DEFAULT_MODES[framework]),
        *("--case", "eight-partitions", "--dtype", "float32", "--json", str(target)),
        *(part for name in implementations for part in ("--implementation", name)),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(target.read_text())["rows"]
    unjudged = {(row["kind"], row["mode"]) for row in rows if row["status"] != "ok"}
    # A sharded call of PyTorch starts processes: no check without tolerance is repeated there (see left_out).
    assert unjudged <= {("exact", "sharded")}
    sharded = {row["implementation"] for row in rows if (row["kind"], row["mode"]) == ("oracle", "sharded")}
    assert sharded == implementations
    against_one = [row for row in rows if row["kind"] == "mode"]
    assert {row["implementation"] for row in against_one} == implementations
    assert {row["mode"] for row in against_one} == {f"sharded+{DEFAULT_MODES[framework]}"}


@pytest.fixture(scope="module")
def sharded_torch():
    if "torch" not in INSTALLED:
        pytest.skip("torch is not installed here")
    from parity_tests.frameworks.torch.sharded import close_shards

    yield {subject.implementation: subject for subject in load_subjects("torch", "cpu", ["sharded"])}
    close_shards()


@pytest.mark.slow
def test_shards_of_torch_keep_what_needs_no_tolerance(sharded_torch):
    assert len(sharded_torch) >= 9
    assert not any(subject.unsupported_reason(DIVIDED["torch"], "float32") for subject in sharded_torch.values())
    found = {name: exact_failures(subject, DIVIDED["torch"], "float32") for name, subject in sharded_torch.items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_shards_of_torch_say_what_they_cannot_divide(sharded_torch):
    prime = Case("prime", (6,), 11, 8, 16)
    assert "divided by no number of devices" in sharded_torch["loop"].unsupported_reason(prime, "float32")
    assert "float64" in sharded_torch["grouped_matmul"].unsupported_reason(DIVIDED["torch"], "float64")


@pytest.mark.slow
@pytest.mark.every
@pytest.mark.skipif("jax" not in INSTALLED, reason="the JAX tree needs jax and flax")
def test_shards_of_jax_keep_what_needs_no_tolerance():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", SHARDED_JAX],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags.strip(), "OMP_NUM_THREADS": "1"},
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) >= 9
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
