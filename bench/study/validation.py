"""Check published records, line by line and cell by cell."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.environments import StoreError, read_environments, unusable
from bench.plan.cells import CACHES, DEVICES, DIRECTIONS, DIVISIONS, RESULTS, STORAGE_DTYPES, Cell
from bench.plan.competitors import (
    COMPILED_MODES,
    EAGER,
    FRAMEWORKS,
    IMPLEMENTATION,
    MODES,
    STOCK,
    YARDSTICK,
    Competitor,
    offered_modes,
)
from bench.plan.costs import OVER_THE_CEILING, compulsory_bytes, useful_flops, useful_product_flops, waste_factor
from bench.plan.presets import STEPPED_OPTIMIZERS
from bench.plan.workloads import LAYOUTS, UnknownWorkloadError, Workload, workload
from bench.record_files import records_file, scan
from bench.records import SKIPPED, STOPS, Record, RecordError, shown
from bench.store import Archive
from bench.study.cells import short_blocks
from bench.study.clocks import Timing, clock_bits, disagreements, is_timestamp, timing, unchecked
from bench.study.ranking import rank_cells

# From strict to coarse: arithmetic that was asked for may turn out stricter, never coarser.
_STRICTNESS: tuple[str, ...] = ("fp64", "ieee_fp32", "tf32", "fp16", "bf16", "lower")
# A rate is a quotient of two measurements; a data sheet is rounded.
_RATE_SLACK = 1.01
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "framework": FRAMEWORKS,
    "device": DEVICES,
    "division": DIVISIONS,
    "precision": tuple(STORAGE_DTYPES),
    "direction": DIRECTIONS,
    "kind": (IMPLEMENTATION, STOCK, YARDSTICK),
    "mode": MODES,
    "layout": LAYOUTS,
    "cache": CACHES,
    "stopped": STOPS,
}


# The same in every record of a cell and process.
_SHARED: tuple[str, ...] = ("workload", "batch", "num_partitions", "in_features", "out_features", "direction")
_SHARED += ("precision", "layout", "device", "optimizer", "started_at", "finished_at", "stopped", "division", "cache")
_SHARED += ("seed", "cell_size", "useful_flops", "compulsory_bytes", "block_s", "ceiling_flops_per_s")
_SHARED += ("ceiling_bytes_per_s",)


@dataclass
class Count:
    """Counts of what was checked, and remarks that are no violations."""

    records: int = 0  # lines that could be read
    cells: int = 0  # cells of one process replicate each
    speeds: int = 0  # records with a speed
    unchecked: int = 0  # those of them whose calls nothing timed but their own blocks
    remarks: list[str] = field(default_factory=list)  # one sentence each, with its place


def record_violations(record: Record) -> Iterator[str]:
    """Find what contradicts itself in one record, beyond what reading it refuses."""
    unknown = [name for name, choices in _CHOICES.items() if getattr(record, name) not in choices]
    for name in unknown:
        choices = ", ".join(choice or "nothing" for choice in _CHOICES[name])
        yield f"{name}: expected one of {choices}, got {getattr(record, name)!r:.80}"
    for name in ("started_at", "finished_at"):
        moment = getattr(record, name)
        if moment is not None and not is_timestamp(moment):
            yield f"{name}: expected a moment in UTC as in ISO 8601, got {moment!r:.80}"
    yield from _status(record)
    yield from _names(record)
    if record.dtype != STORAGE_DTYPES.get(record.precision):
        yield f"dtype: {record.dtype} does not store the precision {record.precision}"
    if not unknown:
        yield from _amounts(record)
    if record.status != "ok":
        return
    expected = median(record.block_latency_s) / (record.calls_per_block or 1)
    if not math.isclose(record.latency_s or 0.0, expected, rel_tol=1e-9):
        yield f"latency_s: expected the median block over calls_per_block, {expected:.9g}, got {record.latency_s:.9g}"
    if record.bound_fraction is None or record.bound_fraction > 1:
        yield f"bound_fraction: expected at most 1 of a right answer, got {record.bound_fraction}"
    fractions = [judged.get("bound_fraction") for judged in record.parity.values()]
    if fractions and record.bound_fraction not in fractions:
        yield f"bound_fraction: expected the largest of parity, got {record.bound_fraction}"
    if not record.parity:
        yield "parity: expected the tensors that were checked, got none"
    for tensor, judged in record.parity.items():
        if judged.get("status") != "ok":
            yield f"parity: {tensor} is {judged.get('status')} although the status is ok"
    if record.inputs_digest is None:
        yield "inputs_digest: expected the hash of the inputs, got none"
    yield from _precision(record)
    yield from _rates(record, None if unknown else _cell(record))


def _status(record: Record) -> Iterator[str]:
    """Compare the status with the fields that belong to another one."""
    if record.status == "ok" and record.reason:
        yield f"reason: expected none of a record that is ok, got {record.reason!r:.80}"
    if record.skipped != (record.status == "unsupported" and record.reason.startswith(SKIPPED)):
        yield f"skipped: {record.skipped} contradicts the status {record.status} with the reason {record.reason!r:.80}"
    wrong = [name for name, judged in record.parity.items() if judged.get("status") != "ok"]
    if wrong and record.status not in ("ok", "mismatch"):
        yield f"status: {record.status} although {wrong[0]!r:.80} was judged as a mismatch"
    if record.parity and record.direction in RESULTS:
        expected = RESULTS[record.direction]
        # A workload may do without a bias.
        if not set(record.parity) <= set(expected) or not set(expected) - set(record.parity) <= {"dbias", "bias"}:
            yield f"parity: expected {', '.join(expected)} of the direction {record.direction}, got other tensors"


def _names(record: Record) -> Iterator[str]:
    """Compare the competitor's name, kind, mode and framework with each other."""
    if record.device == "cpu" and record.device_busy_s is not None:
        yield f"device_busy_s: expected none on a cpu, got {record.device_busy_s:.3g}"
    if record.implementation.startswith("stock:") != (record.kind == STOCK):
        yield f"kind: {record.kind!r:.80} contradicts the implementation {record.implementation!r:.80}"
    if record.framework in FRAMEWORKS and record.mode in MODES:
        modes = (offered_modes(division, record.device, (record.framework,)) for division in DIVISIONS)
        if not any(record.mode in offered for offered in modes):
            yield f"mode: {record.framework} has no {record.mode} on {record.device!r:.80}"
    if record.mode == EAGER and (record.compile_s is not None or record.compile_warm_s is not None):
        yield "compile_s: expected none in eager mode"
    if record.status == "ok" and record.mode in COMPILED_MODES and not record.control and record.compile_s is None:
        yield f"compile_s: expected the seconds that {record.mode} took to compile, got none"
    stepping = STEPPED_OPTIMIZERS if record.direction == "train_step" else (None,)
    if record.optimizer not in stepping:
        expected = " or ".join(map(str, stepping))
        yield f"optimizer: expected {expected} in the direction {record.direction!r:.80}, got {record.optimizer!r:.80}"


