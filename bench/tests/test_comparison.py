import csv
import json
from itertools import pairwise, product

import numpy as np
import pytest

from bench.store import Archive, Store
from bench.study.comparison import compare, measured_cells
from bench.tests.synthetic import FINGERPRINT

NAMES = (("torch", "matmul", "eager"), ("torch", "loop", "eager"), ("jax", "matmul", "jit"), ("jax", "loop", "jit"))


@pytest.fixture
def write(tmp_path, make_record):
    """Writes a run of two cells; `factors` multiply latencies of competitors, `shift` all, chance a process's."""

    def run(
        name,
        *,
        seed,
        factors=None,
        shift=1.0,
        fingerprint=None,
        broken=(),
        noise=0.004,
        extra=(),
        replicates=1,
        broken_in_last=(),
        of_process=0.0,
    ):
        rng = np.random.default_rng(seed)
        store = Store(tmp_path / name, resume=False)
        store.add_environment(name, FINGERPRINT | (fingerprint or {}))
        directions = ("forward", "forward_backward", *extra)
        for direction, replicate in product(directions, range(replicates)):
            records = []
            for k, (framework, implementation, mode) in enumerate((*NAMES, NAMES[0])):
                label = f"{framework} {implementation}"
                latency = 1e-3 * (1 + k % len(NAMES)) * shift * (factors or {}).get(label, 1.0)
                latency *= np.exp(of_process * rng.standard_normal())
                blocks = tuple((10 * latency * np.exp(noise * rng.standard_normal(24))).tolist())
                changes = {"block_latency_s": blocks, "latency_s": float(np.median(blocks)) / 10}
                if label in broken or (label in broken_in_last and replicate == replicates - 1):
                    changes = {"status": "crash", "reason": "SIGKILL", "latency_s": None, "block_latency_s": ()}
                records.append(
                    make_record(
                        key=f"{name}{direction}{replicate}{k}",
                        cell=f"{name}{direction}",
                        cell_size=len(NAMES) + 1,
                        process_replicate=replicate,
                        direction=direction,
                        framework=framework,
                        implementation=implementation,
                        mode=mode,
                        baseline=k in (0, len(NAMES)),
                        control=k == len(NAMES),
                        environment_id=name,
                        **changes,
                    )
                )
            store.append(records)
        return tmp_path / name

    return run


def found(a, b):
    return compare(*(measured_cells(Archive([run]).cells(), str(run)) for run in (a, b)))


def test_a_repetition_shows_no_change(write, call):
    # One process cannot say that nothing changed: the next one may differ by 2%.
    one, another = write("one", seed=2), write("another", seed=3)
    assert {change.verdict for change in found(one, another).changes} == {"UNRESOLVED"}
    a, b = write("a", seed=0, replicates=4), write("b", seed=1, replicates=4)
    both = found(a, b)
    assert {change.verdict for change in both.changes} == {"SAME"}
    assert len(both.changes) == 2 * len(NAMES)
    assert (both.agreeing, both.contradicting) == (6, ())
    done = call("compare", a, b)
    assert done.exit_code == 0
    assert "8 SAME" in done.output
    assert "6 FASTER or SLOWER in both runs alike, 0 contradict" in done.output


@pytest.mark.parametrize(("replicates", "of_process"), [(1, 0.0), (3, 0.05)])
def test_repetitions_of_a_noisy_run_are_no_regressions(write, replicates, of_process):
    """What a regression test must not do: fail for nothing. 40 pairs of equal runs, 8 comparisons each."""
    runs = [write(f"r{k}", seed=k, noise=0.05, replicates=replicates, of_process=of_process) for k in range(41)]
    cells = [measured_cells(Archive([run]).cells(), str(run)) for run in runs]
    failed = sum(bool(compare(a, b).regressions) for a, b in pairwise(cells))
    assert failed <= 2


