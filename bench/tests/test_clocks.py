"""Samples and numbers of calls that were changed are found where another clock of the cell contradicts them."""

import json
from collections import defaultdict
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import median

import pytest

from bench.environments import read_environments
from bench.store import read_records
from bench.study.clocks import disagreements, timing, unchecked
from bench.study.validation import record_violations

RESULTS = Path(__file__).resolve().parents[1] / "results"
# One with several processes and one with a single process; the others take longer to read.
DIRECTORIES = ("cpu-xeon-amx-2core", "h200")


@cache
def published(directory):
    """The published records of a directory, by cell and environment, each with its number."""
    cells = defaultdict(list)
    for number, record in enumerate(read_records(RESULTS / directory)):
        cells[record.environment_id, record.cell].append((number, record))
    return tuple(map(tuple, cells.values()))


def divided(record, factor):
    """A record whose samples were divided, as a forger would who knows of the latency."""
    blocks = tuple(seconds / factor for seconds in record.block_latency_s)
    return replace(record, block_latency_s=blocks, latency_s=median(blocks) / record.calls_per_block)


def more_calls(record, factor):
    calls = record.calls_per_block * factor
    return replace(record, calls_per_block=calls, latency_s=median(record.block_latency_s) / calls)


def share(directory, change, step):
    """The share of changed records that are found, and of those whose calls something else timed."""
    found = looked = 0
    unseen = 0
    for cell in published(directory):
        timings = [timing(str(number), record) for number, record in cell]
        unseen += unchecked(timings)
        for k, (number, record) in enumerate(cell):
            if record.status == "ok" and number % step == 0:
                forged = change(record)
                others = [*timings[:k], timing(str(number), forged), *timings[k + 1 :]]
                found += any(record_violations(forged)) or any(disagreements(others))
                looked += 1
    assert looked > 50
    ok = sum(record.status == "ok" for cell in published(directory) for _, record in cell)
    return found / looked, 1 - unseen / ok


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_published_records_contradict_nothing(directory):
    for cell in published(directory):
        assert list(disagreements([timing(str(number), record) for number, record in cell], read=True)) == []
        assert [wrong for _, record in cell for wrong in record_violations(record)] == []


@pytest.mark.parametrize("directory", DIRECTORIES)
@pytest.mark.parametrize("factor", [10, 1000])
def test_divided_samples_are_found_in_every_published_record(directory, factor):
    assert share(directory, partial(divided, factor=factor), 7)[0] == 1


@pytest.mark.parametrize(("directory", "least"), [("cpu-xeon-amx-2core", 0.99), ("h200", 0.45)])
def test_ten_times_the_calls_are_found_wherever_something_else_timed_them(directory, least):
    found, checked = share(directory, partial(more_calls, factor=10), 7)
    assert found >= checked - 0.05
    assert found >= least
    # The message names how many records cannot show it.
    assert (checked < 0.5) == (directory == "h200")


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_a_cell_whose_samples_were_all_divided_is_found(directory):
    cells = [cell for cell in published(directory) if any(record.status == "ok" for _, record in cell)]
    for cell in cells:
        forged = [divided(record, 10) if record.status == "ok" else record for _, record in cell]
        assert list(disagreements([timing("", record) for record in forged], read=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line, None),
        (lambda line: line | {"block_latency_s": [t / 10 for t in line["block_latency_s"]]}, "has finer bits than"),
        (lambda line: line | {"block_latency_s": [t / 1000 for t in line["block_latency_s"]]}, "has finer bits than"),
        (lambda line: line | {"calls_per_block": 10 * (line["calls_per_block"] or 1)}, "calls_per_block: the control"),
        (lambda line: line | {"direction": "sideways"}, "direction: expected one of"),
        (lambda line: line | {"started_at": "today"}, "started_at: expected a moment in UTC"),
    ],
    ids=["untouched", "tenth", "thousandth", "calls", "direction", "timestamp"],
)
def test_a_changed_copy_of_published_records_is_found_by_the_command(tmp_path, call, change, message):
    """The baseline of each cell is changed; the latency is made to fit."""
    lines, changed = [], 0
    for cell in published("h200")[:20]:
        for _, record in cell:
            line = json.loads(record.to_line())
            if record.baseline and not record.control:
                line = change(line)
                line["latency_s"] = median(line["block_latency_s"]) / line["calls_per_block"]
                changed += 1
            lines.append(json.dumps(line) + "\n")
    (tmp_path / "records.jsonl").write_text("".join(lines))
    (tmp_path / "environment.json").write_text(json.dumps(read_environments(RESULTS / "h200")))
    done = call("validate", tmp_path)
    assert done.exit_code == (0 if message is None else 1), done.stdout
    assert message is None or sum(message in line for line in done.stdout.splitlines()) == changed == 20


