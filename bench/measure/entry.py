"""A competitor on its way through a cell, and what the cell came to."""

from dataclasses import dataclass, field
from typing import Any

from bench.plan.competitors import Competitor


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

    def fail(self, status: str, reason: str, *, skipped: bool = False) -> None:
        """Ends the competitor."""
        self.status, self.reason, self.skipped = status, reason, skipped

    def skip(self, reason: str) -> None:
        """Ends the competitor because a cap of the preset keeps it out."""
        self.fail("unsupported", f"skipped: {reason}", skipped=True)

    @property
    def going(self) -> bool:
        """Whether it still takes part."""
        return self.status == "ok"


@dataclass(frozen=True)
class CellOutcome:
    """What a cell came to.

    Attributes:
        entries: all competitors, the control last.
        inputs_digest: hash of the inputs, or None if no worker drew any.
        switches: per framework, its precision switches.
    """

    entries: tuple[Entry, ...]
    inputs_digest: str | None
    switches: dict[str, dict[str, Any]]
