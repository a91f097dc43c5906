import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from bench.report.charts import ratio_chart
from bench.report.markdown import CLAIMS, RESULTS, PageError, markers, results_block, with_block
from bench.report.pictures import ChartError, save_picture
from bench.report.tables import training_memory_table
from bench.report.text import baseline_line, byte_count, ratio, resolution_line, seconds
from bench.study.ranking import tally, training_memory
from bench.study.statistics import Interval
from bench.tests.in_memory import rankings, report, results_of, summary
from bench.tests.synthetic import FINGERPRINT

BEGIN, END = markers(RESULTS)
ENVIRONMENT = {
    "1": {
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "cpu_model": "a processor",
        "affinity": [0, 1],
        "system": "a system",
        "device": "cpu",
        "division": "matched",
        "gpus": None,
        "frameworks": {
            "torch": {"python": "3.11", "versions": {"torch": "2.13"}, "default_switches": {"precision": "highest"}}
        },
    }
}


@pytest.fixture
def cell(make_record):
    """jax matmul is twice as fast as the baseline, torch matmul; the loop was wrong, the mask was skipped."""
    rng = np.random.default_rng(0)

    def timed(latency_s, **changes):
        blocks = tuple(float(10 * latency_s * np.exp(0.003 * e)) for e in rng.standard_normal(20))
        return make_record(key=str(rng.integers(2**60)), latency_s=latency_s, block_latency_s=blocks, **changes)

    nothing = {"latency_s": None, "block_latency_s": (), "bound_fraction": None}
    return [
        timed(2e-3, baseline=True),
        timed(2e-3, baseline=True, control=True),
        timed(1e-3, framework="jax", mode="jit"),
        timed(4e-3, implementation="einsum"),
        timed(2.001e-3, implementation="stock:bmm+bias", kind="stock"),
        timed(5e-4, implementation="dense", kind="yardstick"),
        make_record(key="w", implementation="loop", status="mismatch", reason="y is | wrong", **nothing),
        make_record(
            key="s", implementation="masked", status="unsupported", skipped=True, reason="skipped: big", **nothing
        ),
    ]


def test_the_ranking_runs_across_frameworks_and_leaves_the_yardstick_out(cell):
    (ranking,) = rankings(cell)
    assert ranking.baseline == "torch matmul (eager)"
    shown = {row.record.label: (row.rank, row.verdict) for row in ranking.rows}
    assert shown["jax matmul (jit)"] == (1, "FASTER")
    assert shown["torch einsum (eager)"] == (4, "SLOWER")
    assert shown["torch matmul (eager)"][1] == "baseline"
    # Nothing tells it from the baseline, but a single process cannot say that they are the same.
    assert shown["torch stock:bmm+bias (eager)"][1] == "UNRESOLVED"
    assert shown["torch dense (eager)"] == (None, "yardstick")
    assert shown["torch loop (eager)"] == (None, "")
    fastest = ranking.rows[0].interval
    assert fastest.low < 2.0 < fastest.high
    assert fastest.rounds == 10
    assert tally(cell) == {"ok": 5, "mismatch": 1, "skipped": 1}


def test_environments_and_cells_are_never_pooled(cell, make_record):
    other = make_record(key="o", environment_id="2", baseline=True)
    elsewhere = make_record(key="p", cell="c1", direction="forward_backward", baseline=True)
    assert len(rankings([*cell, other, elsewhere])) == 3


def test_replicates_are_pooled_and_a_failure_in_one_shows(make_record):
    rng = np.random.default_rng(0)
    records = []
    for replicate in range(3):
        for control in (False, True):
            blocks = tuple(0.02 * np.exp(0.003 * rng.standard_normal(8)))
            records.append(
                make_record(
                    key=f"{replicate}{control}",
                    process_replicate=replicate,
                    control=control,
                    baseline=True,
                    block_latency_s=blocks,
                )
            )
        ok = replicate != 1
        records.append(
            make_record(
                key=f"j{replicate}",
                process_replicate=replicate,
                framework="jax",
                status="ok" if ok else "crash",
                reason="" if ok else "SIGKILL",
                latency_s=0.001 if ok else None,
                block_latency_s=blocks if ok else (),
            )
        )
    (ranking,) = rankings(records)
    assert ranking.replicates == 3
    assert ranking.control.rounds == 12
    (failed,) = [row for row in ranking.rows if row.record.framework == "jax"]
    assert (failed.record.status, failed.latency_s) == ("crash", None)


