import csv
import json
from xml.etree import ElementTree

import pytest

from bench.report.charts import MOST_PANELS, squares, winner_map
from bench.report.export import write_summary
from bench.report.pictures import ChartError
from bench.report.tables import efficiency_table
from bench.report.text import rate
from bench.store import Store
from bench.study.ranking import efficiencies
from bench.study.results import read_results
from bench.tests.in_memory import rankings, report, results_of, summary
from bench.tests.synthetic import FINGERPRINT, cell_records


@pytest.fixture
def run(tmp_path, make_record):
    """Four cells of a small sweep, in which form-0 leads; the last has only equals."""
    store = Store(tmp_path / "run", resume=False)
    store.add_environment("e0", FINGERPRINT)
    for k, (batch, n) in enumerate(((64, 8), (64, 16), (128, 8), (128, 16))):
        store.append(cell_records(make_record, k, (batch, n, 32, 32), competitors=3 if k == 3 else 5))
    return tmp_path / "run"


@pytest.fixture
def compiled(make_record):
    """One cell: eager and compiled, against known ceilings; 2e9 operations and 1e9 bytes in a call of 2 ms."""
    amounts = {"useful_flops": 2 * 10**9, "compulsory_bytes": 10**9}
    waits = {"synchronised_latency_s": (3e-3, 5e-3, 4e-3)}
    rates = {"ceiling_flops_per_s": 4e12, "ceiling_bytes_per_s": 1e12, "peak_flops_per_s": 8e12}

    def timed(latency_s, key, **changes):
        return make_record(key=key, latency_s=latency_s, block_latency_s=(10 * latency_s,) * 8, **amounts, **changes)

    return [
        timed(2e-3, "a", baseline=True, **rates),
        timed(2e-3, "b", baseline=True, control=True),
        timed(1.5e-3, "c", mode="compile", compile_s=1.0, enqueue_s=1e-5, kernels={"gemm": 2, "add": 1}, **waits),
        timed(1e-3, "f", framework="jax", mode="jit", compile_s=2.0),
        timed(4e-3, "d", implementation="loop", waste_factor=32),
        timed(5e-3, "e", implementation="loop", mode="compile", compile_s=1.0),
    ]


def test_efficiency_is_useful_work_against_the_ceilings(compiled):
    (ranking,) = rankings(compiled)
    found = efficiencies(ranking)
    eager, fast = found["torch matmul (eager)"], found["torch matmul (compile)"]
    assert eager.flops_per_s == pytest.approx(1e12)
    assert eager.bytes_per_s == pytest.approx(5e11)
    # The bytes bound it: 1e9 at 1e12 a second are 1 ms of the 2; the data sheet gives operations only, 0.25 ms of them.
    assert (eager.ceiling_fraction, eager.peak_fraction) == pytest.approx((0.5, 0.125))
    assert (fast.ceiling_fraction, fast.enqueue_s, fast.kernels_per_call) == (None, 1e-5, 3)
    # A second of compiling, half a millisecond saved a call.
    assert fast.payback_calls == pytest.approx(2000)
    assert fast.payback_against == "torch matmul (eager)"
    assert eager.payback_calls is None
    # Two seconds of compiling, a millisecond saved a call; nobody times JAX without compiling, so against the baseline.
    jitted = found["jax matmul (jit)"]
    assert (jitted.payback_calls, jitted.payback_against) == (pytest.approx(2000), "torch matmul (eager)")
    assert found["torch loop (compile)"].payback_calls == float("inf")
    assert found["torch loop (eager)"].waste_factor == 32
    shown = {label: texts for label, *texts in efficiency_table(ranking).rows}
    assert shown["torch matmul (compile)"] == ["1.33 TFLOP/s", "-", "-", "1x", "2000 calls", "10 us", "4 ms", "3"]
    assert shown["torch loop (compile)"][4] == "never"
    assert rate(None) == "-"


def test_the_markdown_shows_efficiency_and_the_winner(compiled, run):
    text = report(results_of(compiled, {}))
    assert "| torch matmul (eager) | 1 TFLOP/s | 50.0% | 12.5% | 1x | - | - | - | - |" in text
    text = report(read_results([run]))
    assert text.count("Fastest: torch form-0 (eager), against every other competitor (Holm-corrected).") == 3
    assert text.count("Tie for the first place: ") == 1
    assert text.count("| 1= |") == 3


