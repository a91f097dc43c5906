"""A run with a budget: what it measures first, that it ends in time, and what it says of the rest."""

import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench.measure import budget as budgets
from bench.measure import sweep
from bench.measure.budget import Budget, Published, expected_seconds, in_order, left_out_sentences, steps
from bench.measure.coordinator import CellRun
from bench.measure.request import EngineError, Request, SweepNotes, chosen_competitors
from bench.measure.rounds import CellOutcome
from bench.measure.workers import OutOfTimeError, WorkerPool
from bench.plan.competitors import Catalogue
from bench.plan.presets import ANY_ROUNDS, plan_cells
from bench.store import Store, read_records
from bench.tests.conftest import example_record
from bench.tests.whole_sweep import InventedCell

TORCH = Catalogue("torch", ("loop", "matmul", "einsum"), ("stock:bmm+bias",), ("dense",))
JAX = Catalogue("jax", ("loop", "matmul", "einsum"), ("stock:nnx.Einsum",), ("dense",))
NAMES = ("article-base", "article-n8", "article-in256")
SMALL = Request(preset="smoke", workload=NAMES, implementation=("matmul",), direction=("forward",))


def apart(workload, ratio, mode=None):
    """Records in which JAX is so many times as fast as torch."""
    modes = (mode or "eager", "jit-graph" if mode else "jit")
    speeds = (("torch", modes[0], 1.0), ("jax", modes[1], 1.0 / ratio))
    return [
        example_record(workload=workload, framework=name, mode=mode, latency_s=seconds, device="cuda")
        for name, mode, seconds in speeds
    ]


@pytest.fixture
def known(monkeypatch):
    """Lets some records be those of the published run."""

    def put(*records):
        monkeypatch.setattr(budgets, "published", lambda device: Published(records))

    put()
    return put


def order(request, first=0):
    """The cells in the order in which a run with a budget takes them, one line each."""
    found = []
    for replicate, division, part in steps(request.plan, limited=True, first=first):
        cells = [cell for cell in plan_cells(request.plan, "cuda") if cell.division == division]
        found += [
            f"{replicate} {division} {cell.workload.name} {cell.precision} {cell.direction}"
            for cell in in_order(cells, request.plan, part)
        ]
    return list(dict.fromkeys(found))


def test_base_settings_come_first_then_where_the_frameworks_are_apart_then_more_processes(known):
    known(*apart("article-n8", 1.1), *apart("article-in256", 0.2), *apart("article-out256", 1.0))
    names = ("article-base", "article-n8", "article-batch-1", "article-in256")
    wanted = Request(workload=names, division=("stock", "matched"), precision=("fp32", "bf16"), replicates=2)
    found = order(wanted)
    assert len(found) == 4 * 2 * 2 * 2 * 2
    assert [line.split()[:3] for line in found[:8]] == [["0", "matched", NAMES[0]]] * 4 + [["0", "stock", NAMES[0]]] * 4
    conditions = {tuple(line.split()[3:]) for line in found[:4]}
    assert conditions == {(p, d) for p in ("ieee_fp32", "bf16") for d in ("forward", "forward_backward")}
    rest = [line.split() for line in found[8:32]]
    assert {line[0] for line in rest} == {"0"}
    # What was never measured comes last.
    apart_first = ["article-in256"] * 4 + ["article-n8"] * 4 + ["article-batch-1"] * 4
    assert [line[2] for line in rest if line[1] == "matched"] == apart_first
    assert [line[0] for line in found[32:]] == ["1"] * 32
    # Without a budget nothing changes its place.
    assert steps(wanted.plan, limited=False) == [(k, division, "all") for k in (0, 1) for division in wanted.division]


