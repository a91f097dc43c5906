"""The size of a block, on an invented clock."""

import gc

import pytest

from bench.measure.blocks import BlockSize, find_size, measure_single_calls, time_block, warm_up


class Machine:
    """A clock that a call moves on by its duration; `stalls` maps the number of a call to further seconds."""

    def __init__(self, monkeypatch, call_s, stalls=None):
        self.now, self.calls, self.slept = 0.0, 0, []
        self._call_s, self._stalls = call_s, stalls or {}
        monkeypatch.setattr("bench.measure.blocks.time.perf_counter", lambda: self.now)
        monkeypatch.setattr("bench.measure.blocks.time.sleep", self.slept.append)

    def call(self):
        self.calls += 1
        self.now += self._call_s + self._stalls.get(self.calls, 0.0)
        return self.calls

    def wait(self, result):
        pass


@pytest.mark.parametrize(
    ("call_s", "calls", "refill"),
    [(20e-6, range(150, 174), range(45, 60)), (1.2e-3, range(3, 5), range(1, 2)), (0.01, [1], [1]), (0.05, [1], [0])],
)
def test_a_block_lasts_its_time_and_is_preceded_by_a_millisecond_of_calls(monkeypatch, call_s, calls, refill):
    machine = Machine(monkeypatch, call_s)
    size, elapsed = find_size(machine.call, machine.wait, 0.003)
    assert elapsed >= 0.003
    assert elapsed == pytest.approx(size.calls * call_s)
    assert size.calls in calls
    assert size.refill in refill


def test_one_stall_does_not_make_a_block_short(monkeypatch):
    for stalled in range(1, 40):
        machine = Machine(monkeypatch, 20e-6, {stalled: 0.02})
        size, elapsed = find_size(machine.call, machine.wait, 0.003)
        assert size.calls >= 150, stalled
        assert elapsed < 0.01


def test_stalls_in_a_row_do_not_make_a_block_short(monkeypatch):
    for first in range(1, 30):
        for distance in (1, 2, 5):
            stalls = {first + k * distance: 0.02 for k in range(3)}
            machine = Machine(monkeypatch, 20e-6, stalls)
            size, blocks = warm_up(machine.call, machine.wait, 0.003, 3)
            assert size.calls >= 150, (first, distance)
            assert min(blocks) < 0.01


def test_calls_that_are_slow_until_the_processors_are_free_do_not_make_a_block_short(monkeypatch):
    class Contended(Machine):
        def call(self):
            self.now += 0.0 if 0.01 in self.slept else 0.00063
            return super().call()

    machine = Contended(monkeypatch, 20e-6)
    size, elapsed = find_size(machine.call, machine.wait, 0.003)
    assert size.calls >= 150
    assert elapsed == pytest.approx(size.calls * 20e-6)


def test_a_first_call_that_is_slow_beyond_doubt_does_not_make_a_block_short(monkeypatch):
    machine = Machine(monkeypatch, 20e-6, {1: 0.4, 2: 0.2})
    size, blocks = warm_up(machine.call, machine.wait, 0.003, 3)
    assert size.calls >= 150
    assert blocks == pytest.approx([size.calls * 20e-6] * 2)


def test_warm_up_goes_on_while_blocks_get_faster(monkeypatch):
    # The refill, the block that tells the size, and then one call for each refill and block.
    machine = Machine(monkeypatch, 0.004, {k: 0.01 / k for k in range(1, 40)})
    assert len(warm_up(machine.call, machine.wait, 0.003, 3)[1]) == 3
    assert len(warm_up(Machine(monkeypatch, 0.004).call, machine.wait, 0.003, 3)[1]) == 2


def test_a_long_call_is_not_repeated_to_find_its_size(monkeypatch):
    machine = Machine(monkeypatch, 2.0)
    assert find_size(machine.call, machine.wait, 0.003) == (BlockSize(1, 0), 2.0)
    # One to refill before it was known to be long, and one that was timed.
    assert machine.calls == 2


def test_a_block_waits_for_the_threads_of_the_other_framework(monkeypatch):
    machine = Machine(monkeypatch, 0.001)
    assert time_block(machine.call, machine.wait, BlockSize(3, 1)) == (pytest.approx(0.003), 4)
    assert machine.slept == []
    time_block(machine.call, machine.wait, BlockSize(3, 1), after_other=True)
    time_block(machine.call, machine.wait, BlockSize(1, 0), after_other=True)
    # What no refill precedes waits longer.
    assert len(machine.slept) == 2
    assert 0 < machine.slept[0] < machine.slept[1]


def test_what_it_costs_to_enqueue_is_that_of_a_host_that_is_awake(monkeypatch):
    """A synthetic clock: calls of the first series after an idle time take 60 us, later ones 30."""
    now, calls, most, under_way = 0.0, 0, 0, 0

    def call():
        nonlocal now, calls, most, under_way
        calls, under_way = calls + 1, under_way + 1
        most = max(most, under_way)
        assert not gc.isenabled() or calls <= 21
        now += 60e-6 if calls <= 21 + 16 else 30e-6

    def wait(result):
        nonlocal under_way
        under_way = 0

    monkeypatch.setattr("bench.measure.blocks.time.perf_counter", lambda: now)
    found = measure_single_calls(call, wait, budget_s=0.01)
    assert found.enqueue_s == pytest.approx(30e-6)
    assert (len(found.synchronised_latency_s), most, calls) == (20, 16, 21 + 5 * 16)
    assert gc.isenabled()
