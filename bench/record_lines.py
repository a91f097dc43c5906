"""Reads one line of ``records.jsonl``, field by field: a file may have been edited by hand."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from sys import intern
from typing import Any, get_type_hints

from bench.records import SCHEMA_VERSION, Record, RecordError

# Fields that came later have a default, so that records of earlier runs can still be read.
_REQUIRED = {item.name for item in fields(Record) if item.default is MISSING and item.default_factory is MISSING}
# Checked when a line is read, since a file may have been edited by hand; a number is never a truth value.
_KINDS: Mapping[Any, tuple[type, ...]] = {
    str: (str,),
    str | None: (str, type(None)),
    int: (int,),
    int | None: (int, type(None)),
    float | None: (float, int, type(None)),
    bool: (bool,),
    tuple[float, ...]: (list,),
    tuple[Mapping[str, Any], ...]: (list,),
}
_CHECKS = tuple((name, _KINDS.get(hint, (dict,)), hint) for name, hint in get_type_hints(Record).items())
_SAMPLES = {name for name, _, hint in _CHECKS if hint == tuple[float, ...]}
_NUMBERS = {name for name, kinds, _ in _CHECKS if int in kinds}
_COUNTS = ("num_partitions", "in_features", "out_features", "batch", "cell_size", "calls_per_block", "waste_factor")
_COUNTS += ("useful_flops", "compulsory_bytes")
# Far above anything measured, and still exact enough to be divided and drawn.
_LARGEST = 2**100


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_constant)


def parse_line(line: bytes | str) -> Record:
    """Reads one line of ``records.jsonl``.

    Fields that this version does not know are ignored: fields may be added without a new schema version.

    Raises:
        RecordError: if the line is torn, of another schema version, lacks a field or contradicts itself.
    """
    try:
        values = _DECODER.decode(line if isinstance(line, str) else line.decode())
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RecordError("not a JSON object")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise RecordError(f"schema_version: expected {SCHEMA_VERSION}, got {values.get('schema_version')!r:.40}")
    missing = sorted(_REQUIRED - values.keys())
    if missing:
        raise RecordError(f"missing fields: {', '.join(missing)}")
    known: dict[str, Any] = {}
    for name, kinds, _ in _CHECKS:
        if name in values:
            value = known[name] = values[name]
            if type(value) not in kinds:
                names = " or ".join(kind.__name__ for kind in kinds)
                raise RecordError(f"{name}: expected {names}, got {str(value)[:80]!r}")
            if name in _NUMBERS and value is not None and not 0 <= value <= _LARGEST:
                raise RecordError(f"{name}: expected a number that is not negative, got {str(value)[:80]}")
            if kinds == (str,):
                # The same few names again and again.
                known[name] = intern(str(value))
            if kinds == (list,):
                listed: list[Any] = values[name]
                known[name] = _samples(name, listed) if name in _SAMPLES else tuple(listed)
    if any(known[name] == 0 for name in _COUNTS) or known["latency_s"] == 0:
        raise RecordError(f"{', '.join(_COUNTS)}, latency_s: expected more than 0")
    if len(known["block_latency_s"]) % 2:
        raise RecordError(f"block_latency_s: expected two blocks a round, got {len(known['block_latency_s'])} blocks")
    if not all(isinstance(value, dict) for value in (*known["parity"].values(), *known.get("conditions", ()))):
        raise RecordError("parity, conditions: expected objects in them")
    return Record(**known)


def _samples(name: str, values: list[Any]) -> tuple[float, ...]:
    for value in values:
        if type(value) not in (float, int) or not 0 < value <= _LARGEST:
            raise RecordError(f"{name}: expected a list of positive numbers, got {str(values)[:80]}")
    return tuple(values)