def _cell(record: Record) -> Cell:
    """Return what was measured, by the record's own sizes and conditions, which are known ones."""
    sizes = (record.batch, record.num_partitions, record.in_features, record.out_features)
    conditions = (record.direction, record.precision, record.division, record.device, record.cache, record.optimizer)
    return Cell(Workload(record.workload, *sizes, source="", layout=record.layout), *conditions)


def _amounts(record: Record) -> Iterator[str]:
    """Compare the sizes with the workload's name, and what the function needs with the sizes."""
    cell = _cell(record)
    try:
        named = workload(record.workload)
    except UnknownWorkloadError:
        named = cell.workload
    for name in ("batch", "num_partitions", "in_features", "out_features", "layout"):
        if getattr(named, name) != getattr(record, name):
            yield f"{name}: {record.workload!r:.80} has {getattr(named, name)}, got {getattr(record, name)}"
    competitor = Competitor(record.framework, record.implementation, record.mode, record.kind)
    for name, expected in (
        ("useful_flops", useful_flops(cell)),
        ("compulsory_bytes", compulsory_bytes(cell)),
        ("waste_factor", waste_factor(competitor, cell)),
    ):
        if getattr(record, name) != expected:
            yield f"{name}: expected {expected} of these sizes, got {getattr(record, name)}"


def _precision(record: Record) -> Iterator[str]:
    observed = record.observed_precision
    if observed not in _STRICTNESS:
        yield f"observed_precision: expected one of {', '.join(_STRICTNESS)}, got {observed!r}"
    # Out of the box a framework may compute as coarsely as it likes; otherwise both sides were told what to do.
    elif (
        record.precision in _STRICTNESS
        and record.division != "stock"
        and _STRICTNESS.index(observed) > _STRICTNESS.index(record.precision)
    ):
        yield f"observed_precision: {observed} is coarser than {record.precision}, which was asked for"


def _rates(record: Record, cell: Cell | None) -> Iterator[str]:
    """Compare rates with the data sheet, and those of a cell of known conditions with a large product and copy."""
    rates = [("useful_flops", record.useful_flops, "peak_flops_per_s", _RATE_SLACK)]
    rates += [("compulsory_bytes", record.compulsory_bytes, "peak_bytes_per_s", _RATE_SLACK)]
    if cell is not None:
        # By the sizes, whatever the record says of them.
        rates += [("operations", useful_product_flops(cell), "ceiling_flops_per_s", OVER_THE_CEILING)]
        rates += [("bytes", compulsory_bytes(cell), "ceiling_bytes_per_s", OVER_THE_CEILING)]
    for what, amount, name, factor in rates:
        limit, rate = getattr(record, name), amount / (record.latency_s or math.inf)
        # A warm cache may deliver bytes faster than the memory can.
        if limit and rate > factor * limit and ("bytes" not in name or record.cache == "cold"):
            said = f"{rate:.3g} {what} a second are over {factor:g} times what was measured in the same cell,"
            said = f"{what} / latency_s = {rate:.3g} a second is above" if factor == _RATE_SLACK else said
            yield f"latency_s: {said} {name} = {limit:.3g}"