def test_a_regression_is_found_and_ends_with_status_1(write, call, tmp_path):
    a, b = write("a", seed=0), write("b", seed=1, factors={"torch loop": 1.2, "jax loop": 0.8})
    done = call("compare", a, b, "--json", tmp_path / "f.json", "--csv", tmp_path / "f.csv")
    assert done.exit_code == 1
    assert "Regression: torch loop (eager) in article-base" in done.output
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["regressions"] == 2
    (slower, *_) = [change for change in written["changes"] if change["competitor"] == "torch loop (eager)"]
    assert slower["verdict"] == "SLOWER"
    assert slower["ratio_b_to_a"]["low"] < 1 / 1.2 < slower["ratio_b_to_a"]["high"] < 1
    with (tmp_path / "f.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows if row["competitor"] == "jax loop (jit)"] == ["FASTER", "FASTER"]
    assert len(rows) == len(written["changes"])
    assert written["overall"] == []
    assert call("compare", b, a).exit_code == 1


def test_a_small_regression_shows_in_all_cells_together(write, call, tmp_path):
    """4% in two cells, where processes differ by 1%: too little for one cell, and a regression all the same."""
    kind = {"replicates": 5, "of_process": 0.01}
    a, same = (write(f"a{seed}", seed=seed, **kind) for seed in range(2))
    b = write("b", seed=2, factors={"torch loop": 1.04}, **kind)
    assert call("compare", a, same).exit_code == 0
    done = call("compare", a, b, "--json", tmp_path / "f.json", "--csv", tmp_path / "f.csv")
    assert done.exit_code == 1
    assert "Regression: torch loop (eager) over 2 cells: 0.96x" in done.output
    assert "Regression: torch loop (eager) in" not in done.output
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["regressions"] == 1
    (slower,) = [one for one in written["overall"] if one["verdict"] == "SLOWER"]
    assert (slower["competitor"], slower["cells"]) == ("torch loop (eager)", 2)
    assert slower["ratio_b_to_a"]["low"] < 1 / 1.04 < slower["ratio_b_to_a"]["high"] < 1
    with (tmp_path / "f.csv").open() as file:
        rows = [(row["workload"], row["cells"]) for row in csv.DictReader(file) if row["verdict"] == "SLOWER"]
    assert rows == [("", "2")]
    assert len(written["overall"]) == len(NAMES)


def test_what_one_process_cannot_know_is_said(write, call, tmp_path):
    slower = {"torch loop": 1.2}
    one, another = write("a", seed=0), write("b", seed=1, factors=slower)
    several, others = write("c", seed=2, replicates=4), write("d", seed=3, replicates=4, factors=slower)
    for a, b, said in ((one, another, True), (several, another, True), (several, others, False)):
        done = call("compare", a, b, "--json", tmp_path / "f.json")
        assert done.exit_code == 1
        assert ("Measure both runs with --replicates 5" in done.output) == said
        assert json.loads((tmp_path / "f.json").read_text())["one_process"] == said


def test_a_slower_machine_is_no_regression_of_anybody(write, call):
    a, b = write("a", seed=0), write("b", seed=1, shift=1.3)
    both = found(a, b)
    assert {change.verdict for change in both.changes} == {"UNRESOLVED"}
    done = call("compare", a, b)
    assert done.exit_code == 0
    assert "all competitors together: 0.77x" in done.output


def test_an_answer_that_was_lost_is_a_regression(write, call):
    a, b = write("a", seed=0), write("b", seed=1, broken=("jax matmul",))
    done = call("compare", a, b)
    assert done.exit_code == 1
    assert "Regression: jax matmul (jit)" in done.output
    assert "crash, SIGKILL" in done.output
    assert call("compare", b, a).exit_code == 0


def test_contradicting_verdicts_are_counted(write, call, tmp_path):
    f = tmp_path / "f.json"
    # Against the baseline, jax matmul takes 3 times as long in A and a third in B.
    a, b = write("a", seed=0), write("b", seed=1, factors={"jax matmul": 1 / 9})
    both = found(a, b)
    assert [(one.label, one.beyond_noise) for one in both.contradicting] == [("jax matmul (jit)", True)] * 2
    for one in both.contradicting:
        # Three times as long as the baseline, then a third of it.
        assert one.interval.low < 9 < one.interval.high
    assert "2 contradict in 2 cells, 2 of them beyond both runs' noise." in call("compare", a, b, "--json", f).output
    (first, _) = json.loads(f.read_text())["verdicts_contradicting"]
    assert (first["competitor"], first["beyond_noise"]) == ("jax matmul (jit)", True)


def test_small_opposite_differences_may_be_within_the_noise_where_thousands_are_compared(write, call, monkeypatch):
    """3% faster in one run and 3% slower in the other, where both know the ratio to some 2%."""
    options = {"noise": 0.03, "replicates": 5, "of_process": 0.01, "extra": tuple(f"d{k}" for k in range(14))}
    a = write("a", seed=0, factors={"jax matmul": 0.97 / 3}, **options)
    b = write("b", seed=100, factors={"jax matmul": 1.03 / 3}, **options)
    opposite = found(a, b).contradicting
    assert len(opposite) > 2
    assert {(one.label, one.beyond_noise) for one in opposite} == {("jax matmul (jit)", True)}
    # The 5% are shared out among all comparisons, here as if there were a thousand times as many.
    monkeypatch.setattr("bench.study.comparison.CONFIDENCE", 1 - 0.05 / 1000)
    many = found(a, b).contradicting
    assert [one.label for one in many] == [one.label for one in opposite]
    assert 0 < sum(one.beyond_noise for one in many) < len(many)
    assert "contradiction within the noise: jax matmul (jit)" in call("compare", a, b).output


def test_a_baseline_that_failed_in_one_process_is_compared_in_the_others(write, call):
    a = write("a", seed=0, replicates=2)
    b = write("b", seed=1, replicates=2, factors={"jax matmul": 1 / 9}, broken_in_last=("torch matmul",))
    assert [one.label for one in found(a, b).contradicting] == ["jax matmul (jit)"] * 2
    assert call("compare", a, b).exit_code == 1


def test_cells_of_one_run_alone_are_listed(write, call):
    a, b = write("a", seed=0, extra=("train_step",)), write("b", seed=1)
    assert "1 cells only in A: article-base (B=128, n=32, 32->32), train_step" in call("compare", a, b).output
    assert len(found(b, a).only_b) == 1
    many = write("many", seed=0, extra=("train_step", "d1", "d2", "d3", "d4"))
    output = call("compare", many, b).output
    assert output.index("5 cells only in A: ") < output.index("and 2 more.")


@pytest.mark.parametrize(
    "other",
    [
        {"cpu_model": "another processor"},
        {"affinity": [0]},
        {"device": "cuda", "gpus": ["NVIDIA H200, GPU-1, 550"]},
    ],
)
def test_different_devices_are_refused_unless_told(write, call, other):
    a, b = write("a", seed=0), write("b", seed=1, fingerprint=other)
    done = call("compare", a, b)
    assert done.exit_code == 2
    assert "add --across-devices" in done.stderr
    assert "a processor" in done.stderr
    assert call("compare", a, b, "--across-devices").exit_code == 0


def test_the_same_gpu_model_is_the_same_device(write, call):
    gpus = [{"gpus": [f"NVIDIA H200, GPU-{k}, 550"]} for k in range(2)]
    a, b = write("a", seed=0, fingerprint=gpus[0]), write("b", seed=1, fingerprint=gpus[1])
    assert call("compare", a, b).exit_code == 0


def test_wrong_usage_is_one_sentence(write, call, tmp_path):
    a = write("a", seed=0)
    other = write("b", seed=1, extra=())
    (tmp_path / "b" / "records.jsonl").write_text(
        (tmp_path / "b" / "records.jsonl").read_text().replace('"article-base"', '"another"')
    )
    for arguments, message in (
        ((a, tmp_path / "nowhere"), "holds no records.jsonl"),
        ((a, other), "no competitor was timed in both"),
        ((a, a, "--json", "/nowhere/f.json"), "--json: /nowhere/f.json cannot be written"),
    ):
        done = call("compare", *arguments)
        assert done.exit_code == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_cell_that_was_measured_twice_is_refused(write, call, tmp_path):
    a, b = write("a", seed=0), write("b", seed=1)
    (a / "records.jsonl").write_bytes((a / "records.jsonl").read_bytes() + (b / "records.jsonl").read_bytes())
    (a / "environment.json").write_text(json.dumps({"a": FINGERPRINT, "b": FINGERPRINT}))
    done = call("compare", a, b)
    assert done.exit_code == 2
    twice = tmp_path / "twice"
    twice.mkdir()
    lines = (b / "records.jsonl").read_text()
    again = lines.replace('"cell": "', '"cell": "x').replace('"key": "', '"key": "x')
    (twice / "records.jsonl").write_text(lines + again)
    (twice / "environment.json").write_bytes((b / "environment.json").read_bytes())
    same = call("compare", a, twice, "--where-a", "environment_id=a")
    assert same.exit_code == 2
    assert "was measured twice in the environment b, as the cells" in same.stderr
    assert "was measured twice, in the environments a and b; choose one with --where-a or --where-b" in done.stderr
    assert call("compare", a, b, "--where-a", "environment_id=a").exit_code == 0
    # What is left out has no say in whether the devices are the same.
    (a / "environment.json").write_text(json.dumps({"a": FINGERPRINT, "b": FINGERPRINT | {"cpu_model": "another"}}))
    assert call("compare", a, b, "--where-a", "environment_id=b").exit_code == 2
    assert call("compare", a, b, "--where-a", "environment_id=a").exit_code == 0
    wrong = call("compare", a, b, "--where-b", "place=a")
    assert (wrong.exit_code, "--where-b: expected FIELD=PATTERN with one of workload" in wrong.stderr) == (2, True)
