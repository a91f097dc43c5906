import csv
import json
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from typer.main import get_command

from bench.__main__ import app
from bench.commands.run import RunOptions
from bench.measure.request import Request
from bench.measure.workers import CHECKOUT, WorkerPool
from bench.store import Store, read_environments, read_records
from bench.tests.synthetic import FINGERPRINT

TINY = ("--preset", "smoke", "--workload", "article-batch-1", "--rounds", "2")


@pytest.mark.usefixtures("fake_pool")
def test_run_writes_records_report_and_json_and_resumes(tmp_path, call):
    out = tmp_path / "run"
    wanted = ("--implementation", "matmul", "--implementation", "fast", "--json", tmp_path / "f.json")
    first = call("run", *TINY, *wanted, "--out", out)
    assert first.exit_code == 0, first.output
    assert "article-batch-1 (B=1, n=32, 32->32), forward_backward, fp32, matched, cpu" in first.output
    records = read_records(out)
    assert len(records) == 2 * (2 * 2 + 1)
    assert len({record.key for record in records}) == len(records)
    # What tells later whether its samples were changed.
    assert all(record.finished_at and record.started_at <= record.finished_at for record in records)
    assert {record.prepared_call_s for record in records} == {0.001}
    assert set(read_environments(out)) == {record.environment_id for record in records}
    assert json.loads((tmp_path / "f.json").read_text())["cells"][0]["rows"][0]["implementation"] == "fast"
    assert "ok (0.25)" in (out / "report.md").read_text()

    refused = call("run", *TINY, *wanted, "--out", out)
    assert refused.exit_code == 2
    assert "already holds records; add --resume" in refused.stderr

    before = (out / "records.jsonl").read_bytes()
    assert call("run", *TINY, *wanted, "--out", out, "--resume").exit_code == 0
    assert (out / "records.jsonl").read_bytes() == before

    (out / "records.jsonl").write_bytes(before[:-100])
    again = call("run", *TINY, *wanted, "--out", out, "--resume")
    assert again.exit_code == 0
    assert "of an unfinished cell were set aside" in again.output
    assert {record.key for record in read_records(out)} == {record.key for record in records}


@pytest.mark.usefixtures("fake_pool")
def test_the_table_of_a_run_is_that_of_its_report(tmp_path, call):
    out, wanted = tmp_path / "run", ("--implementation", "matmul", "--implementation", "wrong")
    assert call("run", *TINY, *wanted, "--out", out, "--csv", tmp_path / "run.csv").exit_code == 1
    assert call("report", out, "--csv", tmp_path / "report.csv").exit_code == 0
    written = (tmp_path / "run.csv").read_text()
    assert written == (tmp_path / "report.csv").read_text()
    rows = list(csv.DictReader(written.splitlines()))
    # Two directions, two frameworks, two competitors, those without a right answer included.
    assert len(rows) == 2 * 2 * 2
    assert {(row["implementation"], row["status"]) for row in rows} == {("matmul", "ok"), ("wrong", "mismatch")}


def test_a_table_that_cannot_be_written_stops_a_run_before_it_measures(tmp_path, call, monkeypatch):
    monkeypatch.setattr("bench.commands.run.run_sweep", lambda *args: pytest.fail("this measures"))
    done = call("run", *TINY, "--out", tmp_path / "run", "--csv", "/nowhere/f.csv")
    assert (done.exit_code, done.stderr.startswith("bench: --csv: /nowhere/f.csv")) == (2, True)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("fake_pool")
@pytest.mark.parametrize(("name", "status"), [("wrong", 1), ("die-in-prepare", 1), ("refused", 0)])
def test_run_fails_after_a_mismatch_or_a_crash(tmp_path, call, name, status):
    done = call("run", *TINY, "--implementation", "matmul", "--implementation", name, "--out", tmp_path / "run")
    assert done.exit_code == status, done.output


@pytest.mark.usefixtures("fake_pool")
def test_a_run_in_which_nothing_was_timed_fails(tmp_path, call):
    assert call("run", *TINY, "--implementation", "refused", "--out", tmp_path / "run").exit_code == 1


