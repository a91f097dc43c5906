import json
import shlex

import pytest

from bench.records import parse_line
from bench.report.markdown import findings_block
from bench.store import Store
from bench.study.findings import EVERYWHERE, IN_PART, QUESTIONS, findings
from bench.tests.synthetic import FINGERPRINT, cell_records

SETTINGS = ("article-base", "article-n8", "article-in256")


def changed(record, **fields):
    values = json.loads(record.to_line()) | fields
    return parse_line(json.dumps(values))


def slower(record, factor):
    blocks = [at * factor for at in record.block_latency_s]
    return changed(record, block_latency_s=blocks, latency_s=(record.latency_s or 0) * factor)


def cells(make_record, jax, **fields):
    """A cell for each setting, in which JAX takes so many times as long as PyTorch."""
    return [
        [
            changed(slower(record, factor) if record.framework == "jax" else record, workload=name, **fields)
            for record in cell_records(make_record, number, (64, 32, 32, 32), competitors=3, rounds=12)
        ]
        for number, (name, factor) in enumerate(zip(SETTINGS, jax, strict=True))
    ]


def about(found, question):
    return [one for one in found if one.question.name == question]


def test_in_all_is_said_only_where_every_cell_agrees(make_record):
    (one,) = about(findings(cells(make_record, (0.25, 0.4, 0.5))), "jit-or-eager")
    assert one.holds == EVERYWHERE
    assert one.headline
    assert one.sentence.startswith("Forward, compiled JAX is 1.9")
    assert (
        "as fast as eager PyTorch in all 3 article settings that were measured (matched, fp32: 3 cells)" in one.sentence
    )
    # One cell changes its verdict, and the sentence is gone.
    (one,) = about(findings(cells(make_record, (0.25, 0.4, 2.0))), "jit-or-eager")
    assert one.holds == IN_PART
    assert not one.headline
    assert "in all" not in one.sentence
    assert "faster in 2" in one.sentence
    assert "slower in 1" in one.sentence
    (one,) = about(findings(cells(make_record, (2.0, 3.0, 4.0))), "jit-or-eager")
    assert "compiled JAX takes " in one.sentence
    assert "the time of eager PyTorch in all 3" in one.sentence


def test_what_is_said_of_a_range_is_true_of_every_cell(make_record):
    (one,) = about(findings(cells(make_record, (0.2512, 0.4018, 0.5077))), "jit-or-eager")
    low, high = (float(word.rstrip("x")) for word in one.sentence.split(" is ")[1].split(" as fast")[0].split(" to "))
    ratios = [seen.interval.ratio for seen in one.seen]
    assert low <= min(ratios) < min(ratios) * 1.05
    assert max(ratios) * 0.95 < max(ratios) <= high


def test_nothing_is_said_where_no_cell_has_an_answer_or_the_machine_was_disturbed(make_record):
    # Positive control: the same cells speak where JAX is slower.
    assert about(findings(cells(make_record, (1.0, 1.0, 2.0))), "jit-or-eager")
    assert not about(findings(cells(make_record, (1.05, 1.06, 0.95))), "jit-or-eager")
    assert not about(findings([]), "jit-or-eager")
    window = {"other_cpus": 2.0, "steal_cpus": 0.0, "stretch": 1.0, "windows": 10, "disturbed_windows": 10}
    window |= {"cpus": 2, "other_cpus_most": 2.0, "waiting": {}, "load": None, "put_off_per_s": None}
    groups = cells(make_record, (0.25, 0.4, 0.5), disturbance=window)
    assert not about(findings(groups), "jit-or-eager")


def test_precisions_that_disagree_are_told_apart(make_record):
    both = cells(make_record, (0.25, 0.4, 0.5))
    for group in cells(make_record, (3.0, 4.0, 2.0), precision="bf16", dtype="bfloat16"):
        both.append([changed(record, key=f"b{record.key}", cell=f"b{record.cell}") for record in group])
    found = about(findings(both), "jit-or-eager")
    assert [one.where["precision"] for one in found] == ["ieee_fp32", "bf16"]
    assert all(one.holds == EVERYWHERE for one in found)
    assert "precision=fp32" in found[0].conditions
    (one,) = about(findings(both), "bf16-or-fp32-jax")
    assert "slower" in one.sentence or "the time of" in one.sentence


@pytest.fixture
def run(tmp_path, make_record):
    store = Store(tmp_path / "run", resume=False)
    store.add_environment("e0", FINGERPRINT | {"git": {"commit": "0123456789abcdef", "dirty": True}})
    for group in cells(make_record, (0.25, 0.4, 0.5)):
        store.append([changed(record, cell_size=4) for record in group])
    return tmp_path / "run"


def test_each_comes_with_its_query_and_the_command_that_repeats_it(run, call, tmp_path):
    done = call("findings", run, "--json", tmp_path / "f.json", "--csv", tmp_path / "f.csv")
    assert done.exit_code == 0
    assert "changes that were not committed in 1 of 1 environments" in done.output
    told = json.loads((tmp_path / "f.json").read_text())["findings"]
    assert {one["question"] for one in told} <= {one.name for one in QUESTIONS}
    for one in told:
        assert one["sentence"] in done.output
        assert one["command"] in done.output
        again = call(*shlex.split(one["command"])[3:])
        assert again.exit_code == 0
        assert one["sentence"] in again.output
        shown = call(*shlex.split(one["cells_command"])[3:], "--json", tmp_path / "cells.json")
        assert shown.exit_code == 0
        assert len(json.loads((tmp_path / "cells.json").read_text())["cells"]) == len(one["cells"])


def test_a_page_is_filled_and_what_is_no_longer_true_goes(run, call, tmp_path, make_record):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- headlines:begin run -->\nold\n<!-- headlines:end run -->\nafter\n")
    assert call("findings", run, "--readme", page).exit_code == 0
    assert "compiled JAX is" in page.read_text()
    assert "\nold\n" not in page.read_text()
    assert page.read_text().startswith("before\n")
    store = Store(run, resume=True)
    late = cells(make_record, (2.0, 3.0, 4.0))[0]
    store.append([changed(record, key=f"c{record.key}", cell="c", cell_size=4, batch=512) for record in late])
    assert call("findings", run, "--readme", page).exit_code == 0
    assert "compiled JAX is" not in page.read_text()
    assert "No sentence about speeds holds here." in page.read_text()
    page.write_text("no block")
    refused = call("findings", run, "--readme", page)
    assert refused.exit_code == 2
    assert "expected the markers" in refused.stderr
    assert page.read_text() == "no block"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--question", "who"), "--question: expected one of jit-or-eager"),
        (("--where", "batch"), "--where: expected FIELD=PATTERN"),
        (("--readme", "/nowhere/page.md"), "/nowhere/page.md cannot be read"),
        (("--json", "/nowhere/f.json"), "cannot be written"),
    ],
)
def test_wrong_usage_is_one_sentence(run, call, arguments, message):
    done = call("findings", run, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_page_shows_the_matched_division_and_counts_the_rest(make_record):
    found = findings(cells(make_record, (0.25, 0.4, 0.5))) + findings(
        cells(make_record, (0.25, 0.4, 0.5), division="tuned")
    )
    block = findings_block(found, "run")
    assert "tuned" not in block
    assert "(matched, fp32: 3 cells)" in " ".join(block.split())
    assert f"of {len([one for one in found if one.where['division'] == 'tuned'])} more" in block
