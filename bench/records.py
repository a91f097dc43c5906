"""Hold one line of `records.jsonl`, and read it back: a file may have been edited by hand.

Refused are bytes that are not UTF-8, a byte order mark, text that holds half a character, one name twice in an object,
NaN and infinities, integers of thousands of digits, and nesting without end.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from sys import intern
from typing import Any, get_type_hints

# Records of partitions of one size have the first version, those of unequal ones, whose sizes are lists, the second.
SCHEMA_VERSION, UNEQUAL_SCHEMA_VERSION = 1, 2
# Raised when a change makes earlier measurements incomparable; part of every key.
HARNESS_VERSION = "3"
STATUSES: tuple[str, ...] = ("ok", "mismatch", "unsupported", "oom", "timeout", "crash")
# Reasons for the end of a cell's rounds; empty where there were none.
STOPS: tuple[str, ...] = ("", "resolved", "precise", "rounds", "time")
# Beginning of the reason of a competitor that a cap of the preset kept out.
SKIPPED = "skipped: "


class RecordError(ValueError):
    """A line that is no valid record."""


@dataclass(frozen=True, slots=True)
class Record:
    """The measurement of one competitor in one cell, in one process. Times are in seconds, memory is in bytes.

    Fields that came later have a default, so that records of earlier runs can still be read; None and empty values
    stand for what was not measured or does not apply.
    """

    schema_version: int
    key: str  # hash of everything that identifies the measurement; unique in a file
    cell: str  # hash shared by the records that were measured against each other
    cell_size: int  # number of records of that cell and process replicate
    workload: str  # name in the catalogue
    num_partitions: int
    in_features: int | tuple[int, ...]  # per partition; one for each where they are unequal
    out_features: int | tuple[int, ...]  # likewise
    batch: int  # rows of one partition
    dtype: str  # of storage
    device: str  # cpu or cuda
    framework: str  # torch or jax
    implementation: str  # registry name, `stock:...` or `dense`
    kind: str  # implementation, stock or yardstick
    mode: str  # eager, compile, jit, ...
    direction: str  # forward, forward_backward or train_step
    division: str  # stock, matched or tuned
    precision: str  # asked for
    observed_precision: str | None  # that the error shows
    layout: str  # of x in memory: contiguous, partition_major, time_series, flat or shared
    cache: str  # warm or cold
    status: str  # one of STATUSES
    reason: str  # one sentence for every status but ok, else empty
    skipped: bool  # a cap of the preset kept the competitor out; the status is then `unsupported`
    block_latency_s: tuple[float, ...]  # of each timed block, raw and in order, two a round (order, then reverse order)
    calls_per_block: int | None
    latency_s: float | None  # median of one call; None unless the status is ok
    rejected_block_latency_s: tuple[float, ...]  # of a competitor whose result was wrong or whose process ended
    # Blocks before the first round, the rehearsal's among them; where that was far too short, those of the size that
    # was found then follow.
    warm_up_block_latency_s: tuple[float, ...]
    compile_s: float | None  # tracing, lowering and compilation with an empty on-disk cache; None in eager mode
    peak_memory_bytes: int | None  # growth over the live arguments during one call, at least the results themselves
    memory_method: str | None  # by which that figure was obtained
    # Outputs and temporaries by the compiler's own account, or the memory that recording a CUDA graph took.
    static_memory_bytes: int | None
    bound_fraction: float | None  # largest error over its bound, over all tensors; at most 1 if right
    parity: Mapping[str, Mapping[str, Any]]  # tensor to status, bound_fraction and max_abs_error
    useful_flops: int  # operations that the function needs in one call
    compulsory_bytes: int  # that must move in one call
    waste_factor: float  # how many times the useful products are carried out
    # Number of the set of processes. Memory, single calls, enqueueing, kernels, energy and compiling again are measured
    # in the first alone, which is 0.
    process_replicate: int
    control: bool  # the baseline's second run in the same rounds, the A/A control
    baseline: bool  # the competitor that the ratios of the cell refer to
    seed: int  # of the inputs and the order
    inputs_digest: str | None  # hash of the input bytes, the same in both frameworks
    switches: Mapping[str, Any]  # the framework's precision switches during the run
    started_at: str  # UTC, ISO 8601
    environment_id: str  # key into `environment.json`
    optimizer: str | None = None  # of `train_step`
    synchronised_latency_s: tuple[float, ...] = ()  # of single calls, each waited for, raw and in order
    # Median host time until a call returns, its result not waited for; the least of several short series of calls.
    enqueue_s: float | None = None
    device_busy_s: float | None = None  # part of one call in which the device ran anything; from a traced pass
    kernels: Mapping[str, int] = field(default_factory=dict)  # name to executions in one call; from the same pass
    compile_warm_s: float | None = None  # the same compilation again, with the cache that the first one filled
    program_flops: int | None = None  # of the compiled or traced program, by the framework's own account
    # Written in one call by operations that only copy (contiguous copies, transpositions, concatenations, padding): of
    # torch where no compiler hides them, of JAX in the compiled program.
    copied_bytes: int | None = None
    energy_j: float | None = None  # joules of one call: all that the device took in a second or more of such calls
    ceiling_flops_per_s: float | None = None  # of a large product in the same session and precision
    ceiling_bytes_per_s: float | None = None  # of a large copy in the same session, bytes read and written
    # The most that the hardware can do by its data sheet, in the faster of the precisions asked for and observed.
    peak_flops_per_s: float | None = None
    peak_bytes_per_s: float | None = None
    stopped: str = ""  # one of STOPS
    conditions: tuple[Mapping[str, Any], ...] = ()  # per round: clocks, power, temperature, throttling
    block_s: float | None = None  # the least length that a block was sized for
    # What others took of the machine during the rounds, and what that did to the workers: see
    # `bench.measure.disturbance`.
    disturbance: Mapping[str, Any] = field(default_factory=dict)
    disturbance_windows: tuple[Mapping[str, Any], ...] = ()  # of half a second or so; in the baseline's record alone
    finished_at: str | None = None  # of the cell, as `started_at`
    prepared_call_s: float | None = None  # the shortest of the first calls, before any block, each waited for

    def __post_init__(self) -> None:
        """Refuse a record that contradicts itself."""
        if self.disturbance and not _tells(self.disturbance):
            raise RecordError("disturbance: expected numbers of processors and windows, as `bench run` writes them")
        if self.status not in STATUSES:
            raise RecordError(f"status: expected one of {', '.join(STATUSES)}, got {self.status!r}")
        if (self.status == "ok") != (self.latency_s is not None):
            raise RecordError(
                f"latency_s: present exactly when the status is ok, got {self.latency_s} with {self.status}"
            )
        if self.status == "ok" and not (self.block_latency_s and self.calls_per_block):
            raise RecordError("block_latency_s: a record that is ok holds at least one block")
        if self.status != "ok" and (self.block_latency_s or not self.reason):
            raise RecordError(f"reason: a record that is {self.status} has a reason and no block_latency_s")

    @property
    def label(self) -> str:
        """Return one readable name, for example `torch matmul (eager)`."""
        return f"{self.framework} {self.implementation} ({self.mode})"

    def without_samples(self) -> "Record":
        """Return the record without its samples, so that the report of a large sweep fits into memory.

        Such a record is no valid line.
        """
        light = object.__new__(Record)
        for name in FIELD_NAMES:
            object.__setattr__(light, name, _LIGHT[name] if name in _LIGHT else getattr(self, name))
        return light

    def to_line(self) -> bytes:
        """Return the record as one JSON line, newline included."""
        # Not `asdict`, which copies every sample before it is written.
        return (json.dumps({name: getattr(self, name) for name in FIELD_NAMES}, allow_nan=False) + "\n").encode()


FIELD_NAMES = tuple(item.name for item in fields(Record))
SAMPLES = tuple(item.name for item in fields(Record) if item.type == tuple[float, ...])
_LIGHT: dict[str, Any] = dict.fromkeys((*SAMPLES, "conditions", "disturbance_windows"), ())
_LIGHT |= {"parity": {}, "switches": {}}

# Far above anything measured or reported, and still exact enough to be divided and drawn. Integers end where arrays and
# the libraries that draw pictures can hold no larger one.
LARGEST = 2.0**100
LARGEST_INTEGER = 2**63 - 1
# Python itself refuses at 4,300, in words that are meant for programmers.
_MOST_DIGITS = 400
# Half of a pair, written as an escape: text that no file and no terminal takes.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise ValueError(f"the name {twice[:80]!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_int=_integer, object_pairs_hook=_object)


def parse(data: bytes) -> Any:
    """Read one JSON value from all of the bytes.

    Raises:
        ValueError: with the reason, if they hold anything else.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark")
    try:
        value = _DECODER.decode(data.decode())
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text holds half of a surrogate pair") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def moderate(value: float, least: float = 0.0) -> bool:
    """Tell whether a number can be calculated with; one such as 1e999 is valid JSON and is read as infinite."""
    return least <= value <= (LARGEST_INTEGER if isinstance(value, int) else LARGEST)


