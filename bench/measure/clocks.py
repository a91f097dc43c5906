"""The clocks beside the pipelined one: single calls that are waited for, and what it costs to enqueue one.

The pipelined clock, in the workbench, is the headline: many calls and one wait. These are measured in a pass of their
own and never mixed with it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.measure.blocks import garbage_kept
from bench.measure.timer import Call

# JAX lets 32 executions fly and then blocks: fewer calls are enqueued, so that only enqueueing is timed.
_ENQUEUED_CALLS = 16
_MOST_SERIES = 5
_MOST_SINGLE_CALLS, _FEWEST_SINGLE_CALLS = 20, 3
_CEILING_CALLS = 5

Wait = Callable[[Any], None]


@dataclass(frozen=True)
class SingleCalls:
    """Single calls on the host's clock.

    Attributes:
        synchronised_latency_s: durations of single calls, each waited for, raw and in order.
        enqueue_s: median seconds until a call returned, with at most 16 calls under way; the least of several such
            series, since the first calls after an idle time take longer.
    """

    synchronised_latency_s: tuple[float, ...]
    enqueue_s: float


def measure_single_calls(call: Call, wait: Wait, *, budget_s: float) -> SingleCalls:
    """Times single calls, as many as fit into the budget but at least three, and then the enqueueing of some more.

    Args:
        call: a call that was warmed up.
        wait: returns when a result is computed.
        budget_s: seconds for each of the two.
    """
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
    """Median seconds until one of some calls returned."""
    enqueued, result = [], None
    for _ in range(count):
        start = time.perf_counter()
        result = call()
        enqueued.append(time.perf_counter() - start)
    wait(result)
    return median(enqueued)


def run_for(call: Call, wait: Wait, *, seconds: float, calls_at_a_time: int) -> int:
    """Runs calls for some time and returns how many there were.

    Args:
        call: a call that was warmed up.
        wait: returns when a result is computed.
        seconds: that must have passed before the last wait.
        calls_at_a_time: calls that are started before one is waited for.
    """
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        result = None
        for _ in range(calls_at_a_time):
            result = call()
        wait(result)
        count += calls_at_a_time
    return count


def shortest_call_s(call: Call, wait: Wait) -> float:
    """The shortest of a few calls: a ceiling is the most that the device can do."""
    wait(call())
    durations = []
    for _ in range(_CEILING_CALLS):
        start = time.perf_counter()
        wait(call())
        durations.append(time.perf_counter() - start)
    return min(durations)
