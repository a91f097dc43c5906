"""Measure how far a cell is disturbed: the share of the processors that others take, and the speed of a fixed loop.

A busy machine disturbs the frameworks unevenly, since their thread pools spin, wait and wake differently, and no
statistic on the samples can see a factor that all rows of one framework share. Measured are

- the processor time of other processes and of the hypervisor (steal): the system's account of the processors that the
  workers may use, less that of the workers and of this process;
- the time that threads of each worker were ready and did not run, and the times that they lost their processor, to
  other processes or to thread pools that spin;
- the time of a fixed loop on those processors before a round and in its middle, over the shortest ever seen there.

The figures go into the records; `bench.study.cells` says what they mean. Read from Linux's /proc; elsewhere
nothing is reported.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.study.cells import WINDOW_S, disturbed_window, taken_by_others

_PROC = Path("/proc")
_LOOP_DATA = bytes(2**17)
_LOOP_REPEATS = 4
_FIRST_LOOPS = 20
# More processors than this are sampled in turn: a round shall not wait for all of a large machine.
_MOST_LOOPS = 4
# The last of the workers may spin for some milliseconds after a block.
_SETTLE_S = 0.005
WAIT_S = 60.0
WHEN_BUSY: tuple[str, ...] = ("warn", "wait", "refuse")


class BusyError(RuntimeError):
    """A machine that is too busy to be measured, where that was to be refused."""


@dataclass(frozen=True)
class _Process:
    """The account of a process's threads since they started."""

    ran_s: float
    waited_s: float
    put_off: int


@dataclass(frozen=True)
class Usage:
    """A moment in the system's accounts."""

    at_s: float  # monotonic clock
    busy_s: float  # of all the processors together, spent on processes
    steal_s: float  # of all the processors together, taken by the hypervisor
    own: Mapping[str, _Process]  # name to the process's account; this process has the empty name


def _processor_seconds(cpus: Sequence[int]) -> tuple[float, float] | None:
    """Return seconds spent on processes and taken by the hypervisor since the start; None where unknown."""
    try:
        lines = (_PROC / "stat").read_text().splitlines()
    except OSError:
        return None
    wanted, busy, steal, found = {f"cpu{cpu}" for cpu in cpus}, 0, 0, 0
    for line in lines:
        name, *ticks = line.split()
        if name in wanted and len(ticks) >= 8:
            user, nice, system, _, _, irq, softirq, stolen = map(int, ticks[:8])
            busy, steal, found = busy + user + nice + system + irq + softirq, steal + stolen, found + 1
    hertz = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    return (busy / hertz, steal / hertz) if found else None


