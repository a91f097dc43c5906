"""`run --pair` and the process that judges: early ends, hangs, floods and interruptions never pass and lose no row."""

import json
import sys
import textwrap
from xml.etree import ElementTree

import pytest

pytest.importorskip("einops", reason="einops is not installed here")
pytest.importorskip("scipy", reason="scipy is not installed here")

from typer.testing import CliRunner

from parity_tests.__main__ import app
from parity_tests.commands import pair as command
from parity_tests.interpreters.interpreter import Interpreter
from parity_tests.pair import judging

# Stands in for the judge: sends rows of the statuses that it is told, then does a deed, then a report of these rows.
JUDGE = """
import os, signal, sys, threading, time

def row(number, status):
    return {"kind": "pair", "framework": "torch+jax", "implementation": "a+b", "dtype": "float32", "case": "pair",
            "tensor": f"y.{number}", "status": status, "reason": "off" * (status == "mismatch"), "rung": "forward",
            "bound": "calibrated", "bound_fraction": 0.5, "worst_index": [0, 1], "max_abs_error": float("inf")}

def main(channel):
    channel.receive()
    statuses, deed = {statuses!r}, {deed!r}
    rows = [row(number, status) for number, status in enumerate(statuses)]
    channel.send({"step": "calling the factory"})
    for found in rows:
        channel.send({"row": found})
    print("one\\ntwo\\x1b[2J")
    exec(deed)
    channel.send({"report": {"name": "pair", "rows": rows, "not_compared": [], "likely_cause": "", "notes": ["n"],
                             "random": False, "stopped": ""}})
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command with a stand-in for the judge; returns the result and the three files' contents."""
    monkeypatch.setattr(command, "framework_available", lambda framework: True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(judging, "Interpreter", lambda target, **named: Interpreter("stand_in", **named))

    def call(statuses, deed, *options):
        (tmp_path / "stand_in.py").write_text(
            JUDGE.replace("{statuses!r}", repr(statuses)).replace("{deed!r}", repr(deed))
        )
        files = [tmp_path / name for name in ("r.json", "r.xml", "r.html")]
        named = [
            word
            for option, file in zip(("--json", "--junit", "--html"), files, strict=True)
            for word in (option, str(file))
        ]
        result = CliRunner().invoke(app, ["run", "--pair", "some:pair", *named, *options], catch_exceptions=False)
        return result, json.loads(files[0].read_text()), ElementTree.parse(files[1]).getroot(), files[2].read_text()

    return call


def test_a_report_arrives_as_it_was_made(run):
    result, document, junit, page = run(["ok", "skipped", "ok"], "pass")
    assert result.exit_code == 0, result.output
    assert "pair: holds; 2 compared, 2 passed, 0 failed, 1 skipped" in result.stdout
    assert (document["pair"]["ok"], document["pair"]["stopped"], document["cells_left"]) == (True, "", 0)
    assert [row["status"] for row in document["rows"]] == ["ok", "skipped", "ok"]
    assert (document["rows"][0]["worst_index"], document["rows"][0]["max_abs_error"]) == ([0, 1], "inf")
    assert (junit.get("tests"), junit.get("errors")) == ("3", "0")
    assert "STOPPED" not in page
    # What the pair's own code printed is shown where it cannot be taken for the report.
    assert result.stderr.splitlines()[1:] == ["  one", r"  two\x1b[2J"]


@pytest.mark.parametrize(
    ("statuses", "status", "deed", "sentence"),
    [
        ([], 2, "os._exit(0)", "ended with status 0 while calling the factory; it printed last: two\\x1b[2J."),
        (["ok"], 2, "os._exit(0)", "ended with status 0 while calling the factory; it printed last: two\\x1b[2J."),
        (["ok", "mismatch"], 1, "os._exit(0)", "ended with status 0 while calling the factory"),
        (["ok"], 2, "sys.exit(0)", "raised SystemExit: 0 "),
        (["ok"], 2, "raise KeyboardInterrupt", "raised KeyboardInterrupt: no reason given "),
        (["mismatch"], 1, "time.sleep(600)", "gave no answer within 1 s while calling the factory; it printed last"),
        (["ok"], 2, "os.close(channel._replies); os._exit(0)", "ended with status 0 while calling the factory"),
        ([], 2, "channel.send({'refused': 'expected something else.'})", "pair: expected something else."),
        (["mismatch"], 1, "channel.send({'refused': 'expected something else.'})", "pair: expected something else."),
    ],
)
def test_an_early_end_is_no_success_and_keeps_what_was_compared(run, statuses, status, deed, sentence):
    result, document, junit, page = run(statuses, deed, "--timeout-s", "1")
    assert result.exit_code == status, result.output
    assert result.stderr.startswith("error: --pair some:pair: expected ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.strip().isprintable()
    assert document["pair"]["ok"] is False
    assert document["pair"]["stopped"] in result.stderr
    assert (len(document["rows"]), document["cells_left"]) == (len(statuses), 1)
    assert (junit.get("tests"), junit.get("errors")) == (str(len(statuses) + 1), "1")
    assert "STOPPED before its end" in page
    assert ("STOPPED" in result.stdout) is bool(statuses)


def test_a_factory_that_hangs_beside_another_interpreter_has_no_longer_than_alone(run):
    deed = "channel.send({'step': 'calling some:pair'}); time.sleep(600)"
    result, _, _, _ = run([], deed, "--timeout-s", "1", "--jax-python", sys.executable)
    assert result.exit_code == 2, result.output
    assert "gave no answer within 1 s while calling some:pair; it printed last: two" in result.stderr


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_an_interruption_keeps_what_was_compared(run, signal):
    deed = f"os.kill(os.getppid(), signal.{signal}); time.sleep(600)"
    result, document, junit, page = run(["ok", "mismatch"], deed)
    assert result.exit_code == 130, result.output
    assert "interrupted while calling the factory." in result.stderr
    assert [row["status"] for row in document["rows"]] == ["ok", "mismatch"]
    assert document["pair"]["stopped"] == "interrupted while calling the factory."
    assert junit.get("errors") == "1"
    assert "STOPPED before its end" in page


FACTORIES = """
import os, sys

def ends():
    print("last words")
    os._exit(0)

def exits():
    sys.exit(0)

def forks():
    if os.fork():
        os.wait()
    return {"unknown": 1}
"""


BAN = """
import sys

class Ban:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "jax", "flax"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Ban())
"""


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("ends", "whose process ended with status 0 while calling doomed:ends; it printed last: last words."),
        ("exits", "expected a factory that returns, got one that raised SystemExit: 0 ("),
        ("forks", "to return arguments among torch_module"),
    ],
)
def test_a_factory_runs_in_a_process_of_its_own(factory, sentence, tmp_path, monkeypatch):
    """With the real judge; it finds no framework, which would take seconds to import and which these do not come to."""
    (tmp_path / "doomed.py").write_text(textwrap.dedent(FACTORIES))
    (tmp_path / "sitecustomize.py").write_text(BAN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "framework_available", lambda framework: True)
    monkeypatch.syspath_prepend(tmp_path)
    result = CliRunner().invoke(app, ["run", "--pair", f"doomed:{factory}"], catch_exceptions=False)
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("present", "options", "extras"),
    [
        ((), [], "torch,jax"),
        (("torch",), [], "jax"),
        (("jax",), [], "torch"),
        (("jax",), ["--jax-python", "python3"], "torch"),
    ],
)
def test_a_framework_that_is_not_installed_is_named_with_its_extra(monkeypatch, present, options, extras):
    monkeypatch.setattr(command, "framework_available", lambda framework: framework in present)
    result = CliRunner().invoke(app, ["run", "--pair", "some:pair", *options], catch_exceptions=False)
    assert result.exit_code == 2
    assert f"pip install 'partitioned-linear[{extras}]'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_other_interpreters_that_hang_end_the_check_in_time(tmp_path):
    """The process that judges says which of its own processes it was."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho asleep\nsleep 600\n")
    program.chmod(0o755)
    pythons = {"torch_python": str(program), "jax_python": str(program)}
    stopped = judging.judge_apart("parity_tests.pair.examples:linear", pythons, timeout_s=1.0).report.stopped
    assert (
        f"torch_python: expected an interpreter, got {str(program)!r}: the torch interpreter gave no answer" in stopped
    )
    assert "within 1 s before it greeted" in stopped
    assert "it printed last: asleep" in stopped
