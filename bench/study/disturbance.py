"""When a cell was disturbed: a rule on what its records hold of the machine.

A window is some half a second of rounds. It was disturbed if other processes took more of the processors than daemons
do, if the hypervisor took some of them away, or if a fixed loop took far longer than it can. A ratio uses the middle
three fifths of the rounds, so that one window in five may be disturbed; beyond that the cell has no verdict.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from bench.records import Record

DISTURBED = "DISTURBED"
WINDOW_S = 0.5
# In processors: what daemons take; a twentieth of a large machine, whose idle processors they run on.
_OTHERS, _OTHERS_OF_ALL = 0.15, 0.05
_STEAL_OF_ALL = 0.05
# Clocks that rise and fall stretch the loop by less.
_STRETCH = 2.0
# Of the rounds, the slowest fifth is no part of a ratio.
_TOLERATED = 0.2


def disturbed_window(window: Mapping[str, Any], cpus: int) -> bool:
    """Say whether others used the machine during a window.

    Args:
        window: `other_cpus` and `steal_cpus` in processors, `stretch` as a factor or None.
        cpus: the number of processors that the workers may use.
    """
    stretch = window.get("stretch")
    return (
        window["other_cpus"] > max(_OTHERS, _OTHERS_OF_ALL * cpus)
        or window["steal_cpus"] > _STEAL_OF_ALL * cpus
        or (stretch is not None and stretch > _STRETCH)
    )


def taken_by_others(found: Mapping[str, Any], cpus: int) -> str:
    """Return what others took, in words."""
    said = f"other processes take {found['other_cpus']:.2f} of {cpus} processors"
    return said + (f" and the hypervisor {found['steal_cpus']:.2f}" if found["steal_cpus"] >= 0.005 else "")


def is_disturbed(records: Iterable[Record]) -> bool:
    """Say whether a cell was disturbed, all its processes together; records that do not tell count as quiet."""
    by_process = {record.process_replicate: record.disturbance for record in records if record.disturbance}
    windows = sum(found["windows"] for found in by_process.values())
    return sum(found["disturbed_windows"] for found in by_process.values()) > _TOLERATED * windows


def disturbance_line(records: Iterable[Record]) -> str | None:
    """Return how disturbed a cell was, in one sentence; None where its records do not tell."""
    records = list(records)
    by_process = {record.process_replicate: record.disturbance for record in records if record.disturbance}
    if not by_process:
        return None
    found = list(by_process.values())
    worst = max(found, key=lambda one: one["disturbed_windows"] / max(1, one["windows"]))
    windows, hit = sum(one["windows"] for one in found), sum(one["disturbed_windows"] for one in found)
    waiting = ", ".join(f"{name} {share:.2f}" for name, share in worst["waiting"].items())
    load = "not known" if worst["load"] is None else f"{worst['load']:.2f}"
    put_off = "not known" if worst["put_off_per_s"] is None else f"{worst['put_off_per_s']:.0f}"
    said = (
        f"Machine: {taken_by_others(worst, worst['cpus'])} (at most {worst['other_cpus_most']:.2f}), load {load}; "
        f"seconds in which threads waited for a processor, in each second: {waiting or 'not known'}; "
        f"involuntary context switches in each second: {put_off}; "
        f"a fixed loop took {worst['stretch'] or 1:.2f} times its shortest; {hit} of {windows} windows disturbed"
    )
    return said + (": no verdict." if is_disturbed(records) else ".")