def _process(pid: int) -> _Process:
    """Return the account of a process's threads; nothing of one that has ended."""
    ran, waited, put_off = 0, 0, 0
    try:
        for thread in os.scandir(_PROC / str(pid) / "task"):
            try:
                times = Path(thread.path, "schedstat").read_text().split()
                status = Path(thread.path, "status").read_text()
            except OSError:
                continue
            ran, waited = ran + int(times[0]), waited + int(times[1])
            put_off += int(status.rpartition("nonvoluntary_ctxt_switches:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return _Process(0.0, 0.0, 0)
    return _Process(ran / 1e9, waited / 1e9, put_off)


def usage(pids: Mapping[str, int], cpus: Sequence[int]) -> Usage | None:
    """Read the accounts; None where the system has none."""
    taken = _processor_seconds(cpus)
    if taken is None:
        return None
    own = {name: _process(pid) for name, pid in pids.items()} | {"": _process(os.getpid())}
    return Usage(time.monotonic(), *taken, own)


def _between(before: Usage, after: Usage) -> dict[str, Any]:
    """Return the difference of two moments; shares are numbers of processors."""
    seconds = max(after.at_s - before.at_s, 1e-9)
    nothing = _Process(0.0, 0.0, 0)
    # A worker that was replaced has an account that begins anew.
    spent = {
        name: _Process(
            max(0.0, now.ran_s - before.own.get(name, nothing).ran_s),
            max(0.0, now.waited_s - before.own.get(name, nothing).waited_s),
            max(0, now.put_off - before.own.get(name, nothing).put_off),
        )
        for name, now in after.own.items()
    }
    others = after.busy_s - before.busy_s - sum(one.ran_s for one in spent.values())
    return {
        "seconds": seconds,
        "other_cpus": max(0.0, others) / seconds,
        "steal_cpus": max(0.0, after.steal_s - before.steal_s) / seconds,
        "waiting": {name: one.waited_s / seconds for name, one in spent.items() if name},
        "put_off_per_s": sum(one.put_off for name, one in spent.items() if name) / seconds,
    }


# Processor to the shortest time that the loop took there, in this process.
_SHORTEST: dict[int, float] = {}


def _loop_s() -> float:
    start = time.perf_counter()
    for _ in range(_LOOP_REPEATS):
        hashlib.blake2b(_LOOP_DATA).digest()
    return time.perf_counter() - start


def stretch(cpus: Sequence[int], turn: int = 0) -> float | None:
    """Return how many times as long as the shortest a fixed loop takes on the processors, the worst of them.

    A call asks a few processors at most; `turn` decides which.
    """
    if not cpus or not hasattr(os, "sched_setaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    asked = [cpus[(turn * _MOST_LOOPS + k) % len(cpus)] for k in range(min(len(cpus), _MOST_LOOPS))]
    worst = 1.0
    try:
        for cpu in asked:
            os.sched_setaffinity(0, {cpu})
            if cpu not in _SHORTEST:
                _SHORTEST[cpu] = min(_loop_s() for _ in range(_FIRST_LOOPS))
            took = _loop_s()
            _SHORTEST[cpu] = min(_SHORTEST[cpu], took)
            worst = max(worst, took / _SHORTEST[cpu])
    except OSError:
        return None
    finally:
        os.sched_setaffinity(0, allowed)
    return worst


class Watch:
    """Watches processors during the rounds of one cell, less the use of our own processes; of none it tells nothing."""

    def __init__(self, pids: Callable[[], Mapping[str, int]], cpus: Sequence[int]):
        self._pids, self._cpus = pids, tuple(cpus)
        self._windows: list[dict[str, Any]] = []
        self._stretches: list[float] = []
        self._rounds = 0
        self._since: Usage | None = None
        self._load: float | None = None

    def round_begins(self) -> None:
        """Note the beginning of a round; the first one opens the first window."""
        self._calibrate()
        if self._since is None:
            self._since = usage(self._pids(), self._cpus)
            self._load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def round_turns(self) -> None:
        """Note the middle of a round, between an order and its reverse."""
        self._calibrate()

    def round_ends(self, *, last: bool) -> None:
        """Note the end of a round; closes the window that is long enough, or the last one."""
        self._rounds += 1
        before = self._since
        if before is None or not (last or time.monotonic() - before.at_s >= WINDOW_S):
            return
        after = usage(self._pids(), self._cpus)
        # What is left at the end is too short for a window of its own, unless it is the only one.
        if after is not None and (after.at_s - before.at_s >= WINDOW_S or not self._windows):
            self._windows.append(
                _between(before, after) | {"stretch": max(self._stretches, default=None), "rounds": self._rounds}
            )
        self._since, self._stretches, self._rounds = after, [], 0

    def _calibrate(self) -> None:
        if not self._cpus:
            return
        time.sleep(_SETTLE_S)
        found = stretch(self._cpus, len(self._stretches))
        if found is not None:
            self._stretches.append(found)

    def summary(self) -> dict[str, Any]:
        """Return the summary for a record; empty where the system reports nothing or no round was run."""
        if not self._windows:
            return {}
        windows, cpus = self._windows, len(self._cpus)

        def middle(name: str) -> float | None:
            known = [window[name] for window in windows if window[name] is not None]
            return round(median(known), 4) if known else None

        names = sorted({name for window in windows for name in window["waiting"]})
        return {
            "cpus": cpus,
            "load": None if self._load is None else round(self._load, 2),
            "windows": len(windows),
            "disturbed_windows": sum(disturbed_window(window, cpus) for window in windows),
            "other_cpus": middle("other_cpus"),
            "other_cpus_most": round(max(window["other_cpus"] for window in windows), 4),
            "steal_cpus": middle("steal_cpus"),
            "steal_cpus_most": round(max(window["steal_cpus"] for window in windows), 4),
            "put_off_per_s": middle("put_off_per_s"),
            "stretch": middle("stretch"),
            "waiting": {
                name: round(median(window["waiting"].get(name, 0.0) for window in windows), 4) for name in names
            },
        }

    def windows(self) -> tuple[dict[str, Any], ...]:
        """Return the windows in order, rounded to what their reading allows."""
        return tuple(
            {
                name: {key: round(part, 4) for key, part in value.items()}
                if isinstance(value, Mapping)
                else value
                if value is None
                else round(value, 4)
                for name, value in window.items()
            }
            for window in self._windows
        )


@dataclass
class Gate:
    """Looks at the machine before a cell, and waits or refuses where that was asked for.

    Args:
        when_busy: `warn` goes on, `wait` waits for at most a minute, `refuse` raises.
        cpus: the processors that the workers may use.
    """

    when_busy: str
    cpus: Sequence[int]
    waited_s: float = field(default=0.0, init=False)

    def pass_when_quiet(self, pids: Callable[[], Mapping[str, int]], report: Callable[[str], None]) -> None:
        """Return when the machine is quiet, or when waiting is over.

        Raises:
            BusyError: if it is busy and that is to be refused.
        """
        if self.when_busy == "warn":
            return
        started = time.monotonic()
        while (said := self._busy(pids)) is not None:
            if self.when_busy == "refuse":
                # Looked at twice, since whatever ended just before may have been our own.
                if (again := self._busy(pids)) is None:
                    return
                raise BusyError(
                    f"--when-busy refuse: {again}; wait until it is quiet, or choose --when-busy wait or warn."
                )
            waited = time.monotonic() - started
            if waited >= WAIT_S:
                break
            report(f"waiting for a quiet machine, at most {WAIT_S - waited:.0f} s more: {said}")
        self.waited_s += time.monotonic() - started

    def _busy(self, pids: Callable[[], Mapping[str, int]]) -> str | None:
        before = usage(pids(), self.cpus)
        if before is None:
            return None
        time.sleep(WINDOW_S)
        after = usage(pids(), self.cpus)
        if after is None:
            return None
        window = _between(before, after) | {"stretch": None}
        return taken_by_others(window, len(self.cpus)) if disturbed_window(window, len(self.cpus)) else None
