"""Rankings as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.records import SCHEMA_VERSION, Record, finite
from bench.study.ranking import Ranking, Row, rankings, tally
from bench.study.statistics import Interval


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {"ratio": interval.ratio, "low": interval.low, "high": finite(interval.high), "rounds": interval.rounds}


def _row(row: Row) -> dict[str, Any]:
    record = row.record
    return {
        "rank": row.rank,
        "framework": record.framework,
        "implementation": record.implementation,
        "kind": record.kind,
        "mode": record.mode,
        "status": record.status,
        "skipped": record.skipped,
        "reason": record.reason,
        "latency_s": row.latency_s,
        "ratio_to_baseline": _interval(row.interval),
        "verdict": row.verdict or None,
        "precision": record.precision,
        "observed_precision": record.observed_precision,
        "bound_fraction": record.bound_fraction,
        "compile_s": record.compile_s,
        "peak_memory_bytes": record.peak_memory_bytes,
        "memory_method": record.memory_method,
        "outlier_blocks": row.outliers,
    }


def _ranking(ranking: Ranking) -> dict[str, Any]:
    first = ranking.first
    shared = ("workload", "num_partitions", "in_features", "out_features", "batch", "dtype", "device", "direction")
    shared += ("division", "precision", "layout", "cache", "environment_id")
    return {name: getattr(first, name) for name in shared} | {
        "baseline": ranking.baseline,
        "resolution": None if ranking.resolution is None else finite(math.expm1(ranking.resolution)),
        "control": _interval(ranking.control),
        "process_replicates": ranking.replicates,
        "rows": [_row(row) for row in ranking.rows],
    }


def summary(records: Sequence[Record], environments: Mapping[str, Any], notes: Sequence[str] = ()) -> dict[str, Any]:
    """Everything a report shows, as one JSON object."""
    return {
        "schema_version": SCHEMA_VERSION,
        "summary": tally(records),
        "notes": list(notes),
        "environments": dict(environments),
        "cells": [_ranking(ranking) for ranking in rankings(records)],
    }


def write_json(path: Path, value: object) -> None:
    """Writes a value as indented JSON; infinities and NaN are refused."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
