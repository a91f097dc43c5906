"""Cells that differ in one condition are never one panel, one square, one heading or one benchmark."""

import math

import pytest

from bench.report.charts import ratio_chart, squares
from bench.report.text import baseline_line, percent, resolution_line, titles, told_apart, winner_line
from bench.study.results import Results
from bench.tests.in_memory import rankings
from bench.tests.synthetic import cell_records

SIZE = (64, 8, 32, 32)
CONDITIONS = (
    {},
    {"division": "tuned"},
    {"cache": "cold"},
    {"precision": "tf32"},
    {"direction": "train_step", "optimizer": "adamw"},
    {"direction": "train_step", "optimizer": "sgd"},
    {"environment_id": "e1"},
)


@pytest.fixture
def alike(make_record):
    """The records of cells that differ in one condition each, and of one that differs in what took part alone."""

    def make(number, changes, competitors=3):
        def changed(**fields):
            return make_record(**fields | changes)

        return cell_records(changed, number, SIZE, competitors=competitors)

    groups = [make(k, changes) for k, changes in enumerate(CONDITIONS)]
    return [*groups, make(len(groups), {}, competitors=2)]


@pytest.fixture
def found(alike):
    return rankings(record for group in alike for record in group)


def test_the_first_name_that_is_nobody_elses():
    assert told_apart(["a", "b", "b", "b"], ["a 1", "b 1", "b 2", "b 2"], ["w", "x", "y", "z"]) == [
        "a",
        "b 1",
        "y",
        "z",
    ]
    assert told_apart([], []) == []


def test_headings_name_the_environment_or_the_cell_only_where_they_must(found):
    headings = titles(found)
    assert len(set(headings)) == len(found)
    plain = "sweep-b64-n8-i32-o32 (B=64, n=8, 32->32), forward, fp32, matched, cpu"
    assert headings[1:4] == [plain.replace("matched", "tuned"), plain.replace(", cpu", ", cold, cpu"),
                             plain.replace("fp32", "tf32")]  # fmt: skip
    assert headings[6] == f"{plain}, environment e1"
    assert [headings[0], headings[7]] == [f"{plain}, environment e0, cell {found[k].cell}" for k in (0, 7)]


def test_every_cell_is_a_panel_of_the_chart_of_ratios(found):
    pytest.importorskip("altair", reason="charts need the report extra")
    drawn = ratio_chart(Results(tuple(found), {}, {})).to_dict()["concat"]
    assert len(drawn) == len({panel["title"]["text"] for panel in drawn}) == len(found)


def test_every_cell_of_a_directory_is_a_square_of_its_own(found):
    places = [(point["panel"], point["batch"], point["num_partitions"]) for point in squares(found[:4])]
    assert len(set(places)) == 4
    assert sum("cold" in panel for panel, *_ in places) == 1


def test_figures_without_meaning_are_capped_alike(make_record):
    assert (percent(0.0), percent(math.log(1.5)), percent(5.0)) == ("0.0%", "50.0%", "over 1002%")
    noisy = rankings(cell_records(make_record, 0, SIZE, competitors=2, noise=8.0, rounds=4))
    assert "median over 1002%, largest over 1002%." in resolution_line(noisy)
    assert "faster by less than over" not in baseline_line(noisy[0])


def test_one_competitor_ties_with_nobody(make_record):
    (alone,) = rankings(cell_records(make_record, 0, SIZE, competitors=1))
    assert winner_line(alone) == "The only competitor that was timed: torch matmul (eager)."
    (yardstick,) = rankings([make_record(kind="yardstick", implementation="dense")])
    assert winner_line(yardstick) == "No competitor could be timed."