def test_the_distance_is_of_plain_calls_or_of_graphs_and_of_other_conditions_where_need_be():
    records = [*apart("article-n8", 1.5), *apart("article-n8", 0.25, "cuda-graph")]
    cells = {cell.direction: cell for cell in plan_cells(Request(workload=("article-n8",)).plan, "cuda")}
    assert Published(records).distance(cells["forward"]) == pytest.approx(math.log(4))
    assert Published(records).distance(cells["forward_backward"]) == pytest.approx(math.log(4) / 2)
    (base,) = plan_cells(Request(workload=NAMES[:1], direction=("forward",)).plan, "cuda")
    assert Published(records).distance(base) == 0
    (tf32,) = plan_cells(Request(workload=("article-n8",), direction=("forward",), precision=("tf32",)).plan, "cuda")
    assert Published(records).distance(tf32) == pytest.approx(math.log(4) / 2)
    # One framework's graphs are not held against the other's calls.
    torch_calls, jax_graphs = apart("article-n8", 9.0)[:1], apart("article-n8", 9.0, "cuda-graph")[1:]
    assert Published([*torch_calls, *jax_graphs]).distance(cells["forward"]) == 0


def test_the_run_that_is_published_for_a_kind_of_device_is_there():
    for device in ("cpu", "cuda"):
        found = budgets.published(device)
        known = [found.distance(cell) for cell in plan_cells(Request(preset="workloads").plan, device)]
        assert sum(distance > 0 for distance in known) > len(known) / 3
        assert all("matmul" in catalogue.implementations for catalogue in found.catalogues(("torch", "jax")))


def test_a_gpu_run_takes_the_base_setting_in_all_modes_and_precisions_and_then_workload_after_workload():
    precisions = ("fp32", "tf32", "bf16", "fp16", "fp64")
    names = ("matmul", "fused", "grouped_matmul")
    wanted = Request(preset="workloads", division=("matched",), precision=precisions, implementation=names)
    (first,) = steps(wanted.plan, limited=True)
    cells = in_order(plan_cells(wanted.plan, "cuda"), wanted.plan, first[2])
    base = cells[: 2 * len(precisions)]
    assert {cell.workload.name for cell in base} == {"article-base"}
    assert len({(cell.precision, cell.direction) for cell in base}) == 2 * len(precisions)
    torch = replace(TORCH, implementations=("matmul", "grouped_matmul", "fused"), only_on={"fused": ["cuda"]})
    graphs = {"cuda-graph", "graphed-callables", "compile-reduce-overhead"}
    for cell in base:
        modes = {one.mode for one in chosen_competitors([torch, JAX], wanted, cell) if one.implementation == "matmul"}
        one_thread = {"eager-one-thread"} if cell.direction == "forward_backward" else set()
        assert modes == {"eager", "compile", *graphs, *one_thread, "jit", "jit-graph", "aot"}
    rest = [budgets.published("cuda").distance(cell) for cell in cells[len(base) :]]
    assert rest == sorted(rest, reverse=True)
    # What is known of one condition does not bring all others of its sizes before what is known of other sizes.
    assert len({cell.workload.name for cell in cells[len(base) : len(base) + 10]}) > 6


def test_more_work_is_expected_to_take_longer_and_a_run_learns_how_long():
    def expected(clocks=True, device="cuda", direction="forward", **changes):
        wanted = Request(**{"preset": "seed", "workload": NAMES[:1], "direction": (direction,)} | changes)
        (cell,) = plan_cells(wanted.plan, device)
        found = chosen_competitors([TORCH, JAX], wanted, cell)
        return expected_seconds(cell, found, wanted.plan, diagnose=clocks).total

    assert expected() > expected(implementation=("matmul",)) > expected(implementation=("matmul",), mode=("eager",))
    assert expected() > expected(probe_s=0.0) == expected(probe_s=0.0, clocks=False)
    assert expected(workload=("electricity-336-96",), device="cpu") > expected(device="cpu", mode=("eager", "jit"))
    budget, (cell, *_) = Budget(None), plan_cells(SMALL.plan, "cpu")
    who = chosen_competitors([TORCH, JAX], SMALL, cell)
    first = budget.expected(cell, who, SMALL.plan, diagnose=True)
    budget.took(first, 3 * first.total)
    second = budget.expected(cell, who, SMALL.plan, diagnose=True)
    assert second.total == pytest.approx(3 * first.total * budgets._MARGIN)
    assert first.total == pytest.approx(
        budgets._FIRST_PACE * expected_seconds(cell, who, SMALL.plan, diagnose=True).total
    )
    # An old slow cell is forgotten.
    for _ in range(budgets._REMEMBERED):
        budget.took(budget.expected(cell, who, SMALL.plan, diagnose=True), first.total)
    assert budget.expected(cell, who, SMALL.plan, diagnose=True).total < second.total / 2


