import csv
import json
from statistics import median

import pytest
from rich.console import Console

from bench.plan.presets import BLOCK_S
from bench.report.export import write_table
from bench.report.tables import show_rankings
from bench.store import Store
from bench.study.cells import short_blocks
from bench.tests.in_memory import rankings, report, results_of, summary
from bench.tests.synthetic import FINGERPRINT, cell_records

CPU_S = BLOCK_S["cpu"]


def blocks_of(*lengths, intended_s=CPU_S):
    """Fields of a record whose blocks have these lengths, in parts of the intended one."""
    blocks = tuple(length * intended_s for length in lengths)
    return {"block_latency_s": blocks, "calls_per_block": 10, "latency_s": median(blocks) / 10}


@pytest.fixture
def cell(make_record):
    """The loop has two short blocks of four, the control one; everybody else has none."""
    return [
        make_record(key="a", baseline=True, **blocks_of(1.0, 1.1, 1.2, 1.1)),
        make_record(key="b", implementation="loop", **blocks_of(1.0, 0.4, 1.2, 0.3)),
        make_record(key="c", implementation="einsum", **blocks_of(0.6, 0.5, 0.6, 0.5)),
        make_record(key="d", baseline=True, control=True, **blocks_of(1.0, 0.4, 1.2, 1.1)),
    ]


def test_blocks_below_half_of_the_intended_length_are_counted_for_each_record(cell):
    loop, control = short_blocks(cell)
    assert (loop.label, loop.control, loop.short, loop.blocks) == ("torch loop (eager)", False, 2, 4)
    assert (loop.shortest_s, loop.median_s) == pytest.approx((0.3 * CPU_S, 0.7 * CPU_S))
    assert loop.sentence == (
        "torch loop (eager), process 0: 2 of 4 blocks lasted less than half of the 3 ms intended "
        "(median 2.1 ms, shortest 0.9 ms, calls in each: 10)"
    )
    assert (control.control, control.short) == (True, 1)
    assert control.sentence.startswith("torch matmul (eager), A/A control, process 0: 1 of 4 blocks")


def test_the_intended_length_is_that_of_the_device(make_record):
    blocks = blocks_of(0.9, 0.9)
    assert short_blocks([make_record(**blocks)]) == ()
    (found,) = short_blocks([make_record(device="cuda", **blocks)])
    assert (found.short, found.intended_s) == (2, BLOCK_S["cuda"])
    assert short_blocks([make_record(device="cuda", **blocks_of(0.9, 0.9, intended_s=BLOCK_S["cuda"]))]) == ()


def test_a_record_says_itself_what_was_intended(make_record):
    (found,) = short_blocks([make_record(block_s=2.5 * CPU_S, **blocks_of(1.0, 1.0))])
    assert (found.short, found.intended_s) == (2, 2.5 * CPU_S)
    assert short_blocks([make_record(block_s=0.5 * CPU_S, **blocks_of(0.3, 0.3))]) == ()


def test_who_has_no_speed_has_no_short_blocks(make_record):
    nothing = {"status": "crash", "reason": "gone", "latency_s": None, "block_latency_s": (), "bound_fraction": None}
    assert short_blocks([make_record(rejected_block_latency_s=(1e-6,), **nothing)]) == ()


def test_a_report_says_which_blocks_were_short(cell, tmp_path, capsys):
    (ranking,) = rankings(cell)
    text = report(results_of(cell, {}))
    for account in ranking.short_blocks:
        assert f"- Remark: {account.sentence}." in text
    assert text.count("Remark:") == 2
    (found,) = summary(results_of(cell, {}))["cells"]
    assert {row["implementation"]: row["short_blocks"] for row in found["rows"]} == {
        "matmul": 0,
        "loop": 2,
        "einsum": 0,
    }
    assert [(account["control"], account["short"]) for account in found["short_blocks"]] == [(False, 2), (True, 1)]
    write_table(tmp_path / "r.csv", results_of(cell, {}))
    with (tmp_path / "r.csv").open() as file:
        assert {row["implementation"]: row["short_blocks"] for row in csv.DictReader(file)}["loop"] == "2"
    show_rankings(Console(width=200), [ranking])
    assert capsys.readouterr().out.count("Remark: torch") == 2
    # One line a cell, where there are very many, and the remarks below it.
    show_rankings(Console(width=200), [ranking] * 151)
    assert capsys.readouterr().out.count("Remark: torch") == 2 * 151


def test_every_process_is_accounted_for_and_nothing_else_changes(cell, make_record):
    again = [
        make_record(key="e", process_replicate=1, baseline=True, **blocks_of(1.0, 1.1)),
        make_record(key="f", process_replicate=1, implementation="loop", **blocks_of(0.2, 1.0)),
    ]
    results = results_of([*cell, *again], {})
    (found,) = summary(results)["cells"]
    assert {row["implementation"]: row["short_blocks"] for row in found["rows"]}["loop"] == 3
    assert [account["process_replicate"] for account in found["short_blocks"]] == [0, 0, 1]
    # A remark takes no sample away.
    assert {row.record.label: row.interval.rounds for row in results.found[0].rows}["torch loop (eager)"] == 3


def test_validation_remarks_short_blocks_and_lets_them_through(make_record, tmp_path, call):
    store = Store(tmp_path / "run", resume=False)
    store.add_environment("e0", FINGERPRINT)
    records = cell_records(make_record, 0, (128, 32, 32, 32), competitors=3)
    lines = [json.loads(record.to_line()) for record in records]
    lines[1] |= {**blocks_of(*[0.4, 1.0] * 10), "block_latency_s": [0.4 * CPU_S, CPU_S] * 10}
    lines[1]["warm_up_block_latency_s"] = [CPU_S]
    (tmp_path / "run" / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = call("validate", tmp_path / "run", "--json", tmp_path / "v.json", "--csv", tmp_path / "v.csv")
    assert done.exit_code == 0, done.output
    assert "4 records in 1 cells: 0 violations, 1 remark." in done.output
    found = json.loads((tmp_path / "v.json").read_text())
    (remark,) = found["remarks"]
    assert found["violations"] == []
    assert "records.jsonl, line 2: torch loop (eager), process 0: 10 of 20 blocks lasted less than half" in remark
    assert f"Remark: {remark}." in done.output.splitlines()
    with (tmp_path / "v.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"violation": "", "remark": remark}]