def plain(value: object, depth: int) -> bool:
    """Tell whether a value can be shown and written again.

    Args:
        value: what `parse` returned, or a part of it.
        depth: levels of lists and objects that are allowed; 0 allows only text, numbers, truth values and null.
    """
    if isinstance(value, str):
        return True
    if isinstance(value, int | float):
        return moderate(abs(value))
    if isinstance(value, list | dict):
        return depth > 0 and all(
            plain(item, depth - 1) for item in (value if isinstance(value, list) else value.values())
        )
    return True


def shown(value: object) -> str:
    """Name a wrong value in a message, in a few words whatever it is."""
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object of {len(value)}"
    if isinstance(value, int | float):
        return str(value)[:40]
    return repr(str(value)[:80])


# What a line may hold for each type of a field; a number is never a truth value.
_KINDS: Mapping[Any, tuple[type, ...]] = {
    str: (str,),
    str | None: (str, type(None)),
    int: (int,),
    int | None: (int, type(None)),
    float: (float, int),
    float | None: (float, int, type(None)),
    int | tuple[int, ...]: (int, list),
    bool: (bool,),
    tuple[float, ...]: (list,),
    tuple[Mapping[str, Any], ...]: (list,),
}
_KINDS_OF = {name: _KINDS.get(hint, (dict,)) for name, hint in get_type_hints(Record).items()}
_REQUIRED = {item.name for item in fields(Record) if item.default is item.default_factory is MISSING}
_EMPTY: Mapping[tuple[type, ...], Any] = {(list,): [], (dict,): {}}
_DEFAULTS = {item.name: _EMPTY.get(_KINDS_OF[item.name], item.default) for item in fields(Record)}
_POSITIVE = ("num_partitions", "in_features", "out_features", "batch", "cell_size", "calls_per_block", "waste_factor")
_POSITIVE += ("useful_flops", "compulsory_bytes", "latency_s", "block_s")
# The reciprocal of the largest: a ceiling of 1e-320 would make every share of it infinite.
_SMALLEST = 1 / LARGEST
_SIZES = ("in_features", "out_features")
_RANGE = "numbers from 2^-100 to 2^100 (integers to 2^63)"
# Of objects and lists of objects; no record has more.
_LEVELS = 4


