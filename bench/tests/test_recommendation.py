import csv
import json

import pytest

from bench.records import parse_line
from bench.store import Store
from bench.study.recommendation import Shape, distance, neighbours
from bench.tests.synthetic import FINGERPRINT, cell_records, write_sweep

ASK = ("--num-partitions", 32, "--in-features", 32, "--out-features", 32)


@pytest.fixture
def groups(make_record):
    """Three cells at batches 64, 512 and 4096; `form-0` leads in each."""
    return [cell_records(make_record, k, (batch, 32, 32, 32), competitors=6) for k, batch in enumerate((64, 512, 4096))]


@pytest.fixture
def run(tmp_path, groups):
    store = Store(tmp_path / "run", resume=False)
    store.add_environment("e0", FINGERPRINT)
    for group in groups:
        store.append(group)
    return tmp_path / "run"


def test_the_distance_counts_doublings(make_record):
    assert distance(Shape(128, 32, 32, 32), make_record()) == 0
    assert distance(Shape(64, 32, 32, 32), make_record()) == pytest.approx(1)
    assert distance(Shape(256, 16, 32, 32), make_record()) == pytest.approx(2**0.5)
    assert distance(Shape(128, 32, 256, 32), make_record()) == pytest.approx(3)


def test_the_nearest_cell_comes_first_whatever_the_order(groups):
    found = neighbours(Shape(600, 32, 32, 32), groups[::-1])
    assert [neighbour.ranking.first.batch for neighbour in found] == [512, 4096, 64]
    assert found[0].leaders == ("torch form-0 (eager)",)
    assert found[0].speeds["torch loop (eager)"].ratio == pytest.approx(0.8, rel=0.02)


def test_only_the_conditions_that_were_asked_for_count(groups):
    assert neighbours(Shape(64, 32, 32, 32, dtype="bfloat16"), groups) == []
    assert neighbours(Shape(64, 32, 32, 32, direction="forward_backward"), groups) == []
    assert neighbours(Shape(64, 32, 32, 32, device="cuda"), groups) == []
    (first, *_) = neighbours(Shape(64, 32, 32, 32, framework="jax"), groups)
    assert first.leaders == ("jax matmul (jit)",)


def test_of_cells_of_one_size_the_one_in_which_most_took_part_comes_first(make_record, tmp_path, call):
    def cells(number, competitors, **changes):
        group = cell_records(make_record, number, (64, 32, 32, 32), competitors=competitors)
        return [parse_line(json.dumps(json.loads(record.to_line()) | changes)) for record in group]

    alone = [record for record in cells(0, 5) if record.framework == "torch"]
    both, tf32 = cells(1, 4, division="tuned"), cells(2, 6, precision="tf32")
    found = neighbours(Shape(64, 32, 32, 32), [alone, both, tf32])
    assert [neighbour.ranking.cell for neighbour in found] == [both[0].cell, alone[0].cell]
    (other,) = neighbours(Shape(64, 32, 32, 32, precision="tf32"), [alone, both, tf32])
    assert other.ranking.cell == tf32[0].cell
    store = Store(tmp_path / "run", resume=False)
    store.add_environment("e0", FINGERPRINT)
    store.append([parse_line(json.dumps(json.loads(r.to_line()) | {"cell_size": len(alone)})) for r in alone])
    # In the second cell form-0, which leads in the first, did not take part.
    store.append(cells(1, 3, division="tuned"))
    # One division is answered: the matched one, unless another is asked for.
    done = call("recommend", *ASK, "--batch", 64, tmp_path / "run")
    assert "Also measured: tuned; see --division." in done.output
    assert "Recommended: torch form-0 (eager)" in done.output
    tuned = call("recommend", *ASK, "--batch", 64, "--division", "tuned", tmp_path / "run")
    assert "Recommended: torch form-0" not in tuned.output


def as_stock(records, implementation):
    return [
        parse_line(json.dumps(json.loads(record.to_line()) | {"kind": "stock"}))
        if record.implementation == implementation
        else record
        for record in records
    ]


def test_what_users_write_instead_takes_part_and_comes_behind_ours_in_a_tie(make_record):
    group = as_stock(cell_records(make_record, 0, (64, 32, 32, 32), competitors=6), "form-0")
    (found,) = neighbours(Shape(64, 32, 32, 32), [group])
    assert found.leaders == ("torch form-0 (eager)",)
    tie = as_stock(cell_records(make_record, 0, (64, 32, 32, 32), competitors=3), "matmul")
    (found,) = neighbours(Shape(64, 32, 32, 32), [tie])
    assert found.leaders[0] == "torch loop (eager)"
    assert set(found.leaders) == {"torch loop (eager)", "torch matmul (eager)", "jax matmul (jit)"}


def test_an_exact_measurement_is_recommended(run, call, tmp_path):
    done = call("recommend", *ASK, "--batch", 64, run, "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    assert done.exit_code == 0
    assert "Recommended: torch form-0 (eager)" in done.output
    assert "exactly this shape" in done.output
    assert "extrapolated" not in done.output
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["recommended"], written["extrapolated"]) == (["torch form-0 (eager)"], False)
    with (tmp_path / "r.csv").open() as file:
        assert {row["competitor"] for row in csv.DictReader(file) if row["leads"] == "True"} == {"torch form-0 (eager)"}