def _cell_violations(records: list[Record]) -> Iterator[str]:
    """Find what is wrong with the records of one cell and process replicate."""
    first = records[0]
    name = f"cell {first.cell}, process {first.process_replicate}"
    if len(records) != first.cell_size:
        yield f"{name}: expected {first.cell_size} records, got {len(records)}"
    for shared in _SHARED:
        if len({getattr(record, shared) for record in records}) > 1:
            yield f"{name}: {shared}: expected the same in every record, got several"
    if len({record.inputs_digest for record in records if record.status == "ok"}) > 1:
        yield f"{name}: inputs_digest: the competitors had different inputs"
    twice = Counter((record.label, record.control) for record in records).most_common(1)[0]
    if twice[1] > 1:
        yield f"{name}: {twice[0][0]!r:.80} has {twice[1]} records, expected one"
    if any(record.status == "ok" for record in records):
        baselines = [record for record in records if record.baseline and not record.control]
        controls = [record for record in records if record.control]
        if len(baselines) != 1:
            yield f"{name}: expected one baseline, got {len(baselines)}"
        if len(controls) != 1:
            yield f"{name}: expected one A/A control, got {len(controls)}"
        elif baselines and controls[0].label != baselines[0].label:
            yield f"{name}: the control {controls[0].label} is not the baseline {baselines[0].label}"


def _elsewhere(name: str, used: set[tuple[str, str, str]], fingerprint: Mapping[str, Any]) -> Iterator[str]:
    """Compare what records say of their device, division and framework with the environment that they name."""
    columns = zip(*sorted(used), strict=True)
    known = ([fingerprint["device"]], [fingerprint["division"]], list(fingerprint["frameworks"]))
    for what, found, expected in zip(("device", "division", "framework"), columns, known, strict=True):
        for value in sorted(set(found) - set(expected)):
            had = ", ".join(map(shown, expected))
            yield f"{what}: records say {shown(value)}, and their environment {name[:80]} had {had}"


def violations(directory: Path, count: Count) -> Iterator[str]:
    """Find every violation in the records of one directory, each with its place.

    Args:
        directory: of a run.
        count: is raised by what was looked at, and gets the remarks.

    Raises:
        StoreError: if there are no records, or a file cannot be read.
    """
    path = records_file(directory)
    keys: dict[str, int] = {}
    cells: dict[tuple[str, str, int], list[Record]] = defaultdict(list)
    timings: dict[tuple[str, str], list[Timing]] = defaultdict(list)
    used: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    found = False
    for line in scan(path, torn=True):
        try:
            if not line.data.endswith(b"\n"):
                raise RecordError("the line has no end")
            record = line.parsed()
        except RecordError as error:
            found = True
            yield f"{line.where}: {error}"
            continue
        count.records += 1
        if record.key in keys:
            found = True
            yield f"{line.where}: key: {record.key} is that of line {keys[record.key]} too"
        keys[record.key] = line.position.number
        used[record.environment_id].add((record.device, record.division, record.framework))
        yield from (f"{line.where}: {wrong}" for wrong in record_violations(record))
        count.remarks += [f"{line.where}: {account.sentence}" for account in short_blocks([record])]
        place = (record.environment_id, record.cell, record.process_replicate)
        timings[place[:2]].append(timing(line.where, record))
        cells[place].append(timings[place[:2]][-1].record)
    if not keys:
        yield f"{path}: holds no record"
    count.cells += len(cells)
    for records in cells.values():
        yield from (f"{path}: {wrong}" for wrong in _cell_violations(records))
    read = any(clock_bits(group) is not None for group in timings.values())
    for group in timings.values():
        yield from disagreements(group, read=read)
        count.speeds += sum(timed.record.status == "ok" for timed in group)
        count.unchecked += unchecked(group)
    try:
        environments = read_environments(directory)
        wrong = unusable(used, environments, str(directory))
        for name in sorted(used.keys() & environments.keys() - wrong.keys()):
            if (environments[name].get("git") or {}).get("dirty"):
                count.remarks.append(f"{directory}: environment {name[:80]} was of changes that were not committed")
        yield from wrong.values()
        for name in used.keys() - wrong.keys():
            yield from (f"{path}: {said}" for said in _elsewhere(name, used[name], environments[name]))
        if not found and not wrong and keys:
            # The last proof: a report can be made of them.
            rank_cells(Archive([directory]).cells())
    except StoreError as error:
        yield str(error)