def parse_line(line: bytes | str) -> Record:
    """Read one line of `records.jsonl`.

    Fields that this version does not know are ignored: fields may be added without a new schema version.

    Raises:
        RecordError: if the line is torn, of another schema version, lacks a field or contradicts itself.
    """
    try:
        found = parse(line if isinstance(line, bytes) else line.encode())
    except ValueError as error:
        raise RecordError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise RecordError("not a JSON object")
    version = found.get("schema_version")
    if type(version) is not int or version not in (SCHEMA_VERSION, UNEQUAL_SCHEMA_VERSION):
        raise RecordError(
            f"schema_version: expected {SCHEMA_VERSION} or {UNEQUAL_SCHEMA_VERSION}, got {shown(version)}"
        )
    if missing := sorted(_REQUIRED - found.keys()):
        raise RecordError(f"missing fields: {', '.join(missing)}")
    values = {name: found.get(name, default) for name, default in _DEFAULTS.items()}
    for name, kinds in _KINDS_OF.items():
        value = values[name]
        if type(value) not in kinds:
            raise RecordError(f"{name}: expected {' or '.join(kind.__name__ for kind in kinds)}, got {shown(value)}")
        if name in _SIZES and isinstance(value, list):
            values[name] = _sizes(name, value, values["num_partitions"])
        elif str in kinds and value:
            # The same few texts again and again.
            values[name] = intern(value)
        elif int in kinds and value and not moderate(value, _SMALLEST):
            raise RecordError(f"{name}: expected 0 or {_RANGE}, got {shown(value)}")
        elif name in SAMPLES:
            values[name] = _samples(name, value)
        elif kinds in _EMPTY:
            if not plain(value, _LEVELS):
                raise RecordError(f"{name}: expected at most {_LEVELS} levels, and {_RANGE}")
            values[name] = tuple(value) if isinstance(value, list) else value
    expected = schema_version_of(values["in_features"], values["out_features"])
    if version != expected:
        sizes = "one size for all partitions" if expected == SCHEMA_VERSION else "one size for each partition"
        raise RecordError(f"schema_version: expected {expected}, got {version}, of a record with {sizes}")
    if zero := [name for name in _POSITIVE if values[name] == 0]:
        raise RecordError(f"{zero[0]}: expected more than 0")
    if len(values["block_latency_s"]) % 2:
        raise RecordError(f"block_latency_s: expected two blocks a round, got {len(values['block_latency_s'])} blocks")
    if not all(isinstance(value, dict) for value in (*values["parity"].values(), *values["conditions"])):
        raise RecordError("parity, conditions: expected objects in them")
    if not all(type(count) is int and moderate(count) for count in values["kernels"].values()):
        raise RecordError("kernels: expected a number of executions for each name")
    values["implementation"] = implementation_that_ran(values)
    return Record(**values)


