from dataclasses import replace

import pytest

from bench.measure.coordinator import CellRun
from bench.measure.rounds import Entry, add_control, rehearse
from bench.measure.workers import RequestError, WorkerPool
from bench.plan.cells import Cell
from bench.plan.competitors import Competitor
from bench.plan.presets import PRESETS
from bench.plan.workloads import WORKLOADS
from bench.tests.fake_worker import GOOD, STALLED

CELL = Cell(WORKLOADS["article-base"], "forward", "ieee_fp32", "matched", "cpu")
LIMITS = replace(PRESETS["smoke"].limits, unrolled_products=1000, prepare_s=3.0, request_s=3.0)
PRESET = replace(PRESETS["smoke"], rounds=3, probe_s=0.01, limits=LIMITS)


@pytest.fixture
def measure(fake_starter):
    """Measures a cell with the given names, in torch, beside three good competitors in each framework."""

    def run(*names, preset=PRESET):
        competitors = [Competitor("torch", name, "eager") for name in (*GOOD, *names)]
        competitors += [Competitor("jax", name, "jit") for name in GOOD]
        with WorkerPool(fake_starter) as pool:
            outcome = CellRun(CELL, competitors, pool, preset).run()
        found = {(e.competitor.framework, e.competitor.implementation): e for e in outcome.entries if not e.control}
        return outcome, found

    return run


def test_everybody_gets_two_blocks_a_round_and_the_baseline_a_control(measure):
    outcome, found = measure()
    assert all(entry.status == "ok" and len(entry.blocks) == 6 for entry in outcome.entries)
    (control,) = [entry for entry in outcome.entries if entry.control]
    assert control.competitor == Competitor("torch", "matmul", "eager")
    assert found["torch", "matmul"].baseline
    assert outcome.inputs_digest == "same"


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("die-in-prepare", "crash", "SIGKILL"),
        ("die-in-block", "crash", "SIGKILL"),
        ("hang-in-prepare", "timeout", "no answer within 3 s"),
        ("hang-in-block", "timeout", "no answer within 3 s"),
        ("exit-in-check", "crash", "exit status 7: the last words"),
        ("garbage-in-check", "crash", "no message"),
        ("wrong", "mismatch", "before timing: y is wrong"),
        ("wrong-later", "mismatch", "after timing: y is wrong"),
        ("lazy", "mismatch", "the program that runs does 1 operation"),
        ("impossible", "mismatch", "that the device can do: not all was done"),
        ("out-of-memory", "oom", "no memory left"),
        ("refused", "unsupported", "not on this device"),
    ],
)
def test_a_bad_competitor_ends_alone_with_its_reason(measure, name, status, reason):
    outcome, found = measure(name)
    bad = found["torch", name]
    assert bad.status == status
    assert reason in bad.reason
    for entry in outcome.entries:
        if entry is not bad:
            assert entry.status == "ok"
            assert len(entry.blocks) == 6


@pytest.mark.every
def test_many_bad_competitors_end_one_by_one(measure):
    names = ("die-in-block", "hang-in-block", "die-in-prepare", "wrong", "exit-in-check")
    outcome, found = measure(*names)
    assert [found["torch", name].status for name in names] == ["crash", "timeout", "crash", "mismatch", "crash"]
    assert all(entry.status == "ok" for entry in outcome.entries if entry.competitor.implementation in GOOD)


def test_a_control_whose_own_answer_was_wrong_stays_a_mismatch_when_its_baseline_ends_otherwise():
    class Silent:
        def request(self, framework, message, timeout_s):
            raise RequestError("timeout", "no answer")

        def alive(self, framework):
            return True

    for wrong, status in ((True, "mismatch"), (False, "timeout")):
        run = CellRun(CELL, [Competitor("torch", "matmul", "eager")], Silent(), PRESET)
        add_control(run._entries)
        baseline, control = run._entries
        if wrong:
            control.fail("mismatch", "y is wrong")
        run._probe(baseline)
        assert (baseline.status, control.status) == ("timeout", status)


class Meter:
    """A device that used six joules from reading to reading."""

    joules = 0.0

    def read(self):
        return {}

    def energy_j(self):
        self.joules += 6.0
        return self.joules


def test_energy_is_that_of_a_call_where_the_device_reports_any(fake_starter):
    competitors = [Competitor("torch", name, "eager") for name in GOOD]
    with WorkerPool(fake_starter) as pool:
        outcome = CellRun(CELL, competitors, pool, PRESET, monitor=Meter()).run()
    # The worker ran forty calls.
    assert {entry.energy_j for entry in outcome.entries if not entry.control} == {6.0 / 40}
    assert {entry.energy_j for entry in outcome.entries if entry.control} == {None}