def test_ties_are_ties(tmp_path, make_record, call):
    # Without form-0 all are alike.
    store = Store(tmp_path / "run", resume=False)
    store.add_environment("e0", FINGERPRINT)
    store.append(cell_records(make_record, 0, (64, 32, 32, 32), competitors=3))
    done = call("recommend", *ASK, "--batch", 64, tmp_path / "run")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    (first,) = [line.removeprefix("Recommended: ") for line in lines if line.startswith("Recommended: ")]
    (others,) = [line for line in lines if line.startswith("Not shown to be slower: ")]
    names = {"torch matmul (eager)", "torch loop (eager)", "jax matmul (jit)"}
    assert {first, *others.removeprefix("Not shown to be slower: ").removesuffix(".").split(", ")} == names
    assert sum(line.endswith("not told apart") for line in lines) == len(names) - 1


def test_a_far_measurement_is_a_hint_and_a_very_far_one_no_answer(run, call, tmp_path):
    hint = call("recommend", *ASK, "--batch", 16, run)
    assert hint.exit_code == 0
    assert "extrapolated, 4.0 times away" in hint.output
    assert "batch 64 instead of 16" in hint.output
    refused = call("recommend", *ASK, "--batch", 1, run, "--json", tmp_path / "r.json")
    assert refused.exit_code == 1
    assert "No answer: the nearest measurement is sweep-b64-n32-i32-o32" in refused.output
    assert json.loads((tmp_path / "r.json").read_text())["recommended"] == []
    assert "Recommended" in call("recommend", *ASK, "--batch", 1, run, "--extrapolate").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "float8"), "--dtype: expected one of fp32, bf16, fp16, fp64, got 'float8'"),
        (("--direction", "sideways"), "--direction: expected one of forward"),
        (("--device", "tpu"), "--device: expected one of cpu, cuda"),
        (("--precision", "fp8"), "--precision: expected one of fp32, tf32, bf16, fp16, fp64, got 'fp8'"),
        (("--division", "best"), "--division: expected one of stock, matched, tuned, got 'best'"),
        (
            ("--precision", "bf16", "--dtype", "fp32"),
            "--precision: bf16 is stored in bf16, got --dtype fp32; give both",
        ),
        (("--precision", "tf32"), "nothing was measured undisturbed with dtype fp32, precision tf32, forward"),
        (("--precision", "bf16"), "nothing was measured undisturbed with dtype bf16, precision bf16, forward"),
        (("--framework", "keras"), "--framework: expected one of torch, jax"),
        (("--dtype", "float64"), "nothing was measured undisturbed with dtype fp64"),
        (("--json", "/nowhere/f.json"), "cannot be written"),
    ],
)
def test_wrong_usage_is_one_sentence(run, call, arguments, message):
    done = call("recommend", *ASK, "--batch", 64, run, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert call("recommend", *ASK, run).exit_code == 2


def test_a_cell_of_another_machine_says_so(run, call, make_record, tmp_path):
    write_sweep(tmp_path / "other", make_record, 0)
    frameworks = {name: part | {"large_pages": True} for name, part in FINGERPRINT["frameworks"].items()}
    Store(tmp_path / "other", resume=True).add_environment("e1", FINGERPRINT | {"frameworks": frameworks})
    lines = (run / "records.jsonl").read_text().replace('"e0"', '"e1"').replace('"key": "0', '"key": "f')
    (tmp_path / "other" / "records.jsonl").write_text(lines)
    done = call("recommend", *ASK, "--batch", 64, run, tmp_path / "other")
    assert done.exit_code == 0
    (machine,) = [line.partition(". ")[0] for line in done.output.splitlines() if line.startswith("Machine: ")]
    headings = [line for line in done.output.splitlines() if line.endswith("speed over its fastest:")]
    told = [f"{machine.removeprefix('Machine: ')}, large pages" in line for line in headings]
    assert (any(told), all(told)) == (True, False)
    assert not any(" on cpu" in line for line, other in zip(headings, told, strict=True) if not other)


def test_two_devices_need_a_choice(run, call, make_record, tmp_path):
    write_sweep(tmp_path / "other", make_record, 0)
    other = Store(tmp_path / "other", resume=True)
    other.add_environment("e1", FINGERPRINT | {"device": "cuda"})
    lines = (run / "records.jsonl").read_text().replace('"e0"', '"e1"').replace('"device": "cpu"', '"device": "cuda"')
    (tmp_path / "other" / "records.jsonl").write_text(lines.replace('"key": "0', '"key": "f'))
    done = call("recommend", *ASK, "--batch", 64, run, tmp_path / "other")
    assert done.exit_code == 2
    assert "--device: expected one, since cpu and cuda were measured" in done.stderr
    assert call("recommend", *ASK, "--batch", 64, "--device", "cuda", run, tmp_path / "other").exit_code == 0
