"""The transport: whatever the code in a child does to its process, the parent gets messages or one sentence."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import parity_tests.interpreters as interpreters
from parity_tests.interpreters import interpreter, process
from parity_tests.interpreters.interpreter import Interpreter
from parity_tests.interpreters.process import ChildProcess, ProcessError, clipped

# Answers after it did what it is told to.
CHILD = """
import atexit, os, signal, subprocess, sys, threading, time

def leave_daemon(path):
    code = "import os, time; open(%r, 'w').write(str(os.getpid())); time.sleep(600)" % path
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not os.path.exists(path) or not open(path).read():
        time.sleep(0.01)

def print_megabytes():
    os.write(1, b"\\xff\\0\\x1b[2J" * 2**18)
    os.write(2, os.urandom(2**20))
    print("the last\\twords", end="")

def fork_and_return():
    # The copy would be the first to listen.
    if os.fork():
        time.sleep(0.3)

def fork_and_raise():
    if os.fork() == 0:
        raise ValueError("in the copy")
    time.sleep(0.3)

def fork_and_leave():
    if os.fork():
        os._exit(0)
    time.sleep(0.1)

def close_first():
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    for _ in range(3):
        os.open(os.devnull, os.O_RDWR)

def reopen(path):
    # The connection to the parent, but for what comes from there, is the second of these.
    os.closerange(101, 4096)
    for _ in range(200):
        os.open(path, os.O_RDWR | os.O_CREAT)

def patch():
    import builtins, json
    sys.exit = os._exit = os.getpid = os.write = json.dumps = builtins.print = lambda *arguments, **named: None
    sys.stdout = sys.stderr = None

def leave_for_elsewhere():
    os.chdir("/")
    os.environ.clear()

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def never_end():
    atexit.register(time.sleep, 600)
    threading.Thread(target=time.sleep, args=(600,)).start()

def flood():
    while True:
        print("x" * 1000)

def kill_group():
    os.kill(0, signal.SIGKILL)

class Base(BaseException):
    pass

def raise_base():
    raise Base("neither an Exception")

def main(channel, deed, *arguments):
    eval(deed)(*map(eval, arguments))
    while (message := channel.receive()) is not None:
        payload = message.pop("payload", None)
        channel.send({"echo": message}, payload)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Starts a child that does a deed before it answers."""
    (tmp_path / "deeds.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(*words, timeout_s=60.0):
        return Interpreter("deeds", words, who="the child", timeout_s=timeout_s)

    return start


def gone(pid):
    """Waits until a process is dead; a zombie is, whoever has to reap it."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    "deed",
    ["int", "print_megabytes", "fork_and_return", "fork_and_raise", "close_first", "patch", "leave_for_elsewhere"],
)
def test_what_a_child_does_to_its_process_does_not_reach_the_messages(child, deed):
    with child(deed) as running:
        for number in range(2):
            running.send({"number": number, "text": "ü\n\x1b" + "x" * 10**6})
            assert running.receive() == {"echo": {"number": number, "text": "ü\n\x1b" + "x" * 10**6}}
        for payload in (b"", b"\n{}\0" * 2**20):
            running.send({}, payload)
            assert running.receive() == {"echo": {}, "payload": payload}
        if deed == "print_megabytes":
            assert running.child.printed_bytes > 2**20
            assert running.child.printed.endswith("the last\\twords")
            assert len(running.child._printed) <= 2**16


@pytest.mark.parametrize(
    ("deed", "happened"),
    [
        ("sys.exit", "raised SystemExit: no reason given"),
        ("raise_base", "raised Base: neither an Exception"),
        ("os._exit(0) or print", "ended with status 0; it printed nothing"),
        ("print('bye \\x1b[31m') or os._exit(3) or print", r"ended with status 3; it printed last: bye \\x1b\[31m"),
        ("os.abort", r"ended with status -6 \(SIGABRT\)"),
        ("kill_group", r"ended with status -9 \(SIGKILL\)"),
        ("fork_and_leave", "ended with status 0"),
        ("os.closerange(0, 4096) or print", "ended with status 70"),
        ("input", "raised EOFError"),
    ],
)
def test_a_child_that_ends_early_is_one_sentence(child, deed, happened):
    with child(deed) as running:
        running.send({})
        with pytest.raises(ProcessError, match=f"the child {happened}") as caught:
            running.receive()
        assert str(caught.value).isprintable()
    assert gone(running.child.pid)


@pytest.mark.parametrize("deed", ["time.sleep(600) or print", "stop", "flood"])
def test_a_child_that_hangs_is_ended_in_time(child, deed):
    with child(deed) as running:
        running.timeout_s = 0.5
        with pytest.raises(ProcessError, match=r"the child gave no answer within 0.5 s; it printed .*--timeout-s"):
            running.receive()
    assert gone(running.child.pid)


def test_a_file_that_took_the_place_of_the_connection_is_not_written_to(child, tmp_path):
    with child("reopen", repr(str(tmp_path / "file"))) as running:
        running.send({})
        with pytest.raises(ProcessError, match=r"closed its connection|ended with status"):
            running.receive()
    assert (tmp_path / "file").read_bytes() == b""


def test_the_group_of_a_child_ends_with_it():
    """Also what does not carry the child's mark in its environment."""
    code = (
        "import subprocess, sys;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], env={});"
        "print(child.pid, flush=True); child.wait()"
    )
    running = ChildProcess([sys.executable, "-c", code], os.environ, "the child")
    pid = int(running.read_line(60))
    os.kill(pid, 0)
    running.end(0)
    assert gone(pid)


