"""Peak memory of one call on a CPU: how far the resident set rises above its level before the call.

Linux keeps a high-water mark for each process and lets the process reset its own. Memory that the allocator holds back
is returned first, so that the call has to fault its pages in again; the size of what is already held would not show.
"""

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

HIGH_WATER_RESET, LIFETIME_PEAK = "resident_high_water", "lifetime_resident_peak"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no field {field}")


def _return_free_memory() -> None:
    gc.collect()
    # musl and macOS have no malloc_trim; the growth is then an underestimate, which their allocators make small.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _lifetime_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_growth(call: Callable[[], object]) -> tuple[int, str]:
    """Runs the call once and measures by how much the resident set rose at its highest.

    Args:
        call: returns when its result is ready; the result is dropped.

    Returns:
        Bytes, and the method: `resident_high_water`, or `lifetime_resident_peak` where the system cannot reset its
        mark (then only a fresh process gives more than a lower bound).
    """
    _return_free_memory()
    try:
        _CLEAR.write_text("5")
        before = _status_bytes("VmRSS")
    except OSError:
        before = _lifetime_peak()
        call()
        return max(0, _lifetime_peak() - before), LIFETIME_PEAK
    call()
    return max(0, _status_bytes("VmHWM") - before), HIGH_WATER_RESET


def free_bytes() -> int:
    """Memory that a process may still take, in bytes: of the machine, or of the control group where that is less.

    Raises:
        OSError: where the system does not say.
    """
    available = None
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    if available is None:
        import os

        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available


def last_cache_bytes() -> int:
    """Size of the last level of this processor's caches; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=32 * 2**20)
