import csv
import json
import os
from pathlib import Path

import pytest

from bench.tests.synthetic import FINGERPRINT, cell_records

RESULTS = Path(__file__).resolve().parents[1] / "results"
PUBLISHED = sorted(path.parent for path in RESULTS.glob("*/records.jsonl.xz"))


@pytest.fixture
def lines(make_record):
    records = cell_records(make_record, 0, (128, 32, 32, 32), competitors=3)
    return [json.loads(record.to_line()) for record in records]


@pytest.fixture
def run_of(tmp_path):
    def write(lines):
        directory = tmp_path / "run"
        directory.mkdir(exist_ok=True)
        (directory / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (directory / "environment.json").write_text(json.dumps({"e0": FINGERPRINT}))
        return directory

    return write


@pytest.mark.parametrize("directory", PUBLISHED, ids=lambda path: path.name)
def test_the_published_records_are_valid(directory, call):
    if directory.name in ("cpu-epyc-2core", "cpu-xeon-2core") and "EVERY_TEST" not in os.environ:
        pytest.skip("the two largest runs: with EVERY_TEST=1, before records are published")
    done = call("validate", directory)
    assert done.exit_code == 0, done.output


def test_there_are_published_records():
    assert len(PUBLISHED) == 8


def test_what_a_run_leaves_is_valid(lines, run_of, call, tmp_path):
    done = call("validate", run_of(lines), "--json", tmp_path / "v.json")
    assert done.exit_code == 0, done.output
    assert "a factor that all clocks of a cell share" in done.stdout.splitlines()[-1]
    # The baseline and its control know each other's blocks.
    assert "(2 of 4 speeds here)" in done.stdout.splitlines()[-1]
    found = json.loads((tmp_path / "v.json").read_text())
    assert found == {"records": 4, "cells": 1, "violations": [], "remarks": []}


FAILED = {"status": "crash", "reason": "it died", "latency_s": None, "block_latency_s": [], "calls_per_block": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latency_s": 1.0}, "latency_s: expected the median block over calls_per_block"),
        ({"bound_fraction": 1.2}, "bound_fraction: expected at most 1 of a right answer, got 1.2"),
        ({"bound_fraction": None}, "bound_fraction: expected at most 1"),
        ({"parity": {}}, "parity: expected the tensors that were checked, got none"),
        ({"parity": {"y": {"status": "mismatch"}}}, "parity: y is mismatch although the status is ok"),
        ({"observed_precision": "tf32"}, "observed_precision: tf32 is coarser than ieee_fp32"),
        ({"observed_precision": "fp8"}, "observed_precision: expected one of fp64"),
        ({"observed_precision": None}, "observed_precision: expected one of fp64"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16 does not store the precision ieee_fp32"),
        ({"precision": "fp8"}, "precision: expected one of"),
        ({"framework": "keras"}, "framework: expected one of torch, jax"),
        ({"inputs_digest": None}, "inputs_digest: expected the hash"),
        ({"inputs_digest": "other"}, "the competitors had different inputs"),
        ({"peak_flops_per_s": 1e9}, "useful_flops / latency_s = "),
        ({"cache": "cold", "peak_bytes_per_s": 1e8}, "compulsory_bytes / latency_s = "),
        ({"useful_flops": 10**9}, "useful_flops: expected 8519680 of these sizes, got 1000000000"),
        ({"compulsory_bytes": 1}, "compulsory_bytes: expected "),
        ({"waste_factor": 32}, "waste_factor: expected 1 of these sizes, got 32"),
        ({"num_partitions": 16}, "num_partitions: 'sweep-b128-n32-i32-o32' has 32, got 16"),
        ({"workload": "article-n8"}, "num_partitions: 'article-n8' has 8, got 32"),
        ({"layout": "time_series"}, "layout: 'sweep-b128-n32-i32-o32' has contiguous, got time_series"),
        ({"seed": 7}, "seed: expected the same in every record"),
        ({"division": "tuned"}, "division: expected the same in every record"),
        ({"cache": "cold"}, "cache: expected the same in every record"),
        ({"ceiling_flops_per_s": 1e29}, "ceiling_flops_per_s: expected the same in every record"),
        ({"implementation": "matmul"}, "'torch matmul (eager)' has 2 records, expected one"),
        ({"mode": "compile"}, "compile_s: expected the seconds that compile took to compile, got none"),
        ({"division": "stock"}, "division: records say 'stock', and their environment e0 had 'matched'"),
        ({"device": "cuda"}, "device: records say 'cuda', and their environment e0 had 'cpu'"),
        ({"key": "0000000000000002"}, "is that of line"),
        ({"batch": 64}, "batch: expected the same in every record"),
        ({"baseline": True}, "expected one baseline, got 2"),
        ({"control": True}, "expected one A/A control, got 2"),
        ({"environment_id": "lost"}, "records name the environment lost"),
        ({"status": "fine"}, "line 2: status: expected one of ok"),
        ({"schema_version": 2}, "line 2: schema_version: expected 1, got 2"),
        ({"calls_per_block": "x"}, "line 2: calls_per_block: expected int"),
        (
            {"direction": "backwards"},
            "direction: expected one of forward, forward_backward, train_step, got 'backwards'",
        ),
        ({"kind": "invention"}, "kind: expected one of implementation, stock, yardstick, got 'invention'"),
        ({"mode": "fast"}, "mode: expected one of eager, compile"),
        ({"mode": "jit"}, "mode: torch has no jit on 'cpu'"),
        ({"mode": "cuda-graph"}, "mode: torch has no cuda-graph on 'cpu'"),
        (
            {"layout": "random"},
            "layout: expected one of contiguous, partition_major, time_series, flat, shared, got 'random'",
        ),
        ({"cache": "hot"}, "cache: expected one of warm, cold, got 'hot'"),
        ({"device": "tpu"}, "device: expected one of cpu, cuda, got 'tpu'"),
        ({"division": "best"}, "division: expected one of stock, matched, tuned, got 'best'"),
        ({"stopped": "bored"}, "stopped: expected one of nothing, resolved, precise, rounds, time, got 'bored'"),
        ({"started_at": "yesterday"}, "started_at: expected a moment in UTC as in ISO 8601, got 'yesterday'"),
        ({"started_at": "2026-13-01T00:00:00+00:00"}, "started_at: expected a moment in UTC"),
        ({"started_at": "2026-01-01T00:00:00"}, "started_at: expected a moment in UTC"),
        ({"started_at": "2026-01-01T00:00:00+05:00"}, "started_at: expected a moment in UTC"),
        ({"started_at": "2026-01-02T00:00:00+00:00"}, "started_at: expected the same in every record"),
        ({"finished_at": ""}, "finished_at: expected a moment in UTC"),
        ({"reason": "it was slow"}, "reason: expected none of a record that is ok, got 'it was slow'"),
        ({"skipped": True}, "skipped: True contradicts the status ok"),
        (FAILED | {"skipped": True}, "skipped: True contradicts the status crash"),
        (FAILED | {"status": "unsupported", "reason": "skipped: too slow"}, "skipped: False contradicts"),
        (FAILED | {"parity": {"y": {"status": "mismatch"}}}, "status: crash although 'y' was judged as a mismatch"),
        ({"parity": {"dx": {"status": "ok"}}}, "parity: expected y of the direction forward, got other tensors"),
        ({"direction": "forward_backward"}, "parity: expected y, dx, dweight, dbias of the direction"),
        ({"kind": "stock"}, "kind: 'stock' contradicts the implementation 'loop'"),
        ({"implementation": "stock:bmm"}, "kind: 'implementation' contradicts the implementation 'stock:bmm'"),
        ({"compile_s": 1.0}, "compile_s: expected none in eager mode"),
        ({"optimizer": "adamw"}, "optimizer: expected None in the direction 'forward', got 'adamw'"),
        ({"direction": "train_step"}, "optimizer: expected "),
    ],
)
def test_every_violation_is_named_with_its_place(lines, run_of, call, changes, message):
    lines[1] |= changes
    done = call("validate", run_of(lines))
    assert done.exit_code == 1, done.output
    assert message in done.output
    assert "records.jsonl" in done.output or "environment.json" in done.output


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (0, "expected one baseline, got 0"),
        (3, "expected one A/A control, got 0"),
        (1, "expected 4 records, got 3"),
    ],
)
def test_a_missing_line_is_noticed(lines, run_of, call, drop, message):
    del lines[drop]
    done = call("validate", run_of(lines))
    assert done.exit_code == 1
    assert message in done.output