def test_all_that_a_child_started_ends_with_it(child, tmp_path):
    pid = tmp_path / "pid"
    with child("leave_daemon", repr(str(pid))) as running:
        running.send({})
        assert running.receive() == {"echo": {}}
        # It is there, and out of the group.
        assert os.getsid(int(pid.read_text())) != os.getsid(running.child.pid)
    assert gone(int(pid.read_text()))


def test_a_child_that_never_ends_gets_a_moment(child):
    with child("never_end") as running:
        running.send({})
        assert running.receive() == {"echo": {}}
        began = time.monotonic()
    assert time.monotonic() - began < 20
    assert gone(running.child.pid)


def test_a_child_may_clean_up_when_it_exits(child, tmp_path):
    with child(f"__import__('atexit').register(open, {str(tmp_path / 'left')!r}, 'w') and print"):
        pass
    assert (tmp_path / "left").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a busy child with its parent")
def test_a_child_ends_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "deeds.py").write_text(CHILD)
    code = (
        "import os, signal; from parity_tests.interpreters.interpreter import Interpreter;"
        # Busy, so that it does not see the closed connection.
        "running = Interpreter('deeds', ['time.sleep', '600'], who='the child');"
        "print(running.child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = str(Path(interpreters.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == -9, done.stderr
    assert gone(int(done.stdout))


@pytest.mark.parametrize("with_pidfd", [True, False])
def test_a_pipe_that_stays_open_does_not_keep_the_parent(with_pidfd, monkeypatch):
    if not with_pidfd:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    code = "import os; os.fork() and os._exit(5); os.setsid(); import time; time.sleep(600)"
    running = ChildProcess([sys.executable, "-c", code], os.environ, "the child")
    try:
        with pytest.raises(ProcessError, match="the child ended with status 5"):
            running.read_line(60)
    finally:
        running.end(0)


def program(tmp_path, text):
    path = tmp_path / "program"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "happened"),
    [
        ("#!/bin/sh\nexit 0\n", "ended with status 0 before it greeted as a Python from 3.11 on does"),
        ("#!/bin/sh\nsleep 600\n", "gave no answer within 1 s before it greeted"),
        ("#!/bin/sh\necho '[1]'; echo {}; printf 'gar\\001bage'; exit 3\n", r"ended with status 3 .*: gar\\x01bage"),
        ("#!/bin/sh\nyes ''\n", "printed 1000 lines before it greeted"),
        ("#!/bin/sh\ncat /dev/zero\n", r"wrote \d+ bytes without an end of line before it greeted"),
        ("#!/bin/sh\nyes >&2\n", "gave no answer within 1 s before it greeted .*; it printed last: y"),
        ("no program\n", r"cannot be started \(Exec format error\)$"),
        ("#!/no/such/shell\n", r"cannot be started \(No such file or directory\)$"),
    ],
)
def test_a_program_that_is_no_python_is_one_sentence(tmp_path, text, happened):
    with pytest.raises(ProcessError, match=f"the child {happened}"):
        Interpreter("json", who="the child", python=program(tmp_path, text), timeout_s=1)


@pytest.mark.parametrize("python", ["", "/no/such/python", "/", "a\0b"])
def test_a_path_that_is_no_program_is_one_sentence(python):
    with pytest.raises(ProcessError, match="the child cannot be started"):
        Interpreter("json", who="the child", python=python)


def test_a_start_up_file_may_print_and_a_wrapper_may_stay(tmp_path, child):
    wrapper = program(tmp_path, f'#!/bin/sh\necho banner; printf unfinished >&2; {sys.executable} "$@"\n')
    with Interpreter("deeds", ["int"], who="the child", python=wrapper) as running:
        running.send({})
        assert running.receive() == {"echo": {}}


def test_what_a_python_lacks_is_named(tmp_path):
    bare = program(tmp_path, f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    with (
        Interpreter("parity_tests.pair.loading", who="the child", python=bare) as running,
        pytest.raises(ProcessError, match=r"the child raised ModuleNotFoundError: No module named '\w+'"),
    ):
        running.receive()


def test_the_entry_can_be_read_by_old_pythons():
    """They answer with the version that is needed, instead of a syntax error."""
    folder = Path(interpreters.__file__).parent
    for path in (folder / "__main__.py", folder / "__init__.py", folder.parent / "__init__.py"):
        source = path.read_text(encoding="ascii")
        tree = ast.parse(source, feature_version=(3, 4))
        if path.name == "__main__.py":
            # The version is asked for before anything of ours is imported.
            first = next(node for node in tree.body if isinstance(node, ast.If))
            assert all(node.lineno > first.lineno for node in tree.body if isinstance(node, ast.ImportFrom))
            told = source.replace("sys.version_info < (3, 11)", "True", 1)
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Python 3.11 or newer is needed, this is Python 3.")


def test_the_transport_needs_the_standard_library_only():
    code = (
        "import sys, parity_tests.interpreters.interpreter;"
        "known = sys.stdlib_module_names | {'parity_tests', '__main__'};"
        "print([name for name in sys.modules if name.split('.')[0] not in known])"
    )
    root = str(Path(interpreters.__file__).parents[2])
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(
        command, env={"PYTHONPATH": root}, capture_output=True, text=True, timeout=60, check=False, cwd="/"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_texts_are_made_printable():
    assert clipped("a\tb\x1b[0m\u202e\udc80") == "a\\tb\\x1b[0m\\u202e\\udc80"
    assert clipped("x" * 10**6) == "x" * 100 + " ... " + "x" * 100
    assert process.signal_name(-9) == "SIGKILL"
    assert process.signal_name(-63) == "63"
    assert interpreter._decoded(b"[" * 10**5) is None