def test_a_later_process_measures_speeds_and_checks_answers_and_programs_alone(fake_starter):
    competitors = [Competitor("torch", name, "eager") for name in (*GOOD, "lazy", "wrong-later")]
    asked = set()

    class Listening(WorkerPool):
        def request(self, framework, message, timeout_s):
            asked.add(message["operation"])
            return super().request(framework, message, timeout_s)

    with Listening(fake_starter) as pool:
        outcome = CellRun(CELL, competitors, pool, PRESET, diagnose=False).run()
    found = {entry.competitor.implementation: entry for entry in outcome.entries if not entry.control}
    assert not asked & {"memory", "run_for"}
    assert {found[name].peak_memory_bytes for name in GOOD} == {None}
    assert all(found[name].probe["program_flops"] and "enqueue_s" not in found[name].probe for name in GOOD)
    assert all(len(found[name].blocks) == 6 for name in GOOD)
    assert "does 1 operation" in found["lazy"].reason
    assert "after timing" in found["wrong-later"].reason
    # The first process is asked for the rest.
    with Listening(fake_starter) as pool:
        CellRun(CELL, competitors[: len(GOOD)], pool, PRESET, monitor=Meter()).run()
    assert asked >= {"memory", "run_for"}


@pytest.mark.parametrize("probe_s", [0.0, 0.01])
def test_programs_are_counted_with_and_without_the_other_clocks(measure, probe_s):
    _, found = measure("lazy", preset=replace(PRESET, probe_s=probe_s))
    assert "does 1 operation" in found["torch", "lazy"].reason
    assert ("enqueue_s" in found["torch", "matmul"].probe) == (probe_s > 0)


def test_different_inputs_end_the_cell(measure, monkeypatch):
    monkeypatch.setenv("FAKE_DIGEST_jax", "other")
    outcome, _ = measure()
    assert {entry.status for entry in outcome.entries} == {"crash"}
    assert "different inputs" in outcome.entries[0].reason


def test_competitors_over_a_cap_are_skipped_with_the_figure(measure):
    preset = replace(PRESET, limits=replace(PRESET.limits, executed_flops=1.0))
    outcome, _ = measure(preset=preset)
    for entry in outcome.entries:
        assert entry.skipped
        assert entry.status == "unsupported"
        assert "over the preset's cap of 1" in entry.reason


def test_who_is_slow_and_far_behind_is_skipped_but_a_slow_machine_alone_ends_nobody(measure):
    limits = replace(PRESET.limits, call_s=1e-4, slowdown=4.0)
    _, found = measure("hopeless", "disturbed", preset=replace(PRESET, limits=limits))
    assert [name for (_, name), entry in found.items() if entry.skipped] == ["hopeless"]
    # The other one had slow first calls and is called again; what that took is no warm-up of its blocks.
    assert len(found["torch", "disturbed"].blocks) == 6
    assert len(found["torch", "disturbed"].warm_up) == len(found["torch", "matmul"].warm_up)
    assert found["torch", "hopeless"].reason == "skipped: one call took 0.1 s, over the preset's cap of 0.004 s here"


def test_the_order_changes_from_round_to_round_and_is_mirrored_within_one(fake_starter):
    asked = []

    class Listening(WorkerPool):
        def request(self, framework, message, timeout_s):
            if message["operation"] == "block":
                asked.append((framework, message["handle"]))
            return super().request(framework, message, timeout_s)

    competitors = [Competitor("torch", name, "eager") for name in GOOD]
    competitors += [Competitor("jax", name, "jit") for name in GOOD]
    with Listening(fake_starter) as pool:
        CellRun(CELL, competitors, pool, PRESET).run()
    size = len(competitors) + 1
    # The rehearsal: each once, in order, and the control has none of its own.
    rehearsal, asked = asked[: size - 1], asked[size - 1 :]
    assert [handle for _, handle in rehearsal] == [str(k) for k in range(size - 1)]
    rounds = [asked[k : k + 2 * size] for k in range(0, len(asked), 2 * size)]
    assert len(rounds) == 3
    assert all(order[:size] == order[size:][::-1] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_who_was_sized_while_the_host_was_slow_is_sized_again_before_the_first_round(measure):
    outcome, found = measure(STALLED)
    stalled = found["torch", STALLED]
    # Sized by one slow call, rehearsed by one of 0.2 ms, and sized again by as much as fills a block.
    assert (stalled.calls_per_block, stalled.warm_up) == (10, [0.02, 2e-4, 0.02])
    assert stalled.blocks == [pytest.approx(2e-3)] * 6
    for entry in outcome.entries:
        if entry is not stalled:
            assert entry.calls_per_block == 10
            assert len(entry.warm_up) == (0 if entry.control else 2)


def test_a_call_that_fills_a_block_many_times_needs_no_rehearsal():
    def never(*arguments):
        raise AssertionError("nothing to find out")

    long = Entry(Competitor("torch", "loop", "eager"), "0", calls_per_block=1, warm_up=[0.2, 0.21])
    rehearse(long, never, never, 0.003)
    assert long.warm_up == [0.2, 0.21]


def test_a_competitor_that_ends_in_its_rehearsal_is_not_sized_again():
    def never(*arguments):
        raise AssertionError("it is gone")

    gone = Entry(Competitor("torch", "loop", "eager"), "0", calls_per_block=1, warm_up=[0.004])
    rehearse(gone, lambda entry, verify: None, never, 0.003)
    assert gone.warm_up == [0.004]