@pytest.fixture
def clocked(monkeypatch, fake_pool, known):
    """Cells that take as long as they are told, by a clock that nothing waits for; returns the clock."""
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    for module in (budgets, sweep):
        monkeypatch.setattr(module, "time", clock)

    class Timed(InventedCell):
        takes = 20.0
        begun: list = []  # noqa: RUF012  of one test

        def run(self):
            Timed.begun.append((self.cell.workload.name, self.left))
            now[0] += Timed.takes
            outcome = CellOutcome(tuple(self.entry(who) for who in self.competitors), "digest", {}, stopped="time")
            if self.left is not None and self.left() < 0:
                raise OutOfTimeError
            return outcome

        def __init__(self, cell, competitors, *rest, left=None, **options):
            super().__init__(cell, competitors)
            self.cell, self.left = cell, left

    Timed.begun = []
    monkeypatch.setattr(sweep, "CellRun", Timed)
    return SimpleNamespace(now=now, cells=Timed)


def measured(out):
    found = {(record.process_replicate, record.workload) for record in read_records(out)}
    return sorted(found)


def test_what_does_not_fit_is_left_out_and_a_resumed_run_goes_on(clocked, tmp_path):
    clocked.cells.takes = 20.0
    wanted = Request(
        preset="smoke", workload=NAMES, implementation=("matmul",), direction=("forward",), replicates=2, budget_s=70.0
    )
    begun, notes, out = clocked.now[0], SweepNotes(), tmp_path / "run"
    sweep.run_sweep(wanted, Store(out, resume=False), notes)
    assert clocked.now[0] - begun <= 70.0
    assert measured(out) == [(0, name) for name in sorted(NAMES)]
    (said,) = [line for line in notes.lines if "no time" in line]
    assert said.startswith("There was no time for 3 of 6 cells;")
    (listed,) = [line for line in notes.lines if line.startswith("Left out, ")]
    assert listed == f"Left out, forward, fp32, matched, process 1: {', '.join(NAMES)}."
    before, first = (out / "records.jsonl").read_bytes(), list(clocked.cells.begun)
    again = SweepNotes()
    sweep.run_sweep(wanted, Store(out, resume=True), again)
    assert (out / "records.jsonl").read_bytes().startswith(before)
    assert measured(out) == sorted((k, name) for k in (0, 1) for name in NAMES)
    assert [name for name, _ in clocked.cells.begun[len(first) :]] == list(NAMES)
    assert not [line for line in again.lines if "no time" in line]


def test_a_cell_that_does_not_end_in_time_leaves_no_record(clocked, tmp_path):
    clocked.cells.takes = 500.0
    notes = SweepNotes()
    wanted = Request(preset="smoke", workload=NAMES, implementation=("matmul",), budget_s=60.0)
    store = Store(tmp_path / "run", resume=False)
    with pytest.raises(
        EngineError, match=r"the budget ended before a cell: .*, and the cell that was begun had not ended after 500 s"
    ):
        sweep.run_sweep(wanted, store, notes)
    assert len(store) == 0
    assert any(line.startswith("There was no time for 6 of 6 cells") for line in notes.lines)


def test_later_processes_of_a_cell_wait_for_the_first(clocked, tmp_path, monkeypatch):
    """One that is cheap without the further clocks is not measured in its second process alone."""
    real = Budget.expected

    def dear_at_first(self, cell, *rest, diagnose, **more):
        found = real(self, cell, *rest, diagnose=diagnose, **more)
        return found._replace(before=1e6) if diagnose and cell.workload.name == NAMES[1] else found

    monkeypatch.setattr(Budget, "expected", dear_at_first)
    clocked.cells.takes = 1.0
    wanted = Request(
        preset="smoke", workload=NAMES, implementation=("matmul",), direction=("forward",), replicates=2, budget_s=300.0
    )
    sweep.run_sweep(wanted, Store(tmp_path / "run", resume=False), SweepNotes())
    assert measured(tmp_path / "run") == sorted((k, name) for k in (0, 1) for name in NAMES if name != NAMES[1])


