"""A large sweep in little memory. Time is not asserted: it depends on the machine."""

import json
import resource
import subprocess
import sys

import pytest

from bench.measure.worker_process import CHECKOUT
from bench.tests.synthetic import write_sweep

CELLS = 150

# The records alone would take several times the cap if a sweep were read as a whole.
_CHILD = """
import resource, sys
from pathlib import Path
import numpy, rich.console
import bench.commands.report, bench.commands.validate
from bench.commands.report import Outputs, report_command
from bench.store import Store
directory = Path(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
cap = pages * resource.getpagesize() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
store = Store(directory, resume=True)
assert store.holds("0000000000000000", 0)
outputs = Outputs(
    markdown=directory / "r.md",
    json_file=directory / "r.json",
    csv_file=directory / "r.csv",
    pytest_benchmark=directory / "p.json",
)
status = report_command([directory], outputs)
assert status == 0, status
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    from bench.tests.conftest import example_record

    directory = tmp_path_factory.mktemp("sweep") / "run"
    # Many samples in each record, so that the file is large and the number of cells small.
    write_sweep(directory, example_record, CELLS, rounds=100, competitors=12)
    return directory


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="needs Linux's memory limit")
def test_a_sweep_resumes_and_reports_in_less_memory_than_its_samples_take(sweep):
    size = (sweep / "records.jsonl").stat().st_size
    samples = CELLS * 13 * 200
    as_objects = 32 * samples
    cap = 36 * 2**20
    assert as_objects > 0.9 * cap or size > 0.2 * cap
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(sweep), str(cap)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={"PYTHONPATH": str(CHECKOUT), "OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((sweep / "r.json").read_text())
    assert len(found["cells"]) == CELLS
    assert {cell["winner"] for cell in found["cells"]} == {"torch form-0 (eager)"}
    assert len(json.loads((sweep / "p.json").read_text())["benchmarks"]) == CELLS * 12
    assert f"{CELLS} cells" in done.stdout or CELLS <= 150
