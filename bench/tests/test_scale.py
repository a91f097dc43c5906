"""A large sweep in little memory. Time is not asserted: it depends on the machine."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future

import pytest
from rich.console import Console

from bench.commands.arguments import selection
from bench.environments import StoreError
from bench.measure.workers import CHECKOUT
from bench.report.tables import show_rankings
from bench.study import results as study_results
from bench.study.results import read_results
from bench.tests.conftest import example_record
from bench.tests.in_memory import rankings
from bench.tests.synthetic import cell_records, write_sweep
from bench.tests.whole_sweep import LEFT_OUT

CELLS, COMPETITORS, SAMPLES = 20, 8, 8000
CAP_BYTES = 32 * 2**20

# The cap counts from what the process holds once everything is imported.
_CHILD = """
import resource, sys
from pathlib import Path
import numpy, rich.console
import bench.commands.inspect
from bench.commands.report import report
from bench.store import Store, read_records
# The linear algebra library takes its buffers at its first use, whatever the size.
numpy.linalg.eigvalsh(numpy.eye(64))
directory = Path(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
cap = pages * resource.getpagesize() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
if sys.argv[3] == "whole":
    read_records(directory)
store = Store(directory, resume=True)
assert store.holds("0000000000000000", 0)
names = {"markdown": "r.md", "json_file": "r.json", "csv_file": "r.csv"}
status = report([directory], **{option: directory / name for option, name in names.items()})
assert status == 0, status
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sweep") / "run"
    # Many samples in each record, so that the file is large and the number of cells small.
    write_sweep(directory, example_record, CELLS, competitors=COMPETITORS, warm_up=SAMPLES)
    return directory


def in_a_process(*arguments):
    """Python with these arguments, from the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        # One thread, since each takes address space of its own.
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "OPENBLAS_NUM_THREADS": "1"},
    )


def limited(sweep, how):
    return in_a_process("-c", _CHILD, sweep, CAP_BYTES, how)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space of a process")
def test_a_sweep_resumes_and_reports_in_less_memory_than_its_samples_take(sweep):
    done = limited(sweep, "cell by cell")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((sweep / "r.json").read_text())
    assert len(found["cells"]) == CELLS
    assert {cell["winner"] for cell in found["cells"]} == {"torch form-0 (eager)"}
    assert sum(len(cell["rows"]) for cell in found["cells"]) == CELLS * COMPETITORS
    # The cap is one that matters: all records at once do not fit.
    assert "MemoryError" in limited(sweep, "whole").stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process how much memory it held at most")
@pytest.mark.parametrize(("cells", "cap_bytes"), [(1000, 64 * 2**20), (10_000, 300 * 2**20)], ids=["1000", "10000"])
def test_a_sweep_is_planned_stored_resumed_and_reported(cells, cap_bytes, request, tmp_path, record_property):
    if cells > 1000 and not request.config.getoption("--whole-sweep", default=False):
        pytest.skip("takes some 30 seconds of processor: run with --whole-sweep (-s shows what each stage took)")
    done = in_a_process("-m", "bench.tests.whole_sweep", tmp_path, cells, 10)
    assert done.returncode == 0, done.stderr[-2000:]
    stages = json.loads(done.stdout)
    for name, found in stages.items():
        print(f"{cells} cells, {name}: {found}")
        record_property(name, json.dumps(found))
    assert stages["plan"]["cells"] == cells
    # Interrupted, as by Ctrl-C, before the last few cells: the resumed run measures these and no other.
    assert (stages["store"]["exit"], stages["store"]["measured"]) == (130, cells - LEFT_OUT)
    assert (stages["resume"]["exit"], stages["resume"]["measured"]) == (0, LEFT_OUT)
    assert stages["report"]["exit"] == 0
    assert (tmp_path / "run" / "torn.jsonl").read_text().endswith('"torn')
    with (tmp_path / "run" / "records.jsonl").open("rb") as file:
        assert sum(1 for _ in file) == cells * 5
    reported = json.loads((tmp_path / "report.json").read_text())
    assert (len(reported["cells"]), reported["summary"]) == (cells, {"ok": cells * 4})
    assert {cell["winner"] for cell in reported["cells"]} == {"jax matmul (jit)"}
    with (tmp_path / "report.csv").open() as file:
        assert sum(1 for _ in file) == 1 + cells * 4
    assert (tmp_path / "report.md").read_text().count("Fastest: jax matmul (jit)") == cells
    assert max(found["growth_bytes"] for found in stages.values()) < cap_bytes


def test_a_sweep_of_thousands_of_cells_prints_one_line_for_each(make_record, capsys):
    one = rankings(cell_records(make_record, 0, (64, 8, 2, 2), competitors=5))
    show_rankings(Console(), one * 1000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1001
    assert lines[0].endswith("Fastest: torch form-0 (eager), against every other competitor (Holm-corrected).")
    assert lines[-1].startswith("1000 cells, one line each; --markdown, --json and --csv")


@pytest.mark.every
def test_a_large_sweep_is_ranked_by_several_processes_as_by_one(sweep, monkeypatch):
    monkeypatch.setattr(study_results, "_CELLS_A_TASK", 7)
    wanted = selection("--where", ["in_features=2"])
    alone = read_results([sweep]), read_results([sweep], wanted)
    started = []
    pool = study_results.ProcessPoolExecutor
    monkeypatch.setattr(study_results, "ProcessPoolExecutor", lambda *a, **k: started.append(a) or pool(*a, **k))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(study_results, "_MANY_CELLS", 1)
    assert (read_results([sweep]), read_results([sweep], wanted)) == alone
    assert 0 < len(alone[1].found) < len(alone[0].found)
    assert started == [(2,), (2,)]


def test_a_process_that_cannot_start_leaves_the_work_to_this_one(sweep, monkeypatch):
    class Broken(study_results.ProcessPoolExecutor):
        def submit(self, rank, task):
            future, first = Future(), not self.__dict__.setdefault("asked", [])
            self.asked.append(task)
            future.set_result(rank(task)) if first else future.set_exception(study_results.BrokenProcessPool())
            return future

    alone = read_results([sweep])
    monkeypatch.setattr(study_results, "_CELLS_A_TASK", 7)
    monkeypatch.setattr(study_results, "ProcessPoolExecutor", Broken)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(study_results, "_MANY_CELLS", 1)
    assert read_results([sweep]) == alone


def test_damage_is_found_by_other_processes_as_well(sweep, tmp_path, monkeypatch):
    damaged = tmp_path / "run"
    shutil.copytree(sweep, damaged)
    lines = (damaged / "records.jsonl").read_text().splitlines(keepends=True)
    lines[30] = lines[30].replace('"block_latency_s": [', '"block_latency_s": ["x", ')
    (damaged / "records.jsonl").write_text("".join(lines))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(study_results, "_MANY_CELLS", 1)
    with pytest.raises(StoreError, match=r"records.jsonl, line 31: .*block_latency_s"):
        read_results([damaged])