CLOCK = 2.0**-38


def read(seconds):
    """What a clock of a machine that has run for four hours would have said."""
    return round(seconds / CLOCK) * CLOCK


@pytest.fixture
def cell(make_record):
    """The records of a competitor in three processes, with all their clocks."""

    def of(latency_s=0.001, processes=3, device="cpu", **changes):
        blocks = tuple(read(10 * latency_s * (1 + 0.01 * k)) for k in range(10))
        values = {
            "device": device,
            "block_latency_s": blocks,
            "calls_per_block": 10,
            "latency_s": median(blocks) / 10,
            "warm_up_block_latency_s": tuple(read(seconds) for seconds in (0.0107, 0.0104, 0.0103)),
            "synchronised_latency_s": tuple(read(seconds) for seconds in (0.0013, 0.0011, 0.0012)),
            "enqueue_s": 0.0009,
            "prepared_call_s": 0.0012,
            "finished_at": "2026-01-01T00:00:09+00:00",
        }
        return [make_record(key=f"k{k}", process_replicate=k, **(values | changes)) for k in range(processes)]

    return of


def said(records):
    return [wrong.split(": ", 1)[1] for wrong in disagreements([timing("here", record) for record in records])]


def test_clocks_that_agree_are_let_through(cell):
    assert said(cell()) == []
    # A shared machine may be three times as slow for a while.
    first, *rest = cell()
    assert said([replace(first, synchronised_latency_s=(read(0.0034),), prepared_call_s=0.004), *rest]) == []
    assert said(cell(processes=1, synchronised_latency_s=(read(0.03),))) == []


def test_one_process_that_is_ten_times_as_fast_is_found(cell):
    first, *rest = cell()
    (wrong,) = said([more_calls(first, 10), *rest])
    assert wrong.startswith("latency_s: torch matmul (eager) takes 0.000104 s a call in its blocks, and 0.00104 to")
    # Powers of two leave no bits behind.
    assert any("by every other clock" in wrong for wrong in said([divided(first, 16), *rest]))
    assert any("by every other clock" in wrong for wrong in said([divided(first, 1 / 16), *rest]))


def test_all_processes_that_are_ten_times_as_fast_are_found(cell):
    (wrong,) = said([more_calls(record, 10) for record in cell()])
    assert "in the blocks of 3 processes, and at least 0.0011 s where its calls were timed one by one" in wrong


def test_a_single_process_is_held_against_calls_that_were_waited_for(cell):
    assert any("by every other clock" in wrong for wrong in said([more_calls(*cell(processes=1), 10)]))
    # The first calls alone, which a disturbance may have slowed down, prove nothing.
    alone = cell(processes=1, synchronised_latency_s=(), enqueue_s=None)
    assert said([more_calls(*alone, 10)]) == []
    assert unchecked([timing("", record) for record in alone]) == 1


def test_on_a_gpu_a_call_in_a_queue_may_be_much_shorter_than_one_that_is_waited_for(cell):
    waited = {"device": "cuda", "synchronised_latency_s": (read(0.02),), "prepared_call_s": 0.02}
    assert said(cell(processes=1, enqueue_s=2e-5, device_busy_s=3e-4, **waited)) == []
    busy, wrong = said(cell(processes=1, enqueue_s=2e-5, device_busy_s=5e-3, **waited))
    assert "and 0.005 to 0.02 s by every other clock" in wrong
    # What the device itself said needs no call that was waited for.
    waited |= {"synchronised_latency_s": (), "prepared_call_s": None}
    assert said(cell(processes=1, enqueue_s=None, device_busy_s=5e-3, **waited)) == [busy]
    assert "0.00104 s a call in its blocks, and the device is busy with one for 0.005 s" in busy