def test_json_and_csv_hold_winners_and_efficiency(run, compiled, tmp_path):
    results = results_of(compiled, {})
    write_summary(tmp_path / "s.json", results, ["a note"])
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(json.dumps(summary(results, ["a note"])))
    (cell,) = summary(results)["cells"]
    rows = {(row["implementation"], row["mode"]): row for row in cell["rows"]}
    assert (rows["loop", "compile"]["payback_calls"], rows["loop", "compile"]["compile_pays"]) == (None, False)
    assert rows["matmul", "compile"]["compile_pays"] is True
    assert (rows["matmul", "compile"]["waited_s"], rows["matmul", "compile"]["kernels"]) == (
        4e-3,
        {"gemm": 2, "add": 1},
    )
    cells = summary(read_results([run]))["cells"]
    assert [cell["winner"] for cell in cells] == ["torch form-0 (eager)"] * 3 + [None]
    assert [len(cell["tied"]) for cell in cells] == [0, 0, 0, 3]


def test_the_report_command_writes_csv(run, call, tmp_path):
    assert call("report", run, "--csv", tmp_path / "r.csv").exit_code == 0
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 5 + 3
    first = next(row for row in rows if row["competitor"] == "torch form-0 (eager)")
    assert (first["rank"], first["verdict"], first["rounds"]) == ("1", "FASTER", "10")
    assert float(first["low"]) < 1.25 < float(first["high"])


def test_the_terminal_shows_efficiency_when_asked(run, call):
    assert "useful FLOP/s" not in call("report", run).output
    assert "useful FLOP/s" in call("report", run, "--efficiency").output


def test_a_report_of_some_cells_only(run, call, tmp_path):
    done = call("report", run, "--where", "batch=64", "--where", "workload=*-n16-*", "--json", tmp_path / "r.json")
    assert done.exit_code == 0
    (cell,) = json.loads((tmp_path / "r.json").read_text())["cells"]
    assert (cell["batch"], cell["num_partitions"]) == (64, 16)
    assert len(cell["rows"]) == 5
    for wrong, message in (
        ("batch", "--where: expected FIELD=PATTERN with one of workload"),
        ("latency_s=1", "--where: expected FIELD=PATTERN"),
        ("batch=3", "--where: no cell meets batch=3"),
    ):
        done = call("report", run, "--where", wrong)
        assert (done.exit_code, message in done.stderr) == (2, True)


def test_the_winner_map_has_a_square_for_each_cell(run, call, tmp_path):
    found = read_results([run]).found
    points = squares(found)
    assert [(p["batch"], p["num_partitions"], p["mark"]) for p in points] == [
        (64, 8, ""),
        (64, 16, ""),
        (128, 8, ""),
        (128, 16, "=3"),
    ]
    assert [point["outcome"] for point in points] == ["winner"] * 3 + ["tie"]
    with pytest.raises(ChartError, match="no competitor was timed"):
        winner_map(results_of([], {}))
    pytest.importorskip("vl_convert", reason="charts need the report extra")
    assert call("report", run, "--winner-map", tmp_path / "w.svg").exit_code == 0
    text = "".join(ElementTree.parse(tmp_path / "w.svg").getroot().itertext())
    for expected in ("32->32", "torch form-0 (eager)", "=3", "tie"):
        assert expected in text


def test_a_wall_of_panels_is_refused(make_record):
    pytest.importorskip("altair", reason="charts need the report extra")
    one = cell_records(make_record, 0, (64, 8, 2, 2), competitors=2)
    assert winner_map(results_of(one, {})) is not None
    groups = [cell_records(make_record, k, (64, 8, 2 + k, 2), competitors=2) for k in range(MOST_PANELS + 1)]
    with pytest.raises(ChartError, match="expected at most 60 combinations"):
        winner_map(results_of([record for group in groups for record in group], {}))


def test_the_roofline_draws_rates_and_ceilings(compiled, tmp_path, make_record, call):
    pytest.importorskip("vl_convert", reason="charts need the report extra")
    peaks = {"peak_bytes_per_s": 2e12, "peak_flops_per_s": 8e12}
    store = Store(tmp_path / "run", resume=False)
    store.add_environment("1", FINGERPRINT)
    lines = [json.loads(record.to_line()) | {"cell_size": 5} for record in compiled]
    lines[0] |= peaks
    (tmp_path / "run" / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call("report", tmp_path / "run", "--roofline", tmp_path / "r.svg").exit_code == 0
    text = "".join(ElementTree.parse(tmp_path / "r.svg").getroot().itertext())
    for expected in ("useful operations per compulsory byte", "measured", "data sheet", "leads"):
        assert expected in text
    assert "no ceiling was measured" not in text
    without = dict.fromkeys(("ceiling_flops_per_s", "ceiling_bytes_per_s", *peaks))
    (tmp_path / "run" / "records.jsonl").write_text("".join(json.dumps(line | without) + "\n" for line in lines))
    assert call("report", tmp_path / "run", "--roofline", tmp_path / "w.svg").exit_code == 0
    assert "no ceiling was measured" in "".join(ElementTree.parse(tmp_path / "w.svg").getroot().itertext())
    done = call("report", tmp_path / "run", "--roofline", tmp_path / "r.pdf")
    assert (done.exit_code, "--roofline: expected a file ending in" in done.stderr) == (2, True)