def test_without_a_right_answer_no_speed_is_shown(cell):
    text = report(results_of(cell, ENVIRONMENT), ["A note."])
    (line,) = [line for line in text.splitlines() if line.startswith("| - | torch loop")]
    assert line == "| - | torch loop (eager) | - | - | mismatch | fp32 / fp32 | mismatch | - | 4 KiB |"
    assert "- torch loop (eager): mismatch, y is \\| wrong" in text
    assert "- torch masked (eager): skipped: big" in text


def test_markdown_says_where_and_against_what(cell):
    text = report(results_of(cell, ENVIRONMENT), ["A note."])
    for expected in (
        "A note.",
        "a processor, 2 processors used",
        "commit 0123456789ab (modified)",
        "precision=highest",
        "Baseline: torch matmul (eager); above 1x is faster. A/A control 1.00x",
        "Outcomes: 1 mismatch, 5 ok, 1 skipped.",
    ):
        assert expected in text


def test_json_holds_the_same_rows(cell):
    found = json.loads(json.dumps(summary(results_of(cell, ENVIRONMENT)), allow_nan=False))
    (one,) = found["cells"]
    assert [row["rank"] for row in one["rows"]] == [1, 2, 3, 4, None, None, None]
    assert one["rows"][0]["verdict"] == "FASTER"
    assert one["rows"][0]["precision"] == one["rows"][0]["observed_precision"] == "ieee_fp32"
    assert found["summary"]["mismatch"] == 1


def test_a_cell_without_a_control_resolves_nothing(cell):
    (ranking,) = rankings(record for record in cell if not record.control)
    assert {row.verdict for row in ranking.rows} <= {"baseline", "yardstick", "UNRESOLVED", ""}
    assert "nothing is resolved" in baseline_line(ranking)


def test_who_is_slower_than_the_baseline_ties_with_nobody(cell, monkeypatch):
    # As after very few rounds, where the correction for many competitors rejects nobody.
    monkeypatch.setattr("bench.study.ranking.leaders", lambda competitors, floor, **options: tuple(competitors))
    (ranking,) = rankings(cell)
    assert {row.record.label for row in ranking.rows if row.verdict == "SLOWER"} == {"torch einsum (eager)"}
    assert "torch einsum (eager)" not in ranking.tied
    assert len(ranking.tied) == 3
    # That alone makes nobody a winner.
    (two,) = rankings(
        record for record in cell if record.implementation in ("matmul", "einsum") and record.mode != "jit"
    )
    assert two.winner is None
    assert len(two.tied) == 2


def test_the_resolution_of_a_run_counts_its_cells(cell):
    (fine,) = rankings(cell)
    assert fine.half_width == pytest.approx(0.5 * math.log(fine.control.high / fine.control.low))
    unclear = replace(fine, control=Interval(1.0, 0.9, 1.1, 10))
    (none,) = rankings(record for record in cell if not record.control)
    assert none.half_width is None
    assert "below 3% in 1 of 3 cells" in resolution_line([fine, unclear, none])
    assert "largest 10.6%" in resolution_line([fine, unclear])
    assert "nothing is resolved" in resolution_line([none])
    assert "below 3% in 1 of 1 cells" in report(results_of(cell, ENVIRONMENT))


def test_a_cell_in_which_nobody_was_right_has_no_baseline(cell):
    (ranking,) = rankings(record for record in cell if record.status != "ok")
    assert ranking.baseline is None
    assert "no baseline" in baseline_line(ranking)


def test_the_readme_block_is_replaced_and_nothing_else(cell):
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    fresh = with_block(text, results_block(results_of(cell, ENVIRONMENT)))
    assert fresh.startswith(f"before\n{BEGIN}\n")
    assert fresh.endswith(f"{END}\nafter\n")
    assert "\nold\n" not in fresh
    assert "| 1 | jax matmul (jit) |" in fresh
    assert with_block(fresh, results_block(results_of(cell, ENVIRONMENT))) == fresh


def test_a_page_may_show_several_directories():
    first, second, claims = markers(RESULTS, "a"), markers(RESULTS, "b"), markers(CLAIMS, "a")
    text = "\n".join((*first, BEGIN, END, *second, *claims, "after"))
    for what, name, (begin, end) in ((RESULTS, "a", first), (RESULTS, "b", second), (CLAIMS, "a", claims)):
        assert with_block(text, "new", what, name) == text.replace(f"{begin}\n{end}", f"{begin}\nnew\n{end}")
    # A directory that no marker names takes the block without a name.
    assert with_block(text, "new", RESULTS, "mine") == text.replace(f"{BEGIN}\n{END}", f"{BEGIN}\nnew\n{END}")
    with pytest.raises(PageError, match="claims:begin -->"):
        with_block(text, "new", CLAIMS, "b")


