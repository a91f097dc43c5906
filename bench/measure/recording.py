"""From the outcome of a cell to its records."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import median
from typing import Any

from bench.measure.entry import CellOutcome, Entry
from bench.plan.cells import Cell
from bench.plan.competitors import Competitor
from bench.plan.costs import compulsory_bytes, useful_flops, waste_factor
from bench.plan.hardware import peak_rates
from bench.plan.presets import BLOCK_S, Preset
from bench.records import HARNESS_VERSION, SCHEMA_VERSION, Record, digest


def cell_hash(cell: Cell, competitors: Sequence[Competitor], preset: Preset, *, seed: int, environment_id: str) -> str:
    """Identifies a comparison: the conditions, who takes part, the effort, the source and the environment."""
    return digest(
        {
            "cell": asdict(cell),
            "competitors": [asdict(competitor) for competitor in competitors],
            "effort": [
                preset.rounds,
                preset.least_rounds,
                # A JSON number: no limit is written as null.
                preset.cell_s if math.isfinite(preset.cell_s) else None,
                preset.most_cell_s,
                BLOCK_S[cell.device],
                preset.warm_up_blocks,
                preset.probe_s,
                asdict(preset.limits),
            ],
            "seed": seed,
            "environment": environment_id,
            "harness": HARNESS_VERSION,
        }
    )


def _record(entry: Entry, shared: dict[str, Any], outcome: CellOutcome, cell: Cell, device_name: str) -> Record:
    switches = outcome.switches.get(entry.competitor.framework, {})
    who, right = entry.competitor, entry.going
    judgement = entry.judgement or {}
    peaks = peak_rates(device_name, cell.precision, judgement.get("observed_precision"))
    identity = [shared["cell"], shared["process_replicate"], asdict(who), entry.control]
    blocks, calls = tuple(entry.blocks), entry.calls_per_block
    return Record(
        **shared,
        key=digest(identity),
        framework=who.framework,
        implementation=who.implementation,
        kind=who.kind,
        mode=who.mode,
        observed_precision=judgement.get("observed_precision"),
        peak_flops_per_s=peaks.get("flops_per_s"),
        peak_bytes_per_s=peaks.get("bytes_per_s"),
        status=entry.status,
        reason=entry.reason,
        skipped=entry.skipped,
        block_latency_s=blocks if right else (),
        calls_per_block=calls,
        latency_s=median(blocks) / calls if right and calls else None,
        rejected_block_latency_s=tuple(entry.rejected) + (() if right else blocks),
        warm_up_block_latency_s=tuple(entry.warm_up),
        compile_s=entry.compile_s,
        peak_memory_bytes=entry.peak_memory_bytes,
        memory_method=entry.memory_method,
        static_memory_bytes=entry.static_memory_bytes,
        bound_fraction=judgement.get("bound_fraction"),
        parity=judgement.get("tensors", {}),
        waste_factor=waste_factor(who, cell),
        control=entry.control,
        baseline=entry.baseline,
        switches=switches,
        energy_j=entry.energy_j,
        conditions=tuple(entry.conditions),
        enqueue_s=entry.probe.get("enqueue_s"),
        device_busy_s=entry.probe.get("device_busy_s"),
        kernels=entry.probe.get("kernels", {}),
        compile_warm_s=entry.probe.get("compile_warm_s"),
        program_flops=entry.probe.get("program_flops"),
        disturbance=outcome.disturbance,
        disturbance_windows=tuple(outcome.disturbance_windows) if entry.baseline and not entry.control else (),
        prepared_call_s=entry.call_s or None,
        synchronised_latency_s=tuple(entry.probe.get("synchronised_latency_s", ())),
    )


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")


def records_of(
    outcome: CellOutcome,
    cell: Cell,
    *,
    cell_key: str,
    process_replicate: int,
    seed: int,
    environment_id: str,
    started_at: datetime,
    finished_at: datetime | None = None,
    device_name: str = "",
) -> list[Record]:
    """Builds the records of a cell, one for each competitor and one for the control."""
    workload = cell.workload
    shared = {
        "schema_version": SCHEMA_VERSION,
        "cell": cell_key,
        "cell_size": len(outcome.entries),
        "workload": workload.name,
        "num_partitions": workload.num_partitions,
        "in_features": workload.in_features,
        "out_features": workload.out_features,
        "batch": workload.batch,
        "dtype": cell.dtype,
        "device": cell.device,
        "direction": cell.direction,
        "division": cell.division,
        "precision": cell.precision,
        "layout": workload.layout,
        "cache": cell.cache,
        "useful_flops": useful_flops(cell),
        "compulsory_bytes": compulsory_bytes(cell),
        "process_replicate": process_replicate,
        "seed": seed,
        "inputs_digest": outcome.inputs_digest,
        "optimizer": cell.optimizer,
        "ceiling_flops_per_s": outcome.ceilings.get("ceiling_flops_per_s"),
        "ceiling_bytes_per_s": outcome.ceilings.get("ceiling_bytes_per_s"),
        "stopped": outcome.stopped,
        "block_s": BLOCK_S[cell.device],
        "started_at": _timestamp(started_at),
        "finished_at": None if finished_at is None else _timestamp(finished_at),
        "environment_id": environment_id,
    }
    return [_record(entry, shared, outcome, cell, device_name) for entry in outcome.entries]
