"""A whole sweep without the measuring: `python -m bench.tests.whole_sweep DIR CELLS ROUNDS`.

Plans, runs until it is interrupted, resumes and reports by the commands that a user types; only the timing of a cell
is replaced by invented blocks. A process of its own, so that its memory can be told. Prints, as JSON, what each stage
took: seconds, seconds of processor (`helpers_cpu_s`: of the processes that it started), how far its memory rose above
what it held once everything was imported, and the most that any process that it started has held so far.
"""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from bench.__main__ import app
from bench.commands import report, run  # noqa: F401  imported by the commands anyway, and no part of what a stage takes
from bench.measure import sweep
from bench.measure.request import Request
from bench.measure.rounds import CellOutcome, Entry
from bench.plan.presets import plan_cells
from bench.plan.workloads import log_grid
from bench.plan.workloads import sweep as points
from bench.study.results import Results
from bench.tests.fake_worker import start

# Cells that an interruption leaves to the resumed run.
LEFT_OUT = 5
NAMES = ("matmul", "loop")
# Seconds of a block by framework and name: JAX's product leads everywhere.
_BLOCK_S = {("torch", "matmul"): 0.0040, ("torch", "loop"): 0.0060, ("jax", "matmul"): 0.0032, ("jax", "loop"): 0.0060}
_DIRECTIONS = ("forward", "forward_backward")


def workloads(cells):
    """Names of so many shapes that, in two directions each, they make so many cells."""
    grid = points(
        batch=log_grid(1, 512),
        num_partitions=log_grid(1, 512),
        in_features=log_grid(2, 1024),
        out_features=log_grid(2, 32),
    )
    return [found.name for found in grid[: cells // len(_DIRECTIONS)]]


class InventedCell:
    """Takes the place of `CellRun`: every competitor is right, and its blocks scatter by one percent."""

    rounds = 10
    until = 0
    measured = 0

    def __init__(self, cell, competitors, *rest, **options):
        self.competitors = competitors

    def run(self):
        if InventedCell.measured == InventedCell.until:
            raise KeyboardInterrupt
        InventedCell.measured += 1
        baseline = self.competitors[0]
        entries = [self.entry(who, baseline=who == baseline) for who in self.competitors]
        entries.append(self.entry(baseline, baseline=True, control=True))
        return CellOutcome(tuple(entries), "digest", {"torch": {"precision": "highest"}}, stopped="resolved")

    def entry(self, who, **which):
        rng = np.random.default_rng((InventedCell.measured, len(who.label), which.get("control", False)))
        noise = np.exp(0.01 * rng.standard_normal(2 * InventedCell.rounds))
        blocks = (_BLOCK_S[who.framework, who.implementation] * noise).tolist()
        return Entry(
            who,
            "h",
            prepared=True,
            blocks=blocks,
            calls_per_block=10,
            warm_up=[0.005],
            compile_s=0.1 if who.framework == "jax" else None,
            peak_memory_bytes=4096,
            memory_method="invented",
            judgement={
                "bound_fraction": 0.25,
                "observed_precision": "ieee_fp32",
                "tensors": {"y": {"status": "ok", "bound_fraction": 0.25, "max_abs_error": 1e-7}},
            },
            probe={"enqueue_s": 1e-5, "kernels": {"product": 1}, "synchronised_latency_s": [0.003, 0.002, 0.002]},
            **which,
        )


def memory(field):
    """Bytes that this process holds (`VmRSS`) or held at most (`VmHWM`).

    Not `ru_maxrss`: a process starts with that of the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def command(*arguments):
    try:
        app([str(argument) for argument in arguments], standalone_mode=True)
    except SystemExit as error:
        return int(error.code or 0)
    raise AssertionError("a command ends with an exit status")


class Stages:
    def __init__(self):
        self.imported = memory("VmRSS")
        self.found = {}

    @contextlib.contextmanager
    def stage(self, name):
        # The high-water mark starts anew.
        Path("/proc/self/clear_refs").write_text("5")
        helpers, cpu, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.process_time(), time.perf_counter()
        self.found[name] = {}
        yield self.found[name]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.found[name] |= {
            "seconds": round(time.perf_counter() - began, 2),
            "cpu_s": round(time.process_time() - cpu, 2),
            "helpers_cpu_s": round(after.ru_utime + after.ru_stime - helpers.ru_utime - helpers.ru_stime, 2),
            "growth_bytes": memory("VmHWM") - self.imported,
            # At least that of this process at that time, which a process inherits until it runs a program of its own.
            "helper_peak_bytes": after.ru_maxrss * 1024,
        }


def main(directory, cells, rounds):
    sweep.starter = lambda *args, **kwargs: start
    sweep.CellRun = InventedCell
    # The checkout may change meanwhile, and a resumed run would rightly measure everything again.
    place = sweep.fingerprint({}, device="cpu", division="matched", cpus=())
    sweep.fingerprint = lambda *args, **kwargs: place
    # What a run shows at its end is what `report` shows: a stage of its own here.
    run.read_results = lambda directories, **options: Results((), {"ok": 1}, {})
    run._write = run._show = lambda *arguments: None
    InventedCell.rounds = rounds
    out = directory / "run"
    asked = ["run", "--preset", "sweep", "--out", out]
    asked += [part for name in NAMES for part in ("--implementation", name)]
    stages = Stages()
    with stages.stage("plan") as plan:
        names = workloads(cells)
        plan["cells"] = len(plan_cells(Request(preset="sweep", workload=tuple(names)).plan, "cpu"))
    asked += [part for name in names for part in ("--workload", name)]
    with stages.stage("store") as store:
        InventedCell.until = plan["cells"] - LEFT_OUT
        store["exit"] = command(*asked)
        store["measured"] = InventedCell.measured
    with (out / "records.jsonl").open("ab") as file:
        file.write(b'{"schema_version": 1, "key": "torn')
    with stages.stage("resume") as resumed:
        InventedCell.until = InventedCell.measured + plan["cells"]
        resumed["exit"] = command(*asked, "--resume")
        resumed["measured"] = InventedCell.measured - store["measured"]
    with stages.stage("report") as reported:
        files = {name: directory / f"report.{name}" for name in ("json", "csv")}
        options = [part for name, path in files.items() for part in (f"--{name}", path)]
        reported["exit"] = command("report", out, *options, "--markdown", directory / "report.md")
    return stages.found


if __name__ == "__main__":
    # The commands print a line for each cell; what is asked of this process is its last one.
    with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
        found = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(found))
