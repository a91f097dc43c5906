"""The unit of storage: what one competitor did in one cell, in one process."""

import hashlib
import json
import math
import operator
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import repeat
from types import MappingProxyType
from typing import Any

SCHEMA_VERSION = 1
# Raised when a change makes earlier measurements incomparable; part of every key.
HARNESS_VERSION = "3"
STATUSES: tuple[str, ...] = ("ok", "mismatch", "unsupported", "oom", "timeout", "crash")
# Why a cell's rounds ended; empty where there were none.
STOPS: tuple[str, ...] = ("", "resolved", "precise", "rounds", "time")
# What the reason of a competitor begins with that a cap of the preset kept out.
SKIPPED = "skipped: "


class RecordError(ValueError):
    """A line that is no valid record."""


def _tells(disturbance: Mapping[str, Any]) -> bool:
    """Say whether an account of a disturbed machine is whole: every reader takes its numbers as they are."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf

    needed = ("cpus", "windows", "disturbed_windows", "other_cpus", "other_cpus_most", "steal_cpus")
    stretch, waiting = disturbance.get("stretch"), disturbance.get("waiting")
    return (
        all(number(disturbance.get(name)) for name in needed)
        and (stretch is None or number(stretch))
        and isinstance(waiting, Mapping)
        and all(isinstance(name, str) and number(share) for name, share in waiting.items())
    )


@dataclass(frozen=True, slots=True)
class Record:
    """One line of `records.jsonl`. Times are in seconds, memory is in bytes.

    Attributes:
        schema_version: version of this list of fields.
        key: hash of everything that identifies the measurement; unique in a file.
        cell: hash shared by the records that were measured against each other.
        cell_size: number of records of that cell and process replicate.
        workload: name in the catalogue.
        num_partitions: `n`.
        in_features: per partition.
        out_features: per partition.
        batch: rows of one partition.
        dtype: storage dtype.
        device: `cpu` or `cuda`.
        framework: `torch` or `jax`.
        implementation: registry name, `stock:...` or `dense`.
        kind: `implementation`, `stock` or `yardstick`.
        mode: `eager`, `compile` or `jit`.
        direction: `forward`, `forward_backward` or `train_step`.
        division: `stock`, `matched` or `tuned`.
        precision: the precision class asked for.
        observed_precision: the class that the error shows, or None where nothing ran.
        layout: how x lies in memory.
        cache: `warm` or `cold`.
        status: one of `STATUSES`.
        reason: one sentence for every status but ok, else empty.
        skipped: True where a cap of the preset kept the competitor out; its status is then `unsupported`.
        block_latency_s: duration of each timed block, raw and in order, two a round (order, then reverse order).
        calls_per_block: calls in each block.
        latency_s: median seconds of one call; None unless the status is ok.
        rejected_block_latency_s: blocks of a competitor whose result was wrong after timing or whose process ended.
        warm_up_block_latency_s: blocks before the first round, the rehearsal's among them; where that was far too
            short, those of the size that was found then follow.
        compile_s: tracing, lowering and compilation with an empty on-disk cache; None in eager mode.
        peak_memory_bytes: growth over the live arguments during one call, at least the results themselves; or None.
        memory_method: how that figure was obtained.
        static_memory_bytes: outputs and temporaries by the compiler's own account, or what a CUDA graph took while
            it was recorded; or None.
        bound_fraction: largest error over its bound, over all tensors; at most 1 if right.
        parity: per tensor: status, bound_fraction, max_abs_error.
        useful_flops: operations that the function needs in one call.
        compulsory_bytes: bytes that must move in one call.
        waste_factor: how many times the useful products are carried out.
        process_replicate: number of the set of processes. Memory, single calls, enqueueing, kernels, energy and
            compiling again are measured in the first alone, which is 0.
        control: True for the baseline's second run in the same rounds (the A/A control).
        baseline: True for the competitor that the ratios of the cell refer to.
        seed: of the inputs and the order.
        inputs_digest: hash of the input bytes, the same in both frameworks.
        switches: the framework's precision switches during the run.
        started_at: UTC, ISO 8601.
        environment_id: key into `environment.json`.
        optimizer: of `train_step`, by its name in the neutral specification; None in other directions.
        synchronised_latency_s: durations of single calls, each waited for, raw and in order.
        enqueue_s: median host seconds until a call returns, its result not waited for; of several short series of
            calls the least.
        device_busy_s: seconds of one call in which the device ran anything; from a separate, traced pass.
        kernels: name to executions in one call, of what ran on the device; from the same pass.
        compile_warm_s: the same compilation again, with the cache that the first one filled; None in eager mode.
        program_flops: operations of the compiled or traced program by the framework's own account, or None.
        energy_j: joules of one call where the device reports energy, or None; all that the device took in a
            second or more of such calls, over their number.
        ceiling_flops_per_s: rate of a large product in the same session and precision, or None.
        ceiling_bytes_per_s: rate of a large copy in the same session, bytes read and written, or None.
        peak_flops_per_s: the most that the hardware can do by its data sheet, in the faster one of the precisions that
            was asked for and that was observed; None where that is not known.
        peak_bytes_per_s: the same for its memory.
        stopped: why no more rounds were run: `resolved`, `precise`, `rounds` or `time`; empty if none ran.
        conditions: per round, what the device reported: clocks, power, temperature, throttling; empty without a report.
        block_s: what a block was sized to last at least; None in records that do not say it.
        disturbance: what others took of the machine during the rounds, and what that did to the workers, by
            `bench.measure.disturbance`; empty where the system does not say, and in earlier records.
        disturbance_windows: the same for every half second or so, in order; in the record of the baseline alone.
        finished_at: of the cell, as `started_at`; None in records that do not say it.
        prepared_call_s: the shortest of the first calls, before any block, each waited for; None if none came to its
            end, and in earlier records.
    """

    schema_version: int
    key: str
    cell: str
    cell_size: int
    workload: str
    num_partitions: int
    in_features: int
    out_features: int
    batch: int
    dtype: str
    device: str
    framework: str
    implementation: str
    kind: str
    mode: str
    direction: str
    division: str
    precision: str
    observed_precision: str | None
    layout: str
    cache: str
    status: str
    reason: str
    skipped: bool
    block_latency_s: tuple[float, ...]
    calls_per_block: int | None
    latency_s: float | None
    rejected_block_latency_s: tuple[float, ...]
    warm_up_block_latency_s: tuple[float, ...]
    compile_s: float | None
    peak_memory_bytes: int | None
    memory_method: str | None
    static_memory_bytes: int | None
    bound_fraction: float | None
    parity: Mapping[str, Mapping[str, Any]]
    useful_flops: int
    compulsory_bytes: int
    waste_factor: int
    process_replicate: int
    control: bool
    baseline: bool
    seed: int
    inputs_digest: str | None
    switches: Mapping[str, Any]
    started_at: str
    environment_id: str
    optimizer: str | None = None
    synchronised_latency_s: tuple[float, ...] = ()
    enqueue_s: float | None = None
    device_busy_s: float | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    compile_warm_s: float | None = None
    program_flops: int | None = None
    energy_j: float | None = None
    ceiling_flops_per_s: float | None = None
    ceiling_bytes_per_s: float | None = None
    peak_flops_per_s: float | None = None
    peak_bytes_per_s: float | None = None
    stopped: str = ""
    conditions: tuple[Mapping[str, Any], ...] = ()
    block_s: float | None = None
    disturbance: Mapping[str, Any] = field(default_factory=dict)
    disturbance_windows: tuple[Mapping[str, Any], ...] = ()
    finished_at: str | None = None
    prepared_call_s: float | None = None

    def __post_init__(self) -> None:
        """Refuses a record that contradicts itself."""
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
        """One readable name, for example `torch matmul (eager)`."""
        return f"{self.framework} {self.implementation} ({self.mode})"

    def without_samples(self) -> "Record":
        """The record without what only statistics need, so that the report of a large sweep fits into memory.

        Not for storage: such a record is no valid line.
        """
        # The checks of a record that is already there need no repetition.
        row = list(_VALUES(self))
        for place, value in _LIGHT:
            row[place] = value
        return filled(row, check=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the values in order; a read-only mapping, which cannot be pickled, arrives as a plain one."""
        row = [dict(value) if isinstance(value, MappingProxyType) else value for value in _VALUES(self)]
        return partial(filled, check=False), (row,)

    def to_line(self) -> bytes:
        """The record as one JSON line, newline included."""
        # Not `asdict`, which copies every sample before it is written.
        return (json.dumps({name: getattr(self, name) for name in FIELD_NAMES}, allow_nan=False) + "\n").encode()


