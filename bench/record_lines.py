"""Reads one line of `records.jsonl`, field by field: a file may have been edited by hand."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from operator import itemgetter
from sys import intern
from typing import Any, get_type_hints

from bench.past_names import implementation_that_ran
from bench.records import FIELD_NAMES, SAMPLES, SCHEMA_VERSION, Record, RecordError, filled
from bench.strict_json import LARGEST, moderate, parse, plain, shown

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
_HINTS: Mapping[str, Any] = get_type_hints(Record)
_KINDS_OF = {name: _KINDS.get(_HINTS[name], (dict,)) for name in FIELD_NAMES}
_LISTS = tuple((k, name) for k, name in enumerate(FIELD_NAMES) if _KINDS_OF[name] == (list,))
_TEXTS = tuple(k for k, name in enumerate(FIELD_NAMES) if _KINDS_OF[name] == (str,))
_NUMBERS = tuple(name for name in FIELD_NAMES if int in _KINDS_OF[name])
_POSITIVE = ("num_partitions", "in_features", "out_features", "batch", "cell_size", "calls_per_block", "waste_factor")
_POSITIVE += ("useful_flops", "compulsory_bytes", "latency_s", "block_s")
_DEFAULTS: Mapping[str, Any] = {
    item.name: [] if _KINDS_OF[item.name] == (list,) else {} if item.default is MISSING else item.default
    for item in fields(Record)
    if item.name not in _REQUIRED
}
_IMPLEMENTATION = FIELD_NAMES.index("implementation")
_ROW = itemgetter(*FIELD_NAMES)
_SEEN_KINDS: set[tuple[type, ...]] = set()
# The reciprocal of the largest: a ceiling of 1e-320 would make every share of it infinite.
_SMALLEST = 1 / LARGEST
_RANGE = "numbers from 2^-100 to 2^100 (integers to 2^63)"
# Objects, and lists of objects; none of them has more levels than this.
_NESTED = tuple(name for name, kinds in _KINDS_OF.items() if kinds in ((dict,), (list,)) and name not in SAMPLES)
_LEVELS = 4


def parse_line(line: bytes | str) -> Record:
    """Reads one line of `records.jsonl`.

    Fields that this version does not know are ignored: fields may be added without a new schema version.

    Raises:
        RecordError: if the line is torn, of another schema version, lacks a field or contradicts itself.
    """
    try:
        values = parse(line if isinstance(line, bytes) else line.encode())
    except ValueError as error:
        raise RecordError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RecordError("not a JSON object")
    version = values.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise RecordError(f"schema_version: expected {SCHEMA_VERSION}, got {shown(version)}")
    missing = sorted(_REQUIRED - values.keys())
    if missing:
        raise RecordError(f"missing fields: {', '.join(missing)}")
    merged = {**_DEFAULTS, **values}
    row = list(_ROW(merged))
    kinds = tuple(map(type, row))
    # Most lines of a file have the same kinds of values, and a large file has many lines.
    if kinds not in _SEEN_KINDS:
        for (name, allowed), value in zip(_KINDS_OF.items(), row, strict=True):
            if type(value) not in allowed:
                names = " or ".join(kind.__name__ for kind in allowed)
                raise RecordError(f"{name}: expected {names}, got {shown(value)}")
        _SEEN_KINDS.add(kinds)
    for name in _NUMBERS:
        value = merged[name]
        if value and not moderate(value, _SMALLEST):
            raise RecordError(f"{name}: expected 0 or {_RANGE}, got {shown(value)}")
    if zero := [name for name in _POSITIVE if merged[name] == 0]:
        raise RecordError(f"{zero[0]}: expected more than 0")
    row[_IMPLEMENTATION] = implementation_that_ran(merged)
    for k in _TEXTS:
        # The same few names again and again.
        row[k] = intern(row[k])
    for k, name in _LISTS:
        row[k] = _samples(name, row[k]) if name in SAMPLES else tuple(row[k])
    if len(merged["block_latency_s"]) % 2:
        raise RecordError(f"block_latency_s: expected two blocks a round, got {len(merged['block_latency_s'])} blocks")
    if not all(isinstance(value, dict) for value in (*merged["parity"].values(), *merged["conditions"])):
        raise RecordError("parity, conditions: expected objects in them")
    for name in _NESTED:
        if not plain(merged[name], _LEVELS):
            raise RecordError(f"{name}: expected at most {_LEVELS} levels, and {_RANGE}")
    if not all(type(count) is int and moderate(count) for count in merged["kernels"].values()):
        raise RecordError("kernels: expected a number of executions for each name")
    return filled(row)


def _samples(name: str, values: list[Any]) -> tuple[float, ...]:
    if not values:
        return ()
    if set(map(type, values)) <= {float} and min(values) >= _SMALLEST and max(values) <= LARGEST:
        return tuple(values)
    for value in values:
        if type(value) not in (float, int) or not moderate(value, _SMALLEST):
            raise RecordError(f"{name}: expected a list of {_RANGE}, got {shown(value)} in it")
    return tuple(map(float, values))
