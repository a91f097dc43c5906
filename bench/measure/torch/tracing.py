"""What torch ran during one call."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure.intervals import busy_s
from bench.measure.timer import Call, Trace


def _outermost(events: Sequence[object]) -> Counter[str]:
    """Operations that no other operation of torch's library called."""

    def inner(event: object) -> bool:
        parent = getattr(event, "cpu_parent", None)
        while parent is not None:
            if parent.name.startswith("aten::"):
                return True
            parent = parent.cpu_parent
        return False

    return Counter(
        str(event.name)  # type: ignore[attr-defined]
        for event in events
        if event.name.startswith("aten::") and not inner(event)  # type: ignore[attr-defined]
    )


def traced(call: Call, device: str) -> Trace:
    """Runs a call under torch's profiler.

    Args:
        call: a call that was warmed up.
        device: `cpu` or `cuda`.

    Returns:
        On a GPU the kernels, copies and fills with the union of their intervals; on a CPU the operations.
    """
    if device == "cpu":
        with profile(activities=[ProfilerActivity.CPU]) as found:
            call()
        return Trace(dict(_outermost(found.events() or ())), None)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    events = [event for event in found.events() or () if event.device_type.name == "CUDA"]
    intervals = [(event.time_range.start, event.time_range.end) for event in events]
    # The profiler's unit is the microsecond.
    return Trace(dict(Counter(event.name for event in events)), busy_s(intervals) * 1e-6)
