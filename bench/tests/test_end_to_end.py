"""A real, small run through the command line, with both frameworks in their own processes."""

import json
import subprocess
import sys

import pytest

from bench.measure.workers import CHECKOUT
from bench.store import read_environments, read_records

CHOSEN = ("loop", "matmul", "stock:bmm+bias", "stock:nnx.Einsum", "dense")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    pytest.importorskip("torch", reason="an end-to-end run needs torch")
    pytest.importorskip("flax", reason="an end-to-end run needs jax and flax")
    out = tmp_path_factory.mktemp("end-to-end")
    command = [sys.executable, "-m", "bench", "run", "--preset", "smoke", "--workload", "article-n8", "--rounds", "2"]
    command += ["--device", "cpu", "--out", str(out / "run"), "--json", str(out / "f.json")]
    for name in CHOSEN:
        command += ["--implementation", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_every_row_is_right_and_says_its_precision(finished):
    out, shown = finished
    records = read_records(out / "run")
    assert {record.framework for record in records} == {"torch", "jax"}
    assert {record.direction for record in records} == {"forward", "forward_backward"}
    for record in records:
        if record.skipped:
            continue
        assert record.status == "ok", record.reason
        assert (record.precision, record.observed_precision) == ("ieee_fp32", "ieee_fp32")
        assert 0 < record.bound_fraction <= 1
        assert len(record.block_latency_s) == 4
        assert record.latency_s > 0
        assert set(record.parity) == ({"y"} if record.direction == "forward" else {"y", "dx", "dweight", "dbias"})
        assert record.peak_memory_bytes > 0
        assert (record.compile_s is None) == (record.mode == "eager")
    assert "torch matmul (eager)" in shown
    assert "jax stock:nnx.Einsum (jit)" in shown


def test_both_frameworks_were_fed_the_same_bits(finished):
    records = read_records(finished[0] / "run")
    assert len({record.inputs_digest for record in records}) == 1


def test_each_direction_has_one_baseline_and_its_control(finished):
    records = read_records(finished[0] / "run")
    for direction in ("forward", "forward_backward"):
        marked = [record for record in records if record.direction == direction and record.baseline]
        assert sorted(record.control for record in marked) == [False, True]
        assert {record.label for record in marked} == {"torch matmul (eager)"}


def test_the_yardstick_is_never_ranked(finished):
    found = json.loads((finished[0] / "f.json").read_text())
    for cell in found["cells"]:
        assert all(
            (row["rank"] is None) == (row["kind"] == "yardstick" or row["status"] != "ok") for row in cell["rows"]
        )


def test_the_environment_is_written_down(finished):
    run = finished[0] / "run"
    (environment,) = read_environments(run).values()
    assert environment["frameworks"]["torch"]["versions"]["torch"]
    assert environment["frameworks"]["jax"]["versions"]["flax"]
    assert "--xla_allow_excess_precision=false" in environment["frameworks"]["jax"]["variables"]["XLA_FLAGS"]
    assert set(environment["git"]) == {"commit", "dirty"}
    assert "report.md" in {path.name for path in run.iterdir()}


def test_tf32_is_unsupported_on_a_cpu_with_the_reason(tmp_path):
    pytest.importorskip("torch", reason="an end-to-end run needs torch")
    command = [
        sys.executable,
        "-m",
        "bench",
        "run",
        "--workload",
        "article-n8",
        "--rounds",
        "1",
        "--framework",
        "torch",
    ]
    command += ["--device", "cpu", "--precision", "tf32", "--direction", "forward", "--implementation", "matmul"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False, cwd=CHECKOUT
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (record,) = read_records(tmp_path)
    assert (record.status, record.reason) == ("unsupported", "a CPU has no TensorFloat-32 arithmetic")