def test_what_may_be_is_let_through(lines, run_of, call):
    # Out of the box JAX computes in TF32; a warm cache gives bytes faster than the memory; stricter than asked is fine.
    for line in lines:
        line["division"] = "stock"
    lines[1] |= {"observed_precision": "tf32"}
    lines[2] |= {"cache": "warm", "peak_bytes_per_s": 1e8, "observed_precision": "fp64"}
    directory = run_of(lines)
    (directory / "environment.json").write_text(json.dumps({"e0": FINGERPRINT | {"division": "stock"}}))
    done = call("validate", directory)
    assert done.exit_code == 0, done.output


def test_a_torn_line_and_an_empty_file_are_violations(lines, run_of, call, tmp_path):
    directory = run_of(lines)
    with (directory / "records.jsonl").open("a") as file:
        file.write('{"schema')
    done = call("validate", directory, "--csv", tmp_path / "v.csv")
    assert done.exit_code == 1
    assert "line 5: the line has no end" in done.output
    with (tmp_path / "v.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1
    assert "holds no record" in call("validate", run_of([])).output


def test_a_directory_without_records_is_wrong_usage(call, tmp_path):
    done = call("validate", tmp_path)
    assert done.exit_code == 2
    assert "holds no records.jsonl" in done.stderr


@pytest.mark.parametrize("dirty", [True, False])
def test_changes_that_were_not_committed_are_remarked_on(lines, run_of, call, dirty, tmp_path):
    directory = run_of(lines)
    environments = json.loads((directory / "environment.json").read_text())
    for found in environments.values():
        found["git"] = {"commit": "0123456789abcdef", "dirty": dirty}
    (directory / "environment.json").write_text(json.dumps(environments))
    done = call("validate", directory, "--json", tmp_path / "v.json")
    assert done.exit_code == 0
    assert ("changes that were not committed" in done.output) is dirty
    remarks = json.loads((tmp_path / "v.json").read_text())["remarks"]
    assert any("not committed" in remark for remark in remarks) is dirty
