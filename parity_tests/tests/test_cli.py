"""The command line: exit status, JSON, wrong usage in one sentence, never a traceback."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from parity_tests.__main__ import app
from parity_tests.judge.subjects import FRAMEWORKS, framework_available

ROOT = Path(__file__).resolve().parents[2]
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
    # Every implementation is judged by test_parity.py and, in a run of its own, by test-newest of the Makefile.
    chosen = ("--implementation", "matmul", "--dtype", "float32", "--dtype", "bfloat16")
    result = command("run", "--cases", "smoke", *chosen, "--json", str(target))
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
        pytest.param(
            ["run", "--framework", "torch", "--device", "cpu", "--implementation", "fused"],
            "--implementation fused: expected a GPU (--device cuda), got cpu; with TRITON_INTERPRET=1",
            marks=pytest.mark.skipif(
                "torch" not in INSTALLED or "TRITON_INTERPRET" in os.environ, reason="torch runs it, or is not there"
            ),
        ),
        (["run", "--case", "magic"], "--case: expected one of"),
        (["run", "--framework", "tensorflow"], "tensorflow"),
        (["run", "--dtype", "float8"], "float8"),
        (["run", "--mode", "magic"], "--mode: expected one of"),
        (["run", "--framework", INSTALLED[0], "--mode", {"torch": "jit", "jax": "compile"}[INSTALLED[0]]], "a mode of"),
        (["run", "--cases", "huge"], "huge"),
        (["run", "--seed", "-1"], "--seed"),
        (["run", "--json", "/nowhere/at/all.json"], "writable folder"),
        (["defects", "--implementation", "magic"], "--implementation: expected one of"),
        (["magic"], "magic"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_sentence_and_exit_two(arguments, sentence):
    # In this process: an exception that the command lets through fails the test by itself.
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_wrong_usage_ends_the_process_so_too():
    result = command("run", "--case", "magic")
    assert result.returncode == 2
    assert "--case: expected one of" in result.stderr
    assert "Traceback" not in result.stderr


def read_until_closed(terminal):
    # The last process that held the other end has closed it when reading fails.
    with contextlib.suppress(OSError):
        while os.read(terminal, 65536):
            pass


@pytest.mark.skipif(
    not hasattr(os, "openpty"), reason="a progress bar is shown on a terminal only, this system has none"
)
@pytest.mark.parametrize(
    "number",
    # Of both signals, with invented work: `test_interruptions`.
    [
        pytest.param(signal.SIGINT, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, id="time limit", marks=pytest.mark.every),
    ],
)
def test_an_interrupted_run_keeps_what_it_compared(tmp_path, number):
    files = {option: tmp_path / f"rows.{option}" for option in ("json", "junit", "html")}
    framework = INSTALLED[0]
    arguments = ["--framework", framework, "--mode", {"torch": "eager", "jax": "jit"}[framework], "--cases", "full"]
    arguments += [part for option, path in files.items() for part in (f"--{option}", str(path))]
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "parity_tests", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=end,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "160", "TERM": "xterm"},
    )
    os.close(end)
    try:
        shown, deadline = "", time.monotonic() + 240
        while not (found := re.findall(r"\b([1-9]\d*)/(\d+)\b", shown)) and time.monotonic() < deadline:
            shown += os.read(terminal, 65536).decode(errors="replace")
        assert found, f"no progress was shown: {shown}"
        process.send_signal(number)
        # A terminal holds a few thousand characters: whoever writes more waits until they are read.
        reader = threading.Thread(target=read_until_closed, args=(terminal,), daemon=True)
        reader.start()
        stdout, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
        os.close(terminal)
    assert process.returncode == 130, stdout
    assert re.search(r"\d:\d\d:\d\d|-:--:--", shown), "the remaining time is not shown"
    (left, total) = map(int, re.search(r"interrupted: (\d+) of (\d+) cells were left", stdout).groups())
    assert total == int(found[0][1])
    assert 0 < left < total
    document = json.loads(files["json"].read_text())
    assert document["cells_left"] == left
    assert document["summary"]["compared"] > 0
    # Every finished cell left rows; the one in flight may have left some.
    cells = {(row["implementation"], row["dtype"], row["case"]) for row in document["rows"] if row["kind"] == "oracle"}
    assert total - left <= len(cells) <= total - left + 1
    # Who reads only these must not take an interrupted run for one that holds.
    assert document["stopped"] == f"interrupted: {left} of {total} cells were left"
    (suite,) = ElementTree.parse(files["junit"]).getroot()
    *cases, end = suite
    assert len(cases) == len(document["rows"])
    assert suite.get("errors") == "1"
    assert end.find("error").get("message") == document["stopped"]
    assert f"interrupted with {left} cells left" in files["html"].read_text()


def test_defects_prints_the_score(tmp_path):
    target = tmp_path / "score.json"
    result = command("defects", "--framework", INSTALLED[0], "--json", str(target))
    assert result.returncode == 0, result.stdout
    score = json.loads(target.read_text())
    assert score["planted"] == score["killed"] >= 20
    assert score["survivors"] == []
    assert len(score["defects"]) == score["planted"]
    assert all(entry["killed"] and entry["cause"] for entry in score["defects"])
    assert f"planted {score['planted']}, killed {score['killed']}, survivors 0" in result.stdout
