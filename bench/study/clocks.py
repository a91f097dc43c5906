"""Compare the clocks of a cell: the times of a record against everything else that timed its calls.

A call is timed in blocks, alone before the first round and again after the last, in other processes, and by the device.
A change of one of these figures leaves the others behind. Two figures of one call differ with the moment, by up to
three times on a shared machine; a misplaced decimal point makes it ten. Where the blocks of a cell differ as much among
themselves, the machine was too busy for such a comparison, and only what does not depend on the moment is compared.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median

from bench.records import SAMPLES, Record

# Clocks further apart than this are nearer to a misplaced decimal point than to each other.
DECIMAL_POINT = math.sqrt(10)
# Written in whole seconds by earlier versions.
_TIMESTAMP_S = 1.0
# Durations beside the samples that are differences of two readings of a clock.
_READ = ("compile_s", "compile_warm_s")
# A reading is a number of seconds since the machine was started: its last bits are worth more than those of a
# duration of milliseconds, whose own last bits are therefore zero. Within this many doublings of the machine's age a
# cell begins and ends.
_AGE_DOUBLINGS = 8
# The last bits of a clock that has run for a second, and for four years; coarser durations are round numbers that no
# clock has told.
_FINEST, _COARSEST = -52, -25
# So many zero bits chance gives once in a billion.
_PROOF_BITS = 30


@dataclass(frozen=True)
class Timing:
    """One record, and figures of its samples, so that these need not stay in memory."""

    where: str  # file and line
    record: Record  # without its samples
    # Least and most seconds of the single calls that were waited for after the rounds, or None.
    waited_s: tuple[float, float] | None
    parts_s: float  # seconds of all that was timed for it
    blocks_s: tuple[float, float] | None  # its shortest and its longest timed block; None without blocks
    warm_up_s: tuple[float, float] | None  # its shortest and its longest block before the rounds; None without them
    shortest_s: float | None  # its shortest block, warm-up included; None without blocks
    scatter: float | None  # its longest timed block over its shortest; None without blocks
    # Field to the last bits of its durations: the exponent of the last one that is set in any of them, and how many
    # behind it could have been set, in all of them.
    bits: Mapping[str, tuple[int, int]]


def timing(where: str, record: Record) -> Timing:
    """Sum up one record.

    Args:
        where: file and line.
        record: with its samples.
    """
    durations = {name: values for name in SAMPLES if (values := getattr(record, name))}
    # The control's other figures are copies of the baseline's.
    durations |= {name: (value,) for name in _READ if (value := getattr(record, name)) and not record.control}
    waited, blocks, warm_up = record.synchronised_latency_s, record.block_latency_s, record.warm_up_block_latency_s
    return Timing(
        where=where,
        record=record.without_samples(),
        waited_s=(min(waited), max(waited)) if waited else None,
        parts_s=sum(map(sum, durations.values())),
        blocks_s=(min(blocks), max(blocks)) if blocks else None,
        warm_up_s=(min(warm_up), max(warm_up)) if warm_up else None,
        shortest_s=min((*blocks, *warm_up)) if blocks else None,
        scatter=max(blocks) / min(blocks) if blocks else None,
        bits={name: _last_bits(values) for name, values in durations.items()},
    )


def _last_bits(durations: Sequence[float]) -> tuple[int, int]:
    # The denominator of a float is a power of two: that of its last bit.
    last = min(1 - seconds.as_integer_ratio()[1].bit_length() for seconds in durations)
    return last, sum(max(0, last - (math.frexp(seconds)[1] - 53)) for seconds in durations)


def clock_bits(timings: Iterable[Timing]) -> int | None:
    """Find the last bit of the clock that the times of a cell were read from.

    Returns:
        Its exponent, or None where no list of times has the bits of a clock.
    """
    found = [bits for timed in timings for name, bits in timed.bits.items() if name not in _READ]
    # Alone, one of these proves too little.
    singles = [bits for timed in timings for name, bits in timed.bits.items() if name in _READ]
    if singles:
        found.append((min(last for last, _ in singles), sum(zeros for _, zeros in singles)))
    return min((last for last, zeros in found if zeros >= _PROOF_BITS and last <= _COARSEST), default=None)


def disagreements(timings: Sequence[Timing], *, read: bool = False) -> Iterator[str]:
    """Find the records of one cell and environment whose clocks cannot all be right, each with its place.

    Args:
        timings: of all process replicates.
        read: whether other times of the file are known to be read from a clock.
    """
    processes: dict[int, list[Timing]] = defaultdict(list)
    competitors: dict[tuple[str, bool], list[Timing]] = defaultdict(list)
    for found in timings:
        processes[found.record.process_replicate].append(found)
        competitors[found.record.label, found.record.control].append(found)
    quiet = _quiet(timings)
    for group in processes.values():
        yield from _elapsed(group)
        yield from _control(group, quiet=quiet)
        yield from _changed_bits(group, read=read)
        yield from _sizes(group) if quiet else ()
        yield from _warm_up(group, quiet=quiet)
    for (label, control), group in competitors.items():
        # The control runs its baseline's call, which alone is timed otherwise.
        others = competitors.get((label, False), group) if control else group
        yield from _calls([found for found in group if found.record.status == "ok"], others) if quiet else ()


def _quiet(timings: Iterable[Timing]) -> bool:
    """Tell whether the blocks of the usual competitor lie within a misplaced decimal point, in each process."""
    scatters: dict[int, list[float]] = defaultdict(list)
    for found in timings:
        if found.scatter is not None:
            scatters[found.record.process_replicate].append(found.scatter)
    return all(median(group) <= DECIMAL_POINT for group in scatters.values())


def _sizes(group: Sequence[Timing]) -> Iterator[str]:
    """Find blocks with too many calls: a block is sized for twice its length, and a call that fills it stays alone."""
    for found in group:
        calls, intended = found.record.calls_per_block, found.record.block_s
        if intended is None or found.shortest_s is None or calls is None or calls == 1:
            continue
        if found.shortest_s > 2 * DECIMAL_POINT * intended:
            yield (
                f"{found.where}: calls_per_block: blocks of {calls} calls last at least {found.shortest_s:.3g} s, and "
                f"fewer calls would have filled the {intended:.3g} s that a block is sized for"
            )


def _warm_up(group: Sequence[Timing], *, quiet: bool) -> Iterator[str]:
    """A call in a block takes what the device is busy with it; the block that told the size filled its time."""
    for found in group:
        busy, latency = found.record.device_busy_s, found.record.latency_s
        if busy is not None and latency is not None and busy > DECIMAL_POINT * latency:
            yield (
                f"{found.where}: latency_s: {latency:.3g} s a call in its blocks, and the device is busy with one for "
                f"{busy:.3g} s"
            )
        if found.warm_up_s is None:
            continue
        intended, (least, most) = found.record.block_s, found.warm_up_s
        if intended is not None and most < intended:
            yield (
                f"{found.where}: warm_up_block_latency_s: no block lasted the {intended:.3g} s that a block is sized "
                f"for, the longest {most:.3g} s; the size was found by one that did"
            )
        if quiet and found.blocks_s is not None:
            low, high = found.blocks_s
            if high * DECIMAL_POINT < least or low > most * DECIMAL_POINT:
                yield (
                    f"{found.where}: block_latency_s: blocks of {low:.3g} to {high:.3g} s in the rounds, and of "
                    f"{least:.3g} to {most:.3g} s before them, with the same calls in each"
                )


def _elapsed(group: Sequence[Timing]) -> Iterator[str]:
    """Find more timed seconds than a cell took: one process at a time runs."""
    record = group[0].record
    parts = sum(found.parts_s for found in group)
    if record.finished_at is None or not (is_timestamp(record.started_at) and is_timestamp(record.finished_at)):
        return
    took = (datetime.fromisoformat(record.finished_at) - datetime.fromisoformat(record.started_at)).total_seconds()
    if took < 0:
        yield f"{group[0].where}: finished_at: {record.finished_at} is before started_at, {record.started_at}"
    elif parts > took + _TIMESTAMP_S:
        yield (
            f"{group[0].where}: cell {record.cell}, process {record.process_replicate}: {parts:.3g} s were timed from "
            f"started_at to finished_at, which lie {took:.3g} s apart"
        )


def is_timestamp(text: str) -> bool:
    """Tell whether a text is a moment in ISO 8601, in UTC."""
    try:
        offset = datetime.fromisoformat(text).utcoffset()
    except ValueError:
        return False
    return offset is not None and not offset


def _control(group: Sequence[Timing], *, quiet: bool) -> Iterator[str]:
    """Compare the control with the baseline, whose call it runs in blocks of the same size."""
    timed = [found for found in group if found.record.status == "ok" and found.record.baseline]
    baseline = next((found.record for found in timed if not found.record.control), None)
    for found in timed:
        control = found.record
        if not control.control or baseline is None:
            continue
        if control.calls_per_block != baseline.calls_per_block:
            yield (
                f"{found.where}: calls_per_block: the control has {control.calls_per_block}, and its baseline, whose "
                f"call it runs, {baseline.calls_per_block}"
            )
        elif quiet and _apart(control.latency_s, baseline.latency_s):
            yield (
                f"{found.where}: latency_s: the control takes {control.latency_s:.3g} s, and its baseline, whose call "
                f"it runs, {baseline.latency_s:.3g} s"
            )


def _apart(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and not a / DECIMAL_POINT <= b <= a * DECIMAL_POINT


def _changed_bits(group: Sequence[Timing], *, read: bool) -> Iterator[str]:
    """Find durations with other bits than those of the machine's clock, as those divided by ten have."""
    clock = clock_bits(group)
    if clock is None and not read:
        return
    finest = _FINEST if clock is None else max(_FINEST, clock - _AGE_DOUBLINGS)
    for found in group:
        for name, (last, _) in found.bits.items():
            if last < finest:
                yield (
                    f"{found.where}: {name}: has finer bits than the clock that other times were read from; it was "
                    "changed or rounded"
                )


