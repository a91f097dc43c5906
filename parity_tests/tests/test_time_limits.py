"""Nothing waits for a process without a time limit: found by reading every source file, and seen where it counts."""

import ast

import pytest

from parity_tests.interpreters.process import ProcessError
from parity_tests.judge.subjects import framework_available
from parity_tests.tests.test_architecture import ROOT, sources

# Calls that wait for as long as it takes unless they are given a limit, by the name that is called.
_RUNS = {"run", "call", "check_call", "check_output", "getoutput", "getstatusoutput"}
_METHODS = {
    "wait",
    "communicate",
    "join",
    "get",
    "result",
    "exception",
    "acquire",
    "select",
    "recv",
    "recv_bytes",
    "accept",
}
_FUNCTIONS = {"system", "popen", "waitpid", "wait3", "wait4", "as_completed", "wait_for"}
_STREAMS = {"stdout", "stderr", "stdin"}

# By file and function, each with what ends the wait.
ALLOWED = {
    (
        "bench/study/results.py",
        "_in_parts",
    ): "every result is waited for with a limit, and what then still runs is killed",
    ("parity_tests/frameworks/jax/recorder.py", "named_calls"): "a context variable, which nothing waits for",
}


def _limited(call):
    """Whether a call has a limit that is not None: a keyword, or a positional argument of a method that takes one."""
    named = [word.value for word in call.keywords if word.arg in ("timeout", "timeout_s")]
    given = [*named, *call.args] if isinstance(call.func, ast.Attribute) and call.func.attr in _METHODS else named
    return any(not (isinstance(value, ast.Constant) and value.value is None) for value in given)


def unlimited_waits(source):
    """Yields the function and the line of every call that may wait for ever."""

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            found = False
            if isinstance(child, ast.Call):
                called = child.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                base = called.value if isinstance(called, ast.Attribute) else None
                owner = getattr(base, "id", getattr(base, "attr", ""))
                if owner == "subprocess" and name in _RUNS:
                    found = not _limited(child)
                elif owner == "select" and name == "select":
                    found = len(child.args) < 4
                elif (name in _FUNCTIONS and owner in ("os", "")) or (base is not None and name in _METHODS):
                    found = not _limited(child)
                elif name in ("readline", "read", "readlines") and owner in _STREAMS and base is not called:
                    # A process's own standard input is not another process.
                    found = getattr(getattr(base, "value", None), "id", "") != "sys"
                elif name == "ProcessPoolExecutor":
                    found = True
            elif isinstance(child, ast.For | ast.comprehension):
                found = isinstance(child.iter, ast.Attribute) and child.iter.attr in _STREAMS
            elif isinstance(child, ast.ImportFrom):
                # Under names of their own the calls would not be found.
                found = child.module in ("subprocess", "select") and any(
                    n.name in _RUNS | {"select"} for n in child.names
                )
            if found:
                yield inside, getattr(child, "lineno", getattr(getattr(child, "iter", None), "lineno", 0))
            yield from visit(child, inside)

    yield from visit(ast.parse(source), "")


WAITS = """
import subprocess, select, os, selectors
from subprocess import run
def one():
    subprocess.run(["git"])
    subprocess.check_output(["git"], timeout=None)
    process.wait()
    process.communicate(timeout=None)
    process.communicate(input=b"x")
    thread.join()
    queue.get()
    pipe.recv()
    future.result()
    select.select([a], [], [])
    selector.select()
    selector.select(None)
    os.waitpid(3, 0)
    os.system("ls")
    process.stdout.readline()
    self.process.stderr.read()
    [line for line in process.stdout]
    for line in self.process.stdout: pass
    for future in as_completed(futures): pass
    with ProcessPoolExecutor(2) as pool: pass
"""
LIMITED = """
import subprocess, select, sys
from select import epoll
def one():
    subprocess.run(["git"], timeout=3)
    subprocess.check_output(["git"], timeout=LIMIT_S)
    process.wait(5)
    process.communicate(timeout=2)
    thread.join(timeout=2)
    ",".join(words)
    options.get("x")
    queue.get(timeout=3)
    future.result(timeout=2)
    select.select([a], [], [], 0.5)
    selector.select(0.5)
    sys.stdin.readline()
    path.read()
    for line in lines: pass
    for future in as_completed(futures, timeout=3): pass
"""


def test_the_search_finds_every_kind_of_wait_and_nothing_else():
    lines = WAITS.splitlines()
    expected = [number for number, line in enumerate(lines, 1) if line.strip()][1:]
    expected.remove(lines.index("def one():") + 1)
    assert sorted({line for _, line in unlimited_waits(WAITS)}) == expected
    assert list(unlimited_waits(LIMITED)) == []


def test_nothing_waits_for_a_process_without_a_time_limit():
    found = set()
    for package in ("parity_tests", "bench"):
        for path in sources(package):
            name = str(path.relative_to(ROOT))
            # Tests have a time limit of their own.
            if path.name.startswith(("test_", "conftest")) or "tests" in path.parent.parts[-1:]:
                continue
            found |= {(name, function, line) for function, line in unlimited_waits(path.read_text())}
    unexpected = {entry for entry in found if entry[:2] not in ALLOWED}
    assert unexpected == set()
    # Nothing is allowed that is not there any more.
    assert set(ALLOWED) == {entry[:2] for entry in found}


@pytest.mark.skipif(not framework_available("torch"), reason="torch is not installed here")
@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("time.sleep(600)", r"expected an answer, but process 0 of 1 gave no answer within 1 s"),
        ("os._exit(7)", r"expected an answer, but process 0 of 1 ended with status 7"),
        ("channel.send({'received': True}); channel.receive(); time.sleep(600)", "gave no answer within 1 s"),
    ],
)
def test_shards_that_do_not_answer_are_ended_in_time(body, sentence, tmp_path, monkeypatch):
    from parity_tests.frameworks.torch import sharded

    (tmp_path / "stuck.py").write_text(f"import os, time\ndef main(channel, *arguments):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sharded, "_CHILD", "stuck")
    monkeypatch.setattr(sharded, "_running", [])
    shards = sharded._shards(1)
    shards._children[0].timeout_s = 1.0
    # More than a pipe holds: sending waits as well.
    with pytest.raises(RuntimeError, match=sentence):
        shards.run({}, b"x" * 2**22)
    assert sharded._running == []
    assert not shards._children[0].child.alive


@pytest.mark.skipif(not framework_available("jax"), reason="jax and flax are not installed here")
def test_a_finding_s_process_has_a_time_limit_and_its_own_sentence(monkeypatch, tmp_path):
    from parity_tests.frameworks.jax import findings

    monkeypatch.setattr(findings, "_PROCESS_S", 0.05)
    with pytest.raises(ProcessError, match=r"its process gave no answer within 0.05 s"):
        findings._divided_convolution()
    (tmp_path / "ending.py").write_text("def main(channel):\n    raise SystemExit('the last words')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(findings, "_PROCESS_S", 60.0)
    monkeypatch.setattr(findings, "_CHILD", "ending")
    with pytest.raises(ProcessError, match=r"its process raised SystemExit: the last words"):
        findings._divided_convolution()
