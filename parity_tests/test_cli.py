"""The command line: exit status, JSON, wrong usage in one sentence, never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.harness.subjects.base import FRAMEWORKS, framework_available

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = [framework for framework in FRAMEWORKS if framework_available(framework)]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "parity_tests", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        timeout=300,
        check=False,
    )


def test_run_writes_every_row_and_exits_zero(tmp_path):
    target = tmp_path / "rows.json"
    result = command("run", "--cases", "smoke", "--dtype", "float32", "--dtype", "bfloat16", "--json", str(target))
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(target.read_text())
    assert {"schema_version", "environment", "summary", "rows"} <= set(document)
    summary = document["summary"]
    assert summary["compared"] == summary["passed"] > 0
    assert summary["failed"] == 0
    assert summary["compared"] + summary["skipped"] == len(document["rows"])
    assert {row["framework"] for row in document["rows"] if row["kind"] == "oracle"} == set(INSTALLED)
    assert all(row["reason"] for row in document["rows"] if row["status"] == "skipped")
    if len(INSTALLED) == 2:
        assert any(row["kind"] == "pair" for row in document["rows"])
    assert f"{summary['compared']} compared" in result.stdout


def test_a_run_that_compares_nothing_fails():
    # No implementation of 16-byte rows supports a case with odd sizes: the only cell is skipped.
    if "torch" not in INSTALLED:
        pytest.skip("the cell that nothing supports is one of torch's")
    result = command(
        "run", "--framework", "torch", "--implementation", "grouped_matmul", "--case", "odd-sizes", "--dtype", "float32"
    )
    assert result.returncode == 1
    assert "nothing was compared" in result.stdout
    assert "skipped 1 x torch grouped_matmul float32" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--implementation", "magic"], "--implementation: expected one of"),
        (["run", "--case", "magic"], "--case: expected one of"),
        (["run", "--framework", "tensorflow"], "tensorflow"),
        (["run", "--dtype", "float8"], "float8"),
        (["run", "--cases", "huge"], "huge"),
        (["run", "--seed", "-1"], "--seed"),
        (["run", "--json", "/nowhere/at/all.json"], "writable folder"),
        (["defects", "--implementation", "magic"], "--implementation: expected one of"),
        (["magic"], "magic"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_sentence_and_exit_two(arguments, sentence):
    result = command(*arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_defects_prints_the_score(tmp_path):
    target = tmp_path / "score.json"
    result = command("defects", "--framework", INSTALLED[0], "--json", str(target))
    assert result.returncode == 0, result.stdout
    score = json.loads(target.read_text())
    assert score["planted"] == score["killed"] >= 20
    assert score["survivors"] == []
    assert f"planted {score['planted']}, killed {score['killed']}, survivors 0" in result.stdout
