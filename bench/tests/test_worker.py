import json
import os
import subprocess
import sys

import pytest

from bench.measure import workbench
from bench.measure.workers import (
    CHECKOUT,
    MISSING,
    RequestError,
    WorkerPool,
    WorkerProcess,
    one_line,
    starter,
    worker_environment,
)

NEUTRAL = (
    "bench.__main__",
    "bench.measure.workbench",
    "bench.measure.sweep",
    "bench.commands.run",
    "bench.commands.report",
)
IMPORTS_OF_A_WORKER = """
import json, sys
from bench.measure.workbench import Dispatcher
hello, cell = {"operation": "hello"}, json.loads(sys.argv[2])
prepare = {"operation": "prepare", "handle": "0", "implementation": "matmul", "mode": sys.argv[3],
           "kind": "implementation", "call_limit_s": 60}
reply = Dispatcher(sys.argv[1]).reply
replies = [reply(request) for request in (hello, cell, prepare, {"operation": "check", "handle": "0"})]
print(json.dumps({"replies": replies, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""
CELL = {
    "workload": {
        "name": "tiny",
        "batch": 4,
        "num_partitions": 3,
        "in_features": 8,
        "out_features": 8,
        "source": "test",
        "layout": "contiguous",
    },
    "direction": "forward_backward",
    "precision": "ieee_fp32",
    "division": "matched",
    "device": "cpu",
    "cache": "warm",
}


def fresh(*arguments, framework="torch"):
    environment = worker_environment(framework, device="cpu", division="matched", cpus=())
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    return done.stdout


@pytest.mark.parametrize(("framework", "other", "mode"), [("torch", "jax", "eager"), ("jax", "torch", "jit")])
def test_a_worker_imports_its_own_framework_only(framework, other, mode):
    pytest.importorskip(framework, reason=f"needs {framework}")
    request = {"operation": "open_cell", "cell": CELL, "seed": 0}
    found = json.loads(fresh("-c", IMPORTS_OF_A_WORKER, framework, json.dumps(request), mode, framework=framework))
    assert [reply["ok"] for reply in found["replies"]] == [True] * 4, found["replies"]
    assert found["replies"][3]["judgement"]["status"] == "ok"
    modules = set(found["modules"])
    assert {framework, f"{framework}_impl"} <= modules
    # Nor what only the command line needs: the worker's interpreter may not have it.
    assert not modules & {other, f"{other}_impl", "typer", "altair"}


@pytest.mark.parametrize("module", NEUTRAL)
def test_neutral_modules_import_no_framework(module):
    modules = json.loads(fresh("-c", f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", "jax", "flax", "altair", "pandas"} & set(modules)


def test_what_a_library_prints_does_not_break_the_protocol(tmp_path):
    (tmp_path / "noisy.py").write_text(
        "import os\n"
        "def main(channel, framework):\n"
        "    channel.receive()\n"
        "    print('noise')\n"
        "    os.write(1, b'more noise')\n"
        "    channel.send({'ok': True})\n"
    )
    worker = WorkerProcess("torch", os.environ | {"PYTHONPATH": str(tmp_path)}, module="noisy")
    assert worker.request({"operation": "hello"}, 60) == {"ok": True}
    worker.close()


def test_a_worker_without_its_framework_says_so(monkeypatch):
    monkeypatch.setattr(workbench, "framework_available", lambda framework: False)
    reply = workbench.Dispatcher("jax").reply({"operation": "hello"})
    assert (reply["status"], "jax and flax are not installed" in reply["reason"]) == (MISSING, True)


def test_an_unknown_operation_is_explained(monkeypatch):
    with pytest.raises(ValueError, match=r"operation: expected one of hello, .*, got '__init__'"):
        workbench.Workbench(None).perform({"operation": "__init__"})


def test_a_framework_that_cannot_start_is_an_error_and_leaves_no_process(tmp_path):
    (tmp_path / "broken.py").write_text("raise ImportError('broken installation')")
    started = []

    def start(framework):
        environment = worker_environment(framework, device="cpu", division="matched", cpus=())
        environment["PYTHONPATH"] = str(tmp_path)
        started.append(WorkerProcess(framework, environment, module="broken"))
        return started[-1]

    with pytest.raises(RequestError, match=r"the torch worker: .*broken installation"):
        WorkerPool(start, ("torch", "jax"))
    assert not any(worker.alive for worker in started)


def test_workers_get_the_same_processors_and_the_division_its_flags():
    for framework in ("torch", "jax"):
        found = worker_environment(framework, device="cpu", division="matched", cpus=(0, 1))
        assert (found["OMP_NUM_THREADS"], found["PARTITIONED_LINEAR_BENCH_CPUS"]) == ("2", "0,1")
    assert "--xla_allow_excess_precision=false" in found["XLA_FLAGS"]
    assert found["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    stock = worker_environment("jax", device="cuda", division="stock", cpus=())
    assert "--xla_allow_excess_precision" not in stock.get("XLA_FLAGS", "")


def test_another_interpreter_can_be_given():
    start = starter({"torch": "/nowhere/python"}, device="cpu", division="matched", cpus=())
    with pytest.raises(RequestError, match="/nowhere/python cannot be started"):
        start("torch")


def test_a_reason_is_one_line():
    assert one_line("a\n  b") == "a b"
    assert len(one_line("x" * 1000)) == 300
