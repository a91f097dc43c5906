"""What XLA ran during one call."""

import re
import tempfile
from collections import Counter
from pathlib import Path

import jax

from bench.measure.intervals import busy_s
from bench.measure.timer import Call, Prepared, Trace

# Instructions that move or name nothing at run time.
_NO_WORK = frozenset({"parameter", "bitcast", "tuple", "get-tuple-element", "constant"})
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?:\([^=]*?\)|\S+) ([a-z][a-z0-9\-]*)\(", re.MULTILINE)


def instructions(text: str) -> Counter[str]:
    """Counts the instructions of a compiled program's entry computation that do work."""
    entry = text[text.index("ENTRY ") :]
    found = Counter(_INSTRUCTION.findall(entry[: entry.index("\n}")]))
    return Counter({name: count for name, count in found.items() if name not in _NO_WORK})


def _device_events(folder: Path) -> list[tuple[str, float, float]]:
    """Name, start and end in nanoseconds of everything that a GPU ran."""
    found = []
    for path in sorted(folder.rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                # Streams hold kernels and copies; the other lines repeat them by module or by operation.
                if line.name.startswith("Stream"):
                    found += [(event.name, event.start_ns, event.start_ns + event.duration_ns) for event in line.events]
    return found


def traced(prepared: Prepared, call: Call, device: str) -> Trace:
    """Runs a call under JAX's profiler on a GPU; on a CPU reads the compiled program instead.

    Args:
        prepared: the competitor, for its program.
        call: runs it once and waits.
        device: `cpu` or `cuda`.

    Returns:
        On a GPU the kernels with the union of their intervals; on a CPU the instructions of the program.
    """
    if device == "cpu":
        text = None if prepared.text is None else prepared.text()
        return Trace({} if text is None else dict(instructions(text)), None)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        events = _device_events(Path(folder))
    intervals = [(start, end) for _, start, end in events]
    return Trace(dict(Counter(name for name, _, _ in events)), busy_s(intervals) * 1e-9)