def schema_version_of(*sizes: object) -> int:
    """Return the version of records with these numbers of features: that of sequences is another one."""
    return SCHEMA_VERSION if all(isinstance(size, int) for size in sizes) else UNEQUAL_SCHEMA_VERSION


def _sizes(name: str, values: list[Any], num_partitions: object) -> tuple[int, ...]:
    if len(values) != num_partitions:
        raise RecordError(f"{name}: expected one for each of {shown(num_partitions)} partitions, got {len(values)}")
    for value in values:
        if type(value) is not int or not moderate(value, 1):
            raise RecordError(f"{name}: expected a list of integers from 1 to 2^63, got {shown(value)} in it")
    return tuple(values)


def _samples(name: str, values: list[Any]) -> tuple[float, ...]:
    if values and set(map(type, values)) <= {float} and min(values) >= _SMALLEST and max(values) <= LARGEST:
        return tuple(values)
    for value in values:
        if type(value) not in (float, int) or not moderate(value, _SMALLEST):
            raise RecordError(f"{name}: expected a list of {_RANGE}, got {shown(value)} in it")
    return tuple(map(float, values))


def _tells(disturbance: Mapping[str, Any]) -> bool:
    """Tell whether an account of a disturbed machine is whole: every reader takes its numbers as they are."""
    needed = ("cpus", "windows", "disturbed_windows", "other_cpus", "other_cpus_most", "steal_cpus")
    stretch, waiting = disturbance.get("stretch"), disturbance.get("waiting")
    if not isinstance(waiting, Mapping) or not all(isinstance(name, str) for name in waiting):
        return False
    numbers = [*map(disturbance.get, needed), *waiting.values(), *([] if stretch is None else [stretch])]
    return all(isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one < math.inf for one in numbers)


def digest(value: object) -> str:
    """Hash a JSON-serialisable value to 16 hexadecimal digits, the same in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def finite(value: float | None) -> float | None:
    """Return the value, or None where it is infinite or NaN, for which JSON has no number."""
    return value if value is not None and math.isfinite(value) else None


# Between these moments (UTC, of two commits) JAX's `matmul` became a loop over the partitions by itself, where that was
# measured to be faster: on a single CPU device, forward, with few rows of large partitions. Now that loop is `in_turn`.
_SINCE, _UNTIL = "2026-11-24T19:03:37", "2026-11-28T19:31:00"
_FEWEST_ROWS, _WEIGHTS_A_FEATURE, _LARGE_PARTITION, _MANY_WEIGHTS = 4, 4, 2**14, 2**21


def implementation_that_ran(record: Mapping[str, Any]) -> str:
    """Return the present name of what a record measured, by the rule of its commit; records on disk stay as they are.

    A derivative was that of the batched product, so that only the forward pass is concerned.
    """
    name = record["implementation"]
    if (record["framework"], name, record["device"], record["direction"]) != ("jax", "matmul", "cpu", "forward"):
        return name
    if not (isinstance(record["in_features"], int) and isinstance(record["out_features"], int)):
        return name  # no record of unequal sizes is as old
    rows, partitions = record["batch"], record["num_partitions"]
    features, partition = record["in_features"] + record["out_features"], record["in_features"] * record["out_features"]
    looped = (
        _SINCE <= record["started_at"] < _UNTIL
        and record["dtype"] in ("float32", "float64")
        and partitions > 1
        and rows >= _FEWEST_ROWS
        and _WEIGHTS_A_FEATURE * rows * features <= partition
        and partition >= _LARGE_PARTITION
        and partitions * partition >= _MANY_WEIGHTS
    )
    return "in_turn" if looped else name