FIELD_NAMES = tuple(item.name for item in fields(Record))
# Loops over the fields in C: a large sweep has hundreds of thousands of records.
_VALUES = operator.attrgetter(*FIELD_NAMES)
_SETTERS = tuple(Record.__dict__[name].__set__ for name in FIELD_NAMES)
SAMPLES = tuple(item.name for item in fields(Record) if item.type == tuple[float, ...])
_LIGHT: tuple[tuple[int, Any], ...] = tuple(
    (FIELD_NAMES.index(name), value)
    for name, value in {
        **dict.fromkeys((*SAMPLES, "conditions", "disturbance_windows"), ()),
        "parity": MappingProxyType({}),
        "switches": MappingProxyType({}),
    }.items()
)


def filled(row: Sequence[Any], *, check: bool = True) -> Record:
    """A record from the values of its fields in order; several times as fast as its constructor."""
    if len(row) != len(_SETTERS):
        raise ValueError(f"row: expected {len(_SETTERS)} values, one a field, got {len(row)}")
    record = object.__new__(Record)
    # The stubs of map know no callable that takes another one.
    deque(map(operator.call, _SETTERS, repeat(record, len(_SETTERS)), row), maxlen=0)  # pyright: ignore[reportArgumentType]
    if check:
        record.__post_init__()
    return record


def digest(value: object) -> str:
    """Hashes a JSON-serialisable value to 16 hexadecimal digits, the same in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def finite(value: float | None) -> float | None:
    """The value, or None where it is infinite or NaN, for which JSON has no number."""
    return value if value is not None and math.isfinite(value) else None
