import json
import re
from dataclasses import replace

import pytest

from bench.report.screen import screen_lines, winner_lines
from bench.store import Store
from bench.study.results import Results
from bench.tests.in_memory import rankings
from bench.tests.synthetic import FINGERPRINT, cell_records, write_sweep


@pytest.fixture
def run(tmp_path, make_record):
    write_sweep(tmp_path / "run", make_record, 30, competitors=5)
    return tmp_path / "run"


def test_a_run_fits_on_a_screen_and_all_of_it_is_asked_for(run, call):
    screen = call("report", run)
    assert screen.exit_code == 0
    lines = screen.output.splitlines()
    assert len(lines) <= 50
    for said in (
        "first or tied for the first place: torch form-0 (eager) in 30 (alone in 30)",
        "PyTorch's fastest leads JAX's in 30 comparisons",
        "Who wins where",
        "forward, fp32, matched, cpu (30 cells): torch form-0 (eager) wins 30, ties 0",
        "PyTorch leads in 30 (1.2",
        "What to ask next:",
        f"python -m bench report {run} --all",
    ):
        assert said in screen.output, said
    assert "ratio [95%]" not in screen.output
    whole = call("report", run, "--all").output
    assert whole.count("ratio [95%]") == 30
    assert len(whole.splitlines()) > 10 * len(lines)
    assert "useful FLOP/s" in call("report", run, "--efficiency").output


def test_few_cells_are_named_one_by_one_and_conditions_are_kept(run, call):
    screen = call("report", run, "--where", "num_partitions=1", "--where", "in_features=2")
    assert "): Fastest: torch form-0 (eager)" in screen.output or "cpu: Fastest: torch form-0" in screen.output
    assert "--where num_partitions=1 --where in_features=2 --all" in screen.output


@pytest.mark.parametrize("dirty", [True, False])
def test_changes_that_were_not_committed_are_shown(tmp_path, make_record, call, dirty):
    write_sweep(tmp_path / "run", make_record, 2, competitors=3)
    store = Store(tmp_path / "run", resume=True)
    store.add_environment("e0", FINGERPRINT | {"git": {"commit": "0123456789abcdef", "dirty": dirty}})
    said = "with changes that were not committed"
    shape = ("--num-partitions", 1, "--in-features", 2, "--out-features", 1, "--batch", 4)
    for command in (("report",), ("findings",), ("recommend", *shape)):
        done = call(*command, tmp_path / "run")
        assert done.exit_code == 0, done.output
        assert (said in done.output) is dirty, command
        assert "0123456789ab" in done.output, command


def test_an_output_that_cannot_be_drawn_does_not_stop_the_others(run, call, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    files = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "markdown")}
    outputs = [part for name, path in files.items() for part in (f"--{name}", path)]
    done = call("report", run, "--chart", tmp_path / "c.svg", *outputs, "--roofline", tmp_path / "r.pdf")
    assert done.exit_code == 2
    assert "--chart: altair is not installed" in done.stderr
    assert "--roofline: expected a file ending in .svg" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2
    assert not (tmp_path / "c.svg").exists()
    assert not (tmp_path / "r.pdf").exists()
    assert len(json.loads(files["json"].read_text())["cells"]) == 30
    assert files["csv"].stat().st_size > 1000
    assert "### sweep-" in files["markdown"].read_text()
    assert f"Written: {files['markdown']}, {files['json']}, {files['csv']}." in done.output
    # Positive control: without the two that fail it is a success.
    assert call("report", run, *outputs).exit_code == 0


def test_a_map_of_too_many_sizes_leaves_the_chart_of_the_frameworks(run, call, tmp_path, monkeypatch):
    pytest.importorskip("altair", reason="charts need the report extra")
    pytest.importorskip("vl_convert", reason="charts need the report extra")
    monkeypatch.setattr("bench.report.charts.MOST_PANELS", 1)
    done = call("report", run, "--winner-map", tmp_path / "w.svg", "--framework-map", tmp_path / "f.svg")
    assert done.exit_code == 2
    assert "--winner-map: expected at most 1 combinations" in done.stderr
    assert "<svg" in (tmp_path / "f.svg").read_text()


def test_a_report_that_was_stopped_before_its_first_cell_says_so():
    assert screen_lines(Results((), {}, {}, "interrupted: 0 cells were read"), ["run"])[0].startswith("interrupted")


def test_those_that_tie_as_often_are_named_in_the_order_of_the_cells(make_record):
    (one,) = rankings(cell_records(make_record, 0, (64, 8, 2, 2), competitors=5))
    (line,) = winner_lines([replace(one, leaders=tuple("fdbeca"))] * 50)
    assert re.findall(r"(\w) wins 0, ties 50", line) == ["f", "d", "b"]