def _calls(group: Sequence[Timing], others: Iterable[Timing]) -> Iterator[str]:
    """Compare the latency of one competitor in each process with every other clock of its calls."""
    least, most, count = _single_calls(others)
    latencies = [found.record.latency_s or 0.0 for found in group]
    strange = 0
    for k, found in enumerate(group):
        rest = latencies[:k] + latencies[k + 1 :]
        elsewhere = [median(rest)] if rest else []
        # The first calls alone, which a disturbance may have slowed down, prove nothing.
        if not elsewhere and not count:
            continue
        low, high = min([*elsewhere, *least]), max([*elsewhere, *most])
        if not low / DECIMAL_POINT <= latencies[k] <= high * DECIMAL_POINT:
            strange += 1
            yield (
                f"{found.where}: latency_s: {found.record.label} takes {latencies[k]:.3g} s a call in its blocks, and "
                f"{low:.3g} to {high:.3g} s by every other clock of the cell"
            )
    # What was changed alike in all processes.
    middle = median(latencies) if latencies else 0.0
    if not strange and len(least) > 1 and len(group) > 1 and middle * DECIMAL_POINT < min(least):
        yield (
            f"{group[0].where}: latency_s: {group[0].record.label} takes {middle:.3g} s a call in the blocks of "
            f"{len(group)} processes, and at least {min(least):.3g} s where its calls were timed one by one"
        )