@pytest.mark.usefixtures("fake_pool")
def test_an_interrupted_run_keeps_what_it_measured(tmp_path, call, monkeypatch):
    append = Store.append

    def interrupt_after_one_cell(self, records):
        append(self, records)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "append", interrupt_after_one_cell)
    wanted = (*TINY, "--implementation", "matmul", "--out", tmp_path / "run")
    stopped = call("run", *wanted)
    assert stopped.exit_code == 130
    assert "add --resume to continue" in stopped.stderr
    assert len(read_records(tmp_path / "run")) == 3
    monkeypatch.setattr(Store, "append", append)
    assert call("run", *wanted, "--resume").exit_code == 0
    assert len(read_records(tmp_path / "run")) == 6


@pytest.mark.usefixtures("fake_pool")
def test_a_run_goes_on_without_a_framework_and_says_so(tmp_path, call, monkeypatch):
    class OnlyTorch(WorkerPool):
        def __init__(self, start, frameworks, *rest):
            super().__init__(start, ("torch",))
            self.missing["jax"] = "jax and flax are not installed"

    monkeypatch.setattr("bench.measure.sweep.WorkerPool", OnlyTorch)
    done = call("run", *TINY, "--implementation", "matmul", "--out", tmp_path / "run")
    assert done.exit_code == 0
    assert "Without jax: jax and flax are not installed." in done.output


