"""Real signals sent to the benchmark: what was read or measured until then is in the files that were asked for."""

import json
import os
import signal
import subprocess
import sys

import pytest

from bench.measure.workers import CHECKOUT
from bench.tests.killed_runs import whole_cells
from bench.tests.synthetic import write_sweep

CELLS, READ = 6, 4
OLD = "as it was"
# All commands in one process, since most of what a start takes is imports. Each is interrupted after so many cells, and
# again, in impatience, whenever it writes.
SCRIPT = """
import json, os, sys
from pathlib import Path
from bench import store
from bench.__main__ import app
from bench.commands import inspect
from bench.measure import sweep
from bench.tests.fake_worker import start
from bench.study import results as study_results
from parity_tests.report import files

# A limit beyond what there is: then the first signal comes while it writes.
number, read, commands = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
real_cells, real_output, real_append = store.read_cells, files.output, store.Store.append
counted = 0

def count(limit):
    global counted
    counted += 1
    if counted == limit:
        os.kill(os.getpid(), number)

def read_cells(cells):
    for group in real_cells(cells):
        count(read + 1)
        yield group

def violations(directory, found):
    for k in range(9):
        count(read + 1)
        found.records += 1
        yield f"violation {k}"

def append(self, records):
    real_append(self, records)
    if name == "run" and read < 100:
        count(2)

def output(argument, path):
    if Path(path).name != "environment.json":
        os.kill(os.getpid(), number)
    return real_output(argument, path)

store.read_cells = study_results.read_cells = read_cells
inspect.violations, files.output, store.Store.append = violations, output, append
sweep.starter = lambda *arguments, **options: start
ended = {}
for name, arguments in commands.items():
    counted = 0
    try:
        app(arguments, prog_name="bench")
    except SystemExit as error:
        ended[name] = error.code
print(json.dumps(ended))
"""
RUN = ["run", "--preset", "smoke", "--rounds", "2", "--framework", "torch", "--implementation", "matmul"]
RUN += [part for name in ("article-base", "article-n8", "article-batch-1") for part in ("--workload", name)]


def run_script(folder, number, read, commands):
    """How each command ended, and the process that ran them all."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(int(number)), str(read), json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done


@pytest.fixture(scope="module", params=[signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "time limit"])
def interrupted(request, tmp_path_factory):
    """What every command printed and left in its folder, and how it ended."""
    from bench.tests.conftest import example_record

    folder = tmp_path_factory.mktemp("interrupted")
    write_sweep(folder / "records", example_record, CELLS, competitors=3)
    commands = {
        "report": ["report", "records", "--markdown", "report.md", "--csv", "report.csv", "--chart", "report.svg"],
        "claims": ["claims", "records", "--markdown", "claims.md", "--csv", "claims.csv"],
        "compare": ["compare", "records", "records", "--csv", "compare.csv"],
        "validate": ["validate", "records", "--csv", "validate.csv"],
        "run": [*RUN, "--out", "run"],
    }
    commands = {name: [*arguments, "--json", f"{name}.json"] for name, arguments in commands.items()}
    for name in ("report.csv", "report.svg", "claims.csv", "compare.csv", "validate.csv", "report.md"):
        (folder / name).write_text(OLD)
    return folder, *run_script(folder, request.param, READ, commands)


def document(interrupted, name):
    folder, _, _ = interrupted
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.sample(2)
def test_every_command_ends_with_the_status_of_an_interruption(interrupted):
    _, ended, done = interrupted
    assert ended == dict.fromkeys(("report", "claims", "compare", "validate", "run"), 130)
    assert done.stderr.count("bench: interrupted") == len(ended)


def test_a_report_has_what_was_read_and_says_so(interrupted):
    folder, _, _ = interrupted
    found = document(interrupted, "report")
    assert len(found["cells"]) == READ
    assert found["stopped"] == f"interrupted: {READ} cells were read, the others were left"
    text = (folder / "report.md").read_text()
    assert found["stopped"] in text
    assert text.count("\n### ") == READ


def test_what_cannot_say_that_it_was_cut_short_stays(interrupted):
    folder, _, _ = interrupted
    for name in ("report.csv", "report.svg", "claims.csv", "compare.csv", "validate.csv"):
        assert (folder / name).read_text() == OLD


def test_no_claim_is_judged_by_half_of_the_cells(interrupted):
    folder, _, _ = interrupted
    found = document(interrupted, "claims")
    assert found["stopped"].startswith("interrupted: ")
    assert {claim["verdict"] for claim in found["claims"]} == {"interrupted"}
    assert "Interrupted: some cells were left" in (folder / "claims.md").read_text()


def test_a_comparison_that_read_one_run_alone_compares_nothing_and_says_so(interrupted):
    found = document(interrupted, "compare")
    assert found["stopped"].startswith("interrupted: ")
    assert (found["changes"], found["only_a"], found["only_b"]) == ([], [], [])


def test_a_validation_has_what_it_found(interrupted):
    found = document(interrupted, "validate")
    assert found["violations"] == [f"violation {k}" for k in range(READ)]
    assert found["stopped"] == f"interrupted: {READ} records were looked at, the others were left"


def test_a_run_reports_what_it_measured(interrupted):
    folder, _, _ = interrupted
    found = document(interrupted, "run")
    assert len(found["cells"]) == 2
    assert found["stopped"] == "interrupted; what was measured is in run; add --resume to continue"
    assert found["stopped"] in (folder / "run" / "report.md").read_text()
    lines = (folder / "run" / "records.jsonl").read_text().splitlines(keepends=True)
    assert whole_cells(lines)[0] == lines


def test_nothing_unfinished_is_left(interrupted):
    folder, _, _ = interrupted
    assert [name for name in os.listdir(folder) if name.endswith(".partial")] == []


def test_a_comparison_that_read_some_of_both_compares_these(tmp_path, make_record):
    write_sweep(tmp_path / "records", make_record, CELLS, competitors=3)
    command = ["compare", "records", "records", "--json", "compare.json"]
    # The whole of A, and two of B.
    ended, _ = run_script(tmp_path, signal.SIGINT, CELLS + 2, {"compare": command})
    assert ended == {"compare": 130}
    found = json.loads((tmp_path / "compare.json").read_text())
    assert {change["workload"] for change in found["changes"]} == {"sweep-b4-n1-i2-o1", "sweep-b4-n1-i2-o2"}
    assert (found["only_a"], found["only_b"]) == ([], [])


def test_a_signal_while_files_are_written_costs_none_of_them(tmp_path, make_record):
    write_sweep(tmp_path / "records", make_record, CELLS, competitors=3)
    commands = {
        "report": ["report", "records", "--markdown", "report.md", "--csv", "report.csv", "--json", "report.json"],
        "run": [*RUN, "--out", "run", "--json", "run.json"],
    }
    ended, done = run_script(tmp_path, signal.SIGTERM, 10**6, commands)
    assert ended == {"report": 130, "run": 130}
    for name, cells in (("report", CELLS), ("run", 6)):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert (len(found["cells"]), found["stopped"]) == (cells, "")
    assert (tmp_path / "report.md").exists()
    assert (tmp_path / "report.csv").exists()
    # The user asked for an end, so the tables are not printed.
    assert "Outcomes" not in done.stdout


@pytest.mark.parametrize("name", ["bench.commands.arguments", "parity_tests.report.console"])
def test_an_interruption_while_modules_are_imported_ends_without_a_traceback(name):
    code = f"""
import runpy, sys
class Finder:
    def find_spec(self, found, *_):
        if found == {name!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
runpy.run_module("bench", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (130, "")