@pytest.mark.parametrize("name", ["hang-in-prepare", "hang-in-block"])
@pytest.mark.usefixtures("fake_pool")
def test_a_worker_that_hangs_does_not_outlast_the_budget(name, tmp_path, call, monkeypatch):
    monkeypatch.setattr(budgets, "_START_S", {"cpu": 0.1})
    monkeypatch.setattr(budgets, "_END_S", 0.5)
    # A preset allows far more for each request.
    monkeypatch.setattr(budgets, "expected_seconds", lambda *_, **__: budgets.Seconds(0.1, 0.1, 0.1))
    words = ("run", "--workload", NAMES[0], "--direction", "forward", "--rounds", "50", "--implementation", "matmul")
    budget_s = 3.0 + time.process_time()
    begun = time.monotonic()
    done = call(*words, "--implementation", name, "--budget-s", budget_s, "--out", tmp_path / "run")
    assert time.monotonic() - begun < budget_s
    assert done.exit_code == 1
    assert "the budget ended before a cell" in done.stderr
    assert f"Left out, forward, fp32, matched: {NAMES[0]}." in done.stdout
    assert not (tmp_path / "run" / "records.jsonl").exists() or not (tmp_path / "run" / "records.jsonl").read_bytes()


@pytest.mark.usefixtures("fake_pool")
def test_a_worker_that_dies_costs_its_competitor_and_no_other_cell(tmp_path, call, monkeypatch):
    monkeypatch.setattr(budgets, "_END_S", 0.5)
    words = ("run", "--direction", "forward", "--cell-s", "0", "--most-cell-s", "9", "--budget-s", 600.0)
    chosen = [part for name in NAMES for part in ("--workload", name)]
    chosen += [part for name in ("matmul", "die-in-block", "loop") for part in ("--implementation", name)]
    done = call(*words, *chosen, "--framework", "torch", "--out", tmp_path / "run")
    assert done.exit_code == 1
    found = {(one.workload, one.implementation): one.status for one in read_records(tmp_path / "run")}
    assert found == {
        (workload, name): "crash" if name == "die-in-block" else "ok"
        for workload in NAMES
        for name in ("matmul", "die-in-block", "loop")
    }
    assert "no time" not in done.stdout
    # Given by name, it is not left without a word.
    assert "--most-cell-s has no effect" in " ".join(done.stdout.split())


def test_rounds_end_before_the_time_of_what_follows_them(fake_starter):
    (cell,) = plan_cells(Request(workload=NAMES[:1], direction=("forward",)).plan, "cpu")
    who = chosen_competitors([TORCH], Request(implementation=("matmul", "loop"), framework=("torch",)), cell)
    # Noise that no time resolves would prolong them; one round is what is kept of a cell in any case.
    plan = replace(SMALL.plan, rounds=ANY_ROUNDS, cell_s=60.0, most_cell_s=600.0, least_rounds=3, compiled={})
    asked = []

    def left():
        asked.append(1)
        return 1.0 + 1e-9

    with WorkerPool(fake_starter, ("torch",)) as pool:
        outcome = CellRun(cell, who, pool, plan, left=left, after_s=1.0).run()
    assert asked
    assert outcome.stopped == "time"
    assert {len(entry.blocks) for entry in outcome.entries} == {2}


def test_workers_are_asked_for_no_longer_than_there_is_time(fake_starter):
    left = [math.inf]
    with WorkerPool(fake_starter, ("torch",), lambda: left[0]) as pool:
        assert pool.request("torch", {"operation": "ceilings"}, 60)["ok"]
        left[0] = 0.0
        with pytest.raises(OutOfTimeError):
            pool.request("torch", {"operation": "ceilings"}, 60)
    with pytest.raises(OutOfTimeError):
        WorkerPool(fake_starter, ("torch",), lambda: 0.0)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e99", "text", ""])
def test_a_time_that_is_none_is_refused_in_one_sentence(value, tmp_path, call):
    done = call("run", "--budget-s", value, "--out", tmp_path / "run")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("bench: --budget-s: expected seconds above 0")
    assert f"got {float(value) if value not in ('text', '') else value!r};" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_would_be_left_out_and_starts_nothing(tmp_path, call, monkeypatch):
    monkeypatch.setattr("bench.measure.sweep.starter", lambda *args, **kwargs: pytest.fail("a worker starts"))
    words = ("run", "--preset", "seed", "--device", "cuda", "--replicates", "2", "--out", tmp_path / "run", "--dry-run")
    short, long = call(*words, "--budget-s", "300"), call(*words, "--budget-s", "1e6")
    assert short.exit_code == long.exit_code == 0
    assert "are expected to reach for 40 of 40 cells" in long.stdout
    assert "Left out" not in long.stdout
    assert "article-n8" in short.stdout
    assert "process 1" in short.stdout
    assert not (tmp_path / "run").exists()


