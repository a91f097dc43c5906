"""Sends running benchmarks a signal, again and again: `python -m bench.tests.killed_runs OUT LOG SEED SIGNALS`.

A process of its own, because it forks: each run is a child that begins where its imports are done, so that dozens of
runs take seconds. Prints what each run opened and recorded, as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from bench.__main__ import app
from bench.commands import run as command
from bench.measure import sweep
from bench.measure.environment import fingerprint
from bench.plan.workloads import log_grid
from bench.plan.workloads import sweep as points
from bench.records import parse_line
from bench.study.results import Results
from bench.tests.fake_worker import start

# Many more cells than fit between the kills, on a fast machine too: every kill must hit a run that is under way.
_EVERY = "EVERY_TEST" in os.environ
_BATCHES, _PARTITIONS = (log_grid(1, 2048), log_grid(1, 256)) if _EVERY else (log_grid(1, 128), log_grid(1, 16))
WORKLOADS = [found.name for found in points(batch=_BATCHES, num_partitions=_PARTITIONS, in_features=log_grid(4, 32))]


def launch(out):
    """One run with `--resume` in a child, silent; returns its process id."""
    child = os.fork()
    if child:
        return child
    # A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    arguments = ["run", "--preset", "smoke", "--rounds", "2", "--framework", "torch", "--resume", "--out", str(out)]
    arguments += ["--implementation", "matmul", "--implementation", "fast"]
    for name in WORKLOADS:
        arguments += ["--workload", name]
    try:
        app(arguments, standalone_mode=True)
    except SystemExit as error:
        os._exit(int(error.code or 0))
    finally:
        os._exit(70)


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def whole_cells(lines):
    """Lines of whole cells, and which cells they are; the rest was torn by the kill."""
    records = [parse_line(line) for line in lines if line.endswith("\n")]
    sizes = Counter(record.cell for record in records)
    kept = [record for record in records if sizes[record.cell] == record.cell_size]
    assert records[: len(kept)] == kept
    return lines[: len(kept)], {f"{record.workload} {record.direction}" for record in kept}


def wait_for_growth(log, lines, child):
    """Until a cell is opened; a child that has ended, with nothing left to do, opens none."""
    while len(lines_of(log)) == lines and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def main(out, log, seed, numbers):
    sweep.starter = lambda *args, **kwargs: start
    # Always the same here, and most of what a start costs.
    place = fingerprint({}, device="cpu", division="matched", cpus=())
    sweep.fingerprint = lambda *args, **kwargs: place
    # What is shown at the end is derived from the records, and tested elsewhere.
    command.read_results = lambda directories, **options: Results((), {"ok": 1}, {})
    command._write = command._show = lambda *arguments: None
    os.environ["FAKE_LOG"] = str(log)
    moment = random.Random(seed)
    runs = []
    for run, number in enumerate([*numbers, None]):
        opened = len(lines_of(log))
        child = launch(out)
        if number is not None:
            # Every fourth kill anywhere from the start on, the others while cells are measured and written. The other
            # signals can be answered only by a run that has begun.
            if run % 4 or number != signal.SIGKILL:
                wait_for_growth(log, opened, child)
            time.sleep(moment.uniform(0.0, 0.04))
            os.kill(child, number)
        _, status = os.waitpid(child, 0)
        runs.append(
            {
                "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
                "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                "opened": [line.decode().strip() for line in lines_of(log)[opened:]],
                "records": [line.decode(errors="replace") for line in lines_of(out / "records.jsonl")],
            }
        )
    print(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), [int(number) for number in sys.argv[4].split(",")])