def test_samples_with_other_bits_than_the_clock_are_found(cell):
    first, *rest = cell()
    assert any("block_latency_s: has finer bits" in wrong for wrong in said([divided(first, 10), *rest]))
    rounded = tuple(round(seconds, 6) for seconds in first.warm_up_block_latency_s)
    assert any("warm_up_block" in wrong for wrong in said([replace(first, warm_up_block_latency_s=rounded), *rest]))
    # Where all are rounded, nothing says what the clock was.
    decimal = {"block_latency_s": (0.01, 0.0102) * 5, "latency_s": 0.00101, "warm_up_block_latency_s": (0.0103,) * 3}
    assert said(cell(synchronised_latency_s=(0.0013, 0.0011), **decimal)) == []


def test_the_control_runs_its_baselines_call(cell, make_record):
    first, *_ = cell(processes=1, baseline=True)
    control = replace(first, key="c", control=True)
    assert said([first, control]) == []
    (wrong, *_) = said([first, replace(control, calls_per_block=11)])
    assert wrong.startswith("calls_per_block: the control has 11, and its baseline, whose call it runs, 10")
    assert any("latency_s: the control takes" in wrong for wrong in said([first, divided(control, 16)]))


def test_a_cell_takes_at_least_as_long_as_what_was_timed_in_it(cell):
    (wrong, *_) = said(cell(block_latency_s=(read(2.0),) * 6, latency_s=0.2, processes=1))
    assert "12 s were timed from started_at to finished_at, which lie 9 s apart" in wrong
    (wrong,) = said(cell(finished_at="2025-12-31T23:59:59+00:00", processes=1))
    assert wrong.startswith("finished_at: 2025-12-31T23:59:59+00:00 is before started_at")
    assert said(cell(finished_at=None, processes=1)) == []


def test_a_block_of_several_calls_each_of_which_would_fill_it_is_found(cell):
    (wrong,) = said(cell(block_s=0.0005, processes=1))
    assert "blocks of 10 calls last at least 0.01 s, and fewer calls would have filled the 0.0005 s" in wrong
    assert said(cell(block_s=0.003, processes=1)) == []


def test_the_block_that_told_the_size_filled_its_time(cell):
    tenth = [read(seconds) for seconds in (0.00107, 0.00104, 0.00103)]
    assert said(cell(processes=1, block_s=0.0104)) == []
    alike = cell(0.0001, processes=1, block_s=0.01, warm_up_block_latency_s=tuple(tenth), synchronised_latency_s=())
    assert any(
        "no block lasted the 0.01 s that a block is sized for, the longest 0.00107 s" in one for one in said(alike)
    )


def test_blocks_before_the_rounds_are_as_long_as_those_in_them(cell):
    alone = {"processes": 1, "synchronised_latency_s": (), "prepared_call_s": None}
    assert said(cell(0.001, **alone)) == []
    for latency_s in (0.0001, 0.01):
        (wrong,) = said(cell(latency_s, **alone))
        assert "s in the rounds, and of 0.0103 to 0.0107 s before them, with the same calls in each" in wrong


def test_nobody_is_accused_on_a_busy_machine_but_of_what_does_not_depend_on_the_moment(cell):
    busy = [read(seconds) for seconds in (0.005, 0.05, 0.01, 0.2, 0.01, 0.03)]
    forged = [more_calls(record, 10) for record in cell(block_latency_s=tuple(busy), block_s=0.0001)]
    assert said(forged) == []
    assert unchecked([timing("", record) for record in forged]) == 3
    assert any("has finer bits" in wrong for wrong in said([divided(forged[0], 10), *forged[1:]]))
    first = replace(forged[0], baseline=True)
    assert any(
        "the control has 11" in wrong for wrong in said([first, replace(first, control=True, calls_per_block=11)])
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ceiling_flops_per_s": 1e9}, "operations a second are over 4 times what was measured in the same cell"),
        ({"ceiling_bytes_per_s": 1e7, "cache": "cold"}, "bytes a second are over 4 times"),
        ({"ceiling_bytes_per_s": 1e7}, None),
        ({"ceiling_flops_per_s": 4e9, "ceiling_bytes_per_s": 3e8, "cache": "cold"}, None),
    ],
)
def test_what_one_record_shows_of_itself(cell, changes, message):
    found = list(record_violations(cell(**changes)[0]))
    assert ([] if message is None else [True]) == [message in wrong for wrong in found if message]
    assert message is not None or found == []
