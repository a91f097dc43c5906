"""Write results as JSON and as comma-separated values: whole files or none."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench.records import SCHEMA_VERSION, Record, finite, schema_version_of
from bench.study.ranking import Efficiency, Ranking, Row, efficiencies
from bench.study.results import Results
from bench.study.statistics import Interval
from bench.study.verdicts import FrameworkRatio
from parity_tests.report.files import OutputError, output, write_text
from parity_tests.report.text import csv_cell, json_text

SHARED: tuple[str, ...] = (
    "workload",
    "num_partitions",
    "in_features",
    "out_features",
    "batch",
    "dtype",
    "device",
    "direction",
    "division",
    "precision",
    "layout",
    "cache",
    "optimizer",
    "environment_id",
)

_EFFICIENCY: tuple[str, ...] = tuple(item.name for item in fields(Efficiency))


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return an object of objects as one level of `outer_inner` columns; lists become text."""
    row: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            row |= flat(item, f"{prefix}{name}_")
        else:
            row[prefix + name] = "; ".join(map(str, item)) if isinstance(item, list | tuple) else item
    return row


def write_csv(
    argument: str, path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Write rows as comma-separated values with a heading line; cells that a row lacks stay empty.

    Args:
        argument: the option that named the file.
        path: of the file.
        rows: column to value.
        columns: in order; None takes every column that any row has, which needs all rows in memory.

    Raises:
        OutputError: if it cannot be written.
    """
    if columns is None:
        rows = list(rows)
        columns = list(dict.fromkeys(name for row in rows for name in row))
    with output(argument, path) as file:
        lines = io.TextIOWrapper(file, "utf-8", newline="")
        writer = csv.writer(lines)
        writer.writerow(map(csv_cell, columns))
        writer.writerows([csv_cell(row.get(name, "")) for name in columns] for row in rows)
        # Flushes it; the file below is closed elsewhere.
        lines.detach()


def interval_json(interval: Interval | None) -> dict[str, Any] | None:
    """Return a ratio with its interval; an end that is infinite becomes null."""
    if interval is None:
        return None
    return {"ratio": interval.ratio, "low": interval.low, "high": finite(interval.high), "rounds": interval.rounds}


def _efficiency(efficiency: Efficiency) -> dict[str, Any]:
    pays = None if efficiency.payback_calls is None else math.isfinite(efficiency.payback_calls)
    # Not `asdict`, whose search for nested values takes most of the time of a large sweep's table.
    return {name: getattr(efficiency, name) for name in _EFFICIENCY} | {
        "payback_calls": finite(efficiency.payback_calls),
        "compile_pays": pays,
    }


def _fields(record: Record, *names: str) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def _row(row: Row, efficiency: Efficiency, short_blocks: int) -> dict[str, Any]:
    record = row.record
    return {
        "rank": row.rank,
        "leads": row.leads,
        **_fields(record, "framework", "implementation", "kind", "mode", "status", "skipped", "reason"),
        "latency_s": row.latency_s,
        "ratio_to_baseline": interval_json(row.interval),
        "verdict": row.verdict or None,
        **_fields(record, "precision", "observed_precision", "bound_fraction", "compile_s", "compile_warm_s"),
        **_fields(record, "peak_memory_bytes", "memory_method", "device_busy_s", "energy_j"),
        "outlier_blocks": row.outliers,
        "short_blocks": short_blocks,
        **_efficiency(efficiency),
        "kernels": dict(record.kernels),
    }


def _frameworks(found: FrameworkRatio | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "torch": found.torch,
        "jax": found.jax,
        "jax_over_torch": interval_json(found.interval),
        "verdict": found.verdict,
        "confidence": found.confidence,
    }


def _share(log_ratio: float | None) -> float | None:
    """Return a log ratio as the share by which one is faster; None if it is infinite."""
    return None if log_ratio is None or math.isinf(log_ratio) else finite(math.expm1(min(log_ratio, 700.0)))


def _ranking(ranking: Ranking) -> dict[str, Any]:
    found = efficiencies(ranking)
    short: Counter[str] = Counter()
    for account in ranking.short_blocks:
        short[account.label] += 0 if account.control else account.short
    return _fields(ranking.first, *SHARED) | {
        "baseline": ranking.baseline,
        "resolution": _share(ranking.resolution),
        "noise_floor": _share(ranking.floor),
        "spread_of_processes": _share(ranking.spread_of_processes) if ranking.one_process else None,
        "control": interval_json(ranking.control),
        "process_replicates": ranking.replicates,
        "confidence": ranking.confidence,
        "stopped": ranking.first.stopped or None,
        "winner": ranking.winner,
        "tied": list(ranking.tied),
        "frameworks": _frameworks(ranking.frameworks),
        "framework_graphs": _frameworks(ranking.framework_graphs),
        "disturbed": ranking.disturbed,
        "disturbance": dict(ranking.first.disturbance) or None,
        "short_blocks": [asdict(account) for account in ranking.short_blocks],
        "rows": [_row(row, found[row.record.label], short[row.record.label]) for row in ranking.rows],
    }


def _head(results: Results, notes: Sequence[str]) -> dict[str, Any]:
    return {
        "schema_version": max(
            (schema_version_of(found.first.in_features, found.first.out_features) for found in results.found),
            default=SCHEMA_VERSION,
        ),
        "summary": dict(results.outcomes),
        "notes": list(notes),
        "stopped": results.stopped,
        "environments": dict(results.environments),
    }


def write_summary(path: Path, results: Results, notes: Sequence[str] = ()) -> None:
    """Write everything that a report shows as one JSON object, cell by cell: a large sweep is never in memory whole."""

    def pieces() -> Iterator[str]:
        yield json_text(_head(results, notes), indent=1).removesuffix("\n}") + ',\n "cells": ['
        for k, ranking in enumerate(results.found):
            # One line for each cell: indenting takes many times as long.
            yield (",\n" if k else "\n") + json_text(_ranking(ranking))
        yield "\n]}\n"

    write_text("--json", path, pieces())


def write_frameworks(path: Path, results: Results) -> None:
    """Write one line for each cell and kind of launch that both frameworks have, as comma-separated values.

    Raises:
        OutputError: if there is none, or it cannot be written.
    """
    rows = [
        _fields(ranking.first, *SHARED) | {"launch": kind} | flat(_frameworks(found) or {})
        for ranking in results.found
        for kind, found in ranking.framework_ratios.items()
        if found.interval is not None
    ]
    if not rows:
        raise OutputError("--frameworks-csv: no cell has a speed of both frameworks; measure both first.")
    write_csv("--frameworks-csv", path, rows)


def _table_rows(results: Results) -> Iterator[dict[str, Any]]:
    for ranking in results.found:
        cell = _ranking(ranking)
        shared = {name: cell[name] for name in (*SHARED, "baseline", "resolution", "confidence")}
        for row in cell["rows"]:
            interval = row.pop("ratio_to_baseline") or dict.fromkeys(("ratio", "low", "high", "rounds"))
            # Names to counts are no value of a table; JSON has them.
            del row["kernels"]
            yield (
                shared
                | {"competitor": "", **row}
                | interval
                | {"competitor": f"{row['framework']} {row['implementation']} ({row['mode']})"}
            )


def write_table(path: Path, results: Results) -> None:
    """Write one line for each competitor of each cell as comma-separated values."""
    write_csv("--csv", path, _table_rows(results), list(next(_table_rows(results), {})))