def test_every_cell_that_is_left_out_is_named():
    cells = plan_cells(Request(preset="seed").plan, "cpu")
    said = left_out_sentences([(k, cell) for k in (0, 2) for cell in cells], 99)
    assert said[0].startswith(f"There was no time for {2 * len(cells)} of 99 cells")
    assert len(said) == 1 + 2
    assert all("process 0, 2" in line and all(cell.workload.name in line for cell in cells) for line in said[1:])
    assert left_out_sentences([], 99) == []


@pytest.mark.parametrize(("expected_s", "names"), [(20.0, NAMES[:1]), (52.0, NAMES[1:2]), (60.0, ())])
def test_where_no_cell_seems_to_fit_one_is_begun_that_may_be_as_fast_as_by_the_estimates(
    expected_s, names, clocked, tmp_path, monkeypatch
):
    """By three times the estimates, which is what is expected of an unknown machine, none of these would be."""
    dear = {NAMES[0]: expected_s, NAMES[1]: 0.9 * expected_s, NAMES[2]: 400.0}
    seconds = lambda cell, *_, **__: budgets.Seconds(dear[cell.workload.name], 0.0, 0.0)  # noqa: E731
    monkeypatch.setattr(budgets, "expected_seconds", seconds)
    clocked.cells.takes = 45.0
    wanted = Request(preset="smoke", workload=NAMES, implementation=("matmul",), direction=("forward",), budget_s=50.0)
    out = tmp_path / "run"
    if names:
        sweep.run_sweep(wanted, Store(out, resume=False), SweepNotes())
        assert measured(out) == [(0, name) for name in names]
    else:
        with pytest.raises(EngineError, match=r"the shortest cell 54 s or more"):
            sweep.run_sweep(wanted, Store(out, resume=False), SweepNotes())
        assert clocked.cells.begun == []


def test_what_seemed_too_long_is_measured_once_the_machine_turns_out_fast(clocked, tmp_path, monkeypatch):
    dear = {NAMES[0]: 30.0, NAMES[1]: 5.0, NAMES[2]: 400.0}
    seconds = lambda cell, *_, **__: budgets.Seconds(dear[cell.workload.name], 0.0, 0.0)  # noqa: E731
    monkeypatch.setattr(budgets, "expected_seconds", seconds)
    clocked.cells.takes = 4.0
    wanted = Request(preset="smoke", workload=NAMES, implementation=("matmul",), direction=("forward",), budget_s=50.0)
    sweep.run_sweep(wanted, Store(tmp_path / "run", resume=False), notes := SweepNotes())
    # The first might take a minute on an unknown machine; after the second it fits, and the third never does.
    assert [name for name, _ in clocked.cells.begun] == [NAMES[1], NAMES[0]]
    assert f"Left out, forward, fp32, matched: {NAMES[2]}." in notes.lines


def test_the_further_clocks_are_given_up_before_the_samples(fake_starter):
    (cell,) = plan_cells(Request(workload=NAMES[:1], direction=("forward",)).plan, "cpu")
    who = chosen_competitors([TORCH], Request(implementation=("matmul",), framework=("torch",)), cell)
    plan = replace(SMALL.plan, rounds=3, probe_s=0.01, compiled={})
    clocks = {}
    for left_s in (2.0, 60.0):
        with WorkerPool(fake_starter, ("torch",)) as pool:
            outcome = CellRun(cell, who, pool, plan, left=lambda s=left_s: s, after_s=1.0).run()
        entry = outcome.entries[0]
        assert (entry.status, len(entry.blocks)) == ("ok", 6)
        # What is counted to judge the program is counted in any case.
        assert entry.probe["program_flops"] == 10**9
        clocks[left_s] = "enqueue_s" in entry.probe
    assert clocks == {2.0: False, 60.0: True}
