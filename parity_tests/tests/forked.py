"""Fresh Python processes that need not import the packages of others: forks of one that has, and has done no more.

Run as a program, this file is that process. A child gets arguments, an environment, a folder and standard streams of
its own, and ends as any program does. Programs of JAX are compiled there as by the fixture `quick_compilation`.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
import warnings
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A framework that is not installed is not there in a child either.
PRELOADED = ("torch", "torch.distributed.tensor", "jax", "flax.nnx", "flax.linen", "optax", "einops")
PRELOADED += ("scipy.stats", "scipy.optimize", "typer", "rich.progress")


@cache
def _server():
    variables = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, __file__]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
    atexit.register(server.kill)
    return server


def run_python(*arguments, cwd=ROOT, timeout=120, **variables):
    """What `subprocess.run` returns of Python with the arguments `-m module ...` or `-c code ...`, as a new process.

    Args:
        arguments: of the interpreter; a warning of deprecation that they cause is an error in either case.
        cwd: where it works.
        timeout: seconds until an alarm ends it.
        variables: of its environment besides this process's; packages are looked for in this checkout by default.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [f"{folder}/{name}" for name in ("stdout", "stderr")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        server = _server()
        server.stdin.write(json.dumps([arguments, str(cwd), environment, streams, timeout]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(Path(stream).read_text() for stream in streams))


def _become(arguments, cwd, environment, streams, timeout):
    """Go on as the program with these arguments."""
    signal.alarm(timeout)
    for number, path in enumerate([os.devnull, *streams]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = ["", *environment["PYTHONPATH"].split(os.pathsep)]
    warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
    kind, what, *rest = arguments
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(main))


def _serve():
    """Fork a child for each line of standard input, and print its exit status."""
    del sys.path[0]
    for name in PRELOADED:
        with suppress(ImportError):
            import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return _become(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


if __name__ == "__main__":
    _serve()