@pytest.mark.parametrize("text", ["", BEGIN, f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_one_block_is_refused(text):
    with pytest.raises(PageError, match="once each, in this order"):
        with_block(text, "x")


def test_the_chart_draws_every_interval(cell, tmp_path):
    pytest.importorskip("altair", reason="charts need the report extra")
    pytest.importorskip("vl_convert", reason="charts need the report extra")
    save_picture(ratio_chart, "--chart", tmp_path / "chart.svg", results_of(cell, {"e0": FINGERPRINT}))
    picture = ElementTree.parse(tmp_path / "chart.svg")
    text = "".join(picture.getroot().itertext())
    assert "jax matmul (jit)" in text
    assert "1 is torch matmul (eager)" in text
    assert "torch dense (eager)" in text
    assert "torch loop (eager)" not in text
    with pytest.raises(ChartError, match="no ratio with an interval"):
        save_picture(ratio_chart, "--chart", tmp_path / "empty.svg", results_of([], {}))


def test_a_chart_without_the_extra_says_what_to_install(cell, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ChartError, match=r"altair is not installed; install the extra"):
        save_picture(ratio_chart, "--chart", tmp_path / "chart.svg", results_of(cell, {}))
    with pytest.raises(ChartError, match=r"ending in \.svg, \.png, \.html"):
        save_picture(ratio_chart, "--chart", tmp_path / "chart.pdf", results_of(cell, {}))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (1.5, "1.5 s"), (2.5e-3, "2.5 ms"), (3e-5, "30 us"), (1e-8, "10 ns"), (1234.0, "1234 s")],
)
def test_seconds(value, text):
    assert seconds(value) == text


def test_digits_that_mean_nothing_are_not_shown():
    assert ratio(Interval(2.0, 1e-9, 5e6, 2)) == "2.00x [<0.01, >1000]"
    assert ratio(Interval(2.0, 0.0, math.inf, 1)) == "2.00x [<0.01, >1000]"
    assert ratio(None) == "-"


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0, "0 B"), (2048, "2 KiB"), (5 * 2**30, "5 GiB")])
def test_byte_count(value, text):
    assert byte_count(value) == text


def test_the_memory_of_training_stands_beside_the_loops(make_record):
    def one(name, memory, **changes):
        values = {"implementation": name, "peak_memory_bytes": memory, "direction": "forward_backward", "cell_size": 6}
        return make_record(**{"key": f"{name} {memory} {changes}", **values, **changes})

    step = {"direction": "train_step", "optimizer": "sgd", "cell": "c1"}
    records = [
        one("loop", 8192),
        one("matmul", 2048, baseline=True),
        one("einsum", 4096, memory_method="another"),
        one("matmul", 3072, mode="compile"),
        one("loop", 1024, framework="jax", mode="jit"),
        one("matmul", 4096, framework="jax", mode="jit"),
        one("loop", 4096, **step),
        one("matmul", 4096, **step, baseline=True),
        one("loop", 10, direction="forward", cell="c2"),
        one("matmul", 20, direction="forward", cell="c2", baseline=True),
    ]
    found = {(m.label, m.direction): m.over_loop for m in training_memory(rankings(records))}
    # What was measured in another way, forward calls and other frameworks' loops are not held against it.
    assert found == {
        ("torch loop (eager)", "forward_backward"): (1.0,),
        ("torch matmul (eager)", "forward_backward"): (0.25,),
        ("torch matmul (compile)", "forward_backward"): (0.375,),
        ("jax loop (jit)", "forward_backward"): (1.0,),
        ("jax matmul (jit)", "forward_backward"): (4.0,),
        ("torch loop (eager)", "train_step"): (1.0,),
        ("torch matmul (eager)", "train_step"): (1.0,),
    }
    table = training_memory_table(rankings(records))
    assert ("torch matmul (eager)", "forward_backward", "cpu", "1", "2 KiB", *["0.25x"] * 3) in table.rows
    assert "0.25x" in report(results_of(records, {}))
    assert training_memory_table(rankings(records[-2:])).rows == []
    assert "0.25x" not in report(results_of(records[-2:], {}))