def _single_calls(timings: Iterable[Timing]) -> tuple[list[float], list[float], int]:
    """Bound a call's time by clocks that know nothing of blocks.

    A GPU works through a queue, in which a call may be much shorter than one that is waited for: there it takes at
    least as long as its host or the device is busy with it.

    Returns:
        Least figures, most figures, and how many of the least are not those of the first calls.
    """
    least, most, count = [], [], 0
    for found in timings:
        record = found.record
        if record.prepared_call_s is not None:
            least += [record.prepared_call_s] if record.device == "cpu" else []
            most.append(record.prepared_call_s)
        if found.waited_s is None:
            continue
        most.append(found.waited_s[1])
        count += 1
        queued = max(record.enqueue_s or 0.0, record.device_busy_s or 0.0)
        least.append(queued if record.device != "cpu" else found.waited_s[0])
    return least, most, count


def unchecked(timings: Sequence[Timing]) -> int:
    """Count the records with a speed of one cell whose calls nothing timed but their own blocks, or too busy a moment.

    The baseline and its control have the same calls in a block, and so know each other's.
    """
    ok = [found.record for found in timings if found.record.status == "ok" and not found.record.baseline]
    if not _quiet(timings):
        return len(ok)
    known = {found.record.label for found in timings if found.waited_s is not None}
    processes = Counter(record.label for record in ok)
    return sum(record.label not in known and processes[record.label] == 1 for record in ok)
