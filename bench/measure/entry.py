"""A competitor on its way through a cell, and what the cell came to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.plan.competitors import EAGER, YARDSTICK, Competitor
from bench.records import SKIPPED

_BASELINES = (("torch", "matmul", EAGER), ("torch", "matmul", None), ("jax", "matmul", None))


@dataclass
class Entry:
    """A competitor in a cell, and what happened to it."""

    competitor: Competitor
    handle: str
    control: bool = False
    baseline: bool = False
    prepared: bool = False
    call_s: float = 0.0
    status: str = "ok"
    reason: str = ""
    skipped: bool = False
    blocks: list[float] = field(default_factory=list)
    calls_per_block: int | None = None
    warm_up: list[float] = field(default_factory=list)
    compile_s: float | None = None
    static_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None
    memory_method: str | None = None
    judgement: dict[str, Any] | None = None
    probe: dict[str, Any] = field(default_factory=dict)
    energy_j: float | None = None
    conditions: list[Mapping[str, Any]] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    leaving: bool = False
    left: bool = False

    def fail(self, status: str, reason: str, *, skipped: bool = False) -> None:
        """Ends the competitor."""
        self.status, self.reason, self.skipped = status, reason, skipped

    @property
    def timed(self) -> bool:
        """Whether the next round has blocks of it: it is right so far, and not yet decided."""
        return self.going and not self.left

    @property
    def label(self) -> str:
        """Tells the control from the baseline whose call it shares."""
        return self.competitor.label + (" again" if self.control else "")

    def skip(self, reason: str) -> None:
        """Ends the competitor because a cap of the preset keeps it out."""
        self.fail("unsupported", SKIPPED + reason, skipped=True)

    @property
    def going(self) -> bool:
        """Whether it still takes part."""
        return self.status == "ok"


def choose_baseline(entries: Sequence[Entry]) -> Entry | None:
    """The torch product, in eager mode if it is there, else JAX's, else whoever is first; never the yardstick."""
    going = [entry for entry in entries if entry.going and entry.competitor.kind != YARDSTICK]
    for framework, implementation, mode in _BASELINES:
        for entry in going:
            who = entry.competitor
            if (who.framework, who.implementation) == (framework, implementation) and mode in (None, who.mode):
                return entry
    return going[0] if going else None


def add_control(entries: list[Entry]) -> None:
    """Adds the A/A control: the baseline's prepared call in the same process, timed as if it were somebody else."""
    baseline = choose_baseline(entries)
    if baseline is None:
        return
    baseline.baseline = True
    control = Entry(baseline.competitor, baseline.handle, control=True, baseline=True)
    for name in ("calls_per_block", "call_s", "compile_s", "judgement", "peak_memory_bytes", "memory_method"):
        setattr(control, name, getattr(baseline, name))
    entries.append(control)


@dataclass(frozen=True)
class CellOutcome:
    """What a cell came to.

    Attributes:
        entries: all competitors, the control last.
        inputs_digest: hash of the inputs, or None if no worker drew any.
        switches: per framework, its precision switches.
        ceilings: rates of a large product and a large copy, the higher of the frameworks'.
        stopped: why no more rounds were run.
        disturbance: what others took of the machine during the rounds.
        disturbance_windows: the same in pieces.
    """

    entries: tuple[Entry, ...]
    inputs_digest: str | None
    switches: dict[str, dict[str, Any]]
    ceilings: Mapping[str, float] = field(default_factory=dict)
    stopped: str = ""
    disturbance: Mapping[str, Any] = field(default_factory=dict)
    disturbance_windows: Sequence[Mapping[str, Any]] = ()