@pytest.mark.usefixtures("fake_pool")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "huge"), "--preset: expected one of smoke, seed, workloads, sweep, full, got 'huge'"),
        (
            ("--workload", "nothing"),
            "--workload: expected a name of the catalogue or sweep-b<B>-n<n>-i<in>-o<out>, got 'nothing'",
        ),
        (("--framework", "keras"), "--framework: expected one of torch, jax, got 'keras'"),
        (("--device", "tpu"), "--device: expected one of auto, cpu, cuda, got 'tpu'"),
        (("--device", "cuda"), "device: torch and jax cannot use 'cuda' here"),
        (("--precision", "fp8"), "--precision: expected one of fp32, tf32, bf16, fp16, fp64, got 'fp8'"),
        (("--direction", "backward"), "--direction: expected one of forward, forward_backward"),
        (("--division", "equal"), "--division: expected one of stock, matched, tuned, got 'equal'"),
        (("--implementation", "nothing"), "implementation: nothing is called nothing; choose from"),
        (("--mode", "fast"), "--mode: expected one of eager, compile, compile-reduce-overhead"),
        (
            ("--mode", "cuda-graph", "--division", "stock"),
            "compile, jit, nnx-jit in the stock division on cpu with torch and jax, got cuda-graph; choose one of",
        ),
        (("--framework", "torch", "--mode", "jit"), "mode: expected one of eager, compile in the matched division"),
        (("--division", "stock", "--precision", "tf32"), "the selection is empty"),
        (("--torch-python", "/nowhere/python"), "--torch-python: '/nowhere/python' is no program"),
        (("--jax-python", "/nowhere/python"), "--jax-python: '/nowhere/python' is no program"),
        (("--json", "/nowhere/f.json"), "--json: /nowhere/f.json cannot be written"),
        (("--csv", "/nowhere/f.csv"), "--csv: /nowhere/f.csv cannot be written"),
        (("--out", "/dev/null/run"), "/dev/null/run: cannot be written"),
    ],
)
def test_wrong_usage_of_run_is_one_sentence(tmp_path, call, arguments, message):
    done = call("run", *TINY, "--out", tmp_path / "run", *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("bench: ")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.usefixtures("fake_pool")
def test_a_mode_that_a_division_lacks_is_left_out_and_told(tmp_path, call):
    wanted = ("--implementation", "matmul", "--mode", "compile", "--mode", "cuda-graph", "--division", "tuned")
    done = call("run", *TINY, *wanted, "--out", tmp_path / "run")
    assert "The tuned division has no cuda-graph on cpu with torch and jax: left out." in done.stdout
    records = read_records(tmp_path / "run")
    assert {record.mode for record in records} == {"compile"}
    assert {record.label for record in records if record.baseline} == {"torch matmul (compile)"}


@pytest.mark.usefixtures("fake_pool")
def test_both_frameworks_missing_is_wrong_usage(tmp_path, call, monkeypatch):
    class Nothing(WorkerPool):
        def __init__(self, start, frameworks, *rest):
            super().__init__(start, ())
            self.missing |= dict.fromkeys(frameworks, "not installed")

    monkeypatch.setattr("bench.measure.sweep.WorkerPool", Nothing)
    done = call("run", *TINY, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert "no framework can be measured" in done.stderr


def test_missing_and_unknown_options_are_refused(tmp_path, call):
    assert call("run").exit_code == 2
    assert call("run", "--out", tmp_path, "--rounds", "0").exit_code == 2
    assert call("nothing").exit_code == 2


@pytest.fixture
def measured(tmp_path, make_record):
    """A directory with a small run, as `bench run` leaves it."""
    store = Store(tmp_path / "run", resume=False)
    cell = [make_record(baseline=True, cell_size=3), make_record(key="k1", baseline=True, control=True, cell_size=3)]
    store.add_environment("1", FINGERPRINT)
    store.append([*cell, make_record(key="k2", framework="jax", mode="jit", cell_size=3)])
    return tmp_path / "run"


def test_report_shows_and_writes(measured, tmp_path, call):
    done = call("report", measured, "--markdown", tmp_path / "r.md", "--json", tmp_path / "r.json")
    assert done.exit_code == 0
    assert "jax matmul (jit)" in done.output
    assert "jax matmul (jit)" in (tmp_path / "r.md").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["summary"] == {"ok": 2}


def test_the_readme_is_updated_and_its_staleness_noticed(measured, tmp_path, call):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- results:begin -->\n<!-- results:end -->\n")
    stale = call("report", measured, "--readme", readme, "--check")
    assert (stale.exit_code, "are stale" in stale.stderr) == (1, True)
    assert call("report", measured, "--readme", readme).exit_code == 0
    assert "jax matmul (jit)" in readme.read_text()
    assert call("report", measured, "--readme", readme, "--check").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: holds no records.jsonl"),
        (("RUN", "RUN"), "give each directory once"),
        (("RUN", "--check"), "--check: needs --readme"),
        (("RUN", "--readme", "nowhere.md"), "nowhere.md cannot be read"),
        (("RUN", "--readme", "RUN/records.jsonl"), "expected the markers"),
        (("RUN", "--markdown", "/nowhere/r.md"), "--markdown: /nowhere/r.md cannot be written"),
        (("RUN", "--chart", "picture.pdf"), "ending in .svg, .png, .html"),
    ],
)
def test_wrong_usage_of_report_is_one_sentence(measured, call, arguments, message):
    done = call("report", *(argument.replace("RUN", str(measured)) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("spelling", ["fp32", "ieee_fp32", "float32"])
@pytest.mark.usefixtures("fake_pool")
def test_every_spelling_of_a_precision_is_the_same_record(tmp_path, call, spelling):
    wanted = ("--implementation", "matmul", "--precision", spelling, "--precision", "bf16", "--direction", "forward")
    assert call("run", *TINY, *wanted, "--out", tmp_path / "run").exit_code == 0
    assert {record.precision for record in read_records(tmp_path / "run")} == {"ieee_fp32", "bf16"}
    chosen = ("report", tmp_path / "run", "--where", f"precision={spelling}", "--json", tmp_path / "f.json")
    assert call(*chosen).exit_code == 0
    cells = json.loads((tmp_path / "f.json").read_text())["cells"]
    assert {cell["precision"] for cell in cells} == {"ieee_fp32"}


def test_the_command_line_of_a_run_is_that_of_its_options(call):
    """Every field is an option of its own name, with the field's default, and no option is declared elsewhere."""
    parameters = {one.name: one for one in get_command(app).commands["run"].params}
    declared = {one.name: one for one in fields(RunOptions)}
    assert set(parameters) == set(declared)
    for name, field in declared.items():
        if field.default not in (MISSING, ()):
            assert parameters[name].default == field.default, name
    assert {field.name for field in fields(Request)} < set(declared)


def test_a_dry_run_checks_the_options_and_writes_nothing(call, tmp_path):
    assert call("run", *TINY, "--dry-run", "--out", tmp_path / "run").exit_code == 0
    assert call("run", "--preset", "nope", "--dry-run", "--out", tmp_path / "run").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_that_is_refused_leaves_no_folder(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed here")
    out, installed = tmp_path / "new" / "run", Path(sys.prefix) / ".installed"
    words = ["make", "-o", installed, "compare", f"VENV={sys.prefix}", f"OUT={out}", "PRESET=nope"]
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "--preset: expected one of" in done.stderr
    assert "parity_tests" not in done.stdout
    assert list(tmp_path.iterdir()) == []
    # Positive control: with options that hold, the folder is made next.
    words = ["make", "-n", "-o", installed, "compare", f"VENV={sys.prefix}", f"OUT={out}"]
    planned = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    assert planned.index("--dry-run") < planned.index(f"mkdir -p {out}") < planned.index("parity_tests run")
