"""Time blocks of calls: find how many calls fill one, prepare it, run it.

The pipelined clock (many calls, one wait) is the headline. The clocks of single calls and of enqueueing run in a pass
of their own and are never mixed with it.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.measure.timer import Call
from bench.plan.presets import SHORT_BLOCK

# Other competitors ran since the last block, and left their data in the caches: calls of about this time come first.
_REFILL_S = 0.001
# Only a call of this length does not notice what refilling costs, and goes without.
_LONG_CALL_S = 0.03
# Threads of torch's OpenMP pool spin for some milliseconds after its last product, and XLA's for one: on two cores they
# take a quarter of the speed of another process at that time. Measured: after 2 ms and a refill, or
# after 6 ms without one, a block is as fast as the next one. Longer pauses cost both sides the same.
_PAUSE_S, _PAUSE_BEFORE_LONG_S = 0.002, 0.006
# More looks at a block that lasts this many times its target would only cost time: few disturbances are that long.
_BEYOND_DOUBT = 30
# Before the further looks at a block that seems to fill its time. Of 778 records of `seed`, accepted by two looks at
# once, three had far too short blocks; in two of them all looks within some ten milliseconds were alike 25 times slow.
_BEFORE_LOOKS_S = (0.0, 0.01)
_STEADY = 0.02  # warm-up ends when a block is no longer faster than the one before by more than the equivalence margin
_SIZINGS = 3  # how often the size is looked for, where a block of it turns out to last less than half of its time


@dataclass(frozen=True)
class BlockSize:
    """The number of calls of a block, and of the untimed calls before it."""

    calls: int
    refill: int


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Collect no garbage meanwhile."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def time_calls(call: Call, wait: Callable[[Any], None], calls: int) -> tuple[float, Any]:
    """Return the seconds until the last result is there, and that result; no garbage is collected meanwhile."""
    result = None
    with garbage_kept():
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        return time.perf_counter() - start, result


def time_block(
    call: Call, wait: Callable[[Any], None], size: BlockSize, *, after_other: bool = False
) -> tuple[float, Any]:
    """Time one block after its refill; return seconds, and the result of the last call.

    After another framework's process computed on the same processors, its threads are given time to stop spinning.
    """
    if after_other:
        time.sleep(_PAUSE_S if size.refill else _PAUSE_BEFORE_LONG_S)
    if size.refill:
        time_calls(call, wait, size.refill)
    return time_calls(call, wait, size.calls)


def find_size(call: Call, wait: Callable[[Any], None], block_s: float) -> tuple[BlockSize, float]:
    """Find how many calls fill a block; return the size, and the seconds that such a block took.

    A size is accepted by the shortest of three blocks, the last after a pause: a process that stops or slows for some
    milliseconds would otherwise leave blocks that are far too short.
    """
    size = BlockSize(1, 1)
    while True:
        elapsed = time_block(call, wait, size)[0]
        for pause in _BEFORE_LOOKS_S:
            if not block_s <= elapsed < _BEYOND_DOUBT * block_s:
                break
            time.sleep(pause)
            elapsed = min(elapsed, time_block(call, wait, size)[0])
        calls = size.calls
        if elapsed >= block_s:
            long = calls == 1 and elapsed >= _LONG_CALL_S
            return BlockSize(calls, 0 if long else math.ceil(calls * min(1.0, _REFILL_S / elapsed))), elapsed
        # A little more than the target, so that a slightly faster block still reaches it; never ten times at once.
        calls = max(calls + 1, int(calls * min(10.0, 1.15 * block_s / elapsed)))
        size = BlockSize(calls, max(1, calls // 10))


def warm_up(call: Call, wait: Callable[[Any], None], block_s: float, max_blocks: int) -> tuple[BlockSize, list[float]]:
    """Find how many calls fill a block, then run blocks until they no longer get faster; return size and seconds."""
    sizings = 0
    while True:
        size, elapsed = find_size(call, wait, block_s)
        blocks = [elapsed]
        while len(blocks) < max_blocks:
            blocks.append(time_block(call, wait, size)[0])
            if blocks[-1] > blocks[-2] * (1 - _STEADY):
                break
        sizings += 1
        # Otherwise stalls, or first calls that were slow, passed for the length of a call.
        if not too_short(min(blocks), block_s) or sizings == _SIZINGS:
            return size, blocks


def too_short(elapsed: float, block_s: float) -> bool:
    """Return True if a block lasted less than half of the time that it was sized for."""
    return elapsed < SHORT_BLOCK * block_s


def could_be_short(warm_up_blocks: Sequence[float], block_s: float) -> bool:
    """Return True if a size may be wrong: one call that lasts many times the length of a block fills it in any case."""
    return min(warm_up_blocks, default=math.inf) < _BEYOND_DOUBT * block_s


# JAX lets 32 executions fly and then blocks: fewer calls are enqueued, so that only enqueueing is timed.
_ENQUEUED_CALLS = 16
_MOST_SERIES = 5
_MOST_SINGLE_CALLS, _FEWEST_SINGLE_CALLS = 20, 3
_CEILING_CALLS = 5

Wait = Callable[[Any], None]


@dataclass(frozen=True)
class SingleCalls:
    """Single calls on the host's clock."""

    synchronised_latency_s: tuple[float, ...]  # durations of single calls, each waited for, raw and in order
    # Median seconds until a call returned, with at most 16 calls under way; the least of several such series, since the
    # first calls after an idle time take longer
    enqueue_s: float


def measure_single_calls(call: Call, wait: Wait, *, budget_s: float) -> SingleCalls:
    """Time single calls, as many as fit into the budget but at least three, and then the enqueueing of some more."""
    wait(call())
    durations: list[float] = []
    while len(durations) < _FEWEST_SINGLE_CALLS or (len(durations) < _MOST_SINGLE_CALLS and sum(durations) < budget_s):
        start = time.perf_counter()
        wait(call())
        durations.append(time.perf_counter() - start)
    count = max(2, min(_ENQUEUED_CALLS, int(budget_s / max(min(durations), 1e-9))))
    medians: list[float] = []
    begun = time.perf_counter()
    with garbage_kept():
        while not medians or (len(medians) < _MOST_SERIES and time.perf_counter() - begun < budget_s):
            medians.append(_enqueueing(call, wait, count))
    return SingleCalls(tuple(durations), min(medians))


def _enqueueing(call: Call, wait: Wait, count: int) -> float:
    """Return the median seconds until one of some calls returned."""
    enqueued, result = [], None
    for _ in range(count):
        start = time.perf_counter()
        result = call()
        enqueued.append(time.perf_counter() - start)
    wait(result)
    return median(enqueued)


def run_for(call: Call, wait: Wait, *, seconds: float, calls_at_a_time: int) -> int:
    """Run calls for at least so many seconds, some at a time before one is waited for; return how many there were."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        result = None
        for _ in range(calls_at_a_time):
            result = call()
        wait(result)
        count += calls_at_a_time
    return count


def shortest_call_s(call: Call, wait: Wait) -> float:
    """Return the shortest of a few calls: a ceiling is the most that the device can do."""
    wait(call())
    durations = []
    for _ in range(_CEILING_CALLS):
        start = time.perf_counter()
        wait(call())
        durations.append(time.perf_counter() - start)
    return min(durations)
